"""Chromium for the tests of pages: where it is, how it is installed, and the tests themselves.

    python tools/chromium.py              run tests/browser, a line of totals at the end
    python tools/chromium.py --install    install Chromium where there is none and apt may be used

Words after the first are passed on to pytest: `python tools/chromium.py -k search`.
"""

import os, shutil, subprocess, sys
from collections import Counter

import pytest

import build

NAMES = "chromium chromium-browser google-chrome google-chrome-stable chrome".split()
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
ADVICE = """no Chromium or Chrome on the PATH, and pages are tested in one. Install it:
    Debian, Ubuntu   sudo apt-get install chromium
    Fedora           sudo dnf install chromium
    macOS            brew install --cask chromium
or name it: CHROMIUM=/path/to/chrome make test-browser"""

def find_chromium():
    "Path of Chromium or Chrome, that of the variable CHROMIUM first; None where there is none."
    return next(filter(None, map(shutil.which, [os.environ.get("CHROMIUM", ""), *NAMES])), None)

def install():
    "Install Chromium by apt, where there is none and we are root."
    if find_chromium(): return
    if not shutil.which("apt-get") or os.geteuid(): raise SystemExit(ADVICE)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "--quiet", "--quiet"]
    subprocess.run([*apt, "update"], env=env, check=True)
    options = ["--yes", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0"]
    # a font of its own, so that pages are measured with letters
    packages = ["chromium", "fonts-dejavu-core"]
    subprocess.run(
        [*apt, "install", *options, *packages], env=env, check=True, stdout=subprocess.DEVNULL
    )
    if not find_chromium(): raise SystemExit(ADVICE)

class Totals:
    "A pytest plugin: counts tests by outcome."

    def __init__(self): self.outcomes = {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid
        if report.failed: self.outcomes[name] = "failed"
        elif report.skipped: self.outcomes[name] = "skipped"
        elif report.when == "call": self.outcomes.setdefault(name, "passed")

    def pytest_collectreport(self, report):
        if report.failed: self.outcomes[report.nodeid] = "failed"

def main():
    if "--install" in sys.argv: return install()
    if not find_chromium(): raise SystemExit(ADVICE)
    if not (build.ROOT / "_docs/html/index.html").is_file():
        raise SystemExit("no site to look at: run `make docs`")
    totals = Totals()
    code = pytest.main([str(build.TESTS / "browser"), *sys.argv[1:]], plugins=[totals])
    counts = Counter(totals.outcomes.values())
    print("totals: " + ", ".join(f"{counts[o]} {o}" for o in ("passed", "failed", "skipped")))
    sys.exit(int(code))

if __name__ == "__main__": main()
