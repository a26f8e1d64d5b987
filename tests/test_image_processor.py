"Derived from nbs/06a_image_processor.ipynb by `make tests`; edit the notebook, not this file."
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from vlm_lit.core import ConfigError
from vlm_lit.images import count_image_tokens, grid_crops, normalize, read_image
from vlm_lit.resize import RESIZERS, square_bytes
import json, tempfile
from pathlib import Path
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.core import peek
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import prepare_image, sample_image, to_bytes
from vlm_lit.image_processor import VLMImageProcessor

def test_large_and_small_image_of_one_call():
    processor = VLMImageProcessor()
    with Breakpoint(VLMImageProcessor.finish, at="return {**small", watch="pixels large[0]") as bp:
        processor(sample_image())
    bp.expect({"tuple(pixels.shape)": (1, 3, 768, 768), "self.num_image_tokens": 576})
    bp.expect_return({"tuple(pixel_values.shape)": (1, 3, 336, 336)})

def test_another_geometry_has_the_same_shapes():
    small = VLMImageProcessor(image_size=28, image_size_aux=56)
    padded = VLMImageProcessor(**{**small.to_dict(), "aspect": "pad"})
    found = [own(sample_image())["pixel_values"] for own in (small, padded)]
    test_eq(found[0].shape, found[1].shape)
    share = float((found[0] != found[1]).float().mean())
    print(f"{share:.0%} of the values differ")
    assert share > 0.8

def test_every_setting_is_in_one_file():
    folder = Path(tempfile.mkdtemp())
    own = VLMImageProcessor(image_size=28, image_size_aux=56, aspect="pad", num_image_tokens=7)
    own.save_pretrained(folder)
    kept = json.loads((folder / "preprocessor_config.json").read_text())
    print([p.name for p in folder.iterdir()])
    print(*(f"{key}: {str(value)[:40]}" for key, value in sorted(kept.items())), sep="\n")
    test_eq(len(kept), 12)  # and the name of the class
    test_eq(VLMImageProcessor.from_pretrained(folder).to_dict(), own.to_dict())

def test_answers_of_the_exercises():
    sizes = {size: VLMImageProcessor(image_size=size).num_image_tokens for size in (28, 32)}
    test_eq(sizes, {28: 4, 32: None})
    single, photo = VLMImageProcessor(28, 56, has_aux=False), sample_image(40, 90)
    test_eq([*single(photo)], ["pixel_values"])
    pixels = single(photo, as_bytes=True)
    test_eq(
        {k: (v.shape, v.dtype) for k, v in pixels.items()},
        {"pixel_values_aux": ((1, 3, 56, 56), torch.uint8)},
    )

def test_image_processor_is_the_image_path():
    photo, other = sample_image(500, 375), sample_image(40, 90)
    for settings in (
        {},
        {"aspect": "pad", "image_size": 42, "image_size_aux": 96, "jpeg_draft": True},
        {
            "image_size": 42,
            "image_size_aux": 96,
            "image_grid": 2,
            "image_global": True,
            "image_mean": (0.1, 0.2, 0.3),
            "image_std": (0.4, 0.5, 0.6),
        },
    ):
        own = VLMImageProcessor(**settings)
        out = own([photo, other])
        names = {"image_mean": "mean", "image_std": "std"}
        want = prepare_image(
            other,
            **{
                names.get(k, k): v
                for k, v in {"image_size": 336, "image_size_aux": 768, **settings}.items()
                if k != "jpeg_draft"  # of files
            },
        )
        assert torch.equal(out["pixel_values"][1], want["image"])
        assert torch.equal(out["pixel_values_aux"][1], want["image_aux"])
        raw = own(photo, as_bytes=True)["pixel_values_aux"]
        assert raw.dtype == torch.uint8
        assert torch.equal(own.normalize_square(raw)[0], out["pixel_values_aux"][0])
    llava = VLMImageProcessor(image_size=42, image_size_aux=42, has_aux=False)
    test_eq({k: v.shape for k, v in llava(photo).items()}, {"pixel_values": (1, 3, 42, 42)})
    test_eq(type(llava(photo, return_tensors="np")["pixel_values"]).__name__, "ndarray")
    several = ({}, {"image_size": 30}, {"image_size": 28, "image_grid": 2}, {"num_image_tokens": 16})
    found = [VLMImageProcessor(**s).num_image_tokens for s in several]
    test_eq(found, [576, None, 16, 16])

def test_kernel_and_draft_are_settings_of_every_form():
    photo, folder = sample_image(500, 375), Path(tempfile.mkdtemp())
    photo.save(folder / "photo.jpg")
    saved, opened = folder / "photo.jpg", read_image(folder / "photo.jpg")
    for resize in ("pillow", "torch"):
        own = VLMImageProcessor(28, 56, resize=resize)
        want = square_bytes(opened, 56, resize=resize)
        pixels = to_bytes(opened)
        for form in (saved, str(saved), opened, pixels, pixels.permute(1, 2, 0).numpy()):
            test_eq(own(form, as_bytes=True)["pixel_values_aux"][0], want)
    assert not torch.equal(want, square_bytes(opened, 56))
    draft = VLMImageProcessor(28, 56, resize="torch", jpeg_draft=True)
    small = read_image(saved, least=56)
    test_eq(small.size, (125, 94))
    test_eq(draft(saved, as_bytes=True)["pixel_values_aux"][0], square_bytes(small, 56, resize="torch"))
    # an opened image keeps its size
    test_eq(draft(opened, as_bytes=True)["pixel_values_aux"][0], want)

def test_image_settings_come_back_from_a_folder():
    folder = Path(tempfile.mkdtemp())
    own = VLMImageProcessor(
        image_size=28,
        image_size_aux=56,
        aspect="pad",
        image_mean=[0.5] * 3,
        num_image_tokens=7,
        resize="torch",
        jpeg_draft=True,
    )
    own.save_pretrained(folder)
    kept = json.loads((folder / "preprocessor_config.json").read_text())
    test_eq([p.name for p in folder.iterdir()], ['preprocessor_config.json'])
    again = VLMImageProcessor.from_pretrained(folder)
    test_eq(again.to_dict(), own.to_dict())
    test_eq((again.aspect, again.image_mean, again.num_image_tokens), ("pad", [0.5] * 3, 7))
    test_eq((again.resize, again.jpeg_draft, again.least), ("torch", True, 56))
    del kept["resize"], kept["jpeg_draft"]  # a folder of an earlier version
    (folder / "preprocessor_config.json").write_text(json.dumps(kept))
    again = VLMImageProcessor.from_pretrained(folder)
    test_eq((again.resize, again.jpeg_draft, again.least), ("pillow", False, None))
    for wrong, message in [
        ({"aspect": "round"}, "aspect must be one of"),
        ({"resize": "opencv"}, "resize must be 'pillow' or 'torch'"),
        ({"jpeg_draft": "yes"}, "jpeg_draft must be true or false"),
        ({"image_size": 0}, "image sizes must be at least 1"),
        ({"image_size": 28, "image_global": True}, "image_global needs an image_grid"),
    ]:
        with expect_fail(ConfigError, contains=message): VLMImageProcessor(**wrong)
    with expect_fail(ConfigError, contains="must be 'pt' or 'np'"):
        own(sample_image(), return_tensors="tf")
    with expect_fail(ConfigError, contains="no argument 'do_resize'"):
        own(sample_image(), do_resize=False)
