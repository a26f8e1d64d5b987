"Derived from nbs/07b_convert.ipynb by `make tests`; edit the notebook, not this file."
import io, json
from dataclasses import dataclass, field
from pathlib import Path
from vlm_lit.core import ConfigError, DataError
from vlm_lit.files import digest, write_file
from vlm_lit.image_files import decoding, open_file
from vlm_lit.text.messages import image_names
from vlm_lit.data.records import Records
import tempfile
from fastcore.test import expect_fail, test_eq
from hypothesis import given, settings, strategies as st
from PIL import Image
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.data.convert import convert
from vlm_lit.data.convert import image_suffix
from vlm_lit.data.convert import write_image

def setup_module():
    global png_of
    def png_of(k):
        "A small image as a file's bytes."
        Image.new("RGB", (8, 8), (k, 30, 60)).save(out := io.BytesIO(), "PNG")
        return out.getvalue()

def test_an_image_that_two_records_share_is_one_file():
    folder = Path(tempfile.mkdtemp())
    with Breakpoint(write_image, at="if not path.is_file()", watch="path.is_file()") as bp:
        names = [write_image(png_of(1), folder) for _ in range(2)]
    bp.expect_each({"path.is_file()": [False, True]})
    assert names[0] == names[1] and names[0].endswith(".png")
    test_eq(len([p for p in folder.rglob("*") if p.is_file()]), 1)

def test_a_bad_record_is_named_and_nothing_is_lost():
    rows = [{"question": f"q{k}", "answer": "a"} for k in range(3)]
    del rows[1]["answer"]
    out = Path(tempfile.mkdtemp()) / "out.jsonl"
    at = "if not found.n_records or (found.errors and not skip_bad)"
    with Breakpoint(convert, at=at, watch=["skip_bad", "len(found.errors)", "found.n_records"]) as bp:
        for skip_bad in (False, True):
            found = convert(Records(rows), out, skip_bad=skip_bad)
            print(out.is_file(), *found.lines(), sep="; ")
    bp.expect_each({"len(found.errors)": [1, 1], "found.n_records": [2, 2]})
    test_eq([json.loads(line)["id"] for line in out.read_text().splitlines()], [0, 2])

def test_reading_what_was_converted_gives_the_same_records():
    texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=9).filter(
        lambda text: "<image>" not in text
    )
    answers = st.fixed_dictionaries(
        {"from": st.just("gpt"), "value": texts}, optional={"train": st.booleans(), "note": texts}
    )
    images = st.one_of(st.none(), st.lists(st.integers(0, 3), min_size=1, max_size=2))

    @st.composite
    def raws(draw):
        "A record, images inside it as bytes."
        own, content = draw(images), draw(st.booleans())
        question = "<image>" * len(own or []) + draw(texts)
        human = {"from": "human", "value": question}
        if content:
            parts = [{"type": "image"} for _ in own or []] + [{"type": "text", "text": draw(texts)}]
            human = {"role": "user", "content": parts}
        raw = {"id": draw(st.one_of(texts, st.integers())), "conversations": [human, draw(answers)]}
        if draw(st.booleans()):
            raw |= {"source": draw(texts), "system": draw(texts), "hint": draw(texts)}
        return raw | ({"images": [png_of(k) for k in own]} if own else {})

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(raws(), min_size=1, max_size=4))
    def check(rows):
        folder = Path(tempfile.mkdtemp())
        records = Records(rows)
        found = convert(records, folder / "out.jsonl", folder / "images")
        again = Records(folder / "out.jsonl")
        test_eq((found.n_records, found.errors, len(again)), (len(rows), [], len(rows)))
        for before, after in zip(records, again):
            names = [image_names(record) for record in (before, after)]
            without = lambda record: {k: v for k, v in record.items() if k != "image"}
            assert without(before) == without(after) and len(names[0]) == len(names[1])
            for a, b in zip(*names):
                pixels = [records.open_image(a), again.open_image(b, folder / "images")]
                assert pixels[0].tobytes() == pixels[1].tobytes()
        once = convert(again, folder / "again.jsonl")
        assert (folder / "again.jsonl").read_bytes() == (folder / "out.jsonl").read_bytes()

    check()

def test_what_cannot_be_converted_is_refused():
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    inside = {"id": 1, "image": png_of(1), "conversations": turns}
    place = Path(tempfile.mkdtemp())
    with expect_fail(ConfigError, contains="the data has images inside; give image_folder"):
        convert(Records([inside]), place / "x.jsonl")
    both = Records([inside, {**inside, "image": "x.png"}])
    with expect_fail(ConfigError, contains="which would need two image folders"):
        convert(both, place / "x.jsonl", place / "images")
    test_eq([p.name for p in place.iterdir()], ["images"])  # no half of a file
    with expect_fail(ConfigError, contains="ends in .jsonl"):
        convert(Records([]), place / "x.json")
    with expect_fail(ConfigError, contains="no folder"):
        convert(Records([]), place / "gone/x.jsonl")
    (place / "x.jsonl").write_text("mine")
    plain = Records([{"id": 1, "question": "q", "answer": "a", "hint": "h"}])
    with expect_fail(ConfigError, contains="is there already"):
        convert(plain, place / "x.jsonl")
    test_eq((place / "x.jsonl").read_text(), "mine")
    found = convert(plain, place / "x.jsonl", force=True)
    lines = ["a list: question and answer", "1 records, 0 images"]
    test_eq(found.lines(), [*lines, "1 records hold text in 'hint', which is not used"])
    broken = Records([{**inside, "image": b"no image"}])
    found = convert(broken, place / "bad.jsonl", place / "images", skip_bad=True)
    assert found.errors[0].startswith("record 1: image 'inside the data' cannot be read (Unid")
    assert not (place / "bad.jsonl").exists()  # no record at all is no file
    for kind, suffix in {"PNG": ".png", "JPEG": ".jpg", "TIFF": ".tif", "WEBP": ".webp"}.items():
        Image.new("RGB", (4, 4)).save(own := io.BytesIO(), kind)
        test_eq(image_suffix(own.getvalue()), suffix)
