"Derived from nbs/01c_hub.ipynb by `make tests`; edit the notebook, not this file."
import sys, time
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
import tempfile
from types import SimpleNamespace
from unittest.mock import patch
import huggingface_hub.utils
from fastcore.test import test_eq
from huggingface_hub import constants
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.hub import hub_lookup
from vlm_lit.hub import hub_problem
from vlm_lit.hub import source_lookup

def setup_module():
    global NoRoute, read_inside, without_network
    class NoRoute:
        "A client without a network; counts its requests."

        asked = 0

        def head(self, address, timeout):
            NoRoute.asked += 1
            raise OSError("no route to host")
    def without_network():
        "The library, online, with that client."
        online = patch.object(constants, "HF_HUB_OFFLINE", False)
        return online, patch.object(huggingface_hub.utils, "get_session", NoRoute)
    def read_inside():
        "What a library reads inside the block."
        with hub_lookup(): return constants.HF_HUB_OFFLINE

def test_stop_inside_a_block_without_a_network():
    online, unreachable = without_network()
    with online, unreachable:
        with Breakpoint(hub_lookup, at="before = [", watch="why") as bp:
            inside = read_inside()
        after = constants.HF_HUB_OFFLINE
    print(f"offline inside: {inside}, after: {after}")
    assert inside and not after
    bp.expect(why=f"{constants.ENDPOINT} cannot be reached, OSError")

def test_the_hub_is_asked_once_a_minute():
    online, unreachable = without_network()
    with online, unreachable:
        for now, asked in [(0, 1), (59, 1), (61, 2), (62, 2)]:
            with patch("time.monotonic", lambda: 1e6 * 60 + now):
                assert hub_problem()
            if now == 0: first = NoRoute.asked - 1
            test_eq(NoRoute.asked - first, asked)
        before = NoRoute.asked
        with patch.object(constants, "HF_HUB_OFFLINE", True):
            test_eq(hub_problem(), "HF_HUB_OFFLINE is set")
        test_eq(NoRoute.asked, before)
        with source_lookup(tempfile.mkdtemp()) as why: test_eq(why, None)
        test_eq(NoRoute.asked, before)  # a folder is not looked up

def test_the_library_is_put_back_after_an_error_and_left_alone_online():
    online, unreachable = without_network()
    with online, unreachable:
        try:
            with hub_lookup(): raise KeyError
        except KeyError: pass
        assert not constants.HF_HUB_OFFLINE
    answers = lambda: SimpleNamespace(head=lambda address, timeout: None)
    with (
        online,
        patch.object(huggingface_hub.utils, "get_session", answers),
        patch("time.monotonic", lambda: 9e9),
        hub_lookup() as why,
    ):
        assert why is None and not constants.HF_HUB_OFFLINE
