"Derived from nbs/20_replay.ipynb by `make tests`; edit the notebook, not this file."
import base64, html, io, math, tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
import torch
from PIL import Image
from rich.console import Console
from transformers import Trainer, TrainerCallback
from vlm_lit.core import IGNORE_INDEX, ConfigError
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.debug.snapshots import check_expression
from vlm_lit.debug.label_view import LabelStrip
from vlm_lit.debug.values import visible
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.files import named_folders, read_json, write_text
from vlm_lit.text.encode import encode_records
from vlm_lit.data.collator import DataCollatorForSupervisedDataset
from vlm_lit.padding import flat_images
from vlm_lit.text.encode import pad_id
from vlm_lit.models.vlm import VLM
from vlm_lit.training.arguments import PARTS, VLMTrainingArguments
from vlm_lit.training.meter import read_metrics
from vlm_lit.training.recipe import load_recipe
from vlm_lit.training.run import prepare_run
import json
import os, shutil, textwrap, yaml
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from vlm_lit.images import sample_image
from vlm_lit.training import run as run_module
from vlm_lit.training.callbacks import BadLoss
from vlm_lit.training.recipe import LoraRecipe
from vlm_lit.training.run import train
from vlm_lit.weights.pretrained import open_model
from vlm_lit.training.replay import LossStrip
from vlm_lit.training.replay import Replay
from vlm_lit.training.replay import losses_page
from vlm_lit.training.replay import replay
from vlm_lit.training.replay import worst_records

def setup_module():
    global PREPARE, logged, place, poisoned, quiet, small_recipe, small_tokenizer, with_poison, write_data
    torch.set_num_threads(1)
    def small_tokenizer(folder):
        "A byte-level tokenizer with Gemma's control tokens, saved."
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        tok = Tokenizer(models.BPE())
        lines = pre_tokenizers.Split(Regex("\n"), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.pre_tokenizer = pre_tokenizers.Sequence([lines, as_bytes])
        tok.decoder = decoders.ByteLevel()
        text = ["user\nmodel\nWhat is it?\na box\na chain\na purse\nThe same?\nno\nyes"] * 4
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options = dict(special_tokens=special, show_progress=False, initial_alphabet=alphabet)
        tok.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, **options))
        bos = [("<bos>", 2)]
        tok.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=bos)
        names = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")
        PreTrainedTokenizerFast(tokenizer_object=tok, **names).save_pretrained(folder / "tokenizer")
    def write_data(folder):
        "Images, and records with one image, two images, and text only; one answer is wrong."
        (folder / "images").mkdir(parents=True)
        for k in range(3):
            sample_image(40 + k, 40).rotate(30 * k).save(folder / "images" / f"{k}.png")
        records = []

        def add(name, question, answer, **image):
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            records.append({"id": name, **image, "conversations": turns})

        for k in range(16):
            answer = ["a box", "a chain", "a purse"][k % 3] if k != 7 else "zebra crossing"
            add(f"one-{k}", "<image>\nWhat is it?", answer, image=f"{k % 3}.png")
        for k in range(4):
            answer = "no" if k % 3 else "yes"
            images = [f"{k % 3}.png", "0.png"]
            add(f"two-{k}", "<image><image>\nThe same?", answer, image=images)
        for k in range(4): add(f"text-{k}", "Hello", "Hi there")
        (folder / "train.json").write_text(json.dumps(records))
        small_tokenizer(folder)
        return folder
    def small_recipe(folder, **changes):
        "A recipe on that data: eight steps of four records."
        gemma = dict(model_type="gemma", hidden_size=32, intermediate_size=64, num_hidden_layers=1)
        gemma |= dict(head_dim=16, num_attention_heads=2, num_key_value_heads=1)
        training = dict(max_steps=8, per_device_train_batch_size=4, learning_rate=4e-2, seed=0)
        training |= dict(logging_steps=4, save_steps=3, save_total_limit=4)
        training |= dict(use_cpu=True, disable_tqdm=True, log_level="error")
        training["trainable_modules"] = ["projector", "mining", "language_model"]
        model = {"preset": "tiny", "tokenizer": str(folder / "tokenizer")}
        source = {"path": str(folder / "train.json"), "image_folder": str(folder / "images")}
        recipe = {
            "model": {**model, "language_model": {"config": gemma}},
            "data": {"train": [source], "max_length": 256, "check_samples": 4},
            "training": {**training, **changes},
        }
        path = folder / f"recipe-{len(list(folder.glob('recipe*')))}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return load_recipe(path)
    quiet = Console(file=open(os.devnull, "w"), force_jupyter=False)
    place = write_data(Path(tempfile.mkdtemp()) / "data")
    train(small_recipe(place), place / "runs/first", console=quiet)
    def logged(run):
        return [loss for row in read_metrics(run / "metrics.jsonl") for loss in row["losses"]]
    def poisoned(*args, **kwargs):
        "A prepared run in which the record one-7 makes the loss no number."
        prepared = PREPARE(*args, **kwargs)
        normal = prepared.trainer.compute_loss

        def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
            names = [prepared.train.name(i) for i in inputs["info"].indices]
            loss, outputs = normal(model, inputs, True, num_items_in_batch)
            loss = loss * float("nan") if "one-7" in names else loss
            return (loss, outputs) if return_outputs else loss

        prepared.trainer.compute_loss = compute_loss
        return prepared
    def with_poison(function, *args, **kwargs):
        "Call `train` or `replay` with such a run."
        names = function.__globals__
        names["prepare_run"] = poisoned
        try: return function(*args, **kwargs)
        finally: names["prepare_run"] = PREPARE
    PREPARE = run_module.prepare_run

def test_replayed_batch_is_the_trained_one():
    run, stops = place / "runs/twice", []
    batch = ["input_ids", "labels", "pixel_values_aux"]
    watch = [*(f"inputs['{name}']" for name in batch), "num_items_in_batch", "loss"]
    fifth = dict(watch=watch, when="self.state.global_step == 4")
    for take in (
        lambda: train(small_recipe(place, max_steps=5), run, console=quiet),
        lambda: replay(run, 5),
    ):
        with Breakpoint(Trainer.training_step, at="loss = self.compute_loss", **fifth) as bp:
            take()
        stops.append(bp)
    diff = stops[0].diff(stops[1], titles=("in the run", "replayed"))
    print(diff)
    assert not diff.differences and stops[0].hits[0].after["loss"] == logged(run)[4]
    bp.expect({"tuple(inputs['input_ids'].shape)": (4, 35)}, hits=1)
    bp.expect({"len(inputs['pixel_values_aux'])": lambda n_images: n_images > 0})
    bp.expect_after(loss=logged(run)[4])

def test_changed_data_do_not_pass_for_the_same_step():
    other = write_data(Path(tempfile.mkdtemp()) / "data")
    train(small_recipe(other, max_steps=2), other / "run", console=quiet)
    records = json.loads((other / "train.json").read_text())
    for record in records: record["conversations"][1]["value"] += " and more"
    os.utime(other / "run/recipe.yaml", (1e9, 1e9))
    (other / "train.json").write_text(json.dumps(records))
    found = replay(other / "run", 2)
    with Breakpoint(Replay.verdict, at='return f"loss {self.loss!r}, logged', watch="why") as bp:
        page = found.to_html(other / "page.html")
    assert found.is_equal is False
    assert found.changed == ["train.json"]
    assert "changed since: train.json" in str(found)
    assert page == (other / "page.html").read_text()
    assert page.count("<img") == sum(len(r.images) for r in found.records)
    bp.expect({"why": "changed since: train.json", "self.is_equal": False})

def test_worst_records_are_those_with_the_highest_mean_loss():
    model, processor = open_model(place / "runs/first", "cpu")
    found = worst_records(model, processor, place / "train.json", 24, place / "images", batch_size=5)
    dataset = LazySupervisedDataset(place / "train.json", processor, place / "images", uint8=True)
    means = [own.loss for own in found]
    assert len(found) == 24 and means == sorted(means, reverse=True) and found[0].name == "one-7"
    collate = DataCollatorForSupervisedDataset.for_model(model.config, 0)
    for own in found[:3] + found[-3:]:
        with torch.no_grad():
            out = model(**{k: v for k, v in collate([dataset[own.index]]).items()})
        assert torch.allclose(out.token_losses, torch.tensor(own.losses), atol=1e-5)
    in_order = sorted(found, key=lambda own: own.index)
    assert [len(own.images) for own in in_order] == [1] * 16 + [2] * 4 + [0] * 4
    assert not model.training

def test_strips_and_pages_escape_what_the_data_say():
    model, processor = open_model(place / "runs/first", "cpu")
    ids, tok = torch.tensor([2, 30, 31, 32]), processor.tokenizer
    labels = torch.tensor([-100, 30, -100, 32])
    strip = LossStrip(ids, labels, tok, [1.234, float("nan")], title="a\x1b[31m<b>")
    assert "1.23" in repr(strip) and "nan" in repr(strip) and strip.losses.keys() == {1, 3}
    with pytest.raises(ValueError, match="2 supervised tokens but 1 losses"):
        LossStrip(ids, labels, tok, [1.0])
    long = LossStrip(torch.arange(40, 140), torch.arange(40, 140), tok, [0.5] * 99)
    assert max(map(len, long.loss_lines().splitlines())) <= 104 and long.loss_lines().count("LOSS") > 2
    human = {"from": "human", "value": "<script>alert(1)</script>"}
    gpt = {"from": "gpt", "value": "</small><script>x\x1b[0m"}
    evil = {"id": "<script>\x1b[31m", "conversations": [human, gpt]}
    found = worst_records(model, processor, [evil])
    assert "<script>" not in losses_page(found, "<script>") and "\x1b" not in str(found[0])

def test_every_step_of_a_run_is_equal_to_the_bit():
    run = place / "runs/first"
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    for step, start in [(1, 0), (2, 0), (4, 3), (6, 3), (7, 6), (8, 6)]:
        found = replay(run, step)
        assert (found.start, found.logged) == (start, logged(run)[step - 1]), step
        assert found.is_equal and found.loss == found.logged and len(found.records) == 4
        assert [own.name for own in found.records] == found.names
        losses = [loss for own in found.records for loss in own.losses]
        assert abs(sum(losses) / len(losses) - found.loss) < 1e-5
        total = sum(norm**2 for norm in found.grad_norm_by_module.values()) ** 0.5
        assert abs(total - found.grad_norm) < 1e-4 * total and len(found.grad_norm_by_module) == 3
        assert [len(stop.hits) for stop in found.stops] == [1, 1]
    assert before == {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}

def test_accumulated_packed_and_flipped_steps_are_equal_to_the_bit():
    two_by_two = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    kinds = {
        "accumulated": dict(**two_by_two, hflip_prob=0.5),
        "packed": dict(batching="packed", max_packed_length=120, per_device_train_batch_size=2),
        "by_image": dict(batching="by_image", samples_per_image=2),
    }
    for name, changes in kinds.items():
        run = place / "runs" / name
        train(small_recipe(place, max_steps=5, **changes), run, console=quiet)
        found = replay(run, 5)
        assert found.is_equal and found.start == 3, name
        assert len(found.stops[1].hits) == (2 if name == "accumulated" else 1)
        losses = [loss for own in found.records for loss in own.losses]
        assert abs(sum(losses) / len(losses) - found.loss) < 1e-5, name
        assert sorted(own.name for own in found.records) == sorted(found.names)
    # a smoothed loss is no sum of tokens' own: the step is replayed, without records' losses
    run = place / "runs/smoothed"
    smoothing = dict(label_smoothing_factor=0.1)
    train(small_recipe(place, max_steps=3, **smoothing), run, console=quiet)
    found = replay(run, 3)
    assert found.is_equal and found.records == [] and len(found.names) == 4
    assert "step 3 of smoothed" in str(found) and "step 3 of smoothed" in found._repr_html_()

def test_step_that_stopped_the_run_is_replayed():
    run = place / "runs/bad"
    with pytest.raises(BadLoss) as caught:
        with_poison(train, small_recipe(place, seed=1), run, console=quiet)
    rows = read_metrics(run / "bad_steps.jsonl")
    step = rows[0]["step"]
    found = with_poison(replay, run, step)
    assert found.start == step - 1 == 1 and math.isnan(found.loss) and found.reason == "the loss is nan"
    assert "one-7" in found.names and found.is_equal is None and "the loss is nan" in str(found)
    rows[0]["records"] = ["other"] * 4
    (run / "bad_steps.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ConfigError, match="data have changed since"):
        with_poison(replay, run, step)

def test_skipped_steps_are_skipped_again():
    run = place / "runs/skipped"
    recipe = small_recipe(place, on_bad_loss="skip", save_steps=100)
    with_poison(train, recipe, run, console=quiet)
    assert [math.isnan(loss) for loss in logged(run)].count(True) >= 1
    assert math.isfinite(logged(run)[-1])
    step = read_metrics(run / "bad_steps.jsonl")[0]["step"]
    assert step < 8 and with_poison(replay, run, step).is_equal
    found = with_poison(replay, run, 8)
    assert found.start == 0 and found.is_equal

def test_adapters_with_dropout_and_evaluation_are_equal_to_the_bit():
    recipe = small_recipe(place, trainable_modules=["projector"], eval_strategy="steps", eval_steps=2)
    data = replace(recipe.data, eval=recipe.data.train, eval_samples=4)
    lora = LoraRecipe(r=4, dropout=0.3)
    train(replace(recipe, data=data, lora=lora), place / "runs/adapter", console=quiet)
    for step in (2, 3, 5):
        assert replay(place / "runs/adapter", step).is_equal, step

def test_what_cannot_be_replayed_is_said():
    run = place / "runs/first"
    for odd in (0, -1, "3", 2.5, True, None):
        with pytest.raises(ConfigError, match=f"steps are whole numbers from 1, got {odd!r}"):
            replay(run, odd)
    with Breakpoint(prepare_run, at="args = training_arguments") as opened:
        with pytest.raises(ConfigError, match="step 9 of first: the run has come to step 8 of 8; give"):
            replay(run, 9)
    assert not opened.hits  # from the run's files, before anything is opened
    with pytest.raises(ConfigError, match="recipe.yaml is missing"):
        replay(run / "checkpoint-3", 2)
    with pytest.raises(
        ConfigError, match="Trainer.training_step: at='nowhere' is in no line; give text"
    ):
        replay(run, 2, at="nowhere")
    with pytest.raises(ConfigError, match="not a Python expression"):
        replay(run, 2, watch="loss =")
    part = place / "runs/part"
    shutil.copytree(run, part)
    rows = (part / "metrics.jsonl").read_text().splitlines()
    (part / "metrics.jsonl").write_text(rows[0] + "\n" + rows[1][:20])  # a crash has cut the line
    for name in ("result.json", "model", "checkpoint-6", "checkpoint-8"):
        shutil.rmtree(part / name) if (part / name).is_dir() else (part / name).unlink()
    found = replay(part, 5)
    assert found.is_equal is None and found.loss == logged(run)[4] and "not logged" in found.verdict
    with pytest.raises(ConfigError, match="has come to step 3 of 8"):
        replay(part, 8)
    text = (part / "recipe.yaml").read_text()
    # three epochs of six steps; the log has a line every fifth of all steps, and none yet
    changes = {"max_steps: 8": "max_steps: -1", "logging_steps: 4": "logging_steps: 0.2"}
    for old, new in changes.items(): text = text.replace(old, new)
    (part / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match="has come to step 3 of 18; give"):
        replay(part, 12)
    text = text.replace("logging_steps: 0.2", "logging_steps: 4")
    (part / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match="has come to step 3; give"):
        replay(part, 8)
    (part / "checkpoint-best/trainer_state.json").parent.mkdir()
    (part / "checkpoint-best/trainer_state.json").write_text("{}")
    noted = json.dumps({"step": 3, "reason": "loss", "records": ["a\nb"]})
    (part / "bad_steps.jsonl").write_text(noted)
    with pytest.raises(ConfigError, match="the run had a⏎b …, now it is") as error:
        replay(part, 3)
    assert len(str(error.value).splitlines()) == 1
