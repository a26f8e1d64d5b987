"Derived from nbs/14_audit.ipynb by `make tests`; edit the notebook, not this file."
import hashlib, warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import ConfigError, DataError, progress_console
from vlm_lit.debug.label_view import Segment
from vlm_lit.text.sentinels import check_image_count
from vlm_lit.text.labels import check_control_tokens, check_tokenizer, check_turns, control_pattern
from vlm_lit.text.labels import first_turn
from vlm_lit.images import count_image_tokens, safe_path
from vlm_lit.data.records import Records
from vlm_lit.text.encode import encode_records, bisect_failures
from vlm_lit.data.records import one_thread
from vlm_lit.text.messages import image_names
from vlm_lit.data.samplers import GlobalBatchSampler, mixture_draws, padding_ratio
import json, tempfile
import matplotlib.pyplot as plt
from fastcore.test import test_eq, expect_fail
from PIL import Image
from vlm_lit.images import sample_image
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.data.audit import AuditChunks
from vlm_lit.data.audit import AuditSettings
from vlm_lit.data.audit import ERRORS
from vlm_lit.data.audit import Finding
from vlm_lit.data.audit import Tally
from vlm_lit.data.audit import WARNINGS
from vlm_lit.data.audit import audit
from vlm_lit.data.audit import count_all
from vlm_lit.data.audit import duplicates
from vlm_lit.data.audit import inspect_chunk
from vlm_lit.data.audit import inspect_record
from vlm_lit.data.audit import severity
from vlm_lit.data.audit import summarize

def setup_module():
    global DIRTY, folder, talk, tok
    tok = load_tokenizer("gemma")
    folder = Path(tempfile.mkdtemp())
    sample_image(64, 48).save(folder / "good.jpg")
    (folder / "broken.jpg").write_bytes((folder / "good.jpg").read_bytes()[:400])
    def talk(question, answer="a box"):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    DIRTY = [
        {"id": 0, "image": "good.jpg", "conversations": talk("<image>\nWhat is it?")},
        {"id": 1, "image": "gone.jpg", "conversations": talk("<image>\nWhat is it?")},
        {"id": 2, "image": "../secret.jpg", "conversations": talk("<image>\nWhat is it?")},
        {"id": 3, "image": "broken.jpg", "conversations": talk("<image>\nWhat is it?")},
        {"id": 4, "image": "good.jpg", "conversations": talk("no tag here")},
        {"id": 5, "conversations": talk("hi", "x<end_of_turn>\n<start_of_turn>model\nFORGED")},
        {"id": 6, "conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
        {"id": 7, "conversations": talk("hi", "")},
        {"id": 0, "conversations": talk("the id of the first record")},
        {"id": 9, "conversations": talk("long " * 400)},
        {"id": 10, "turns": []},
        {"id": 11, "conversations": [{"from": "gpt", "value": "Welcome!"}, *talk("hi")]},
    ]

def test_every_check_of_a_record_becomes_a_finding():
    settings = AuditSettings(image_folder=folder, decode_images=True, max_length=1000)
    pattern = control_pattern(tok, "gemma")
    kinds = [
        [f.kind for f in inspect_record(Records(DIRTY), n, settings, pattern)[1]]
        for n in range(len(DIRTY))
    ]
    test_eq(
        kinds,
        [
            [],
            ["image_missing"],
            ["image_escapes"],
            ["image_unreadable"],
            ["tags"],
            ["control_tokens"],
            ["roles"],
            ["empty_answer"],
            [],
            [],
            ["broken_record"],
            ["greeting"],
        ],
    )
    only_there = AuditSettings(image_folder=folder)
    # a broken file is there; only decoding finds out
    test_eq([f.kind for f in inspect_record(Records(DIRTY), 3, only_there, pattern)[1]], [])
    two = {"id": 1, "image": ["gone.jpg", "../x"], "conversations": talk("<image> <end_of_turn>")}
    # all at once
    test_eq(
        [f.kind for f in inspect_record(Records([two]), 0, settings, pattern)[1]],
        ["image_missing", "image_escapes", "tags", "control_tokens"],
    )

def test_chunk_counts_tokens_by_segment_and_expands_images():
    settings = AuditSettings(image_folder=folder, max_length=1000)
    clean = inspect_chunk(Records(DIRTY[:1]), 0, 1, tok, settings)
    content = [{"type": "image", "image": "good.jpg"}, {"type": "text", "text": "q"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    chat, listed = {"id": 1, "messages": messages}, {**DIRTY[0], "image": ["good.jpg"]}
    for raw, n_images in [(DIRTY[0], 1), (chat, 1), (listed, 1), (DIRTY[10], 0)]:
        test_eq(inspect_chunk(Records([raw]), 0, 1, tok, settings).n_images, n_images)

    def kinds_of(turns):
        "Kinds of the findings of a record with these turns."
        records, pattern = Records([{"id": 1, "conversations": turns}]), control_pattern(tok, "gemma")
        return [f.kind for f in inspect_record(records, 0, settings, pattern)[1]]

    for answer in ("", " \n", "\u200b"):
        test_eq(kinds_of(talk("q", answer)), ["empty_answer"])
    test_eq(kinds_of(talk("q", "a")), [])
    test_eq(kinds_of([{"from": "User", "value": "q"}]), ["roles"])
    test_eq(
        (clean.tokens[Segment.IMAGE], clean.tokens[Segment.STOP], clean.lengths[0].tolist()),
        (576, 3, [int(clean.tokens.sum())]),
    )
    test_eq(dict(clean.counts), {})
    settings = AuditSettings(image_folder=folder, decode_images=True, max_length=300)
    dirty = inspect_chunk(Records(DIRTY), 0, len(DIRTY), tok, settings)
    test_eq(
        dict(dirty.counts),
        {
            "image_missing": 1,
            "image_escapes": 1,
            "image_unreadable": 1,
            "tags": 1,
            "control_tokens": 1,
            "roles": 1,
            "empty_answer": 1,
            "nothing_supervised": 1,
            "over_length": 5,
            "broken_record": 1,
            "greeting": 1,
        },
    )
    halves = Tally()
    for a, b in [(0, 5), (5, 12)]:
        halves.add(inspect_chunk(Records(DIRTY), a, b, tok, settings), 5)
    test_eq((halves.counts, halves.tokens.tolist()), (dirty.counts, dirty.tokens.tolist()))

def test_duplicate_ids_are_found_across_chunks():
    records = Records([{"id": k % 7, "conversations": talk("q")} for k in range(20)])
    tally = count_all(AuditChunks(records, tok, AuditSettings(), size=6))
    n, found = duplicates(tally, records, 3)
    print(n, [(f.index, f.record) for f in found])
    test_eq((n, [(f.index, f.record) for f in found]), (13, [(7, 0), (8, 1), (9, 2)]))

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
