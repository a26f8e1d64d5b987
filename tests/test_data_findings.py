"Derived from nbs/13a_findings.ipynb by `make tests`; edit the notebook, not this file."
import hashlib, warnings
import numpy as np
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import DataError
from vlm_lit.data.records import Records
from vlm_lit.core import Segment
from vlm_lit.images import count_image_tokens, safe_path
from vlm_lit.text.encode import bisect_failures, encode_records
from vlm_lit.text.labels import check_control_tokens, check_turns, control_pattern, first_turn
from vlm_lit.text.labels import open_turns
from vlm_lit.text.messages import image_names
from vlm_lit.text.sentinels import check_image_count
import sys, tempfile
from dataclasses import replace
from fastcore.test import test_eq
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.text.tokenizer import load_tokenizer
from small_parts import dirty_records, talk
from vlm_lit.data.findings import AuditSettings
from vlm_lit.data.findings import Tally
from vlm_lit.data.findings import attempt
from vlm_lit.data.findings import inspect_chunk
from vlm_lit.data.findings import inspect_record

def setup_module():
    global DIRTY, folder, tok
    sys.path[:0] = ["../tests", "tests"]
    tok = load_tokenizer("gemma")
    folder = Path(tempfile.mkdtemp())
    DIRTY = dirty_records(folder)

def test_a_forged_turn_becomes_a_finding():
    settings, pattern = AuditSettings(image_folder=folder), control_pattern(tok, "gemma")
    watch = "check.__name__ kind len(findings)"
    with Breakpoint(attempt, at="findings.append(Finding", watch=watch) as bp:
        inspect_record(Records(DIRTY), 5, settings, pattern)
    bp.expect({"check.__name__": "check_control_tokens", "kind": "control_tokens", "e.turn": 1})
    bp.expect({"'<end_of_turn>' in e.message": True})
    bp.expect_after({"len(findings)": 1})

def test_only_decoding_finds_a_broken_file():
    settings = AuditSettings(image_folder=folder, decode_images=True)
    change = {"settings": replace(settings, decode_images=False)}
    with Breakpoint(inspect_record, at="if settings.image_folder", watch="name", set=change) as bp:
        inspect_record(Records(DIRTY), 3, settings, control_pattern(tok, "gemma"))
    bp.expect_changed({"[f.kind for f in result[1]]": (["image_unreadable"], [])})

def test_an_image_counted_as_one_position_hides_long_records():
    settings = AuditSettings(max_length=300)
    as_one = {"counts": lambda c: np.where(np.arange(len(c)) == Segment.IMAGE, c // 576, c)}
    with Breakpoint(inspect_chunk, at="length = int(", watch="n counts.sum()", set=as_one) as bp:
        inspect_chunk(Records(DIRTY), 0, len(DIRTY), tok, settings)
    bp.expect({"n": 0, "counts.sum()": 595}).expect_after({"counts.sum()": 20})
    bp.expect_changed({"counts['over_length']": (5, 1)})

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

def test_a_link_out_of_the_folder_is_a_finding_unless_it_is_allowed():
    home, elsewhere = (Path(tempfile.mkdtemp()) for _ in range(2))
    (elsewhere / "a.jpg").write_bytes((folder / "good.jpg").read_bytes())
    (home / "far").symlink_to(elsewhere)
    linked, pattern = Records([{**DIRTY[0], "image": "far/a.jpg"}]), control_pattern(tok, "gemma")
    for decode in (False, True):
        for follow, kinds in ((False, ["image_escapes"]), (True, [])):
            own = AuditSettings(image_folder=home, decode_images=decode, follow_links=follow)
            test_eq([f.kind for f in inspect_record(linked, 0, own, pattern)[1]], kinds)

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
    test_eq(kinds_of(talk("", "a")), ["empty_turn"])
    test_eq(kinds_of([*talk("q", ""), *talk("r", "a")]), ["empty_turn", "empty_answer"])
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
