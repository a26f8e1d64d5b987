"""Layout of the code cells of notebooks and of hand-written Python files.

    python tools/format.py                       format all
    python tools/format.py 05_labels setup.py    only these notebooks (by stem) and files
    python tools/format.py --check               change nothing; exit code 1 if something would

`ruff format` lays out a cell at 100 columns. Two of its choices are undone: a short compound
statement that its author wrote on one line stays on one line, and one blank line, not two, stands
between functions. A cell keeps its directives and its meaning; one that does not parse is left.
"""

import argparse
import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import build

COLUMNS = 100  # of every line
ONE_LINE = 80  # a compound statement on one line is shorter than this
PATTERNS = ["tools/*.py", "docs/*.py", "benchmarks/*.py", "examples/**/*.py", "tests/*.py"]
PATTERNS += ["tests/browser/*.py"]
BODIES = "body", "orelse", "finalbody"
COMPOUND = (
    *(ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar),
    *(ast.ExceptHandler, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
)
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef

class Unparsable(Exception):
    "A source that is not Python, such as a cell with a magic."

def parse(source):
    "The syntax tree of a source."
    try: return ast.parse(source)
    except SyntaxError as e:
        raise Unparsable(f"line {e.lineno}: {e.msg}") from e

def meaning(source):
    "The syntax tree as text, the indentation of docstrings left out."
    tree = parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, DOCUMENTED) or ast.get_docstring(node) is None:
            continue
        node.body[0].value.value = inspect.cleandoc(node.body[0].value.value)
    return ast.dump(tree)

def ruff(source):
    "The source as `ruff format` lays it out; settings of the project are not read."
    config = [f"line-length = {COLUMNS}", 'format.quote-style = "preserve"']
    options = [part for line in config for part in ("--config", line)]
    command = [Path(sys.executable).with_name("ruff"), "format", "--isolated", *options, "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True, encoding="utf-8")
    if done.returncode: raise Unparsable(done.stderr.strip())
    return done.stdout

def single_bodies(source):
    "`(head, field, statement)` of bodies that are one simple statement; None in place of others."
    for node in ast.walk(parse(source)):
        for field in BODIES if isinstance(node, COMPOUND) else ():
            body = getattr(node, field, [])
            simple = len(body) == 1 and not isinstance(body[0], (*COMPOUND, ast.Match))
            yield (node, field, body[0]) if simple else None

def shares_line(statement, lines):
    "Whether something stands before a statement on its line: the head of which it is the body."
    before = lines[statement.lineno - 1].encode()[: statement.col_offset]  # columns count bytes
    return bool(before.strip())

def join_bodies(source, formatted):
    "The formatted text; short statements that the source has on one line are on one line again."
    old, new = source.split("\n"), formatted.split("\n")
    joined = []
    # the two trees are equal, so that walking both gives the same bodies in the same order
    for before, after in zip(single_bodies(source), single_bodies(formatted), strict=True):
        if before is None or not shares_line(before[2], old): continue
        node, field, statement = after
        if statement.lineno != statement.end_lineno or shares_line(statement, new):
            continue
        head = new[statement.lineno - 2]
        if field == "body":
            whole = node.lineno == statement.lineno - 1 and head.endswith(":")
        else: whole = head.strip() in ("else:", "finally:")
        line = f"{head} {new[statement.lineno - 1].strip()}"
        if whole and len(line) < ONE_LINE:
            joined.append((statement.lineno, line))
    for number, line in sorted(joined, reverse=True):
        new[number - 2 : number] = [line]
    return "\n".join(new)

def single_blank_lines(source):
    "One blank line where several stand, but for the inside of strings."
    inside = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, (ast.Constant, ast.JoinedStr)):
            inside.update(range(node.lineno + 1, node.end_lineno + 1))
    kept, blank = [], False
    for number, line in enumerate(source.split("\n"), 1):
        repeated = blank and not line.strip()
        if number in inside or not repeated: kept.append(line)
        blank = number not in inside and not line.strip()
    return "\n".join(kept)

def format_source(source):
    "A cell or file in the project's layout."
    head = re.match(r"(?:#\|.*(?:\n|$)|[ \t]*\n)*", source)[0]
    text = source[len(head) :]
    if not text.strip(): return source
    formatted = ruff(text)
    assert meaning(formatted) == meaning(text), f"another meaning:\n{text}"
    formatted = single_blank_lines(join_bodies(text, formatted)).strip("\n")
    # a semicolon at the end of a cell hides the value of its last line
    if text.rstrip().endswith(";") and not formatted.endswith(";"):
        formatted += ";"
    assert meaning(formatted) == meaning(text), f"another meaning:\n{text}"
    return head + formatted

def format_notebook(path):
    "Text of a notebook in the project's layout, and `(cell id, source, formatted)` of its code."
    notebook, cells = json.loads(path.read_text(encoding="utf-8")), []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code": continue
        source, name = "".join(cell["source"]), f"{path.name} {cell['id']}"
        cells.append((name, source, tried(name, source)))
        cell["source"] = cells[-1][2].splitlines(keepends=True)
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n", cells

def format_file(path):
    "Text of a Python file in the project's layout, and `(path, source, formatted)`."
    source, name = path.read_text(encoding="utf-8"), str(path.relative_to(build.ROOT))
    formatted = tried(name, source).strip("\n") + "\n"
    return formatted, [(name, source, formatted)]

def tried(name, source):
    "A source in the project's layout; as it is, and a message, if it does not parse."
    try: return format_source(source)
    except Unparsable as e: print(f"{name}: left as it is, {e}")
    return source

def chosen(names):
    "Paths of notebooks and files by name; all when there is no name."
    files = [build.ROOT / name for name in names if name.endswith(".py")]
    stems = [name.removesuffix(".ipynb") for name in names if not name.endswith(".py")]
    if unknown := set(stems) - {path.stem for path in build.notebooks()}:
        raise SystemExit(f"no such notebook: {sorted(unknown)}")
    if names: return [*(build.notebooks(stems) if stems else []), *files]
    found = [path for pattern in PATTERNS for path in sorted(build.ROOT.glob(pattern))]
    examples = sorted(build.ROOT.glob("examples/*/*.ipynb"))
    written = [path for path in found if not build.is_derived(path)]
    return [*build.notebooks(), *examples, *written]

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks by stem, or .py files by path")
    parser.add_argument("--check", action="store_true", help="say what would change")
    args, bad = parser.parse_args(), 0
    for path in chosen(args.names):
        make = format_notebook if path.suffix == ".ipynb" else format_file
        text, parts = make(path)
        if not args.check: path.write_text(text, encoding="utf-8")
        for name, source, formatted in parts:
            changes = source != formatted
            if changes:
                print(f"{name}: {'would change' if args.check else 'formatted'}")
            wide = [n for n, line in enumerate(formatted.split("\n"), 1) if len(line) > COLUMNS]
            for number in wide:
                print(f"{name} line {number}: over {COLUMNS} columns")
            bad += len(wide) + (changes and args.check)
    sys.exit(args.check and bool(bad))

if __name__ == "__main__": main()
