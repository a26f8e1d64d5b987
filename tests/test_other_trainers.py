"Derived from nbs/other_trainers.ipynb by `make tests`; edit the notebook, not this file."
import copy, io, os, sys, tempfile, textwrap, warnings
from contextlib import redirect_stdout
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image
from tokenizers import AddedToken
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from vlm_lit.core import IGNORE_INDEX, ConfigError, DataError
from vlm_lit.data.collator import DataCollatorForSupervisedDataset
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import sample_image
from vlm_lit.models.config import VLMConfig
from vlm_lit.models.vlm import VLM
from vlm_lit.processor import VLMInputs, VLMProcessor
from vlm_lit.weights.language_models import quiet
from vlm_lit.weights.llava_hf import export_llava_hf
from vlm_lit.weights.presets import make_model
from small_parts import hushed, needs, same, small_tokenizer
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

def setup_module():
    global COLORS, SHAPES, answer_log_prob, ask, by_formula, doubled, dpo, evaluated, everything, exported, first_batch, folder, lora, make_dataset, messages, photo, plain_trainer, preference_log_probs, settings, talk, talks, targets, tiny, train_losses, trl_settings
    sys.path[:0] = ["../tests", "tests"]
    torch.set_num_threads(1)
    torch.set_printoptions(precision=3, sci_mode=False)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", message="Position ids are not supported")
    SHAPES = ["mining", "llava"]
    def tiny(shape, seed=0, has_token=False, **changes):
        "A model of some 50,000 weights, and its processor; its tokenizer may have a token for images."
        tokenizer = small_tokenizer()
        if has_token:
            tokenizer.add_tokens([AddedToken("<image>", special=True)], True)
            changes["image_token_id"] = tokenizer.convert_tokens_to_ids("<image>")
        common = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=2)
        text = dict(model_type="gemma", vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=16)
        text |= dict(common, initializer_range=0.2, pad_token_id=0, bos_token_id=2, eos_token_id=1)
        vision = dict(model_type="clip_vision_model", image_size=16, patch_size=8, **common)
        aux = dict(model_type="convnext", num_stages=2, hidden_sizes=[8, 12], depths=[1, 1])
        aux = {**aux, "patch_size": 2} if shape == "mining" else None
        sizes = dict(image_size=16, image_size_aux=32 if aux else None, select_layer=-1)
        config = VLMConfig(text, vision, aux, **sizes, **changes)
        processor = VLMProcessor.for_model(config, tokenizer, "gemma")
        model = make_model(config, seed).eval()
        processor.set_generation_config(model)
        return model, processor
    COLORS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (20, 40, 220)}
    def photo(color, size=(24, 24)):
        "An image with a color of its own."
        return Image.blend(sample_image(*size), Image.new("RGB", size, COLORS[color]), 0.6)
    def talk(question, answer):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    def make_dataset(processor, folder, n=12):
        "Records with one image, with two, and without."
        names = list(COLORS)
        for name in names: photo(name).save(folder / f"{name}.png")
        kinds = [("<image>\nwhat color?", 1), ("<image><image>\nwhat color?", 2), ("what color?", 0)]
        records = []
        for k in range(n):
            question, n_images = kinds[k % 3]
            images = [f"{names[(k + j) % 3]}.png" for j in range(n_images)]
            own = {"image": images} if images else {}
            answer = ["red", "a blue circle", "model"][k // 3 % 3]
            records.append({"id": f"r{k}", **own, "conversations": talk(question, answer)})
        return LazySupervisedDataset(records, processor, folder)
    folder = Path(tempfile.mkdtemp())
    def settings(kind=TrainingArguments, **changes):
        "Arguments of a short run on the CPU, without logs on the screen."
        own = dict(max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, seed=0)
        own |= dict(logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False)
        own |= dict(
            disable_tqdm=True, log_level="error", max_grad_norm=0.0, dataloader_pin_memory=False
        )
        return kind(tempfile.mkdtemp(), **{**own, **changes})
    def train_losses(trainer):
        "Train; the loss of each step."
        with hushed(), quiet(), redirect_stdout(io.StringIO()): trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]
    def evaluated(trainer):
        "What the trainer's evaluation says."
        with hushed(), quiet(), redirect_stdout(io.StringIO()):
            return trainer.evaluate()
    def plain_trainer(shape="mining", collate_settings={}, kind=Trainer, **kwargs):
        "transformers' `Trainer` around a new model, our dataset and our collator."
        model, processor = tiny(shape)
        changes = {k: kwargs.pop(k) for k in [*kwargs] if hasattr(TrainingArguments, k)}
        args = settings(**{"remove_unused_columns": False, **changes})
        collate = DataCollatorForSupervisedDataset.for_model(model.config, 0, **collate_settings)
        data = make_dataset(processor, folder)
        with quiet(): return kind(model, args, collate, data, data, **kwargs)
    def everything(trainer):
        "All samples of the dataset as one batch."
        data = trainer.train_dataset
        return trainer.data_collator([data[i] for i in range(len(data))])
    def by_formula(model, batch, epsilon=0.0):
        "Mean loss of supervised tokens, smoothed over the vocabulary, written out."
        model.eval()
        log_p = model(**batch).logits[:, :-1].log_softmax(-1)
        labels = batch["labels"][:, 1:]
        own = labels != IGNORE_INDEX
        nll = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][own].mean()
        return ((1 - epsilon) * nll - epsilon * log_p.mean(-1)[own].mean()).item()
    def doubled(outputs, labels, num_items_in_batch):
        "Twice the usual loss."
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return 2 * F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
    def ask(processor):
        "One question with an image, one with two, one without, and answers."
        questions = ["<image>\nwhat color?", "<image><image>\nwhat color?", "what color?"]
        images = [[photo("red")], [photo("green"), photo("blue")], []]
        talks = [talk(question, "a blue circle") for question in questions]
        return processor(talks, images)
    def lora(**changes):
        "Adapters of every linear layer, not zero at the start."
        torch.manual_seed(0)
        own = dict(task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False)
        return LoraConfig(**{**own, **changes})
    def targets(adapted):
        "Names of the layers that have adapters."
        names = [n for n, _ in adapted.named_parameters() if "lora_A" in n]
        return [n.removeprefix("base_model.model.").partition(".lora_A")[0] for n in names]
    def messages(question, answer):
        return {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
    def talks(form, n=6, text_only=False):
        """Rows with one image, with two and without: whole conversations (`messages`), or `prompt` and
    `completion`."""
        rows, names = [], list(COLORS)
        for k in range(n):
            row = messages("what color is it?", ["red", "a blue circle", "green"][k % 3])
            if form == "messages":
                row = {"messages": row["prompt"] + row["completion"]}
            if form == "pairs":
                row["chosen"] = row.pop("completion")
                row["rejected"] = [{"role": "assistant", "content": "a shape" if k % 2 else "blue"}]
            images = [photo(names[(k + j) % 3], (24 + k, 30)) for j in range([1, 2, 0][k % 3])]
            rows.append(row if text_only else {**row, "images": images})
        return Dataset.from_list(rows)
    def trl_settings(kind, **changes):
        "As above, for a configuration of TRL."
        own = dict(max_length=None, per_device_train_batch_size=6, gradient_checkpointing=False)
        return settings(kind, **{**own, **changes})
    def first_batch(trainer):
        "What the trainer's loader gives; all rows."
        return dict(next(iter(trainer.get_train_dataloader())))
    def exported(shape="llava"):
        "A model and its processor, and transformers' own of the same weights."
        model, processor = tiny(shape, has_token=True)
        with tempfile.TemporaryDirectory() as out, quiet(), hushed():
            export_llava_hf(model, processor, out, processor.chat_template)
            theirs = AutoModelForImageTextToText.from_pretrained(out)
            return (model, processor), (theirs, AutoProcessor.from_pretrained(out))
    def answer_log_prob(model, processor, prompt, answer, images):
        "Log-probability of an answer, from the conversation alone."
        parts = [{"type": "image", "image": image} for image in images]
        parts.append({"type": "text", "text": prompt[0]["content"]})
        asked = [{"role": "user", "content": parts}]
        options = dict(tokenize=True, return_dict=True, return_tensors="pt")
        whole = processor.apply_chat_template(asked + answer, **options)
        start = processor.apply_chat_template(asked, add_generation_prompt=True, **options)
        ids, n = whole["input_ids"][0], start["input_ids"].shape[1]
        log_p = model.eval()(**whole).logits[0, n - 1 : -1].log_softmax(-1)
        return log_p.gather(-1, ids[n:, None]).sum().item()
    def preference_log_probs(trainer, model):
        "Of all answers as TRL computes them: the chosen ones, then the rejected ones."
        batch = first_batch(trainer)
        mask = batch.pop("completion_mask")
        labels = batch["input_ids"].masked_fill(mask == 0, IGNORE_INDEX)
        with torch.no_grad():
            return model.eval()(**batch, labels=labels, fused_lm_head=True).log_probs.sum(1).tolist()
    def dpo(model, processing_class, text_only=False, **kwargs):
        "A `DPOTrainer` on six pairs of answers, in their order."
        from trl import DPOConfig, DPOTrainer

        args = trl_settings(DPOConfig, train_sampling_strategy="sequential")
        rows = talks("pairs", text_only=text_only)
        with quiet(), hushed():
            return DPOTrainer(
                model, args=args, train_dataset=rows, processing_class=processing_class, **kwargs
            )

def test_plain_trainer_names_what_it_drops():
    stops = []
    for drops in (False, True):
        trainer = plain_trainer(remove_unused_columns=drops, max_steps=1)
        watch = "sorted(set().union(*samples))"
        with Breakpoint(
            DataCollatorForSupervisedDataset.__call__, at="for n, sample", watch=watch
        ) as bp:
            try: print(train_losses(trainer))
            except DataError as error: print(textwrap.fill(str(error), 96))
        stops.append(bp)
    with pytest.raises(DataError, match="set remove_unused_columns=False"):
        train_losses(plain_trainer(remove_unused_columns=True))
    dropped = sorted(set(stops[0][watch]) - set(stops[1][watch]))
    assert {"image", "image_aux"} <= set(dropped), dropped
    stops[0].diff(stops[1], titles=("all keys", "keys that `forward` names"))

def test_sft_labels_at_image_tokens_are_ignored():
    needs("trl")
    from trl import SFTConfig, SFTTrainer

    model, processor = tiny("mining")
    with quiet():
        kwargs = dict(train_dataset=talks("messages"), processing_class=processor)
        trainer = SFTTrainer(model, trl_settings(SFTConfig), **kwargs)
    n_images = "int((value == self.image_token_id).sum())"
    watch = ["value", n_images]
    with Breakpoint(VLMInputs.__setitem__, at="value = value.masked_fill", watch=watch) as bp:
        first_batch(trainer)
    bp.expect({n_images: 24})
    bp.expect_after({n_images: 0})

def test_sft_equals_transformers_llava():
    needs("trl")
    from trl import SFTConfig, SFTTrainer

    losses, at_images = [], []
    for model, processor in exported():
        args = trl_settings(SFTConfig, max_steps=4)
        kwargs = dict(args=args, processing_class=processor)
        with quiet():
            batch = first_batch(SFTTrainer(model, train_dataset=talks("messages"), **kwargs))
            trainer = SFTTrainer(model, train_dataset=talks("completion"), **kwargs)
        is_image = batch["input_ids"] == model.config.image_token_id
        at_images.append(int((batch["labels"][is_image] != IGNORE_INDEX).sum()))
        losses.append(train_losses(trainer))
        print(
            f"{type(model).__name__:30}",
            *(f"{loss:.5f}" for loss in losses[-1]),
            f"  labels at image tokens: {at_images[-1]}",
        )
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4
    assert losses[0][3] < 0.7 * losses[0][0] and at_images == [0, int(is_image.sum())]

def test_dpo_encodes_each_image_once():
    needs("trl")
    model, processor = tiny("mining")
    trainer = dpo(model, processor, ref_model=copy.deepcopy(model))
    watch = ["len(features)", "image_index"]
    with Breakpoint(VLM.embed_inputs, at="if image_index", watch=watch) as bp:
        preference_log_probs(trainer, trainer.model)
    bp.expect({"len(features)": 6, "len(image_index)": 12}, hits=1)

def test_plain_trainer_computes_the_losses_it_is_asked_for():
    whole, parts = dict(per_device_train_batch_size=12), dict(gradient_accumulation_steps=4)
    parts |= dict(per_device_train_batch_size=3)
    for shape in SHAPES:
        for own, factor, epsilon in [
            ({}, 1, 0.0),
            ({"label_smoothing_factor": 0.1}, 1, 0.1),
            ({"compute_loss_func": doubled}, 2, 0.0),
        ]:
            trainer = plain_trainer(shape, **own, **whole)
            batch = everything(trainer)
            want = factor * by_formula(trainer.model, batch, epsilon)
            losses = train_losses(trainer)
            accumulated = train_losses(plain_trainer(shape, **own, **parts))
            print(f"{shape:7} {list(own)}: {losses[0]:.4f}, by hand {want:.4f}")
            assert abs(losses[0] - want) < 1e-4 and losses[1] < losses[0]
            assert max(abs(a - b) for a, b in zip(losses, accumulated)) < 1e-4

def test_plain_trainer_gathers_logits_for_metrics():
    def token_accuracy(found):
        "How many supervised tokens have the highest logit, of how many."
        labels = found.label_ids[:, 1:]
        right = found.predictions[:, :-1].argmax(-1) == labels
        return {"right": int(right.sum()), "tokens": int((labels != IGNORE_INDEX).sum())}

    for shape in SHAPES:
        trainer = plain_trainer(shape, compute_metrics=token_accuracy, per_device_eval_batch_size=12)
        train_losses(trainer)
        metrics = evaluated(trainer)
        batch = everything(trainer)
        with torch.no_grad():
            best = trainer.model.eval()(**batch).logits[:, :-1].argmax(-1)
        labels = batch["labels"][:, 1:]
        assert metrics["eval_tokens"] == int((labels != IGNORE_INDEX).sum())
        assert metrics["eval_right"] == int((best == labels).sum())
        assert abs(metrics["eval_loss"] - by_formula(trainer.model, batch)) < 1e-4
        trainer.compute_metrics = None
        trainer.args.prediction_loss_only = True
        assert evaluated(trainer)["eval_loss"] == metrics["eval_loss"]
    losses = train_losses(plain_trainer(collate_settings={"supervised_only": True}))
    assert max(abs(a - b) for a, b in zip(losses, train_losses(plain_trainer()))) < 1e-5

def test_adapters_train_and_merge_in_every_layer():
    for shape in SHAPES:
        for changes in ({}, {"use_dora": True}):
            model, processor = tiny(shape)
            base, batch = copy.deepcopy(model), ask(processor)
            adapted = get_peft_model(model, lora(**changes)).train()
            optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-3)
            loss = adapted(**batch).loss
            loss.backward()
            for name, p in adapted.named_parameters():
                if "lora_" in name:
                    assert p.grad is not None and p.grad.abs().sum() > 0, name
            optimizer.step()
            assert ("image_encoder.mining.vlm_uni_aux_projector.1" in targets(adapted)) == (
                shape == "mining"
            )
            assert "language_model.lm_head" not in targets(adapted)
            with torch.no_grad():
                adapted.eval()
                logits = adapted(**batch).logits
                assert adapted(**batch).loss < loss
                with tempfile.TemporaryDirectory() as out:
                    adapted.save_pretrained(out)
                    again = PeftModel.from_pretrained(copy.deepcopy(base), out).eval()
                    assert torch.allclose(again(**batch).logits, logits, atol=1e-4)
                merged = adapted.merge_and_unload()
                assert (
                    isinstance(merged, VLM) and type(merged.image_encoder.mm_projector[0]) is nn.Linear
                )
                scale = (logits - base(**batch).logits).abs().max()
                off = (merged(**batch).logits - logits).abs().max()
                print(f"{shape:7} {changes}: adapters move logits by {scale:.2f}, merging by {off:.0e}")
                assert off < 1e-3 * scale
                with tempfile.TemporaryDirectory() as out, quiet():
                    merged.save_pretrained(out)
                    opened = AutoModelForImageTextToText.from_pretrained(out).eval()
                assert torch.equal(opened(**batch).logits, merged(**batch).logits)

def test_prompt_tuning_with_images():
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(tiny("llava")[0], LoraConfig(task_type="CAUSAL_LM"))
    for shape in SHAPES:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        model, processor = tiny(shape)
        prompted, batch = get_peft_model(model, config), ask(processor)
        with pytest.raises(ConfigError, match=r"model.resize_token_embeddings\(\d+\) first"):
            prompted(**batch)
        text = processor([talk("what color?", "red")])
        assert prompted(**text).loss > 0  # no image, no placeholder
        model, _ = tiny(shape)
        token = model.config.image_token_id
        model.resize_token_embeddings(token + 1, mean_resizing=False)
        model.get_input_embeddings().weight.data[token] = 0.3  # one of its own
        usual = model(**batch).logits
        prompted = get_peft_model(model, config)
        out = prompted(**batch)
        out.loss.backward()
        assert prompted.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0
        prompts = prompted.get_prompt(3)
        embeds = torch.cat([prompts, model.embed(batch["input_ids"])], 1)
        images = {k: v for k, v in batch.items() if k.startswith(("pixel", "image_index"))}
        mask = F.pad(batch["attention_mask"], (4, 0), value=1)
        want = model(inputs_embeds=embeds, attention_mask=mask, **images).logits
        assert torch.allclose(out.logits, want, atol=1e-5)
        assert (out.logits[:, 4:] - usual).abs().max() > 1e-3
        prompt = processor("<image><image>\nwhat color?", [photo("green"), photo("blue")])
        limit = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
        written = prompted.generate(**prompt, **limit)
        embeds = torch.cat([prompts[:1], model.embed(prompt["input_ids"])], 1)
        images = {k: v for k, v in prompt.items() if k.startswith("pixel")}
        want = model.generate(inputs_embeds=embeds, **images, **limit)
        assert torch.equal(written[:, -3:], want[:, -3:])

def test_sft_ignores_image_tokens():
    needs("trl")
    from trl import SFTConfig, SFTTrainer

    for shape in SHAPES:
        for form in ("messages", "completion"):
            model, processor = tiny(shape)
            with quiet():
                trainer = SFTTrainer(
                    model,
                    trl_settings(SFTConfig),
                    train_dataset=talks(form),
                    processing_class=processor,
                )
            batch = first_batch(trainer)
            ids, labels, mask = (batch[k] for k in ("input_ids", "labels", "attention_mask"))
            is_image = ids == processor.image_token_id
            assert int(is_image.sum()) == 6 * model.config.num_image_tokens
            assert (labels[is_image] == IGNORE_INDEX).all()
            own = mask.bool() & ~is_image
            if form == "messages": assert torch.equal(labels[own], ids[own])
            answers = [row[row != IGNORE_INDEX] for row in labels]
            print(f"{shape:7} {form:10}", repr(processor.tokenizer.decode(answers[0]))[-70:])
            # `Trainer` divides by the number of labels, which nothing predicts at the first position
            n_labels, n_predicted = ((x != IGNORE_INDEX).sum() for x in (labels, labels[:, 1:]))
            want = by_formula(model, batch) * n_predicted / n_labels
            losses = train_losses(trainer)
            assert abs(losses[0] - want) < 1e-3 and losses[1] < losses[0]

def test_sft_with_adapters_and_by_folder():
    needs("trl")
    from trl import SFTConfig, SFTTrainer

    for shape in SHAPES:
        model, processor = tiny(shape)
        own = dict(train_dataset=talks("completion"))
        with tempfile.TemporaryDirectory() as out, quiet(), hushed():
            model.save_pretrained(out)
            processor.save_pretrained(out)
            saving = dict(gradient_checkpointing=True, max_length=1024)  # as TRL's defaults
            own["args"] = trl_settings(SFTConfig, max_steps=3, **saving)
            trainer = SFTTrainer(out, **own)
            assert isinstance(trainer.model, VLM) and isinstance(trainer.processing_class, VLMProcessor)
            by_folder = train_losses(trainer)
        own["args"] = trl_settings(SFTConfig, max_steps=3)
        base = copy.deepcopy(model)
        with quiet():
            by_model = train_losses(SFTTrainer(copy.deepcopy(model), processing_class=processor, **own))
            trainer = SFTTrainer(model, processing_class=processor, peft_config=lora(), **own)
        assert max(abs(a - b) for a, b in zip(by_folder, by_model, strict=True)) < 1e-5
        adapted, batch = trainer.model, first_batch(trainer)
        want, losses = by_formula(adapted, batch), train_losses(trainer)
        print(
            f"{shape:7} folder: {by_folder[0]:.3f} -> {by_folder[-1]:.3f}, "
        f"adapters: {losses[0]:.3f} -> {losses[-1]:.3f}"
        )
        assert abs(losses[0] - want) < 1e-3 and losses[-1] < losses[0]
        assert same(adapted.unload(), base)  # adapters alone have trained

def test_sft_with_our_dataset_and_collator():
    needs("trl")
    from trl import SFTConfig, SFTTrainer

    def by_number(dataset, collate):
        "A `datasets.Dataset` of numbers, and a collator that reads these records."
        numbers = Dataset.from_dict({"index": range(len(dataset))})
        return numbers, lambda rows: collate([dataset[row["index"]] for row in rows])

    for shape in SHAPES:
        model, processor = tiny(shape)
        dataset = make_dataset(processor, folder)
        collate = DataCollatorForSupervisedDataset.for_model(model.config, 0)
        numbers, read = by_number(dataset, collate)
        args = trl_settings(SFTConfig, remove_unused_columns=False, per_device_train_batch_size=12)
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        kwargs = dict(args=args, train_dataset=numbers, processing_class=processor)
        with quiet():
            trainer = SFTTrainer(copy.deepcopy(model), data_collator=read, **kwargs)
        want = by_formula(trainer.model, everything(plain_trainer(shape)))
        losses = train_losses(trainer)
        assert abs(losses[0] - want) < 1e-3 and losses[1] < losses[0]
        numbers, read = by_number(dataset, DataCollatorForSupervisedDataset(0))  # sentinels stay
        with quiet(): trainer = SFTTrainer(model, data_collator=read, **kwargs)
        with pytest.raises(ConfigError, match="DataCollatorForSupervisedDataset.for_model"):
            train_losses(trainer)

def test_sft_text_only():
    needs("trl")
    from trl import SFTConfig, SFTTrainer

    losses = {}
    for name in ("tokenizer", "processor"):
        model, processor = tiny("mining")
        processor.tokenizer.chat_template = processor.chat_template
        reader = processor.tokenizer if name == "tokenizer" else processor
        with quiet(), hushed():
            trainer = SFTTrainer(
                model,
                trl_settings(SFTConfig),
                train_dataset=talks("completion", text_only=True),
                processing_class=reader,
            )
        batch = first_batch(trainer)
        own = batch["labels"][0]
        print(f"{name:9}", repr(processor.tokenizer.decode(own[own != IGNORE_INDEX])))
        want, losses[name] = by_formula(model, batch), train_losses(trainer)
        assert abs(losses[name][0] - want) < 1e-3
    assert losses["tokenizer"] == losses["processor"]

def test_dpo_log_probabilities_are_those_of_each_sample():
    needs("trl")
    for shape in SHAPES:
        model, processor = tiny(shape)
        trainer = dpo(model, processor, ref_model=copy.deepcopy(model))
        assert "image_index" in first_batch(trainer)
        found, want = preference_log_probs(trainer, trainer.model), []
        for key in ("chosen", "rejected"):
            for row in talks("pairs"):
                want.append(answer_log_prob(model, processor, row["prompt"], row[key], row["images"]))
        print(
            f"{shape:7}", *(f"{x:.2f}" for x in found[:4]), "… alone:", *(f"{x:.2f}" for x in want[:4])
        )
        assert max(abs(a - b) for a, b in zip(found, want, strict=True)) < 1e-3
        shown = [
            answer_log_prob(model, processor, r["prompt"], r["chosen"], r["images"][::-1])
            for r in talks("pairs")
        ]
        assert abs(shown[1] - want[1]) > 1e-2  # two images in another order are another prompt
        losses = train_losses(trainer)
        assert abs(losses[0] - 0.6931) < 1e-3 and losses[1] < losses[0]

def test_dpo_equals_transformers_llava_and_takes_adapters_and_text():
    needs("trl")
    losses = []
    for model, processor in exported():
        losses.append(train_losses(dpo(model, processor, ref_model=copy.deepcopy(model))))
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4
    for shape in SHAPES:
        model, processor = tiny(shape)
        base = copy.deepcopy(model)
        trainer = dpo(model, processor, peft_config=lora(init_lora_weights=True))
        losses = train_losses(trainer)
        assert losses[1] < losses[0] and same(trainer.model.unload(), base)
        model, processor = tiny(shape)
        processor.tokenizer.chat_template = processor.chat_template
        trainer = dpo(model, processor.tokenizer, True, ref_model=copy.deepcopy(model))
        found = preference_log_probs(trainer, trainer.model)
        row = talks("pairs", text_only=True)[0]
        want = answer_log_prob(model, processor, row["prompt"], row["chosen"], [])
        assert abs(found[0] - want) < 1e-3
        losses = train_losses(trainer)
        assert losses[1] < losses[0]
