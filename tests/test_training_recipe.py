"Derived from nbs/16a_recipe.ipynb by `make tests`; edit the notebook, not this file."
import json, re, textwrap, typing
from dataclasses import MISSING, asdict, field, fields
from enum import Enum
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal
import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.dataclasses import dataclass
from vlm_lit import __version__
from vlm_lit.core import ConfigError, nearest
from vlm_lit.files import write_text
from vlm_lit.text.record_forms import check_columns
import os, subprocess, sys, tempfile, warnings
from contextlib import chdir
import pytest
import vlm_lit
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.training.recipe import _BATCH, _Dumper, _merge, _override, _pairs, _parse_yaml
from vlm_lit.training.recipe import _short
from vlm_lit.training.recipe import BadSamples
from vlm_lit.training.recipe import DataRecipe
from vlm_lit.training.recipe import LoraRecipe
from vlm_lit.training.recipe import MAY_DIFFER_ON_RESUME
from vlm_lit.training.recipe import Recipe
from vlm_lit.training.recipe import SourceRecipe
from vlm_lit.training.recipe import _explain
from vlm_lit.training.recipe import format_recipe
from vlm_lit.training.recipe import load_recipe
from vlm_lit.training.recipe import recipe_differences
from vlm_lit.training.recipe import save_recipe
from vlm_lit.training.recipe import training_defaults

def setup_module():
    global ROOT, SMALL, folder, refused, small, written
    ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "recipes").is_dir())
    folder = Path(tempfile.mkdtemp())
    def written(text, name="recipe.yaml"):
        "A file with this text, in a folder for tests."
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name
    def refused(cases):
        "Change the small recipe by each text, print the error, compare its beginning."
        for text, start in cases.items():
            written(text, "wrong.yaml")
            with pytest.raises(ConfigError) as caught, chdir(folder):
                load_recipe("recipe.yaml", "wrong.yaml")
            print(textwrap.fill(f"{caught.value}", 96, subsequent_indent="    "))
            assert str(caught.value).startswith(f"wrong.yaml: {start}"), start
            assert "\n" not in str(caught.value)
    SMALL = """
model: {preset: smol}
data:
  train: [{path: train.json, image_folder: images}]
training: {learning_rate: 1e-3, max_steps: 500}
"""
    small = written(SMALL)

def test_files_merge_and_flags_win():
    config, origins = {}, {}
    _merge(config, _parse_yaml(SMALL, "a.yaml"), "a.yaml", origins)
    mixture = _parse_yaml("data: {train: [{path: b.json}, {path: c.json}]}", "b.yaml")
    _merge(config, mixture, "b.yaml", origins)
    flags = ["--training.learning_rate", "2e-3", "--data.train.1.weight=2"]
    with Breakpoint(_override, at="node[path[-1]], origins[path]", watch="path text node") as bp:
        for flag, text in _pairs(flags): _override(config, flag, text, origins)
    print(yaml.dump(config, Dumper=_Dumper))
    assert config["training"] == {"learning_rate": 2e-3, "max_steps": 500}
    assert config["data"] == {"train": [{"path": "b.json"}, {"path": "c.json", "weight": 2}]}
    assert origins["data", "train"] == "b.yaml" and origins["training", "max_steps"] == "a.yaml"
    assert origins["data", "train", 1, "weight"] == "--data.train.1.weight"
    bp.expect_after(node={"path": "c.json", "weight": 2}, hit=1)
    bp.expect_each(path=[("training", "learning_rate"), ("data", "train", 1, "weight")])

def test_load_recipe_reads_files_and_flags():
    written("data: {max_length: 512}\ntraining: {bf16: no, save_strategy: no}", "more.yaml")
    flags = ["--training.learning_rate", "2e-3", "--data.train.0.weight", "2"]
    recipe = load_recipe(small, folder / "more.yaml", overrides=flags)
    print(recipe.model, recipe.training, sep="\n")
    expected = {"learning_rate": 2e-3, "max_steps": 500, "bf16": False, "save_strategy": "no"}
    assert recipe.training == expected
    assert recipe.data.train[0] == SourceRecipe("train.json", "images", weight=2)
    assert recipe.data.max_length == 512 and recipe.data.overlength == "truncate"

def test_stop_after_the_merge():
    written("data: {max_length: 512}\ntraining: {bf16: no, save_strategy: no}", "more.yaml")
    flags = ["--training.learning_rate", "2e-3"]
    origin = ["origins['training', 'bf16']", "origins['training', 'learning_rate']"]
    watch = ["config['training']", *origin]
    with Breakpoint(load_recipe, at="recipe = _validate", watch=watch) as bp, chdir(folder):
        load_recipe("recipe.yaml", "more.yaml", overrides=flags)
    merged = {"learning_rate": 2e-3, "max_steps": 500, "bf16": False, "save_strategy": False}
    bp.expect(dict(zip(watch, [merged, "more.yaml", "--training.learning_rate"])))

def test_stop_at_an_unknown_key():
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        with Breakpoint(_explain, at="hint = f", watch="name path near len(names)") as bp:
            load_recipe(small, overrides=["--training.learning_rat", "1e-3"])
    bp.expect({"name": "training.learning_rat", "near": "learning_rate"})
    bp.expect({"len(names)": len(training_defaults())}, hits=1)

def test_differences_name_both_values():
    a = load_recipe(small, overrides=["--training.per_device_train_batch_size", "16"])
    flags = ["--training.seed", "0", "--training.logging_steps", "50", "--data.train.0.weight", "2"]
    flags += ["--training.dataloader_num_workers", "4", "--training.per_device_train_batch_size", "8"]
    flags += ["--data.train.0.license", "cc-by-4.0"]  # for the model card only
    b = load_recipe(small, overrides=[*flags, "--lora", "{r: 8}"])
    print(*recipe_differences(a, b), sep="\n")
    assert recipe_differences(a, a) == []
    assert recipe_differences(a, b, world_sizes=(1, 2)) == [
        "data.train[0].weight is None, not 2.0",
        "training.seed is 42, not 0",
        f"lora is None, not {_short(asdict(b.lora))}",
    ]
    assert "training.global_batch_size is 16, not 8" in recipe_differences(a, b)
    assert "training.logging_steps is 10, not 50" in recipe_differences(a, b, ignore=())

def test_no_torch_for_a_misspelled_section():
    probe = (
        "import sys\nfrom vlm_lit.training.recipe import load_recipe\n"
    "try: load_recipe(overrides=['--model.preset=smol', '--data.trian=[]'])\n"
    "except ValueError as e: print(e)\n"
    "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(vlm_lit.__file__).parents[1])}
    run = [sys.executable, "-c", probe]
    out = subprocess.run(run, capture_output=True, text=True, env=env, cwd=folder)
    print(out.stdout)
    assert "did you mean 'train'?" in out.stdout and out.stdout.endswith("[]\n"), out

def test_values_that_look_right_are_refused():
    refused(
        {
            "training: {learning_rate: true}": "training.learning_rate: expected number, got True",
            "training: {learning_rate: .nan}": (
                "training.learning_rate: expected finite number, got nan"
            ),
            "training: {max_steps: 1e3}": "training.max_steps: expected integer, got 1000.0",
            "training: {trainable_modules: all}": (
                "training.trainable_modules: expected list, got 'all'"
            ),
            "training: {report_to: 3}": "training.report_to: expected string or list, got 3",
            "training: {hub_token: x}": "training.hub_token comes from the command, the launcher or a",
            "training: {1: 2}": "line 1: key '1' is no text but of the type int; put it in quotes",
            "data: {max_length: 500.5}": "data.max_length: expected integer, got 500.5",
            "data: {blank_images: 1}": "data.blank_images: expected boolean, got 1",
            "data: 3": "data: expected mapping, got 3",
            "lora: true": "lora: expected mapping, got True",
            "lora: {target_modules: 3}": "lora.target_modules: expected list or string, got 3",
        }
    )

def test_direct_construction_is_checked():
    with pytest.raises(ValueError, match="weight and repeat"):
        SourceRecipe("a.json", weight=1, repeat=2)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        LoraRecipe(r=0)

def test_yaml_numbers_and_repeated_keys():
    text = "{a: 1e-3, b: 2.5e4, c: 1E6, d: -1e-5, e: .5e1, f: 1.e2, g: 1e, h: e5}"
    read = _parse_yaml(text, "x.yaml")
    print(read)
    assert [read[k] for k in "abcdef"] == [1e-3, 2.5e4, 1e6, -1e-5, 5.0, 100.0]
    assert read["g"] == "1e" and read["h"] == "e5"
    assert yaml.dump("1e5", Dumper=_Dumper).strip() == "'1e5'"
    wrong = {
        "seed: 1\nseed: 2": "line 2: key 'seed' is given twice",
        "lora:\n  no: 1": "line 2: key 'no' is no text but of the type bool; put it in quotes",
        "1: x": "line 1: key '1' is no text but of the type int; put it in quotes",
        "? [a, b]\n: c": "line 1: key ",
        "a: 1\nb: \"x\x07\"": r"line 2: the control character '\x07' is not allowed",
    }
    for text, message in wrong.items():
        with pytest.raises(ConfigError) as caught: _parse_yaml(text, "x.yaml")
        assert str(caught.value).startswith(f"x.yaml: {message}"), str(caught.value)
    assert _parse_yaml("a: &a {b: 1}\nc: {<<: *a, d: 2}", "x.yaml")["c"] == {"b": 1, "d": 2}
    with pytest.raises(ConfigError, match="^--foo.bar: unknown key 'foo'"):
        load_recipe(small, overrides=["--foo.bar", "1"])

def test_flags_alone_make_a_recipe():
    flags = ["--model.preset", "smol", "--data.train", "[{path: a.json}]", "--lora", "{r: 8}"]
    recipe = load_recipe(overrides=flags)
    assert recipe.lora.r == 8 and recipe.data.train == [SourceRecipe("a.json")] and not recipe.training

def test_misspelled_keys_name_the_nearest():
    refused(
        {
            "trainings: {}": "unknown key 'trainings'; did you mean 'training'?",
            "training: {learning_ratee: 1}": (
                "unknown key 'training.learning_ratee'; did you mean 'learning_rate'?"
            ),
            "training: {warmup_ratio: 0.03}": (
                "unknown key 'training.warmup_ratio'; did you mean 'warmup_steps'?"
            ),
            "data: {overlenght: skip}": "unknown key 'data.overlenght'; did you mean 'overlength'?",
            "data: {train: [{paht: a.json}]}": "unknown key 'data.train[0].paht'; did you mean 'path'?",
            "data: {bad_samples: {max: 1}}": (
                "unknown key 'data.bad_samples.max'; there are: max_fraction"
            ),
            "lora: {rank: 8}": "unknown key 'lora.rank'; there are: r, alpha, dropout, target_modules",
            "model: {image_aspect: pad}": (
                "unknown key 'model.image_aspect'; did you mean 'image_aspect_ratio'?"
            ),
        }
    )

def test_wrong_values_name_what_was_expected():
    refused(
        {
            "data: {max_length: long}": "data.max_length: expected integer, got 'long'",
            "data: {overlength: drop}": (
                "data.overlength: expected 'error', 'skip' or 'truncate', got 'drop'"
            ),
            "data: {train: []}": "data.train: expected at least 1 item, got []",
            "data: {train: a.json}": "data.train: expected list of sources, [{path: FILE",
            "data: {train: [a.json]}": "data.train[0]: expected mapping, got 'a.json'",
            "data: {train: [{path: a, weight: -2}]}": (
                "data.train[0].weight: expected greater than or equal to 0, got -2"
            ),
            "data: {train: [{path: a, weight: 2, repeat: 2}]}": (
                "data.train[0]: weight and repeat exclude each other: a weight is a share"
            ),
            "data: {train: [{path: a, weight: 2}, {path: b}]}": (
                "data.train: give every entry a weight, or none"
            ),
            "data: {train: [{image_folder: a}]}": "'data.train[0].path' is missing",
            "training: {learning_rate: fast}": "training.learning_rate: expected number, got 'fast'",
            "training: {learning_rate: -1e-3}": (
                "training.learning_rate: expected 0 or more, got -0.001"
            ),
            "training: {per_device_train_batch_size: 0}": (
                "training.per_device_train_batch_size: expected 1 or more, got 0"
            ),
            "training: {lr_scheduler_type: cosin}": (
                "training.lr_scheduler_type: unknown 'cosin'; did you mean 'cosine'?"
            ),
            "training: {output_dir: runs/x}": (
                "training.output_dir comes from the command, the launcher or a login; remove it"
            ),
        }
    )

def test_wrong_models_and_wrong_files():
    refused(
        {
            "model: {preset: smoll}": (
                "unknown preset 'smoll'; did you mean 'smol'? there are gemma3-270m"
            ),
            "model: {preset: mine.json}": "unknown preset 'mine.json'; there are gemma3-270m, llava-7b",
            "model: {from: runs/stage1}": "model names both preset and from; give one",
            "model: {preset: 3}": "model.preset: expected string, got 3",
            "training: {max_steps: 1, max_steps: 2}": "line 1: key 'max_steps' is given twice",
            "training: {max_steps: 1": "line 1: expected ',' or '}'",
            "- a list": (
                "a recipe is a mapping with the sections model, data, training and lora; got ['a"
            ),
        }
    )

def test_values_of_a_model_section_have_a_kind():
    refused(
        {
            "model: {image_size: big}": "model.image_size: expected integer, got 'big'",
            "model: {image_size: 1.5}": "model.image_size: expected integer, got 1.5",
            "model: {image_grid: true}": "model.image_grid: expected integer, got True",
            "model: {image_global: 1}": "model.image_global: expected boolean, got 1",
            "model: {template: [gemma]}": "model.template: expected string, got ['gemma']",
            "model: {vision_tower: 3}": "model.vision_tower: expected string or mapping, got 3",
            "model: {aux_stages: 1}": "model.aux_stages: expected list, got 1",
            "model: {image_mean: 0.5}": "model.image_mean: expected list, got 0.5",
            "model: {projector: 3}": "model.projector: expected string, got 3",
        }
    )

def test_wrong_files_and_flags():
    written("training: {seed: 1}", "half.yaml")
    for paths, flags, start in [
        (["nowhere.yaml"], [], "nowhere.yaml: no such recipe; recipes/own-data.yaml is one to copy"),
        (["mine.jsonl"], [], "mine.jsonl: a recipe is a .yaml file; for training on records"),
        (["half.yaml"], [], "half.yaml: 'model' is missing"),
        (["half.yaml"], ["--model.preset", "smol"], "half.yaml: 'data' is missing"),
        (["recipe.yaml"], ["--training.learning_ratee", "1"], "--training.learning_ratee: unknown key"),
        (["recipe.yaml"], ["--model.preset", "null"], "recipe.yaml: model names neither"),
        (["recipe.yaml"], ["--training.seed"], "--training.seed has no value"),
        (["recipe.yaml"], ["seed=1"], "cannot read 'seed': write --section.key value"),
        (["recipe.yaml"], ["--data.train.1.weight", "2"], "--data.train.1.weight: there is no '1' in"),
        (["recipe.yaml"], ["--training.seed", "{"], "--training.seed: line 1: "),
    ]:
        with pytest.raises(ConfigError) as caught, chdir(folder):
            load_recipe(*paths, overrides=flags)
        print(textwrap.fill(f"{caught.value}", 96, subsequent_indent="    "))
        assert str(caught.value).startswith(start), start

def test_saved_recipes_are_complete_and_equal():
    recipe = load_recipe(small, overrides=["--lora.r", "8", "--training.eval_strategy", "steps"])
    path = save_recipe(recipe, folder / "saved.yaml")
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    short = written(format_recipe(recipe, all=False), "short.yaml")
    assert load_recipe(path) == recipe == load_recipe(short)
    assert read["training"].keys() == training_defaults().keys()
    assert read["training"]["save_strategy"] == "steps"  # a word, not an enum's name
    assert read["data"].keys() == {f.name for f in fields(DataRecipe)} and read["lora"]["alpha"] == 32.0
    assert "hub_token" not in read["training"] and not list(folder.glob("*.part"))

def test_save_and_load_is_the_identity():
    from hypothesis import HealthCheck, given, settings, strategies as st

    odd = ["1e5", "no", "null", "~", "2024-01-01", "a: b", "#x", "\n", "\x85\U0004ee8a", "a\u2028b"]
    odd = st.sampled_from(odd)
    text = st.one_of(st.text(max_size=8), odd)
    counts = st.integers(1, 9)
    rates = st.floats(1e-9, 9)
    sources = st.builds(SourceRecipe, path=text, name=text, license=text, weight=rates)
    kwargs = st.dictionaries(text, st.one_of(rates, text, st.booleans()), max_size=2)
    training = st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": rates,
            "run_name": text,
            "seed": counts,
            "lr_scheduler_kwargs": kwargs,
            "trainable_modules": st.lists(text, max_size=2),
            "eval_strategy": st.just("epoch"),
        },
    )
    loras = st.none() | st.builds(LoraRecipe, r=counts)

    @settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(sources, min_size=1, max_size=2), training, loras, text)
    def identity(train, training, lora, tokenizer):
        data = DataRecipe(train=train, max_length=7)
        training = {k: v for k, v in training.items() if v != training_defaults()[k]}
        recipe = Recipe({"preset": "smol", "tokenizer": tokenizer}, data, training, lora)
        assert load_recipe(save_recipe(recipe, folder / "any.yaml")) == recipe

    identity()

def test_ignored_settings_exist():
    known = [f"training.{name}" for name in training_defaults()] + ["data.bad_samples.max_fraction"]
    known += [*(f"data.{f.name}" for f in fields(DataRecipe)), "data.train[0].license"]
    for pattern in MAY_DIFFER_ON_RESUME:
        assert any(fnmatch(name, pattern) for name in known), pattern
    assert set(_BATCH) <= training_defaults().keys()

def test_shipped_recipes_load():
    from vlm_lit.training.arguments import VLMTrainingArguments

    paths = sorted([*ROOT.glob("recipes/*.yaml"), *ROOT.glob("examples/*/*.yaml")])
    for path in paths:
        recipe = load_recipe(path)
        start = recipe.model.get("preset") or recipe.model["from"]
        training = {**training_defaults(), **recipe.training}
        print(
            f"{path.name:26}{start:28}{textwrap.shorten(', '.join(training['trainable_modules']), 40)}"
        )
        with warnings.catch_warnings(action="ignore"):  # of names that transformers 6 drops
            VLMTrainingArguments(folder / "run", **recipe.training)
    assert len(paths) >= 9
    for name, batch, rate in [("stage1", 256, 1e-3), ("stage2", 128, 2e-5)]:
        for path in (ROOT / f"recipes/{model}-{name}.yaml" for model in ("mgm-2b", "llava-7b")):
            training = {**training_defaults(), **load_recipe(path).training}
            assert (training["global_batch_size"], training["learning_rate"]) == (batch, rate)
            assert (training["num_train_epochs"], training["warmup_steps"]) == (1, 0.03)

def test_own_data_recipe_mentions_every_setting():
    from transformers import TrainingArguments

    text = (ROOT / "recipes/own-data.yaml").read_text(encoding="utf-8")
    ours = training_defaults().keys() - {f.name for f in fields(TrainingArguments)}
    sections = (DataRecipe, SourceRecipe, LoraRecipe, BadSamples)
    names = {f.name for section in sections for f in fields(section)}
    missing = sorted(name for name in ours | names if not re.search(rf"\b{name}:", text))
    assert missing == [], missing

def test_accelerate_files_are_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    for path in sorted(ROOT.glob("recipes/accelerate/*.yaml")):
        config = load_config_from_file(str(path))
        shards = config.fsdp_config or config.deepspeed_config
        kind = config.distributed_type.value
        print(f"{path.name:22}{kind:11}{config.mixed_precision:6}{len(shards)} settings")
        assert config.num_processes == 8 and config.mixed_precision == "bf16" and shards
        assert "not been run" in " ".join(path.read_text(encoding="utf-8").replace("#", " ").split())
