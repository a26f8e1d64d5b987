"Derived from nbs/11_training.ipynb by `make tests`; edit the notebook, not this file."
import json, math, shutil, signal, threading, time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from vlm_lit.core import IGNORE_INDEX, ConfigError
from vlm_lit.batches import DataCollatorForSupervisedDataset, StepBatchSampler
from vlm_lit.model import VLM, calibrate_projector
from vlm_lit.weights import load_weights, save_model
import tempfile
from dataclasses import replace
import matplotlib.pyplot as plt
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.breakpoints import Breakpoint
from vlm_lit.core import peek
from vlm_lit.dataset import LazySupervisedDataset, easy_vqa_folder, easy_vqa_records
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.weights import ids_in_use, make_model, tiny_config
from vlm_lit.training import *

def setup_module():
    global cfg, ds, run_short, short, tok
    torch.set_num_threads(2)
    tok = load_tokenizer("gemma")
    ds = LazySupervisedDataset(easy_vqa_records("train", 1)[:48], tok, image_folder=easy_vqa_folder(), image_size_aux=64, image_size=32, mean=(.5, .5, .5), std=(.2, .2, .2)).preload()
    cfg = tiny_config(used_ids=ids_in_use(ds), image_mean=(.5, .5, .5), image_std=(.2, .2, .2))
    short = TrainConfig("captions", steps=8, groups_per_batch=8, save_every=4, log_every=1)
    def run_short(folder, cfg_train=short, **kw):
        "Eight steps from the same start; returns the model and its losses."
        model = make_model(cfg, seed=0)
        train(model, ds, cfg_train, folder, calibrate=True, console=Console(quiet=True), **kw)
        return model, [row["loss"] for row in read_metrics(Path(folder)/"metrics.jsonl")]

def test_stages_differ_in_values_only():
    print({k: (v, asdict(FINETUNE)[k]) for k,v in asdict(PRETRAIN).items() if v != asdict(FINETUNE)[k]})
    with expect_fail(ConfigError, contains="steps must be at least 1"): replace(PRETRAIN, steps=0)
    with expect_fail(ConfigError, contains="leave each other room"): replace(PRETRAIN, warmup=.8)
    with expect_fail(ConfigError, contains="learning_rate must be positive"): replace(PRETRAIN, learning_rate=0)

def test_rate_climbs_stays_and_falls():
    factors = [learning_rate_factor(s, TrainConfig("x", steps=100)) for s in range(100)]
    test_eq(factors[2:70], [1.0]*68)
    test_close(factors[:2], [1/3, 2/3])
    test_close(factors[-1], 1/30)
    assert factors[70:] == sorted(factors[70:], reverse=True) and min(factors) > 0

def test_frozen_parts_get_no_gradient():
    model = make_model(cfg, seed=0)
    names = freeze_others(model, ("image_encoder.mm_projector",))
    batch = DataCollatorForSupervisedDataset(0)([ds[i] for i in range(4)])
    model(**batch).loss.backward()
    norms = gradient_norms(model)
    for part,norm in norms.items(): print(f"{part:32}", "frozen" if norm is None else f"{norm:.3f}")
    test_eq([part for part,norm in norms.items() if norm is not None], ["image_encoder.mm_projector"])
    assert norms["image_encoder.mm_projector"] > 0
    test_eq(len(names), 4)
    with expect_fail(ConfigError, contains="no weight begins with 'projector'"): freeze_others(model, ("projector",))

def test_mirrors_follow_from_seed_and_step():
    batch = DataCollatorForSupervisedDataset(0)([ds[i] for i in range(8)])
    once, again, later = mirror_some(batch, short, 3), mirror_some(batch, short, 3), mirror_some(batch, short, 4)
    flipped = [not torch.equal(a, b) for a,b in zip(once["images"], batch["images"])]
    print(flipped)
    assert torch.equal(once["images"], again["images"]) and not torch.equal(once["images"], later["images"])
    for n,f in enumerate(flipped):
        for key in ("images", "images_aux"): assert torch.equal(once[key][n], batch[key][n].flip(-1) if f else batch[key][n])
    assert 0 < sum(flipped) < 8 and mirror_some(batch, replace(short, mirror=0), 3) is batch

def test_bytes_are_mirrored_like_floats():
    half = TrainConfig("mirror", steps=1, mirror=.5, seed=3)
    bytes_ = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    floats = mirror_some({"images": bytes_.float(), "images_aux": bytes_.float()}, half, 2)
    test_eq(mirror_some({"images_aux": bytes_}, half, 2)["images_aux"].float().tolist(), floats["images_aux"].tolist())
    test_eq(mirror_some({"input_ids": 1}, half, 2), {"input_ids": 1})

def test_loss_falls_and_everything_is_written():
    with tempfile.TemporaryDirectory() as folder:
        model, losses = run_short(folder)
        files = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())
        test_eq(files, [f"checkpoint/{n}" for n in ("config.json", "model.safetensors", "optimizer.safetensors", "progress.json")] + ["metrics.jsonl"])
        rows = read_metrics(Path(folder)/"metrics.jsonl")
    test_eq(len(losses), 8)
    assert losses[-1] < losses[0] and all(torch.isfinite(torch.tensor(losses)))
    assert set(rows[0]) == {"stage", "step", "loss", "learning_rate", "samples_per_second", "seconds", "samples"}

def test_interrupted_run_goes_on_bit_for_bit():
    class StopAfter(Console):
        "Presses Ctrl-C after some lines."
        def __init__(self, n):
            super().__init__(quiet=True)
            self.n = n
        def print(self, *a, **kw):
            self.n -= 1
            if self.n == 0: signal.raise_signal(signal.SIGINT)

    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
        straight, losses = run_short(whole)
        model = make_model(cfg, seed=0)
        original = TrainProgress.__init__.__defaults__
        TrainProgress.__init__.__defaults__ = (0, None, 1)             # a line at every step, so that the signal comes after step 5
        try: train(model, ds, short, parts, calibrate=True, console=StopAfter(5))
        except Interrupted as e: print(e)
        finally: TrainProgress.__init__.__defaults__ = original
        test_eq(read_progress(Path(parts)/"checkpoint")["step"], 5)
        resumed = make_model(cfg, seed=99)                              # other weights: all must come from the checkpoint
        train(resumed, ds, short, parts, resume=True, calibrate=True, console=Console(quiet=True))
        test_eq([row["loss"] for row in read_metrics(Path(parts)/"metrics.jsonl")], losses)
    assert all(torch.equal(p, q) for p,q in zip(straight.parameters(), resumed.parameters(), strict=True))
    print("losses and weights equal")

def test_forgetting_the_optimizer_changes_the_run():
    with tempfile.TemporaryDirectory() as folder:
        straight, losses = run_short(folder, replace(short, steps=8))
    with tempfile.TemporaryDirectory() as folder:
        half, _ = run_short(folder)
        path = Path(folder)/"checkpoint"
        model = make_model(cfg, seed=0)
        load_weights(model, path/"model.safetensors")
        fresh, kept = make_optimizer(model, short), make_optimizer(half, short)
        restore_optimizer(half, kept, {k: v for k,v in load_file(path/"optimizer.safetensors").items() if not k.startswith("rng")})
    batch = DataCollatorForSupervisedDataset(0)([ds[i] for i in range(4)])
    accelerator = Accelerator()
    for m,o in [(model, fresh), (half, kept)]: train_step(m, batch, o, accelerator, short, 4)
    gap = max(float((p - q).detach().abs().max()) for p,q in zip(model.parameters(), half.parameters()))
    print("largest difference between weights after one step is above 1e-4:", gap > 1e-4)
    assert gap > 1e-4

def test_pictures_prepared_for_another_model_are_refused():
    other = LazySupervisedDataset(ds.records, tok, image_folder=easy_vqa_folder(), image_size_aux=64, image_size=32)
    with tempfile.TemporaryDirectory() as folder, expect_fail(ConfigError, contains="prepares pictures with mean"): train(make_model(cfg), other, short, folder)
    with expect_fail(ConfigError, contains="seed must be"): replace(short, seed=-1)

def test_checkpoint_survives_a_crash_between_renames():
    with tempfile.TemporaryDirectory() as folder:
        model, _ = run_short(folder)
        path = Path(folder)/"checkpoint"
        path.rename(path.with_name("checkpoint.old"))
        test_eq(read_progress(path)["step"], 8)
        (Path(folder)/"metrics.jsonl").open("a").write('{"stage": "cap')
        test_eq(len(read_metrics(Path(folder)/"metrics.jsonl")), 8)
    assert read_progress(Path(folder)/"gone") is None
