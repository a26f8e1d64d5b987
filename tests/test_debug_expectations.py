"Derived from nbs/97_expectations.ipynb by `make tests`; edit the notebook, not this file."
import functools, html, re, types
from collections.abc import Mapping
from typing import Any, Self
from vlm_lit.core import ConfigError
from vlm_lit.debug.compare import first_difference
from vlm_lit.debug.snapshots import Note, check_expression, evaluate
from vlm_lit.debug.stop_display import first_words, html_table, paragraph, shown_pair, tag, why_not
from vlm_lit.debug.values import shown
import sys
import torch
from fastcore.test import expect_fail, test_eq
from vlm_lit.debug.breakpoints import Breakpoint
from small_parts import mask_prompt, pack

def setup_module():
    global bp, found, input_ids, stopped_at_mask, xs
    sys.path[:0] = ["../tests", "tests"]
    input_ids = torch.tensor([2, 106, 1645, 9, 7, 1])
    def stopped_at_mask():
        with Breakpoint(mask_prompt, at="labels[:prompt_len] =", watch="labels prompt_len") as bp:
            mask_prompt(input_ids, prompt_len=4)
        return bp
    found = []
    for xs in ([3, 1, 4], [3, 2, 4]):
        with Breakpoint(pack, at="row[\"mean\"]", watch="xs total row") as bp:
            pack(xs)
        found.append(bp)

def test_values_before_after_and_returned():
    with Breakpoint(mask_prompt, at="labels[:prompt_len] =", watch="labels prompt_len") as bp:
        mask_prompt(input_ids, prompt_len=4)
    bp.expect({"len(labels)": 6}, labels=[2, 106, 1645, 9, 7, 1], prompt_len=lambda n: n > 3, hits=1)
    bp.expect_after(labels=[-100] * 4 + [7, 1])
    bp.expect_return({"(result != -100).sum()": 2}, result=[-100] * 4 + [7, 1])

def test_a_difference_is_reported_with_its_place():
    bp = stopped_at_mask()
    try: bp.expect(labels=[2, 106, 1645, 9, 8, 1])
    except AssertionError as e: print(str(e).splitlines()[0])
    with expect_fail(AssertionError, contains="labels[4] is 7, expected 8"):
        bp.expect(labels=[2, 106, 1645, 9, 8, 1])
    with expect_fail(AssertionError, contains="labels after the line[0] is -100, expected 2"):
        bp.expect_after(labels=[2, 106, 1645, 9, 7, 1])
    with expect_fail(AssertionError, contains="returned result[4] is 7, expected 8"):
        bp.expect_return(result=[-100] * 4 + [8, 1])
    with expect_fail(AssertionError, contains="number of hits is 1, expected 2"):
        bp.expect(hits=2)
    with expect_fail(AssertionError, contains="prompt_len is 4, which is not as expected"):
        bp.expect(prompt_len=lambda n: n > 4)
    with expect_fail(LookupError, contains="no 'label' here; there are 'labels', 'prompt_len'"):
        bp.expect(label=1)
    with expect_fail(LookupError, contains="no hit 3"): bp.expect(labels=1, hit=3)

def test_a_change_shows_both_outcomes():
    with Breakpoint(mask_prompt, at="labels[:prompt_len] =", set={"prompt_len": 3}) as bp:
        changed = mask_prompt(input_ids, prompt_len=4)
    test_eq(changed.tolist(), [-100] * 3 + [9, 7, 1])
    bp.expect_changed({"(result != -100).sum()": (2, 3), "result[3]": (-100, 9)})

def test_a_change_without_effect_is_an_error():
    with Breakpoint(mask_prompt, at="labels[:prompt_len] =", set={"prompt_len": 4}) as bp:
        mask_prompt(input_ids, prompt_len=4)
    with expect_fail(AssertionError, contains="result is the same with the change"):
        bp.expect_changed(result=([-100] * 4 + [7, 1], 0))
    assert "the same with this change" in repr(bp) and "is the same" in bp._repr_html_()
    with Breakpoint(mask_prompt, at="labels[:prompt_len] =") as bp:
        mask_prompt(input_ids, 4)
    with expect_fail(LookupError, contains="give set="):
        bp.expect_changed(result=(1, 2))

def test_two_stops_are_compared():
    diff = found[0].diff(found[1], titles=("3 1 4", "3 2 4"))
    print(diff)
    diff.expect({"xs[1]": (1, 2), "total": (8, 9)})

def test_a_wrong_expectation_of_a_diff_fails():
    diff = found[0].diff(found[1])
    with expect_fail(AssertionError, contains="row is not a first difference; there is xs[1], total"):
        diff.expect(row=(1, 2))
    with expect_fail(AssertionError, contains="total is (8, 9), expected (8, 8)"):
        diff.expect(total=(8, 8))
    assert "equal: row" in repr(diff) and "no difference" in repr(found[0].diff(found[0]))

def test_nothing_to_compare_is_an_error():
    with Breakpoint(pack, at="total += x", when="x > 100") as never: pack([3, 1])
    with expect_fail(LookupError, contains="`when` did not hold"): never.expect()
    never.expect(hits=0)
    with Breakpoint(pack, at="total += x", watch="x nothing") as bp: pack([3, 1])
    bp.expect()
    with expect_fail(LookupError, contains="'nothing' has no value at either stop"):
        bp.diff(bp)

def test_a_wrong_number_of_hits_names_no_hit():
    with Breakpoint(pack, at="total += x", watch="x total") as bp: pack([3, 1, 4])
    place = f"pack at {bp.where}"
    for wrong in (lambda: bp.expect_each(total=[0, 3]), lambda: bp.expect(hits=2)):
        with expect_fail(AssertionError, contains=f"{place}: number of hits is 3, expected 2"):
            wrong()
    with expect_fail(AssertionError, contains=f"{place}, hit 3 of 3: total is 4, expected 5"):
        bp.expect_each(total=[0, 3, 5])
