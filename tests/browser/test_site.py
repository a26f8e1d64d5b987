"The documentation site as a reader meets it. `make docs` has built it."

import inspect, re
from html import unescape
import pytest
import api_pages, docs
from pages import SCHEMES, WIDTHS, contrast_offenders, overflow, problems, set_theme, texts_measured

NOTEBOOKS = sorted(path.stem for path in docs.build.NBS.glob("*.ipynb"))
# summaries of folded parts that have nothing else in them: an answer fell out of its list item
NOTHING_FOLDED = """() => [...document.querySelectorAll("article details")]
    .filter((e) => !e.querySelector("img, svg, pre, table") &&
        e.textContent.trim() === (e.querySelector("summary") || e).textContent.trim())
    .map((e) => e.parentElement.textContent.trim().slice(0, 60))"""
KINDS = "index", "05_labels", "walkthrough", "api/index", "api/text", "search", "genindex"

@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_pages_of_every_kind(site, look, name, width, scheme):
    page = look(f"{site}/{name}.html", width=width, scheme=scheme)
    assert problems(page) == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    values = [int(value) for value in re.findall(r"\d+", paper)[:3]]
    assert (max(values) < 64) if scheme == "dark" else (min(values) > 192)
    # what the site itself writes; outputs have a test of their own
    texts = "article p, article li, article h1, article h2, .cell_input, .sidebar-tree, .sig"
    assert texts_measured(page, texts) > (0 if name in ("search", "genindex") else 20)
    assert contrast_offenders(page, texts) == []

@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_of_a_notebook(site, look, name):
    page = look(f"{site}/{name}.html", width=390)
    assert problems(page) == []
    assert page.evaluate(NOTHING_FOLDED) == []
    pale = []
    for scheme in SCHEMES:
        set_theme(page, scheme)
        for one in contrast_offenders(page, ".cell_output"):
            colors = f"{one['color']} on {one['background']}, {one['ratio']}"
            pale.append(f"{scheme}, {one['id']}: {one['text']!r} is {colors}")
    page.set_viewport_size({"width": 1280, "height": 800})
    assert overflow(page) is None
    assert not pale, "\n".join([f"contrast below 4.5 in {name}:", *pale])

def test_every_width_between_phone_and_desktop(site, look):
    page = look(f"{site}/05_labels.html")
    for width in (320, 768, 1072, 1183, 1184, 1312, 1313, 1407, 1408, 1920):
        page.set_viewport_size({"width": width, "height": 800})
        assert overflow(page) is None, width

def test_wide_code_scrolls_in_its_own_box(site, look):
    page = look(f"{site}/05_labels.html", width=390)
    pres = page.evaluate("""() => [...document.querySelectorAll(".cell pre")]
        .filter((e) => e.scrollWidth > e.clientWidth)
        .map((e) => getComputedStyle(e).overflowX)""")
    assert len(pres) > 5 and set(pres) <= {"auto", "scroll"}

def test_lines_of_100_columns_fit_on_a_laptop(site, look):
    page = look(f"{site}/05_labels.html", width=1280)
    room = page.evaluate("""() => {
      const pre = document.querySelector(".cell_input pre");
      const style = getComputedStyle(pre), text = document.createElement("span");
      text.textContent = "x".repeat(100);
      pre.append(text);
      const padding = parseFloat(style.paddingLeft) + parseFloat(style.paddingRight);
      return pre.clientWidth - padding - text.getBoundingClientRect().width;
    }""")
    assert room >= 0

def test_search_finds_sentinel(site, look):
    page = look(f"{site}/index.html")
    page.fill(".sidebar-search", "sentinel")
    page.press(".sidebar-search", "Enter")
    page.wait_for_selector("#search-results ul.search li a")
    page.wait_for_function("!document.querySelector('#search-progress')?.textContent.trim()")
    found = page.eval_on_selector_all(
        "#search-results ul.search li > a", "all => all.map((a) => a.getAttribute('href'))"
    )
    assert any(target.startswith("04_sentinels.html") for target in found), found
    assert problems(page) == []

def test_search_cuts_chinese_alike_on_both_sides(site, look):
    import sys

    sys.path.insert(0, str(docs.DOCS))
    from both_languages import EnglishAndChinese

    page = look(f"{site}/search.html")

    def asked(text): return page.evaluate("text => splitQuery(text)", text)

    assert asked("label mask") == ["label", "mask"]
    assert asked("图像标记 tokens") == ["图像", "像标", "标记", "tokens"]
    assert asked("VLM的标签") == ["VLM", "的标", "标签"]
    split = EnglishAndChinese({}).split
    for text in ("label mask_2", "图像标记 tokens", "VLM的标签", "词", "`input_ids`=25"):
        assert asked(text) and set(asked(text)) <= set(split(text)), text

def test_theme_button(site, look):
    page = look(f"{site}/05_labels.html", scheme="light")

    def paper():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    seen = {paper()}
    for _ in range(3):  # light, dark, as the system has it
        page.click(".content-icon-container .theme-toggle")
        seen.add(paper())
    assert len(seen) == 2

def test_outputs_follow_the_theme_and_not_the_system(site, look):
    page = look(f"{site}/05_labels.html", scheme="light")
    color = """() => {
      const text = document.createElement("p");
      text.style.color = "light-dark(rgb(1, 1, 1), rgb(254, 254, 254))";
      document.querySelector(".cell_output").append(text);
      return getComputedStyle(text).color;
    }"""
    assert page.evaluate(color) == "rgb(1, 1, 1)"
    page.evaluate("document.body.dataset.theme = 'dark'")  # the system's scheme stays light
    assert page.evaluate(color) == "rgb(254, 254, 254)"

def test_navigation_holds_every_page_once_and_the_path_first(site, look):
    page = look(f"{site}/index.html")
    captions = page.eval_on_selector_all(
        ".sidebar-tree .caption", "all => all.map(e => e.innerText)"
    )
    groups = docs.navigation(sorted(docs.build.NBS.glob("*.ipynb")))
    assert [text.lower() for text in captions] == [text.lower() for text in [*groups, "Reference"]]
    links = page.eval_on_selector_all(
        ".sidebar-tree li.toctree-l1 > a", "all => all.map((a) => a.getAttribute('href'))"
    )
    stems = [stem for members in groups.values() for stem in members]
    assert links == ["#", *(f"{stem}.html" for stem in stems), "api/index.html"]
    assert sorted([*stems, "index"]) == NOTEBOOKS

def test_navigation_of_notebooks_that_may_come(tmp_path):
    def path(stem, module=None):
        source = [f"#| default_exp {module}"] if module else ["1"]
        cell = {"cell_type": "code", "source": source, "outputs": []}
        found = tmp_path / f"{stem}.ipynb"
        found.write_text(docs.json.dumps({"cells": [cell]}))
        return found

    stems = ["index", "walkthrough", "walkthrough.zh", "own_data_zh", "extra"]
    paths = [path(stem) for stem in stems]
    paths += [path("05_labels", "text.labels"), path("05a_encode", "text.encode")]
    paths += [path("22_new", "new_room"), path("93_more", "debug.more")]
    assert docs.navigation(paths) == {
        "The path": ["walkthrough", "05_labels"],
        "Guides": ["extra"],
        "Text": ["05a_encode"],
        "New room": ["22_new"],
        "Appendices": ["93_more"],
        "中文": ["own_data_zh", "walkthrough.zh"],
    }

def test_hidden_cells_and_directives_are_not_shown(site, look):
    page = look(f"{site}/05_labels.html")
    text = page.inner_text("article")
    path = docs.build.NBS / "05_labels.ipynb"
    cells = [docs.split_directives(source) for source in docs.build.code_cells(path)]
    hidden = [body for words, body in cells if words[:1] == ["hide"]]
    assert any("nbdev_export" in body for body in hidden) and "nbdev_export" not in text
    assert not re.search(r"^\s*#\|", text, re.M)
    shown = page.locator(".cell_input pre").all_inner_texts()
    for word, mark in (("export", ".tag_exported"), ("test", ".tag_test")):
        bodies = [body for words, body in cells if word in words and "hide" not in words]
        assert bodies and page.locator(mark).count() >= len(bodies)
        assert {body.strip() for body in bodies} <= {text.strip() for text in shown}

def test_links_of_a_notebook(site, look):
    page = look(f"{site}/05_labels.html")
    links = page.eval_on_selector_all(".notebook-links a", "all => all.map((a) => a.href)")
    colab, source, module = links
    assert colab.startswith("https://colab.research.google.com/github/")
    assert colab.endswith("/blob/main/nbs/05_labels.ipynb")
    assert source == docs.settings()["git_url"] + "/blob/main/nbs/05_labels.ipynb"
    assert module.endswith("api/text.html")

def test_a_notebook_for_the_site():
    def shown(text): return docs.markdown(text)

    assert shown("[a](05_labels.ipynb#x)") == "[a](05_labels.ipynb#x)"
    assert shown('<a href="05_labels.ipynb">a</a>') == '<a href="05_labels.html">a</a>'
    assert shown("[r](../recipes/own-data.yaml)").endswith("/blob/main/recipes/own-data.yaml)")
    assert shown("[r](../recipes)").endswith("/tree/main/recipes)")
    assert shown("`[a](b)` and\n```\n[a](b)\n```") == "`[a](b)` and\n```\n[a](b)\n```"
    assert shown("![badge](https://example.org/b.svg)") == "[badge](https://example.org/b.svg)"
    for gone in ("[a](gone.ipynb)", "[a](../gone.md)", '<img src="../gone.png">'):
        with pytest.raises(docs.BrokenLink, match="no file"):
            docs.markdown(gone)

def test_images_say_what_they_show(site, look):
    for stem in ("walkthrough", "own_data"):
        page = look(f"{site}/{stem}.html")
        texts = page.eval_on_selector_all("article img", "all => all.map((e) => e.alt)")
        assert texts and all(text and ".png" not in text for text in texts), texts
    assert docs.alt_text('show(x, alt="two curves")') == "two curves"
    assert docs.alt_text("# the sample\nimage") == "the sample"

def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="b.html#there">1</a><a href="#here">2</a>'
        '<a href="https://x.org">3</a><a href="b.html#gone">4</a><a href="c.html">5</a>'
        '<a href="#nowhere">6</a><img src="d.png"><img src="https://x.org/e.png">'
        '<img src="data:,"><link rel="stylesheet" href="s.css">'
    )
    (tmp_path / "b.html").write_text('<p id="there"></p>')
    (tmp_path / "s.css").write_text("@import 'https://x.org/f.css'; a{background:url(data:,)}")
    assert docs.broken(tmp_path) == [
        "a.html: no file d.png",
        "a.html: loads https://x.org/e.png",
        "a.html: no anchor b.html#gone",
        "a.html: no page c.html",
        "a.html: no anchor #nowhere",
        "s.css: loads https://x.org/f.css",
    ]

def entry(name, module):
    "HTML of a name in the reference."
    text = (docs.HTML / f"{api_pages.page_of(api_pages.caption(module))}.html").read_text("utf-8")
    parts = re.split(r'(?=<dl class="py )', text)
    return next(part for part in parts if f'id="vlm_lit.{name}"' in part)

@pytest.mark.parametrize("name, module", api_pages.public_names().items())
def test_reference_of_a_name(name, module):
    import vlm_lit

    html, value = entry(name, module), getattr(vlm_lit, name)
    text = " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())
    assert f"module vlm_lit.{module}" in text
    [target] = re.findall(r'Defined in <a[^>]* href="\.\./([^"]+)"', html)
    notebook, anchor = target.split(".html#")
    assert f'id="{anchor}"' in (docs.HTML / f"{notebook}.html").read_text("utf-8")
    if not inspect.isfunction(value): return
    # what Python knows of the function, next to what was read from its source
    named = re.findall(r'<tr[^>]*><td><p><code[^>]*><span class="pre">([\w*]+)</span>', html)
    assert [n.lstrip("*") for n in named] == list(inspect.signature(value).parameters)
    first = " ".join((inspect.getdoc(value) or "").replace("`", " ").split())
    assert re.sub(r"\W", "", first) in re.sub(r"\W", "", text)

def test_parameters_keep_their_comments():
    module = api_pages.Module("text.tokenizer")
    rows = api_pages.parameters(module, module.find("load_tokenizer"), False)
    assert all(row.meaning for row in rows)
    html = entry("load_tokenizer", "text.tokenizer")
    text = re.sub(r"\W", "", unescape(re.sub(r"<[^>]*>", "", html)))
    assert all(re.sub(r"\W", "", row.meaning) in text for row in rows)
