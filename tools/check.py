"""The test command's work: what is generated is fresh, notebooks are clean and run, tests pass.

    python tools/check.py
    python tools/check.py --all       slow tests as derived tests, too

One line of totals stands at the end. A test counts once: it has passed if its cell has, where the
notebook ran, and if the derived test has, where that ran.
"""

import argparse, os, re, subprocess, sys, tempfile, time
from collections import Counter
from pathlib import Path
import book, build, warm

BIN = Path(sys.executable).parent
ENV = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # no CUDA context before the forks
}

def sh(*args, **kwargs):
    "Run a command of the environment; returns its exit code and what it printed."
    done = subprocess.run(
        [str(a) for a in args],
        cwd=build.ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )
    return done.returncode, done.stdout

def changed(folder, pattern, make):
    "Names of files that differ after `make` has been run; the files are put back."
    before = {p: p.read_bytes() for p in folder.rglob(pattern)}
    make()
    after = {p: p.read_bytes() for p in folder.rglob(pattern)}
    for path in after.keys() - before.keys(): path.unlink()
    for path, data in before.items(): path.write_bytes(data)
    return sorted(
        str(p.relative_to(folder))
        for p in before.keys() | after.keys()
        if before.get(p) != after.get(p)
    )

def check_export():
    "vlm_lit/**/*.py is what the notebooks export."
    stale = changed(build.ROOT / "vlm_lit", "*.py", build.export)
    return f"stale, run `make notebooks`: {stale}" if stale else ""

def check_derived():
    "tests/test_*.py is what the notebooks' marked cells make."
    stale = build.stale_tests()
    return f"stale, run `make tests`: {stale}" if stale else ""

def check_readme():
    "README.md is nbs/index.ipynb."
    fresh = (build.ROOT / "README.md").read_text(encoding="utf-8") == build.readme()
    return "" if fresh else "README.md is stale, run `make readme`"

def check_outputs():
    "Stored outputs hold no machine path, no error, and every notebook has outputs."
    bad = []
    for path in build.notebooks():
        outputs = build.stored_outputs(path)
        if not outputs: bad.append(f"{path.name}: no stored output")
        if any(o.get("output_type") == "error" for o in outputs):
            bad.append(f"{path.name}: a stored error")
        if found := re.search(r"/(home|root|Users|tmp|work|private|mnt)/[\w.]+", str(outputs)):
            bad.append(f"{path.name}: an output holds the path {found[0]}")
    return "\n".join(bad)

def check_clean():
    "nbdev_clean finds nothing to clean."
    import shutil

    with tempfile.TemporaryDirectory() as folder:
        for path in build.notebooks(): shutil.copy(path, folder)
        sh(BIN / "nbdev_clean", "--fname", folder)
        dirty = [
            p.name
            for p in build.notebooks()
            if p.read_bytes() != (Path(folder) / p.name).read_bytes()
        ]
    return f"not clean, run `nbdev_clean`: {dirty}" if dirty else ""

def check_lint():
    "ruff finds no unused name, no undefined one and no broken syntax."
    code, text = sh(BIN / "ruff", "check", "--no-cache", "--quiet", ".")
    return text if code else ""

def check_types():
    "mypy agrees with the annotations of core, text and data."
    with tempfile.TemporaryDirectory() as folder:
        code, text = sh(BIN / "mypy", "--cache-dir", folder)
    return text if code else ""

WORDS = {  # words that have a better one in this field
    "picture": "image",
    "pictures": "images",
    "told": "shown, known",
    "beside": "next to, besides",
    "behind": "after",
    "anew": "again",
    "learned": "supervised",
    "learns": "is supervised",
    "blanks": "spaces",
    "colour": "color",
    "optimiser": "optimizer",
    "behaviour": "behavior",
    "normalise": "normalize",
    "normalisation": "normalization",
    "neighbour": "neighbor",
}

def check_words():
    "Code, docstrings and messages use the field's words."
    pattern, found = re.compile(rf"\b({'|'.join(WORDS)})\b"), []
    for path in sorted((build.ROOT / "vlm_lit").rglob("*.py")):
        if path.name == "_modidx.py": continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for word in pattern.findall(line):
                place = f"{path.relative_to(build.ROOT)}:{number}"
                found.append(f"{place}: {word!r}; better: {WORDS[word]}")
    return "\n".join(found)

def check_layout():
    "Code is laid out by tools/format.py: no line has over 100 columns."
    code, text = sh(sys.executable, build.ROOT / "tools/format.py", "--check")
    return f"run `python tools/format.py`:\n{text}" if code else ""

BOOK = ["current", "names", "stop", "tests", "length", "opening", "headings", "exercises", "cells"]
BOOK += ["figures", "width"]

def check_book():
    "Notebooks keep the rules of tools/book.py, and translations change nothing but prose."
    troubles = [f"{rule}: {line}" for rule in BOOK for line in book.broken(rule)]
    twins = book.compare_translations() + book.stale_twins()
    return "\n".join(troubles + twins + book.stale_stops())

def list_claims(shown=20):
    "Print numbers in Markdown that no cell of their section holds; that is no failure."
    lines = book.claim_lines()
    print(
        f"       claims: {len(lines)} numbers in Markdown are in no cell of their section",
        flush=True,
    )
    for line in lines[:shown]: print(f"       {line}")
    if lines[shown:]:
        print("       all: python tools/book.py --claims", flush=True)

CHECKS = [
    check_lint,
    check_types,
    check_layout,
    check_words,
    check_export,
    check_clean,
    check_outputs,
    check_derived,
    check_readme,
    check_book,
]

def run_all(workers, slow):
    """Every notebook from top to bottom, its marked cells being tests; then the same tests as they
    are derived, but for those that took longer than `slow` seconds; and the tests written by hand.
    Returns outcomes by name, and the tests that were too slow to be run twice."""
    derived = {nb: made[0] for nb in build.notebooks() if (made := build.derive(nb))}
    files = sorted(build.TESTS.glob("test_*.py"))
    jobs = [(warm.run_tests, path) for path in files if not build.is_derived(path)]
    jobs += [(warm.run_notebook, path) for path in reversed(build.notebooks())]
    outcomes, seconds = {}, {}
    for (function, path, *_), result in warm.in_forks(jobs, workers):
        if function is warm.run_notebook:
            found, name = notebook_outcomes(path, result), f"{path.name}: top to bottom"
            took = {n: s for n, s in result.get("tests", {}).items() if s != "skipped" and s > slow}
            seconds |= {f"{path.stem}: {n}": s for n, s in took.items()}
            if path in derived:
                names = [f"test_{n}" for n in took]
                jobs.insert(0, (warm.run_tests, build.TESTS / derived[path], names))
        else:
            found = test_outcomes(path, result)
            name = f"{path.name}: {len(result.get('results', []))} tests"
        ok = "failed" not in found.values()
        print(f"{'ok' if ok else 'FAILED':7}{name}, {result.get('seconds', 0):.0f} s", flush=True)
        if not ok:
            print(result.get("trouble", ""), result.get("log", ""), sep="\n", flush=True)
        outcomes |= {n: o for n, o in found.items() if outcomes.get(n) != "failed"}
    return outcomes, seconds

def notebook_outcomes(path, result):
    "`{name: outcome}` of a notebook and of the marked cells that were reached."
    ok = not result.get("died") and not result["trouble"]
    found = {path.name: "passed" if ok else "failed"}
    derived = build.derive(path)
    if not derived: return found
    reached = result.get("tests", {})
    tests = {n: "skipped" if s == "skipped" else "passed" for n, s in reached.items()}
    if result.get("failed"): tests[result["failed"]] = "failed"
    return found | {f"{derived[0]}::test_{n}": o for n, o in tests.items()}

def test_outcomes(path, result):
    "`{name: outcome}` of a file of tests; where names were resolved, the cell counts."
    results = result.get("results", {})
    found = {f"{path.name}::{n}": o for n, o in results.items() if o != "checked"}
    if result.get("died"): found[path.name] = "failed"
    return found

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="run slow tests in both forms, too")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    args = parser.parse_args()
    began, outcomes = time.time(), {}
    os.environ.update(ENV)
    for check in CHECKS:
        trouble = check()
        outcomes[check.__name__] = "failed" if trouble else "passed"
        print(f"{'FAILED' if trouble else 'ok':7}{check.__doc__}", flush=True)
        if trouble: print(trouble, flush=True)
    list_claims()
    print(f"       file checks: {time.time() - began:.0f} s", flush=True)
    warm.import_heavy()
    print(f"       imports: {time.time() - began:.0f} s", flush=True)
    found, seconds = run_all(args.workers, float("inf") if args.all else warm.SLOW)
    outcomes |= found
    slow = [f"{n} {seconds[n]:.0f} s" for n in sorted(seconds, key=seconds.get, reverse=True)]
    if slow:
        print(
            f"{len(slow)} tests took over {warm.SLOW:.0f} s as cells; as derived tests, only "
            f"their names are resolved (--all runs them). The slowest: {', '.join(slow[:10])}"
        )
    counts = Counter(outcomes.values())
    print(f"took {time.time() - began:.0f} s")
    print("totals: " + ", ".join(f"{counts[o]} {o}" for o in ("passed", "failed", "skipped")))
    sys.exit(bool(counts["failed"]))

if __name__ == "__main__": main()
