"Derived from nbs/00_core.ipynb by `make tests`; edit the notebook, not this file."
import difflib, numbers, sys, unicodedata
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any
from rich.console import Console
import numpy as np, torch
from fastcore.test import test_eq, expect_fail
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.core import ConfigError
from vlm_lit.core import DataError
from vlm_lit.core import IGNORE_INDEX
from vlm_lit.core import IMAGE_TOKEN_INDEX
from vlm_lit.core import describe
from vlm_lit.core import nearest
from vlm_lit.core import peek
from vlm_lit.core import printable
from vlm_lit.core import progress_console

def test_ignored_label_leaves_the_loss():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    with_mark = torch.nn.functional.cross_entropy(logits, torch.tensor([0, IGNORE_INDEX, 2]))
    without = torch.nn.functional.cross_entropy(logits[[0, 2]], torch.tensor([0, 2]))
    print(f"{with_mark:.4f} {without:.4f}")
    assert with_mark == without

def test_at_fills_in_the_record_and_keeps_the_turn():
    error = DataError("the answer is empty", turn=3)
    watch = "self.record self.turn record turn str(self)"
    with Breakpoint(DataError.at, at="if self.record is None", watch=watch.split()) as bp:
        error.at(record="000123", turn=99)
    bp.expect({"self.record": None, "self.turn": 3, "str(self)": "turn 3: the answer is empty"})
    bp.expect_after({"self.record": "000123"})
    bp.expect_return({"str(result)": "record '000123', turn 3: the answer is empty"})

def test_a_turn_that_is_overwritten_names_another():
    with Breakpoint(
        DataError.at,
        at="if self.turn is None",
        watch="self.turn turn",
        set={"self": lambda e: DataError(e.message, e.record, None)},
    ) as bp:
        DataError("the answer is empty", turn=3).at(record="000123", turn=99)
    bp.expect_changed({"result.turn": (3, 99)})

def test_data_error_without_a_place_is_just_its_message():
    test_eq(str(DataError("no records in data.json")), "no records in data.json")
    test_eq(str(DataError("bad", record=0)), "record 0: bad")

def test_peek_takes_scalars_and_empty_tensors():
    test_eq(describe(torch.tensor(3)), ("()", "int64", "cpu", "3"))
    test_eq(describe(torch.zeros(0, 5)), ("(0, 5)", "float32", "cpu", ""))
    test_eq(len(describe("x" * 1000)[3]), 160)
    peek()

def test_negative_ids_cannot_be_embedded():
    with expect_fail(IndexError):
        torch.nn.Embedding(16, 4)(torch.tensor([3, IMAGE_TOKEN_INDEX]))
    assert IGNORE_INDEX != IMAGE_TOKEN_INDEX and max(IGNORE_INDEX, IMAGE_TOKEN_INDEX) < 0

def test_errors_of_users_are_value_errors():
    error = DataError("the answer is empty", turn=3)
    test_eq(str(error.at(record="000123", turn=99)), "record '000123', turn 3: the answer is empty")
    assert isinstance(error, ValueError) and isinstance(ConfigError("x"), ValueError)

def test_nearest_finds_the_misspelled_name():
    assert nearest("smoll", ["tiny", "smol"]) == "smol"
    assert nearest("xyz", ["tiny"]) is None
    assert nearest("x", []) is None

def test_printable_spells_out_what_a_terminal_obeys():
    import unicodedata

    obeyed = {chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) in ("Cc", "Cf", "Cs")}
    obeyed |= {"\u2028", "\u2029"}
    obeyed -= set("\u200c\u200d")
    assert len(obeyed) > 2200 and {"\x1b", "\x07", "\x9b", "\u202e", "\u2066", "\ud800"} < obeyed
    for c in obeyed:
        assert printable(f"a{c}b").isascii() and printable(f"a{c}b", keep=c) == f"a{c}b"
    kept = "a b\u3000\u00a0é猫 \u0645\u06cc\u200c\u062e 👩\u200d🔬"
    test_eq(printable(kept), kept)
    test_eq(printable("\x1b[2J\u202e\n\t", keep="\n"), "\\x1b[2J\\u202e\n\\t")

def test_peek_shows_shape_dtype_and_six_values():
    test_eq(
        describe(torch.tensor([2, 106, 1645, 108, IMAGE_TOKEN_INDEX, 108, 1841])),
        ("(7,)", "int64", "cpu", "2 106 1645 108 -200 108 …"),
    )
    test_eq(describe(np.array([[1.5, 2.0]])), ("(1, 2)", "float64", "cpu", "1.5 2"))
    test_eq(describe("cat"), ("(3)", "str", "", "'cat'"))

def test_progress_moves_only_in_a_terminal():
    # neither a notebook nor a test is one
    assert progress_console().stderr and not progress_console().is_terminal
