"""The structure that all notebooks share: made here, so that who writes prose need not keep it.

    python tools/book.py                  write opening lines, links and checks of all notebooks
    python tools/book.py 05_labels        only of these, by stem
    python tools/book.py --check          change nothing; exit code 1 if something would change

What is written: under the title, how long a notebook takes to read, which notebooks it builds on
and which stand before and after it; links where Markdown names another notebook in backticks;
cells that begin `#| hide` and are tests at the end, visible, under "Checks".
"""

import argparse
import ast
import json
import math
import re
import symtable
import sys
from pathlib import Path

import build

PATH = ["index", "walkthrough", "walkthrough_step", "02_tokenizer", "03_templates"]
PATH += ["04_sentinels", "05_labels", "06_images", "08e_mining", "09b_model", "17_trainer"]
PATH += ["own_data", "alignment"]  # the reading path
DOORS = "walkthrough", "own_data"  # need nothing that stands before them
ALWAYS = "00_core"  # constants and errors, needed by all
README = "index"  # two screens without an opening line; its hidden tests stay where they are
WORDS_PER_MINUTE, SECONDS_PER_CELL = 200, 6
CLOSING = "What we have", "Exercises", "Checks"  # sections that have no number
CHECKS_SENTENCE = "These cells only test. They show nothing that is not shown above."
OPENING = re.compile(r"\d+ min · |\*\*Here\*\*: |.*↑ \[contents\]\(index\.ipynb\)")
FENCE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)[^\n]*$", re.M | re.S)

def notebooks(names=()):
    "Paths of the notebooks of this book, without translations."
    return [p for p in build.notebooks(names) if "." not in p.stem]

def path_stems():
    "Stems of the notebooks of the reading path that exist, in order."
    found = {p.stem for p in notebooks()}
    return [stem for stem in PATH if stem in found]

def load(path):
    "A notebook; the source of each cell is one string."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]: cell["source"] = "".join(cell["source"])
    return notebook

def dump(notebook):
    "The text of a notebook as nbdev writes it."
    cells = [
        {**cell, "source": cell["source"].splitlines(keepends=True)} for cell in notebook["cells"]
    ]
    return (
        json.dumps({**notebook, "cells": cells}, ensure_ascii=False, indent=1, sort_keys=True)
        + "\n"
    )

def is_code(cell):
    "Whether a cell is code."
    return cell["cell_type"] == "code"

def marks(cell):
    "Directives of a code cell, `{}` of another."
    return build.directives(cell["source"]) if is_code(cell) else {}

def headings(cell):
    "Titles of the `##` headings in a Markdown cell."
    if is_code(cell): return []
    return re.findall(r"^## +(.+?)\s*$", FENCE.sub("", cell["source"]), re.M)

def before_checks(cells):
    "The cells before the section of checks."
    for n, cell in enumerate(cells):
        if "Checks" in headings(cell): return cells[:n]
    return cells

# -- tests at the end ------------------------------------------------------------------------

def names_used(cell):
    "Names of the notebook that a cell reads and does not bind itself."
    found, tables = set(), [symtable.symtable(build.body(cell["source"]), cell["id"], "exec")]
    top = tables[0]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (table is top or symbol.is_global()):
                found.add(symbol.get_name())
    return found - set(build.bound_names(build.body(cell["source"])))

def bound_by(cell):
    "Names that a code cell binds."
    return set(build.bound_names(build.body(cell["source"]))) if is_code(cell) else set()

def changed_by(cell):
    "Names of objects of which a cell sets an attribute or an item."
    found = set()
    for node in ast.walk(ast.parse(build.body(cell["source"]))):
        if not isinstance(node, (ast.Attribute, ast.Subscript)): continue
        if isinstance(node.ctx, ast.Load): continue
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        if isinstance(node, ast.Name): found.add(node.id)
    return found

def stays(cells, n, others):
    """Why a test may not move to the end, after `others` have, or "": a later cell binds or changes
    what it reads, or reads what it binds. What set-up and exported cells bind is always the same.
    Variables of the environment are set back by who sets them."""
    used, bound = names_used(cells[n]), bound_by(cells[n])
    changed = changed_by(cells[n]) - bound
    for cell in cells[:n]:
        if {"test_setup", *build.EXPORTS} & set(marks(cell)):
            bound -= bound_by(cell)
    for cell in cells[n + 1 :]:
        if not is_code(cell) or any(cell is other for other in others):
            continue
        keys = marks(cell)
        shared = {"test_setup", *build.EXPORTS} & set(keys)
        if not shared and (both := used & bound_by(cell)):
            return f"a later cell binds {', '.join(sorted(both))}"
        if "test" not in keys and (both := bound & names_used(cell)):
            return f"a later cell reads {', '.join(sorted(both))}"
        if both := (used & changed_by(cell) | changed & names_used(cell)) - {"os"}:
            return f"another cell changes {', '.join(sorted(both))}"
        bound -= bound_by(cell)
    return ""

def move_checks(notebook):
    "Hidden tests to the end, under one heading; `{test: why it stays}` of those that may not move."
    cells, reasons = notebook["cells"], {}
    moved = [c for c in cells if "hide" in marks(c) and marks(c).get("test")]
    while True:  # one that stays may keep another from moving
        why = {id(c): stays(cells, n, moved) for n, c in enumerate(cells) if c in moved}
        reasons |= {marks(c)["test"]: why[id(c)] for c in moved if why[id(c)]}
        left = [c for c in moved if not why[id(c)]]
        if left == moved: break
        moved = left
    if not moved: return reasons
    rest = [c for c in cells if not any(c is m for m in moved)]
    end = next((n for n, c in enumerate(rest) if "nbdev_export()" in c["source"]), len(rest))
    for cell in moved:
        cell["source"] = re.sub(r"^#\| hide\n", "", cell["source"], flags=re.M)
    heading = {"cell_type": "markdown", "id": "", "metadata": {}}
    heading["source"] = f"## Checks\n\n{CHECKS_SENTENCE}"
    new = [] if any("Checks" in headings(c) for c in rest) else [heading]
    notebook["cells"] = [*rest[:end], *new, *moved, *rest[end:]]
    for n, cell in enumerate(notebook["cells"]): cell["id"] = f"c{n:03d}"
    return reasons

# -- links -----------------------------------------------------------------------------------

def link_names(text, stem, stems):
    "Names of notebooks in backticks as links; code fences, links and the notebook itself left out."
    left_alone = rf"{FENCE.pattern}|\[[^\]\n]*\]\([^)\n]*\)|``.*?``"
    pattern = re.compile(
        rf"(?P<other>{left_alone})|`(?:nbs/)?(?P<name>\w+)(?:\.ipynb)?`", re.M | re.S
    )

    def link(match):
        name = match["name"]
        if match["other"] or name not in stems or name in (stem, README):
            return match[0]
        return f"[{name}]({name}.ipynb)"

    return pattern.sub(link, text)

# -- the opening line ------------------------------------------------------------------------

def opening_of(text):
    "The title cell without its opening lines, and these lines."
    lines = text.split("\n")
    mine = [line for line in lines if OPENING.match(line)]
    rest = "\n".join(line for line in lines if not OPENING.match(line))
    return re.sub(r"\n{3,}", "\n\n", rest).strip(), "\n".join(mine)

def minutes(cells):
    "Minutes to read a notebook without its checks: 200 words a minute, 6 seconds per visible cell."
    cells = before_checks(cells)
    text = "\n".join(c["source"] for c in cells[1:] if not is_code(c))
    title = opening_of(cells[0]["source"])[0]
    visible = sum(is_code(c) and "hide" not in marks(c) for c in cells)
    words = len(f"{title}\n{text}".split())
    return max(2, math.ceil(words / WORDS_PER_MINUTE + visible * SECONDS_PER_CELL / 60))

def modules():
    "`{module: stem}` of the notebooks that export one."
    found = {}
    for path in notebooks():
        for source in build.code_cells(path):
            if module := build.directives(source).get("default_exp"):
                found[module] = path.stem
    return found

def imported(cells):
    "Modules of the package that the cells import: `text.labels`."
    found = set()
    for cell in filter(is_code, cells):
        for name, parts in re.findall(r"^from vlm_lit([\w.]*) import (.+)", cell["source"], re.M):
            found.add(name.lstrip("."))
            found |= {f"{name}.{part.split()[0]}".lstrip(".") for part in parts.split(", ")}
    return found

def order_of(stem):
    "The notebooks among which a notebook stands: the reading path, or all that are numbered."
    path = path_stems()
    if stem in path: return path
    numbered = [p.stem for p in notebooks() if p.stem[0].isdigit()]
    return numbered if stem in numbered else [*numbered, stem]

def link(stem):
    "A link to a notebook."
    return f"[{stem}]({stem}.ipynb)"

def opening(path, cells):
    "The opening line of a notebook, and a second one if it has over five sections."
    stem = path.stem
    order, homes = order_of(stem), modules()
    n = order.index(stem)
    uses = {homes[m] for m in imported(cells) if m in homes} - {ALWAYS}
    needed = [] if stem in DOORS else [link(s) for s in order[:n] if s in uses][-2:]
    parts = [f"{minutes(cells)} min"]
    if needed: parts.append("needs " + ", ".join(needed))
    if n: parts.append(f"← {link(order[n - 1])}")
    if n + 1 < len(order): parts.append(f"{link(order[n + 1])} →")
    if stem not in PATH: parts.append("↑ [contents](index.ipynb)")
    titles = [t for cell in cells for t in headings(cell) if t not in CLOSING]
    here = " · ".join(re.sub(r"^(\d+)\. ", r"\1 ", t) for t in titles)
    return " · ".join(parts) + (f"\n\n**Here**: {here}" if len(titles) > 5 else "")

# -- all three -------------------------------------------------------------------------------

def written(path):
    "The text of a notebook as it should be, and `{test: why it stays hidden where it is}`."
    notebook, stems = load(path), {p.stem for p in notebooks()}
    cells = notebook["cells"]
    reasons = move_checks(notebook) if path.stem != README else {}
    cells = notebook["cells"]
    for cell in cells:
        if not is_code(cell):
            cell["source"] = link_names(cell["source"], path.stem, stems)
    if path.stem != README:
        title, _ = opening_of(cells[0]["source"])
        cells[0]["source"] = f"{title}\n\n{opening(path, cells)}"
    return dump(notebook), reasons

def rewrite(path):
    "Write a notebook as it should be; whether something changed."
    text, _ = written(path)
    changes = text != path.read_text(encoding="utf-8")
    if changes: path.write_text(text, encoding="utf-8")
    return changes

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks by stem; all when left out")
    parser.add_argument("--check", action="store_true", help="change nothing, say what would")
    args, differ = parser.parse_args(), 0
    names = [Path(name).stem for name in args.names]
    if unknown := set(names) - {p.stem for p in notebooks()}:
        raise SystemExit(f"no such notebook: {sorted(unknown)}")
    for path in notebooks(names):
        text, reasons = written(path)
        for test, why in reasons.items():
            print(f"{path.name}: {test} stays hidden where it is: {why}")
        if text == path.read_text(encoding="utf-8"): continue
        differ += 1
        print(f"{path.name}: {'differs' if args.check else 'written'}")
        if not args.check: path.write_text(text, encoding="utf-8")
    sys.exit(args.check and bool(differ))

if __name__ == "__main__": main()
