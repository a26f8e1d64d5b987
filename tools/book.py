"""The structure that all notebooks share: made here, so that who writes prose need not keep it.

    python tools/book.py                  write opening lines, links and checks of all notebooks
    python tools/book.py 05_labels        only of these, by stem
    python tools/book.py --check          change nothing; exit code 1 if something would change
    python tools/book.py --report [NAME]  a line per notebook, and what its writer has to change
    python tools/book.py --claims [NAME]  sentences whose numbers no cell of their section holds

What is written: under the title, how long a notebook takes to read, which notebooks it builds on
and which stand before and after it; links where Markdown names another notebook in backticks;
cells that begin `#| hide` and are tests at the end, visible, under "Checks". What is only reported
is named in `RULES`; a figure's alt text is a line `#| fig-alt: text` of its cell, or the `alt` of
an `<img>` in its output.
"""

import argparse
import ast
import html
import json
import math
import random
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
MOST_MINUTES, MOST_CELLS = 20, 40  # of a notebook of the reading path
MOST_LINES, COLUMNS, MOST_TESTS = 25, 100, 0.2
CLOSING = "What we have", "Exercises", "Checks"  # sections that have no number
CHECKS_SENTENCE = "These cells only test."
OPENING = re.compile(r"\d+ min(?: · |$)|\*\*Here\*\*: |.*↑ \[contents\]\(index\.ipynb\)")
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

# -- rules that writers keep -----------------------------------------------------------------

def text_of(output):
    "What a reader sees of an output as plain text, \"\" where it is shown as HTML or an image."
    data = output.get("data", {})
    if "name" in output: return "".join(output.get("text", ""))
    shown_otherwise = any(kind.startswith(("text/html", "image/")) for kind in data)
    return "" if shown_otherwise else "".join(data.get("text/plain", ""))

def html_of(output):
    "The HTML of an output."
    return "".join(output.get("data", {}).get("text/html", ""))

def visible(cells):
    "Code cells that a reader sees."
    return [c for c in cells if is_code(c) and "hide" not in marks(c) and c["source"].strip()]

def is_export_cell(cell):
    "Whether a cell defines what the package exports."
    return bool((build.EXPORTS | {"default_exp"}) & set(marks(cell)))

def is_stop(cell):
    "Whether a cell stops in a function and says what the values there are."
    return "Breakpoint(" in cell["source"] and ".expect" in cell["source"]

def stops(notebook):
    "Cells in front of the checks that stop and pin what they show."
    return [c for c in visible(before_checks(notebook["cells"])) if is_stop(c)]

def lines_of(cell):
    "The lines of a cell that are neither directives nor blank."
    return [line for line in build.body(cell["source"]).splitlines() if line.strip()]

def test_share(notebook):
    "Share of the visible lines in front of the checks that only test."
    cells = visible(before_checks(notebook["cells"]))
    only = [c for c in cells if "test" in marks(c) and "Breakpoint(" not in c["source"]]
    lines = sum(len(lines_of(c)) for c in cells)
    return sum(len(lines_of(c)) for c in only) / lines if lines else 0.0

def figures(notebook):
    "`(cell id, has alt text)` of every image in the stored outputs."
    found = []
    for cell in visible(notebook["cells"]):
        named = re.search(r"^#\|\s*fig-alt: *\S", cell["source"], re.M)
        for output in cell.get("outputs", []):
            tags = re.findall(r"<img\b[^>]*>", html_of(output))
            found += [(cell["id"], bool(re.search(r"""alt=["'][^"']""", tag))) for tag in tags]
            drawn = any(kind.startswith("image/") for kind in output.get("data", {}))
            if drawn: found.append((cell["id"], bool(named)))
    return found

def rule_current(path, notebook):
    "Opening line, links and checks are as this script writes them."
    fresh = written(path)[0] == path.read_text(encoding="utf-8")
    return [] if fresh else [f"run `make book NB={path.stem}`"]

def rule_names(path, notebook):
    "A notebook that Markdown names exists."
    found, stems = [], {p.stem for p in build.notebooks()}
    for cell in notebook["cells"]:
        if is_code(cell): continue
        text = FENCE.sub("", cell["source"])
        named = re.findall(r"`(\d\d[a-z]*_\w+)`", text) + re.findall(r"\]\(([\w.-]+)\.ipynb", text)
        found += [f"{cell['id']}: there is no {name}" for name in named if name not in stems]
    return found

def rule_stop(path, notebook):
    "Every numbered notebook has a visible cell with a `Breakpoint` and its `expect`."
    numbered = path.stem[0].isdigit()
    return (
        ["no visible cell has a Breakpoint and .expect"] if numbered and not stops(notebook) else []
    )

def rule_tests(path, notebook):
    "At most 20 % of the visible lines in front of the checks only test."
    share = test_share(notebook)
    return [f"{share:.0%} of the visible lines only test"] if share > MOST_TESTS else []

def rule_width(path, notebook):
    "No visible line of code or of text output has over 100 columns."
    found = []
    for cell in visible(notebook["cells"]):
        texts = [("line", cell["source"])]
        texts += [("output line", text_of(output)) for output in cell.get("outputs", [])]
        for kind, text in texts:
            for n, line in enumerate(text.splitlines(), 1):
                line = re.sub(r"\x1b\[[\d;]*m", "", line)
                if len(line) > COLUMNS:
                    found.append(f"{cell['id']}: {kind} {n} has {len(line)} columns")
    return found

def rule_length(path, notebook):
    "A notebook of the reading path takes at most 20 minutes and 40 code cells before its checks."
    if path.stem not in PATH: return []
    cells = before_checks(notebook["cells"])
    took, code = minutes(notebook["cells"]), sum(map(is_code, cells))
    found = [f"{took} minutes to read"] if took > MOST_MINUTES else []
    return found + ([f"{code} code cells in front of the checks"] if code > MOST_CELLS else [])

def rule_opening(path, notebook):
    "A title, a quote that says what it is for, and the opening line."
    if path.stem == README: return []
    text = notebook["cells"][0]["source"]
    found = [] if re.match(r"# \S.*\n\n> \S", text) else ["no title followed by a quote"]
    return found + ([] if re.search(r"^\d+ min(?: · |$)", text, re.M) else ["no opening line"])

def rule_headings(path, notebook):
    "Sections are numbered from 1, but for those that close a notebook."
    if path.stem == README: return []
    titles = [t for cell in notebook["cells"] for t in headings(cell) if t not in CLOSING]
    wanted = [bool(re.match(rf"{n}\. \S", t)) for n, t in enumerate(titles, 1)]
    if not titles: return ["no numbered section"]
    return [f"not numbered in order: {t}" for t, ok in zip(titles, wanted) if not ok]

def exercises(notebook):
    "Number of answers that a reader has to open."
    return sum(c["source"].count("<details") for c in notebook["cells"] if not is_code(c))

def rule_exercises(path, notebook):
    """A notebook of the reading path has two exercises with answers in `<details>`; in a list, an
    answer has its item's margin, or it would stand outside of what is folded."""
    found = []
    for n, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "markdown": continue
        for item in re.findall(r"^(?:\d+\.|[-*]) .*<details>.*\n\n\S.*", cell["source"], re.M):
            found.append(f"c{n:03d}: an answer outside of its list item: {item[:40]}")
    if path.stem in PATH and path.stem != README and (n := exercises(notebook)) < 2:
        found.append(f"{n} exercises with an answer in <details>")
    return found

def rule_cells(path, notebook):
    "A cell that a reader sees has at most 25 lines, if it exports nothing."
    cells = [c for c in visible(before_checks(notebook["cells"])) if not is_export_cell(c)]
    return [f"{c['id']}: {len(lines_of(c))} lines" for c in cells if len(lines_of(c)) > MOST_LINES]

def rule_figures(path, notebook):
    "Every figure has alt text."
    return [f"{cell}: a figure without alt text" for cell, alt in figures(notebook) if not alt]

RULES = {
    "current": rule_current,
    "names": rule_names,
    "stop": rule_stop,
    "tests": rule_tests,
    "width": rule_width,
    "length": rule_length,
    "opening": rule_opening,
    "headings": rule_headings,
    "exercises": rule_exercises,
    "cells": rule_cells,
    "figures": rule_figures,
}

def broken(rule, names=()):
    "Lines that say where a rule does not hold."
    return [
        f"{path.stem}: {trouble}"
        for path in notebooks(names)
        for trouble in RULES[rule](path, load(path))
    ]

# -- claims ----------------------------------------------------------------------------------

SPELLED = "two three four five six seven eight nine ten".split()
WORDS = {word: str(n) for n, word in enumerate(SPELLED, 2)}
UNITS = """
answers batches bits blocks bytes cells channels characters chunks classes columns crops devices
dimensions entries epochs features files forms heads ids images labels layers lines megabytes
minutes modules operations parameters passes patches percent pieces pixels points positions
queries questions records rows samples seconds segments sentinels sequences squares steps stages
tags templates tests times tokens turns units values vectors weights words workers
""".split()
REFERENCES = (
    r"\b(?:stages?|stops?|sections?|versions?|exercises?|chapters?|Python|LLaVA|Llama|Gemma"
)
REFERENCES += r"|Vicuna|Apache|CUDA|Phi|Qwen|Ubuntu) \d[\d.]*(?:(?:,| and| or) \d[\d.]*)*"
DIGITS = re.compile(r"(?<![\w.−-])[-−]?\d+(?:[,_]\d{3})*(?:\.\d+)?(?![\w]|\.\d)")
WORD_NUMBERS = re.compile(
    rf"\b({'|'.join(SPELLED)})(?=(?: [a-z-]+)? (?:{'|'.join(UNITS)})\b)", re.I
)

def plain(number):
    "A number as one compares it: `20,000` and `20_000` are 20000, `4.50` is 4.5."
    value = float(number.replace(",", "").replace("_", "").replace("−", "-"))
    return f"{abs(value):.12g}"

def numbers_in(text):
    "Numbers in code or output, in any usual form, spelled ones among them."
    text = text.lower()
    digits = re.findall(r"\d+(?:[,_]\d{3})+(?:\.\d+)?|\d+\.\d+|\d+", text)
    spelled = [WORDS[w] for w in re.findall(rf"\b({'|'.join(SPELLED)})\b", text)]
    parts = [part for d in digits for part in re.split("[,_]", d) if part]
    return {plain(d) for d in [*digits, *parts, *spelled]}

def claimed(sentence):
    "Numbers that a sentence claims, as they stand in it."
    found = [m[0] for m in DIGITS.finditer(sentence)]
    found = [d for d in found if not re.fullmatch(r"(?:19|20)\d\d", d)]  # years
    return found + [m[1] for m in WORD_NUMBERS.finditer(sentence)]

def sentences(markdown):
    "Sentences of a Markdown text without what names things: code, links, headings, references."
    text = FENCE.sub("", opening_of(markdown)[0])
    text = re.sub(r"^#+ .*$|^\s*(?:\d+\.|>) ", "", text, flags=re.M)
    text = re.sub(r"!?\[[^\]]*\]\([^)]*\)|<[^>\n]*>|https?://\S+|\$[^$\n]+\$", "…", text)
    text = re.sub(r"`[^`\n]*[A-Za-z_][^`\n]*`", "…", text).replace("`", "")
    text = re.sub(REFERENCES, "…", text)
    parts = re.split(r"(?<=[.!?:])\s+(?=[A-Z*\"(…])|\n\s*\n|\n(?=[-*|] ?)", text)
    return [" ".join(part.split()) for part in parts if part.strip()]

def sections(cells):
    "`(title, Markdown texts, code cells)` of each `##` section; the title \"\" before the first."
    found = [("", [], [])]
    for cell in cells:
        if is_code(cell):
            found[-1][2].append(cell)
            continue
        head, *rest = re.split(r"^(?=## )", cell["source"], flags=re.M)
        found[-1][1].append(head)
        found += [(re.match(r"## +(.*)", part)[1].strip(), [part], []) for part in rest]
    return found

def shown(cells):
    "Numbers in the sources and stored outputs of code cells."
    text = []
    for cell in cells:
        text.append(cell["source"])
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text += ["".join(output.get("text", "")), "".join(data.get("text/plain", ""))]
            text.append(html.unescape(re.sub(r"<[^>]*>", " ", html_of(output))))
    return numbers_in(" ".join(text))

def claims(path):
    """`(section, number, sentence)` of the numbers in Markdown that no cell of their section holds;
    what opens and closes a notebook is compared with all its cells."""
    cells = before_checks(load(path)["cells"])
    everything = shown(filter(is_code, cells))
    found = []
    for title, texts, code in sections(cells):
        held = everything if not title or title in CLOSING else shown(code)
        for sentence in (s for text in texts for s in sentences(text)):
            for number in claimed(sentence):
                value = plain(WORDS.get(number.lower(), number))
                if value in held: continue
                percent = re.search(rf"{re.escape(number)} ?(?:%|percent)", sentence)
                if percent and plain(str(float(value) / 100)) in held: continue
                found.append((title, number, sentence))
    return found

def claim_lines(names=()):
    "Lines that list claims, for a terminal."
    return [
        f"{path.stem}, {title or 'opening'}: {number}: {sentence[:160]}"
        for path in notebooks(names)
        for title, number, sentence in claims(path)
    ]

def drawn(n, seed, names=()):
    "Sentences of the book that state something, drawn at random, each with its notebook and cell."
    found = []
    for path in notebooks(names):
        for cell in load(path)["cells"]:
            if is_code(cell): continue
            text = FENCE.sub("", opening_of(cell["source"])[0])
            text = re.sub(r"^#+ .*$|^\|.*$", "", text, flags=re.M)
            for sentence in re.split(r"(?<=[.!:])\s+(?=[A-Z*`\"(])|\n\s*\n", text):
                sentence = " ".join(sentence.split())
                if len(sentence.split()) > 6 and sentence[-1] in ".:)*":
                    found.append(f"{path.stem} {cell['id']}: {sentence}")
    return random.Random(seed).sample(found, min(n, len(found)))

# -- translations ----------------------------------------------------------------------------

def facts(markdown):
    "Numbers and code of a Markdown text: what a translation must not change."
    text = opening_of(markdown)[0]
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    prose = re.sub(r"`[^`\n]+`|\]\([^)]*\)", " ", FENCE.sub("", text))
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", prose)), sorted(spans), FENCE.findall(text)

def differences(text, twin, place):
    "What differs between a Markdown text and its translation."
    names = "numbers", "code spans", "code blocks"
    return [
        f"{place}: other {name}: {have} instead of {want}"[:300]
        for name, want, have in zip(names, facts(text), facts(twin))
        if want != have
    ]

def compare_notebooks(path, twin):
    "Where a translated notebook differs from its original in more than prose."
    cells, others = load(path)["cells"], load(twin)["cells"]
    sources = [[c["source"] for c in side if is_code(c)] for side in (cells, others)]
    if sources[0] != sources[1]:
        return [f"{twin.name}: its code cells are not those of {path.name}"]
    if [is_code(c) for c in cells] != [is_code(c) for c in others]:
        return [f"{twin.name}: its Markdown cells stand elsewhere"]
    found = []
    for cell, other in zip(cells, others):
        if is_code(cell): continue
        place, levels = f"{twin.name} {other['id']}", []
        for side in (cell, other):
            levels.append(re.findall(r"^(#+) ", FENCE.sub("", side["source"]), re.M))
        if levels[0] != levels[1]: found.append(f"{place}: other headings")
        found += differences(cell["source"], other["source"], place)
    return found

def with_code_of(path, twin):
    "The text of a translated notebook with the code cells and outputs of its original."
    notebook, original = load(twin), load(path)
    code = [c for c in original["cells"] if is_code(c)]
    own = [c for c in notebook["cells"] if is_code(c)]
    if len(own) != len(code):
        raise SystemExit(f"{twin.name} has {len(own)} code cells, {path.name} has {len(code)}")
    for cell, other in zip(own, code): cell.update(other)
    for cell, other in zip(notebook["cells"], original["cells"]):
        cell["id"] = other["id"]
    return dump(notebook)

def twins(root=None):
    "`X.zh.ipynb` with the `X.ipynb` of each."
    found = sorted((Path(root or build.ROOT) / "nbs").glob("*.zh.ipynb"))
    return [(twin.with_name(twin.name.replace(".zh.", ".")), twin) for twin in found]

def stale_twins(root=None):
    "Translated notebooks whose code cells or outputs are not those of the original."
    found = []
    for path, twin in twins(root):
        if not path.exists(): continue
        try: text = with_code_of(path, twin)
        except SystemExit as e:
            found.append(str(e))
            continue
        if text != twin.read_text(encoding="utf-8"):
            found.append(f"{twin.name}: code or outputs differ, run `python tools/book.py`")
    return found

_STOP = re.compile(r"\S+  (\S+):\d+")  # the first line of a stop
_ARROW = re.compile(r"->\s+(\d+)  (.*)")

def shown_lines(notebook):
    "(cell, file of the package, number, text) of each line at which an output shows a stop."
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            text, file = output.get("text") or output.get("data", {}).get("text/plain", ""), None
            for line in "".join(text).splitlines():
                if stop := _STOP.match(line):
                    file = stop[1] if stop[1].startswith("vlm_lit/") else None  # or a cell
                elif file and (arrow := _ARROW.match(line)):
                    yield cell["id"], file, int(arrow[1]), arrow[2].strip().rstrip("…")

def stale_stops(root=None):
    "Outputs that show a line of the package which has another place or another text now."
    root, found = Path(root or build.ROOT), []
    for path in sorted((root / "nbs").glob("*.ipynb")):
        if ".zh." in path.name: continue  # has the original's outputs
        for cell, file, n, text in shown_lines(load(path)):
            is_there = (root / file).is_file()
            lines = (root / file).read_text(encoding="utf-8").splitlines() if is_there else []
            if n <= len(lines) and lines[n - 1].strip().startswith(text):
                continue
            found.append(
                f"{path.name} {cell}: {file}:{n} is not {text[:50]!r} any more; run "
                f"`python tools/build.py run {path.stem}`"
            )
    return found

def compare_translations(root=None):
    "Where `X.zh.ipynb` and `README.zh-CN.md` differ from their originals in more than prose."
    root, found = Path(root or build.ROOT), []
    for path, twin in twins(root):
        if path.exists(): found += compare_notebooks(path, twin)
        else: found.append(f"{twin.name}: there is no {path.name}")
    readme, twin = root / "README.md", root / "README.zh-CN.md"
    if twin.exists():
        texts = [p.read_text(encoding="utf-8") for p in (readme, twin)]
        (numbers, _, blocks), (other_numbers, _, other_blocks) = map(facts, texts)
        if blocks != other_blocks:
            found.append(f"{twin.name}: other code blocks")
        if odd := sorted(set(numbers) ^ set(other_numbers)):
            found.append(f"{twin.name}: numbers of only one of the two: {', '.join(odd)}")
    return found

# -- the command -----------------------------------------------------------------------------

def report(names):
    "Print a line per notebook, and the rules that do not hold: where, if notebooks are named."
    columns = "min", "cells", "stops", "tests", "wide", "long", "exer.", "figs", "no alt", "claims"
    print(f"{'':22}" + "".join(f"{c:>8}" for c in columns))
    on_path, troubles = 0, {}
    for path in notebooks(names):
        notebook = load(path)
        cells, drawn = before_checks(notebook["cells"]), figures(notebook)
        found = {name: rule(path, notebook) for name, rule in RULES.items()}
        troubles[path.stem] = found
        if path.stem in PATH: on_path += len(stops(notebook))
        values = [minutes(notebook["cells"]), sum(map(is_code, cells)), len(stops(notebook))]
        values += [f"{test_share(notebook):.0%}", len(found["width"]), len(found["cells"])]
        values += [exercises(notebook), len(drawn), sum(not alt for _, alt in drawn)]
        values.append(len(claims(path)))
        star = "*" if path.stem in PATH else " "
        print(f"{star}{path.stem:21}" + "".join(f"{v:>8}" for v in values))
    print(f"* the reading path: {on_path} stops")
    for stem, found in troubles.items() if names else ():
        for rule, lines in found.items():
            for line in lines: print(f"{stem}: {rule}: {line}")
    for rule in RULES:
        bad = [stem for stem, found in troubles.items() if found[rule]]
        print(f"{rule:10}{len(bad):3} of {len(troubles)} do not hold: {RULES[rule].__doc__}")

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks by stem; all when left out")
    parser.add_argument("--check", action="store_true", help="change nothing, say what would")
    parser.add_argument("--report", action="store_true", help="what writers have to change")
    parser.add_argument("--claims", action="store_true", help="numbers that no cell holds")
    parser.add_argument("--draw", type=int, help="that many sentences at random, to be verified")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    args, differ = parser.parse_args(), 0
    names = [Path(name).stem for name in args.names]
    if unknown := set(names) - {p.stem for p in notebooks()}:
        raise SystemExit(f"no such notebook: {sorted(unknown)}")
    if args.report: return report(names)
    if args.draw: return print(*drawn(args.draw, args.seed, names), sep="\n")
    if args.claims: return print(*claim_lines(names), sep="\n")
    for path in notebooks(names):
        text, reasons = written(path)
        for test, why in reasons.items():
            print(f"{path.name}: {test} stays hidden where it is: {why}")
        if text == path.read_text(encoding="utf-8"): continue
        differ += 1
        print(f"{path.name}: {'differs' if args.check else 'written'}")
        if not args.check: path.write_text(text, encoding="utf-8")
    for path, twin in twins():
        if names and path.stem not in names: continue
        text = with_code_of(path, twin)
        if text == twin.read_text(encoding="utf-8"): continue
        differ += 1
        print(f"{twin.name}: {'differs' if args.check else 'written'}")
        if not args.check: twin.write_text(text, encoding="utf-8")
    sys.exit(args.check and bool(differ))

if __name__ == "__main__": main()
