"Derived from nbs/07_dataset.ipynb by `make tests`; edit the notebook, not this file."
import codecs, hashlib, io, json, os, re, shutil, struct, subprocess, sys, weakref
from collections.abc import Sequence
from pathlib import Path
import numpy as np, torch
from rich.progress import Progress
from torch.utils.data import Dataset, get_worker_info
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, ConfigError, DataError, progress_console
from vlm_lit.files import cache_folder, digest, file_stamp, new_folder
from vlm_lit.sentinels import check_image_count, preprocess_multimodal
from vlm_lit.labels import check_tokenizer, check_turns, preprocess
from vlm_lit.images import grid_crops, make_square, normalise, open_image, rows_per_image as count_rows, to_bytes
import tempfile
import multiprocessing, signal, threading, time
from fastcore.test import test_eq, test_close, expect_fail
from hypothesis import given, settings, strategies as st
from PIL import Image
from vlm_lit.breakpoints import Breakpoint
from vlm_lit.core import peek
from vlm_lit.images import sample_image
from vlm_lit.labels import LabelStrip
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.dataset import *

def setup_module():
    global SCRIPT, alive, bad_ones, failure, folder, good, ids_of, large_file, limited, loader, mixed, mixed_records, plain, rounds, seed, tok, two, write_all_kinds
    os.environ["VLM_LIT_CACHE"] = tempfile.mkdtemp()
    def mixed_records():
        turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "é 🙂\u2028"}]
        return [{"id": "a", "image": "x.png", "conversations": turns}, {"id": "b", "conversations": turns}, {"id": "c", "image": ["x.png", "y.png"], "conversations": turns}, {"id": "d", "image": [], "conversations": turns}]
    def write_all_kinds(records, folder):
        "The records as files and folders of every kind; a column `image` has to be a list in a table."
        import pyarrow as pa, pyarrow.parquet as pq
        from datasets import Dataset as Table, disable_progress_bars
        disable_progress_bars()
        for indent,name in ((None, "flat.json"), (2, "pretty.json")): (folder/name).write_text(json.dumps(records, indent=indent, ensure_ascii=False), encoding="utf-8")
        (folder/"lines.jsonl").write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
        rows = [{**r, "image": image_names(r) or None, "source": "web", "score": 1} for r in records]
        pq.write_table(pa.Table.from_pylist(rows), folder/"one.parquet")
        (folder/"parts").mkdir()
        for n,half in enumerate((rows[:1], rows[1:])): pq.write_table(pa.Table.from_pylist(half), folder/f"parts/{n}.parquet")
        Table.from_list(rows).save_to_disk(folder/"saved")
        return sorted(p for p in folder.iterdir())
    def large_file(n=9000):
        "A list of records that is worth a cache."
        path = Path(tempfile.mkdtemp())/"large.json"
        path.write_text(json.dumps([{"id": f"{k:06}", "image": f"{k}.png", "conversations": [{"from": "human", "value": "What is in the photo?\n<image>"}, {"from": "gpt", "value": f"the number {k:06}"}]} for k in range(n)], indent=1))
        return path
    tok = load_tokenizer("gemma")
    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder/"photo.png")
    sample_image(90, 200).save(folder/"tall.png")
    seed = {"id": "seed", "image": "photo.png", "conversations": [{"from": "human", "value": "What is in the photo?\n<image>"},
                                                                  {"from": "gpt", "value": "the box chain purse black"}]}
    plain = {"id": 1, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    two = {"id": 2, "image": ["photo.png", "tall.png"], "conversations": [{"from": "human", "value": "compare <image> with <image>"}, {"from": "gpt", "value": "taller"}]}
    rounds = {"id": "r", "image": ["photo.png", "gone.png"], "conversations": [
        {"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a drawing"}, {"from": "human", "value": "of what?"}, {"from": "gpt", "value": "a house"},
        {"from": "human", "value": "<image>\nand this?"}, {"from": "gpt", "value": "a tree"}]}
    def limited(records, **kwargs): return LazySupervisedDataset(records, tok, image_folder=folder, image_size_aux=64, image_size=56, **kwargs)
    (folder/"cut.png").write_bytes((folder/"photo.png").read_bytes()[:900])
    good = [{**seed, "id": n} for n in range(56)]
    bad_ones = [{**seed, "id": "missing", "image": "gone.png"}, {**seed, "id": "truncated", "image": "cut.png"},
                {"id": "forged", "conversations": [{"from": "human", "value": "q<end_of_turn>"}, {"from": "gpt", "value": "a"}]}, {"id": "no turns"}]
    mixed = [record for k in range(4) for record in [*good[k*14:(k + 1)*14], bad_ones[k]]]
    def ids_of(samples): return len(samples)
    def failure(batches):
        "The error of a DataLoader; without its frames, so that its workers end at once and not when they are collected as garbage."
        try: list(batches)
        except DataError as e: return str(e.with_traceback(None))
    def loader(skip_bad, file, workers, records=None, **kwargs):
        ds = limited(records or mixed, skip_bad=skip_bad, bad_samples=file, **kwargs)
        return torch.utils.data.DataLoader(ds, batch_size=10, num_workers=workers, collate_fn=ids_of)
    SCRIPT = [
        'import sys, torch',
        'from vlm_lit.dataset import LazySupervisedDataset',
        'from vlm_lit.tokenizer import load_tokenizer',
        'def same(samples): return samples',
        'if __name__ == "__main__":',
        '    torch.set_num_threads(1)',
        '    ds = LazySupervisedDataset(sys.argv[1], load_tokenizer("gemma"), image_size_aux=64, image_size=56, skip_bad=.5, bad_samples=sys.argv[2])',
        '    spawned = torch.utils.data.DataLoader(ds, batch_size=10, num_workers=1, collate_fn=same, multiprocessing_context="spawn")',
        '    print(sum(map(len, spawned)), *ds.bad.totals, flush=True)',
        '    loader = torch.utils.data.DataLoader(ds, batch_size=10, num_workers=2, collate_fn=same, multiprocessing_context="fork")',
        '    while True:',
        '        for batch in loader: print(len(batch), *[p.pid for p in torch.multiprocessing.active_children()], flush=True)',
    ]
    def alive(pid):
        "Whether a process still runs."
        try: return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else os.kill(pid, 0) is None
        except (OSError, ProcessLookupError): return False

def test_records_of_all_forms_become_llava_records():
    llava = {"id": "a", "image": ["x.png"], "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>What is this?"}, {"from": "gpt", "value": "A cat"}]}
    told = {**llava, "type": "color", "source": "web"}
    test_eq(read_record(told), told)
    test_eq(read_record({**llava, "type": None, "score": 3}), llava)
    def chat(part, content, key="messages", **extra):
        return {"id": "a", **extra, key: [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [part, {"type": "text", "text": "What is this?"}] if part else content},
                                          {"role": "assistant", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "cat"}]}]}
    forms = [llava, chat({"type": "image", "image": "x.png"}, None), chat({"type": "image", "image": None, "path": "x.png"}, None), chat({"type": "image_url", "image_url": {"url": "x.png"}}, None),
             chat({"type": "image"}, None, images=["x.png"]), chat({"type": "image", "text": None}, None, key="conversations", image=["x.png"]), chat(None, "<image>What is this?", images=["x.png"])]
    for form in forms: test_eq(read_record(form), llava)
    test_eq(read_record({"image": "p.png", "conversations": []}, 7), {"id": 7, "image": "p.png", "conversations": []})
    test_eq([image_names(read_record({"image": i, "conversations": []})) for i in ("p", ["p", "q"], None, [])], [["p"], ["p", "q"], [], []])

def test_records_that_cannot_be_read_say_why():
    def user(*parts, **extra): return {"id": 7, **extra, "messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "a"}]}
    picture, text = {"type": "image", "image": "x.png"}, {"type": "text", "text": "q"}
    wrong = [("a list", [3], "record 0: a record must be a JSON object"), ("no turns", {"id": 7, "image": "x.png"}, "record 7: no 'conversations' and no 'messages'; the record has ['id', 'image']"),
             ("turns no list", {"id": 7, "conversations": "q"}, "record 7: a conversation must be a list"), ("an id of lists", {"id": [1], "conversations": []}, "record 0: 'id' must be"),
             ("a type of lists", {"id": 7, "conversations": [], "type": ["color"]}, "record 7: 'type' must be a text, got list"), ("a source by number", {"id": 7, "conversations": [], "source": 3}, "record 7: 'source' must be a text, got int"),
             ("image a number", {"id": 7, "image": 3, "conversations": []}, "record 7: an image must be given as a path"), ("image empty", {"id": 7, "image": ["x", ""], "conversations": []}, "record 7: an image must"),
             ("an address", {"id": 7, "image": "https://x/y.png", "conversations": []}, "record 7: image 'https://x/y.png' is an address"), ("a data URL", user({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}), "record 7, turn 0: image 'data:"),
             ("both keys", {"id": 7, "image": "x", "images": ["x"], "conversations": []}, "record 7: both 'image' and 'images'"), ("images twice", user(picture, text, image="y.png"), "record 7: some images are named"),
             ("none named", user({"type": "image"}, text), "record 7: the messages hold 1 image(s), and 'image' names 0"), ("some named", user(picture, {"type": "image"}, text), "record 7: some images are named"), ("tag spelled", user(picture, {"type": "text", "text": "a <image>"}), "record 7, turn 0: the text spells <image>"),
             ("a part of sound", user({"type": "audio", "audio": "x.wav"}), "record 7, turn 0: a part of a message must be"), ("no content", {"id": 7, "messages": [{"role": "user", "content": None}]}, "record 7, turn 0: a turn must be"),
             ("unknown role", {"id": 7, "messages": [{"role": "tool", "content": "x"}]}, "record 7, turn 0: unknown role 'tool'"), ("half a character", {"id": 7, "messages": [{"role": "user", "content": "\ud83d"}]}, "record 7, turn 0: the text holds half"),
             *[(key, {"id": 7, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: value}]}, f"record 7, turn 1: the turn has '{key}'")
               for key,value in (("weight", 0), ("tool_calls", [{"id": 1}]), ("refusal", "no"))],
             ("picture in an answer", {"id": 7, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [picture]}]}, "record 7, turn 1: an image in a turn of 'gpt'"),
             ("picture in a greeting", {"id": 7, "image": "x.png", "conversations": [{"from": "gpt", "value": "see <image>"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "record 7, turn 0: the turn answers nothing")]
    for what,record,message in wrong:
        with expect_fail(DataError, contains=message): read_record(record)
    kept = {"role": "assistant", "content": "a", "weight": 1, "refusal": None}
    test_eq(read_record({"id": 1, "messages": [{"role": "user", "content": "q"}, kept]})["conversations"][1]["value"], "a")
    print(len(wrong), "kinds refused, such as:", next(message for what,_,message in wrong if what == "tag spelled"))

def test_every_record_is_found_at_its_bytes():
    values = st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6), max_size=4)
    place = Path(tempfile.mkdtemp())/"any.json"
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(st.lists(values, min_size=1, max_size=6), st.booleans(), st.sampled_from([None, 1, "\t"]), st.booleans(), st.booleans(), st.integers(1, 40))
    def check(records, lines, indent, ascii, bom, block):
        records = json.loads(json.dumps(records, ensure_ascii=True).encode("utf-8", "surrogatepass"))
        text = "\r\n".join(json.dumps(r, ensure_ascii=ascii) for r in records) + "\n" if lines else "\n " + json.dumps(records, indent=indent, ensure_ascii=ascii) + "\n"
        data = codecs.BOM_UTF8*bom + text.encode("utf-8")
        place.write_bytes(data)
        found = list(scan_records(place, block))
        assert [value for *_,value in found] == records
        assert [json.loads(data[at:at+size]) for at,size,_ in found] == records
    check()

def test_broken_files_are_refused_with_their_line():
    place = Path(tempfile.mkdtemp())/"bad.json"
    good = '{"id": 1, "conversations": []}'
    wrong = [(good + '\n{"id": 2,\n', "bad.json, line 2: not JSON"), (f"[{good},\n{good},\n", "bad.json, line 3: not JSON"), (f"[{good}\n{good}]", "line 2: not JSON (expected ',' or ']'"), (f"[{good},\n\n{{'id': 3}}]", "line 3: not JSON"),
             (f"[{good}] x", "line 1: not JSON (text behind the list)"), ("[" + good, "line 1: not JSON (the list is not closed"), ("[\n" + "["*100_000, "line 2: not JSON (maximum recursion"), ('[\n1' + "0"*5000 + "]", "line 2: not JSON (Exceeds the limit"), ("{}}", "line 1: not JSON")]
    for text,message in wrong:
        place.write_text(text)
        for block in (5, BLOCK):
            with expect_fail(DataError, contains=message): list(scan_records(place, block))
    for text in ('[{"id": "%s"}]', '{"id": "%s"}'):
        place.write_bytes((text % "é").encode("latin-1"))
        with expect_fail(DataError, contains="bad.json: not UTF-8"): list(scan_records(place))
        place.write_text(text % ("x"*3000))
        with expect_fail(DataError, contains="a record of more than 1,000 bytes"): list(scan_records(place, 64, 1000))
    place.write_text(json.dumps({"id": "line\u2028break"}, ensure_ascii=False), encoding="utf-8")
    test_eq([value for *_,value in scan_records(place)], [{"id": "line\u2028break"}])

def test_a_changed_file_has_another_fingerprint():
    place = Path(tempfile.mkdtemp())/"data.bin"
    place.write_bytes(bytes(1_000_000))
    before, stamp = fingerprint(place), place.stat()
    test_eq(fingerprint(place), before)
    for at in (0, 999_999):                                          # the first or the last byte, size and time as they were
        data = bytearray(1_000_000)
        data[at] = 1
        place.write_bytes(data)
        os.utime(place, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert fingerprint(place) != before
    place.write_bytes(bytes(1_000_000))
    os.utime(place, ns=(0, 0))
    assert fingerprint(place) != before                              # only the time

def test_records_are_the_same_from_every_kind_of_file():
    wanted = [{**r, "image": image_names(r)} for r in mixed_records()]
    files = write_all_kinds(mixed_records(), Path(tempfile.mkdtemp()))
    for file in files:
        records = Records(file)
        print(f"{file.name:12}", len(records), records.n_images.tolist(), records.n_chars.tolist())
        source = {} if file.suffix in (".json", ".jsonl") else {"source": "web"}
        test_eq([{**r, "image": image_names(r)} for r in records], [{**r, **source} for r in wanted])
        test_eq((records.n_images.tolist(), records[-1]["id"], [r["id"] for r in records[1:3]]), ([1, 0, 2, 0], "d", ["b", "c"]))
        with expect_fail(IndexError): records[4]
    test_eq([f.name for f in files], ["flat.json", "lines.jsonl", "one.parquet", "parts", "pretty.json", "saved"])
    test_eq(read_records(files[0])[0], mixed_records()[0])

def test_messages_and_pictures_of_tables():
    import pyarrow as pa, pyarrow.parquet as pq
    def png(color): return [Image.new("RGB", (8, 8), color).save(out := io.BytesIO(), "PNG"), out.getvalue()][1]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    rows = [{"id": n, "images": [{"bytes": png(c), "path": None}], "messages": messages} for n,c in enumerate(["red", "blue", "red"])]
    place = Path(tempfile.mkdtemp())/"pictures.parquet"
    pq.write_table(pa.Table.from_pylist(rows), place)
    records = Records(place)
    print(records[0])
    names = [image_names(r)[0] for r in records]
    assert names[0] == names[2] != names[1] and records[0]["conversations"][0]["value"] == "<image>q"
    test_eq([open_image(n, records.image_folder).getpixel((0, 0)) for n in names], [(255, 0, 0), (0, 0, 255), (255, 0, 0)])
    pq.write_table(pa.Table.from_pylist([{"id": 1, "conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}]), place)      # a dict of lists
    test_eq(Records(place)[0]["conversations"], [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])

def test_a_changed_file_is_never_read_with_an_old_index():
    path = large_file()
    records = Records(path)
    folder = records.index.path.parent
    test_eq((len(records), records[8999]["id"], sorted(p.name for p in folder.iterdir())), (9000, "008999", ["index.bin", "meta.json"]))
    text = path.read_text()
    path.write_text(text.replace("008999", "oo8999"))
    with expect_fail(DataError, contains="large.json has changed or is gone since it was opened"): records[8999]
    again = Records(path)
    test_eq((again[8999]["id"], folder.exists()), ("oo8999", False))                       # a new index; the old one is gone
    with Breakpoint(Records.build, at="with new_folder", watch="path") as bp: Records(path)
    test_eq(len(bp.hits), 0)                                                               # the second open builds nothing
    (again.index.path).write_bytes(b"half")
    test_eq(Records(path)[1]["id"], "000001")                                              # half a cache is made again
    path.unlink()
    with expect_fail(DataError, contains="has changed or is gone"): Records.__getitem__(again, 0)

def test_a_worker_gets_paths_and_no_records():
    sizes = [len(multiprocessing.reduction.ForkingPickler.dumps(Records(large_file(n)))) for n in (9000, 18000)]
    print(sizes, "bytes")
    assert max(sizes) < 1500 and abs(sizes[0] - sizes[1]) < 50

def test_data_that_is_not_there_or_no_data():
    place = Path(tempfile.mkdtemp())
    with expect_fail(DataError, contains="no data file"): Records(place/"gone.json")
    with expect_fail(DataError, contains="is a folder without Parquet files"): Records(place)
    (place/"empty.json").write_text(" \n")
    with expect_fail(DataError, contains="no records in empty.json"): Records(place/"empty.json")
    (place/"empty.json").write_text("[ ]")
    with expect_fail(DataError, contains="no records in empty.json"): Records(place/"empty.json")
    for size in (10, 2 << 20):                                        # in this process, and in one of its own
        (place/"bad.parquet").write_bytes(b"x"*size)
        with expect_fail(DataError, contains="bad.parquet: cannot be read as a table"): Records(place/"bad.parquet")
    (place/"splits").mkdir()
    (place/"splits/dataset_dict.json").write_text("{}")
    with expect_fail(DataError, contains="splits holds several splits"): Records(place/"splits")
    broken = Records([{"id": "x"}, 3, {"conversations": []}])
    test_eq(([broken.name(i) for i in range(3)], broken.n_images.tolist()), (["x", 1, 2], [-1, -1, 0]))
    with expect_fail(DataError, contains="record 1: a record must be a JSON object"): broken[1]

def test_truncation_ends_after_answers_and_never_inside_an_image():
    ids    = torch.tensor([2, -200, 5, 6,    7, 8, 9,     -200, 10, 11, 12])
    labels = torch.tensor([-100, -100, -100, 6, -100, 8, 9, -100, -100, 11, 12])
    kept = {limit: len(truncate_to_complete_turns(ids, labels, 4, limit)[0]) for limit in range(7, 19)}
    print("expanded:", expanded_length(ids, 4), " kept of", len(ids), "ids:", kept)
    test_eq(kept, {7: 4, 8: 4, 9: 4, **{limit: 7 for limit in range(10, 17)}, 17: 11, 18: 11})
    for limit in range(7, 19):
        cut, cut_labels = truncate_to_complete_turns(ids, labels, 4, limit)
        assert expanded_length(cut, 4) <= limit and cut_labels[-1] != IGNORE_INDEX and torch.equal(cut, ids[:len(cut)]) and torch.equal(cut_labels, labels[:len(cut)])
    with expect_fail(TooLong, contains="its first question and answer do not fit: 7 positions with an image of 4 rows, max_length is 6"): truncate_to_complete_turns(ids, labels, 4, 6)
    with expect_fail(TooLong): truncate_to_complete_turns(ids, torch.full_like(ids, IGNORE_INDEX), 4, 9)

def test_the_share_of_bad_samples_is_bounded():
    place = Path(tempfile.mkdtemp())/"bad_samples.jsonl"
    bad = BadSamples(place, .01, 500)
    bad.count(100, [{"index": n, "id": n, "reason": "broken"} for n in range(5)])          # 5 of the first 500 are allowed
    with expect_fail(DataError, contains="6 of 132 records are bad, more than the share of 0.01 that may be skipped; see bad_samples.jsonl. The last: gone"):
        bad.count(32, [{"index": 7, "id": "x", "reason": "gone"}])
    print(place.read_text().splitlines()[-1], bad.totals)
    test_eq(len(place.read_text().splitlines()), 6)
    for wrong in (0, 1, -1): 
        with expect_fail(ConfigError, contains="must lie between 0 and 1"): BadSamples(place, wrong, 9)
    with expect_fail(ConfigError, contains="no folder"): BadSamples(place.parent/"gone"/"x.jsonl", .1, 9)

def test_item_of_the_seed():
    item = LazySupervisedDataset([seed], tok, image_folder=folder)[0]
    test_eq({k: tuple(v.shape) for k,v in item.items()}, {"input_ids": (25,), "labels": (25,), "image": (3, 336, 336), "image_aux": (3, 768, 768)})
    test_eq(item["input_ids"].tolist(), [2, 106, 1645, 108, -200, 108, 1841, 603, 575, 573, 2686, 235336, 107, 108, 106, 2516, 108, 1175, 3741, 9488, 45189, 2656, 107, 108, 1])
    test_eq(item["labels"].tolist(), [-100]*17 + [1175, 3741, 9488, 45189, 2656, 107, 108, 1])

def test_large_image_comes_first():
    with Breakpoint(LazySupervisedDataset.__getitem__, at="data = self.texts([i])[0]", watch=["image_aux[0]"]) as bp:
        LazySupervisedDataset([seed], tok, image_folder=folder)[0]
    print(bp)
    test_eq(tuple(bp["image_aux[0]"].shape), (3, 768, 768))
    with expect_fail(LookupError): bp["image"]                      # not there yet

def test_text_only_and_several_images():
    ds = LazySupervisedDataset([plain, two], tok, image_folder=folder, image_size_aux=64, image_size=32)
    test_eq(sorted(ds[0]), ["input_ids", "labels"])
    test_eq((tuple(ds[1]["image"].shape), tuple(ds[1]["image_aux"].shape)), ((2, 3, 32, 32), (2, 3, 64, 64)))
    test_eq((ds[1]["input_ids"] == -200).sum().item(), 2)
    assert not torch.equal(ds[1]["image"][0], ds[1]["image"][1])

def test_broken_records_say_which_and_why():
    def turns(*texts): return [{"from": ("human", "gpt")[n % 2], "value": t} for n,t in enumerate(texts)]
    broken = [{"id": "a", "image": "gone.png", "conversations": turns("<image>\nq", "a")},
              {"id": "b", "image": "photo.png", "conversations": turns("no tag", "a")},
              {"id": "c", "image": "photo.png", "conversations": turns("<image> <image>", "a")},
              {"id": "d", "conversations": turns("<image>\nq", "a")},
              {"id": "e", "image": "../photo.png", "conversations": turns("<image>\nq", "a")},
              {"id": "f", "conversations": turns("q<end_of_turn>", "a")},
              {"id": "g", "conversations": [{"from": "human", "value": "q"}, {"from": "human", "value": "q"}]}]
    ds = LazySupervisedDataset(broken, tok, image_folder=folder, image_size_aux=64, image_size=32)
    messages = []
    for i in range(len(ds)):
        try: ds[i]
        except DataError as e: messages.append(str(e).replace(str(folder), "images"))
    print(*messages, sep="\n")
    test_eq([m.split(":")[0].split(",")[0] for m in messages], [f"record '{name}'" for name in "abcdefg"])
    for message,words in zip(messages, ["no image 'gone.png'", "0 <image> tag(s) for 1 image(s)", "2 <image> tag(s) for 1 image(s)", "turn 0: <image> tag in a record with 0 images", "leaves the image folder",
                                        "turn 0: the text spells the control token '<end_of_turn>'", "turn 1: two turns of 'human' in a row"]): assert words in message

def test_cached_items_equal_lazy_ones():
    def small(): return LazySupervisedDataset([plain, two, {**two, "id": 3}], tok, image_folder=folder, image_size_aux=64, image_size=32)
    lazy, loaded = small(), small().cache_in_memory()
    for i in range(3):
        test_eq(sorted(lazy[i]), sorted(loaded[i]))
        assert all(torch.equal(lazy[i][k], loaded[i][k]) for k in lazy[i])
    assert loaded[1]["image"] is loaded[2]["image"]                # one picture, two records

def test_blind_dataset_shows_black_pictures():
    blind = LazySupervisedDataset([seed], tok, image_folder=folder, image_size_aux=64, image_size=32, blank_images=True)[0]
    assert len(blind["image_aux"].unique()) == 3 and blind["input_ids"].shape == (25,)

def test_folder_and_template_are_checked_at_once():
    from vlm_lit.core import ConfigError
    with expect_fail(ConfigError, contains="no image folder"): LazySupervisedDataset([seed], tok, image_folder=folder/"nowhere")
    with expect_fail(ConfigError, contains="unknown template 'gema'"): LazySupervisedDataset([seed], tok, image_folder=folder, template="gema")
    (folder/"data.json").write_text(json.dumps([seed]))
    test_eq(LazySupervisedDataset(folder/"data.json", tok).texts([0])[0]["input_ids"].shape, (25,))   # images beside the data file

def test_a_limit_is_kept_before_images_are_opened():
    whole = limited([rounds])
    length = int(whole.lengths[0])
    cut = limited([rounds], max_length=length - 1, overlength="truncate")
    with Breakpoint(LazySupervisedDataset.pixels, at="if self.blank_images", watch="name") as bp: item = cut[0]
    print(LabelStrip(item["input_ids"], item["labels"], tok))
    print(length, "->", expanded_length(item["input_ids"], 16), "opened:", [hit["name"] for hit in bp.hits])
    test_eq(([hit["name"] for hit in bp.hits], tuple(item["image"].shape), cut.lengths.tolist()), (["photo.png"], (3, 56, 56), [length - 1]))
    test_eq("".join(LabelStrip(item["input_ids"], item["labels"], tok).learned), "a drawing<end_of_turn>\n<eos>a house<end_of_turn>\n<eos>")
    for how in ("error", "skip"):
        with Breakpoint(LazySupervisedDataset.pixels, at="if self.blank_images") as bp:
            with expect_fail(TooLong, contains=f"record 'r': {length} tokens with images of 16 tokens each, max_length is {length - 1}"): limited([rounds], max_length=length - 1, overlength=how)[0]
        test_eq(len(bp.hits), 0)
    with expect_fail(DataError, contains="no image 'gone.png'"): limited([rounds], max_length=length)[0]
    with expect_fail(TooLong, contains="record 'r': its first question and answer do not fit"): limited([rounds], max_length=20, overlength="truncate")[0]

def test_limits_that_cannot_be_are_refused():
    for wrong,message in [({"max_length": 0}, "max_length must be at least 1"), ({"overlength": "shorten"}, "overlength must be one of"), ({"skip_bad": .1}, "skip_bad needs bad_samples")]:
        with expect_fail(ConfigError, contains=message): limited([rounds], **wrong)

def test_hd_crops_come_out_of_the_dataset():
    small = dict(image_size_aux=96, image_size=42)
    flat, hd, both = [LazySupervisedDataset([seed, two], tok, folder, **small, **more) for more in ({}, dict(image_grid=2), dict(image_grid=2, image_global=True))]
    print(tuple(flat[0]["image"].shape), tuple(hd[0]["image"].shape), tuple(both[1]["image"].shape), both.rows_per_image)
    with expect_fail(ConfigError, contains="max_length needs rows_per_image"): LazySupervisedDataset([seed], tok, folder, image_size=30, max_length=99)
    for name in ("control_tokens", "image_tags", "aspect"):
        with expect_fail(ConfigError, contains=f"{name} must be one of"): LazySupervisedDataset([seed], tok, folder, **{name: "foo"})
    test_eq([tuple(d[0]["image"].shape) for d in (flat, hd, both)], [(3, 42, 42), (4, 3, 42, 42), (5, 3, 42, 42)])
    test_eq((tuple(both[1]["image"].shape), flat.rows_per_image, both.rows_per_image), ((2, 5, 3, 42, 42), 9, 45))

def test_bytes_become_the_float_picture():
    a, b = limited([seed, two]), limited([seed, two], uint8=True)
    peek(**b[0])
    for i in range(2):
        test_eq((sorted(b[i]), b[i]["image_aux"].dtype), (["image_aux", "input_ids", "labels"], torch.uint8))
        assert torch.equal(normalise(b[i]["image_aux"]), a[i]["image_aux"])

def test_bad_samples_are_noted_left_out_and_bounded():
    import warnings
    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    for workers in (0, 2):
        file = Path(tempfile.mkdtemp())/"bad_samples.jsonl"
        batches = loader(.1, file, workers)
        test_eq(list(batches), [10, 9, 9, 10, 9, 9])
        rows = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["index"])
        test_eq([(row["index"], row["id"]) for row in rows], [(14, "missing"), (29, "truncated"), (44, "forged"), (59, "no turns")])
        test_eq(batches.dataset.bad.totals, (60, 4))
        assert "records are bad, more than the share of 0.05 that may be skipped; see bad_samples.jsonl" in failure(loader(.05, file, workers))
    for row in rows: print(row["id"], "|", row["reason"].replace(str(folder), "images")[:88])
    with expect_fail(DataError, contains="record 'missing': no image"): batches.dataset[14]      # inspecting raises

def test_lengths_and_memory_know_the_bad_samples():
    file = Path(tempfile.mkdtemp())/"bad_samples.jsonl"
    ds = limited([*bad_ones, rounds, seed], skip_bad=.9, bad_samples=file)
    length = int(limited([rounds]).lengths[0])
    test_eq(ds.lengths.tolist(), [40, 40, 0, 0, length, 40])                    # the images are not opened for it
    for overlength,wanted in [("error", length), ("truncate", 50), ("skip", 0)]:
        ds = limited([*bad_ones, rounds, seed], max_length=50, overlength=overlength, skip_bad=.9, bad_samples=file)
        test_eq(ds.lengths.tolist(), [40, 40, 0, 0, wanted, 40])
    lazy = ds.__getitems__(range(6))
    kept = limited([*bad_ones, rounds, seed], max_length=50, overlength="skip", skip_bad=.9, bad_samples=file).cache_in_memory().__getitems__(range(6))
    test_eq((len(lazy), len(kept)), (1, 1))
    assert all(torch.equal(lazy[0][key], kept[0][key]) for key in lazy[0] if key != "index")
    with expect_fail(DataError, contains="no image 'gone.png'"): limited([seed, bad_ones[0]]).cache_in_memory()

def test_skipping_has_limits_of_its_own():
    file = Path(tempfile.mkdtemp())/"bad_samples.jsonl"
    ds = limited([*bad_ones[:2], *good], skip_bad=.5, bad_samples=file)
    test_eq((ds.__getitems__([0, 1]), ds.bad.totals, len(file.read_text().splitlines())), ([], (2, 2), 2))      # a batch may be empty
    with expect_fail(DataError, contains="2 of 2 records are bad, more than the share of 0.01"): limited([*bad_ones[:2], *good], skip_bad=.01, bad_samples=file).__getitems__([0, 1])
    long = [rounds, *good[:30]]
    with expect_fail(TooLong): list(loader(.5, file, 0, long, max_length=45))                         # an error is not skipped
    ds = limited([rounds, plain], max_length=20, overlength="truncate", skip_bad=.6, bad_samples=file)
    test_eq((len(ds.__getitems__([0, 1])), ds.bad.totals), (1, (2, 1)))                               # not even the first answer fits
    test_eq(list(loader(.5, file, 0, long, max_length=45, overlength="skip")), [9, 10, 10, 1])
    assert "max_length is 45" in file.read_text().splitlines()[-1]

def test_an_interrupt_ends_a_run_with_workers():
    (folder/"mixed.json").write_text(json.dumps(mixed))
    (folder/"script.py").write_text("\n".join(SCRIPT))
    run = subprocess.Popen([sys.executable, folder/"script.py", folder/"mixed.json", folder/"skipped.jsonl"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),      # tests in the background ignore it, and children inherit that
                           env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)})
    watch = threading.Timer(120, lambda: os.killpg(run.pid, signal.SIGKILL))      # should it hang after all, the test fails and does not wait
    watch.start()
    try:
        sent = run.stdout.readline().split()
        n, *workers = map(int, run.stdout.readline().split() or [0])
        os.killpg(run.pid, signal.SIGINT)                             # what a terminal sends to all processes of a command
        out, err = run.communicate(timeout=60)
    finally:
        watch.cancel()
        if run.poll() is None: os.killpg(run.pid, signal.SIGKILL)
    print("spawned: samples, seen, bad", sent, "| batch of", n, "| workers:", len(workers), "| last word:", (err.strip() or "nothing").splitlines()[-1])
    assert run.returncode not in (0, None) and "KeyboardInterrupt" in err and len(workers) == 2 and sent == ["56", "60", "4"], err
    for _ in range(50):
        if any(map(alive, workers)): time.sleep(.1)
    assert not any(map(alive, workers))
