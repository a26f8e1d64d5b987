"Derived from nbs/91_stop_lines.ipynb by `make tests`; edit the notebook, not this file."
import ast, dis, functools, inspect, itertools, re, types
from typing import NamedTuple
from vlm_lit.core import ConfigError
import sys, torch
from fastcore.test import expect_fail, test_eq
from vlm_lit.core import IGNORE_INDEX
from vlm_lit.debug.breakpoints import Breakpoint
from small_parts import mask_prompt, pack
from vlm_lit.debug.lines import find_line
from vlm_lit.debug.lines import find_stop
from vlm_lit.debug.lines import name_of
from vlm_lit.debug.lines import plain_function
from vlm_lit.debug.lines import source_lines
from vlm_lit.debug.lines import span
from vlm_lit.debug.lines import starts
from vlm_lit.debug.lines import statement_at
from vlm_lit.debug.lines import statements

def setup_module():
    global line_events
    sys.path[:0] = ["../tests", "tests"]
    def line_events(func, *args):
        "Numbers of the lines, counted from `def`, that Python announces while `func` runs."
        seen, first = [], func.__code__.co_firstlineno

        def trace(frame, event, arg):
            if event == "line": seen.append(frame.f_lineno - first)
            return trace if frame.f_code is func.__code__ else None

        before = sys.gettrace()
        sys.settrace(trace)
        try: func(*args)
        finally: sys.settrace(before)
        return seen

def test_plain_function_peels_methods_decorators_and_partials():
    class Counter:
        def step(self): return 1

        @property
        def size(self): return 2

        @staticmethod
        def zero(): return 0

    cached = functools.lru_cache(mask_prompt)

    partial = functools.partial(mask_prompt, prompt_len=1)
    for func in [Counter.step, Counter().step, Counter.size, Counter.__dict__["zero"], cached, partial]:
        print(name_of(plain_function(func)))
    assert plain_function(Counter().step) is Counter.step
    partial = functools.partial(cached, prompt_len=1)
    assert plain_function(cached) is plain_function(partial) is mask_prompt

def test_plain_function_refuses_what_has_no_lines():
    refused = [
        (len, "cannot stop in len:"),
        (dict, "the class dict"),
        (torch.nn.Linear(2, 2), "a Linear object"),
        (torch.compile(mask_prompt), "mask_prompt is compiled"),
        (torch.compile(torch.nn.Linear(2, 2)), "OptimizedModule is compiled"),
    ]
    for func, words in refused:
        try: plain_function(func)
        except ConfigError as e: print(str(e).split(":")[0][:60])
        with expect_fail(ConfigError, contains=words): plain_function(func)

def test_find_line_wants_exactly_one():
    lines = source_lines(mask_prompt)
    first = min(lines)
    test_eq(find_line(lines, "labels = "), first + 2)
    for at in ["labels", "targets"]:
        try: find_line(lines, at)
        except ConfigError as e: print(e)

def test_line_events_come_back_to_a_statement():
    print(line_events(pack, [3, 4]))
    test_eq(line_events(pack, [3, 4]), [1, 2, 3, 4, 2, 5, 6, 5, 6, 5, 7, 8, 10, 11])

def test_statement_at_finds_the_statement_of_a_line():
    lines = source_lines(pack)
    first = min(lines)
    for n in lines:
        node = statement_at(statements(lines), n)
        print(f"{n - first:3} {type(node).__name__:8} {lines[n]}")
    test_eq(type(statement_at(statements(lines), first + 3)).__name__, "Assign")

def test_starts_counts_the_beginnings_of_each_statement():
    lines = source_lines(pack)
    counts = {
        lines[span(node)[0][0]].strip(): len(starts(pack.__code__, node)) for node in statements(lines)
    }
    for line, count in counts.items(): print(count, line)
    test_eq(counts["row = dict("], 1)
    test_eq(counts["for x in xs:"], 2)
    test_eq(counts['row["done"] = True'], 2)

def test_a_text_inside_a_statement_stops_at_its_first_line():
    with Breakpoint(find_stop, at="if offsets := starts", watch="at type(node).__name__") as bp:
        find_stop(pack, "size=len")
    bp.expect({"type(node).__name__": "Assign", "line - min(lines)": 3})
    bp.expect_return({"result.last - result.line": 2})

def test_plain_function_follows_what_dynamo_leaves_alone():
    assert plain_function(torch.no_grad()(mask_prompt)) is mask_prompt
    assert plain_function(torch._dynamo.disable(mask_prompt)) is mask_prompt

def test_find_line_refuses_an_empty_text():
    lines = source_lines(mask_prompt)
    for at in ["", "  ", None, 3]:
        with expect_fail(ConfigError, contains="names no line"):
            find_line(lines, at)
    unreadable = {}
    exec("def f(x): return x", unreadable)
    with expect_fail(ConfigError, contains="cannot be read"):
        source_lines(unreadable["f"])

def test_find_line_takes_text_that_spans_lines():
    twice = {10: "if a:", 11: "    x = 1", 12: "else:", 13: "    x = 1"}
    with expect_fail(ConfigError, contains="is in 2 lines"):
        find_line(twice, "x = 1")
    test_eq(find_line(twice, "else:\n    x = 1"), 13)

def test_find_stop_goes_to_the_first_line_of_the_statement():
    first = min(source_lines(pack))
    for at in ["total = 0", "size=len", "for x in", "total += x", "mean", "return"]:
        stop = find_stop(pack, at)
        print(f"{at!r:14} line {stop.line - first} to {stop.last - first}")
    test_eq([find_stop(pack, at).line - first for at in ["size=len", "last=", "row = dict"]], [2, 2, 2])
    for at in ["def pack", "finally:"]:
        with expect_fail(ConfigError, contains="nothing runs"): find_stop(pack, at)
    with expect_fail(ConfigError, contains="nothing runs"):
        find_stop(mask_prompt, "Labels for")

    # fmt: off
    def guarded(x):
        try: y = 1 / x
        except ZeroDivisionError: y = 0
        return y
    # fmt: on

    stop = find_stop(guarded, "try: y")
    test_eq((stop.line - guarded.__code__.co_firstlineno, len(stop.offsets) > 0), (1, True))
    with Breakpoint(guarded, at="1 / x", watch="x") as bp: test_eq(guarded(0), 0)
    bp.expect(x=0, hits=1)

def test_find_line_refuses_several_and_none():
    lines = source_lines(mask_prompt)
    with expect_fail(ConfigError, contains="is in 3 lines"):
        find_line(lines, "labels")
    with expect_fail(ConfigError, contains="is in no line of"):
        find_line(lines, "targets")

def test_every_line_of_pack_has_its_statement():
    lines = source_lines(pack)
    kinds = [type(statement_at(statements(lines), n)).__name__ for n in lines]
    test_eq(
        kinds,
        "NoneType Assign Assign Assign Assign For AugAssign Try Assign NoneType Assign Return".split(),
    )
