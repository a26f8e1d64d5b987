"Derived from nbs/14_audit.ipynb by `make tests`; edit the notebook, not this file."
from collections import Counter
from pathlib import Path
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import ConfigError, progress_console
from vlm_lit.core import Segment
from vlm_lit.text.labels import check_tokenizer
from vlm_lit.data.records import Records
from vlm_lit.data.records import one_thread
from vlm_lit.data.collator import name_dead_worker
from vlm_lit.data.samplers import GlobalBatchSampler, mixture_draws, padding_ratio
from vlm_lit.data.findings import AuditSettings, ERRORS, Finding, Tally, WARNINGS, inspect_chunk
from vlm_lit.data.findings import severity
import json, sys, tempfile
from dataclasses import replace
from fastcore.test import test_eq, expect_fail
from vlm_lit.data.findings import inspect_record
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.text.tokenizer import load_tokenizer
from small_parts import dirty_records, talk
from vlm_lit.data.audit import AuditChunks
from vlm_lit.data.audit import audit
from vlm_lit.data.audit import count_all
from vlm_lit.data.audit import duplicates
from vlm_lit.data.audit import summarize

def setup_module():
    global DIRTY, folder, record, tok
    sys.path[:0] = ["../tests", "tests"]
    tok = load_tokenizer("gemma")
    folder = Path(tempfile.mkdtemp())
    DIRTY = dirty_records(folder)
    for record in DIRTY: print(str(record)[:100])
    print(len(DIRTY), "records")

def test_tallies_of_chunks_add_up():
    records = Records([{"id": k % 7, "conversations": talk("q")} for k in range(20)])
    with Breakpoint(count_all, at="bar.update", watch="part.n_records tally.n_records") as bp:
        tally = count_all(AuditChunks(records, tok, AuditSettings(), size=6))
    print("bytes per record:", sum(a[0].itemsize for a in (tally.lengths, tally.ids, tally.pictured)))
    bp.expect_each({"part.n_records": [6, 6, 6, 2], "tally.n_records": [6, 12, 18, 20]})

def test_a_number_and_its_string_are_two_ids():
    def stopped(*ids):
        records = [{"id": i, "conversations": talk("q")} for i in ids]
        with Breakpoint(duplicates, at="return len(again)", watch="len(ids) again") as bp:
            audit(records, tok)
        return bp

    diff = stopped(7, 8, 7, "7").diff(stopped(7, 8, "7", "7"), titles=('7 8 7 "7"', '7 8 "7" "7"'))
    diff.expect({"again[0]": (2, 3)})

def test_an_allowed_control_token_is_no_finding():
    settings = AuditSettings()
    change = {"settings": replace(settings, control_tokens="allow")}
    with Breakpoint(inspect_record, at="policy = ", watch="name len(found)", set=change) as bp:
        audit([DIRTY[5]], tok, settings)
    bp.expect_changed({"[f.kind for f in result[1]]": (["control_tokens"], [])})

def test_workers_give_the_same_report():
    settings = AuditSettings(image_folder=folder, max_length=900, n_examples=2)
    many = DIRTY * 30
    alone, together = [
        count_all(AuditChunks(Records(many), tok, settings, size=64), n_workers=n) for n in (0, 2)
    ]
    test_eq(summarize(alone, Records(many), settings), summarize(together, Records(many), settings))
    assert all(len(found) <= 2 for found in together.examples.values())

def test_wrong_settings_and_empty_data_are_said():
    for settings, message in [
        (AuditSettings(template="gema"), "unknown template"),
        (AuditSettings(image_folder=Path("nowhere")), "no image folder 'nowhere'"),
        (AuditSettings(decode_images=True), "decode_images needs an image_folder"),
        (AuditSettings(batch_size=0), "batch_size must be at least 1"),
        (AuditSettings(control_tokens="Refuse"), "control_tokens must be one of"),
        (AuditSettings(image_tags="all"), "image_tags must be one of"),
    ]:
        with expect_fail(ConfigError, contains=message):
            audit(DIRTY, tok, settings)
    empty = audit([], tok, AuditSettings())
    test_eq((empty["records"], empty["ok"], empty["lengths"]["max"]), (0, True, 0.0))
    assert {f.kind for f in [Finding(k, 0, 0, "") for k in ERRORS]} == set(ERRORS)
    assert not set(ERRORS) & set(WARNINGS)
    test_eq((severity("tags"), severity("greeting")), ("error", "warning"))

def test_duplicate_ids_are_found_across_chunks():
    records = Records([{"id": k % 7, "conversations": talk("q")} for k in range(20)])
    tally = count_all(AuditChunks(records, tok, AuditSettings(), size=6))
    n, found = duplicates(tally, records, 3)
    test_eq((n, [(f.index, f.record) for f in found]), (13, [(7, 0), (8, 1), (9, 2)]))

def test_dirty_data_is_not_ok_and_clean_data_is():
    report = audit(DIRTY, tok, AuditSettings(image_folder=folder, decode_images=True, max_length=900))
    test_eq((report["ok"], report["records"], report["errors"], report["warnings"]), (False, 12, 8, 3))
    (example,) = report["findings"]["control_tokens"]["examples"]
    test_eq((example["index"], example["id"], example["turn"]), (5, 5, 1))
    assert "'<end_of_turn>'" in example["what"]
    records = [DIRTY[0], {"id": 1, "conversations": talk("hi")}]
    clean = audit(records, tok, AuditSettings(image_folder=folder))
    assert clean["ok"] and not clean["findings"] and "ready for training" in clean["verdict"]
    test_eq(json.loads(json.dumps(report)), report)

def test_shares_add_up_and_most_positions_are_image():
    question, answer = "<image>\nWhat is in the photo?", "a black box under a blue sky, "
    talks = [talk(question, answer * (k % 4 + 1)) for k in range(20)]
    captions = [{"id": k, "image": "good.jpg", "conversations": own} for k, own in enumerate(talks)]
    report = audit(captions, tok, AuditSettings(image_folder=folder, batch_size=4))
    supervised = sum(s["share"] for s in report["segments"].values() if s["supervised"])
    image, padding = report["segments"]["image"]["share"], report["padding"]
    assert abs(sum(s["share"] for s in report["segments"].values()) - 1) < 1e-4
    assert image > 0.9 and 0.02 < supervised < 0.05
    assert padding["grouped"] < padding["random"] == round(report["segments"]["pad"]["share"], 4)
    test_eq(sum(report["lengths"]["histogram"]["counts"]), 20)
