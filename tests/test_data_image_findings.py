"Derived from nbs/13c_image_findings.ipynb by `make tests`; edit the notebook, not this file."
import hashlib, io
from dataclasses import dataclass
from pathlib import Path
import numpy as np
from PIL import ExifTags, Image
from vlm_lit.core import DataError
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.data.findings import Finding, attempt
from vlm_lit.images import TURNS, check_square, image_warnings
import sys, tempfile
from fastcore.test import test_eq
from PIL import ImageDraw, ImageFilter
from vlm_lit.data.findings import WARNINGS
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import sample_image
from vlm_lit.processor import VLMProcessor
from vlm_lit.text.tokenizer import load_tokenizer
from small_parts import dirty_records, talk
from vlm_lit.data.image_findings import difference_hash
from vlm_lit.data.image_findings import inspect_images
from vlm_lit.data.image_findings import look_at
from vlm_lit.data.image_findings import open_once
from vlm_lit.data.image_findings import thumbnail
from vlm_lit.data.image_findings import thumbnail_jpeg

def setup_module():
    global DIRTY, ODD, dataset_of, folder, found_in, made, page, photo, processor, resaved
    sys.path[:0] = ["../tests", "tests"]
    folder = Path(tempfile.mkdtemp())
    DIRTY = dirty_records(folder)
    processor = VLMProcessor(load_tokenizer("gemma"))
    photo = sample_image(640, 480)
    def resaved(image, quality=30):
        "The image at half its size, by strong compression."
        out = io.BytesIO()
        image.resize((320, 240)).save(out, "JPEG", quality=quality)
        return Image.open(out).convert("RGB")
    def dataset_of(records):
        return LazySupervisedDataset(records, processor, folder)
    def made(**images):
        "A file for each image, and the records that name them."
        for name, image in images.items(): image.save(folder / f"{name}.png")
        return [
            {"id": name, "image": f"{name}.png", "conversations": talk("<image>\nWhat is it?")}
            for name in images
        ]
    def found_in(records, is_opened=True):
        "Kinds of the findings in the images of each record."
        dataset, seen = dataset_of(records), {}
        return {
            r["id"]: [f.kind for f in inspect_images(dataset, r, n, [r["image"]], is_opened, seen)[0]]
            for n, r in enumerate(records)
        }
    page = Image.new("RGB", (600, 800), "white")
    ImageDraw.Draw(page).text((40, 40), "one line of text")
    ODD = made(
        photo=sample_image(640, 480),
        gray=Image.new("RGB", (300, 300), (127, 127, 127)),
        night=sample_image(300, 200).point(lambda v: v // 20),
        sheet=page,
        icon=sample_image(20, 20),
        banner=sample_image(900, 200),
    )

def test_stop_at_the_hash_of_a_smaller_copy():
    with Breakpoint(difference_hash, at="bits = ", watch="blocks.shape") as bp:
        whole, small = [difference_hash(thumbnail(own)) for own in (photo, resaved(photo))]
    mirrored = difference_hash(thumbnail(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    print(f"smaller: {(whole ^ small).bit_count()} bits, mirrored: {(whole ^ mirrored).bit_count()}")
    bp.expect({"blocks.shape": (8, 9)}, hits=2)
    assert (whole ^ small).bit_count() <= 3 < 8 < (whole ^ mirrored).bit_count()

def test_stop_at_an_image_that_cannot_be_squared():
    Image.new("RGB", (80_000, 1), "red").save(folder / "line.png")
    thin = {"id": 1, "image": "line.png", "conversations": talk("<image>\nWhat is it?")}
    found = []
    with Breakpoint(look_at, at="check_square", watch="image.size settings.image_size_aux") as bp:
        attempt(found, 0, 1, look_at, dataset_of([thin]), "line.png")
    bp.expect({"image.size": (80_000, 1), "settings.image_size_aux": 768}, hits=1)
    assert found[0].kind == "image_oversized" and "too long and thin" in found[0].what

def test_stop_at_an_image_that_two_records_show():
    twice = [ODD[1], {**ODD[1], "id": "again"}]
    with Breakpoint(open_once, at="if isinstance(seen[name]", watch="name len(seen)") as bp:
        kinds = found_in(twice)
    with Breakpoint(look_at, at="gray = thumbnail", watch="name") as opened:
        found_in(twice)
    assert kinds == {"gray": ["image_blank"], "again": ["image_blank"]}
    bp.expect({"len(seen)": 1}, hits=2)
    opened.expect({"name": "gray.png"}, hits=1)

def test_an_image_that_training_refuses_is_refused_here():
    Image.new("RGB", (3, 70_000), "red").save(folder / "tall.png")
    (folder / "web.jpg").write_bytes(b"<html>404</html>")
    (folder / "empty.jpg").write_bytes(b"")
    Image.new("F", (9, 9)).save(folder / "deep.tif")
    names = ["good.jpg", "broken.jpg", "gone.jpg", "../x.jpg", "line.png", "tall.png", "web.jpg"]
    for aspect in ("square", "pad"):
        own = VLMProcessor(load_tokenizer("gemma"), aspect=aspect)
        dataset = LazySupervisedDataset([], own, folder)
        for name in [*names, "empty.jpg", "deep.tif", "photo.png", "icon.png"]:
            said = []
            for read in (dataset.pixels, lambda name: look_at(dataset, name)):
                try:
                    read(name)
                    said.append(None)
                except DataError as e: said.append((e.kind, e.message))
            test_eq(*said)  # training's words and the audit's
            test_eq(said[0] is None, name in ("good.jpg", "photo.png", "icon.png"))

def test_images_in_a_table_are_opened_and_hashed():
    import pyarrow as pa, pyarrow.parquet as pq

    data = (folder / "photo.png").read_bytes()
    row = {"id": "t", "image": {"bytes": data, "path": None}, "conversations": talk("<image>\nq")}
    pq.write_table(pa.Table.from_pylist([row]), folder / "t.parquet")
    table = LazySupervisedDataset(folder / "t.parquet", processor)
    inside, outside = look_at(table, "embedded:0/0"), look_at(dataset_of(ODD), "photo.png")
    test_eq(inside, outside)
    test_eq((outside.width, outside.height, outside.mode, outside.is_turned), (640, 480, "RGB", False))
    assert inspect_images(table, table.records[0], 0, ["embedded:0/0"], False, {}) == ([], [])
    assert thumbnail_jpeg(table, "embedded:0/0")[:2] == b"\xff\xd8"
    assert thumbnail_jpeg(dataset_of(ODD), "gone.png") is None

def test_turned_images_and_warnings_of_the_file():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    sample_image(60, 40).save(folder / "held.jpg", exif=exif)
    held = look_at(dataset_of([]), "held.jpg")
    test_eq((held.width, held.height, held.is_turned), (40, 60, True))
    frames = [sample_image(64, 48), sample_image(64, 48).rotate(180)]
    frames[0].save(folder / "two.gif", save_all=True, append_images=frames[1:])
    test_eq([kind for kind, _ in look_at(dataset_of([]), "two.gif").warnings], ["image_animated"])
    assert {kind for r in found_in(ODD).values() for kind in r} <= WARNINGS.keys()

def test_what_is_not_opened_is_looked_for():
    records = [{**ODD[0], "image": name} for name in ("photo.png", "gone.png", "../a.png", "web.jpg")]
    records = [{**r, "id": n} for n, r in enumerate(records)]
    (folder / "web.jpg").write_bytes(b"<html>404</html>")
    kinds = {0: [], 1: ["image_missing"], 2: ["image_escapes"], 3: []}
    test_eq(found_in(records, False), kinds)
    test_eq(found_in(records), kinds | {3: ["image_unreadable"]})

def test_a_hash_is_stable_under_size_and_compression():
    from hypothesis import given, settings, strategies as st

    def scene(seed):
        "A blurred random picture, as rich as a photo."
        noise = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
        return image.filter(ImageFilter.GaussianBlur(8))

    @settings(max_examples=12, deadline=None)
    @given(st.integers(0, 10**6), st.integers(40, 95))
    def holds(seed, quality):
        whole = difference_hash(thumbnail(scene(seed)))
        small = difference_hash(thumbnail(resaved(scene(seed), quality)))
        other = difference_hash(thumbnail(scene(seed + 1)))
        assert (whole ^ small).bit_count() <= 8 < (whole ^ other).bit_count()

    holds()
