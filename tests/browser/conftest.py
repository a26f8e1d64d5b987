"""Chromium and the site for tests of pages. `make test-browser` makes what they need; where it is
missing, a plain `pytest` leaves this folder out."""

import importlib.util, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from chromium import find_chromium

SITE = ROOT / "_docs/html"
has_all = importlib.util.find_spec("playwright") and find_chromium() and SITE.is_dir()
if not has_all: collect_ignore_glob = ["test_*.py"]

@pytest.fixture(scope="session")
def chromium():
    "The browser."
    from pages import browser

    with browser() as found: yield found

@pytest.fixture(scope="session")
def site():
    "Address of the site that `make docs` has built."
    from pages import served

    with served(SITE) as address: yield address

@pytest.fixture
def look(chromium):
    "Open a page: `look(path_or_address, width=390, scheme='dark')`."
    from contextlib import ExitStack
    from pages import open_page

    with ExitStack() as stack:
        yield lambda target, **how: stack.enter_context(open_page(chromium, target, **how))
