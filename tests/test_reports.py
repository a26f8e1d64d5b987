"Derived from nbs/15_reports.ipynb by `make tests`; edit the notebook, not this file."
import base64, html, textwrap
from collections.abc import Callable
from itertools import groupby
from vlm_lit.text.messages import image_names
import io, json, sys, tempfile
from pathlib import Path
from fastcore.test import test_eq
from vlm_lit.images import sample_image
from vlm_lit.data.audit import audit
from vlm_lit.data.findings import AuditSettings
from vlm_lit.debug.breakpoints import Breakpoint
from small_parts import seed_dataset
from vlm_lit.reports import _example_item
from vlm_lit.reports import _finding_lines
from vlm_lit.reports import audit_lines
from vlm_lit.reports import audit_page
from vlm_lit.reports import pick_samples
from vlm_lit.reports import plot_curves
from vlm_lit.reports import plot_samples
from vlm_lit.reports import running_mean

def setup_module():
    global answers, asked, audited, doubtful, ds, folder, height, k, made_up, processor, report, right, shape, sheet, show, width
    def show(figure):
        "A figure as a notebook displays it."
        from IPython import display

        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=80)
        return display.Image(out.getvalue())
    sys.path[:0] = ["../tests", "tests"]
    folder = Path(tempfile.mkdtemp())
    ds = seed_dataset(folder)
    def made_up(n):
        "Lines as a run writes them, with made-up values."
        rows = []
        for step in range(10, 10 * n + 1, 10):
            loss = 4 * step**-0.4 + 0.1 * (step % 30 == 0)
            rate = 1e-3 * min(1, step / 60)
            row = {"step": step, "loss": loss, "loss/captions": 1.1 * loss, "loss/talk": 0.8 * loss}
            rows.append({**row, "learning_rate": rate, "grad_norm": 1.0})
            if step % 50 == 0:
                rows.append({"step": step, "eval_loss": 1.05 * loss})
        return rows
    sheet = []
    for k, (width, height) in enumerate([(90, 60), (60, 90), (80, 80), (120, 50)]):
        sample_image(width, height).save(folder / f"{k}.png")
        shape = "wide" if width > height else "tall" if width < height else "square"
        sheet.append(
            {
                "image": f"{k}.png",
                "question": "What is its shape?",
                "answer": shape,
                "prediction": "wide",
                "scores": {"exact": float(shape == "wide")},
            }
        )
    audited, processor = Path(tempfile.mkdtemp()), ds.processor
    sample_image(64, 48).save(audited / "a.png")
    def asked(n, question, answer="a box", **more):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": n, **more, "conversations": turns}
    doubtful = [asked("<script>alert(1)</script>", "x<eos>"), asked(19, "<image>\nq", image="gone.png")]
    answers = ["a box, " * (k % 5 + 1) for k in range(18)]
    right = [asked(k, f"<image>\nWhat is it, {k}?", a, image="a.png") for k, a in enumerate(answers)]
    doubtful = [*right, *doubtful]
    report = audit(doubtful, processor, AuditSettings(image_folder=audited, batch_size=4))

def test_the_running_mean_starts_with_fewer_values():
    with Breakpoint(running_mean, at="return [sum", watch="windows width") as bp:
        running_mean([1.0, 3.0, 5.0], width=2)
    bp.expect(windows=[[1.0], [1.0, 3.0], [3.0, 5.0]]).expect_return(result=[1.0, 2.0, 4.0])

def test_text_of_the_data_is_escaped_on_the_page():
    with Breakpoint(_example_item, at="name, shown =", watch=["example['id']", "where"]) as bp:
        audit_page(report)
    where = "<code>&lt;script&gt;alert(1)&lt;/script&gt;</code> (number 18, turn 0)"
    bp.expect({"example['id']": "<script>alert(1)</script>", "where": where}, hits=2)

def test_text_that_is_not_escaped_is_run():
    change = {"where": lambda where: html.unescape(where)}  # as if it had not been escaped
    examples = report["findings"]["control_tokens"]["examples"]
    with Breakpoint(_example_item, at="name, shown =", watch="turn", set=change) as bp:
        _example_item(examples[0], None)
    bp.expect_changed({"result.count('<script>')": (0, 1)})

def test_sheets_show_any_rows():
    def titles(rows, **kwargs):
        found = [ax.get_title("left") for ax in plot_samples(rows, ds, **kwargs).axes]
        return [title for title in found if title]

    two = ["Q: What is its shape?\ngiven: wide\nexpected: tall", "Q: What is its shape?\nright: wide"]
    test_eq(titles(sheet, n=2), two)
    bare = [{k: v for k, v in row.items() if k != "scores"} for row in sheet]
    test_eq(titles(bare), titles(sheet))  # `predict` alone gives no scores
    odd = {
        "question": "q\x1b[31m" + "x" * 99,
        "answer": "a",
        "prediction": "a $x^$ b",
        "scores": {"exact": 0.0, "contains": 1.0},
    }
    # text only, another metric
    test_eq([len(titles([odd], metric=metric)[0].split("\n")) for metric in (None, "contains")], [5, 4])
    long = titles([{**odd, "question": "why? " * 99, "prediction": "so " * 99}])[0].split("\n")
    test_eq([line.split(":")[0] for line in long if ":" in line], ["Q", "given", "expected"])
    assert (
        len(long) == 7 and max(map(len, long)) <= 38 and sum(line.endswith("…") for line in long) == 2
    )
    test_eq(titles([{**sheet[0], "image": ["0.png", "1.png"]}]), titles(sheet[:1]))
    test_eq(titles([]), [])

def test_curves_draw_what_there_is():
    def drawn(rows):
        labels = [line.get_label() for line in plot_curves(rows).axes[0].lines]
        return [label for label in labels if not label.startswith("_")]

    rows = made_up(10)
    test_eq(drawn(rows), ["training", "captions", "talk", "validation"])
    test_eq(drawn([{k: row[k] for k in ("step", "loss") if k in row} for row in rows]), ["training"])
    test_eq((drawn([{"step": 5, "eval_loss": 1.0}]), drawn([])), (["validation"], []))
    test_eq(drawn([{"step": 1, "learning_rate": 1e-3}]), [])
    test_eq([axes.get_yscale() for axes in plot_curves(rows).axes], ["log", "linear"])
    test_eq(plot_curves([{"step": 1, "loss": 0.0}]).axes[0].get_yscale(), "linear")
    test_eq(running_mean([1.0, 3.0, 5.0], 2), [1.0, 2.0, 4.0])

def test_wrong_answers_come_first_up_to_half():
    test_eq(pick_samples([True] * 20, 4), [0, 5, 10, 15])
    test_eq(pick_samples([False, True, False, True, True, True], 4), [0, 2, 1, 4])
    test_eq(len(pick_samples([False] * 3 + [True] * 1, 8)), 4)
    test_eq(pick_samples([False] * 10, 4), [0, 2, 5, 7])

def test_audit_page_escapes_what_the_data_says():
    page = audit_page(report, "<Audit>")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<title>&lt;Audit&gt;</title>" in page
    assert "NOT OK" in page and "image_missing" in page and "<img" not in page
    for tag in ("tr", "td", "th", "li", "section", "div", "table", "svg"):
        assert page.count(f"<{tag}>") + page.count(f"<{tag} ") == page.count(f"</{tag}>"), tag
    assert "http" not in page  # nothing is loaded
    lines = audit_lines(report)
    assert lines[0] == report["verdict"]
    assert any("control_tokens" in line for line in lines)
    assert any("turn 0" in line for line in lines)
    assert not any("\x1b" in line for line in audit_lines({**report, "verdict": "\x1b[31m"}))
    right = audit(doubtful[:3], processor, AuditSettings(image_folder=audited))
    assert "No findings." in audit_page(right) and "no findings" in audit_lines(right)

def test_equal_words_of_examples_are_said_once():
    example = lambda n, what, turn=None: {"id": f"r{n}", "index": n, "turn": turn, "what": what}
    examples = [example(0, "no form"), example(1, "no form", 2), example(2, "no text")]
    some = {"severity": "error", "count": 3, "share": 1.0, "means": "m", "examples": examples}
    lines = [line.strip() for line in _finding_lines({"broken_record": some}, 5)[1:]]
    wanted = ["record 'r0' (number 0): no form", "the same: record 'r1' (number 1), turn 2"]
    test_eq(lines, [*wanted, "record 'r2' (number 2): no text"])

def test_any_text_of_the_data_stays_text():
    from html.parser import HTMLParser

    class Names(HTMLParser):
        "Tags and attributes of a page."

        def __init__(self, page):
            super().__init__()
            self.found = set()
            self.feed(page)

        def handle_starttag(self, tag, attrs):
            self.found |= {(tag, name) for name, _ in attrs} | {tag}

    jpeg = lambda name: b"\xff\xd8" if name == "a.png" else None
    expected = Names(audit_page(report, "t", jpeg)).found
    evil = [
        "</style><script>x</script>",
        "\"><img src=x onerror=y>",
        "' onload='x",
        "\ud83d",
        "\x1b[2J",
    ]
    evil += ["<!--", "]]>", "\u202e", "&lt;", "javascript:x", float("nan"), 10**400]
    for text in evil:
        item = {"index": 3, "id": text, "turn": 0, "what": str(text), "image": str(text)}
        found = {
            "tags": {"severity": "error", "means": "m", "count": 1, "share": 1, "examples": [item]}
        }
        sources = {str(text): {"records": 1}, "b": {"records": 1}}
        changed = {**report, "findings": found, "verdict": str(text), "sources": sources}
        changed["scripts"] = {str(text): 1}
        page = audit_page(changed, str(text), lambda name: b"\xff\xd8")
        page.encode("utf-8")
        assert Names(page).found <= expected | {"img", ("img", "alt"), ("img", "src")}, text
        assert all(line.isprintable() for line in audit_lines(changed))
        "\n".join(audit_lines(changed)).encode("utf-8")

def test_images_stand_beside_their_findings_and_bars_are_linear():
    sample_image(900, 100).save(audited / "wide.png")
    (audited / "web.png").write_bytes(b"<html>")
    shown = [asked(k, "<image>\nq", image=f"{name}.png") for k, name in enumerate(("wide", "web"))]
    settings = AuditSettings(image_folder=audited, n_examples=2)
    found = audit(shown, processor, settings)
    opened = []
    page = audit_page(found, thumbnail=lambda name: opened.append(name) or b"\xff\xd8")
    test_eq(sorted(opened), ["web.png", "wide.png"])
    assert page.count('<img alt="image wide.png" src="data:image/jpeg;base64,/9g="') == 1
    assert "<img" not in audit_page(found, thumbnail=lambda name: None)
    for s in found["segments"].values():
        assert f'style="width:{100 * s["share"]:.2f}%"' in page
    assert "scheme:dark" in page and "width=device-width" in page
    empty = audit([], processor)
    assert "No findings." in audit_page(empty) and audit_lines(empty)
