"""Does the resizing kernel move accuracy? easy-VQA trained with `resize: pillow` and with `torch`.

    python benchmarks/resize_accuracy.py            seeds 0 and 1, both kernels
                                                    -> benchmarks/results/resize_accuracy.json
    python benchmarks/resize_accuracy.py --seeds 2 --kernels torch    one more run
    python benchmarks/resize_accuracy.py --steps 20 --seeds 0    a try, nothing written

The recipes of `examples/easy_vqa`, with images enlarged to 96 pixels, so that every one is made
smaller by the kernel. (Runs "64 to 48" are of a `tiny` that read 48 pixels instead; with images so
small, some trainings end near 86 % and others near 96 %, with either kernel.) Each trained model
answers all test questions twice, with the kernel that it was trained with and with the other one;
`other_answers` counts the questions whose answer differs. With OMP_NUM_THREADS=1 and two at a time
on two cores, as the committed ones were made, a run takes twelve minutes.
"""

import argparse, json, os, platform, shutil, subprocess, sys, tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import mean

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/resize_accuracy.json"
EXAMPLE = ROOT / "examples/easy_vqa"
KERNELS = "pillow", "torch"

def call(*words, folder: Path) -> str:
    "A command of the package, in a folder; its output."
    out = subprocess.run([*map(str, words)], cwd=folder, capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{out.stdout}\n{out.stderr}")
    return out.stdout

def enlarge(folder: Path) -> None:
    "Make all images of a folder 96 pixels wide and high."
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.convert("RGB").resize((96, 96), Image.Resampling.BICUBIC).save(path)

def train(folder: Path, kernel: str, seed: int, steps: int | None) -> Path:
    "Both stages; the model's folder."
    name, command = f"{kernel}-{seed}", [sys.executable, "-m", "vlm_lit", "train"]
    shared = ["--training.seed", seed, "--data.resize", kernel]
    if steps:
        shared += ["--training.max_steps", steps, "--training.lr_scheduler_type", "constant"]
        shared += ["--training.lr_scheduler_kwargs", "{}"]
    stage1, stage2 = EXAMPLE / "stage1.yaml", EXAMPLE / "stage2.yaml"
    call(*command, stage1, "--name", f"{name}-1", *shared, folder=folder)
    start = ["--model.from", f"runs/{name}-1"]
    call(*command, stage2, "--name", name, *start, *shared, folder=folder)
    return folder / "runs" / name / "model"

def with_kernel(model: Path, kernel: str) -> Path:
    "A copy of a model folder that resizes by another kernel."
    copy = model.with_name(f"model-{kernel}")
    shutil.copytree(model, copy)
    path = copy / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["resize"] = kernel
    path.write_text(json.dumps(config))
    return copy

def answers(folder: Path, model: Path) -> list[dict]:
    "Every test question with the answer given, and whether it is right."
    out = model.with_suffix(".jsonl")
    data = ["--data", "data/easy_vqa/test.jsonl", "--image-folder", "data/easy_vqa"]
    command = [sys.executable, "-m", "vlm_lit", "eval", model, *data, "--out", out]
    call(*command, "--batch-size", 256, "--max-new-tokens", 4, folder=folder)
    return [json.loads(line) for line in out.read_text().splitlines()]

def write(rows: list[dict]) -> None:
    "The result file, after each run; others with this machine and these versions stay in it."
    about = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "pillow", "transformers")},
    }
    before = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if all(before.get(key) == value for key, value in about.items()):
        name = lambda row: (row["pixels"], row["seed"], row["trained_with"])
        own = {name(row) for row in rows}
        rows = sorted([row for row in before["runs"] if name(row) not in own] + rows, key=name)
    result = {"command": "python benchmarks/resize_accuracy.py", "runs": rows, **about}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--steps", type=int, help="of each stage; the recipes' own when left out")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        call(sys.executable, EXAMPLE / "prepare.py", "--out", "data/easy_vqa", folder=folder)
        enlarge(folder / "data/easy_vqa")
        for seed in args.seeds:
            for kernel in args.kernels:
                model = train(folder, kernel, seed, args.steps)
                own = answers(folder, model)
                other = KERNELS[1 - KERNELS.index(kernel)]
                crossed = answers(folder, with_kernel(model, other))
                share = lambda found: mean(row["scores"]["exact"] for row in found)
                rows.append(
                    {
                        "pixels": "96 to 64",
                        "seed": seed,
                        "trained_with": kernel,
                        "accuracy": round(share(own), 4),
                        "accuracy_with_the_other": round(share(crossed), 4),
                        "other_answers": sum(
                            a["prediction"] != b["prediction"] for a, b in zip(own, crossed)
                        ),
                        "questions": len(own),
                    }
                )
                print(rows[-1], flush=True)
                if not args.steps: write(rows)

if __name__ == "__main__": main()
