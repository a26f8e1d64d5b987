"""Time the image path on real photographs, against the reference. One thread.

    python benchmarks/image_path.py            -> benchmarks/results/image_path.json
    python benchmarks/image_path.py --quick    few photographs, nothing written

Reference: what MGM does: open, RGB, `CLIPImageProcessor` at 768 (transformers' Pillow version),
clone, interpolate to 336.
Ours: from a file to the squared bytes; the device normalizes and interpolates (`finish_images`).
Three settings: `resize="pillow"`, `resize="torch"`, and torch with `jpeg_draft`.
Photographs: those in scikit-image, scikit-learn and matplotlib, scaled to the sizes of LLaVA's
pretraining data (CC3M with a shorter edge of 336, COCO), JPEG of quality 90. Larger ones are laid
side by side from them, so that the pixels are a camera's. Every round times all paths on each
file one after the other; the median of the rounds counts, in processor time.
The whole way: the same JPEG files through `LazySupervisedDataset`, a DataLoader with workers and
the collator to batches, images per second by the wall, against the reference in a DataLoader.
"""

import argparse, importlib.util, json, os, platform, statistics, tempfile, time
from importlib.metadata import version
from pathlib import Path
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from vlm_lit.data.collator import DataCollatorForSupervisedDataset
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.image_processor import VLMImageProcessor
from vlm_lit.images import open_image
from vlm_lit.processor import VLMProcessor
from vlm_lit.text.encode import pad_id
from vlm_lit.text.tokenizer import load_tokenizer

RESULT = Path(__file__).resolve().parent / "results/image_path.json"
SETS = {"typical": [(448, 336), (336, 448), (500, 336), (336, 500), (504, 336)]}
SETS["typical"] += [(500, 375), (375, 500), (640, 427), (640, 480), (480, 640)]
SETS["large"] = [(1024, 768), (768, 1024), (1600, 1200)]
SETS["12 megapixels"] = [(4000, 3000), (3000, 4000)]
OURS = {"pillow": {}, "torch": {"resize": "torch"}}
OURS["torch_draft"] = {"resize": "torch", "jpeg_draft": True}
PROCESSORS = {name: VLMImageProcessor(**settings) for name, settings in OURS.items()}
CLIP = CLIPImageProcessorPil(size={"shortest_edge": 768}, crop_size={"height": 768, "width": 768})
PHOTOGRAPHS = {
    "skimage/data": "astronaut.png chelsea.png coffee.png motorcycle_left.png rocket.jpg",
    "sklearn/datasets/images": "china.jpg flower.jpg",
    "matplotlib/mpl-data/sample_data": "grace_hopper.jpg",
}

def photographs():
    "Real photographs of the packages that are installed, RGB."
    found = []
    for folder, names in PHOTOGRAPHS.items():
        package, _, rest = folder.partition("/")
        if (spec := importlib.util.find_spec(package)) is None: continue
        paths = [Path(spec.origin).parent / rest / name for name in names.split()]
        found += [Image.open(path).convert("RGB") for path in paths if path.is_file()]
    return found

def fitted(photo, width, height):
    "The middle of a photograph, scaled to a size; from a larger one, so that it stays sharp."
    scale = max(width / photo.width, height / photo.height)
    size = [max(round(edge * scale), least) for edge, least in zip(photo.size, (width, height))]
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    resized = photo.resize(size, Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + width, top + height))

def mosaic(photos, width, height):
    "Photographs side by side at their own size."
    out, n, y = Image.new("RGB", (width, height)), 0, 0
    while y < height:
        x = 0
        while x < width:
            photo = photos[n % len(photos)]
            out.paste(photo, (x, y))
            x, n = x + photo.width, n + 1
        y += 300
    return out

def write_set(folder, name, photos, quick):
    "JPEG files of a set."
    folder.mkdir()
    for n, (width, height) in enumerate(SETS[name]):
        if name == "typical":
            own = photos[:2] if quick else photos
            images = [fitted(photo, width, height) for photo in own]
        else: images = [mosaic(photos[n:] + photos[:n], width, height)]
        for k, image in enumerate(images):
            image.save(folder / f"{n}-{k}.jpg", quality=90)

def reference(path):
    "MGM's `_sample_item`, for one image: `image` and `image_aux`."
    image = CLIP.preprocess(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0]
    small = F.interpolate(image[None], size=[336, 336], mode="bilinear", align_corners=False)
    return small[0], image.clone()

def ours(path, name):
    "The squared bytes, by one of the settings."
    own = PROCESSORS[name]
    return own.square(open_image(path.name, path.parent, least=own.least))

def levels(path, name):
    "Largest and mean difference from the reference's large square, in gray levels."
    want = reference(path)[1]
    off = (PROCESSORS[name].normalize_square(ours(path, name)) - want).abs()
    off = off * torch.tensor(CLIP.image_std)[:, None, None] * 255
    return float(off.max()), float(off.mean())

def difference(path):
    "How far `pillow` is from the reference at most, after the device's part."
    (image, image_aux), done = (
        reference(path),
        PROCESSORS["pillow"].finish(ours(path, "pillow")[None]),
    )
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

def our_parts(path, name):
    "Likewise; the square includes its way to a tensor."
    own = PROCESSORS[name]
    opened, image = clock(lambda: open_image(path.name, path.parent, least=own.least))
    resized, _ = clock(own.square, image)
    return {"decode": opened, "resize": resized}

def one_round(paths):
    "Seconds of each path on each file, one after the other, and of its parts."
    rows = []
    for path in paths:
        row = {"reference": clock(reference, path)[0]}
        row |= {name: clock(ours, path, name)[0] for name in OURS}
        row["decode_only"] = clock(lambda: Image.open(path).convert("RGB"))[0]
        row["parts"] = {"reference": reference_parts(path)}
        row["parts"] |= {name: our_parts(path, name) for name in OURS}
        rows.append(row)
    return rows

def measure_set(folder, repeats):
    "Mean seconds per image of all paths, with their parts, and how far their results differ."
    paths = sorted(folder.glob("*.jpg"))
    far = max(difference(path) for path in paths)  # also warms the file cache
    rounds = [one_round(paths) for _ in range(repeats)]

    def mean(pick):
        middle = [statistics.median(pick(r[n]) for r in rounds) for n in range(len(paths))]
        return statistics.fmean(middle)

    names = ("reference", *OURS, "decode_only")
    seconds = {name: mean(lambda row: row[name]) for name in names}
    parts = {
        side: {key: mean(lambda row: row["parts"][side][key]) for key in own}
        for side, own in rounds[0][0]["parts"].items()
    }
    found = {name: [levels(path, name) for path in paths] for name in OURS}
    return {
        "seconds": seconds,
        "ratios": {name: seconds["reference"] / seconds[name] for name in OURS},
        "ratio": seconds["reference"] / seconds["pillow"],
        "decode_only_ratio": seconds["reference"] / seconds["decode_only"],
        "largest_difference": far,
        "gray_levels": {
            name: {"largest": round(max(a for a, _ in own)), "mean": max(b for _, b in own)}
            for name, own in found.items()
        },
        "n": len(paths),
        "repeats": repeats,
        "stages": parts,
    }

class Reference(Dataset):
    "MGM's images of some files."

    def __init__(self, paths): self.paths = paths

    def __len__(self): return len(self.paths)

    def __getitem__(self, n): return reference(self.paths[n])

def one_thread(worker):
    "For a DataLoader's worker."
    torch.set_num_threads(1)

def loaders(folder, paths, n_workers):
    "DataLoaders of the reference and of ours, over the same files."
    options = dict(batch_size=16, num_workers=n_workers, worker_init_fn=one_thread)
    found = {"reference": DataLoader(Reference(paths), **options)}
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A photo."},
    ]
    records = [{"id": n, "image": p.name, "conversations": turns} for n, p in enumerate(paths)]
    tokenizer = load_tokenizer("gemma")
    collate = DataCollatorForSupervisedDataset(pad_id(tokenizer))
    for name, settings in OURS.items():
        own = VLMProcessor(tokenizer, **settings)
        data = LazySupervisedDataset(records, own, folder, uint8=True)
        found[name] = DataLoader(data, collate_fn=collate, **options)
    return found

def images_per_second(loader, n):
    "By the wall, from the first batch that is asked for to the last that comes."
    began = time.perf_counter()
    for _ in loader: pass
    return n / (time.perf_counter() - began)

def measure_loaders(folder, repeats, n_workers, copies):
    "Images per second by the wall of the whole way, in rounds."
    paths = sorted(folder.glob("*.jpg")) * copies
    made, rounds = loaders(folder, paths, n_workers), []
    for _ in range(repeats):
        rounds.append({name: images_per_second(own, len(paths)) for name, own in made.items()})
    speed = {name: statistics.median(r[name] for r in rounds) for name in made}
    ratios = {name: statistics.median(r[name] / r["reference"] for r in rounds) for name in OURS}
    return {
        "images_per_second": speed,
        "ratios": ratios,
        "n": len(paths),
        "workers": n_workers,
        "repeats": repeats,
    }

def measure(quick=False):
    "All sets and the whole way, one thread per process: ratios, parts, machine, versions."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    photos, out = photographs(), {}
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for key, sizes in SETS.items():
                write_set(folder / key, key, photos, quick)
                repeats = 3 if quick else 7
                out[key] = {
                    "sizes": [list(size) for size in sizes],
                    **measure_set(folder / key, repeats),
                }
            rounds, copies = (1, 1) if quick else (5, 1)
            workers = min(os.cpu_count() or 1, 2)
            out["loader"] = measure_loaders(folder / "typical", rounds, workers, copies)
    finally: torch.set_num_threads(threads)
    names = ("vlm_lit", "torch", "transformers", "pillow", "numpy")
    return {
        "command": "python benchmarks/image_path.py",
        **out,
        "photographs": len(photos),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, 1 thread",
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **{n: version(n) for n in names}},
    }

def table(result):
    "The result as lines of text."
    lines = [f"{'':15}{'reference':>12}" + "".join(f"{name:>24}" for name in OURS)]
    for key in SETS:
        own = result[key]
        row = f"{key:15}{own['seconds']['reference'] * 1e3:9.1f} ms"
        for name in OURS:
            row += f"{own['seconds'][name] * 1e3:13.1f} ms{own['ratios'][name]:7.2f}x"
        lines.append(row)
    own = result["loader"]
    row = f"{'loader':15}{own['images_per_second']['reference']:8.1f} /s "
    for name in OURS:
        row += f"{own['images_per_second'][name]:13.1f} /s{own['ratios'][name]:7.2f}x"
    return "\n".join([*lines, row])

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few photographs, nothing written")
    args = parser.parse_args()
    result = measure(args.quick)
    print(table(result))
    if not args.quick: RESULT.write_text(json.dumps(result, indent=1) + "\n")

if __name__ == "__main__": main()
