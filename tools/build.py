"""Everything that is made from the notebooks.

    python tools/build.py package            nbs/*.ipynb -> vlm_lit/*.py
    python tools/build.py run [NAME ...]     execute notebooks in place and clean them
    python tools/build.py tests              marked cells -> tests/test_<module>.py
    python tools/build.py readme             nbs/index.ipynb -> README.md
    python tools/build.py all                the four, in order

A notebook cell that begins `#| test some_name` becomes the pytest test `test_some_name`; one that
begins `#| test_setup` runs once before the tests of its module. `#| default_exp training.trainer`
makes `vlm_lit/training/trainer.py` and `tests/test_training_trainer.py`. What a test uses must come
from the module, its imports, or a set-up cell.
"""

import argparse, ast, json, os, re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, TESTS = ROOT / "nbs", ROOT / "tests"
EXPORTS = {"export", "exporti"}
SCOPES = ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
ORDER = [
    "[0-9]*.ipynb",
    "walkthrough.ipynb",
    "walkthrough_step.ipynb",
    "own_data.ipynb",
    "other_trainers.ipynb",
]
ORDER += ["alignment.ipynb", "measurements.ipynb", "index.ipynb"]

def notebooks(names=()):
    "Paths of the notebooks in reading order, or only those named."
    found = [p for pattern in ORDER for p in sorted(NBS.glob(pattern))]
    return [p for p in found if not names or p.stem in names]

def code_cells(path):
    "Sources of a notebook's code cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]

def stored_outputs(path):
    "All stored outputs of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [output for c in cells for output in c.get("outputs", [])]

def directives(source):
    "`{'test': 'some_name'}` for a cell that begins `#| test some_name`."
    lines = re.findall(r"^#\|\s*(\w+)[ \t]*(.*)$", source, re.M)
    return {key: rest.strip() for key, rest in lines}

def body(source):
    "The cell without its directives."
    return "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip("\n")

def indent(source):
    "The source as a function body; the inside of a multi-line string is left as it is."
    inside = {
        n
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno > node.lineno
        for n in range(node.lineno + 1, node.end_lineno + 1)
    }
    lines = source.splitlines()
    for n, line in enumerate(lines, 1):
        if n not in inside and line.strip(): lines[n - 1] = "    " + line
    return "\n".join(lines)

def bound_names(source):
    "Names that the source binds at its top level."
    found = set()

    def visit(node):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return found.add(node.name)
        if isinstance(node, SCOPES): return
        if isinstance(node, ast.alias):
            return found.add((node.asname or node.name).split(".")[0])
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        for child in ast.iter_child_nodes(node): visit(child)

    visit(ast.parse(source))
    return sorted(found)

def derive(path):
    "Name and text of the pytest module that a notebook's marked cells make; None when it has none."
    cells = code_cells(path)
    module = next(
        (directives(c)["default_exp"] for c in cells if "default_exp" in directives(c)), None
    )
    tests = [(directives(c)["test"], body(c)) for c in cells if "test" in directives(c)]
    if not tests: return None
    names = [name for name, _ in tests]
    bad = [n for n in names if not n.isidentifier() or names.count(n) > 1]
    if bad:
        raise SystemExit(
            f"{path.name}: not a name, or used twice, after '#| test': {sorted(set(bad))}"
        )
    imports = [
        ast.unparse(node)
        for c in cells
        if EXPORTS & set(directives(c)) or "test_setup" in directives(c)
        for node in ast.parse(body(c)).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    exported = [body(c) for c in cells if EXPORTS & set(directives(c))]
    own = {n for source in exported for n in bound_names(source)}
    own -= {n for line in imports for n in bound_names(line)}
    used = {
        node.id
        for c in cells
        if {"test", "test_setup"} & set(directives(c))
        for node in ast.walk(ast.parse(body(c)))
        if isinstance(node, ast.Name)
    }
    imports += [f"from vlm_lit.{module} import {name}" for name in sorted(own & used)]
    out = [
        f'"Derived from nbs/{path.name} by `make tests`; edit the notebook, not this file."',
        *dict.fromkeys(imports),
        "",
    ]
    parts = []
    for source in [body(c) for c in cells if "test_setup" in directives(c)]:
        nodes = ast.parse(source).body
        nodes = [node for node in nodes if not isinstance(node, (ast.Import, ast.ImportFrom))]
        parts += [ast.get_source_segment(source, node) for node in nodes]
    setup = "\n".join(parts)
    if setup:
        out += [
            "def setup_module():",
            f"    global {', '.join(bound_names(setup))}" if bound_names(setup) else "",
            indent(setup),
            "",
        ]
    for name, source in tests:
        out += ["", f"def test_{name}():", indent(source)]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(out)) + "\n"
    return f"test_{(module or path.stem).replace('.', '_')}.py", text

def derived():
    "All derived test modules: `{file name: text}`."
    return dict(d for d in map(derive, notebooks()) if d)

def is_derived(path):
    "Whether a file of tests/ was made by this script."
    return path.read_text(encoding="utf-8").startswith('"Derived from nbs/')

def stale_tests():
    "Names of derived test files that are missing, changed or left over."
    want = derived()
    have = {p.name: p.read_text(encoding="utf-8") for p in TESTS.glob("test_*.py") if is_derived(p)}
    return sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))

def write_tests():
    "Write tests/ anew from the notebooks."
    for p in TESTS.glob("test_*.py"):
        if is_derived(p): p.unlink()
    for name, text in derived().items():
        (TESTS / name).write_text(text, encoding="utf-8")

def readme():
    """nbs/index.ipynb as Markdown: hidden cells and what stands on standard error left out, links
    to notebooks made relative to the root."""
    import nbformat
    from nbconvert import MarkdownExporter

    nb = nbformat.read(NBS / "index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| hide")]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    text = MarkdownExporter().from_notebook_node(nb)[0]
    return re.sub(r"\]\((\w+\.ipynb)\)", r"](nbs/\1)", text).replace("](../", "](").strip() + "\n"

def write_readme():
    "Write README.md anew from nbs/index.ipynb."
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")

def export():
    "nbs/*.ipynb -> vlm_lit/*.py, by nbdev."
    subprocess.run([Path(sys.executable).with_name("nbdev_export")], check=True)

def run(names):
    "Execute notebooks in place, top to bottom, and clean what is stored; seconds of marked cells."
    from datetime import datetime
    import nbformat
    from nbclient import NotebookClient
    from nbdev.clean import nbdev_clean

    os.environ.pop("MPLBACKEND", None)  # figures are stored by the notebook's own backend only
    seconds = {}
    for path in notebooks(names):
        print(f"running {path.name}", flush=True)
        nb = nbformat.read(path, as_version=4)
        nb.metadata = {
            "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
        }
        NotebookClient(
            nb,
            timeout=900,
            kernel_name="python3",
            coalesce_streams=True,
            resources={"metadata": {"path": str(NBS)}},
        ).execute()
        for n, cell in enumerate(nb.cells):
            cell.id = f"c{n:03d}"
            if name := directives(cell.source).get("test"):
                times = cell.metadata["execution"]
                began, ended = (
                    datetime.fromisoformat(times[key])
                    for key in ("iopub.status.busy", "shell.execute_reply")
                )
                seconds[name] = (ended - began).total_seconds()
            cell.metadata = {}
            for output in cell.get("outputs", []):
                output.get("metadata", {}).clear()
        nbformat.write(nb, path)
        nbdev_clean(str(path))
    return seconds

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["package", "run", "tests", "readme", "all"])
    parser.add_argument("names", nargs="*", help="notebooks to run, by stem; all when left out")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.what in ("package", "all"): export()
    if args.what in ("run", "all"): run(args.names)
    if args.what in ("tests", "all"): write_tests()
    if args.what in ("readme", "all"): write_readme()

if __name__ == "__main__": main()
