"""The page that `vlm-lit walk --html` writes, in Chromium: keys, widths, themes, hostile records.

The fixtures are in `conftest.py`, the checks in `pages.py`.
"""

import pytest
from pages import SCHEMES, WIDTHS, contrast_offenders, problems

from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.images import sample_image
from vlm_lit.processor import VLMProcessor
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.walk import WALK, walk_html

HOSTILE = (
    "<script>document.title = 'run'</script></script></title><img src=x onerror=\"document.title"
    "='run'\"><svg onload=\"document.title='run'\"><a href=\"javascript:document.title='run'\">"
    "a</a><style>body{display:none}</style><link rel=stylesheet href=https://example.org/a.css>"
    "<iframe src=https://example.org></iframe>{{stops}} \u202e\x1b[2J "
)
STOPS = 1 + sum(stop.template != "hf" for stop in WALK)  # the tokenizer's is the first

@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "Files of walks, by name."
    folder, tokenizer = tmp_path_factory.mktemp("walk"), load_tokenizer("gemma")
    sample_image().save(folder / "photo.png")
    long = "long" * 300
    records = {
        "seed": ("What is in the photo?\n<image>", "the box chain purse black"),
        "hostile": (f"<image>\n{HOSTILE}", f"{HOSTILE}{long}"),
        "refused": ("<image>\nq<end_of_turn>", "a"),
    }
    for name, (question, answer) in records.items():
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        own = {"id": f"{name} {HOSTILE}", "image": "photo.png", "conversations": turns}
        data = LazySupervisedDataset([own], VLMProcessor(tokenizer), folder)
        (folder / f"{name}.html").write_text(walk_html(data, 0), encoding="utf-8")
    return folder

def place(page): return page.locator("#where").inner_text()

@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["seed", "hostile", "refused"])
def test_every_stop_at_both_widths_and_in_both_themes(written, look, name, width, scheme):
    page, found = look(written / f"{name}.html", width=width, scheme=scheme), []
    n = page.locator("main > section").count()
    assert n == {"refused": 9}.get(name, STOPS)
    for step in range(1, n + 1):
        assert place(page) == f"{step} of {n}"
        found += [*problems(page), *map(str, contrast_offenders(page))]
        assert page.locator("main > section:visible").count() == 1
        page.keyboard.press("ArrowRight")
    assert found == [] and page.title().startswith(f"Record '{name} <script>")

def test_keys_buttons_and_the_route_move(written, look):
    page = look(written / "seed.html")
    lit = lambda: page.locator("#route [aria-current=step]").inner_text()
    assert (place(page), lit()) == (f"1 of {STOPS}", "1 tokenizer")
    page.keyboard.press("ArrowLeft")
    assert place(page) == f"1 of {STOPS}"
    page.keyboard.press("ArrowRight")
    page.locator("#next").click()
    assert (place(page), lit()) == (f"3 of {STOPS}", "3 preprocess_multimodal")
    assert page.evaluate("document.activeElement.tagName") == "H2"
    assert page.evaluate("document.activeElement.textContent") == WALK[1].title
    page.locator("#back").click()
    assert lit() == "2 dataset"
    page.locator("#route a", has_text="7 mask").click()
    assert (
        lit() == "7 mask" and page.locator("h2:visible").inner_text() == "mask: what is supervised"
    )
    page.keyboard.press("End")
    assert lit() == "8 image" and page.locator("#next").get_attribute("aria-disabled") == "true"
    page.keyboard.press("ArrowRight")
    assert place(page) == f"{STOPS} of {STOPS}"
    page.keyboard.press("Home")
    assert place(page) == f"1 of {STOPS}"
    page.keyboard.press("Control+ArrowRight")
    assert place(page) == f"1 of {STOPS}"

def test_an_address_names_its_stop(written, look):
    page = look((written / "seed.html").as_uri() + "#stop-8")
    assert place(page) == f"8 of {STOPS}"
    page.keyboard.press("ArrowRight")
    assert page.url.endswith("#stop-9")

def test_a_swipe_moves_and_scrolling_down_does_not(written, look):
    page = look(written / "seed.html", width=390)
    swipe = """([x, y]) => {
      const make = (kind, x, y) => {
        const touch = new Touch({identifier: 1, target: document.body, clientX: x, clientY: y});
        const touches = kind === "touchstart" ? [touch] : [];
        window.dispatchEvent(new TouchEvent(kind, {touches, changedTouches: [touch]}));
      };
      make("touchstart", 200, 300);
      make("touchend", 200 + x, 300 + y);
    }"""
    for way, want in [
        ((-120, 10), 2),
        ((-120, 0), 3),
        ((120, 0), 2),
        ((-90, -200), 2),
        ((-20, 0), 2),
    ]:
        page.evaluate(swipe, list(way))
        assert place(page) == f"{want} of {STOPS}", way

def test_code_scrolls_in_itself_and_takes_arrows_then(written, look):
    page = look(written / "seed.html", width=390)
    page.keyboard.press("ArrowRight")
    code = page.locator("section.shown pre")
    assert code.evaluate("e => e.scrollWidth > e.clientWidth")
    code.focus()
    page.keyboard.press("ArrowRight")
    assert place(page) == f"2 of {STOPS}"

def test_the_button_changes_the_theme(written, look):
    for scheme, name in [("light", "Dark"), ("dark", "Light")]:
        page = look(written / "seed.html", scheme=scheme)
        ground = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")
        before, button = ground(), page.locator("#theme")
        assert button.inner_text() == name
        button.click()
        assert ground() != before and contrast_offenders(page) == []
        button.click()
        assert ground() == before

def test_a_record_can_neither_act_nor_load(written, look):
    page = look(written / "hostile.html")
    assert page.locator("script").count() == 1
    assert page.locator("iframe, svg, main style, link[rel=stylesheet]").count() == 0
    assert page.title().startswith("Record")
    # even where escaping had failed, the policy holds
    page.evaluate("""() => {
      document.body.insertAdjacentHTML("beforeend",
        `<img src="https://example.org/a.png"><b onclick="document.title = 'run'">b</b>`);
      document.querySelector("body > b").click();
      const own = document.createElement("script");
      own.textContent = "document.title = 'run'";
      document.body.append(own);
    }""")
    assert page.title().startswith("Record") and page.requests_out == []

def test_without_scripts_every_stop_can_be_read(written, chromium):
    context = chromium.new_context(java_script_enabled=False)
    try:
        page = context.new_page()
        page.goto((written / "seed.html").as_uri())
        assert page.locator("main > section:visible").count() == STOPS
        assert not page.locator("#next").is_visible()
    finally: context.close()
