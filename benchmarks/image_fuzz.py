"""Damage image files of all formats that Pillow writes, and read them: does anything but a
`DataError` come out?

    python benchmarks/image_fuzz.py             25,000 tries per file
                                                -> benchmarks/results/image_fuzz.json
    python benchmarks/image_fuzz.py --n 1000    fewer, nothing written

A try replaces one to eight bytes, more often near the begin, where headers are, and cuts the end
off in a quarter of the tries; then `decode_image` reads the bytes and, if they could be read,
`image_warnings` looks at them. Each file has a process of its own, so a decoder that ends the
process is seen as well. A seed makes the same tries again.
"""

import argparse, collections, io, json, multiprocessing, os, platform, random, sys, time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
import numpy as np
from PIL import Image
from vlm_lit.core import DataError
from vlm_lit.images import decode_image, image_warnings, sample_image

RESULT = Path(__file__).resolve().parent / "results/image_fuzz.json"
MODES = {"MSP": "1", "PALM": "P", "XBM": "1", "SPIDER": "F"}  # what cannot be written as RGB
VARIANTS = {  # name -> format, mode and options of a second file of a format
    "JPEG progressive": ("JPEG", "RGB", {"progressive": True}),
    "JPEG CMYK": ("JPEG", "CMYK", {}),
    "PNG palette": ("PNG", "P", {}),
    "PNG 16 bits": ("PNG", "I;16", {}),
    "GIF animated": ("GIF", "P", {"save_all": True}),
    "WEBP lossless": ("WEBP", "RGBA", {"lossless": True}),
    "WEBP animated": ("WEBP", "RGB", {"save_all": True}),
    "TIFF LZW": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "TIFF JPEG": ("TIFF", "RGB", {"compression": "jpeg"}),
    "TIFF deflate": ("TIFF", "RGB", {"compression": "tiff_deflate"}),
    "TIFF group 4": ("TIFF", "1", {"compression": "group4"}),
    "TIFF 16 bits": ("TIFF", "I;16", {}),
    "BMP palette": ("BMP", "P", {}),
    "PPM gray": ("PPM", "L", {}),
}

def variants():
    "All files: name -> format, mode, options."
    Image.init()
    plain = {name: (name, MODES.get(name, "RGB"), {}) for name in sorted(Image.SAVE)}
    return {**plain, **{k: v for k, v in VARIANTS.items() if v[0] in Image.SAVE}}

def written(format, mode, options):
    "The bytes of a file; None if this Pillow cannot write it."
    image, file = sample_image(40, 28), io.BytesIO()
    note = Image.Exif()
    note[0x0112] = 6
    if mode == "I;16":
        image = Image.fromarray(np.arange(1120, dtype=np.uint16).reshape(28, 40))
    else: image = image.convert(mode)
    if options.get("save_all"):
        options = {**options, "append_images": [image.rotate(90)]}
    if format in ("JPEG", "PNG", "WEBP", "TIFF"):
        options = {**options, "exif": note}
    try: image.save(file, format, **options)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # stubs, missing libraries
    return file.getvalue()

def damaged(data, rng, most=8):
    "The bytes with up to `most` of them replaced, perhaps cut off."
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        end = len(out) if rng.random() < 0.5 else min(len(out), 256)
        out[rng.randrange(end)] = rng.randrange(256)
    return bytes(out[: rng.randrange(len(out))] if rng.random() < 0.25 else out)

def attempt(data):
    "What comes of it: read, refused, or the error that passed through."
    try:
        decode_image(io.BytesIO(data), "x")
        image_warnings(io.BytesIO(data), "x")
        return "read"
    except DataError: return "refused"
    except Exception as e: return f"{type(e).__module__}.{type(e).__name__}"

def run_one(name, n, seed):
    "All tries of a file: how many of each outcome, and the longest in seconds."
    warnings.simplefilter("ignore")
    data = written(*variants()[name])
    if data is None: return None
    rng, found, longest = random.Random(f"{seed} {name}"), collections.Counter(), 0.0
    for _ in range(n):
        began = time.process_time()
        found[attempt(damaged(data, rng))] += 1
        longest = max(longest, time.process_time() - began)
    return {"tries": n, **found, "longest_seconds": round(longest, 3)}

def hush():
    "What libraries write to the terminal of this process goes nowhere."
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

def run_all(n, seed):
    "Every file in a process of its own."
    rows, fork = {}, multiprocessing.get_context("fork")
    for name in variants():
        with ProcessPoolExecutor(1, fork, hush) as pool:
            try: row = pool.submit(run_one, name, n, seed).result()
            except BrokenProcessPool: row = {"ended the process": 1}
        if row is None: continue
        rows[name] = row
        print(f"{name:18}", *(f"{key} {value:,}" for key, value in row.items()), flush=True)
    return rows

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=25_000, help="tries per file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = run_all(args.n, args.seed)
    usual = {"tries", "read", "refused", "longest_seconds"}
    bad = {name: row for name, row in rows.items() if row.keys() - usual}
    tries = sum(row.get("tries", 0) for row in rows.values())
    print(f"{len(rows)} files, {tries:,} tries, {bad or 0} bad")
    if args.n >= 25_000:
        result = {
            "command": "python benchmarks/image_fuzz.py",
            "seed": args.seed,
            "files": rows,
            "bad": len(bad),
            "versions": {"python": platform.python_version(), "pillow": version("pillow")},
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(bad))

if __name__ == "__main__": main()
