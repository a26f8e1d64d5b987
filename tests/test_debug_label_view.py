"Derived from nbs/01b_label_view.ipynb by `make tests`; edit the notebook, not this file."
import html
from itertools import zip_longest
from rich.text import Text
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, Segment
from vlm_lit.debug.values import token_text
from fastcore.test import test_eq, expect_fail
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.debug.label_view import LabelStrip
from vlm_lit.debug.label_view import StripPair

def setup_module():
    global Letters, ids, labels, sample, segments
    class Letters:
        "A tokenizer of one token per letter, for the examples."

        def decode(self, ids): return "".join(map(chr, ids))
    def sample(text, supervised):
        "Ids of a text, and labels that supervise one part of it."
        start = text.index(supervised)
        ids = [ord(c) for c in text]
        labels = [IGNORE_INDEX] * len(ids)
        labels[start : start + len(supervised)] = ids[start : start + len(supervised)]
        return ids, labels
    ids, labels = sample("What is it? A cat.", "A cat.")
    segments = [Segment.USER] * 12 + [Segment.ANSWER] * 6
    LabelStrip(ids, labels, Letters(), segments)

def test_runs_of_one_segment_become_lines():
    strip = LabelStrip(ids, labels, Letters(), segments)
    watch = ["[name for name, _ in found]", "found[-1][1][0]", "self.texts[12]"]
    with Breakpoint(LabelStrip.lines, at="return found", watch=watch) as bp:
        strip.lines()
    bp.expect({"[name for name, _ in found]": ["USER", "ANSWER"]})
    bp.expect({"found[-1][1][0]": 12, "self.texts[12]": "A"})

def test_an_empty_mask_is_counted():
    strip = LabelStrip(ids, labels, Letters(), segments)
    empty = LabelStrip(ids, [IGNORE_INDEX] * len(ids), Letters(), segments)
    test_eq(empty.ids, strip.ids)
    test_eq((empty.summary, strip.summary), ("0 of 18 tokens supervised", "6 of 18 tokens supervised"))
    print(empty)

def test_a_pair_marks_its_first_difference():
    pair = StripPair(
        LabelStrip(*sample("a cat", "cat"), Letters(), title="right"),
        LabelStrip(*sample("a cat", "at"), Letters(), title="one late"),
    )
    with Breakpoint(StripPair.rows, at="return rows", watch="n rows[2]") as bp:
        print(pair)
    bp.expect({"rows[2]": ("->", "[c]", "c|")}, n=2)

def test_strip_names_segments_and_escapes_what_it_shows():
    ids, labels = sample("<b>?\x1b yes", "yes")
    strip = LabelStrip(
        [*ids, IMAGE_TOKEN_INDEX],
        [*labels, IGNORE_INDEX],
        Letters(),
        [Segment.USER] * 6 + [Segment.ANSWER] * 3 + [Segment.IMAGE],
    )
    test_eq(strip.supervised, ["y", "e", "s"])
    test_eq([name for name, _ in strip.lines()], ["USER", "ANSWER", "IMAGE"])
    assert "\x1b" not in repr(strip) and "<b>?" not in strip._repr_html_()
    assert "&lt;" in strip._repr_html_() and strip.__rich__().plain == repr(strip)
    test_eq(repr(strip).splitlines()[1], "ANSWER [y][e][s]")
    wide = LabelStrip([ord("a")] * 80, [-100] * 80, Letters(), [Segment.USER] * 80)
    test_eq([len(line) for line in repr(wide).splitlines()], [99, 75, 33])
    test_eq(repr(LabelStrip(ids, labels, Letters(), title="plain")).splitlines()[0], "plain")
    with expect_fail(ValueError, contains="2 input_ids but 1 labels"):
        LabelStrip([1, 2], [1], Letters())
    with expect_fail(ValueError, contains="1 input_ids but 2 segments"):
        LabelStrip([1], [1], Letters(), [0, 1])

def test_every_segment_is_shown():
    for s in Segment:
        strip = LabelStrip([97, 98], [-100, 98], Letters(), [s, s])
        assert f"<b><u>b</u></b>" in strip._repr_html_() and strip.__rich__().plain == repr(strip)
        test_eq(repr(strip).splitlines()[0], f"{s.name:6} a|[b]")
        assert f"{s.name:6} a|" in repr(StripPair(strip, strip))

def test_a_pair_of_equal_strips_has_no_difference():
    pair = StripPair(
        LabelStrip(*sample("a cat", "cat"), Letters(), title="right"),
        LabelStrip(*sample("a cat", "at"), Letters()),
    )
    test_eq(pair.first_difference, 2)
    assert "->" in repr(pair) and "outline" in pair._repr_html_()
    same = StripPair(pair.left, pair.left)
    test_eq((same.first_difference, repr(same).splitlines()[-1]), (None, "no difference"))
    test_eq(StripPair(pair.left, LabelStrip(*sample("a ca", "ca"), Letters())).first_difference, 4)
