"Derived from nbs/06_images.ipynb by `make tests`; edit the notebook, not this file."
import io
from pathlib import Path
import numpy as np, torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFile
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from vlm_lit.core import ConfigError, DataError
from vlm_lit.text.messages import check_path
from vlm_lit.image_files import FORMATS, decode_file, decoding, depth_of, jpeg_ends_early
from vlm_lit.image_files import n_frames, open_file, refused_format, to_8_bits
import io, json, tempfile
from contextlib import nullcontext
from unittest.mock import patch
import matplotlib.pyplot as plt
import skimage.data
from PIL import ImageOps
from fastcore.test import test_eq, test_close, expect_fail
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.core import peek
from vlm_lit.images import _read_pil
from vlm_lit.images import center_crop
from vlm_lit.images import count_image_tokens
from vlm_lit.images import decode_image
from vlm_lit.images import expand2square
from vlm_lit.images import finish_images
from vlm_lit.images import grid_crops
from vlm_lit.images import image_warnings
from vlm_lit.images import interpolate_image
from vlm_lit.images import normalize
from vlm_lit.images import on_white
from vlm_lit.images import open_image
from vlm_lit.images import prepare_image
from vlm_lit.images import read_image
from vlm_lit.images import resize_and_crop
from vlm_lit.images import resize_shortest
from vlm_lit.images import resize_to_square
from vlm_lit.images import safe_path
from vlm_lit.images import sample_image
from vlm_lit.images import shortest_size
from vlm_lit.images import to_bytes

def setup_module():
    global quarters_of, saved_turned
    def saved_turned(image, turn):
        "A JPEG file in memory with an EXIF orientation, as a camera writes it."
        note, file = Image.Exif(), io.BytesIO()
        note[ExifTags.Base.Orientation] = turn
        image.save(file, "JPEG", exif=note, quality=95)
        return file.getvalue()
    def quarters_of(side):
        "An image of floats whose quarters are red, green, blue and white."
        out, half = torch.zeros(3, side, side), side // 2
        out[0, :half, :half] = out[1, :half, half:] = out[2, half:, :half] = 1
        out[:, half:, half:] = 1
        return out

def test_an_existing_file_outside_the_folder_is_refused():
    folder = Path(tempfile.mkdtemp())
    (folder / "images").mkdir()
    sample_image(31, 17).save(folder / "secret.png")
    watch = "name is_file is_outside"
    with Breakpoint(safe_path, at="if is_outside", watch=watch) as bp:
        with expect_fail(DataError, contains="leaves the image folder"):
            open_image("../secret.png", folder / "images")
    bp.expect(is_file=True, is_outside=True)

def test_a_link_out_of_the_folder_needs_the_owners_word():
    folder = Path(tempfile.mkdtemp())
    for name in ("images", "coco"): (folder / name).mkdir()
    sample_image(31, 17).save(folder / "coco/a.png")
    (folder / "images/coco").symlink_to(folder / "coco")
    watch = "name is_outside is_led_out follow_links"
    with Breakpoint(safe_path, at="if is_led_out", watch=watch) as bp:
        with expect_fail(DataError, contains="leads out of the image folder"):
            open_image("coco/a.png", folder / "images")
        open_image("coco/a.png", folder / "images", follow_links=True)
    bp.expect_each(is_outside=[False] * 2, is_led_out=[True] * 2, follow_links=[False, True])

def test_without_the_exif_orientation_the_edges_change_places():
    phone = Path(tempfile.mkdtemp(), "phone.jpg")
    phone.write_bytes(saved_turned(sample_image().transpose(Image.Transpose.ROTATE_90), 6))
    change = dict(watch="image.size upright", set={"upright": False})
    with Breakpoint(decode_image, at="if upright: image =", **change) as bp:
        decode_image(phone, "phone.jpg")
    bp.expect_changed({"result.size": ((500, 375), (375, 500))})

def test_black_on_transparent_is_black_on_black_without_alpha():
    letters = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    ImageDraw.Draw(letters).text((8, 12), "BLACK", fill=(0, 0, 0, 255))
    with Breakpoint(on_white, at="return Image.alpha_composite", watch="image") as bp:
        on_white(letters)
    bp.expect({"image.convert('RGB').getcolors()": [(2400, (0, 0, 0))]})
    bp.expect_return({"result.getpixel((0, 0))": (255, 255, 255, 255)})

def test_padding_comes_before_the_resize():
    with Breakpoint(resize_to_square, at="return resize_and_crop", watch="image aspect size") as bp:
        resize_to_square(sample_image(), 768, "pad")
    bp.expect({"image.size": (500, 500), "image.getpixel((0, 0))": (122, 116, 104)}, aspect="pad")
    bp.expect_return({"result.size": (768, 768)})

def test_black_bars_are_far_from_zero():
    with Breakpoint(expand2square, at="out = Image.new", set={"background_color": (0, 0, 0)}) as bp:
        expand2square(sample_image(), (122, 116, 104))
    channels = list(zip(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    mean_color = [round((int(255 * m) / 255 - m) / s, 2) for m, s in channels]
    black = [round((0 - m) / s, 2) for m, s in channels]
    print("normalized: mean color", mean_color, " black", black)
    test_eq((mean_color, black), ([-0.01, -0.01, -0.0], [-1.79, -1.75, -1.48]))
    bp.expect_changed({"result.getpixel((0, 0))": ((122, 116, 104), (0, 0, 0))})

def test_the_box_of_a_four_to_three_image_is_exact():
    watch = ["image.size", "(width, height)", "box"]
    with Breakpoint(resize_and_crop, at="if max(image.size) <= size and", watch=watch) as bp:
        resize_and_crop(sample_image(), 768)
    bp.expect({"(width, height)": (1024, 768)}, box=(62.5, 0, 437.5, 375))
    bp.expect_return({"result.size": (768, 768)})

def test_columns_are_dropped_between_the_passes():
    watch = ["image.size", "strip.size", "tall.size", "(size, height)"]
    with Breakpoint(resize_and_crop, at="whole = tall.resize", watch=watch) as bp:
        resize_to_square(sample_image(500, 336), 768)
    bp.expect({"strip.size": (1142, 336), "tall.size": (768, 336), "(size, height)": (768, 768)})

def test_a_box_is_one_byte_off_at_few_places():
    noise = np.random.default_rng(0).integers(0, 256, (500, 336, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    height = shortest_size(image, 768)[1]
    top = (height - 768) // 2
    box = (0, top * 500 / height, 336, (top + 768) * 500 / height)
    boxed = np.asarray(image.resize((768, 768), Image.Resampling.BICUBIC, box=box)).astype(int)
    off = np.abs(boxed - np.asarray(resize_and_crop(image, 768)))
    print(f"row {top} of {height}; largest difference of a byte: {off.max()}")
    assert off.max() == 1 and 0 < (off > 0).mean() < 1e-3

def test_normalization_takes_clips_mean_and_standard_deviation():
    image_aux = to_bytes(resize_to_square(sample_image(), 768))
    watch = "pixels mean.flatten() std.flatten()"
    with Breakpoint(normalize, at="return (pixels.float()", watch=watch) as bp:
        normalize(image_aux)
    clip = {"mean.flatten()": OPENAI_CLIP_MEAN, "std.flatten()": OPENAI_CLIP_STD}
    bp.expect(clip, tolerance=1e-6)
    bp.expect_return({"result.mean().item()": 0.358, "result.std().item()": 1.024}, tolerance=1e-3)

def test_another_towers_normalization_changes_every_number():
    half = torch.full((3, 1, 1), 0.5)
    change = dict(watch="mean.flatten() std.flatten()", set={"mean": half, "std": half})
    with Breakpoint(normalize, at="return (pixels.float()", **change) as bp:
        normalize(to_bytes(resize_to_square(sample_image(), 768)))
    expected = {"result.mean().item()": (0.358, 0.091), "result.std().item()": (1.024, 0.546)}
    bp.expect_changed(expected, tolerance=1e-3)

def test_the_small_image_is_interpolated_from_the_large_one():
    image_aux = normalize(to_bytes(resize_to_square(sample_image(), 768)))
    with Breakpoint(interpolate_image, at="return small.reshape", watch="flat[0] small[0]") as bp:
        interpolate_image(image_aux)
    bp.expect({"tuple(flat.shape)": (1, 3, 768, 768), "tuple(small.shape)": (1, 3, 336, 336)})

def test_align_corners_shifts_the_borders_and_not_the_middle():
    columns = torch.arange(768.0).expand(1, 3, 768, 768)
    corners = F.interpolate(columns, (336, 336), mode="bilinear", align_corners=True)
    change = dict(watch="small[0,0,0,0] small[0,0,0,335]", set={"small": corners})
    with Breakpoint(interpolate_image, at="return small.reshape", **change) as bp:
        interpolate_image(columns)
    places = ([0.643, 192.643, 382.357, 766.357], [0.0, 192.322, 382.355, 767.0])
    bp.expect_changed({"result[0, 0, 0, [0, 84, 167, 335]]": places}, tolerance=1e-3)

def test_columns_first_exchanges_two_crops():
    columns_first = lambda cut: cut[[0, 2, 1, 3]]
    change = dict(watch="large.shape cut.shape", set={"cut": columns_first})
    with Breakpoint(grid_crops, at="if not image_global", **change) as bp:
        grid_crops(quarters_of(1536), image_grid=2)
    bp.expect_changed({"result[1].amax((1, 2))": ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0])})

def test_both_tensors_of_one_image():
    with Breakpoint(prepare_image, at='"image": grid_crops(', watch="image image_aux") as bp:
        prepare_image(sample_image())
    bp.expect({"image.size": (500, 375), "tuple(image_aux.shape)": (3, 768, 768)})
    bp.expect_return({"tuple(image.shape)": (3, 336, 336), "image.dtype": torch.float32})

def test_gray_by_hand():
    by_hand = [(128 / 255 - m) / s for m, s in zip(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)]
    with Breakpoint(prepare_image, at='"image": grid_crops(', watch="image_aux[:,0,0]") as bp:
        prepare_image(Image.new("RGB", (90, 50), (128, 128, 128)))
    bp.expect({"image_aux[:,0,0]": by_hand}, tolerance=1e-5)
    bp.expect_return({"image[:, 335, 335]": by_hand}, tolerance=1e-5)

def test_resizing_to_336_directly_gives_another_image():
    change = dict(watch="image.size image_size_aux", set={"image_size_aux": 336})
    cat = Image.fromarray(skimage.data.chelsea())
    with Breakpoint(prepare_image, at="image_aux = normalize(", **change) as bp:
        prepare_image(cat)
    small, direct = (outcome.value["image"] for outcome in bp.hits[0].outcomes)
    off = (small - direct).abs()
    narrower = cat.crop((0, 0, 450, 300))
    rest = (prepare_image(narrower)["image"] - prepare_image(narrower, 336)["image"]).abs()
    found = [
        (image.size, round(float(d.mean()), 3), round(float(d.max()), 2))
        for image, d in ((cat, off), (narrower, rest))
    ]
    print("size, mean, max:", *found)
    test_eq(found, [((451, 300), 0.044, 0.75), ((450, 300), 0.007, 0.09)])
    print("columns 193 of 1154 and", round(193 * 336 / 768, 1), "of", shortest_size(cat, 336)[0])
    fig, axes = plt.subplots(1, 3, figsize=(8, 2.8), layout="constrained")
    for ax, shown, title in zip(axes, (small, direct), ("from 768", "directly")):
        ax.imshow(((shown + 2) / 4).clamp(0, 1).permute(1, 2, 0).numpy())
        ax.set_title(title, fontsize=9)
    drawn = axes[2].imshow(off.mean(0).numpy(), cmap="gray_r")
    axes[2].set_title("absolute difference", fontsize=9)
    fig.colorbar(drawn, ax=axes[2], label="standard deviations")
    for ax in axes: ax.set_xlabel("pixels", fontsize=8)

def test_wrong_filter_and_swapped_statistics_in_numbers():
    def bilinear(image):
        "The large tensor of an image, resized with the wrong filter."
        resized = image.resize(shortest_size(image, 768), Image.Resampling.BILINEAR)
        return normalize(to_bytes(center_crop(resized, 768)))

    drawn, photograph = sample_image(), Image.fromarray(skimage.data.coffee())
    swapped = dict(mean=OPENAI_CLIP_STD, std=OPENAI_CLIP_MEAN)
    found = {}
    for name, image, other in [
        ("bilinear, drawn", drawn, bilinear(drawn)),
        ("bilinear, photograph", photograph, bilinear(photograph)),
        ("swapped, drawn", drawn, prepare_image(drawn, **swapped)["image_aux"]),
    ]:
        off = (other - prepare_image(image)["image_aux"]).abs()
        found[name] = round(float(off.max()), 2), round(float(off.mean()), 3)
        print(f"{name:21} max {found[name][0]:.2f}, mean {found[name][1]:.3f}")
    test_eq(list(found.values()), [(0.40, 0.002), (0.48, 0.011), (1.23, 0.379)])

def test_bytes_are_finished_in_float32():
    pixels = to_bytes(resize_to_square(sample_image(), 768))[None]
    watch = "pixel_values_aux pixel_values_aux.nbytes done"
    with Breakpoint(finish_images, at='"pixel_values": grid_crops', watch=watch) as bp:
        finish_images(pixels, dtype=torch.bfloat16)
    bp.expect({"pixel_values_aux.nbytes": 3 * 768 * 768, "done.dtype": torch.float32})
    bp.expect_return({"pixel_values.dtype": torch.bfloat16})
    floats = sum(v.nbytes for v in prepare_image(sample_image()).values())
    test_eq(round(floats / pixels.nbytes, 1), 4.8)

def test_interpolating_bytes_first_rounds():
    def changed_by_rounding(image):
        "Share of pixels that differ if bytes are interpolated first, and the largest difference."
        pixels = to_bytes(resize_to_square(image, 768))[None]
        rounded = interpolate_image(pixels.float()).round().to(torch.uint8)
        off = (normalize(rounded) - finish_images(pixels)["pixel_values"]).abs().amax(1)
        return round(float((off > 1e-5).float().mean()), 3), round(float(off.max()), 4)

    drawn = changed_by_rounding(sample_image())
    photograph = changed_by_rounding(Image.fromarray(skimage.data.coffee()))
    print("drawn", drawn, " photograph", photograph)
    test_eq([drawn, photograph], [(0.116, 0.0075), (0.982, 0.0075)])

def test_an_animation_is_read_and_told():
    file, frames = io.BytesIO(), [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    with Breakpoint(image_warnings, at="return found", watch="depth frames format found") as bp:
        image_warnings(file, "two.gif")
    bp.expect({"found[0][0]": "image_animated"}, depth=8, frames=2, format="GIF")

def test_an_opened_file_is_turned_upright_too():
    phone = Path(tempfile.mkdtemp(), "phone.jpg")
    phone.write_bytes(saved_turned(sample_image().transpose(Image.Transpose.ROTATE_90), 6))
    with Breakpoint(_read_pil, at="image = turn_upright(", watch="image.size") as bp:
        by_file = read_image(Image.open(phone))
    test_eq(to_bytes(by_file), to_bytes(read_image(phone)))
    bp.expect({"image.size": (375, 500)}).expect_after({"image.size": (500, 375)})

def test_odd_names_deep_pixels_and_thin_pictures_are_refused():
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(np.array([[0, 300, 65535]], dtype=np.uint16)).save(Path(folder) / "deep.png")
        Image.new("F", (3, 2)).save(Path(folder) / "deep.tif")
        with Image.open(Path(folder) / "deep.png") as opened:
            for image in (open_image("deep.png", folder), read_image(opened)):
                test_eq([image.getpixel((k, 0))[0] for k in range(3)], [0, 1, 255])
        with expect_fail(DataError, contains="more than 8 bits a channel"):
            open_image("deep.tif", folder)
        for name in ("a\0.png", "x" * 5000):
            with expect_fail(DataError, contains="cannot be used"):
                open_image(name, folder)

def test_broken_notes_are_no_notes():
    good, rng = saved_turned(sample_image(40, 24), 6), np.random.default_rng(0)
    start = good.index(b"Exif\0\0") + 6
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(200):  # noise in the EXIF block: the pixels stay readable
            bad = bytearray(good)
            for k in rng.integers(start, start + 26, 4): bad[k] = rng.integers(256)
            Path(folder, "x.jpg").write_bytes(bad)
            assert sorted(open_image("x.jpg", folder).size) == [24, 40]
        for name in ("x.png", "x.tif", "x.webp"):
            note = Image.Exif()
            note[ExifTags.Base.Orientation] = 6
            sample_image(40, 24).save(Path(folder, name), exif=note)
            test_eq(open_image(name, folder).size, (24, 40))

def test_dtype_is_taken_at_the_end():
    bytes_ = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    half = finish_images(bytes_, 8, dtype=torch.bfloat16)
    test_eq([v.dtype for v in half.values()], [torch.bfloat16] * 2)
    for key, full in finish_images(bytes_, 8).items():
        assert torch.equal(half[key], full.bfloat16())

def test_bad_files_are_refused_with_their_path():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        root.mkdir()
        sample_image(31, 17).save(root / "good.png")
        (root / "broken.png").write_bytes((root / "good.png").read_bytes()[:60])
        (root / "text.jpg").write_text("not an image")
        sample_image(31, 17).save(Path(folder) / "outside.png")
        good = open_image("good.png", root)
        test_eq((good.size, good.mode), ((31, 17), "RGB"))
        for name, message in [
            ("gone.png", "no image 'gone.png'"),
            ("broken.png", "'broken.png' cannot be read"),
            ("text.jpg", "'text.jpg' cannot be read"),
            ("../outside.png", "leaves the image folder"),
            (str(Path(folder) / "outside.png"), "leaves the image folder"),
        ]:
            with expect_fail(DataError, contains=message): open_image(name, root)
        with expect_fail(DataError, contains="no image_folder says where it is"):
            open_image("good.png", None)
        with (
            patch.object(Image, "MAX_IMAGE_PIXELS", 100),
            expect_fail(DataError, contains="more than 100 pixels"),
        ):
            open_image("good.png", root)

def test_every_mode_becomes_rgb():
    with tempfile.TemporaryDirectory() as folder:
        for mode in ("L", "P", "RGBA", "1", "CMYK"):
            name = "x.tif" if mode == "CMYK" else "x.png"
            sample_image(8, 6).convert(mode).save(Path(folder) / name)
            test_eq(open_image(name, folder).mode, "RGB")

def test_links_are_followed_inside_the_folder_and_outside_with_a_word():
    folder = Path(tempfile.mkdtemp())
    for name in ("images/real", "coco"): (folder / name).mkdir(parents=True)
    root = folder / "images"
    for name in ("images/real/a.png", "coco/b.png"):
        sample_image(31, 17).save(folder / name)
    (root / "near").symlink_to(root / "real")
    (root / "near.png").symlink_to("real/a.png")
    (root / "far").symlink_to(folder / "coco")
    (root / "far.png").symlink_to("../coco/b.png")
    (root / "dangling.png").symlink_to(folder / "gone.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (folder / "alias").symlink_to(root)
    read, link, gone = None, "leads out of the image folder", "no image"
    leaves = "leaves the image folder"
    table = [  # name, without and with `follow_links`
        ("real/a.png", read, read),
        ("near/a.png", read, read),
        ("near.png", read, read),
        ("./near.png", read, read),
        (str(root / "near.png"), read, read),
        ("far/b.png", link, read),
        ("far.png", link, read),
        (str(root / "far.png"), link, read),
        ("dangling.png", link, gone),
        ("far/gone.png", link, gone),
        ("near/gone.png", gone, gone),
        ("../coco/b.png", leaves, leaves),
        ("far/../coco/b.png", leaves, leaves),
        ("real/../near.png", leaves, leaves),
        (str(folder / "coco/b.png"), leaves, leaves),
    ]
    for name, *expected in table:
        for home in (root, folder / "alias"):
            if home != root and name.startswith(str(root / "far")):
                continue  # of another name
            for follow, message in zip((False, True), expected):
                wanted = expect_fail(DataError, contains=message) if message else nullcontext()
                with wanted: read_image(name, home, follow_links=follow)
    with expect_fail(DataError): open_image("loop.png", root)
    test_eq(read_image(root / "far.png").size, (31, 17))  # a program's own path

def test_orientation_notes_are_obeyed():
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(10):  # 0 and 9 mean nothing
            Path(folder, "x.jpg").write_bytes(saved_turned(sample_image(40, 24), turn))
            with Image.open(Path(folder, "x.jpg")) as image:
                want = ImageOps.exif_transpose(image).convert("RGB")
                stored = image.convert("RGB")
            test_eq(np.asarray(open_image("x.jpg", folder)), np.asarray(want))
            test_eq(np.asarray(open_image("x.jpg", folder, upright=False)), np.asarray(stored))
            test_eq(open_image("x.jpg", folder).size, (24, 40) if turn in (5, 6, 7, 8) else (40, 24))
        for turn in range(1, 9):  # an image that was read is not turned again
            for suffix in ("jpg", "png", "tif", "webp"):
                path, note = Path(folder, f"x.{suffix}"), Image.Exif()
                note[ExifTags.Base.Orientation] = turn
                sample_image(40, 24).save(path, exif=note)
                for upright in (True, False):
                    once = open_image(path.name, folder, upright)
                    assert upright or suffix == "tif" or once.size == (40, 24)  # Pillow turns TIFF
                    test_eq(np.asarray(read_image(once)), np.asarray(once))
                test_eq(np.asarray(read_image(Image.open(path))), np.asarray(read_image(path)))

def test_transparent_parts_are_white():
    letters = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    ImageDraw.Draw(letters).text((8, 12), "BLACK", fill=(0, 0, 0, 255))
    most = sorted(on_white(letters).convert("RGB").getcolors())[-1]
    print("dropped:", letters.convert("RGB").getcolors(), " on white:", most)
    with tempfile.TemporaryDirectory() as folder:
        letters.save(Path(folder) / "x.png")
        test_eq(open_image("x.png", folder).getpixel((0, 0)), (255, 255, 255))
        # the letters are seen; without alpha nothing is
        assert open_image("x.png", folder).getextrema()[0][0] < 64
        assert len(letters.convert("RGB").getcolors()) == 1
        palette = sample_image(40, 24).quantize(8)
        palette.save(Path(folder) / "p.png", transparency=palette.getpixel((0, 0)))
        test_eq(open_image("p.png", folder).getpixel((0, 0)), (255, 255, 255))
        sample_image(40, 24).convert("RGBA").save(Path(folder) / "o.png")
        # opaque: not a byte changes
        test_eq(np.asarray(open_image("o.png", folder)), np.asarray(sample_image(40, 24)))

def test_square_cuts_and_pad_keeps():
    photo = sample_image(500, 375)
    test_eq(resize_to_square(photo, 336).size, (336, 336))
    bars = np.asarray(resize_to_square(photo, 336, "pad"))
    # a bar above, in the mean color
    test_eq(bars[5, 5].tolist(), [int(255 * m) for m in OPENAI_CLIP_MEAN])
    assert bars[168, 168].tolist() != bars[5, 5].tolist()
    test_eq(expand2square(sample_image(3, 8), (1, 2, 3)).getpixel((0, 0)), (1, 2, 3))
    with expect_fail(ConfigError, contains="aspect must be"):
        resize_to_square(photo, 336, "stretch")
    with expect_fail(DataError, contains="image of 0 x 5 pixels is empty"):
        resize_to_square(Image.new("RGB", (0, 5)), 336)
    # a thin picture is a bomb too: 1 x 50,000 would become 768 x 38,400,000
    for aspect in ("square", "pad"):
        with expect_fail(DataError, contains="too long and thin"):
            resize_to_square(Image.new("RGB", (1, 50_000)), 768, aspect)

def test_cutting_between_the_passes_changes_no_byte():
    rng = np.random.default_rng(0)
    sizes = [(500, 375), (300, 400), (240, 320), (336, 500), (500, 336), (333, 334), (640, 481)]
    sizes += [(77, 300), (300, 77), (768, 768), (767, 900), (1001, 769), (269, 767)]
    for width, height in sizes + [tuple(map(int, rng.integers(20, 400, 2))) for _ in range(30)]:
        for size in (96, 336, 500):
            picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            test_eq(
                np.asarray(resize_and_crop(picture, size)),
                np.asarray(center_crop(resize_shortest(picture, size), size)),
            )

def test_interpolation_matches_areas_not_corners():
    ramp = torch.tensor([0.0, 1.0, 2.0, 9.0]).expand(1, 3, 4, 4)
    small = interpolate_image(ramp, 2)
    print(small[0, 0, 0].tolist())
    test_close(small[0, 0, 0], torch.tensor([0.5, 5.5]))
    corners = F.interpolate(ramp, (2, 2), mode="bilinear", align_corners=True)
    test_close(corners[0, 0, 0], torch.tensor([0.0, 9.0]))

def test_crops_come_in_reading_order_and_the_whole_last():
    torch.manual_seed(0)
    two = torch.rand(2, 3, 96, 96)  # two pictures of one record
    crops = grid_crops(two, image_size=24, image_grid=2, image_global=True)
    test_eq(tuple(crops.shape), (2, 5, 3, 24, 24))
    large = F.interpolate(two, (48, 48), mode="bilinear", align_corners=False)
    for n, (y, x) in enumerate([(0, 0), (0, 24), (24, 0), (24, 24)]):
        test_eq(crops[:, n], large[:, :, y : y + 24, x : x + 24])
    test_eq(crops[:, 4], F.interpolate(large, (24, 24), mode="bilinear", align_corners=False))
    test_eq(grid_crops(two[0], 24, 2, True), crops[0])  # one picture: (crops, 3, height, width)
    test_eq(grid_crops(two, 24, 2), crops[:, :4])
    test_eq(grid_crops(two, 24), interpolate_image(two, 24))  # no grid: no axis of crops
    with expect_fail(ConfigError, contains="image_global needs"):
        grid_crops(two, 24, 1, True)
    with expect_fail(ConfigError, contains="image_grid must be at least 1"):
        grid_crops(two, 24, 0)

def test_rows_are_known_without_pixels():
    grids = [count_image_tokens(image_grid=2), count_image_tokens(image_grid=2, image_global=True)]
    test_eq([count_image_tokens(), *grids], [576, 2304, 2880])
    with expect_fail(ConfigError, contains="not a multiple"):
        count_image_tokens(336, 16 + 1)

def test_plain_reshape_makes_strips():
    crops = grid_crops(quarters_of(48), 24, 2)
    strips = interpolate_image(quarters_of(48), 48).reshape(4, 3, 24, 24)
    assert strips.shape == crops.shape
    assert all(float(crop.flatten(1).std(1).max()) == 0 for crop in crops)  # each one color
    assert any(float(strip.flatten(1).std(1).max()) > 0 for strip in strips)

def test_shapes_of_the_seed():
    out = prepare_image(sample_image())
    test_eq([tuple(out[k].shape) for k in ("image_aux", "image")], [(3, 768, 768), (3, 336, 336)])
    test_eq([out[k].dtype for k in ("image_aux", "image")], [torch.float32] * 2)
    hd = prepare_image(sample_image(), 1536, image_grid=2, image_global=True)
    test_eq([tuple(hd[k].shape) for k in ("image_aux", "image")], [(3, 1536, 1536), (5, 3, 336, 336)])

def test_what_is_lost_is_told_for_each_kind_of_file():
    def told(image, format, **options):
        "Kinds of warnings of an image file."
        file = io.BytesIO()
        image.save(file, format, **options)
        kinds = [kind for kind, _ in image_warnings(file, "x")]
        with tempfile.TemporaryDirectory() as folder:  # by path the same
            Path(folder, "x").write_bytes(file.getvalue())
            test_eq([kind for kind, _ in image_warnings(Path(folder, "x"))], kinds)
        return kinds

    cat, more = Image.fromarray(skimage.data.chelsea()), [Image.new("RGB", (451, 300), "red")]
    deep = Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3))
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        test_eq(told(cat, format), [])
    for format in ("PNG", "TIFF", "PPM"):
        test_eq(told(deep, format), ["image_16bit"])
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        test_eq(told(cat, format, save_all=True, append_images=more), ["image_animated"])
    test_eq(told(cat, "MPO", save_all=True, append_images=more), [])
    colors = b"P6 1 1 65535 " + bytes(6)
    test_eq(image_warnings(io.BytesIO(colors))[0][0], "image_16bit")
    file = io.BytesIO()
    cat.save(file, "JPEG")
    short = file.getvalue()[: len(file.getvalue()) // 2] + b"\xff\xd9"
    test_eq([kind for kind, _ in image_warnings(io.BytesIO(short))], ["image_cut_short"])
    for bad in (b"", b"text", file.getvalue()[:30]):
        with expect_fail(DataError): image_warnings(io.BytesIO(bad), "x")

def test_one_color_survives_every_resize():
    gray = prepare_image(Image.new("RGB", (90, 50), (128, 128, 128)))
    print([round(float(c.mean()), 4) for c in gray["image"]])
    expected = [(128 / 255 - m) / s for m, s in zip(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)]
    for tensor in gray.values():
        for channel, value in zip(tensor, expected):
            test_close(channel, torch.full_like(channel, value), eps=1e-5)

def test_equal_to_clip_image_processor_and_interpolate():
    clip = CLIPImageProcessorPil(size={"shortest_edge": 768}, crop_size={"height": 768, "width": 768})
    rng = np.random.default_rng(0)
    worst = 0.0
    for width, height in [(500, 375), (375, 500), (64, 64), (769, 1001), (33, 100), (1200, 30)]:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for aspect in ("square", "pad"):
            reference = picture
            if aspect == "pad":
                reference = expand2square(picture, tuple(int(m * 255) for m in clip.image_mean))
            aux = clip.preprocess(reference, return_tensors="pt")["pixel_values"][0]
            low = F.interpolate(aux[None], (336, 336), mode="bilinear", align_corners=False)[0]
            ours = prepare_image(picture, aspect=aspect)
            for key, want in (("image_aux", aux), ("image", low)):
                worst = max(worst, float((ours[key] - want).abs().max()))
    print("within 1e-5:", worst < 1e-5)
    assert worst < 1e-5

def test_bytes_finished_later_equal_the_float_path():
    rng = np.random.default_rng(1)
    for width, height in [(500, 375), (33, 100), (769, 1001), (64, 64), (1, 7)]:
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for aspect in ("square", "pad"):
            ours = finish_images(to_bytes(resize_to_square(picture, 768, aspect))[None])
            floats = prepare_image(picture, aspect=aspect)
            for batch, one in [("pixel_values", "image"), ("pixel_values_aux", "image_aux")]:
                assert float((ours[batch][0] - floats[one]).abs().max()) < 1e-5
    stored = to_bytes(resize_to_square(picture, 768)).nbytes
    test_eq(round(sum(v.nbytes for v in floats.values()) / stored, 1), 4.8)  # a fifth of the bytes
    with expect_fail(DataError, contains="must be bytes"):
        finish_images(torch.zeros(1, 3, 8, 8))

def test_committed_image_benchmark_meets_its_bar():
    results = next(p for p in (Path("../benchmarks/results"), Path("benchmarks/results")) if p.is_dir())
    all_sets = json.loads((results / "image_path.json").read_text())
    measured = all_sets["typical"]
    assert measured["ratios"]["pillow"] >= 2.5 and measured["ratios"]["torch"] >= 5
    assert all_sets["12 megapixels"]["ratios"]["torch_draft"] >= 4
    for own in (measured, all_sets["large"], all_sets["12 megapixels"]):
        for name, ratio in own["ratios"].items():
            assert ratio == own["seconds"]["reference"] / own["seconds"][name]
        # of what both paths give, after the device's part
        assert own["largest_difference"] < 1e-5
        assert own["gray_levels"]["torch"]["largest"] <= 2
    stages = measured["stages"]["pillow"]
    assert max(stages, key=stages.get) == "resize"

def test_images_come_in_any_form():
    folder, image_in = Path(tempfile.mkdtemp()), sample_image(90, 60)
    path = folder / "any.png"
    image_in.save(path)
    forms = image_in, path, str(path), to_bytes(image_in), Image.open(path)
    pixels = [to_bytes(read_image(p)) for p in forms]
    print(tuple(pixels[0].shape), all(torch.equal(p, pixels[0]) for p in pixels))
    for p in pixels[1:]: test_eq(p, pixels[0])
    test_eq(to_bytes(read_image("any.png", folder)), pixels[0])
    # what shines through is white
    test_eq(read_image(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    image_in.save(folder / "turned.jpg", exif=exif)
    for form in (folder / "turned.jpg", Image.open(folder / "turned.jpg")):
        test_eq(read_image(form).size, (60, 90))
    with expect_fail(DataError, contains="leaves the image folder"):
        read_image("../any.png", folder / "..")
    with expect_fail(DataError, contains="no image 'b.png'"):
        read_image(folder / "b.png")
    with expect_fail(DataError, contains="got float32 (3, 4, 4)"):
        read_image(torch.zeros(3, 4, 4))
    with expect_fail(DataError, contains="got bytes"): read_image(b"png")
    script = io.BytesIO()
    image_in.save(script, "EPS")
    with expect_fail(DataError, contains="is in the format EPS"):  # opened elsewhere, not yet read
        read_image(Image.open(script))
    with expect_fail(DataError, contains="more than 8 bits"):
        read_image(Image.new("F", (2, 2)))

def test_crops_of_two_sizes_begin_at_other_places():
    cat = Image.new("RGB", (451, 300))
    widths = [shortest_size(cat, size)[0] for size in (768, 336)]
    test_eq([(w, (w - size) // 2) for w, size in zip(widths, (768, 336))], [(1154, 193), (505, 84)])
