"Derived from nbs/96_worker_stops.ipynb by `make tests`; edit the notebook, not this file."
import contextlib, os, shutil, sys, tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from vlm_lit.debug.snapshots import Note
import enum, io, os, time
import numpy as np, torch
from PIL import Image
from fastcore.test import expect_fail, test_eq
from vlm_lit.core import ConfigError
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.debug.workers import Mailbox
from vlm_lit.debug.workers import portable
from vlm_lit.debug.workers import received

def setup_module():
    global Squares
    class Squares(torch.utils.data.Dataset):
        "i -> i * i"

        def __len__(self): return 4

        def __getitem__(self, i):
            value = torch.tensor(i * i)
            return value

def test_values_arrive_as_they_were_or_as_text():
    values = {"ids": [1, (2, 3)], "x": torch.ones(2), "a": np.arange(3), "none": None}
    values |= {"image": Image.new("RGB", (2, 1), "red"), "note": Note("gone"), "f": Ellipsis}
    back = received(portable(values))
    print(*back.items(), sep="\n")
    test_eq((back["ids"], back["none"], back["x"].tolist()), ([1, (2, 3)], None, [1.0, 1.0]))
    test_eq((back["a"].tolist(), back["image"].tolist()), ([0, 1, 2], [[[255, 0, 0], [255, 0, 0]]]))
    test_eq((repr(back["note"]), repr(back["f"])), ("<gone>", "<Ellipsis>"))

def test_a_forked_process_sends_values():
    mailbox = Mailbox()
    child = os.fork()
    if child == 0:
        for number in (0, 1, 0):
            mailbox.send({"number": number, "elsewhere": mailbox.is_elsewhere}, number)
        for what in "aab": mailbox.count(what)
        os._exit(any(mailbox.collect()))  # what was sent is the owner's
    test_eq(os.waitpid(child, 0)[1], 0)
    print(oct(mailbox.folder.stat().st_mode & 0o777), mailbox.is_elsewhere)
    test_eq(mailbox.folder.stat().st_mode & 0o777, 0o700)
    for number in (10, 9, -1):
        mailbox.send({"number": number}, number)  # a later process
    sent, counts = mailbox.collect()
    own, theirs = [-1, 9, 10], [0, 1]
    found = [value["number"] for value in sent]
    test_eq(found, theirs + own if child < os.getpid() else own + theirs)
    test_eq(counts, {"a": 2, "b": 1})
    assert not mailbox.is_open and not mailbox.is_elsewhere
    mailbox.send({"number": 2}, 2)
    test_eq(mailbox.collect(), ([], {}))
    assert not list(mailbox.folder.parent.glob(f"{mailbox.folder.name}*"))

def test_stops_in_workers_are_sent_back():
    with Breakpoint(Squares.__getitem__, at="return value", watch="i value") as bp:
        loader = torch.utils.data.DataLoader(Squares(), batch_size=2, num_workers=2)
        loaded = torch.cat(list(loader)).tolist()
    test_eq(loaded, [0, 1, 4, 9])
    test_eq([hit.process for hit in bp.hits], ["worker 0"] * 2 + ["worker 1"] * 2)
    test_eq(bp.hits[0].outcome.value, 0)
    bp.expect_each(i=[0, 1, 2, 3], value=[0, 1, 4, 9])

def test_a_stop_ends_with_its_block_in_workers_too():
    class SlowSquares(Squares):
        "The first sample of a batch is made after the block."

        def __getitem__(self, i):
            while mailbox.is_open: time.sleep(0.01)
            value = torch.tensor(i * i)
            return value

    with Breakpoint(SlowSquares.__getitem__, at="return value", set={"value": 0}) as bp:
        mailbox = bp._mailbox
        batches = iter(torch.utils.data.DataLoader(SlowSquares(), batch_size=2, num_workers=2))
    test_eq(torch.cat(list(batches)).tolist(), [0, 1, 4, 9])
    test_eq((len(bp.hits), bp.outliving), (0, 2))
    assert not list(mailbox.folder.parent.glob(f"{mailbox.folder.name}*"))
    print(bp)
    with expect_fail(LookupError, contains="2 processes started in the block still ran"):
        bp.expect(value=0)

def test_hits_in_the_block_are_kept_and_workers_that_outlive_it_are_named():
    with Breakpoint(Squares.__getitem__, at="return value") as bp:
        batches = iter(torch.utils.data.DataLoader(Squares(), batch_size=2, num_workers=2))
        next(batches)
    text = "2 processes started in the block still ran at its end"
    assert len(bp.hits) >= 2 and text in repr(bp) and text in bp._repr_html_()
    del batches
    with Breakpoint(Squares.__getitem__, at="return value") as bp:
        next(iter(torch.utils.data.DataLoader(Squares(), batch_size=2, num_workers=2)))
    assert bp.hits and not bp.outliving and "still ran" not in repr(bp)

def test_what_happens_in_a_worker_is_known_at_the_end_of_the_block():
    def load():
        return torch.cat(list(torch.utils.data.DataLoader(Squares(), num_workers=2))).tolist()

    for when in ("i > 9", lambda found: found["i"] > 9):
        with Breakpoint(Squares.__getitem__, at="return value", when=when) as bp:
            load()
        test_eq((bp.calls, bp.refused, len(bp.hits)), (4, 4, 0))
        with expect_fail(LookupError, contains="the line was about to run 4 times, and `when` did"):
            bp.expect()
    with expect_fail(ConfigError, contains="raised ZeroDivisionError: division by zero, in worker 0"):
        with Breakpoint(Squares.__getitem__, at="return value", when="1 / i") as bp:
            load()
    test_eq((bp.calls, bp.refused, [hit["i"] for hit in bp.hits]), (4, 0, [2, 1, 3]))

    class Empty(Squares):
        def __getitem__(self, i):
            for n in range(0):
                i = n
            return torch.tensor(i)

    with Breakpoint(Empty.__getitem__, at="i = n") as bp:
        list(torch.utils.data.DataLoader(Empty(), num_workers=2))
    with expect_fail(LookupError, contains="the function was entered, but not this line"):
        bp.expect()
    with Breakpoint(Squares.__getitem__, at="return value", set={"value": torch.tensor(7)}) as bp:
        test_eq(load(), [7, 7, 7, 7])
    test_eq([(name, int(old), int(new)) for name, old, new in bp.settings], [("value", 0, 7)])
    assert "set value: int64 0 → int64 7" in repr(bp), repr(bp)

def test_workers_forked_before_the_block_are_named():
    batches = iter(torch.utils.data.DataLoader(Squares(), batch_size=2, num_workers=2))
    with Breakpoint(Squares.__getitem__, at="return value") as bp:
        test_eq(torch.cat(list(batches)).tolist(), [0, 1, 4, 9])
    with expect_fail(LookupError, contains="spawned, or forked before the block"):
        bp.expect()

def test_keys_of_dicts_arrive_as_they_were():
    class Color(enum.IntEnum):
        RED = 3

    class Thing:
        def __repr__(self): return "a thing"

    keys = [1, "1", None, False, 0.5, (2, "a", (None,)), np.int64(7), np.float32(0.25), Color.RED]
    values = {key: n for n, key in enumerate(keys)}
    saved = io.BytesIO()
    torch.save(portable(values), saved)
    saved.seek(0)
    back = received(torch.load(saved, weights_only=True))
    test_eq(back, values)
    test_eq({type(key) for key in back}, {int, str, type(None), bool, float, tuple})
    for text in ("__note__", "__items__"):
        test_eq(received(portable({text: 1})), {text: 1})
    things = received(portable({Thing(): 1, Thing(): 2, (Thing(), 1): 3}))
    test_eq([repr(key) for key in things], ["<a thing>", "<a thing again>", "<(a thing, 1)>"])
    test_eq(list(things.values()), [1, 2, 3])

def test_nothing_but_data_is_read_from_a_mailbox():
    class Rude:
        def __reduce__(self): return (os.mkdir, ("never",))

    mailbox = Mailbox()
    torch.save({"value": Rude()}, mailbox.folder / "1-000000.hit")
    with expect_fail(Exception, contains="weights_only"): mailbox.collect()
    assert not os.path.exists("never")
