"The structure of notebooks that tools/book.py writes, and each of its rules broken once."

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import book
import build

TITLE = "# Title\n\n> What it is for."
STOP = 'with Breakpoint(f, at="return") as bp:\n    f()\nbp.expect(x=1)'

def cell(source, *outputs):
    "A Markdown cell, or a code cell if the text begins with `code:`."
    if not source.startswith("code:"):
        return {"cell_type": "markdown", "id": "c", "metadata": {}, "source": source}
    code = {"cell_type": "code", "execution_count": None, "id": "c", "metadata": {}}
    return {**code, "outputs": list(outputs), "source": source.removeprefix("code:")}

def printed(text):
    return {"output_type": "stream", "name": "stdout", "text": text}

def drawn(kind, data):
    return {"output_type": "display_data", "metadata": {}, "data": {kind: data}}

@pytest.fixture
def write(tmp_path, monkeypatch):
    "Write notebooks into a folder that takes the place of nbs/: `write('05_labels', cell, …)`."
    monkeypatch.setattr(build, "NBS", tmp_path)

    def write(stem, *cells):
        made = [cell(c) if isinstance(c, str) else c for c in cells]
        for n, one in enumerate(made): one["id"] = f"c{n:03d}"
        path = tmp_path / f"{stem}.ipynb"
        notebook = {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        path.write_text(book.dump(notebook), encoding="utf-8")
        return path

    return write

def sources(path): return [c["source"] for c in book.load(path)["cells"]]

def test_hidden_tests_move_to_the_end_once(write):
    path = write(
        "05_labels",
        TITLE,
        "code:#| test_setup\nx = 1",
        "code:#| hide\n#| test first\nassert x == 1",
        "code:y = x + 1",
        "## What we have",
        "code:#| hide\n#| eval: false\nimport nbdev\nnbdev.nbdev_export()",
    )
    assert book.rewrite(path) and not book.rewrite(path)
    found = sources(path)
    assert found[2:4] == ["y = x + 1", "## What we have"]
    assert found[4].startswith("## Checks\n") and found[5] == "#| test first\nassert x == 1"
    assert "nbdev_export" in found[6]
    assert [c["id"] for c in book.load(path)["cells"]] == [f"c{n:03d}" for n in range(7)]

@pytest.mark.parametrize(
    "test, later, why",
    [
        ("assert x == 1", "x = 2", "a later cell binds x"),
        ("y = 1", "print(y)", "a later cell reads y"),
        ("assert x.a == 1", "x.a = 2", "another cell changes x"),
        ("x.a = 2", "print(x.a)", "another cell changes x"),
    ],
)
def test_a_test_that_would_see_other_values_stays(write, test, later, why):
    hidden = f"code:#| hide\n#| test t\n{test}"
    path = write("05_labels", TITLE, "code:#| test_setup\nx = 1", hidden, f"code:{later}")
    text, reasons = book.written(path)
    assert reasons == {"t": why} and "## Checks" not in text
    harmless = write("05_labels", TITLE, "code:#| test_setup\nx = 1", hidden, "code:z = 2")
    assert book.written(harmless)[1] == {}

def test_names_become_links_and_code_does_not(write):
    write("04_sentinels", TITLE)
    text = "`04_sentinels` [`04_sentinels`](x) `05_labels` `nope`\n\n```\n`04_sentinels`\n```"
    path = write("05_labels", TITLE, text)
    book.rewrite(path)
    assert sources(path)[1] == text.replace("`04", "[04", 1).replace(
        "sentinels`", "sentinels](04_sentinels.ipynb)", 1
    )

def test_opening_line_has_minutes_needs_and_neighbors(write):
    write("index", TITLE)
    write("04_sentinels", TITLE, "code:#| default_exp text.sentinels")
    write("05a_encode", TITLE)
    words = "word " * 601
    write("06_images", TITLE)
    code = "code:#| export\nfrom vlm_lit.text.sentinels import f"
    path = write("05_labels", f"{TITLE}\n\n9 min · ← old", code, words)
    book.rewrite(path)
    assert sources(path)[0] == (
        f"{TITLE}\n\n4 min · needs [04_sentinels](04_sentinels.ipynb) · "
        "← [04_sentinels](04_sentinels.ipynb) · [06_images](06_images.ipynb) →"
    )
    other = write("05a_encode", TITLE, *[f"## {n}. Part {n}" for n in range(1, 7)])
    book.rewrite(other)
    line, here = sources(other)[0].split("\n\n")[2:]
    assert line == (
        "2 min · ← [05_labels](05_labels.ipynb) · [06_images](06_images.ipynb) → · "
        "↑ [contents](index.ipynb)"
    )
    assert here.startswith("**Here**: 1 Part 1 · 2 Part 2") and not book.rewrite(other)

GOOD = {
    "stop": [f"code:{STOP}"],
    "tests": ["code:#| test a\nassert 1", "code:a = 1\nb = 1\nc = 1\nd = 1"],
    "width": [cell("code:" + "x" * 100, printed("y" * 100))],
    "length": ["code:a = 1"] * 40 + ["## Checks"] + ["code:a = 1"] * 9,
    "headings": ["## 1. Roles", "## 2. Masks", "## What we have", "## Checks"],
    "exercises": ["1. q <details>\n\n   a</details>", "<details>b</details>"],
    "cells": ["code:" + "a = 1\n" * 25, "code:#| export\n" + "a = 1\n" * 26],
    "figures": [
        cell("code:#| fig-alt: a curve\nplot()", drawn("image/png", "aa")),
        cell("code:show()", drawn("text/html", '<img alt="a mask" src="x">')),
    ],
    "names": ["`05_labels`, [x](05_labels.ipynb)"],
    "opening": [],
    "current": [],
}
BAD = {
    "stop": ['code:with Breakpoint(f, at="return") as bp: f()', f"code:#| hide\n{STOP}"],
    "tests": ["code:#| test a\nassert 1", "code:a = 1\nb = 1\nc = 1"],
    "width": [cell("code:x", printed("y" * 101))],
    "length": ["code:a = 1"] * 41,
    "headings": ["## 1. Roles", "## Masks"],
    "exercises": ["<details>a</details>"],
    "cells": ["code:" + "a = 1\n" * 26],
    "figures": [cell("code:plot()", drawn("image/png", "aa"))],
    "names": ["`05_label`"],
    "opening": None,
    "current": None,
}

def test_every_rule_is_broken_here_once():
    assert GOOD.keys() == BAD.keys() == book.RULES.keys()

@pytest.mark.parametrize("rule", book.RULES)
def test_a_rule_finds_what_breaks_it(write, rule):
    path = write("05_labels", TITLE, *GOOD[rule])
    if rule in ("opening", "current"):
        assert book.broken(rule)  # no opening line yet
    book.rewrite(path)
    assert book.broken(rule) == []
    if BAD[rule] is None: return
    book.rewrite(write("05_labels", TITLE, *BAD[rule]))
    assert len(book.broken(rule)) == 1

def test_wide_code_and_slow_reading_are_found(write):
    write("05_labels", TITLE, "code:" + "x" * 101, "word " * 4001)
    assert [line.split(": ", 1)[1] for line in book.broken("width")] == [
        "c001: line 1 has 101 columns"
    ]
    assert book.broken("length") == ["05_labels: 21 minutes to read"]
    assert book.broken("exercises") == ["05_labels: 0 exercises with an answer in <details>"]

def test_an_answer_outside_of_its_list_item_is_found(write):
    inside, outside = "1. q <details>\n\n   a</details>\n", "2. r <details>\n\nb</details>"
    write("05_labels", TITLE, f"{inside}\n{outside}")
    (line,) = book.broken("exercises")
    assert (
        line == "05_labels: c001: an answer outside of its list item: 2. r <details>\n\nb</details>"
    )

def test_claims_are_numbers_that_no_cell_of_their_section_holds(write):
    path = write(
        "05_labels",
        TITLE,
        "## 1. Counts\n\nThere are 25 labels. Of 20,000 records, 12 % are long; 3 tokens, "
        "two images.",
        cell("code:n = 20_000\nshare = 0.12", printed("25 2")),
        "## 2. Others\n\nThere are 25 labels, and four ids. Nobody knows all four. In "
        "2024, stage 2 "
        "and `v1.5` and [7](8.ipynb) and SmolLM2-135M say nothing.\n\n```\n99\n```",
        "code:pass",
        "## What we have\n\n25 labels of 20,000 and 31 more.",
    )
    found = [(title, number) for title, number, _ in book.claims(path)]
    assert found == [
        *(("1. Counts", "3"), ("2. Others", "25"), ("2. Others", "four")),
        ("What we have", "31"),
    ]

def test_a_translation_changes_prose_only(tmp_path, write):
    (tmp_path / "nbs").mkdir()
    assert book.compare_translations(tmp_path) == []
    text, code = "## 1. Masks\n\n25 labels, see `labels`.", "code:a = 1"

    def compared(*cells):
        for stem, made in (("05_labels", (text, code)), ("05_labels.zh", cells)):
            write(stem, *made).rename(tmp_path / "nbs" / f"{stem}.ipynb")
        return book.compare_translations(tmp_path)

    assert compared("## 1. 掩码\n\n25 个标签,见 `labels`。", code) == []
    assert "numbers" in compared("## 1. 掩码\n\n26 个标签,见 `labels`。", code)[0]
    assert "code spans" in compared("## 1. 掩码\n\n25 个标签,见 `label`。", code)[0]
    assert "headings" in compared("### 1. 掩码\n\n25 个标签,见 `labels`。", code)[0]
    assert "code cells" in compared(text, "code:a = 2")[0]
    assert "elsewhere" in compared(code, text)[0]
    (tmp_path / "nbs" / "05_labels.ipynb").unlink()
    assert book.compare_translations(tmp_path) == [
        "05_labels.zh.ipynb: there is no 05_labels.ipynb"
    ]

def test_a_translated_readme_has_the_same_commands_and_numbers(tmp_path):
    readme, twin = tmp_path / "README.md", tmp_path / "README.zh-CN.md"
    readme.write_text("Run it in 10 minutes:\n\n```\nmake test\n```\n")
    twin.write_text("10 分钟:\n\n```\nmake test\n```\n")
    assert book.compare_translations(tmp_path) == []
    twin.write_text("12 分钟:\n\n```\nmake tests\n```\n")
    assert len(book.compare_translations(tmp_path)) == 2
    assert json.dumps(book.compare_translations(tmp_path)).count("10, 12") == 1

def test_a_translation_takes_code_and_outputs_of_its_original(tmp_path):
    folder = tmp_path / "nbs"
    folder.mkdir()
    cell = {"cell_type": "code", "metadata": {}, "source": "1 + 1", "execution_count": 1}
    cell["outputs"] = [{"output_type": "execute_result", "data": {"text/plain": "2"}}]
    text = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# One"}
    form = {"metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    stale = {**cell, "id": "x", "source": "1 + 2", "outputs": []}
    original = {"cells": [text, {**cell, "id": "b"}], **form}
    (folder / "one.ipynb").write_text(book.dump(original))
    twin = folder / "one.zh.ipynb"
    twin.write_text(book.dump({"cells": [{**text, "source": "# 一"}, stale], **form}))
    assert "outputs differ" in book.stale_twins(tmp_path)[0]
    twin.write_text(book.with_code_of(folder / "one.ipynb", twin))
    assert book.stale_twins(tmp_path) == []
    cells = json.loads(twin.read_text())["cells"]
    assert (cells[0]["source"], cells[1]["id"]) == (["# 一"], "b")
    assert cells[1]["outputs"][0]["data"]["text/plain"] in ("2", ["2"])
    twin.write_text(book.dump({"cells": [text], **form}))
    assert "has 0 code cells, one.ipynb has 1" in book.stale_twins(tmp_path)[0]

def test_outputs_show_lines_that_are_there(tmp_path):
    for name in ("nbs", "vlm_lit/text"): (tmp_path / name).mkdir(parents=True)
    module, path = tmp_path / "vlm_lit/text/labels.py", tmp_path / "nbs/one.ipynb"
    module.write_text("def mask(ids):\n    labels = ids.clone()\n    return labels\n")
    stop = (
        "mask  vlm_lit/text/labels.py:2, 1 hit\n     1  def mask(ids):\n->   2  labels = ids.clo…\n"
    )
    stop += "look  <cell>:9, 1 hit\n->   9  a line of a cell\n"
    cell = {"cell_type": "code", "id": "c001", "metadata": {}, "source": "mask(ids)"}
    cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": stop.splitlines(True)}]
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(book.dump(notebook))
    assert book.stale_stops(tmp_path) == []
    module.write_text("# one line more\n" + module.read_text())
    (told,) = book.stale_stops(tmp_path)
    assert told.startswith("one.ipynb c001: vlm_lit/text/labels.py:2 is not 'labels = ids.clo'")
    module.unlink()
    assert len(book.stale_stops(tmp_path)) == 1

def test_sentences_are_drawn_by_seed():
    first, again, other = (book.drawn(5, seed, ["05_labels"]) for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) == 5
    assert all(line.startswith("05_labels ") for line in first)
