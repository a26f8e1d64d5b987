"""The daily loop: all that belongs to one notebook, in under a minute for most of them.

    python tools/one.py 05_labels

Writes what all notebooks share, exports the package, runs the notebook and stores its outputs,
derives the tests, runs those of this notebook, and checks its layout and its module. A marked cell
that took longer than a second has been a test already; as a derived test, only its names are
resolved. What other notebooks make of a change is for `make test` to find.
"""

import argparse
import os
import sys
import threading
import time
from pathlib import Path

import book
import build
import check
import warm

TOOLS = Path(__file__).resolve().parent

def step(title, function, *args):
    "Run a step; its title, seconds and trouble are printed. Returns whether it went well."
    began = time.time()
    trouble = function(*args) or ""
    print(f"{'FAILED' if trouble else 'ok':7}{title}, {time.time() - began:.0f} s", flush=True)
    if trouble: print(trouble, flush=True)
    return not trouble

def rewrite(path):
    "Write the structure that all notebooks share."
    book.rewrite(path)

def run_notebook(path, seconds):
    "Run the notebook and store its outputs; seconds of its marked cells go into a dictionary."
    from nbclient.exceptions import CellExecutionError

    try: seconds.update(build.run([path.stem]))
    except CellExecutionError as e: return str(e)

def run_tests(path, slow):
    "Run a file of tests in a fork; what failed, or nothing."
    os.environ.update(check.ENV)
    ((_, result),) = warm.in_forks([(warm.run_tests, path, slow)], 1)
    if "failed" in check.test_outcomes(path, result).values():
        return f"{result.get('trouble', '')}\n{result.get('log', '')}"

def check_layout(path):
    "What `make format` would change in the notebook."
    code, text = check.sh(sys.executable, TOOLS / "format.py", "--check", path.stem)
    return f"{text}run `make format NB={path.stem}`" if code else ""

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="the notebook, by stem: 05_labels")
    name, began = Path(parser.parse_args().name).stem, time.time()
    found = build.notebooks([name])
    if not found:
        raise SystemExit(
            f"no notebook {name!r}; there are: " + ", ".join(p.stem for p in build.notebooks())
        )
    path, seconds = found[0], {}
    os.chdir(build.ROOT)
    step("opening line, links, checks at the end", rewrite, path)
    if not step("export", build.export): sys.exit(1)
    warming = threading.Thread(target=warm.import_heavy)  # while the kernel is busy
    warming.start()
    ran = step(f"{path.name}: top to bottom", run_notebook, path, seconds)
    warming.join()
    steps = [("derive tests", build.write_tests)]
    if derived := build.derive(path):
        slow = [f"test_{n}" for n, s in seconds.items() if s > warm.SLOW]
        title = f"{derived[0]}, {len(slow)} slow tests by name only"
        steps += [(title, run_tests, build.TESTS / derived[0], slow)]
    if name == "index": steps += [("README.md", build.write_readme)]
    steps += [("layout", check_layout, path), ("lint", check.check_lint)]
    ok = ran and all([step(*one) for one in steps])
    print(f"took {time.time() - began:.0f} s")
    sys.exit(not ok)

if __name__ == "__main__": main()
