"What the checks of pages find, on pages that are made to have it."

import pytest
from pages import contrast_offenders, open_page, overflow, problems, texts_measured

@pytest.fixture
def written(tmp_path, look):
    "Open a page by what stands in its body."

    def page(body, head="", **how):
        path = tmp_path / "page.html"
        head = f'<meta charset="utf-8"><link rel="icon" href="data:,">{head}'
        path.write_text(f"<!doctype html><html><head>{head}</head><body>{body}</body></html>")
        return look(path, **how)

    return page

@pytest.mark.parametrize(
    "style, ratio",
    [
        ("color:#777;background:#fff", 4.48),  # the known edge: #767676 has 4.54
        ("color:#000;background:#000", 1.0),
        ("color:rgba(0,0,0,.5);background:#fff", 3.98),  # is seen as #7f7f7f or #808080
        ("color:#000;opacity:.5;background:#fff", 3.98),
        ("color:#fff;background:#8888", 1.83),  # over white it is #bfbfbf
    ],
)
def test_low_contrast_is_found_with_its_ratio(written, style, ratio):
    page = written(f'<p>black on white</p><p style="{style}">gray</p>')
    [found] = contrast_offenders(page)
    assert found["text"] == "gray" and found["tag"] == "p"
    assert abs(found["ratio"] - ratio) < 0.06, found

def test_enough_contrast_is_no_offender(written):
    page = written(
        '<p style="color:#767676">gray</p>'
        '<div style="background:#000"><b style="color:#fff">white</b></div>'
    )
    assert texts_measured(page) == 2 and not contrast_offenders(page)

def test_backgrounds_are_laid_over_each_other(written):
    inner = '<span style="background:#fff2;color:#ddd">light on dark</span>'
    page = written(
        f'<div style="background:#222">{inner}</div>'
        '<span style="background:#fff2;color:#ddd">lost</span>'
    )
    assert [found["text"] for found in contrast_offenders(page)] == ["lost"]

def test_a_dark_page_is_dark_where_nothing_is_painted(written):
    head = "<style>:root{color-scheme:light dark}</style>"
    body = '<p>default</p><p style="color:#333">too dark</p>'
    assert not contrast_offenders(written(body, head, scheme="light"))
    found = contrast_offenders(written(body, head, scheme="dark"))
    assert [one["text"] for one in found] == ["too dark"]

def test_hidden_text_is_left_out_and_folded_text_is_opened(written):
    pale = "color:#eee;background:#fff"
    page = written(
        f'<p style="{pale};display:none">gone</p><p style="{pale};visibility:hidden">gone</p>'
        f'<details><summary>more</summary><p style="{pale}">folded</p></details>'
    )
    assert [found["text"] for found in contrast_offenders(page)] == ["folded"]

def test_only_the_part_that_is_asked_for(written):
    page = written('<p style="color:#eee">out</p><div class="a"><p style="color:#eee">in</p></div>')
    assert [found["text"] for found in contrast_offenders(page, ".a")] == ["in"]

def test_a_page_that_scrolls_sideways(written):
    wide = '<div class="wide" style="width:600px">x</div>'
    found = overflow(written(wide, width=390))
    assert found["pixels"] > 200 and found["elements"] == ["div.wide"]
    assert overflow(written(wide, width=1280)) is None
    assert overflow(written(f'<div style="overflow-x:auto">{wide}</div>', width=390)) is None

def test_requests_to_other_machines_are_stopped_and_noted(written):
    page = written('<img alt="" src="https://example.org/a.png">')
    assert page.requests_out == ["https://example.org/a.png"]
    assert "asks for https://example.org/a.png" in problems(page)

def test_errors_are_noted(written):
    page = written("<script>console.error('bad'); nothing();</script>")
    found = problems(page)
    assert "error: bad" in found and any("nothing is not defined" in line for line in found)

def test_a_page_with_nothing_wrong(written, chromium, tmp_path):
    assert problems(written("<p>text</p>", width=390)) == []
    with open_page(chromium, tmp_path / "page.html", width=1280, scheme="dark") as page:
        assert page.viewport_size["width"] == 1280 and problems(page) == []
