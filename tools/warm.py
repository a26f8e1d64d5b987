"""Notebooks and tests in forks of one warm process, which has imported what takes long to import.

A fork begins with nothing but these imports, so that no notebook and no test file sees another's
variables, caches or changed settings. Used by `tools/check.py`.
"""

import builtins, dis, multiprocessing, os, sys, tempfile, time, traceback, types
from multiprocessing.connection import wait
import build

SLOW = 1.0  # processor seconds; a test that took more as a cell is not run once more
SKIPPED_CELLS = {"notest", "gpu"}  # nbdev's `tst_flags` in settings.ini
RELOADED = "ignore::pytest.PytestAssertRewriteWarning"  # of plugins imported before the fork

def import_heavy():
    "Import once what many notebooks and tests need; nothing of the project itself."
    import datasets, hypothesis, matplotlib.pyplot, peft, pytest, torch._dynamo  # noqa: F401
    import execnb.shell, fastcore.test, rich.progress, typer.testing  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoProcessor, CLIPModel  # noqa: F401
    from transformers import ConvNextModel, GemmaForCausalLM, GenerationMixin  # noqa: F401
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401
    from transformers import SiglipModel, Trainer  # noqa: F401

def in_forks(jobs, workers):
    "Run `(function, *arguments)`, each in a fork; yields job and result. Jobs may be added."
    context, running = multiprocessing.get_context("fork"), {}
    while jobs or running:
        while jobs and len(running) < workers:
            job = jobs.pop(0)
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=in_fork, args=(there, *job))
            process.start()
            there.close()
            running[here] = job, process
        for here in wait(list(running)):
            job, process = running.pop(here)
            try: result = here.recv()
            except EOFError: result = {"died": True}
            process.join()
            yield job, result

def in_fork(pipe, function, *args):
    "What a fork does: what is printed goes to a file, and the file's end into the result."
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        began = time.time()
        try: result = function(*args)
        except BaseException:
            result = {"died": True, "trouble": traceback.format_exc()}
        log.flush()
        log.seek(0)
        pipe.send({**result, "seconds": time.time() - began, "log": log.read()[-4000:]})

def spent():
    "Processor seconds of this process and of those it has waited for."
    return sum(os.times()[:4])

def is_run(cell):
    "Whether a notebook's test runs this cell, as nbdev_test has it."
    if cell.cell_type != "code" or "nbdev_export(" in cell.source: return False
    flags = build.directives(cell.source)
    return not SKIPPED_CELLS & set(flags) and not flags.get("eval", "").endswith("false")

def run_notebook(path):
    "Run a notebook from top to bottom; which tests passed, and in how many seconds."
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell

    os.environ["IN_TEST"] = "1"
    os.chdir(path.parent)
    notebook = read_nb(path)
    shell = CaptureShell(path)
    tests = {}
    for cell in filter(is_run, notebook.cells):
        name, began = build.directives(cell.source).get("test"), spent()
        shell.cell(cell)
        skipped = type(shell.exc).__name__ == "Skipped"  # pytest.skip
        if name: tests[name] = "skipped" if skipped else spent() - began
        if shell.exc and not skipped:
            tests.pop(name, None)
            return {"tests": tests, "failed": name, "trouble": shell.prettytb(fname=path)}
    return {"tests": tests, "failed": None, "trouble": ""}

class Selected:
    "A pytest plugin: slow tests are looked at instead of run, results are counted."

    def __init__(self, slow):
        self.slow = set(slow)
        self.results = {}
        self.trouble = []

    def pytest_collection_modifyitems(self, items):
        for item in items:
            if item.name not in self.slow: continue
            self.results[item.name] = "checked"
            if missing := unresolved(item.function):
                self.results[item.name] = "failed"
                self.trouble.append(f"{item.nodeid} uses {missing}, which its module does not have")
        items[:] = [item for item in items if item.name not in self.slow]

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed: return
        if self.results.get(report.nodeid) != "failed":
            self.results[report.nodeid] = report.outcome

    def pytest_collectreport(self, report):
        if report.failed: self.results[report.nodeid] = "failed"

def run_tests(path, slow=()):
    "Run a file of tests in this process, all but the slow ones, whose names are only resolved."
    import pytest

    os.chdir(build.ROOT)
    plugin = Selected(slow)
    quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", RELOADED]
    code = pytest.main([str(path), *quiet], [plugin])
    results = {name.split("::", 1)[-1]: outcome for name, outcome in plugin.results.items()}
    died = code not in (0, 1, 5) or code == 1 and "failed" not in results.values()
    return {"results": results, "died": died, "trouble": "\n".join(plugin.trouble)}

def unresolved(function):
    "Names that a test takes from its module and that neither the module nor its set-up binds."
    module = function.__globals__
    setup = module.get("setup_module")
    made = {step.argval for step in instructions(setup) if step.opname == "STORE_GLOBAL"}
    steps = list(instructions(function))
    used = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    own = {step.argval for step in steps if step.opname == "STORE_NAME"}
    return sorted(used - own - made - module.keys() - vars(builtins).keys() - {"__name__"})

def instructions(function):
    "Instructions of a function and of all that is defined inside."
    codes = [function.__code__] if function else []
    for code in codes:
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        yield from dis.get_instructions(code)
