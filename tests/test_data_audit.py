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
from vlm_lit.data.samplers import GlobalBatchSampler, mixture_draws, padding_ratio
from vlm_lit.data.findings import AuditSettings, ERRORS, Finding, Tally, WARNINGS, inspect_chunk
from vlm_lit.data.findings import severity
import io, json, sys, tempfile
import matplotlib.pyplot as plt
from IPython import display
from vlm_lit.debug.breakpoints import Breakpoint
from fastcore.test import test_eq, expect_fail
from vlm_lit.text.tokenizer import load_tokenizer
from small_parts import dirty_records, talk
from vlm_lit.data.audit import AuditChunks
from vlm_lit.data.audit import audit
from vlm_lit.data.audit import count_all
from vlm_lit.data.audit import duplicates
from vlm_lit.data.audit import summarize

def setup_module():
    global DIRTY, folder, record, show, tok
    sys.path[:0] = ["../tests", "tests"]
    def show(figure):
        "A figure as a notebook displays it."
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=80)
        plt.close(figure)
        return display.Image(out.getvalue())
    tok = load_tokenizer("gemma")
    folder = Path(tempfile.mkdtemp())
    DIRTY = dirty_records(folder)
    for record in DIRTY: print(str(record)[:100])

def test_duplicate_ids_are_found_across_chunks():
    records = Records([{"id": k % 7, "conversations": talk("q")} for k in range(20)])
    tally = count_all(AuditChunks(records, tok, AuditSettings(), size=6))
    with Breakpoint(duplicates, at="return len(again)", watch="len(tally.ids) len(ids) again") as bp:
        n, found = duplicates(tally, records, 3)
    test_eq([(f.index, f.record) for f in found], [(7, 0), (8, 1), (9, 2)])
    bp.expect({"len(tally.ids)": 4}, again=list(range(7, 20)))

def test_only_decoding_finds_a_broken_image():
    stops, watch = [], "tally.counts['image_unreadable'] tally.counts['image_missing'] len(lengths)"
    for decode in (True, False):
        settings = AuditSettings(image_folder=folder, decode_images=decode)
        with Breakpoint(summarize, at="findings, counts = _findings", watch=watch) as bp:
            audit(DIRTY, tok, settings)
        stops.append(bp)
    diff = stops[0].diff(stops[1], titles=("decoded", "only present"))
    diff.expect({"tally.counts['image_unreadable']": (1, 0)})

def test_dirty_data_is_not_ok_and_clean_data_is():
    report = audit(DIRTY, tok, AuditSettings(image_folder=folder, decode_images=True, max_length=900))
    test_eq((report["ok"], report["records"], report["errors"], report["warnings"]), (False, 12, 8, 3))
    (example,) = report["findings"]["control_tokens"]["examples"]
    test_eq((example["index"], example["id"], example["turn"]), (5, 5, 1))
    assert "'<end_of_turn>'" in example["what"]
    records = [DIRTY[0], {"id": 1, "conversations": talk("hi")}]
    clean = audit(records, tok, AuditSettings(image_folder=folder))
    print(clean["verdict"])
    assert clean["ok"] and not clean["findings"] and "ready for training" in clean["verdict"]
    test_eq(json.loads(json.dumps(report)), report)

def test_shares_add_up_and_most_positions_are_image():
    question, answer = "<image>\nWhat is in the photo?", "a black box under a blue sky, "
    talks = [talk(question, answer * (k % 4 + 1)) for k in range(20)]
    captions = [{"id": k, "image": "good.jpg", "conversations": own} for k, own in enumerate(talks)]
    report = audit(captions, tok, AuditSettings(image_folder=folder, batch_size=4))
    supervised = sum(s["share"] for s in report["segments"].values() if s["supervised"])
    image, padding = report["segments"]["image"]["share"], report["padding"]
    print(
        f"image {image:.1%}, supervised {supervised:.1%}, padding {padding['random']:.1%} at random, "
    f"{padding['grouped']:.1%} grouped"
    )
    assert abs(sum(s["share"] for s in report["segments"].values()) - 1) < 1e-4
    assert image > 0.9 and 0.02 < supervised < 0.05
    assert padding["grouped"] < padding["random"] == round(report["segments"]["pad"]["share"], 4)
    test_eq(sum(report["lengths"]["histogram"]["counts"]), 20)

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
