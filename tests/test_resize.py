"Derived from nbs/06_resize.ipynb by `make tests`; edit the notebook, not this file."
import numpy as np, torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN
from vlm_lit.core import ConfigError
from vlm_lit.images import check_square, expand2square, resize_and_crop, shortest_size, to_bytes
import importlib.util, io, json
from pathlib import Path
import skimage.data
from fastcore.test import test_eq, expect_fail
from hypothesis import given, settings, strategies as st
from vlm_lit.core import DataError
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.image_files import DRAFT_MARGIN, decode_file
from vlm_lit.images import center_crop, decode_image, read_image, resize_shortest, resize_to_square
from vlm_lit.images import sample_image
from vlm_lit.resize import RESIZERS
from vlm_lit.resize import square_bytes

def setup_module():
    global differences, kernels_apart, mosaic, photographs, scaled
    def photographs():
        "Real photographs, RGB."
        names = ("astronaut", "chelsea", "coffee", "rocket")
        return [Image.fromarray(getattr(skimage.data, name)()) for name in names]
    def scaled(image, longest):
        "An image with a longer edge of so many pixels."
        ratio = longest / max(image.size)
        return image.resize([round(edge * ratio) for edge in image.size], Image.Resampling.BICUBIC)
    def differences(first, second):
        "Gray levels between two tensors of bytes: largest, mean, share of values that differ."
        off = (first.int() - second.int()).abs().float()
        return int(off.max()), float(off.mean()), float((off > 0).float().mean())
    def kernels_apart(longest):
        "The worst of `differences` between the two kernels, over photographs of that size."
        own = [scaled(photo, longest) for photo in photographs()]
        pairs = [(square_bytes(p, 768, resize="torch"), square_bytes(p, 768)) for p in own]
        return [max(column) for column in zip(*(differences(*pair) for pair in pairs))]
    def mosaic(width, height):
        "Real photographs side by side, at their own size."
        out, photos = Image.new("RGB", (width, height)), photographs()
        for row, y in enumerate(range(0, height, 300)):
            x = 0
            while x < width:
                photo = photos[(row + x) % len(photos)]
                out.paste(photo, (x, y))
                x += photo.width
        return out

def test_two_kernels_differ_by_two_levels_at_most():
    cat = Image.fromarray(skimage.data.chelsea())
    with Breakpoint(square_bytes, at="return large[", watch="large top left") as bp:
        by_torch = square_bytes(cat, 768, resize="torch")
    off = (by_torch.int() - square_bytes(cat, 768).int()).abs()
    print(f"at most {int(off.max())}, {float((off > 0).float().mean()):.2%} of the values differ")
    assert off.max() <= 2 and (off > 0).float().mean() < 0.01
    bp.expect({"tuple(large.shape)": (3, 768, 1154), "left": 193}, top=0)

def test_without_antialias_pixels_are_left_out():
    cat = Image.fromarray(skimage.data.chelsea())
    pixels = torch.from_numpy(np.array(cat)).permute(2, 0, 1)[None]
    rough = F.interpolate(pixels, (100, 150), mode="bicubic")[0, :, :, 25:125]
    change = dict(watch="large", set={"large": rough})
    with Breakpoint(square_bytes, at="top, left =", **change) as bp:
        square_bytes(cat, 100, resize="torch")
    without, with_it = (outcome.value.float() for outcome in bp.hits[0].outcomes)
    mean = float((without - with_it).abs().mean())
    print(f"{mean:.1f} gray levels on average")
    bp.expect_changed({"result[0, 50, 50].item()": (186, 178)}, tolerance=2)
    assert mean > 4

def test_draft_mode_per_size():
    print("size          decoded      ratio   largest   mean   99.9 % of values")
    for width, height in ((1600, 1200), (2400, 2400), (4000, 3000), (4400, 4400)):
        file = io.BytesIO()
        mosaic(width, height).save(file, "JPEG", quality=90)
        whole, small = (decode_image(file, "x", least=least) for least in (None, 768))
        squares = [square_bytes(image, 768, resize="torch") for image in (whole, small)]
        largest, mean, _ = differences(*squares)
        off = (squares[0].int() - squares[1].int()).abs().flatten().float()
        most = int(off.kthvalue(int(0.999 * len(off))).values)
        ratio = min(small.size) / 768
        print(f"{width} x {height}   {small.size}  {ratio:6.2f}{largest:8}{mean:9.2f}{most:6}")
        assert mean <= 0.8 and most <= 10 and largest <= 25
        assert ratio >= DRAFT_MARGIN or small.size == whole.size

def test_torch_squares_are_the_formula_of_fast_processors():
    def fast(image, size):
        "transformers' fast image processor without torchvision: resize the shorter edge, crop."
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
        height, width = pixels.shape[-2:]
        short, long = sorted((height, width))
        new = (size, int(size * long / short))
        new = new if height <= width else new[::-1]
        out = F.interpolate(pixels, new, mode="bicubic", antialias=True, align_corners=False)
        top, left = int((out.shape[-2] - size) / 2.0), int((out.shape[-1] - size) / 2.0)
        return out[0, :, top : top + size, left : left + size]

    rng = np.random.default_rng(0)
    sizes = [(500, 375), (375, 500), (64, 64), (769, 1001), (33, 100), (768, 768), (1001, 768), (1, 7)]
    for width, height in sizes:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for size in (96, 336, 768):
            found = square_bytes(image, size, resize="torch")
            test_eq(found, fast(image, size))
            assert found.is_contiguous() and found.dtype == torch.uint8
            padded = expand2square(image, (122, 116, 104))
            test_eq(square_bytes(image, size, "pad", resize="torch"), fast(padded, size))

def test_settings_of_the_square_hold_for_both_kernels():
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.booleans())
    def any_size(width, height, size, pads):
        noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image, aspect = Image.fromarray(noise), "pad" if pads else "square"
        found = [square_bytes(image, size, aspect, resize=how) for how in RESIZERS]
        test_eq([tuple(f.shape) for f in found], [(3, size, size)] * 2)
        test_eq(found[0], to_bytes(resize_to_square(image, size, aspect)))
        assert (found[0].int() - found[1].int()).abs().max() <= 4
        if min(image.size) == size and not pads: test_eq(found[0], found[1])

    any_size()
    gray = square_bytes(Image.new("RGB", (90, 50), (128, 127, 1)), 70, resize="torch")
    test_eq(gray.amax((1, 2)).tolist(), [128, 127, 1])
    test_eq(gray.amin((1, 2)).tolist(), [128, 127, 1])
    with expect_fail(ConfigError, contains="resize must be 'pillow' or 'torch'"):
        square_bytes(sample_image(), 70, resize="opencv")
    for how in RESIZERS:
        with expect_fail(ConfigError, contains="aspect must be"):
            square_bytes(sample_image(), 70, "stretch", resize=how)
        for aspect in ("square", "pad"):
            with expect_fail(DataError, contains="too long and thin"):
                square_bytes(Image.new("RGB", (1, 50_000)), 768, aspect, resize=how)

def test_the_margin_is_what_keeps_the_bound():
    file = io.BytesIO()
    mosaic(1600, 1600).save(file, "JPEG", quality=90)
    image = Image.open(file)
    image.draft(None, (768, 768))
    found = differences(*(square_bytes(i.convert("RGB"), 768) for i in (image, Image.open(file))))
    print(image.size, "largest", found[0], "mean", round(found[1], 2))
    test_eq(image.size, (800, 800))
    assert found[0] > 40 and found[1] > 1

def test_kernels_are_near_at_every_size():
    for longest in (336, 500, 640, 1024, 2000):
        largest, mean, share = kernels_apart(longest)
        assert largest <= 2 and mean < 0.02 and share < 0.02

def test_drafts_leave_enough_pixels():
    for width, height in ((1535, 1535), (2304, 2303), (2304, 2304), (4608, 4608), (9216, 2400)):
        file = io.BytesIO()
        Image.new("RGB", (width, height)).save(file, "JPEG")
        small = decode_file(file, "x", 768)
        whole = decode_file(file, "x")
        test_eq(whole.size, (width, height))
        assert small.size == whole.size or min(small.size) >= DRAFT_MARGIN * 768, small.size
        assert min(small.size) < 2 * DRAFT_MARGIN * 768 + 1  # no more work than needed
    for format in ("PNG", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (2400, 2400)).save(file, format)
        test_eq(decode_file(file, "x", 768).size, (2400, 2400))
