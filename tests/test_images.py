"Derived from nbs/06_images.ipynb by `make tests`; edit the notebook, not this file."
import warnings
from pathlib import Path
import numpy as np, torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, UnidentifiedImageError
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from vlm_lit.core import ConfigError, DataError
import tempfile
from unittest.mock import patch
import matplotlib.pyplot as plt
from fastcore.test import test_eq, test_close, expect_fail
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vlm_lit.core import peek
from vlm_lit.images import *

def test_bad_files_are_refused_with_their_path():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)/"images"
        root.mkdir()
        sample_image(31, 17).save(root/"good.png")
        (root/"broken.png").write_bytes((root/"good.png").read_bytes()[:60])
        (root/"text.jpg").write_text("not an image")
        sample_image(31, 17).save(Path(folder)/"outside.png")
        test_eq((open_image("good.png", root).size, open_image("good.png", root).mode), ((31, 17), "RGB"))
        for name,message in [("gone.png", "no image 'gone.png'"), ("broken.png", "'broken.png' cannot be read"), ("text.jpg", "'text.jpg' cannot be read"),
                             ("../outside.png", "leaves the image folder"), (str(Path(folder)/"outside.png"), "leaves the image folder")]:
            with expect_fail(DataError, contains=message): open_image(name, root)
        with patch.object(Image, "MAX_IMAGE_PIXELS", 100), expect_fail(DataError, contains="more than 100 pixels"): open_image("good.png", root)

def test_odd_names_deep_pixels_and_thin_pictures_are_refused():
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(np.array([[0, 300, 65535]], dtype=np.uint16)).save(Path(folder)/"deep.png")
        with expect_fail(DataError, contains="more than 8 bits a channel"): open_image("deep.png", folder)
        for name in ("a\0.png", "x"*5000): 
            with expect_fail(DataError, contains="cannot be used"): open_image(name, folder)

def test_every_mode_becomes_rgb():
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("L", "P", "RGBA", "1", "CMYK"):
            sample_image(8, 6).convert(mode).save(Path(folder)/("x.tif" if mode == "CMYK" else "x.png"))
            test_eq(open_image("x.tif" if mode == "CMYK" else "x.png", folder).mode, "RGB")

def test_square_cuts_and_pad_keeps():
    photo = sample_image(500, 375)
    test_eq(make_square(photo, 336).size, (336, 336))
    bars = np.asarray(make_square(photo, 336, "pad"))
    test_eq(bars[5, 5].tolist(), [int(255*m) for m in OPENAI_CLIP_MEAN])    # a bar above, in the mean colour
    assert bars[168, 168].tolist() != bars[5, 5].tolist()
    test_eq(expand2square(sample_image(3, 8), (1, 2, 3)).getpixel((0, 0)), (1, 2, 3))
    with expect_fail(ConfigError, contains="aspect must be"): make_square(photo, 336, "stretch")
    for aspect in ("square", "pad"):      # a thin picture is a bomb too: 1 x 50,000 would become 768 x 38,400,000
        with expect_fail(DataError, contains="too long and thin"): make_square(Image.new("RGB", (1, 50_000)), 768, aspect)

def test_shapes_of_the_seed():
    out = prepare_image(sample_image())
    test_eq([tuple(out[k].shape) for k in ("image_aux", "image")], [(3, 768, 768), (3, 336, 336)])
    test_eq([out[k].dtype for k in ("image_aux", "image")], [torch.float32]*2)

def test_one_colour_survives_every_resize():
    grey = prepare_image(Image.new("RGB", (90, 50), (128, 128, 128)))
    print([round(float(c.mean()), 4) for c in grey["image"]])
    expected = [(128/255 - m)/s for m,s in zip(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)]
    for tensor in grey.values():
        for channel,value in zip(tensor, expected): test_close(channel, torch.full_like(channel, value), eps=1e-5)

def test_interpolation_matches_areas_not_corners():
    ramp = torch.tensor([0., 1., 2., 9.]).expand(1, 3, 4, 4)
    small = interpolate_image(ramp, 2)
    print(small[0, 0, 0].tolist())
    test_close(small[0, 0, 0], torch.tensor([0.5, 5.5]))
    corners = F.interpolate(ramp, (2, 2), mode="bilinear", align_corners=True)
    test_close(corners[0, 0, 0], torch.tensor([0., 9.]))

def test_equal_to_clip_image_processor_and_interpolate():
    clip = CLIPImageProcessorPil(size={"shortest_edge": 768}, crop_size={"height": 768, "width": 768})
    rng = np.random.default_rng(0)
    worst = 0.
    for width,height in [(500, 375), (375, 500), (64, 64), (769, 1001), (33, 100), (1200, 30)]:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for aspect in ("square", "pad"):
            reference = expand2square(picture, tuple(int(m*255) for m in clip.image_mean)) if aspect == "pad" else picture
            aux = clip.preprocess(reference, return_tensors="pt")["pixel_values"][0]
            low = F.interpolate(aux[None], (336, 336), mode="bilinear", align_corners=False)[0]
            ours = prepare_image(picture, aspect=aspect)
            worst = max(worst, float((ours["image_aux"] - aux).abs().max()), float((ours["image"] - low).abs().max()))
    print("within 1e-5:", worst < 1e-5)
    assert worst < 1e-5

def test_wrong_filter_and_swapped_statistics_are_visible_in_numbers():
    picture = sample_image()
    right = prepare_image(picture)["image_aux"]
    bilinear = normalise(to_bytes(center_crop(picture.resize((1024, 768), Image.Resampling.BILINEAR), 768)))
    swapped = prepare_image(picture, mean=OPENAI_CLIP_STD, std=OPENAI_CLIP_MEAN)["image_aux"]
    for name,other in [("bilinear", bilinear), ("swapped", swapped)]: print(name, f"max {float((other - right).abs().max()):.2f}, mean {float((other - right).abs().mean()):.3f}")
    assert (bilinear - right).abs().max() > 0.1 and (swapped - right).abs().mean() > 0.2
