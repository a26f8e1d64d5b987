"Derived from nbs/07_records.ipynb by `make tests`; edit the notebook, not this file."
import io, json, os, re, shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
import numpy as np, torch
from PIL import Image
from rich.progress import Progress
from vlm_lit.core import DataError, progress_console
from vlm_lit.files import cache_folder, digest, file_stamp, new_folder, writable_folder
from vlm_lit.text.messages import image_names, read_record
from vlm_lit.images import decode_image, open_image
from vlm_lit.data.record_files import scan_records
import multiprocessing, os, tempfile
import pyarrow as pa, pyarrow.parquet as pq
from datasets import Dataset as Table, disable_progress_bars
from fastcore.test import test_eq, expect_fail
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.data.records import _build_store, _store
from vlm_lit.data.records import Records
from vlm_lit.data.records import _store_row
from vlm_lit.data.records import fingerprint

def setup_module():
    global large_file, mixed_records, write_all_kinds
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
    watch = ["name", "(row, k)", "len(images)", "decode_image(io.BytesIO(images[k]), name)"]
    with Breakpoint(Records.open_image, at="if k >= len(images)", watch=watch) as bp:
        Records(table).open_image("embedded:0/0")
    bp.expect({"(row, k)": (0, 0), "len(images)": 1}, name="embedded:0/0")

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
    for half in (b"half", store.read_bytes()[:-2000]):
        store.write_bytes(half)
        test_eq(Records(path)[8998]["id"], "008998")  # half a store is written again
    for text in ("", "[]", "null", "3", '"x"', "{}", '{"n": null}', '{"n": [9000]}', "[" * 99999):
        store.with_name("meta.json").write_text(text)
        test_eq(Records(path)[8998]["id"], "008998")
    path.unlink()
    with expect_fail(DataError, contains="no data file"): Records(path)

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
    with expect_fail(DataError, contains="splits holds several splits"):
        Records(place / "splits")
    from datasets import DatasetDict

    table = Table.from_list([{"id": 1}])
    with expect_fail(DataError, contains="several splits; give one of them: train, test"):
        Records(DatasetDict(train=table, test=table))
    broken = Records([{"id": "x"}, 3, {"conversations": []}])
    test_eq(([broken.name(i) for i in range(3)], broken.n_images.tolist()), (["x", 1, 2], [-1, -1, 0]))
    with expect_fail(DataError, contains="record 1: a record must be a JSON object"):
        broken[1]

def test_a_name_without_a_file_is_looked_for_on_the_hub():
    import datasets

    def hub(name, split):
        return {"user/set": Table.from_list(mixed_records()[1:2])}[name]

    usual, datasets.load_dataset = datasets.load_dataset, hub
    try:
        test_eq(Records("user/set")[0]["id"], "b")
        with expect_fail(DataError, contains="no data file 'user/gone', and the hub gives no data set"):
            Records("user/gone")
    finally: datasets.load_dataset = usual

def test_a_changed_file_has_another_fingerprint():
    place = Path(tempfile.mkdtemp()) / "data.bin"
    place.write_bytes(bytes(1_000_000))
    before, stamp = fingerprint(place), place.stat()
    test_eq(fingerprint(place), before)
    for at in (0, 999_999):  # the first or the last byte, size and time as they were
        data = bytearray(1_000_000)
        data[at] = 1
        place.write_bytes(data)
        os.utime(place, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert fingerprint(place) != before
    place.write_bytes(bytes(1_000_000))
    os.utime(place, ns=(0, 0))
    assert fingerprint(place) != before  # only the time

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

def test_messages_and_images_of_tables():
    from datasets import Features, Image as ImageFeature, List, Value

    def png(color):
        Image.new("RGB", (8, 8), color).save(out := io.BytesIO(), "PNG")
        return out.getvalue()

    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    rows = [
        {"id": n, "images": [{"bytes": png(c), "path": None}], "messages": messages}
        for n, c in enumerate(["red", "blue", "red"])
    ]
    place = Path(tempfile.mkdtemp()) / "images.parquet"
    pq.write_table(pa.Table.from_pylist(rows), place)
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    decoded = [{"image": png(c), "conversations": turns} for c in ("red", "blue", "red")]
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
        with expect_fail(DataError, contains=f"no image '{name}' in the table"):
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
    with expect_fail(DataError, contains="record 0: bytes that are no text"):
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
