"Derived from nbs/13a_findings.ipynb by `make tests`; edit the notebook, not this file."
import re
from dataclasses import dataclass
from pathlib import Path
from vlm_lit.core import IMAGE_TOKEN, DataError
from vlm_lit.images import count_image_tokens
from vlm_lit.text.labels import check_control_tokens, check_turns, first_turn
from vlm_lit.text.labels import open_turns
from vlm_lit.text.messages import image_names
from vlm_lit.text.sentinels import check_image_count
import sys, tempfile
from fastcore.test import test_eq
from vlm_lit.data.records import Records
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.text.encode import bisect_failures
from vlm_lit.text.labels import control_pattern
from vlm_lit.text.tokenizer import load_tokenizer
from small_parts import dirty_records, talk
from vlm_lit.data.findings import ERRORS
from vlm_lit.data.findings import WARNINGS
from vlm_lit.data.findings import attempt
from vlm_lit.data.findings import inspect_record
from vlm_lit.data.findings import misspelled_tag
from vlm_lit.data.findings import record_warnings
from vlm_lit.data.findings import severity

def setup_module():
    global DIRTY, folder, inspected, pattern, tok
    sys.path[:0] = ["../tests", "tests"]
    tok = load_tokenizer("gemma")
    pattern = control_pattern(tok, "gemma")
    folder = Path(tempfile.mkdtemp())
    DIRTY = dirty_records(folder)
    def inspected(record, number=0):
        "The findings of one record, given as its file has it."
        (raw,) = bisect_failures([number], lambda _: Records([record]).read([0]))
        return inspect_record(raw, number, "refuse", pattern, "gemma")[1]

def test_tags_that_are_read_as_text():
    texts = ["<image>", "<Image>", "<img>", "< image >", "<|image|>", "<image_1>", "image", "<b>"]
    with Breakpoint(misspelled_tag, at="return next", watch="text") as bp:
        found = [misspelled_tag(text) for text in texts]
    print(found)
    bp.expect_each({"_TAG.findall(text)": [["<image>"], *[[t] for t in texts[1:6]], []]})
    assert found == [None, *texts[1:6], None, None]

def test_a_forged_turn_becomes_a_finding():
    with Breakpoint(attempt, at="findings.append", watch="check.__name__ kind len(findings)") as bp:
        inspected(DIRTY[5], 5)
    bp.expect({"check.__name__": "check_control_tokens", "kind": "control_tokens", "e.turn": 1})
    bp.expect({"'<end_of_turn>' in e.message": True})
    bp.expect_after({"len(findings)": 1})

def test_an_allowed_control_token_is_no_finding():
    change = {"policy": "allow"}
    with Breakpoint(inspect_record, at="name, turns, n_images", watch="policy index", set=change) as bp:
        inspected(DIRTY[5], 5)
    bp.expect_changed({"[f.kind for f in result[1]]": (["control_tokens"], [])})

def test_every_check_of_a_text_becomes_a_finding():
    kinds = [[f.kind for f in inspected(record, n)] for n, record in enumerate(DIRTY)]
    test_eq(kinds[:4] + [kinds[8], kinds[9]], [[]] * 6)  # what is wrong there, images have
    test_eq(
        kinds[4:8] + kinds[10:],
        [["tags"], ["control_tokens"], ["roles"], ["empty_answer"], ["broken_record"], ["greeting"]],
    )

def test_texts_and_their_warnings():
    def kinds_of(turns, **more):
        return [f.kind for f in inspected({"id": 1, "conversations": turns, **more})]

    for answer in ("", " \n", "\u200b"):
        test_eq(kinds_of(talk("q", answer)), ["empty_answer"])
    test_eq(kinds_of(talk("q", "a")), [])
    test_eq(kinds_of(talk(" ", "a")), ["empty_turn"])
    test_eq(kinds_of(talk("", "a")), ["open_turn", "empty_turn"])
    test_eq(kinds_of([*talk("q", ""), *talk("r", "a")]), ["open_turn", "empty_answer"])
    test_eq(kinds_of([{"from": "User", "value": "q"}]), ["roles"])
    test_eq(kinds_of(talk("what is <img>?", "an <IMG> or <image1/>")), ["tag_misspelled"] * 2)
    test_eq(kinds_of(talk("<", "a < b > c <imagery> <img src='x'> <images of cats>")), [])
    record = {"id": 1, "conversations": talk("q"), "ignored": ["caption", "tools"]}
    test_eq([f.what for f in record_warnings(record, 0, "gemma")], ["not read: caption, tools"])
    unknown = DataError("new", 3, kind="of_tomorrow")
    test_eq([f.kind for f in inspect_record(unknown, 0, "refuse", pattern, "gemma")[1]], ["data"])
    assert not set(ERRORS) & set(WARNINGS)
    test_eq((severity("tags"), severity("greeting")), ("error", "warning"))
