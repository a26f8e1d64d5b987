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
import torch.nn.functional as F
from torch.utils.data import DataLoader
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN_INDEX, ConfigError, DataError
from vlm_lit.batches import DataCollatorForSupervisedDataset, StepBatchSampler
from vlm_lit.model import VLM, calibrate_projector
from vlm_lit.weights import load_weights, seeded, weights_of
import tempfile
from dataclasses import replace
import matplotlib.pyplot as plt
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.breakpoints import Breakpoint
from vlm_lit.core import peek
from vlm_lit.dataset import LazySupervisedDataset, easy_vqa_folder, easy_vqa_records
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.weights import ids_in_use, load_preset, make_model, preset_config
from accelerate.state import AcceleratorState
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments
from vlm_lit.training import *

def setup_module():
    global aligned, cfg, ds, measured, results, run_short, short, stage_one, tok
    torch.set_num_threads(2)
    tok = load_tokenizer("gemma")
    ds = LazySupervisedDataset(easy_vqa_records("train", 1)[:48], tok, image_folder=easy_vqa_folder(), image_size_aux=64, image_size=32, mean=(.5, .5, .5), std=(.2, .2, .2)).preload()
    cfg = preset_config("tiny", used_ids=ids_in_use(ds), image_mean=(.5, .5, .5), image_std=(.2, .2, .2))
    short = TrainConfig("captions", steps=8, groups_per_batch=8, save_every=4, log_every=1)
    aligned = replace(short, trainable=ALIGNED, mirror=0)
    def stage_one():
        "A model with only projector and mining trainable, its optimiser, and a batch of four."
        model = make_model(cfg, seed=0)
        freeze_others(model, aligned.trainable)
        return model, make_optimizer(model, aligned), DataCollatorForSupervisedDataset(0, image_rows=16)([ds[i] for i in range(4)])
    def run_short(folder, cfg_train=short, **kw):
        "Eight steps from the same start; returns the model and its losses."
        model = make_model(cfg, seed=0)
        train(model, ds, cfg_train, folder, calibrate=True, console=Console(quiet=True), **kw)
        return model, [row["loss"] for row in read_metrics(Path(folder)/"metrics.jsonl")]
    results = next(p for p in (Path("../benchmarks/results"), Path("benchmarks/results")) if p.is_dir())
    measured = json.loads((results/"train_step_cpu.json").read_text())

def test_stages_differ_in_values_only():
    print({k: (v, asdict(FINETUNE)[k]) for k,v in asdict(PRETRAIN).items() if v != asdict(FINETUNE)[k]})
    with expect_fail(ConfigError, contains="steps must be at least 1"): replace(PRETRAIN, steps=0)
    with expect_fail(ConfigError, contains="leave each other room"): replace(PRETRAIN, warmup=.8)
    with expect_fail(ConfigError, contains="learning_rate must be positive"): replace(PRETRAIN, learning_rate=0)
    with expect_fail(ConfigError, contains="data must be one of captions,"): replace(PRETRAIN, data="pictures")
    with expect_fail(ConfigError, contains="objective must be one of answers, words; got 'rows'"): replace(PRETRAIN, objective="rows")
    for words in ("a red circle", "{answer}, {answer}"):
        with expect_fail(ConfigError, contains="words must name the place of the answer once, as {answer}; got"): replace(PRETRAIN, words=words)

def test_stages_of_tiny_are_written_once():
    test_eq(preset_stages(load_preset("tiny")), (PRETRAIN, FINETUNE))      # the preset's file and these values say the same
    with expect_fail(ConfigError, contains="is not a TrainConfig"): preset_stages({"stages": [{"name": "x", "speed": 1}]})

def test_rate_climbs_stays_and_falls():
    factors = [learning_rate_factor(s, TrainConfig("x", steps=100)) for s in range(100)]
    test_eq(factors[2:70], [1.0]*68)
    test_close(factors[:2], [1/3, 2/3])
    test_close(factors[-1], 1/30)
    assert factors[70:] == sorted(factors[70:], reverse=True) and min(factors) > 0

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

def test_words_are_spread_over_the_rows():
    answer = tok("a blue rectangle").input_ids[1:]
    labels = torch.tensor([[IGNORE_INDEX, *answer, tok.eos_token_id], [IGNORE_INDEX, answer[0], tok.eos_token_id, IGNORE_INDEX, IGNORE_INDEX]])
    test_eq(answer_words(labels, tok, 4)[0].tolist(), [[answer[0], answer[0], answer[1], answer[2]], [answer[0]]*4])
    test_eq(answer_words(labels, tok, 2)[0].tolist(), [[answer[0], answer[1]], [answer[0]]*2])
    assert answer_words(labels, tok, 4)[1].all()
    ids, told = answer_words(labels, tok, 6, "yes\n{answer}.")
    yes, line, stop = (tok(text, add_special_tokens=False).input_ids[0] for text in ("yes", "\n", "."))
    test_eq(ids.tolist(), [[yes, line, *answer, stop], [yes, yes, line, answer[0], answer[0], stop]])
    test_eq(told.int().tolist(), [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0]])
    with expect_fail(DataError, contains="sample 0 of the batch has an answer without a word"): answer_words(torch.tensor([[IGNORE_INDEX, tok.eos_token_id]]), tok, 4)

def test_rows_go_to_the_words_and_the_language_model_stays_out():
    model, optimizer, batch = stage_one()
    with torch.no_grad(): words = model.embed(answer_words(batch["labels"], tok, model.config.num_patches)[0])
    by_hand = (model.encode_images(batch["images"], batch["images_aux"], words) - words).pow(2).mean()/words.pow(2).mean()
    test_close(word_loss(model, batch, tok).item(), by_hand.item(), eps=1e-5)
    word_loss(model, batch, tok).backward()
    assert {name.split(".")[0] for name,weight in model.named_parameters() if weight.grad is not None} == {"image_encoder"}
    model.zero_grad()
    ids, told = answer_words(batch["labels"], tok, model.config.num_patches, "yes {answer}")                      # the answer's rows, and the others a seventh
    with torch.no_grad(): words, rows = model.embed(ids), model.encode_images(batch["images"], batch["images_aux"], words)
    apart = [((rows - words).pow(2).mean(2)*own).sum() for own in (told, ~told)]
    test_close(word_loss(model, batch, tok, "yes {answer}").item(), ((apart[0] + apart[1]/7)/(told.sum() + (~told).sum()/7)/words.pow(2).mean()).item(), eps=1e-5)
    twice = {**batch, "image_index": torch.arange(len(batch["input_ids"])).flip(0)}                               # which picture is whose
    assert not torch.equal(word_loss(model, twice, tok), word_loss(model, batch, tok))
    with expect_fail(DataError, contains="one picture in every sample"): word_loss(model, {**batch, "input_ids": batch["input_ids"].clamp(min=0)}, tok)

def test_stage_one_moves_projector_and_mining_only():
    model, optimizer, batch = stage_one()
    before = {name: weight.detach().clone() for name,weight in model.named_parameters()}
    with Breakpoint(train_step, at="accelerator.clip_grad_norm_", watch=["gradient_norms(model, 3)"]) as bp: train_step(model, batch, optimizer, Accelerator(), aligned, 0)
    moving = {part for part,norm in bp["gradient_norms(model, 3)"].items() if norm is not None}
    test_eq(moving, {f"image_encoder.mining.vlm_uni_{kind}_projector" for kind in ("query", "aux", "val")} | {"image_encoder.mm_projector.0", "image_encoder.mm_projector.2"})
    for name,weight in model.named_parameters(): assert name.startswith(ALIGNED) or torch.equal(weight, before[name]), name        # bit for bit
    changed = {name for name,weight in model.named_parameters() if not torch.equal(weight, before[name])}
    test_eq({".".join(name.split(".")[:3]) for name in changed}, moving)
    test_eq(len(optimizer.state), len([name for name in before if name.startswith(ALIGNED)]))                                     # no memory for what is frozen
    with expect_fail(ConfigError, contains="no weight begins with 'projector'"): freeze_others(model, ("projector",))

def test_words_are_learned_without_the_language_model():
    model, optimizer, batch = stage_one()
    before = {name: weight.detach().clone() for name,weight in model.language_model.named_parameters()}
    asked = []
    model.language_model.register_forward_pre_hook(lambda *_: asked.append(1))
    losses = [train_step(model, batch, optimizer, Accelerator(), replace(aligned, objective="words"), 5, tok) for _ in range(40)]
    print(f"{losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < .7*losses[0] and not asked
    assert all(torch.equal(weight, before[name]) for name,weight in model.language_model.named_parameters())

def test_bias_of_the_keys_has_no_gradient_to_speak_of():
    model, optimizer, batch = stage_one()
    model(**batch).loss.backward()
    keys = model.image_encoder.mining.vlm_uni_aux_projector[1]
    assert keys.bias.grad.norm() < 1e-5*keys.weight.grad.norm()

def test_parts_begin_anew_and_the_rest_does_not():
    model, optimizer, batch = stage_one()
    for step in range(3): train_step(model, batch, optimizer, Accelerator(), aligned, step)
    trained, state = {name: weight.detach().clone() for name,weight in model.named_parameters()}, torch.get_rng_state()
    names = renew_parts(model, ALIGNED, seed=3)
    once = {name: weight.detach().clone() for name,weight in model.named_parameters()}
    test_eq(set(names), {name for name in trained if name.startswith(ALIGNED)})
    assert all(torch.equal(trained[name], once[name]) == (name not in names) for name in trained)              # nothing kept where it should not be, nothing lost elsewhere
    renew_parts(model, ALIGNED, seed=3)
    assert all(torch.equal(weight, once[name]) for name,weight in model.named_parameters()) and torch.equal(state, torch.get_rng_state())
    test_eq(renew_parts(model, ()), [])
    with expect_fail(ConfigError, contains="vision_tower.embeddings cannot be made anew"): renew_parts(model, ("image_encoder.vision_tower.embeddings",))
    with expect_fail(ConfigError, contains="mm_projector.0 cannot be made anew as a whole"): renew_parts(model, ("image_encoder.mm_projector.0.weight",))
    with expect_fail(ConfigError, contains="no weight begins with 'eyes'"): renew_parts(model, ("eyes",))

def test_language_model_may_have_a_rate_of_its_own():
    model = make_model(cfg, seed=0)
    groups = make_optimizer(model, TrainConfig("x", steps=1, language_rate=.1)).param_groups
    test_eq(sorted((g["share"], g["weight_decay"]) for g in groups), [(.1, 0.0), (.1, .05), (1.0, 0.0), (1.0, .05)])
    test_eq(sum(p.numel() for g in groups if g["share"] == .1 for p in g["params"]), sum(p.numel() for p in model.language_model.parameters()))
    with expect_fail(ConfigError, contains="leave it out of trainable"): TrainConfig("x", steps=1, language_rate=0)

def test_loss_falls_and_everything_is_written():
    with tempfile.TemporaryDirectory() as folder:
        model, losses = run_short(folder)
        files = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())
        test_eq(files, [f"checkpoint/{n}" for n in ("optimizer.safetensors", "progress.json", "weights.safetensors")] + ["metrics.jsonl"])
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
        load_weights(model, path/"weights.safetensors")
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

def test_frozen_weights_are_halved_and_the_rest_still_learns():
    AcceleratorState._reset_state(True)        # accelerate remembers the precision it was first asked for
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(cfg, seed=0)
        train(model, ds, aligned, folder, calibrate=True, accelerator=Accelerator(cpu=True, mixed_precision="bf16"), console=Console(quiet=True))
        losses = [row["loss"] for row in read_metrics(Path(folder)/"metrics.jsonl")]
    kinds = {name: {str(p.dtype).removeprefix("torch.") for p in part.parameters()} for name,part in [("language model", model.language_model), ("towers", model.image_encoder.vision_tower), ("mining", model.image_encoder.mining), ("projector", model.image_encoder.mm_projector)]}
    print(kinds)
    test_eq(kinds, {"language model": {"bfloat16"}, "towers": {"bfloat16"}, "mining": {"float32"}, "projector": {"float32"}})
    assert losses[-1] < losses[0]
    with torch.no_grad(): assert torch.isfinite(model.eval()(**DataCollatorForSupervisedDataset(0)([ds[0], ds[1]])).loss)      # without autocast, too
    AcceleratorState._reset_state(True)

def test_parts_that_a_later_stage_moves_stay_float32():
    kinds = lambda part: {str(p.dtype) for p in part.parameters()}
    model = make_model(cfg, seed=0)
    test_eq(halve_frozen(model, (*ALIGNED, "language_model.model.layers")), ["image_encoder.vision_tower", "image_encoder.vision_tower_aux"])
    test_eq((kinds(model.language_model), kinds(model.image_encoder.vision_tower)), ({"torch.float32"}, {"torch.bfloat16"}))
    test_eq(halve_frozen(make_model(cfg, seed=0), ("",)), [])
    crops = {"images": torch.zeros(2, 4, 3, 8, 8), "images_aux": torch.zeros(2, 3, 16, 16)}
    with expect_fail(ConfigError, contains="in crops cannot be mirrored"): mirror_some(crops, short, 0)

def test_trainer_takes_model_dataset_and_collator():
    def trained_by_trainer(folder, batch_size, accumulate):
        "Two optimiser steps of plain gradient descent on the same sixteen captions."
        model = make_model(cfg, seed=0)
        freeze_others(model, ALIGNED)
        arguments = TrainingArguments(folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate, max_steps=2, learning_rate=.01, lr_scheduler_type="constant", optim="sgd",
                                      max_grad_norm=1e9, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False, logging_strategy="no", seed=0)
        Trainer(model, arguments, DataCollatorForSupervisedDataset(0, image_rows=16), Subset(ds, range(16))).train()
        return model

    with tempfile.TemporaryDirectory() as folder:
        whole, parts, start = trained_by_trainer(folder, 16, 1), trained_by_trainer(folder, 4, 4), make_model(cfg, seed=0)
    moved = max(float((p - q).detach().abs().max()) for p,q in zip(whole.parameters(), start.parameters()))
    gap = max(float((p - q).detach().abs().max()) for p,q in zip(whole.parameters(), parts.parameters()))
    print(f"weights moved by up to {moved:.3f}; one batch or four accumulated: {'the same' if gap < 1e-4*moved else gap}")
    assert moved > 1e-3 and gap < 1e-4*moved
    assert all(torch.equal(p, q) for p,q in zip(whole.language_model.parameters(), start.language_model.parameters()))
    AcceleratorState._reset_state(True)

def test_kept_ratios_of_the_training_step_hold_their_bars():
    print(measured["machine"], measured["versions"]["torch"])
    for peer,gradient in measured["check"].items(): assert gradient["equal"], peer
    against_reference, against_llava = measured["ratios"]["reference"], measured["ratios"]["llava"]
    assert against_reference["samples_per_second"] >= 2 and against_llava["samples_per_second"] >= 1.3
    assert against_reference["peak_memory"] <= 1/3 and against_reference["micro_batch_in_same_memory"] >= 4
