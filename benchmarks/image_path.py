"""Time the image path, from a file to what the device needs, against the reference. One thread.

    python benchmarks/image_path.py            -> benchmarks/results/image_path.json
    python benchmarks/image_path.py --quick    a few pictures, nothing written

Reference: what MGM does: open, RGB, `CLIPImageProcessor` at 768 (transformers' Pillow version),
clone, interpolate to 336.
Ours: `open_image`, `resize_to_square`, `to_bytes`: the squared bytes; the device normalizes and
interpolates (`finish_images`).
Pictures are generated: 1/f noise with flat shapes and edges, JPEG of quality 90, in the sizes of
LLaVA's pretraining data (CC3M with a shorter edge of 336, COCO), and larger ones.
"""

import argparse, json, os, platform, statistics, tempfile, time
from importlib.metadata import version
from pathlib import Path
import numpy as np, torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vlm_lit.images import finish_images, resize_to_square, open_image, to_bytes

RESULT = Path(__file__).resolve().parent / "results/image_path.json"
SETS = {"typical": [(448, 336), (336, 448), (500, 336), (336, 500), (504, 336)]}
SETS["typical"] += [(500, 375), (375, 500), (640, 427), (640, 480), (480, 640)]
SETS["large"] = [(1024, 768), (768, 1024), (1600, 1200)]
CLIP = CLIPImageProcessorPil(size={"shortest_edge": 768}, crop_size={"height": 768, "width": 768})

def picture(
    width,  # Pixels
    height,  # Pixels
    rng,  # numpy's
):
    "A picture with the statistics of a photograph: noise at every scale, and things with edges."
    out = torch.zeros(3, height, width)
    for step in (2, 4, 8, 16, 32, 64, 128):
        coarse = torch.from_numpy(
            rng.normal(size=(1, 3, height // step + 2, width // step + 2)).astype(np.float32)
        )
        out += step**0.9 * F.interpolate(coarse, (height, width), mode="bicubic")[0]
    image = Image.fromarray(
        ((out - out.mean()) / out.std() * 48 + 118)
        .clamp(0, 255)
        .to(torch.uint8)
        .permute(1, 2, 0)
        .numpy()
    )
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = (rng.random(4) * [width, height, width / 3, height / 3]).astype(int).tolist()
        draw.rectangle([x, y, x + w, y + h], fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image

def reference(path):
    "MGM's `_sample_item`, for one picture: `image` and `image_aux`."
    image = CLIP.preprocess(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0]
    small = F.interpolate(image[None], size=[336, 336], mode="bilinear", align_corners=False)
    return small[0], image.clone()

def ours(path):
    "The squared bytes."
    return to_bytes(resize_to_square(open_image(path.name, path.parent), 768))

def difference(path):
    "How far the two are apart at most, after the device's part."
    (image, image_aux), done = reference(path), finish_images(ours(path)[None])
    return max(
        float((done["pixel_values"][0] - image).abs().max()),
        float((done["pixel_values_aux"][0] - image_aux).abs().max()),
    )

def clock(f, *args):
    "Processor seconds of a call, and its result; time that other programs took does not count."
    began = time.process_time()
    out = f(*args)
    return time.process_time() - began, out

def reference_parts(path):
    "Seconds of each part, run on its real input."
    opened, image = clock(lambda: Image.open(path).convert("RGB"))
    resized, _ = clock(
        lambda: CLIP.preprocess(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    )
    whole, pixels = clock(lambda: CLIP.preprocess(image, return_tensors="pt")["pixel_values"][0])
    copied, _ = clock(pixels.clone)
    sizes = dict(size=[336, 336], mode="bilinear", align_corners=False)
    interpolated, _ = clock(lambda: F.interpolate(pixels[None], **sizes)[0])
    return {
        "decode": opened,
        "resize": resized,
        "normalize": whole - resized,
        "copy": copied,
        "interpolate": interpolated,
    }

def our_parts(path):
    "Likewise."
    opened, image = clock(open_image, path.name, path.parent)
    resized, square = clock(resize_to_square, image, 768)
    packed, _ = clock(to_bytes, square)
    return {"decode": opened, "resize": resized, "to tensor": packed}

def measure_set(
    folder,  # Of the JPEG files
    repeats,  # How often each is timed; the median counts
):
    "Mean seconds a picture of both paths, with their parts, and how far their results differ."
    paths = sorted(folder.glob("*.jpg"))
    far = max(difference(path) for path in paths)  # also warms the file cache
    whole = {
        "reference": reference,
        "ours": ours,
        "decode_only": lambda path: Image.open(path).convert("RGB"),
    }
    rounds = []
    # whole passes in turns: both paths meet the same machine, neither the other's memory
    for _ in range(repeats):
        times = {name: [clock(f, path)[0] for path in paths] for name, f in whole.items()}
        times["parts of reference"] = [reference_parts(path) for path in paths]
        times["parts of ours"] = [our_parts(path) for path in paths]
        rounds.append(times)

    def mean(pick):
        middle = [statistics.median(pick(r, n) for r in rounds) for n in range(len(paths))]
        return statistics.fmean(middle)

    seconds = {name: mean(lambda r, n: r[name][n]) for name in whole}
    parts = {
        side: {
            name: mean(lambda r, n: r[f"parts of {side}"][n][name])
            for name in rounds[0][f"parts of {side}"][0]
        }
        for side in ("reference", "ours")
    }
    return {
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "ratio": seconds["reference"] / seconds["ours"],
        "decode_only_ratio": seconds["reference"] / seconds["decode_only"],
        "largest_difference": far,
        "n": len(paths),
        "repeats": repeats,
        "stages": parts,
    }

def measure(
    quick=False,  # One picture a size and few repeats
):
    """Both paths over generated JPEG files, one thread: processor seconds a picture, ratio, parts,
    machine, versions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rng, out = np.random.default_rng(0), {}
            for name, sizes in SETS.items():
                (Path(folder) / name).mkdir()
                for n, (width, height) in enumerate(sizes * (1 if quick or name == "large" else 3)):
                    picture(width, height, rng).save(Path(folder) / name / f"{n}.jpg", quality=90)
                out[name] = {
                    "sizes": [list(size) for size in sizes],
                    **measure_set(Path(folder) / name, 3 if quick else 9),
                }
    finally: torch.set_num_threads(threads)
    names = ("vlm_lit", "torch", "transformers", "pillow", "numpy")
    return {
        "command": "python benchmarks/image_path.py",
        **out,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, 1 thread",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in names}},
    }

def table(result):
    "The result as lines of text."
    head = f"{'set':10}{'reference':>12}{'ours':>12}{'decode only':>14}{'ratio':>8}{'n':>5}"
    lines = [head]
    for name in SETS:
        if name not in result: continue
        r = result[name]
        lines.append(
            f"{name:10}{r['reference_seconds'] * 1e3:9.1f} ms{r['ours_seconds'] * 1e3:9.1f} "
            f"ms{r['decode_only_seconds'] * 1e3:11.1f} ms{r['ratio']:8.2f}{r['n']:5}"
        )
    return "\n".join(lines)

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few pictures, nothing written")
    args = parser.parse_args()
    result = measure(args.quick)
    print(table(result))
    if not args.quick: RESULT.write_text(json.dumps(result, indent=1) + "\n")

if __name__ == "__main__": main()
