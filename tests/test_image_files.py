"Derived from nbs/05b_image_files.ipynb by `make tests`; edit the notebook, not this file."
import io, re, warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
import numpy as np
from PIL import Image, UnidentifiedImageError
from vlm_lit.core import DataError
import io, struct, tempfile
from pathlib import Path
from unittest.mock import patch
import skimage.data
from fastcore.test import test_eq, expect_fail
from hypothesis import given, settings, strategies as st
from PIL import ImageFile
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.image_files import decode_file
from vlm_lit.image_files import decoding
from vlm_lit.image_files import jpeg_ends_early
from vlm_lit.image_files import jpeg_scans
from vlm_lit.image_files import open_file
from vlm_lit.image_files import readable_formats
from vlm_lit.image_files import to_8_bits

def setup_module():
    global cut_short, flipped, saved
    def saved(image, format, **options):
        "The bytes of an image file."
        file = io.BytesIO()
        image.save(file, format, **options)
        return file.getvalue()
    def flipped(data, places):
        "The bytes with some of them replaced: `(place, value)`, a place modulo the length."
        out = bytearray(data)
        for place, value in places: out[place % len(out)] = value
        return bytes(out)
    def cut_short(data, share):
        "A JPEG of which only a share of the data before the end marker is left."
        begin, end = data.index(b"\xff\xda") + 20, jpeg_scans(data)[2][-1].end
        return data[: begin + int(share * (end - begin))].rstrip(b"\xff") + b"\xff\xd9"

def test_postscript_is_refused_before_its_decoder():
    file = io.BytesIO()
    Image.new("RGB", (8, 6)).save(file, "EPS")
    with Breakpoint(open_file, at="if found is None", watch="name found") as bp:
        with expect_fail(DataError, contains="is in the format EPS, which is not read here"):
            open_file(file, "photo.jpg")
    bp.expect(name="photo.jpg", found="EPS")

def test_a_decoders_error_names_the_file():
    bad = b"P6 " + 20 * b"9" + b" 6 255 "
    with Breakpoint(decoding, at="raise DataError(message", watch="e message") as bp:
        with expect_fail(DataError, contains="image 'x.ppm' cannot be read (ValueError)"):
            decode_file(io.BytesIO(bad), "x.ppm")
    bp.expect({"type(e).__name__": "ValueError"})

def test_sixteen_bits_are_divided_by_257():
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    with Breakpoint(to_8_bits, at="out = Image.fromarray", watch="values gray") as bp:
        to_8_bits(deep)
    bp.expect({"values.tolist()": [[0, 32768, 65535]], "gray.tolist()": [[0, 128, 255]]})

def test_pillows_conversion_cuts_off():
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    cut = np.asarray(deep.convert("I").convert("L"))
    with Breakpoint(to_8_bits, at="out = Image.fromarray", set={"gray": cut}) as bp:
        to_8_bits(deep)
    bp.expect_changed({"result.getpixel((1, 0))": (128, 255)})

def test_a_jpeg_that_ends_early_is_found():
    cat = Image.fromarray(skimage.data.chelsea())
    short = cut_short(saved(cat, "JPEG", quality=90), 0.6)
    with Breakpoint(jpeg_ends_early, at="parts = [data", watch="last is_plain image") as bp:
        jpeg_ends_early(short)
    bp.expect(last=128, is_plain=True).expect_return({"result": True})
    test_eq(decode_file(io.BytesIO(short), "cat.jpg").getpixel((450, 299)), (128, 128, 128))

def test_twelve_megapixels_are_decoded_at_half_their_size():
    photo = io.BytesIO(saved(Image.new("RGB", (4000, 3000)), "JPEG"))
    with Breakpoint(decode_file, at="image.load()", watch="image.size least") as bp:
        decode_file(photo, "photo.jpg", 768)
    bp.expect({"image.size": (2000, 1500)}, least=768)

def test_each_format_is_read_or_refused_by_name():
    image = Image.fromarray(skimage.data.chelsea()).resize((45, 30))
    other = {"ICO": "ICO", "PCX": "PCX", "EPS": "EPS", "PDF": "PDF", "SGI": "SGI", "QOI": "QOI"}
    for name in readable_formats():
        found = decode_file(io.BytesIO(saved(image, name)), name)
        test_eq((name, found.size), (name, (45, 30)))
    for name, told in other.items():
        if name not in Image.SAVE: continue
        with expect_fail(DataError, contains=f"is in the format {told}"):
            decode_file(io.BytesIO(saved(image, name)), "x")
    starts = {b"<svg xmlns=": "SVG", b"\0\0\0\x18ftypheic": "HEIC", b"\xd0\xcf\x11\xe0": "FPX"}
    for start, told in starts.items():
        with expect_fail(DataError, contains=f"is in the format {told}"):
            decode_file(io.BytesIO(start + bytes(64)), "x")
    for start in (b"", b"text", bytes(64)):
        with expect_fail(DataError, contains="cannot be read"):
            decode_file(io.BytesIO(start), "x")
    # opened by path as well
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x.jpg").write_bytes(saved(image, "EPS"))
        with expect_fail(DataError, contains="is in the format EPS"):
            decode_file(Path(folder, "x.jpg"), "x.jpg")

def test_damaged_files_are_data_errors():
    image = Image.fromarray(skimage.data.chelsea()).resize((24, 17))
    others = [name for name in ("ICO", "PCX", "SGI", "TGA", "EPS", "DDS") if name in Image.SAVE]
    files = [saved(image, name) for name in (*readable_formats(), *others)]
    files += [saved(image, "JPEG", progressive=True), saved(image.quantize(8), "PNG")]
    files += [saved(image, "TIFF", compression=c) for c in ("tiff_lzw", "jpeg", "tiff_deflate")]
    places = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6)
    seen = []

    @settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(files), places, st.integers(0, 1 << 20))
    def damaged(data, places, end):
        "Bytes replaced, and the end cut off in half of the tries."
        data = flipped(data, places)
        data = data[: end % len(data)] if end % 2 else data
        try: seen.append(decode_file(io.BytesIO(data), "x").mode[0] not in "IF")
        except DataError as e:
            seen.append(e.kind in ("image_unreadable", "image_oversized"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        damaged()
    assert len(seen) >= 600 and all(seen)

def test_any_exception_of_a_decoder_is_a_data_error():
    good = saved(Image.new("RGB", (8, 6)), "PNG")
    raised = [RuntimeError, NotImplementedError, AttributeError, struct.error, MemoryError, KeyError]
    raised += [RecursionError, OverflowError, EOFError, OSError, AssertionError, ZeroDivisionError]
    for error in raised:
        for step in ("open", "load"):
            place = patch.object(Image, "open", side_effect=error("x"))
            if step == "load":
                place = patch.object(ImageFile.ImageFile, "load", side_effect=error("x"))
            with place, expect_fail(DataError, contains=f"cannot be read ({error.__name__})"):
                decode_file(io.BytesIO(good), "x.png")
    with patch.object(Image, "open", side_effect=KeyboardInterrupt):
        with expect_fail(KeyboardInterrupt): decode_file(io.BytesIO(good), "x.png")
    for limit in (30, 20):  # a warning above the limit, an error above twice the limit
        with patch.object(Image, "MAX_IMAGE_PIXELS", limit):
            with expect_fail(DataError, contains=f"more than {limit} pixels"):
                decode_file(io.BytesIO(good), "x.png")

def test_deep_files_follow_the_rule():
    values = np.array([[0, 255, 32768, 65535]], dtype=np.uint16)
    want = [[0, 1, 128, 255]]
    deep = Image.fromarray(values)
    pgm = b"P5 4 1 65535 " + values.astype(">u2").tobytes()
    big = saved(Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes()), "TIFF")
    files = saved(deep, "PNG"), saved(deep, "TIFF"), big, pgm
    for data in files:
        test_eq(np.asarray(decode_file(io.BytesIO(data), "x")).tolist(), want)
    tiff = saved(deep, "TIFF")
    at = tiff.index(struct.pack("<HHI", 262, 3, 1)) + 8  # which value is white
    white_is_zero = flipped(tiff, [(at, 0)])
    found = np.asarray(decode_file(io.BytesIO(white_is_zero), "x")).tolist()
    test_eq(found, [[255, 254, 127, 0]])
    clear = saved(deep, "PNG", transparency=255)
    test_eq(np.asarray(decode_file(io.BytesIO(clear), "x")).tolist(), [[0, 255, 128, 255]])
    for own in (Image.fromarray(np.zeros((2, 3), np.float32)), Image.new("I", (3, 2))):
        with expect_fail(DataError, contains="no rule says which value is white"):
            decode_file(io.BytesIO(saved(own, "TIFF")), "x.tif")
        with expect_fail(DataError, contains="no rule says"): to_8_bits(own)
    gray = Image.new("L", (3, 2))
    assert to_8_bits(gray) is gray

def test_early_ends_are_found_and_whole_files_are_not():
    photos = [Image.fromarray(own()) for own in (skimage.data.chelsea, skimage.data.coffee)]
    flat = [Image.new("RGB", (45, 37), 3 * (level,)) for level in (0, 127, 128, 129, 255)]
    kinds = [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True, "quality": 30}]
    kinds += [{"restart_marker_rows": 1}]
    n = 0
    for image in [*photos, *flat, photos[0].convert("L"), photos[0].convert("CMYK")]:
        for options in kinds:
            data = saved(image, "JPEG", **options)
            assert not jpeg_ends_early(data), (image, options)
            assert not jpeg_ends_early(data + b"more"), (image, options)
            if image in flat: continue
            for share in (0.05, 0.5, 0.9, 0.98):
                short = cut_short(data, share)
                n += 1
                assert jpeg_ends_early(short), (image, options, share)
                decode_file(io.BytesIO(short), "x")  # Pillow sees nothing
    print(n, "cut files")
    assert n > 60
    for options in ({"progressive": True}, {"progressive": True, "subsampling": 0}):  # whole scans gone
        data = saved(photos[0], "JPEG", **options)
        ends = [scan.end for scan in jpeg_scans(data)[2]]
        assert len(ends) > 5
        for end in ends[:-1]: assert jpeg_ends_early(data[:end] + b"\xff\xd9")
        assert not jpeg_ends_early(data[: ends[-1]] + b"\xff\xd9")
