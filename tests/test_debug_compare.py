"Derived from nbs/94_compare.ipynb by `make tests`; edit the notebook, not this file."
import dataclasses, math, os
from collections.abc import Mapping
from typing import Any, NamedTuple
from vlm_lit.debug.snapshots import Note, evaluate, failure, is_record, record_values
import torch
from dataclasses import dataclass
from fastcore.test import test_eq
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.debug.compare import Outcome
from vlm_lit.debug.compare import changed_parts
from vlm_lit.debug.compare import first_difference
from vlm_lit.debug.compare import outcome_of

def test_first_difference_says_where():
    print(first_difference(torch.tensor([2, 106, 9]), [2, 106, 1645]))
    print(first_difference({"labels": [[-100, 7]]}, {"labels": [[-100, 8]]}))
    test_eq(first_difference(torch.tensor([2, 106, 9]), [2, 106, 1645]), ("[2]", 9, 1645))
    test_eq(first_difference([1.0], [1.0 + 1e-6], tolerance=1e-5), None)

def test_texts_differ_from_a_character_on():
    a = "<start_of_turn>user\n<image>\nWhat is in the photo?"
    b = "<start_of_turn>user\n<image> What is in the photo?"
    print(first_difference(a, b))
    test_eq(first_difference(a, b), ("[27:]", a[27:], b[27:]))

def test_outcomes_differ_by_part():
    @dataclass
    class Sample:
        ids: list
        labels: list

    one, two = Outcome(Sample([1, 2], [-100, 2])), Outcome(Sample([1, 2], [-100, -100]))
    print(changed_parts(one, two), one["len(ids)"])
    test_eq(changed_parts(one, two), {"labels": ("[1]", 2, -100)})
    test_eq((one["ids"], one["len(ids)"], one["result"]), ([1, 2], 2, one.value))
    test_eq(repr(one["nothing"]), "<NameError: name 'nothing' is not defined>")
    fails = outcome_of(lambda: 1 / 0)
    test_eq(repr(fails["result"]), "<ZeroDivisionError: division by zero>")
    test_eq(list(changed_parts(Outcome(3), fails)), ["result"])
    test_eq(list(changed_parts(one, fails)), ["result"])
    test_eq(changed_parts(Outcome(3), Outcome(3)), {})
    keys = Outcome({1: "a", "1": "b", (2,): "c"}), Outcome({1: "a", "1": "x", (2,): "c"})
    test_eq(changed_parts(*keys), {"str 1": ("", "b", "x")})

def test_the_walk_is_stopped_at_the_difference():
    with Breakpoint(first_difference, at="return None if equal", watch="a b path") as bp:
        first_difference([[2, 106], [9]], [[2, 106], [7]])
    bp.expect_each(path=["[0][0]", "[0][1]", "[1][0]"], a=[2, 106, 9], b=[2, 106, 7])

def test_first_differences_at_their_edges():
    test_eq(first_difference(torch.tensor([2, 106, 9]), [2, 106, 1645]), ("[2]", 9, 1645))
    test_eq(first_difference({"a": [[1, 7]]}, {"a": [[1, 8]]}), ("['a'][0][1]", 7, 8))
    test_eq(first_difference((1, 2), [1, 2]), None)
    test_eq(first_difference([1, 2], [1, 2, 3]), (" (length)", 2, 3))
    test_eq(first_difference({"a": 1}, {"b": 1}), (".keys()", ["a"], ["b"]))
    test_eq(first_difference(1.0, 1.0 + 1e-6), ("", 1.0, 1.0 + 1e-6))
    test_eq(first_difference([1.0], [1.0 + 1e-6], tolerance=1e-5), None)
    test_eq(first_difference(float("nan"), torch.tensor(float("nan"))), None)
    test_eq(first_difference(torch.ones(2, 3), torch.ones(2, 3)), None)
    test_eq(first_difference("3", 3.0), ("", "3", 3.0))
