"Derived from nbs/06e_record_sources.ipynb by `make tests`; edit the notebook, not this file."
import io, lzma, re, tarfile, zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from vlm_lit.core import DataError, nearest
from vlm_lit.data.record_files import file_kind, scan_records, scan_text_file
import json, tempfile
from fastcore.test import expect_fail, test_eq
from hypothesis import given, settings, strategies as st
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.data.sources import _PACKED
from vlm_lit.data.sources import choose_split
from vlm_lit.data.sources import find_source
from vlm_lit.data.sources import scan_shard
from vlm_lit.data.sources import shard_record
from vlm_lit.data.sources import split_name

def setup_module():
    global shard_of
    def shard_of(files):
        "A tar file of names and contents."
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return out.getvalue()

def test_files_of_a_split_belong_together():
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test.parquet"]
    names += ["train_sft-00000-of-00001.parquet", "training.parquet", "0.parquet"]
    with Breakpoint(split_name, at="return found[1]", watch="path.name") as bp:
        for name in names: split_name(Path(name))
    for hit, wanted in enumerate(["train", "train", "test", "train_sft", "", ""]):
        bp.expect_return(result=wanted, hit=hit)
    bp.expect_each({"path.name": names})

def test_a_folder_with_splits_is_refused_by_their_names():
    folder = Path(tempfile.mkdtemp()) / "things"
    (folder / "data").mkdir(parents=True)
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        (folder / f"data/{name}.parquet").touch()
    with Breakpoint(choose_split, at="near = nearest", watch="names split") as bp:
        try: find_source(folder, "tset")
        except DataError as error: print(error)
    bp.expect(names=["test", "train"], split="tset")
    with expect_fail(
        DataError, contains="things holds several splits; give one of them as split: test, train"
    ):
        find_source(folder)
    test_eq([p.name for p in find_source(folder, "test").files], ["test-00000-of-00001.parquet"])

def test_files_of_one_name_are_one_record():
    files = {"a/1.jpg": b"pixels", "a/1.txt": b"A box.", "a/2.json": b'{"caption": "A cat."}'}
    with Breakpoint(shard_record, at='return {"id": key', watch="key row len(images)") as bp:
        found = list(scan_shard(io.BytesIO(shard_of(files)), "x.tar"))
    bp.expect_each(key=["a/1", "a/2"], row=[{"text": b"A box."}, {"caption": "A cat."}])
    image = {"bytes": b"pixels", "path": None}
    test_eq(found[0], {"id": "a/1", "text": b"A box.", "images": [image]})

def test_layouts_of_folders():
    LAYOUTS = [  # files; split asked for; kind and files that are read, or the error
        (["a.parquet", "b.parquet"], None, ("parquet", ["a.parquet", "b.parquet"])),
        (["train.parquet"], None, ("parquet", ["train.parquet"])),
        (["train.parquet"], "train", ("parquet", ["train.parquet"])),
        (["train.parquet"], "test", "has no split 'test'; there are: train"),
        (["train.parquet", "extra.parquet"], None, "several splits; give one of them as split: (files"),
        (["train.parquet", "extra.parquet"], "train", ("parquet", ["train.parquet"])),
        (["train-0.tar", "train-1.tar.gz"], None, ("tar", ["train-0.tar", "train-1.tar.gz"])),
        (["train-0.tar", "val-0.tar"], None, "several splits; give one of them as split: train, val"),
        (["metadata.jsonl", "x.png"], None, ("text", ["metadata.jsonl"])),
        (["metadata.csv", "x.png"], None, ("text", ["metadata.csv"])),
        (["train/metadata.jsonl", "test/metadata.jsonl"], None, "as split: test, train"),
        (["train/metadata.jsonl", "test/metadata.jsonl"], "test", ("text", ["metadata.jsonl"])),
        (["train/a.parquet", "test/test.parquet"], None, "as split: test, train"),
        (["train/train-0.parquet", "val/val-0.parquet"], "val", ("parquet", ["val-0.parquet"])),
        (["a/0.parquet", "b/train.parquet", "b/test.parquet"], None, "splits of their own (b)"),
        (["data/val-00000-of-00001.parquet"], None, ("parquet", ["val-00000-of-00001.parquet"])),
        (
            ["state.json", "data-00000-of-00001.arrow"],
            None,
            ("saved", ["data-00000-of-00001.arrow", "state.json"]),
        ),
        (["dataset_dict.json", "a/state.json", "b/state.json"], None, "as split: a, b"),
        (["dataset_dict.json", "a/state.json", "b/state.json"], "b", ("saved", ["state.json"])),
        (["dataset_dict.json", "a/state.json"], None, ("saved", ["state.json"])),
        (["dataset_dict.json"], None, "is a folder without Parquet files"),
        (["x.png"], None, "is a folder without Parquet files"),
        (["a.parquet", "b.tar"], None, "has Parquet files and shards (a.parquet, b.tar)"),
        (["metadata.jsonl", "metadata.csv"], None, "give the file that is meant"),
        (["x.parquet"], "train", "has no split 'train'; there are: (files without a split)"),
    ]
    for names, split, wanted in LAYOUTS:
        folder = Path(tempfile.mkdtemp())
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        if isinstance(wanted, str):
            with expect_fail(DataError, contains=wanted):
                find_source(folder, split)
            continue
        found = find_source(folder, split)
        test_eq((found.kind, [p.name for p in found.files]), wanted)
        test_eq(found.columns, {"image": "file_name"} if "metadata" in wanted[1][0] else {})
    single = Path(tempfile.mkdtemp()) / "x.jsonl"
    single.touch()
    test_eq(find_source(single).kind, "text")
    with expect_fail(DataError, contains="x.jsonl is one file, without splits"):
        find_source(single, "train")
    with expect_fail(DataError, contains="no data file"):
        find_source(single.parent / "gone")
    for suffix in _PACKED:
        packed = single.with_suffix(suffix)
        packed.touch()
        with expect_fail(DataError, contains=f"a packed file ({suffix})"):
            find_source(packed)

def test_records_of_shards():
    J = lambda value: json.dumps(value).encode()
    SHARDS = [  # files of one key, and its row or the error
        ({"jpg": b"i", "txt": b"t"}, {"text": b"t", "images": 1}),
        (
            {"JPG": b"i", "json": J({"caption": "t", "x": 1}), "txt": b"t"},
            {"caption": "t", "x": 1, "images": 1},
        ),
        (
            {"0.png": b"i", "1.png": b"j", "json": J({"id": 3, "images": ["a", "b"]})},
            {"id": 3, "images": 2},
        ),
        ({"png": b"i", "json": J({"image": "1.png"})}, {"images": 1}),
        (
            {"png": b"i", "json": J({"image": ["a", "b"]})},
            "its JSON names 2 image(s), and the shard has 1",
        ),
        ({"json": J({"image": "a"})}, "its JSON names 1 image(s), and the shard has 0"),
        ({"json": J([1])}, "its JSON is no object"),
        ({"json": b'{"a": 1, "a": 2}'}, "the key 'a' is given twice"),
        ({"json": b"{"}, "not JSON"),
        ({"txt": b"a", "caption": b"b"}, "has several texts"),
        ({"mp4": b"v", "cls": b"5"}, {"video": b"v", "cls": b"5"}),
        ({"wav": b"v"}, {"audio": b"v"}),
    ]
    for files, wanted in SHARDS:
        data = shard_of({f"k.{suffix}": content for suffix, content in files.items()} | {"l.txt": b"z"})
        found, last = scan_shard(io.BytesIO(data), "x.tar")
        test_eq(last, {"id": "l", "text": b"z"})  # a bad record does not stop the shard
        if isinstance(wanted, str):
            assert isinstance(found, DataError) and wanted in str(found) and found.record == "k", found
        else:
            test_eq(
                {**found, **({"images": len(found["images"])} if "images" in found else {})},
                {"id": "k", **wanted},
            )
    test_eq(list(scan_shard(io.BytesIO(shard_of({})), "x.tar")), [])
    link = tarfile.TarInfo("a.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar: tar.addfile(link)
    with expect_fail(DataError, contains="'a.png' is a link or a device"):
        list(scan_shard(io.BytesIO(out.getvalue()), "x.tar"))

    whole = shard_of({"a.jpg": b"i" * 700, "a.txt": b"t"})

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.integers(0, len(whole)), st.binary(min_size=1, max_size=4), st.booleans())
    def check(place, junk, is_cut):
        data = whole[:place] if is_cut else whole[:place] + junk + whole[place + len(junk) :]
        try: list(scan_shard(io.BytesIO(data), "x.tar"))
        except DataError: pass

    check()
