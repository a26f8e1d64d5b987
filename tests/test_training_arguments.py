"Derived from nbs/16_arguments.ipynb by `make tests`; edit the notebook, not this file."
import math, os
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints
import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_tf32_available
from vlm_lit.core import ConfigError
import tempfile, textwrap
from dataclasses import replace
import numpy as np, pytest
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.training.arguments import PARTS
from vlm_lit.training.arguments import VLMTrainingArguments

def setup_module():
    global folder
    folder = tempfile.mkdtemp()

def test_stop_where_accumulation_is_set():
    settings = dict(global_batch_size=256, per_device_train_batch_size=16, warmup_steps=0.03)
    watch = "self.world_size per_step self.gradient_accumulation_steps"
    at = "self.gradient_accumulation_steps = needed"
    with Breakpoint(VLMTrainingArguments._set_accumulation, at=at, watch=watch) as bp:
        args = VLMTrainingArguments(folder, learning_rate=1e-3, lr_scheduler_type="cosine", **settings)
    assert (args.units_per_step, args.trainable_modules) == (256, ["projector", "mining"])
    bp.expect({"per_step": 16, "self.gradient_accumulation_steps": 1})
    bp.expect_after({"self.gradient_accumulation_steps": 16})

def test_a_parameter_belongs_to_one_part():
    names = ["image_encoder.vision_tower_aux.x", "image_encoder.vision_tower.x", "language_model.x"]
    names += ["image_encoder.mm_projector.0.weight"]
    names += ["image_encoder.mining.vlm_uni_aux_projector.0.bias"]
    for name in names:
        assert sum(name.startswith(prefix) for prefix in PARTS.values() if prefix) == 1

def test_global_batch_size_sets_accumulation():
    args = VLMTrainingArguments(folder, global_batch_size=64, per_device_train_batch_size=16)
    assert args.gradient_accumulation_steps == 4 and args.units_per_step == 64
    assert VLMTrainingArguments(folder, per_device_train_batch_size=3).units_per_step == 3

def test_accumulation_that_disagrees_with_the_global_batch_size_is_refused():
    settings = dict(global_batch_size=64, per_device_train_batch_size=16)
    for given in (1, 4):
        args = VLMTrainingArguments(folder, gradient_accumulation_steps=given, **settings)
        assert replace(args, seed=1).gradient_accumulation_steps == 4
    with pytest.raises(ConfigError, match="steps 2 disagrees with global_batch_size 64, which is 4"):
        VLMTrainingArguments(folder, gradient_accumulation_steps=2, **settings)
    settings["gradient_accumulation_steps"] = 2
    assert VLMTrainingArguments(folder, **settings | {"global_batch_size": None}).units_per_step == 32

def test_wrong_arguments_are_refused():
    parts_with_rate = ("projector", "vision_tower", "language_model")
    sized = ("per_device_train_batch_size", "per_device_eval_batch_size", "max_packed_length")
    sized += ("gradient_accumulation_steps", "global_batch_size", "save_total_limit")
    measured = ("learning_rate", "projector_lr", "weight_decay", "max_grad_norm", "hflip_prob")
    measured += ("adam_beta1", "adam_epsilon", "spike_factor", "num_train_epochs")
    for wrong, part in [
        (dict(global_batch_size=100, per_device_train_batch_size=16), "not a multiple"),
        (dict(batching="x"), "batching must be one of"),
        (dict(hflip_prob=-1), "hflip_prob"),
        (dict(trainable_modules=[]), "nothing would train"),
        (dict(spike_factor=1), "spike"),
        (dict(remove_unused_columns=True), "drop the images"),
        (dict(samples_per_image=0), "samples_per_image must be at least 1"),
        *((dict([(f"{part}_lr", -1.0)]), f"{part}_lr must be at least 0") for part in parts_with_rate),
        *((dict([(name, 0)]), f"{name} must be at least 1, got 0") for name in sized),
        *((dict([(name, math.nan)]), f"{name} must be a finite number") for name in measured),
        *((dict([(name, math.inf)]), f"{name} must be a finite number") for name in measured),
        (dict(learning_rate=-1e-3), "learning_rate must be at least 0, got -0.001"),
        (dict(weight_decay=-0.1), "weight_decay must be at least 0"),
        (dict(num_train_epochs=-1), "num_train_epochs must be at least 0"),
        (dict(average_tokens_across_devices=False), "supervised token"),
        (dict(hflip_prob=True), "hflip_prob must be a number, got True"),
        (dict(learning_rate="1e-3"), "learning_rate must be a number, got '1e-3'"),
        (dict(projector_lr=True), "projector_lr must be a number or None, got True"),
        (dict(max_steps=2.0), "max_steps must be a whole number, got 2.0"),
        (dict(seed=None), "seed must be a whole number, got None"),
        (dict(bf16=1), "bf16 must be True or False or None, got 1"),
        (dict(learning_rate=np.float32("nan")), "learning_rate must be a finite number"),
        (dict(trainable_modules="projector"), "trainable_modules must be a list .* got 'projector'"),
        (dict(reinit_modules=[1]), "reinit_modules must be a list of names, got \\[1\\]"),
        (dict(trainable_modules=[""]), "trainable_modules has an empty name"),
        (dict(reinit_modules=["mining", " "]), "reinit_modules has an empty name"),
    ]:
        with pytest.raises(ConfigError, match=part):
            VLMTrainingArguments(folder, **wrong)
    args = VLMTrainingArguments(folder, learning_rate=np.float32(0.5), max_steps=np.int64(3))
    assert (args.learning_rate, args.max_steps) == (0.5, 3)

def test_flips_are_off_by_default():
    args = VLMTrainingArguments(folder)
    assert args.hflip_prob == 0 and not args.remove_unused_columns and not args.logging_nan_inf_filter
    assert args.report_to == [] and args.average_tokens_across_devices
