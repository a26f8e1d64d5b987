"Derived from nbs/95_stop_display.ipynb by `make tests`; edit the notebook, not this file."
import html, os, re, textwrap
from typing import NamedTuple
from vlm_lit.debug.compare import Difference, changed_parts, first_difference
from vlm_lit.debug.snapshots import Note
from vlm_lit.debug.values import Shown, ids_text, shown, thumbnail, visible
import re, sys
import torch
from fastcore.test import test_eq
from vlm_lit.core import DataError
from vlm_lit.debug.breakpoints import Breakpoint
from small_parts import mask_prompt, pack
from vlm_lit.debug.stop_display import change_words
from vlm_lit.debug.stop_display import changes_of
from vlm_lit.debug.stop_display import first_words
from vlm_lit.debug.stop_display import shown_pair

def setup_module():

    sys.path[:0] = ["../tests", "tests"]

def test_text_shows_path_source_values_and_changes():
    input_ids = torch.tensor([2, 106, 1645, 9, 7, 1])
    with Breakpoint(mask_prompt, at="labels[:prompt_len] =", watch="labels prompt_len") as bp:
        mask_prompt(input_ids, 4)
    bp.expect(prompt_len=4).expect_after(labels=[-100, -100, -100, -100, 7, 1])
    print(bp)
    text = repr(bp).splitlines()
    test_eq(text[0], f"mask_prompt  small_parts.py:{bp.stop.line}, 1 hit")
    assert text[1].strip().startswith("mask_prompt(input_ids, 4) (") and "→ mask_prompt (" in text[1]
    assert [line[:2] for line in text[2:6]] == ["  ", "  ", "->", "  "]
    test_eq(text[6].split(), "labels (6,) int64 2 106 1645 9 7 1".split())
    test_eq(text[7].split(), "* after (6,) int64 -100×4 7 1".split())
    test_eq(text[8].split(), "✓ prompt_len int 4".split())
    assert "object object>" in first_words(object()) and "0x" not in first_words(object())

def test_several_hits_are_a_time_line():
    with Breakpoint(pack, at="total += x", watch="x total") as bp: pack([3, 1, 4])
    bp.expect_each(total=[0, 3, 4])
    print(bp)
    rows = repr(bp).splitlines()[-4:]
    test_eq(rows[0].split(), ["hit", "x", "total"])
    test_eq(
        [row.split()[2:] for row in rows[1:]], [["✓", *r.split()] for r in ("0 → 3", "3 → 4", "4 → 8")]
    )

def test_html_escapes_everything():
    def greet(text):
        reply = f"<b>{text}</b>"
        return reply

    with Breakpoint(greet, at="return reply", watch=["text", "reply", "'<i>'"]) as bp:
        greet("<script>alert(1)</script>")
    page = bp._repr_html_()
    assert "<script" not in page and "<i>" not in page and "&lt;script&gt;alert(1)" in page
    assert "reply = f&quot;&lt;b&gt;{text}" in page and "→" in page
    test_eq(page.count("<tr"), 1 + 3)

def test_no_line_is_longer_than_100_columns():
    def long_one(words):
        joined = " ".join(words) + "                                                            end"
        return joined

    with Breakpoint(long_one, at="return joined") as bp:
        long_one(["a longer word"] * 200)
    bp.expect_return({"result[:200]": " ".join(["a longer word"] * 200)[:200]})
    assert max(map(len, repr(bp).splitlines())) <= 100
    assert len(repr(bp).splitlines()) < 30 and "…" in repr(bp)

def test_long_values_are_shown_from_shortly_before_their_difference():
    def answer_of(words, mark):
        text = f"{' '.join(words)} {mark} {' '.join(words)}"
        return text

    with Breakpoint(answer_of, at="text =", set={"mark": "B"}) as bp:
        answer_of(["word"] * 100, "A")
    ((_, where, without, changed),) = changes_of(bp)
    test_eq(where[:12], "result[500:]")
    test_eq([len(value.text) for value in (without, changed)], [400, 400])
    assert without.text.startswith("… word word") and changed.text.startswith("… word word")
    assert "word A word" in without.text and "word B word" in changed.text
    assert "word B word" in repr(bp) and "word B word" in bp._repr_html_()
    ids = [list(range(200)), [*range(150), 7, *range(151, 200)]]
    texts = [v.text for v in shown_pair("ids", ids, first_difference(*ids), None)]
    assert "149 150 151" in texts[0] and "149 7 151" in texts[1] and texts[0].startswith("… ")
    lists = [["word"] * 100 + [mark] for mark in "AB"]
    texts = [v.text for v in shown_pair("words", lists, first_difference(*lists), None)]
    test_eq(texts, ["'A'", "'B'"])

def test_values_that_write_themselves_alike_are_told_apart():
    def normalized(features, options):
        row = features * options["scale"]
        return row

    features, options = torch.eye(20), {"name": "a name " * 20, "scale": 1}
    settings = {"features": features.flip(0), "options": {**options, "scale": 3}}
    with Breakpoint(normalized, at="row =", set=settings) as bp:
        normalized(features, options)
    text = repr(bp)
    assert "set features[0][0]: 1.0 → 0.0" in text and "set options['scale']: 1 → 3" in text
    assert "max 1; [0][0]: 1.0 → 0.0" in text
    late = features.int()
    late[1, 9] = 7
    with Breakpoint(normalized, at="row =", set={"features": late}) as bp:
        normalized(features.int(), options)
    assert "with    (20, 20) int32  [1 0×19]  [0 1 0×7 7 0×10]" in repr(bp)
    same = first_difference([DataError("a")], [DataError("a", record=1)])
    test_eq(change_words(same._replace(expected=DataError("a"))), "another DataError")
