"""The test command's work: what is generated is fresh, notebooks are clean and run, tests pass. One line of totals at the end.

    python tools/check.py
"""
import os, re, subprocess, sys, tempfile, time
from pathlib import Path
import build

BIN = Path(sys.executable).parent
ENV = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}


def sh(*args, **kwargs):
    "Run a command of the environment; returns its exit code and what it printed."
    done = subprocess.run([str(a) for a in args], cwd=build.ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    return done.returncode, done.stdout

def changed(folder, pattern, make):
    "Names of files that differ after `make` has been run; the files are put back."
    before = {p: p.read_bytes() for p in folder.rglob(pattern)}
    make()
    after = {p: p.read_bytes() for p in folder.rglob(pattern)}
    for path in after.keys() - before.keys(): path.unlink()
    for path,data in before.items(): path.write_bytes(data)
    return sorted(str(p.relative_to(folder)) for p in before.keys() | after.keys() if before.get(p) != after.get(p))

def check_export():
    "vlm_lit/**/*.py is what the notebooks export."
    stale = changed(build.ROOT/"vlm_lit", "*.py", build.export)
    return f"stale, run `make notebooks`: {stale}" if stale else ""

def check_derived():
    "tests/test_*.py is what the notebooks' marked cells make."
    stale = build.stale_tests()
    return f"stale, run `make tests`: {stale}" if stale else ""

def check_readme():
    "README.md is nbs/index.ipynb."
    return "" if (build.ROOT/"README.md").read_text(encoding="utf-8") == build.readme() else "README.md is stale, run `make readme`"

def check_outputs():
    "Stored outputs hold no machine path, no error, and every notebook has outputs."
    bad = []
    for path in build.notebooks():
        outputs = build.stored_outputs(path)
        if not outputs: bad.append(f"{path.name}: no stored output")
        if any(o.get("output_type") == "error" for o in outputs): bad.append(f"{path.name}: a stored error")
        if found := re.search(r"/(home|root|Users|tmp|work|private|mnt)/[\w.]+", str(outputs)): bad.append(f"{path.name}: an output holds the path {found[0]}")
    return "\n".join(bad)

def check_clean():
    "nbdev_clean finds nothing to clean."
    import shutil
    with tempfile.TemporaryDirectory() as folder:
        for path in build.notebooks(): shutil.copy(path, folder)
        sh(BIN/"nbdev_clean", "--fname", folder)
        dirty = [p.name for p in build.notebooks() if p.read_bytes() != (Path(folder)/p.name).read_bytes()]
    return f"not clean, run `nbdev_clean`: {dirty}" if dirty else ""

CHECKS = [check_export, check_clean, check_outputs, check_derived, check_readme]

def count(output, word):
    "The number before a word in pytest's closing line."
    found = re.findall(rf"(\d+) {word}", output)
    return int(found[-1]) if found else 0

def main():
    began, passed, failed = time.time(), 0, 0
    for check in CHECKS:
        trouble = check()
        print(f"{'FAILED' if trouble else 'ok':7}{check.__doc__}" + (f"\n{trouble}" if trouble else ""), flush=True)
        passed, failed = passed + (not trouble), failed + bool(trouble)
    code, output = sh(BIN/"nbdev_test", "--n_workers", "2", "--do_print")
    ran = len(build.notebooks())
    broken = 0 if code == 0 else max(1, len(set(re.findall(r"(\w+\.ipynb)", output.split("Error in")[-1]))))
    print(f"{'FAILED' if code else 'ok':7}nbdev_test: every notebook runs from top to bottom" + (f"\n{output[-6000:]}" if code else ""), flush=True)
    passed, failed = passed + ran - broken, failed + broken
    code, output = sh(BIN/"pytest", "tests", "-n", "2", "--dist", "loadfile")
    print(output[-6000:] if code else output.strip().splitlines()[-1], flush=True)
    passed, failed, skipped = passed + count(output, "passed"), failed + count(output, "failed") + count(output, "error"), count(output, "skipped")
    if code and not failed: failed = 1
    print(f"took {time.time() - began:.0f} s")
    print(f"totals: {passed} passed, {failed} failed, {skipped} skipped")
    sys.exit(bool(failed))

if __name__ == "__main__": main()
