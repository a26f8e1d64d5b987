"Derived from nbs/14b_repair.ipynb by `make tests`; edit the notebook, not this file."
import json
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from vlm_lit.core import ConfigError
from vlm_lit.files import writing
from vlm_lit.data.audit import Audit, plain
from vlm_lit.data.convert import converted_record, json_line
import sys, tempfile
from fastcore.test import expect_fail, test_eq
from vlm_lit.data.audit import run_audit
from vlm_lit.data.findings import AuditSettings
from vlm_lit.data.records import Records
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.processor import VLMProcessor
from vlm_lit.text.tokenizer import load_tokenizer
from small_parts import dirty_records, talk
from vlm_lit.data.repair import images_path
from vlm_lit.data.repair import left_out_path
from vlm_lit.data.repair import write_passing

def setup_module():
    global DIRTY, audited, folder, processor, tok
    sys.path[:0] = ["../tests", "tests"]
    tok = load_tokenizer("gemma")
    processor = VLMProcessor(tok)
    folder = Path(tempfile.mkdtemp())
    DIRTY = dirty_records(folder)
    def audited(data, **more):
        settings = dict(image_folder=folder, images="all", max_length=900, keep_failures=True)
        given = tok if "control_tokens" in more else processor
        return run_audit(data, given, AuditSettings(**settings | more))

def test_stop_where_the_files_are_moved():
    out = Path(tempfile.mkdtemp()) / "clean.jsonl"
    with Breakpoint(write_passing, at="if images.is_dir()", watch="out.exists()") as bp:
        print(write_passing(audited(DIRTY), out))
    print(*sorted(path.name for path in out.parent.iterdir()))
    print([json.loads(line)["id"] for line in out.read_text().splitlines()])
    bp.expect({"sorted(failed)": [1, 2, 3, 4, 5, 6, 7, 10], "out.exists()": False})

def test_records_that_pass_are_equal_and_come_once():
    for policy in ("refuse", "allow"):
        run = audited(DIRTY, control_tokens=policy)
        out = Path(tempfile.mkdtemp()) / "clean.jsonl"
        n_written, n_left = write_passing(run, out)
        left = [json.loads(line) for line in left_out_path(out).read_text().splitlines()]
        test_eq((n_written + n_left, len(left)), (12, n_left))
        kept = [n for n in range(12) if n not in {row["index"] for row in left}]
        test_eq(Records(out).read(range(n_written)), Records(DIRTY).read(kept))
        assert audited(out, control_tokens=policy).report["ok"]
        assert all(row["errors"][0]["what"] for row in left)
    test_eq(5 in kept, True)  # allowed, so that it passes

def test_images_of_a_table_are_written_byte_for_byte():
    import pyarrow as pa, pyarrow.parquet as pq

    cells = [(folder / "good.jpg").read_bytes(), b"no image", (folder / "good.jpg").read_bytes()]
    rows = [
        {"id": str(n), "image": [{"bytes": cell, "path": None}], "conversations": talk("<image>\nq")}
        for n, cell in enumerate(cells)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    out = Path(tempfile.mkdtemp()) / "clean.jsonl"
    test_eq(write_passing(audited(folder / "t.parquet"), out), (2, 1))
    names = [json.loads(line)["image"] for line in out.read_text().splitlines()]
    test_eq([(images_path(out) / name).read_bytes() for name in names], cells[::2])
    test_eq(len(list(images_path(out).rglob("*.jpg"))), 1)  # one file for one content
    assert audited(out, image_folder=images_path(out)).report["ok"]

def test_nothing_is_overwritten_and_nothing_is_left_half_done():
    run, place = audited(DIRTY[:2]), Path(tempfile.mkdtemp())
    for name in ("a.jsonl", "a.left-out.jsonl", "a.images"):
        (place / name).write_text("mine")
        with expect_fail(ConfigError, contains="is there already"):
            write_passing(run, place / "a.jsonl")
        test_eq([(p.name, p.read_text()) for p in place.iterdir()], [(name, "mine")])
        (place / name).unlink()
    with expect_fail(ConfigError, contains="as .jsonl"):
        write_passing(run, place / "a.json")
    with expect_fail(ConfigError, contains="make it first"):
        write_passing(run, place / "no/a.jsonl")
    with expect_fail(ConfigError, contains="keep_failures"):
        write_passing(audited(DIRTY, keep_failures=False), place / "a.jsonl")
    run.dataset.records.items.append(3)  # changed since it was audited
    with expect_fail(Exception): write_passing(run, place / "a.jsonl")
    test_eq(list(place.iterdir()), [])
