"""The page that `vlm-lit audit --html` writes, in Chromium: widths, themes, hostile records.

The fixtures are in `conftest.py`, the checks in `pages.py`.
"""

import sys
from pathlib import Path

import pytest
from pages import SCHEMES, WIDTHS, contrast_offenders, problems

from vlm_lit.data.audit import run_audit
from vlm_lit.data.findings import AuditSettings
from vlm_lit.data.image_findings import thumbnail_jpeg
from vlm_lit.images import sample_image
from vlm_lit.processor import VLMProcessor
from vlm_lit.reports import audit_page
from vlm_lit.text.tokenizer import load_tokenizer

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # small parts that tests share
from small_parts import dirty_records, talk

HOSTILE = (
    "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">\x1b[2J "
)

@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "A report with findings of records, images and sources."
    folder = tmp_path_factory.mktemp("report")
    records = [
        {**own, "source": f"web {n % 3} {HOSTILE}"} for n, own in enumerate(dirty_records(folder))
    ]
    sample_image(8, 300).save(folder / "long.png")
    records += [
        {
            "id": f"{HOSTILE}{k} {'long' * 60}",
            "image": name,
            "conversations": talk(f"<image>\n{HOSTILE}"),
        }
        for k, name in enumerate(["long.png", "good.jpg", f"{'x' * 90}.png"])
    ]
    settings = AuditSettings(image_folder=folder, images="all")
    run = run_audit(records, VLMProcessor(load_tokenizer("gemma"), num_image_tokens=576), settings)
    page = folder / "report.html"
    text = audit_page(run.report, "Audit", lambda name: thumbnail_jpeg(run.dataset, name))
    page.write_text(text, encoding="utf-8")
    return page

@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_at_both_widths_and_in_both_themes(written, look, width, scheme):
    page = look(written, width=width, scheme=scheme)
    assert [*problems(page), *map(str, contrast_offenders(page))] == []
    assert page.title() == "Audit" and page.locator("h2").count() >= 5
    for place in page.locator("h3, li, img, td").all():
        if not place.is_visible(): continue
        box = place.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, place.inner_text()[:80]

def test_letters_of_the_figure_can_be_read_on_a_phone(written, look):
    page = look(written, width=390)
    heights = page.eval_on_selector_all(
        "svg text", "all => all.map((e) => e.getBoundingClientRect().height)"
    )
    assert heights and min(heights) >= 11, heights  # CSS pixels

def test_thumbnails_are_shown_and_say_what_they_show(written, look):
    page = look(written)
    sizes = page.eval_on_selector_all("img", "all => all.map((e) => [e.naturalWidth, e.alt])")
    assert sizes and all(width > 0 for width, _ in sizes)
    assert any("long.png" in alt for _, alt in sizes), sizes
