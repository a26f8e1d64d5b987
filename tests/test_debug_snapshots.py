"Derived from nbs/92_snapshots.ipynb by `make tests`; edit the notebook, not this file."
import ast, bdb, collections, contextlib, copy, ctypes, dataclasses, inspect, random, sys, types
from typing import Any
from vlm_lit.core import ConfigError
from vlm_lit.debug.lines import Stop
import sys
import torch
import numpy as np
from PIL import Image
from collections import namedtuple
from dataclasses import dataclass
from fastcore.test import expect_fail, test_eq
from vlm_lit.core import IGNORE_INDEX
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.debug.lines import find_stop
from small_parts import mask_prompt, pack
from vlm_lit.debug.snapshots import LineStop
from vlm_lit.debug.snapshots import check_expression
from vlm_lit.debug.snapshots import copy_leaf
from vlm_lit.debug.snapshots import evaluate
from vlm_lit.debug.snapshots import same_randomness
from vlm_lit.debug.snapshots import set_local
from vlm_lit.debug.snapshots import snapshot

def setup_module():

    sys.path[:0] = ["../tests", "tests"]

def test_copy_leaf_copies_what_holds_numbers():
    tensor = torch.tensor([1.0, 2.0], requires_grad=True)
    array = np.array([1, 2])
    image = Image.new("RGB", (3, 2))
    copied = [copy_leaf(v) for v in (tensor, array, image)]
    with torch.no_grad(): tensor += 10
    array += 10
    image.putpixel((0, 0), (9, 9, 9))
    print(copied[0], copied[1], copied[2].getpixel((0, 0)))
    test_eq(
        [copied[0].tolist(), copied[1].tolist(), copied[2].getpixel((0, 0))],
        [[1, 2], [1, 2], (0, 0, 0)],
    )
    model, batches = torch.nn.Linear(2, 2), iter([1, 2])
    assert copy_leaf(model) is model and not copied[0].requires_grad
    print(copy_leaf(batches), next(batches))
    test_eq(repr(copy_leaf(batches)), "<list_iterator, not copied>")

def test_snapshot_shows_a_mutable_object_at_that_moment():
    @dataclass
    class Talk:
        system: str
        messages: list

    talk = Talk("Be brief.", [["user", torch.tensor([5, 6])]])
    before = snapshot(talk)
    talk.messages.append(["model", torch.tensor([7])])
    talk.messages[0][1][:] = 0
    print(before)
    test_eq(len(before.messages), 1)
    test_eq(before.messages[0][1].tolist(), [5, 6])

def test_neither_copy_nor_deepcopy_would_do():
    talk = types.SimpleNamespace(messages=[])
    shallow = copy.copy(talk)
    talk.messages.append("hello")
    print(shallow.messages)
    test_eq(shallow.messages, ["hello"])
    hidden_states = torch.nn.Linear(2, 2)(torch.ones(1, 2))
    with expect_fail(RuntimeError): copy.deepcopy(hidden_states)
    test_eq(snapshot(hidden_states).shape, (1, 2))

def test_evaluate_copies_what_an_expression_names():
    variables = {"messages": ["hello", "you"], "n": 1}
    with Breakpoint(evaluate, at="return snapshot", watch="expression names copies") as bp:
        evaluate("messages.pop()", variables)
    bp.expect(names={"messages"}, copies={"messages": ["hello", "you"]})
    bp.expect_return({"result": "you", "len(result)": 3})

def test_set_local_changes_the_run():
    stop = LineStop(find_stop(pack, "total += x"), lambda frame: set_local(frame, "x", 10))
    stop.start()
    try: changed = pack([3, 4])["mean"]
    finally: stop.stop()
    print("mean of 3 and 4:", pack([3, 4])["mean"], " with x set to 10:", changed)
    test_eq((pack([3, 4])["mean"], changed), (3.5, 10))

def test_runcall_forgets_the_previous_tracer():
    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: None)
    try:
        bdb.Bdb().runcall(pack, [3, 4])
        after = sys.gettrace()
    finally: sys.settrace(before)
    print("after runcall:", after)
    assert after is None

def test_snapshot_keeps_aliases_cycles_and_types():
    a = [1]
    both_names = snapshot({"x": a, "y": a})
    assert both_names["x"] is both_names["y"] and both_names["x"] is not a
    t = torch.ones(2)
    made = snapshot({"x": t, "y": [t]})
    assert made["x"] is made["y"][0] and made["x"] is not t
    loop = []
    loop.append(loop)
    made = snapshot(loop)
    assert made[0] is made and made is not loop
    knot = ([],)
    knot[0].append(knot)
    made = snapshot(knot)
    assert made[0][0][0] is made[0] and made is not knot
    Pair = namedtuple("Pair", "ids mask")
    pair = snapshot(Pair(torch.tensor([1]), None))
    assert type(pair) is Pair and pair.ids.tolist() == [1]
    top = torch.tensor([3.0, 9.0]).max(dim=0)
    kept = snapshot(top)
    top.values.zero_()
    assert type(kept) is type(top) and kept.values == 9
    dd = collections.defaultdict(list, a=[1])
    made = snapshot(dd)
    dd["a"].append(2)
    assert made == {"a": [1]} and made["new"] == []
    dq = collections.deque([[1], [2]], maxlen=2)
    made = snapshot(dq)
    dq[0].append(9)
    assert list(made) == [[1], [2]] and made.maxlen == 2
    space = types.SimpleNamespace(ids=[1])
    made = snapshot(space)
    space.ids.append(2)
    assert made.ids == [1]
    assert snapshot({1, 2}) == {1, 2}
    assert snapshot(frozenset("ab")) == frozenset("ab")
    assert snapshot(torch.Size([1])) == torch.Size([1])

    @dataclass(frozen=True, slots=True)
    class Slotted: ids: list

    s = Slotted([1])
    made = snapshot(s)
    s.ids.append(2)
    assert made.ids == [1]

    @dataclass
    class Fussy:
        def __new__(cls, x): return object.__new__(cls)

        x: int

    fussy = Fussy(1)
    assert snapshot(fussy) is fussy

    class Touchy:
        def __getattr__(self, name): raise RuntimeError("was asked for " + name)

    touchy = Touchy()
    assert snapshot(touchy) is touchy

    class BadArray:
        dtype = "x"

        def copy(self): raise MemoryError("no room")

    test_eq(repr(snapshot([BadArray()])), "[<MemoryError: no room>]")
    generators = [random.Random(1), np.random.default_rng(1), np.random.RandomState(1)]
    for rng in [*generators, torch.Generator().manual_seed(1)]:
        assert snapshot(rng) is not rng and type(snapshot(rng)) is type(rng)

def test_linestop_tells_of_an_exception():
    def fails(n):
        half = n / 0
        return half

    raised = []
    stop = LineStop(find_stop(fails, "half ="), lambda frame: lambda *event: raised.append(event))
    stop.start()
    try:
        with expect_fail(ZeroDivisionError): fails(1)
    finally: stop.stop()
    test_eq([(event, type(value)) for event, _, value in raised], [("raise", ZeroDivisionError)])

def test_same_randomness_gives_the_next_number_back():
    def next_numbers():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seeded():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    seeded()
    undisturbed = next_numbers()
    seeded()
    next_numbers()
    disturbed = next_numbers()
    seeded()
    with same_randomness(): next_numbers()
    protected = next_numbers()
    print(
        f"torch's next number: {undisturbed[2]:.3f} undisturbed, {disturbed[2]:.3f} after a look, "
    f"{protected[2]:.3f} after a protected look"
    )
    assert protected == undisturbed != disturbed

def test_linestop_shares_the_run_with_another_tracer():
    def watched(xs, at, totals):
        stop = LineStop(find_stop(pack, at), lambda frame: totals.append(frame.f_locals["total"]))
        stop.start()
        try: return pack(xs)
        finally: stop.stop()

    events, seen = [], []

    def other_tool(frame, event, arg):
        if frame.f_code is pack.__code__: events.append((event, frame.f_lineno))
        return other_tool

    before = sys.gettrace()
    sys.settrace(other_tool)
    try:
        pack([3, 4, 5])
        alone = events.copy()
        events.clear()
        watched([3, 4, 5], "total += x", seen)
        still_there = sys.gettrace()
    finally: sys.settrace(before)
    once = []
    watched([3, 4, 5], "row = dict(", once)
    print(seen, once, len(events))
    test_eq(seen, [0, 3, 7])
    test_eq(once, [0])
    test_eq(events, alone)
    assert still_there is other_tool

def test_evaluate_works_on_copies():
    variables = {"messages": ["hello", "you"], "n": 1}
    print(
        evaluate("messages.pop()", variables),
        evaluate("(n := 5) + n", variables),
        evaluate("[m for m in messages if len(m) > n]", variables),
    )
    test_eq(variables, {"messages": ["hello", "you"], "n": 1})
    test_eq(evaluate("[m for m in messages if len(m) > n]", variables), ["hello", "you"])
    with expect_fail(ConfigError, contains="'x =' is not a Python expression"):
        check_expression("x =")

def test_bdb_shares_its_breakpoints():
    one = bdb.Bdb()
    one.set_break(bdb.__file__, 1)
    print("found by another debugger:", len(bdb.Bdb().breaks))
    test_eq(len(bdb.Bdb().breaks), 1)
    one.clear_all_breaks()
    test_eq(len(bdb.Bdb().breaks), 0)

def test_linestop_tells_when_the_statement_is_over():
    events = []

    def follow(event, frame, value):
        events.append((event, frame.f_locals["total"], value and value["size"]))

    stop = LineStop(find_stop(pack, "total += x"), lambda frame: follow)
    stop.start()
    try: pack([3, 4])
    finally: stop.stop()
    print(*events, sep="\n")
    test_eq(events[0], ("line", 3, None))
    test_eq(events[-1], ("return", 7, 2))
