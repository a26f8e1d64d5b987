"Derived from nbs/07_records.ipynb by `make tests`; edit the notebook, not this file."
import atexit, gc, io, json, os, re, shutil, sys, tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from uuid import uuid4
import numpy as np, torch
from PIL import Image
from rich.progress import Progress
from torch.utils.data import ConcatDataset, Subset
from torch.utils.data import Dataset as TorchDataset
from vlm_lit.core import ConfigError, DataError, progress_console
from vlm_lit.files import cache_folder, digest, file_stamp, new_folder, sha256
from vlm_lit.hub import hub_lookup
from vlm_lit.text.messages import RECORD_KEYS, REFUSED_KEYS, ROLES, image_names, read_record
from vlm_lit.text.record_forms import CONTENT_KEYS, check_columns, find_form, name_columns
from vlm_lit.text.record_forms import to_conversation
from vlm_lit.images import decode_image, safe_path
from vlm_lit.data.record_images import record_name, take_images
from vlm_lit.data.sources import Source, choose_split, find_source, scan_source
import base64, gzip, multiprocessing, os, pickle, tarfile, tempfile
from collections import Counter
import pyarrow as pa, pyarrow.parquet as pq
from datasets import Dataset as Table, Image as ImageFeature, disable_progress_bars
from fastcore.test import test_eq, expect_fail
from hypothesis import given, settings, strategies as st
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.data.records import _build_store, _plain_record, _read_raw, _store, _remove_by
from vlm_lit.text.messages import read_record
from vlm_lit.data.records import GC_THRESHOLD
from vlm_lit.data.records import Records
from vlm_lit.data.records import _View
from vlm_lit.data.records import _store_row
from vlm_lit.data.records import fingerprint

def setup_module():
    global CHAT, RED, TURNS, URL, large_file, mixed_records, png_of, three_parts, write_all_kinds, write_forms
    disable_progress_bars()
    os.environ["VLM_LIT_CACHE"] = tempfile.mkdtemp()
    def mixed_records():
        turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "é 🙂\u2028"}]
        return [
            {"id": "a", "image": "x.png", "conversations": turns},
            {"id": "b", "conversations": turns},
            {"id": "c", "image": ["x.png", "y.png"], "conversations": turns},
            {"id": "d", "image": [], "conversations": turns},
        ]
    def write_all_kinds(records, folder):
        "The records as files and folders of every kind; a column `image` has to be a list in a table."
        for indent, name in ((None, "flat.json"), (2, "pretty.json")):
            text = json.dumps(records, indent=indent, ensure_ascii=False)
            (folder / name).write_text(text, encoding="utf-8")
        lines = "\n".join(json.dumps(r) for r in records)
        (folder / "lines.jsonl").write_text(lines, encoding="utf-8")
        rows = [{**r, "image": image_names(r) or None, "source": "web", "score": 1} for r in records]
        pq.write_table(pa.Table.from_pylist(rows), folder / "one.parquet")
        (folder / "parts").mkdir()
        schema = pa.Table.from_pylist(rows).schema
        for n, half in enumerate((rows[:1], rows[1:])):
            pq.write_table(pa.Table.from_pylist(half, schema), folder / f"parts/{n}.parquet")
        Table.from_list(rows).save_to_disk(folder / "saved")
        return sorted(p for p in folder.iterdir())
    def png_of(color):
        "A small image as a file's bytes."
        Image.new("RGB", (8, 8), color).save(out := io.BytesIO(), "PNG")
        return out.getvalue()
    RED = {"bytes": png_of("red"), "path": None}
    TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A box."}]
    CHAT = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A box."}]},
    ]
    URL = "data:image/png;base64," + base64.b64encode(png_of("red")).decode()
    def write_forms(folder):
        "A data set in each form, with one record and one red image; name -> form."
        asked = {"question": "What?", "answer": "A box."}
        texts = [{"user": "What?", "assistant": "A box.", "source": "s"}]
        part = {"type": "image_url", "image_url": {"url": URL}}
        linked = [{"role": "user", "content": [part, CHAT[0]["content"][1]]}, CHAT[1]]
        (folder / "x.png").write_bytes(png_of("red"))
        lines = {
            "llava.json": json.dumps([{"image": "x.png", "conversations": TURNS}]),
            "lines.jsonl": json.dumps({"images": ["x.png"], "messages": CHAT}),
            "url.jsonl": json.dumps({"messages": linked}),
            "rows.csv": "image,question,answer\nx.png,What?,A box.\n",
            "rows.tsv": "image\tquestion\tanswer\nx.png\tWhat?\tA box.\n",
        }
        for name, text in lines.items(): (folder / name).write_text(text)
        (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines["lines.jsonl"].encode()))
        tables = {
            "cauldron": {"images": [RED], "texts": texts},
            "onevision": {"id": "a", "image": RED, "conversations": TURNS, "data_source": "d"},
            "columns": {"image": RED, **asked},
            "completion": {"images": [RED], "prompt": "What?", "completion": "A box."},
        }
        for name, row in tables.items():
            pq.write_table(pa.Table.from_pylist([row]), folder / f"{name}.parquet")
        with tarfile.open(folder / "shard.tar", "w") as tar:
            for name, data in {"1.png": png_of("red"), "1.json": json.dumps(asked).encode()}.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        (folder / "pictures").mkdir()
        (folder / "pictures/x.png").write_bytes(png_of("red"))
        row = json.dumps({"file_name": "x.png", **asked})
        (folder / "pictures/metadata.jsonl").write_text(row)
        asked = "question and answer"
        forms = dict.fromkeys(
            ["rows.csv", "rows.tsv", "columns.parquet", "shard.tar", "pictures"], asked
        )
        forms |= dict.fromkeys(["llava.json", "onevision.parquet"], "conversations")
        forms |= dict.fromkeys(["lines.jsonl", "url.jsonl", "packed.jsonl.gz"], "messages")
        forms["cauldron.parquet"] = "texts of user and assistant"
        return forms | {"completion.parquet": "prompt and completion"}
    def large_file(n=9000):
        "A list of records that needs a store."
        path = Path(tempfile.mkdtemp()) / "large.json"

        def record(k):
            turns = [
                {"from": "human", "value": "What is in the photo?\n<image>"},
                {"from": "gpt", "value": f"the number {k:06}"},
            ]
            return {"id": f"{k:06}", "image": f"{k}.png", "conversations": turns}

        path.write_text(json.dumps([record(k) for k in range(n)], indent=1))
        return path
    def three_parts():
        "Two records each: a list, a table with images inside, and a file."
        turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
        own = [
            {"id": f"list {k}", "image": Image.new("RGB", (8, 8), "red"), "conversations": turns}
            for k in "01"
        ]
        rows = [{"id": f"table {k}", "image": RED, "conversations": turns} for k in "01"]
        path = Path(tempfile.mkdtemp()) / "file.jsonl"
        rest = [{"id": f"file {k}", "image": URL, "conversations": turns} for k in "01"]
        path.write_text("\n".join(map(json.dumps, rest)))
        return [own, Table.from_list(rows), Records(path)]

def test_a_record_is_brought_into_one_form():
    raw = {"id": "a", "image": ["x.png"], "messages": [{"role": "user", "content": "<image>What?"}]}
    watch = ["raw", "record", "image_names(record)"]
    with Breakpoint(_store_row, at="names = image_names", watch=watch) as bp:
        _store_row(raw, 0)
    bp.expect({"record['conversations']": [{"from": "human", "value": "<image>What?"}]})
    bp.expect_return(n_images=1, id='"a"')

def test_a_bad_record_is_refused_with_its_place():
    path = Path(tempfile.mkdtemp()) / "two.json"
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    raws = [{"id": "good", "conversations": turns}, {"id": 7, "conversations": [{"from": "human"}]}]
    path.write_text(json.dumps(raws))
    with Breakpoint(_store_row, at='error = {"message"', watch="n e.record e.turn e.kind") as bp:
        print("images:", Records(path).n_images.tolist())
    with expect_fail(DataError, contains="record 7, turn 0: a turn must be"):
        Records(path)[1]
    bp.expect({"e.record": 7, "e.turn": 0, "e.kind": "roles"}, n=1)
    bp.expect_return(n_images=-1)

def test_an_image_in_a_table_is_named_by_its_place():
    Image.new("RGB", (32, 24), "red").save(png := io.BytesIO(), "PNG")
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    table = Table.from_list([{"image": png.getvalue(), "conversations": turns}])
    watch = ["name", "i", "k", "len(images)"]
    with Breakpoint(Records.embedded, at="return images[k] if", watch=watch) as bp:
        print(Records(table).open_image("embedded:0/0").size)
    bp.expect({"len(images)": 1}, name="embedded:0/0", i=0, k=0)

def test_records_are_the_same_from_every_kind_of_file():
    import vlm_lit.data.records as module

    wanted = [read_record(r) for r in mixed_records()]
    files = write_all_kinds(mixed_records(), Path(tempfile.mkdtemp()))
    small = module.SMALL
    for module.SMALL in (0, small):  # with a store and without one
        for file in files:
            records = Records(file)
            if module.SMALL:
                print(f"{file.name:12}", len(records), records.n_images.tolist())
            source = {} if file.suffix in (".json", ".jsonl") else {"source": "web"}
            test_eq(list(records), [{**r, **source} for r in wanted])
            test_eq(records.n_images.tolist(), [1, 0, 2, 0])
            test_eq((records[-1]["id"], [r["id"] for r in records[1:3]]), ("d", ["b", "c"]))
            with expect_fail(IndexError): records[4]
    test_eq(
        [f.name for f in files],
        ["flat.json", "lines.jsonl", "one.parquet", "parts", "pretty.json", "saved"],
    )
    test_eq(list(Records(Table.from_list([{**r, "image": image_names(r)} for r in wanted]))), wanted)

def test_every_form_is_read_from_its_container():
    import vlm_lit.data.records as module

    folder, small = Path(tempfile.mkdtemp()), module.SMALL
    for name, form in write_forms(folder).items():
        for module.SMALL in (0, small):  # with a store and without one
            records = Records(folder / name)
            test_eq((len(records), records.n_images.tolist()), (1, [1]))
            test_eq(records.form, f"{name}: {form}")
            (record,) = records
            assert "ignored" not in record, record
            turns = [{k: turn[k] for k in ("from", "value")} for turn in record["conversations"]]
            test_eq([turn["value"] for turn in turns], [turn["value"] for turn in TURNS])
            place = records.path if records.path.is_dir() else records.path.parent
            pixel = records.open_image(*image_names(record), place).getpixel((0, 0))
            test_eq(pixel, (255, 0, 0))
        print(records.form)

def test_a_changed_file_is_never_read_from_an_old_store():
    path = large_file()
    records = Records(path)
    folder = Path(records.table.cache_files[0]["filename"]).parent
    test_eq((len(records), records[8999]["id"]), (9000, "008999"))
    test_eq(sorted(p.name for p in folder.iterdir()), ["meta.json", "records.arrow"])
    path.write_text(path.read_text().replace("008999", "oo8999"))
    test_eq(records[8999]["id"], "008999")
    again = Records(path)
    test_eq((again[8999]["id"], folder.exists()), ("oo8999", False))  # a new store; the old one is gone
    with Breakpoint(_build_store, at="with new_folder") as bp: Records(path)
    test_eq(len(bp.hits), 0)  # the second open builds nothing
    store = Path(again.table.cache_files[0]["filename"])
    whole = store.read_bytes()
    at = whole.index(b"the number 008998")
    flipped = whole[:at] + b"T" + whole[at + 1 :]  # the length stays, and one letter differs
    for damaged in (b"half", whole[:-2000], flipped):
        store.write_bytes(damaged)
        answer = Records(path)[8998]["conversations"][1]["value"]
        test_eq(answer, "the number 008998")  # a damaged store is written again
    for text in ("", "[]", "null", "3", '"x"', "{}", '{"n": null}', '{"n": [9000]}', "[" * 99999):
        store.with_name("meta.json").write_text(text)
        test_eq(Records(path)[8998]["id"], "008998")
    path.unlink()
    with expect_fail(DataError, contains="no data file"): Records(path)

def test_a_subset_of_several_data_sets():
    joined = ConcatDataset(three_parts())
    with Breakpoint(_View.__getitem__, at="return self.parts", watch="part row") as bp:
        records = Records(Subset(joined, [3, -1]))
        print([record["id"] for record in records], records.form)
    bp.expect_each(part=[1, 2, 1], row=[1, 1, 1])
    test_eq([record["id"] for record in records], ["table 1", "file 1"])
    for k in range(2):
        test_eq(records.open_image(f"embedded:{k}/0").getpixel((0, 0)), (255, 0, 0))
    with expect_fail(DataError, contains="no image 'embedded:2/0'"):
        records.open_image("embedded:2/0")

def test_a_plain_record_is_read_as_in_four_steps():
    texts = st.text("a<image>\n\ud83dé:", max_size=8)
    values = st.none() | texts | st.integers() | st.booleans() | st.lists(texts, max_size=2)
    roles = st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool", 3])
    pair = lambda role, text: {"from": role, "value": text}
    turns = st.builds(pair, roles, texts) | st.builds(pair, roles, values)
    turns = turns | st.builds(lambda turn, extra: {**turn, **extra}, turns, st.just({"train": False}))
    talks = st.lists(turns, max_size=4) | values
    usual = st.lists(texts, min_size=1, max_size=3).map(
        lambda own: [pair(("human", "gpt")[n % 2], text) for n, text in enumerate(own)]
    )
    keys = {"id": values | st.just(float("nan")), "image": values, "type": values}
    common = st.fixed_dictionaries(
        {"id": st.integers() | texts, "conversations": usual}, optional={"image": texts}
    )
    any_other = st.fixed_dictionaries({"conversations": usual | talks}, optional=keys)
    counts = Counter()

    def in_four_steps(raw):
        row, images = take_images(raw, 5)
        return read_record(to_conversation(row, record_name(row, 5)), 5), images

    def attempt(read, *args):
        try: return read(*args)
        except DataError as e: return str(e)

    @settings(max_examples=600, deadline=None, derandomize=True)
    @given(common | any_other)
    def check(raw):
        counts[_plain_record(raw) is not None] += 1
        assert attempt(_read_raw, raw, 5, {}) == attempt(in_four_steps, raw), raw

    check()
    assert min(counts.values()) > 60, counts
    plain = {"id": 3, "image": "a.png", "conversations": [pair("user", "q"), pair("gpt", "a")]}
    assert _plain_record(plain)
    for key, value in [
        ("image", "C:/a.png"),
        ("image", "data:,"),
        ("system", "Be brief."),
        ("id", 1.5),
    ]:
        assert not _plain_record({**plain, key: value}), key

def test_a_worker_gets_a_path_and_no_records():
    dumps = multiprocessing.reduction.ForkingPickler.dumps
    sizes = [len(dumps(Records(large_file(n)))) for n in (9000, 18000)]
    print(sizes, "bytes")
    assert max(sizes) < 20_000 and abs(sizes[0] - sizes[1]) < 50

def test_data_that_is_not_there_or_no_data():
    place = Path(tempfile.mkdtemp())
    with expect_fail(DataError, contains="no data file"):
        Records(place / "gone.json")
    with expect_fail(DataError, contains="is a folder without Parquet files"):
        Records(place)
    for text in (" \n", "[ ]", " " * (2 << 20)):
        (place / "empty.json").write_text(text)
        with expect_fail(DataError, contains="no records in empty.json"):
            Records(place / "empty.json")
    (place / "bad.parquet").write_bytes(b"x" * 10)
    with expect_fail(DataError, contains="bad.parquet: cannot be read as a table"):
        Records(place / "bad.parquet")
    (place / "splits").mkdir()
    (place / "splits/dataset_dict.json").write_text("{}")
    for name in ("test", "train"):
        Table.from_list([{"id": 1}]).save_to_disk(place / "splits" / name)
    with expect_fail(
        DataError, contains="splits holds several splits; give one of them as split: test"
    ):
        Records(place / "splits")
    test_eq(len(Records(place / "splits", "train")), 1)
    from datasets import DatasetDict

    table = Table.from_list([{"id": 1}])
    both = DatasetDict(train=table, test=Table.from_list(mixed_records()[1:2]))
    for own in (both, both.to_iterable_dataset() if hasattr(both, "to_iterable_dataset") else both):
        with expect_fail(DataError, contains="several splits; give one of them as split: train, test"):
            Records(own)
    test_eq(Records(both, "test")[0]["id"], "b")
    with expect_fail(DataError, contains="has no split 'tset'; did you mean 'test'?"):
        Records(both, "tset")
    with expect_fail(DataError, contains="data in memory has no splits"):
        Records([], "train")
    with expect_fail(ConfigError, contains="are given where a file is opened"):
        Records(Records([]), "train")
    for wrong in (3, None, {1, 2}, np.zeros(3), object()):
        with expect_fail(ConfigError, contains="records cannot be read from a"):
            Records(wrong)
    broken = Records([{"id": "x"}, 3, {"conversations": []}])
    with expect_fail(DataError, contains="record 'x': no form fits the columns 'id'"):
        broken[0]
    test_eq(([broken.name(i) for i in range(3)], broken.n_images.tolist()), (["x", 1, 2], [-1, -1, 0]))
    with expect_fail(DataError, contains="record 1: a record must be a JSON object"):
        broken[1]

def test_a_name_without_a_file_is_looked_for_on_the_hub():
    import datasets

    SETS = {("user/set",): ["train"], ("user/set", "part"): ["train", "test"]}

    def splits(*place): return SETS[place]

    def hub(*place, split):
        return Table.from_list([{**mixed_records()[1], "id": "/".join([*place, split])}])

    usual = datasets.load_dataset, datasets.get_dataset_split_names
    datasets.load_dataset, datasets.get_dataset_split_names = hub, splits
    try:
        test_eq(Records("user/set")[0]["id"], "user/set/train")
        test_eq(Records("user/set:part", "test")[0]["id"], "user/set/part/test")
        with expect_fail(DataError, contains="user/set:part holds several splits; give one of them"):
            Records("user/set:part")
        with expect_fail(DataError, contains="user/set has no split 'test'"):
            Records("user/set", "test")
        with expect_fail(DataError, contains="no data file 'user/gone', and the hub gives no data set"):
            Records("user/gone")
        for path in ("./user/set", "../user/set", "user/set/"):
            with expect_fail(DataError, contains="no data file"): Records(path)
    finally: datasets.load_dataset, datasets.get_dataset_split_names = usual

def test_a_changed_file_has_another_fingerprint():
    place = Path(tempfile.mkdtemp()) / "data.bin"
    place.write_bytes(bytes(1_000_000))
    before, stamp = fingerprint([place]), place.stat()
    test_eq(fingerprint([place]), before)
    for at in (0, 999_999):  # the first or the last byte, size and time as they were
        data = bytearray(1_000_000)
        data[at] = 1
        place.write_bytes(data)
        os.utime(place, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert fingerprint([place]) != before
    place.write_bytes(bytes(1_000_000))
    os.utime(place, ns=(0, 0))
    assert fingerprint([place]) != before  # only the time

def test_files_of_a_folder_may_have_other_columns():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    folder = Path(tempfile.mkdtemp())
    pq.write_table(pa.Table.from_pylist([{"id": "a", "conversations": turns}]), folder / "0.parquet")
    later = [{"source": "web", "image": ["x.png"], "id": "b", "conversations": turns}]
    pq.write_table(pa.Table.from_pylist(later), folder / "1.parquet")
    records = Records(folder)
    test_eq(records[0], {"id": "a", "conversations": turns})
    test_eq(records[1], {"id": "b", "image": "x.png", "conversations": turns, "source": "web"})
    test_eq(records.n_images.tolist(), [0, 1])
    pq.write_table(pa.Table.from_pylist([{"id": 3, "conversations": "text"}]), folder / "2.parquet")
    with expect_fail(DataError, contains="cannot be read as a table"):
        Records(folder)

def test_metadata_of_renamed_columns_is_left_out():
    table = Table.from_list(
        [{"image": {"bytes": png_of("red"), "path": None}, "q": "What?", "a": "A box."}]
    )
    place = Path(tempfile.mkdtemp())
    table.to_parquet(place / "x.parquet")
    old = pq.read_table(place / "x.parquet")
    assert b"huggingface" in old.schema.metadata  # the names of before, which pyarrow can keep
    arrow = old.rename_columns(["picture", "question", "answer"])
    arrow = arrow.replace_schema_metadata(old.schema.metadata)
    pq.write_table(arrow, place / "x.parquet")
    (record,) = Records(place / "x.parquet", columns={"image": "picture"})
    test_eq([turn["value"] for turn in record["conversations"]], ["<image>\nWhat?", "A box."])
    with expect_fail(IndexError, contains="no record 7, there are 1"):
        Records(place / "x.parquet")[7]
    pq.write_table(old.rename_columns(["image", "a\0b", "answer"]), place / "nul.parquet")
    with expect_fail(DataError, contains="cannot be kept as a table"):
        Records(place / "nul.parquet")
    nothing = Records(Table.from_dict({"question": [], "answer": []}))
    test_eq((len(nothing), nothing.n_images.tolist()), (0, []))

def test_messages_and_images_of_tables():
    from datasets import Features, Image as ImageFeature, List, Value

    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    rows = [
        {"id": n, "images": [{"bytes": png_of(c), "path": None}], "messages": messages}
        for n, c in enumerate(["red", "blue", "red"])
    ]
    place = Path(tempfile.mkdtemp()) / "images.parquet"
    pq.write_table(pa.Table.from_pylist(rows), place)
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    decoded = [{"image": png_of(c), "conversations": turns} for c in ("red", "blue", "red")]
    decoded = Table.from_list(decoded).cast_column("image", ImageFeature())
    for source in (place, decoded):
        records = Records(source)
        found = records[1]["conversations"]
        test_eq([{k: turn[k] for k in ("from", "value")} for turn in found], turns)
        kept = [["<image>", "q"], ["a"]] if source is place else [None, None]
        test_eq([turn.get("parts") for turn in found], kept)
        names = [image_names(r)[0] for r in records]
        test_eq(names, ["embedded:0/0", "embedded:1/0", "embedded:2/0"])
        pixels = [records.open_image(n).getpixel((0, 0)) for n in names]
        test_eq(pixels, [(255, 0, 0), (0, 0, 255), (255, 0, 0)])
        test_eq(records.n_images.tolist(), [1, 1, 1])
    for name in ("embedded:0/1", "embedded:3/0", "embedded:x"):
        with expect_fail(DataError, contains=f"no image '{name}' in the data"):
            records.open_image(name)
    for name in ("embedded:0/0", "x.png"):  # a list has no images inside
        with expect_fail(DataError, contains=f"no image '{name}'"):
            Records([]).open_image(name, place.parent)
    row = {"id": b"a\xc3\xa9", "conversations": {"from": ["human", "gpt"], "value": [b"q", b"a"]}}
    pq.write_table(pa.Table.from_pylist([row]), place)
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    test_eq(Records(place)[0], {"id": "aé", "conversations": talk})
    row = {"id": "a", "conversations": [{"from": "human", "value": b"\xff"}]}
    pq.write_table(pa.Table.from_pylist([row]), place)
    with expect_fail(
        DataError, contains="record 'a': column 'conversations': holds bytes that are no text"
    ):
        Records(place)[0]
    test_eq(Records(place).n_images.tolist(), [-1])

def test_parts_of_messages_survive_the_store():
    content = [{"type": "text", "text": "What "}, {"type": "text", "text": "now?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    raws = [{"id": 0, "messages": messages}, {"id": 1, "conversations": turns}]
    path = Path(tempfile.mkdtemp()) / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, raws)))
    import vlm_lit.data.records as module

    small = module.SMALL
    for module.SMALL in (0, small):  # with a store and without one
        found = list(Records(path))
        test_eq(found, [read_record(raw, n) for n, raw in enumerate(raws)])
    print(found[0]["conversations"][0])

def test_switches_and_names_of_ignored_keys_survive_every_path():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "loss": False}]
    plain = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    raws = [
        {"id": 0, "system": None, "conversations": turns, "hint": "look left", "note": None},
        {"id": 1, "conversations": plain, "hint": None, "note": {"en": "small"}},
        {"id": 2, "conversations": plain, "system": "Be brief.", "hint": ""},
    ]
    wanted = [read_record(raw) for raw in raws]
    test_eq([record.get("ignored") for record in wanted], [["hint"], ["note"], None])
    assert wanted[0]["conversations"][1]["train"] is False
    place = Path(tempfile.mkdtemp())
    (place / "x.jsonl").write_text("\n".join(map(json.dumps, raws)))
    pq.write_table(pa.Table.from_pylist(raws), place / "x.parquet")
    Table.from_list(raws).save_to_disk(place / "saved")
    import vlm_lit.data.records as module

    small = module.SMALL
    for module.SMALL in (0, small):
        several = [place / "x.jsonl", place / "x.parquet", place / "saved", raws, Table.from_list(raws)]
        several += [iter(raws), Table.from_list(raws).to_iterable_dataset()]
        for source in several:
            records = Records(source)
            test_eq(list(records), wanted)
            test_eq(list(Records(ConcatDataset([records]))), wanted)

def test_streams_are_read_once_and_keep_images():
    def rows(n, error=None):
        for k in range(n):
            yield {"id": k, "image": Image.new("RGB", (8, 8), "red"), "question": "q", "answer": "a"}
        if error: raise error

    records = Records(rows(3))
    test_eq((len(records), records.form), (3, "a stream: question and answer"))
    test_eq(records.open_image("embedded:2/0").getpixel((0, 0)), (255, 0, 0))
    table = Table.from_list([{"image": RED, "q": "What?", "a": "A box."}])
    stream = table.cast_column("image", ImageFeature()).to_iterable_dataset()
    records = Records(stream, columns={"question": "q", "answer": "a"})
    test_eq([turn["value"] for turn in records[0]["conversations"]], ["<image>\nWhat?", "A box."])
    test_eq(records.embedded("embedded:0/0"), RED["bytes"])  # the file's bytes, not decoded and encoded
    again = pickle.loads(pickle.dumps(records))  # as a spawned worker gets it
    test_eq(again[0], records[0])
    with expect_fail(
        DataError, contains="the stream broke off after 2 records (ConnectionError: gone)"
    ):
        Records(rows(2, ConnectionError("gone")))
    with expect_fail(DataError, contains="no records in the stream"):
        Records(rows(0))
    folder = Path(records.table.cache_files[0]["filename"]).parent
    _remove_by(os.getpid() + 1, str(folder))  # a forked worker that ends
    assert folder.is_dir()
    _remove_by(os.getpid(), str(folder))
    assert not folder.exists()

def test_rows_in_a_run_are_the_rows_one_by_one():
    import datasets, gc

    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    whole = Table.from_list([{"id": k, "conversations": turns} for k in range(9)])
    parts = datasets.concatenate_datasets([whole.select(range(4)), whole.select(range(4, 9))])
    for table in (whole, parts, whole.select([8, 3, 4, 5, 0, 0, 1, 2, 7]), whole.shuffle(seed=0)):
        names, records = table["id"][:], Records(table)
        for places in ([2, 3, 4, 5], range(1, 8), [5, 4, 3], [0, 2, 4], [3, 3], [7], [-2, -1], []):
            found = [record["id"] for record in records.read(places)]
            test_eq(found, [names[k] for k in places])
    before = gc.get_threshold()
    path = Path(tempfile.mkdtemp()) / "records.arrow"
    with Breakpoint(_store, at="rows.append", watch="gc.get_threshold()[0]") as bp:
        _store([{"id": 0, "conversations": turns}], path)
    bp.expect({"gc.get_threshold()[0]": GC_THRESHOLD}, n=1)
    test_eq(gc.get_threshold(), before)

def test_splits_and_columns_have_stores_of_their_own():
    place = Path(tempfile.mkdtemp())
    for split in ("train", "test"):
        row = {"question": f"{split}?", "q": f"other {split}?", "answer": "a"}
        pq.write_table(pa.Table.from_pylist([row]), place / f"{split}-00000-of-00001.parquet")
    choices = [("train", None), ("test", None), ("train", {"question": "q"})]
    opened = [Records(place, *choice) for choice in choices]
    for again in range(2):
        found = [(own[0]["conversations"][0]["value"], own[0].get("ignored")) for own in opened]
        test_eq(found, [("train?", ["q"]), ("test?", ["q"]), ("other train?", ["question"])])
        with Breakpoint(_build_store, at="with new_folder") as bp:
            opened = [Records(place, *choice) for choice in choices]
        test_eq(len(bp.hits), 0)
    test_eq(opened[1].form, f"{place.name}, split test: question and answer")
    pq.write_table(
        pa.Table.from_pylist([{"img": "x.png", "images": ["y.png"]}]), place / "more.parquet"
    )
    mapped = Records(place / "more.parquet", columns={"image": "img", "text": "img"})
    test_eq(mapped.n_images.tolist(), [-1])  # 'image' and 'images' are both given
    plain = Table.from_list([{"question": "q", "answer": "one", "other": "two"}])
    for columns, wanted in ((None, "one"), ({"answer": "other"}, "two"), ({"answer": "gone"}, None)):
        records = Records(plain, columns=columns)
        test_eq(records.n_images.tolist(), [-1 if wanted is None else 0])  # kept for each of them
        if wanted: test_eq(records[0]["conversations"][1]["value"], wanted)

def test_a_damaged_table_gives_data_errors_and_nothing_else():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": f"row {k}", "conversations": turns, "hint": "h"} for k in range(20)]
    place = Path(tempfile.mkdtemp()) / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), place, compression="none", use_dictionary=False)
    whole = place.read_bytes()
    at = whole.index(b"row 7")
    (place.parent / "utf8.parquet").write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    records = Records(place.parent / "utf8.parquet")
    test_eq(records.n_images.tolist(), [0] * 7 + [-1] + [0] * 12)
    test_eq(records[8]["id"], "row 8")
    with expect_fail(DataError, contains="record 7: column 'id': 'utf-8' codec can't decode"):
        records[7]
    far = pa.table(
        {"id": pa.array([1, 2**55], pa.timestamp("ms")), "question": ["q"] * 2, "answer": ["a"] * 2}
    )
    pq.write_table(far, place)
    with expect_fail(DataError, contains="record 1: column 'id': "):
        Records(place)[1]
    rng, n_read = np.random.default_rng(0), 0
    rows = [{**row, "hint": "text " * 40} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), place, compression="none", use_dictionary=False)
    whole = place.read_bytes()
    for k in range(60):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        (place.parent / f"{k}.parquet").write_bytes(data)
        try: records = Records(place.parent / f"{k}.parquet")
        except DataError: continue
        n_read += 1
        for i in range(len(records)):
            try: records[i]
            except DataError: pass
        assert len(records.n_images) == len(records)
    assert 10 < n_read
