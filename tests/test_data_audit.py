"Derived from nbs/14_audit.ipynb by `make tests`; edit the notebook, not this file."
import math, warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import ConfigError, DataError, Segment, progress_console
from vlm_lit.data.data_findings import IMAGE, RECORD, Group, by_source, data_findings, hash64
from vlm_lit.data.data_findings import image_row, leaks, record_row, script_of
from vlm_lit.data.dataset import LazySupervisedDataset, TooLong
from vlm_lit.data.findings import ERRORS, WARNINGS, AuditSettings, Finding, inspect_record
from vlm_lit.data.findings import known_kind, severity
from vlm_lit.data.image_findings import inspect_images
from vlm_lit.data.records import one_thread
from vlm_lit.data.collator import name_dead_worker
from vlm_lit.data.samplers import GlobalBatchSampler, mixture_draws, padding_ratio
from vlm_lit.processor import VLMProcessor
from vlm_lit.text.encode import bisect_failures, encode_records
from vlm_lit.text.labels import control_pattern, make_prompt
from vlm_lit.text.messages import image_names
import json, sys, tempfile
from pathlib import Path
from fastcore.test import test_eq, expect_fail
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import sample_image
from vlm_lit.text.tokenizer import load_tokenizer
from small_parts import dirty_records, talk
from vlm_lit.data.audit import AuditChunks
from vlm_lit.data.audit import _add_group
from vlm_lit.data.audit import _fit
from vlm_lit.data.audit import as_dataset
from vlm_lit.data.audit import audit
from vlm_lit.data.audit import count_all
from vlm_lit.data.audit import inspect_texts
from vlm_lit.data.audit import opened_records
from vlm_lit.data.audit import summarize

def setup_module():
    global DIRTY, dataset_of, dirty_settings, folder, processor, record, tok
    sys.path[:0] = ["../tests", "tests"]
    tok = load_tokenizer("gemma")
    processor = VLMProcessor(tok)
    folder = Path(tempfile.mkdtemp())
    DIRTY = dirty_records(folder)
    for record in DIRTY: print(str(record)[:100])
    print(len(DIRTY), "records")
    def dirty_settings(**more):
        return AuditSettings(**{"image_folder": folder, "images": "all", "max_length": 900, **more})
    def dataset_of(records, **more):
        return as_dataset(records, processor, AuditSettings(image_folder=folder, **more))

def test_an_image_counted_as_one_position_hides_long_records():
    as_one = {"length": lambda n: n - 575 * (n > 575)}
    long = dataset_of(DIRTY, max_length=300)
    with Breakpoint(
        LazySupervisedDataset.fit, at="if length <= self", watch="i length", set=as_one
    ) as bp:
        chunk = inspect_texts(long, [0])
    bp.expect({"i": 0, "length": 595}).expect_after(length=20)
    print([own.number for own in inspect_texts(long, range(12)) if own.is_error and own.stands])

def test_tallies_of_chunks_add_up():
    records = [{"id": k % 7, "conversations": talk("q")} for k in range(20)]
    with Breakpoint(count_all, at="bar.update", watch="part.n_records tally.n_records") as bp:
        tally = count_all(AuditChunks(dataset_of(records), AuditSettings(), size=6))
    bp.expect_each({"part.n_records": [6, 6, 6, 2], "tally.n_records": [6, 12, 18, 20]})

def test_stop_at_the_sample_that_is_opened():
    mixed_talk = [
        {"id": k, "conversations": talk("q")} if k % 4 else {**DIRTY[0], "id": k} for k in range(40)
    ]
    with Breakpoint(opened_records, at="return chosen", watch="n") as bp:
        opened_records(dataset_of(mixed_talk), AuditSettings(sample_size=4))
    bp.expect({"n": 4, "np.flatnonzero(chosen)": [0, 12, 24, 36]})

def test_a_number_and_its_string_are_two_ids():
    def stopped(*ids):
        records = [{"id": i, "conversations": talk(f"q {n}")} for n, i in enumerate(ids)]
        with Breakpoint(_add_group, at="tally.counts[group.kind]", watch="group.numbers") as bp:
            audit(records, processor)
        return bp

    diff = stopped(7, 8, 7, "7").diff(stopped(7, 8, "7", "7"), titles=('7 8 7 "7"', '7 8 "7" "7"'))
    diff.expect({"group.numbers[0]": (2, 3)})

def test_stop_at_a_record_without_an_answer():
    open_end = {"id": 1, "conversations": talk("hi")[:1]}
    with Breakpoint(_fit, at='_note_error(own, DataError(ERRORS["nothing', watch="own.counts") as bp:
        report = audit([open_end], processor)
    print(report["verdict"])
    answered = [Segment.ANSWER, Segment.STOP]
    bp.expect({f"own.counts[{int(s)}]": 0 for s in answered})

def test_a_link_out_of_the_folder_is_an_error_unless_it_is_allowed():
    home, elsewhere = (Path(tempfile.mkdtemp()) for _ in range(2))
    sample_image(64, 48).save(elsewhere / "a.png")
    (home / "far").symlink_to(elsewhere)
    linked = [{"id": 1, "image": "far/a.png", "conversations": talk("<image>q")}]
    for images in ("sample", "none"):
        for follow, kinds in ((False, ["image_escapes"]), (True, [])):
            own = AuditSettings(image_folder=home, images=images, follow_links=follow)
            wanted = kinds if images == "sample" else []
            test_eq([k for k in audit(linked, tok, own)["findings"] if k.startswith("image_")], wanted)

def test_whatever_training_refuses_the_audit_finds():
    from hypothesis import given, settings, strategies as st

    sample_image(30, 20).resize((80_000, 1)).save(folder / "line.png")
    (folder / "web.jpg").write_bytes(b"<html>404</html>")
    processors = {"square": processor, "pad": VLMProcessor(tok, aspect="pad")}
    NAMES = ["good.jpg", "broken.jpg", "gone.jpg", "../x.jpg", "line.png", "web.jpg", "", 7, None]
    TEXTS = ["<image>\nq", "q", "<image><image> q", "", " ", "a<eos>", "x " * 90, "<img>", "\ud83d"]
    ROLES = ["human", "gpt", "human", "gpt", "system", "bot"]
    turn = st.fixed_dictionaries({"from": st.sampled_from(ROLES), "value": st.sampled_from(TEXTS)})
    asked = st.tuples(st.sampled_from(TEXTS), st.sampled_from(TEXTS)).map(lambda two: talk(*two))
    image = st.one_of(st.sampled_from(NAMES), st.lists(st.sampled_from(NAMES), max_size=2))
    record = st.fixed_dictionaries(
        {"conversations": st.one_of(asked, asked, st.lists(turn, max_size=4))},
        optional={"image": image, "id": st.sampled_from([1, "a", float("nan"), None, [2]])},
    )
    whole = record | st.sampled_from([None, 3, {}, {"messages": []}])
    limits = st.sampled_from([(None, "error"), (640, "error"), (640, "skip"), (640, "truncate")])

    def refusal(dataset):
        "Kind of what training refuses in the only record; None: nothing."
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: sample = dataset[0]
            except TooLong as error:
                return None if dataset.overlength == "skip" else error.kind
            except DataError as error: return known_kind(error.kind)
        return None if (sample["labels"] != -100).any() else "nothing_supervised"

    @settings(max_examples=100, deadline=None)
    @given(whole, limits, st.sampled_from(["square", "pad"]))
    def holds(raw, limit, aspect):
        max_length, overlength = limit
        own = dirty_settings(max_length=max_length, overlength=overlength)
        refused, found = (
            refusal(as_dataset([raw], processors[aspect], own)),
            audit([raw], processors[aspect], own),
        )
        kinds = {k for k, f in found["findings"].items() if f["severity"] == "error"}
        assert bool(refused) == bool(kinds), (refused, kinds)
        assert found["ok"] == (not refused)
        assert refused in kinds | {None, "data"}, (refused, kinds)
        json.dumps(found, allow_nan=False)

    holds()
    both = [{"from": role, "value": "<image>\nq"} for role in ("system", "human")]
    found = audit(
        [{"id": 1, "image": ["good.jpg"] * 2, "conversations": both}], processor, dirty_settings()
    )
    assert {"roles", "tags"} <= set(found["findings"])  # training stops at the first

def test_each_error_of_the_twelve_records_is_named():
    report = audit(DIRTY, processor, dirty_settings())
    named = {k: [e["id"] for e in f["examples"]] for k, f in report["findings"].items()}
    test_eq(
        named,
        {
            "broken_record": [10],
            "roles": [6],
            "tags": [4],
            "control_tokens": [5],
            "image_missing": [1],
            "image_escapes": [2],
            "image_unreadable": [3],
            "nothing_supervised": [7],
            "empty_answer": [7],
            "greeting": [11],
            "duplicate_id": [0],
        },
    )
    test_eq((report["ok"], report["records"], report["errors"], report["warnings"]), (False, 12, 8, 3))
    (example,) = report["findings"]["control_tokens"]["examples"]
    test_eq((example["index"], example["id"], example["turn"]), (5, 5, 1))
    assert "'<end_of_turn>'" in example["what"]
    (example,) = report["findings"]["image_unreadable"]["examples"]
    test_eq((example["index"], example["image"]), (3, "broken.jpg"))
    cut = dirty_settings(max_length=15, overlength="truncate")
    turns = talk("hi") + talk("and then?", "c " * 30)
    test_eq(list(audit([{"id": 1, "conversations": turns}], processor, cut)["findings"]), ["truncated"])
    clean = audit([DIRTY[0], {"id": 1, "conversations": talk("hi")}], processor, dirty_settings())
    assert clean["ok"] and not clean["findings"]
    assert clean["verdict"].endswith("ready for training; 1 of 1 images were opened")
    test_eq(json.loads(json.dumps(report, allow_nan=False)), report)
    two = {"id": 1, "image": ["gone.jpg", "../x"], "conversations": talk("<image> <end_of_turn>")}
    kinds = list(audit([two], processor, dirty_settings())["findings"])  # all at once
    test_eq(kinds, ["tags", "control_tokens", "image_missing", "image_escapes"])

def test_counted_and_opened_images_and_positions():
    content = [{"type": "image", "image": "good.jpg"}, {"type": "text", "text": "q"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    chat, listed = {"id": 1, "messages": messages}, {**DIRTY[0], "image": ["good.jpg"]}
    for raw, n_images in [(DIRTY[0], 1), (chat, 1), (listed, 1), (DIRTY[10], 0)]:
        test_eq(audit([raw], processor, dirty_settings())["images"], n_images)
    report = audit(DIRTY[:1], processor, dirty_settings())
    positions = {name: s["positions"] for name, s in report["segments"].items()}
    test_eq((positions["image"], positions["stop"]), (576, 3))
    test_eq(report["lengths"]["max"], sum(positions.values()))
    long = audit(DIRTY, processor, dirty_settings(max_length=300))
    test_eq(long["findings"]["over_length"]["count"], 5)
    for images, opened in [("all", 5), ("sample", 2), ("none", 0)]:
        found = audit(DIRTY, processor, dirty_settings(images=images, sample_size=2))
        test_eq((found["images"], found["images_opened"]), (5, opened))
        assert ("image_missing" in found["findings"]) == (images != "none")
        missing = "were opened" if images != "none" else "mend or leave out"
        assert missing in found["verdict"]
    only_text = audit([DIRTY[0]], processor, dirty_settings(images="none"))
    assert only_text["verdict"].endswith("images were not looked for")

def test_the_sample_of_images_finds_them_in_tables_and_where_the_data_lies():
    import pyarrow as pa, pyarrow.parquet as pq

    cells = [(folder / "good.jpg").read_bytes(), b"no image"]
    rows = [
        {"id": str(n), "image": {"bytes": cell, "path": None}, "conversations": talk("<image>\nq")}
        for n, cell in enumerate(cells)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    for images, kinds in [("sample", ["image_unreadable"]), ("none", [])]:
        report = audit(folder / "t.parquet", processor, AuditSettings(images=images))
        test_eq([k for k, f in report["findings"].items() if f["severity"] == "error"], kinds)
    (folder / "r.json").write_text(json.dumps(DIRTY[:2]))
    report = audit(folder / "r.json", processor)  # its own folder, as in training
    test_eq((report["images_opened"], list(report["findings"])), (2, ["image_missing"]))

def test_workers_give_the_same_report():
    own, many = dirty_settings(n_examples=2), DIRTY * 30
    chunks = AuditChunks(as_dataset(many, processor, own), own)
    alone, together = [summarize(count_all(chunks, n_workers=n), chunks.dataset, own) for n in (0, 2)]
    test_eq(alone, together)
    assert all(len(found["examples"]) <= 2 for found in together["findings"].values())
    test_eq(alone["findings"]["duplicate_id"]["count"], 349)

def test_wrong_settings_and_empty_data_are_said():
    for own, message in [
        (AuditSettings(template="gema"), "unknown template"),
        (AuditSettings(image_folder=Path("nowhere")), "no image folder 'nowhere'"),
        (AuditSettings(images="some"), "images must be one of"),
        (AuditSettings(batch_size=0), "batch_size must be at least 1"),
        (AuditSettings(sample_size=0), "sample_size must be at least 1"),
        (AuditSettings(control_tokens="Refuse"), "control_tokens must be one of"),
        (AuditSettings(image_tags="all"), "image_tags must be one of"),
        (AuditSettings(overlength="cut"), "overlength must be one of"),
        (AuditSettings(max_length=0), "max_length must be at least 1"),
        (AuditSettings(aspect="wide"), "aspect must be one of"),
    ]:
        with expect_fail(ConfigError, contains=message): audit(DIRTY, tok, own)
    empty = audit([], tok, AuditSettings())
    test_eq((empty["records"], empty["ok"], empty["lengths"]["max"]), (0, True, 0.0))

def test_sources_scripts_images_and_leaks_are_in_the_report():
    from PIL import Image as Photo

    for name, size in [("a", (60, 40)), ("b", (90, 40)), ("c", (400, 40))]:
        Photo.effect_noise(size, 90).convert("RGB").save(folder / f"{name}.png")
    entries = [("a", "one", "a box"), ("b", "two", "箱子"), ("c", "two", "a"), (None, None, "7 + 1")]
    records = []
    for n, (name, source, answer) in enumerate(entries):
        own = {"id": n, "conversations": talk(f"<image>\nq {n}" if name else f"q {n}", answer)}
        if name: own |= {"image": f"{name}.png"}
        records.append(own | ({"source": source} if source else {}))
    report = audit([*records, {"id": 9}], processor, dirty_settings(), against=records[:1])
    test_eq({k: (r["records"], r["images"], r["errors"]) for k, r in report["sources"].items()}, {
        "two": (2, 2, 0), "": (2, 0, 1), "one": (1, 1, 0),
    })  # fmt: skip
    test_eq(report["scripts"], {"Latin": 2, "Han": 1, "none": 1})
    test_eq((report["image_facts"]["read"], report["image_facts"]["width"]["max"]), (3, 400.0))
    test_eq({k: [e["id"] for e in f["examples"]] for k, f in report["findings"].items()}, {
        "broken_record": [9], "image_long": [2], "leak": [0],
    })  # fmt: skip
    test_eq(report["against"], {"records": 1, "errors": 0})
    (leak,) = report["findings"]["leak"]["examples"]
    test_eq(leak["what"], f"as record {records[0]['id']!r} (of the other data, number 0)")
    many = [{**records[3], "id": n, "source": f"s{n}"} for n in range(60)]
    table = audit(many, processor)["sources"]
    test_eq((len(table), table["(others)"]), (51, {"sources": 10, "records": 10}))

def test_text_that_json_cannot_hold_is_written_out():
    names = [float("nan"), float("inf"), "\ud83d", "\x1b[31m", 10**30]
    bad = [{"id": name, "image": "\ud83d", "conversations": talk("q<eos>")} for name in names]
    report = audit(bad, processor, dirty_settings())
    text = json.dumps(report, allow_nan=False)
    text.encode("utf-8")
    shown = [e["id"] for f in report["findings"].values() for e in f["examples"]]
    test_eq(shown, [0, 1, "\\ud83d", "\x1b[31m", 10**30])  # an id must be finite
    assert json.loads(text) == report

def test_shares_add_up_and_most_positions_are_image():
    question, answer = "<image>\nWhat is in the photo?", "a black box under a blue sky, "
    talks = [talk(question, answer * (k % 4 + 1)) for k in range(20)]
    captions = [{"id": k, "image": "good.jpg", "conversations": own} for k, own in enumerate(talks)]
    report = audit(captions, processor, AuditSettings(image_folder=folder, batch_size=4))
    supervised = sum(s["share"] for s in report["segments"].values() if s["supervised"])
    image, padding = report["segments"]["image"]["share"], report["padding"]
    assert abs(sum(s["share"] for s in report["segments"].values()) - 1) < 1e-4
    assert image > 0.9 and 0.02 < supervised < 0.05
    assert padding["grouped"] < padding["random"] == round(report["segments"]["pad"]["share"], 4)
    test_eq(sum(report["lengths"]["histogram"]["counts"]), 20)
