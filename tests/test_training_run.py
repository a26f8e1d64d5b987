"Derived from nbs/19_run.ipynb by `make tests`; edit the notebook, not this file."
import json, shutil, signal, threading, zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers.trainer_utils import get_last_checkpoint
from vlm_lit.core import ConfigError, DataError, printable, progress_console
from vlm_lit.data.mixture import Mixture
from vlm_lit.evaluation.scoring import evaluate
from vlm_lit.evaluation.scoring import fixed_sample
from vlm_lit.processor import VLMProcessor
from vlm_lit.models.vlm import VLM, match_embedding_scale
from vlm_lit.files import read_json, write_error, write_file, write_json
from vlm_lit.weights.model_card import read_run
from vlm_lit.weights.saving import save_model
from vlm_lit.weights.interchange import save_projector
from vlm_lit.weights.presets import seeded
from vlm_lit.weights.pretrained import resolve_model
from vlm_lit.weights.adapters import add_lora, has_lora, merge_lora
from vlm_lit.training.arguments import VLMTrainingArguments
from vlm_lit.training.callbacks import ConsoleProgress, Interrupted, LossGuard
from vlm_lit.training.meter import MetricsFile
from vlm_lit.training.callbacks import StopOnSignal
from vlm_lit.training.meter import read_metrics
from vlm_lit.training.doctor import check_samples, environment_info, format_check, known_answers
from vlm_lit.training.recipe import Recipe, load_recipe, recipe_differences, save_recipe
from vlm_lit.training.trainer import VLMTrainer, read_trainer_state, reinit_modules
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.data.records import Records
import os, re
import io, tempfile, textwrap
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.training import run as module
from vlm_lit.images import sample_image
from vlm_lit.weights.pretrained import open_model
from vlm_lit.training.run import open_run
from vlm_lit.training.run import prepare_run
from vlm_lit.training.run import train
from vlm_lit.training.run import training_arguments

def setup_module():
    global KINDS, damaged, outcome, place, quiet, small_recipe, small_tokenizer, write_data
    torch.set_num_threads(1)
    def small_tokenizer():
        "A byte-level tokenizer with Gemma's control tokens."
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        tok, bytes_ = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), bytes_])
        tok.decoder = decoders.ByteLevel()
        alphabet = bytes_.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, show_progress=False, initial_alphabet=alphabet
        )
        tok.train_from_iterator(["user model What is it? a box"], trainer)
        tok.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tok,
            bos_token="<bos>",
            eos_token="<eos>",
            unk_token="<unk>",
            pad_token="<pad>",
        )
    def write_data(folder):
        "Images, and records with one image, two images, and text only."
        (folder / "images").mkdir(parents=True)
        small_tokenizer().save_pretrained(folder / "tokenizer")
        for k in range(6):
            sample_image(40 + k, 40).rotate(30 * k).save(folder / "images" / f"{k}.png")
        turns = lambda q, a: [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
        answers = ["a box", "a chain", "a purse"]
        one = [
            {
                "id": f"one-{k}",
                "image": f"{k % 6}.png",
                "type": "object",
                "conversations": turns("<image>\nWhat is it?", answers[k % 3]),
            }
            for k in range(16)
        ]
        two = [
            {
                "id": f"two-{k}",
                "image": [f"{k}.png", "0.png"],
                "type": "pair",
                "conversations": turns("<image><image>\nThe same?", "no" if k else "yes"),
            }
            for k in range(4)
        ]
        text = [{"id": f"text-{k}", "conversations": turns("Hello", "Hi there")} for k in range(4)]
        (folder / "train.json").write_text(json.dumps(one + two + text))
        (folder / "val.json").write_text(json.dumps(one[:4]))
        return folder
    def small_recipe(folder, **changes):
        "A recipe on that data with a model of a few layers."
        text = {
            "config": {
                "model_type": "gemma",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "head_dim": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "intermediate_size": 64,
            }
        }
        training = {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "save_steps": 2,
            "trainable_modules": ["projector", "mining"],
            "use_cpu": True,
            "seed": 0,
            "disable_tqdm": True,
            "log_level": "error",
            "save_total_limit": 4,
        }
        source = {"path": str(folder / "train.json"), "image_folder": str(folder / "images")}
        recipe = {
            "model": {"preset": "tiny", "tokenizer": str(folder / "tokenizer"), "language_model": text},
            "data": {"train": [source], "max_length": 256, "eval_samples": 4},
            "training": {**training, **changes.pop("training", {})},
            **changes,
        }
        path = folder / f"recipe-{len(list(folder.glob('recipe*')))}.yaml"
        import yaml

        path.write_text(yaml.safe_dump(recipe))
        return path
    quiet = Console(file=open(os.devnull, "w"), force_jupyter=False, force_terminal=False)
    place = write_data(Path(tempfile.mkdtemp()) / "data")
    def damaged(path, kind, rng):
        "The bytes of a file after damage of some kind; None: it does not apply to this file."
        data = bytearray(path.read_bytes())
        if kind == "emptied": return b""
        if kind == "cut": return bytes(data[: rng.randrange(1, len(data))])
        if kind == "flipped":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(data)
        other = rng.choice([[], {}, None, 3, -1, 2.5, "x", True, [1], {"a": 1}])
        if path.suffix in (".pt", ".pth"):
            out = io.BytesIO()
            torch.save(other, out)
            return out.getvalue()
        if path.suffix not in (".json", ".jsonl", ".yaml"): return None
        lines = path.read_text().splitlines()
        if path.suffix == ".jsonl":
            return "\n".join([json.dumps(other), *lines[1:], ""]).encode()
        if kind == "another type" or path.suffix == ".yaml":
            return json.dumps(other).encode()
        value = node = json.loads(path.read_text())  # "nested"
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = rng.choice(list(keys))
            if not (isinstance(node[key], dict | list) and node[key]) or rng.random() < 0.3:
                break
            node = node[key]
        node[key] = other
        return json.dumps(value).encode()
    KINDS = ("emptied", "cut", "flipped", "another type", "nested")
    def outcome(run):
        "None if it works; an error of one line; anything else passes through."
        try: run()
        except (ConfigError, DataError) as e:
            assert "\n" not in str(e), e
            return str(e)

def test_stop_where_a_stage_names_the_run_before():
    folder = write_data(Path(tempfile.mkdtemp()) / "data")
    first = load_recipe(small_recipe(folder, training={"max_steps": 1}))
    train(first, folder / "one", console=quiet)
    start = {"model": {"from": str(folder / "one")}, "lora": {"r": 4, "alpha": 8.0}}
    second = load_recipe(small_recipe(folder, **start))
    names = "{key: Path(str(value)).name for key, value in section.items()}"
    watch = [names, "recipe.lora.r"]
    with Breakpoint(prepare_run, at="model, processor = resolve", watch=watch) as bp:
        prepared = prepare_run(second, folder / "two")
    vocabulary = prepared.processor.tokenizer.get_vocab()
    assert has_lora(prepared.model) and vocabulary == small_tokenizer().get_vocab()
    bp.expect({names: {"from": "one"}, "recipe.lora.r": 4}, hits=1)

def test_stop_at_another_seed():
    folder = write_data(Path(tempfile.mkdtemp()) / "data")
    path = small_recipe(folder)
    open_run(load_recipe(path), folder / "run", resume=False)
    other = load_recipe(path, overrides=["--training.seed", "1", "--training.logging_steps", "1"])
    with pytest.raises(ConfigError, match="was started with other settings: training.seed is 0, not 1"):
        with Breakpoint(open_run, at="if differs", watch="differs") as bp:
            open_run(other, folder / "run", resume=True)
    bp.expect(differs=["training.seed is 0, not 1"])

def test_a_run_leaves_a_model_that_opens():
    folder = write_data(Path(tempfile.mkdtemp()) / "data")
    result = train(load_recipe(small_recipe(folder)), folder / "run", console=quiet)
    model, processor = open_model(folder / "run")
    other, _ = open_model(folder / "run/checkpoint-6")
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name
    assert result["steps"] == 6
    assert result["samples"] == 24
    assert (folder / "run/mm_projector.bin").is_file()
    rows = read_metrics(folder / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6] and sum(len(row["losses"]) for row in rows) == 6
    assert abs(sum(rows[0]["losses"]) / 2 - rows[0]["loss"]) < 1e-6
    card = (folder / "run/model/README.md").read_text()
    assert "| train.json | 24 | not given |" in card and "| steps taken | 6 |" in card
    assert str(folder) not in card
    code = re.search("```python\n(.*?)```", card, re.DOTALL)[1]
    code = code.replace("path/to/this/folder", str(folder / "run/model"))
    exec(code.replace("image.png", str(folder / "images/0.png")), {})
    modes = {path.stat().st_mode & 0o777 for path in (folder / "run").rglob("*") if path.is_file()}
    assert modes == {(folder / "train.json").stat().st_mode & 0o777}

def test_image_settings_of_a_recipe_reach_images_and_the_next_stage():
    folder = write_data(Path(tempfile.mkdtemp()) / "data")
    given = ["--data.resize", "torch", "--data.jpeg_draft", "true", "--data.follow_links", "true"]
    first = load_recipe(small_recipe(folder, training={"max_steps": 1}), overrides=given)
    train(first, folder / "one", console=quiet)
    start = {"model": {"from": str(folder / "one")}}
    own = module.prepare_run(
        load_recipe(small_recipe(folder, **start), overrides=given[-2:]), folder / "two"
    )
    for processor in (open_model(folder / "one")[1], own.processor):
        images = processor.image_processor
        assert (images.resize, images.jpeg_draft) == ("torch", True)
    assert [data.follow_links for data in own.train.datasets] == [True]
    assert own.train.datasets[0].processor is own.processor

def test_a_stage_goes_on_from_a_run_with_an_adapter():
    folder = write_data(Path(tempfile.mkdtemp()) / "data")
    train(load_recipe(small_recipe(folder, training={"max_steps": 2})), folder / "one", console=quiet)
    lora, start = {"r": 4, "alpha": 8.0}, {"from": str(folder / "one")}
    second = small_recipe(folder, model=start, lora=lora, training={"max_steps": 3})
    before, _ = open_model(folder / "one")
    train(load_recipe(second), folder / "two", console=quiet)
    after, _ = open_model(folder / "two")
    base, _ = open_model(folder / "two/checkpoint-3")
    pairs = zip(before.named_parameters(), after.parameters())
    changed = {n for (n, a), b in pairs if not torch.equal(a, b)}
    assert any("self_attn" in n for n in changed) and any("mm_projector" in n for n in changed)
    assert not any("embed_tokens" in n or "vision_tower" in n for n in changed)
    for (n, a), b in zip(base.named_parameters(), after.parameters()):
        assert torch.allclose(a, b, atol=1e-6), n
    assert (folder / "two/checkpoint-3/adapter_model.safetensors").is_file()
    card = (folder / "two/model/README.md").read_text()
    assert "### Stage 1: one" in card and "### Stage 2: two" in card and "| lora r | 4 |" in card

def test_a_damaged_run_is_one_line_or_resumes_as_it_was():
    from hypothesis import HealthCheck, given, settings, strategies as st
    from vlm_lit.weights.model_card import read_run

    folder = write_data(Path(tempfile.mkdtemp()) / "data")
    recipe = load_recipe(small_recipe(folder, lora={"r": 2}, training={"max_steps": 4}))
    whole = train(recipe, folder / "run", console=quiet)["loss"]
    shutil.rmtree(folder / "run/checkpoint-4")
    files = [
        p
        for p in sorted((folder / "run").rglob("*"))
        if p.suffix in (".json", ".jsonl", ".yaml", ".pt", ".pth", ".safetensors")
    ]
    weights = (".pt", ".pth", ".safetensors")

    @settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(files), st.sampled_from(KINDS), st.randoms(use_true_random=False))
    def one_line(file, kind, rng):
        place = Path(tempfile.mkdtemp()) / "run"
        shutil.copytree(folder / "run", place)
        path, changed = place / file.relative_to(folder / "run"), damaged(file, kind, rng)
        if changed is None or changed == file.read_bytes(): return
        path.write_bytes(changed)
        part = path.parent if path.parent != place else place / "checkpoint-2"
        if path.suffix != ".pt" and path.suffix != ".pth":
            error = outcome(lambda: open_model(part))
        if path.suffix == ".safetensors": assert error, (path, kind)
        outcome(lambda: read_run(place))
        (place / "result.json").unlink()
        found = []
        error = outcome(lambda: found.append(train(recipe, place, resume=True, console=quiet)))
        if part.name != "model" and path.suffix in weights:
            assert error, (path, kind)
        if found and path.suffix != ".json":
            assert found[0]["loss"] == whole, (path, kind)
        shutil.rmtree(place.parent)

    one_line()

def test_moments_of_another_model_are_refused_and_no_crash():
    folder = write_data(Path(tempfile.mkdtemp()) / "data")
    recipe = load_recipe(small_recipe(folder, training={"max_steps": 4}))
    train(recipe, folder / "run", console=quiet)
    shutil.rmtree(folder / "run/checkpoint-4")
    (folder / "run/result.json").unlink()
    path = folder / "run/checkpoint-2/optimizer.pt"
    usual = torch.load(path, weights_only=True)

    usual["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(usual, path)
    for text in ("is damaged", "exp_avg of weight 0 has another shape"):
        with pytest.raises(ConfigError, match=f"cannot resume from .*{text}.*remove that folder"):
            train(recipe, folder / "run", resume=True, console=quiet)
        path.with_name("checksums.json").unlink(missing_ok=True)

def test_a_saved_recipe_holds_for_any_number_of_processes():
    folder = write_data(Path(tempfile.mkdtemp()) / "data")
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    path = small_recipe(folder, training={"max_steps": 1, "global_batch_size": None, **sizes})
    train(load_recipe(path), folder / "run", console=quiet)
    saved, key = folder / "run/recipe.yaml", "--training.per_device_train_batch_size"
    assert load_recipe(saved).training["global_batch_size"] == 6
    for per_device, accumulated in (("2", 3), ("1", 6)):
        own = load_recipe(saved, overrides=[key, per_device])
        assert training_arguments(own, folder).gradient_accumulation_steps == accumulated
    own = load_recipe(saved, overrides=["--training.gradient_accumulation_steps", "2"])
    with pytest.raises(ConfigError, match="steps 2 disagrees with global_batch_size 6, which is 3"):
        training_arguments(own, folder)

def test_validation_records_and_names_are_checked_on_resuming():
    folder = write_data(Path(tempfile.mkdtemp()) / "data")
    held_out = [{"path": str(folder / "val.json"), "image_folder": str(folder / "images")}]
    path = small_recipe(folder, training={"max_steps": 2})
    flags = ["--data.eval", json.dumps(held_out)]
    recipe = load_recipe(path, overrides=flags)
    train(recipe, folder / "run", console=quiet)
    assert list(json.loads((folder / "run/data.json").read_text())) == ["train", "eval/val"]
    (folder / "run/result.json").unlink()
    (folder / "val.json").write_text(json.dumps(json.loads((folder / "val.json").read_text())[:3]))
    with pytest.raises(ConfigError, match="data source 'eval/val' has changed: it had 4 records"):
        train(recipe, folder / "run", resume=True, console=quiet)
    source = {"path": str(folder / "train.json"), "image_folder": str(folder / "images"), "name": "a"}
    twice = load_recipe(path, overrides=["--data.train", json.dumps([source, source])])
    with pytest.raises(ConfigError, match="two sources are named 'a'"):
        train(twice, folder / "other", console=quiet)
    assert not (folder / "other").exists()

def test_validation_on_what_is_trained_on_is_one_line():
    folder = write_data(Path(tempfile.mkdtemp()) / "data")
    shutil.copy(folder / "train.json", folder / "copy.json")
    images = {"image_folder": str(folder / "images")}
    source = lambda name: {"path": f"{folder}/{name}", **images}

    def warned(*names, **changes):
        "Lines that warn, of a run validated on these files."
        flags = ["--data.eval", json.dumps([{**source(name), **changes} for name in names])]
        recipe = load_recipe(small_recipe(folder, training={"max_steps": 1}), overrides=flags)
        said = Console(file=io.StringIO(), force_jupyter=False, force_terminal=False, width=80)
        train(recipe, folder / f"run-{len(list(folder.glob('run*')))}", console=said)
        return [line for line in said.file.getvalue().splitlines() if line.startswith("warning")]

    assert warned("val.json") == []
    for name in ("train.json", "copy.json", "../data/train.json"):
        [line] = warned("val.json", name, max_samples=4)
        start = f"warning: data.eval {folder}/{name} has the same records as data.train {folder}/train"
        assert line.startswith(start)

def test_a_disk_that_is_full_during_the_steps_names_the_last_state():
    folder = write_data(Path(tempfile.mkdtemp()) / "data")
    recipe = load_recipe(small_recipe(folder, training={"max_steps": 4}))

    class Full(module.MetricsFile):
        def on_log(self, args, state, control, **kwargs):
            if state.global_step == 4: raise OSError(28, "No space left on device")
            super().on_log(args, state, control, **kwargs)

    usual, module.MetricsFile = module.MetricsFile, Full
    try:
        with pytest.raises(ConfigError, match="No space left on device; its last checkpoint is .*-2;"):
            module.train(recipe, folder / "run", console=quiet)
    finally: module.MetricsFile = usual
    assert train(recipe, folder / "run", resume=True, console=quiet)["steps"] == 4

def test_stopped_run_resumes_to_the_bit():
    folder = write_data(Path(tempfile.mkdtemp()) / "data")
    train(load_recipe(small_recipe(folder)), folder / "whole", console=quiet)

    class Killed(Exception): pass

    class Kill(module.MetricsFile):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5: raise Killed

    usual, module.MetricsFile = module.MetricsFile, Kill
    try:
        with pytest.raises(Killed):
            module.train(load_recipe(small_recipe(folder)), folder / "killed", console=quiet)
    finally: module.MetricsFile = usual
    recipe = load_recipe(small_recipe(folder, training={"dataloader_num_workers": 1}))
    train(recipe, folder / "killed", resume=True, console=quiet)

    def losses(name):
        rows = read_metrics(folder / name / "metrics.jsonl")
        return [loss for row in rows for loss in row["losses"]]

    assert losses("whole") == losses("killed") and len(losses("whole")) == 6
    whole, killed = [open_model(folder / name)[0] for name in ("whole", "killed")]
    for (n, a), b in zip(whole.named_parameters(), killed.parameters()):
        assert torch.equal(a, b), n

def test_sigterm_before_and_after_the_steps_leaves_a_run_that_resumes():
    folder = write_data(Path(tempfile.mkdtemp()) / "data")

    def terminated(name, **kwargs):
        "Send SIGTERM when a function of the run is called; what `train` raises."
        usual = getattr(module, name)

        def kill(*args, **kw):
            os.kill(os.getpid(), signal.SIGTERM)
            return usual(*args, **kw)

        setattr(module, name, kill)
        try:
            with pytest.raises(Interrupted) as caught:
                module.train(load_recipe(small_recipe(folder)), folder / "run", console=quiet, **kwargs)
        finally: setattr(module, name, usual)
        return caught.value

    handler = signal.getsignal(signal.SIGTERM)
    early = terminated("known_answers")
    assert (early.number, early.step, str(early)) == (signal.SIGTERM, 0, "stopped before step 1")
    assert not (folder / "run").exists()
    late = terminated("save_model")
    assert late.step == 6 and not (folder / "run/result.json").exists()
    result = module.train(load_recipe(small_recipe(folder)), folder / "run", resume=True, console=quiet)
    assert result["steps"] == 6 and signal.getsignal(signal.SIGTERM) == handler

def test_validation_keeps_to_its_own_sample():
    folder = write_data(Path(tempfile.mkdtemp()) / "data")

    def with_eval(extra):
        entry = f"[{{path: {folder / 'train.json'}, image_folder: {folder / 'images'}, {extra}}}]"
        return load_recipe(small_recipe(folder), overrides=["--data.eval", entry])

    prepared = module.prepare_run(with_eval("max_samples: 9"), folder / "run")
    seen = [i for batch in prepared.trainer.get_eval_dataloader() for i in batch["info"].indices]
    assert sorted(seen) == prepared.eval.kept.tolist() and len(seen) == 9
    asked = {row["id"] for rows in module._answered(prepared) for row in rows}
    assert asked <= {prepared.eval.record(i)["id"] for i in seen}
    with pytest.raises(ConfigError, match="use max_samples"):
        module.prepare_run(with_eval("weight: 2"), folder / "run")

def test_a_loss_that_is_no_number_stops_before_it_does_harm():
    from vlm_lit.training.callbacks import BadLoss

    folder = write_data(Path(tempfile.mkdtemp()) / "data")
    prepared = module.prepare_run(load_recipe(small_recipe(folder)), folder / "bad")
    usual, calls = prepared.trainer.compute_loss, []

    def broken(*args, **kwargs):
        loss, outputs = usual(*args, **{**kwargs, "return_outputs": True})
        calls.append(1)
        return loss * float("nan") if len(calls) == 4 else loss

    prepared.trainer.compute_loss = broken
    with pytest.raises(BadLoss, match="step 4: the loss is nan. Records: "):
        module._steps(prepared, folder / "bad", False, quiet)
    note = json.loads((folder / "bad/bad_steps.jsonl").read_text())
    assert note["step"] == 4 and len(note["records"]) == 4 and (folder / "bad/checkpoint-3").is_dir()
    assert all(torch.isfinite(p).all() for p in prepared.model.parameters())
