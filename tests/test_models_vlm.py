"Derived from nbs/09b_model.ipynb by `make tests`; edit the notebook, not this file."
from pathlib import Path
import torch
from dataclasses import dataclass
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoModelForMultimodalLM, AutoProcessor, GenerationMixin
from transformers import LogitsProcessorList
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN_INDEX, ConfigError, DataError
from vlm_lit.images import finish_images
from vlm_lit.image_processor import VLMImageProcessor
from vlm_lit.padding import supervised_positions as find_supervised
from vlm_lit.processor import VLMProcessor
from vlm_lit.models.towers import VIT_MODEL_TYPES
from vlm_lit.models.image_encoder import ImageEncoder, last_linear
from vlm_lit.models.splice import check_image_tokens, check_packing, expand_sentinels, merge_image_features, restart_positions
from vlm_lit.models.config import VLMConfig
import copy, re, tempfile, warnings
import matplotlib.pyplot as plt
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.data.collator import DataCollatorForSupervisedDataset, concatenate_samples
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.text.sentinels import num_tokens_with_images
from vlm_lit.padding import expand_image_tokens, pad_samples
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.core import peek
from vlm_lit.images import resize_to_square, prepare_image, sample_image, to_bytes
from transformers import GenerationConfig
from transformers.utils import logging
from vlm_lit.models.vlm import VLM
from vlm_lit.models.vlm import auto
from vlm_lit.models.vlm import check_head
from vlm_lit.models.vlm import head_logits
from vlm_lit.models.vlm import match_embedding_scale
from vlm_lit.models.vlm import rms

def setup_module():
    global FAMILIES, HEADS, SMALL_TEXT, SPECIAL_IDS, TINY_TEXT, log_likelihood, new_ids, packed_and_alone, packing_model, packing_samples, plain, question_batch, seed_sample, sentinel_batch, small_batch, small_config, supervised, talking_model, tiny_language_model
    torch.set_printoptions(precision=3, sci_mode=False)
    logging.disable_progress_bar()
    def seed_sample():
        "The question about the photo, encoded, and its processor."
        images = dict(image_size=32, image_size_aux=64, num_image_tokens=16)
        processor = VLMProcessor(load_tokenizer("gemma"), **images)
        turns = [
            {"from": "human", "value": "What is in the photo?\n<image>"},
            {"from": "gpt", "value": "the box chain purse black"},
        ]
        with tempfile.TemporaryDirectory() as folder:
            sample_image().save(Path(folder) / "photo.png")
            record = {"id": "seed", "image": "photo.png", "conversations": turns}
            return LazySupervisedDataset([record], processor, folder)[0], processor
    SPECIAL_IDS = dict(pad_token_id=0, bos_token_id=2, eos_token_id=1)
    SMALL_TEXT = dict(model_type="gemma", vocab_size=300, hidden_size=16, intermediate_size=32)
    SMALL_TEXT |= dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    SMALL_TEXT |= dict(initializer_range=0.25, **SPECIAL_IDS)
    def small_config(**changes):
        "A model of a few thousand weights, for examples."
        text = dict(SMALL_TEXT)
        vision = dict(image_size=changes.get("image_size", 32), patch_size=8, hidden_size=16)
        vision |= dict(intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        vision_aux = dict(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2)
        parts = dict(text_config=text, vision_config=vision, vision_aux_config=vision_aux)
        sizes = dict(image_size=32, image_size_aux=64, select_layer=-1)
        return VLMConfig(**{**parts, **sizes, **changes})
    TINY_TEXT = dict(vocab_size=60, hidden_size=16, intermediate_size=32, **SPECIAL_IDS)
    TINY_TEXT |= dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    HEADS = {
        "gemma": dict(head_dim=8),
        "llama": dict(tie_word_embeddings=False),
        "gemma2": dict(head_dim=8, final_logit_softcapping=0.5),
        "cohere": dict(logit_scale=0.3),
        "granite": dict(logits_scaling=7.0),
        "qwen2": {},
    }
    def tiny_language_model(family):
        "One layer of a family, with weights large enough for caps and scales to show."
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **TINY_TEXT, **HEADS[family], initializer_range=0.5)
        return AutoModelForCausalLM.from_config(config).eval()
    def sentinel_batch():
        "Two samples: an image and an answer of two tokens; text only, shorter, padded. As MGM's code."
        torch.manual_seed(0)
        labels = [[-100, -100, -100, -100, 20, 21, 1], [-100, -100, 31, 1, -100, -100, -100]]
        return dict(
            input_ids=torch.tensor([[2, 106, -200, 108, 20, 21, 1], [2, 30, 31, 1, 0, 0, 0]]),
            labels=torch.tensor(labels),
            attention_mask=torch.tensor([[1] * 7, [1] * 4 + [0] * 3]).bool(),
            pixel_values=torch.randn(1, 3, 32, 32),
            pixel_values_aux=torch.randn(1, 3, 64, 64),
        )
    def small_batch():
        "The same as the collator makes it: 16 placeholders, and where supervised tokens are predicted."
        batch = sentinel_batch()
        text = [batch[key] for key in ("input_ids", "attention_mask")]
        batch |= expand_sentinels(*text, 16, 300, labels=batch["labels"])
        return {**batch, "supervised_positions": find_supervised(batch["labels"])}
    def plain(batch):
        "A batch as other code makes it, without `supervised_positions`."
        return {key: value for key, value in batch.items() if key != "supervised_positions"}
    def question_batch(side="left"):
        "Two prompts of unequal length, one with an image; placeholders, padded on the left."
        batch = sentinel_batch()
        ids = torch.tensor([[2, 106, -200, 108], [2, 30, 0, 0]])
        mask = torch.tensor([[1] * 4, [1, 1, 0, 0]])
        images = {k: v for k, v in batch.items() if k.startswith("pixel")}
        text = expand_sentinels(ids, mask, 16, 300, side=side)
        return {**text, **images}
    def talking_model(seed=0):
        "A small model whose answers vary: head and embeddings are not tied."
        torch.manual_seed(seed)
        return VLM(small_config(text_config={**SMALL_TEXT, "tie_word_embeddings": False})).eval()
    def new_ids(model, batch, **kwargs):
        "The ids of the answers alone, by the idiom of transformers' documentation."
        settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
        out = model.generate(**batch, **{**settings, **kwargs})
        return out[:, batch["input_ids"].shape[1] :]
    def log_likelihood(model, batch, answers):
        "Of each answer under the model, by one forward pass per answer, padding-free."
        out = []
        for ids, mask, answer in zip(batch["input_ids"], batch["attention_mask"], answers):
            row = torch.cat([ids[mask.bool()], answer])[None]
            images = {k: v for k, v in batch.items() if k.startswith("pixel") and 300 in row}
            logits = model(input_ids=row, **images).logits[0, -len(answer) - 1 : -1]
            out.append(float(logits.log_softmax(-1).gather(1, answer[:, None]).sum()))
        return out
    FAMILIES = {
        "gemma": {},
        "llama": {},
        "qwen2": {},
        "mistral": {"sliding_window": 4},
        "gemma3_text": {
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    }
    def packing_model(family="gemma", attention="sdpa"):
        "A small model of one family, with the attention implementation of that name."
        torch.manual_seed(0)
        text = {**SMALL_TEXT, "model_type": family, **FAMILIES[family]}
        if family in ("qwen2",): text.pop("head_dim")
        model = VLM(small_config(text_config=text)).eval()
        model.language_model.set_attn_implementation(attention)
        return model
    def packing_samples(first=20):
        "Three samples; the first one's words and image follow from `first`."

        def photo(side, seed):
            return torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed))

        def make(ids, seed):
            photos = {"image": photo(32, seed), "image_aux": photo(64, seed + 1)}
            if -200 not in ids: photos = {}
            ids = torch.tensor(ids)
            return {"input_ids": ids, "labels": torch.where(ids > 10, ids, -100), **photos}

        return [
            make([2, -200, first, first + 1, first + 2], first),
            make([2, 30, -200, 31, 32], 900),
            make([11, 40, 41], 0),
        ]
    def supervised(batch):
        return {**batch, "supervised_positions": find_supervised(batch["labels"])}
    def packed_and_alone(model, samples):
        """Logits of all samples in one row, in their order, and each from a batch of its own; and the
    two losses as sums."""
        samples = [expand_image_tokens(s, 16, 300) for s in samples]
        joined = supervised(pad_samples([concatenate_samples(samples)], 0))

        def photos(own):
            found = {
                "pixel_values": [s["image"] for s in own if "image" in s],
                "pixel_values_aux": [s["image_aux"] for s in own if "image_aux" in s],
            }
            return {key: torch.stack(images) for key, images in found.items() if images}

        one = lambda s: {**supervised(pad_samples([s], 0)), **photos([s])}
        with torch.no_grad():
            packed = model(**joined, **photos(samples), num_items_in_batch=1)
            alone = [model(**one(s), num_items_in_batch=1) for s in samples]
        logits = torch.cat([a.supervised_logits for a in alone])
        return packed.supervised_logits, logits, packed.loss, sum(a.loss for a in alone)

def test_one_sentinel_becomes_sixteen_placeholders():
    sample, processor = seed_sample()
    ids, labels, tok = sample["input_ids"][None], sample["labels"][None], processor.tokenizer
    watch = ["input_ids", "num_image_tokens", "image_token_id", "samples[0]['input_ids'].shape"]
    with Breakpoint(expand_sentinels, "return pad_samples", watch, tokenizer=tok) as bp:
        batch = expand_sentinels(ids, None, 16, processor.image_token_id, labels=labels)
    bp.expect({"input_ids.shape": (1, 25), "samples[0]['input_ids'].shape": (40,)})
    bp.expect_return({"input_ids.shape": (1, 24 + 16), "(labels != -100).sum()": 8})

def test_every_familys_logits_are_its_own():
    embeds, places = torch.randn(2, 5, 16), torch.tensor([1, 4, 8])
    for family in HEADS:
        model = tiny_language_model(family)
        with torch.no_grad():
            want = model(inputs_embeds=embeds).logits.flatten(0, 1)[places]
            states = model.get_decoder()(inputs_embeds=embeds).last_hidden_state
            states = states.flatten(0, 1)[places]
            bare = model.get_output_embeddings()(states)
        words = f"off by up to {float((bare - want).abs().max()):.2f}"
        if torch.allclose(bare, want, atol=1e-5): words = "equal"
        print(f"{family:8} {tuple(bare.shape)}  the head alone: {words}")
        test_close(head_logits(model, states), want, eps=1e-5)
        check_head(model)
        test_eq(torch.allclose(bare, want, atol=1e-3), family not in ("gemma2", "cohere", "granite"))

    def doubled(module, inputs, out):
        out.logits = 2 * out.logits
        return out

    model.register_forward_hook(doubled)  # a family that does something else after its head
    with expect_fail(ConfigError, contains="set supervised_logits_only to false"):
        check_head(model)

def test_gemma_2_caps_its_logits():
    torch.manual_seed(0)
    model, states = tiny_language_model("gemma2"), torch.randn(3, 16)
    with Breakpoint(head_logits, at="return logits", watch="cap logits", set={"cap": None}) as bp:
        head_logits(model, states)
    bp.expect({"cap": 0.5, "logits.shape": (3, 60)})
    bp.expect_changed({"result.abs().max().item()": (0.5, 6.5)}, tolerance=0.1)

def test_features_are_at_their_placeholders():
    torch.manual_seed(0)
    model = VLM(small_config())
    watch = ["is_image.sum()", "features.shape[:2].numel()", "inputs_embeds", "features"]
    with Breakpoint(merge_image_features, at="return inputs_embeds", watch=watch) as bp:
        model(**small_batch())
    bp.expect({"is_image.sum()": 16, "features.shape[:2].numel()": 16})
    bp.expect({"is_image[0].nonzero().flatten().tolist()": list(range(2, 18))})
    bp.expect({"inputs_embeds.shape": (2, 22, 16), "features.shape": (1, 16, 16)})

def test_swapped_images_change_the_loss_alone():
    torch.manual_seed(0)
    model = VLM(small_config()).eval()
    ids = torch.tensor([[2, -200, 20, -200, 21, 1]])
    labels = torch.where(ids > 10, ids, -100)
    images = dict(pixel_values=torch.randn(2, 3, 32, 32), pixel_values_aux=torch.randn(2, 3, 64, 64))
    swapped = {"image_index": torch.tensor([1, 0])}  # which image each place shows
    with Breakpoint(VLM.forward, at="text = input_ids", watch="image_index", set=swapped) as bp:
        model(ids, labels=labels, **images)
    bp.expect_changed(loss=(5.839, 5.521), tolerance=0.001)

def test_head_runs_at_five_positions():
    torch.manual_seed(0)
    model = VLM(small_config())
    watch = ["inputs['inputs_embeds']", "places", "states", "logits"]
    with Breakpoint(VLM.supervised_forward, at="kept = {", watch=watch) as bp:
        model(**small_batch())
    bp.expect({"inputs['inputs_embeds'].shape": (2, 22, 16)}, places=[18, 19, 20, 23, 24])
    bp.expect({"states.shape": (5, 16), "logits.shape": (5, 300)})
    bp.expect_return({"result.logits": None, "supervised_logits.shape": (5, 300)})

def test_loss_is_the_sum_over_the_global_number():
    torch.manual_seed(0)
    model = VLM(small_config())
    watch = "places targets losses n_items loss"
    with Breakpoint(VLM.add_loss, at="out.loss, out.token_losses", watch=watch) as bp:
        out = model(**small_batch(), num_items_in_batch=5 + 7)
    bp.expect(targets=[20, 21, 1, 31, 1], n_items=12)
    bp.expect({"-logits.log_softmax(-1)[range(5), targets] - losses": [0.0] * 5}, tolerance=1e-5)
    bp.expect(loss=bp["losses"].sum() / 12, tolerance=1e-6)

def test_unshifted_labels_are_other_targets():
    torch.manual_seed(0)
    model = VLM(small_config())
    shift = {"labels": lambda labels: labels.roll(1, 1)}  # undone by the shift that follows
    line = "if supervised_positions is not None and labels"
    with Breakpoint(VLM.forward, at=line, watch="labels", set=shift) as bp:
        model(**small_batch())
    bp.expect_changed(loss=(5.652, 2.368), tolerance=0.001)
    bp.expect_changed(
        {"token_losses[0].item()": (4.0, 0), "token_losses[3].item()": (5.57, 0)}, tolerance=0.01
    )

def test_forgotten_mask_changes_the_padded_prompt():
    model, batch = talking_model(), question_batch(side="left")
    everything = {"attention_mask": lambda mask: torch.ones_like(mask)}
    with Breakpoint(VLM.forward, "text = input_ids", "attention_mask", set=everything) as bp:
        with torch.no_grad(): out = model(**batch)
    assert torch.equal(out.logits[0], model(**batch).logits[0])
    bp.expect_changed({"logits[1, -1, 0].item()": (-1.371, -1.268)}, tolerance=0.001)

def test_image_features_are_not_scaled():
    torch.manual_seed(0)
    model = VLM(small_config())
    scaled = {"features": lambda features: features * 16**0.5}
    watch = ["embeds[1, 0]", "self.get_input_embeddings().weight[2]", "features"]
    with Breakpoint(VLM.embed_inputs, "return merge_image", watch, set=scaled) as bp:
        model(**small_batch())
    bp.expect({"embeds[1, 0] / self.get_input_embeddings().weight[2]": [4.0] * 16}, tolerance=1e-5)
    bp.expect_changed({"result[0][0, 2:18].norm().item()": (4.34, 17.36)}, tolerance=0.01)

def test_black_image_keeps_the_gradients():
    torch.manual_seed(0)
    model = VLM(small_config()).train()
    ids, labels = torch.tensor([[2, 30, 31, 1]]), torch.tensor([[-100, -100, 31, 1]])
    watch, change = "has_images needs_blank", {"needs_blank": False}
    with Breakpoint(VLM.embed_inputs, at="if needs_blank:", watch=watch, set=change) as bp:
        model(ids, labels=labels).loss.backward()
    encoder = list(model.image_encoder.parameters())
    print(sum(p.grad is not None for p in encoder), "gradients without the black image", end=", ")
    model(ids, labels=labels).loss.backward()
    print(sum(p.grad is not None for p in encoder), "of", len(encoder), "with it")
    bp.expect(has_images=False, needs_blank=True)
    bp.expect_changed({"result[1] is None": (False, True)})

def test_positions_restart_in_a_packed_row():
    model = packing_model()
    settings = dict(max_length=44, supervised_only=True)
    packs = DataCollatorForSupervisedDataset.for_model(model.config, 0, **settings)
    batch = packs(packing_samples())
    watch = ["kwargs['position_ids']", "sample_ids", "attention_mask"]
    with Breakpoint(VLM.decoder_inputs, at="inputs = dict(inputs_embeds", watch=watch) as bp:
        model(**batch)
    zeros = "(kwargs['position_ids'][0] == 0).nonzero().flatten().tolist()"
    bp.expect({zeros: [0, 20, 40]}, attention_mask=None)

def test_without_sample_ids_later_samples_leak():
    model = packing_model()
    settings = dict(max_length=44, supervised_only=True)
    packs = DataCollatorForSupervisedDataset.for_model(model.config, 0, **settings)
    line, forgotten = "text = input_ids", {"sample_ids": None}
    with Breakpoint(VLM.forward, at=line, watch="sample_ids", set=forgotten) as bp:
        with torch.no_grad(): out = model(**packs(packing_samples()))
    right = bp.hits[0].outcomes[0]["token_losses"]
    test_close(right[:3], out.token_losses[:3], eps=1e-5)
    bp.expect_changed(loss=(6.035, 6.242), tolerance=0.001)
    bp.expect_changed({"token_losses[3].item()": (6.159, 6.535)}, tolerance=0.001)

def test_images_are_read_in_the_first_pass():
    model, batch = talking_model(), {k: v[:1] for k, v in question_batch().items()}
    watch = ["'pixel_values' in found", "found['input_ids'].shape[1]"]
    with Breakpoint(VLM.prepare_inputs_for_generation, at="return found", watch=watch) as bp:
        print("answer:", new_ids(model, batch, max_new_tokens=3).tolist())
    bp.expect_each({watch[0]: [True, False, False], watch[1]: [19, 1, 1]})

def test_image_features_get_the_scale_of_text():
    torch.manual_seed(0)
    model, batch = VLM(small_config()), small_batch()
    images = batch["pixel_values"], batch["pixel_values_aux"]
    with Breakpoint(match_embedding_scale, at="last.weight.mul_", watch="before words") as bp:
        match_embedding_scale(model, *images)
    print(f"after it {rms(model.encode_images(*images)):.3f}")
    bp.expect(before=0.271, words=1.012, tolerance=1e-2)

def test_packed_samples_without_labels_do_not_see_each_other():
    model = packing_model("gemma", "eager")
    settings = dict(max_length=44)
    packs = DataCollatorForSupervisedDataset.for_model(model.config, 0, **settings)
    logits = []
    for first in (50, 60):
        batch = packs(packing_samples(first=first) if first != 50 else packing_samples())
        labels = batch.pop("labels")
        batch.pop("supervised_positions", None)
        with torch.no_grad(): logits.append(model(**batch).logits)
    later = batch["sample_ids"] == batch["sample_ids"].max()
    assert (logits[0] - logits[1]).abs().max() > 1e-3  # the first sample has changed
    assert (logits[0] - logits[1])[later].abs().max() < 1e-6  # the last one has not

def test_image_shown_twice_is_encoded_once():
    torch.manual_seed(0)
    model, one = VLM(small_config()).eval(), sentinel_batch()
    twice = {
        **one,
        "input_ids": torch.tensor([[2, -200, 20, 1], [2, -200, 30, 1]]),
        "labels": torch.tensor([[-100, -100, 20, 1], [-100, -100, 30, 1]]),
        "attention_mask": torch.ones(2, 4).bool(),
    }
    with torch.no_grad():
        indexed = model(**twice, image_index=torch.tensor([0, 0])).logits
        images = {key: one[key].repeat(2, 1, 1, 1) for key in ("pixel_values", "pixel_values_aux")}
        repeated = model(**{**twice, **images}).logits
    test_close(indexed, repeated, eps=1e-5)

def test_collator_and_model_agree_on_packed_rows():
    model = packing_model()
    samples = packing_samples()
    packs = DataCollatorForSupervisedDataset.for_model(model.config, 0, max_length=44)
    batch = packs(samples)
    test_eq(batch["input_ids"].shape[0], 1)  # 20 + 20 + 3 positions
    test_eq([num_tokens_with_images(s["input_ids"], 16) for s in samples], [20, 20, 3])
    padded = DataCollatorForSupervisedDataset.for_model(model.config, 0, supervised_only=True)(samples)
    sentinels = DataCollatorForSupervisedDataset(0)(samples)
    with torch.no_grad():
        loss = model(**batch, num_items_in_batch=1).loss
        test_close(loss, model(**padded, num_items_in_batch=1).loss, eps=1e-4)
        test_close(loss, model(**sentinels, num_items_in_batch=1).loss, eps=1e-4)
    # labels that somebody else joined: no 11, no second 2
    careless = {**batch, "labels": torch.where(batch["attention_mask"], batch["input_ids"], -100)}
    with torch.no_grad(): n_supervised = len(model(**careless).token_losses)
    test_eq(n_supervised, len([20, 21, 22, 30, 31, 32, 40, 41]))
    model.language_model.config._attn_implementation = "flash_attention_2"
    with expect_fail(ConfigError, contains="packed rows need attention"):
        model(**batch)

def test_head_computes_supervised_positions_only():
    torch.manual_seed(0)
    model = VLM(small_config())
    out = model(**small_batch())
    test_eq((tuple(out.supervised_logits.shape), out.logits), ((5, 300), None))
    test_eq(tuple(out.image_hidden_states.shape), (1, 16, 16))
    assert torch.isfinite(out.loss)
    every = model(**plain(small_batch()))
    test_eq((tuple(every.logits.shape), every.supervised_logits), ((2, 22, 300), None))
    test_close(every.loss, out.loss, eps=1e-5)
    test_close(every.token_losses, out.token_losses, eps=1e-5)

def test_loss_equals_the_loss_over_all_logits():
    torch.manual_seed(0)
    model, batch = VLM(small_config()), small_batch()
    out = model(**batch)
    out.loss.backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    logits = model(**{**plain(batch), "labels": None}).logits[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    all_positions = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
    all_positions.backward()
    test_close(out.loss, all_positions, eps=1e-5)
    for a, b in zip(ours, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        test_close(a, b, eps=1e-5)

def test_token_losses_are_the_parts_of_the_loss():
    torch.manual_seed(0)
    batch = small_batch()
    out = VLM(small_config())(**batch)
    targets = batch["labels"].flatten()[batch["supervised_positions"] + 1]
    test_eq(targets.tolist(), [20, 21, 1, 31, 1])
    test_close(out.token_losses.mean(), out.loss, eps=1e-6)
    test_close(out.token_losses, -out.supervised_logits.log_softmax(-1)[range(5), targets], eps=1e-5)
    test_close(out.loss, F.cross_entropy(out.supervised_logits, targets, reduction="sum") / 5, eps=1e-6)
    assert out.token_losses.dtype == torch.float32 and not out.token_losses.requires_grad

def test_training_step_compiles_as_one_graph():
    torch.manual_seed(0)
    model, batch = VLM(small_config()).train(), small_batch()
    want = model(**batch).loss
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    loss = compiled(**batch).loss
    loss.backward()
    test_close(loss, want, eps=1e-6)
    assert all(p.grad is not None for p in model.parameters())

def test_frozen_language_model_in_bf16():
    torch.manual_seed(0)
    model = VLM(small_config()).requires_grad_(False)
    want = model(**small_batch()).loss
    model.language_model.to(torch.bfloat16)
    trained = [*model.image_encoder.mm_projector.parameters(), *model.image_encoder.mining.parameters()]
    for p in trained: p.requires_grad_(True)
    for enabled in (True, False):
        for p in trained: p.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = model(**small_batch())
        out.loss.backward()
        losses = f"loss {out.loss:.3f}, in float32 {want:.3f}"
        test_close(out.loss, want, eps=0.05)
        test_eq(({p.grad.dtype for p in trained}, out.loss.dtype), ({torch.float32}, torch.float32))
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in trained)
    model.image_encoder.vision_tower.to(torch.bfloat16)
    model.image_encoder.vision_tower_aux.to(torch.bfloat16)
    # frozen towers, too
    with torch.autocast("cpu", dtype=torch.bfloat16):
        test_close(model(**small_batch()).loss, want, eps=0.05)

def test_padding_changes_nothing():
    torch.manual_seed(0)
    model, batch = VLM(small_config()).eval(), plain(small_batch())
    with torch.no_grad():
        together = model(**batch).logits
        alone = model(input_ids=batch["input_ids"][1:, :4]).logits
        test_close(together[1, :4], alone[0], eps=1e-5)
        left = expand_sentinels(*list(sentinel_batch().values())[:3:2], 16, 300, side="left")
        images = {key: batch[key] for key in ("pixel_values", "pixel_values_aux")}
        moved = model(**left, **images).logits
    for n, filled in enumerate(batch["attention_mask"]):
        test_close(moved[n][left["attention_mask"][n]], together[n][filled], eps=1e-5)

def test_disagreeing_batches_are_refused_and_sentinels_expanded():
    torch.manual_seed(0)
    model, batch = VLM(small_config()).eval(), plain(small_batch())
    with expect_fail(DataError, contains="16 image placeholder(s) in input_ids and no image"):
        model(**{**batch, "pixel_values": None, "pixel_values_aux": None})
    with expect_fail(DataError, contains="16 image placeholder(s) in input_ids for 2 image(s)"):
        model(**batch | {k: batch[k].repeat(2, 1, 1, 1) for k in ("pixel_values", "pixel_values_aux")})
    with expect_fail(DataError, contains="this model reads pixel_values_aux as well"):
        model(**{**batch, "pixel_values_aux": None})
    want = model(**batch)
    mgm = {k.replace("pixel_values", "images"): v for k, v in sentinel_batch().items()}
    mgm = model(**mgm)
    assert torch.equal(mgm.loss, want.loss) and torch.equal(mgm.logits, want.logits)
    careless = torch.where(batch["attention_mask"], batch["input_ids"], -100)
    n_text = int(((careless >= 0) & (careless != 300))[:, 1:].sum())
    test_eq(len(model(**{**batch, "labels": careless}).token_losses), n_text)
    with expect_fail(ConfigError, contains="leave out logits_to_keep"):
        model(**batch, logits_to_keep=1)
    with expect_fail(IndexError):  # an id that is no token and no placeholder is not read as one
        model(input_ids=torch.tensor([[2, 301]]))

def test_bytes_give_the_logits_of_floats():
    torch.manual_seed(0)
    model, batch = VLM(small_config()).eval(), plain(small_batch())
    pixels = to_bytes(resize_to_square(sample_image(), 64))
    colors = dict(mean=model.config.image_mean, std=model.config.image_std)
    floats = prepare_image(sample_image(), 64, 32, **colors)
    text = {k: v for k, v in batch.items() if not k.startswith("pixel")}
    with torch.no_grad():
        ours = model(**text, pixel_values_aux=pixels[None])
        want = model(
            **text, pixel_values=floats["image"][None], pixel_values_aux=floats["image_aux"][None]
        )
    largest = float((ours.logits - want.logits).abs().max())
    test_close(ours.logits, want.logits, eps=1e-5)
    # finished in the model's own type
    test_close(
        model.double()(**text, pixel_values_aux=pixels[None]).logits, want.logits.double(), eps=1e-4
    )
    with expect_fail(DataError, contains="16 image placeholder(s) in input_ids for 2 image(s)"):
        model(**text, pixel_values_aux=pixels.repeat(2, 1, 1, 1))
    with expect_fail(DataError, contains="give bytes in pixel_values_aux alone"):
        model.float()(**text, pixel_values=floats["image"][None], pixel_values_aux=pixels[None])
    with expect_fail(ConfigError, contains="this model has image_grid 1"):
        model(
            **text, pixel_values=floats["image"][None, None], pixel_values_aux=floats["image_aux"][None]
        )

def test_a_batch_without_a_supervised_token_has_a_loss_of_0():
    model, batch = VLM(small_config()).train(), small_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
    if "supervised_positions" in batch:
        batch["supervised_positions"] = torch.zeros(0).long()
    for n_items in (None, 0, 1, torch.tensor(0), torch.tensor(7)):
        loss = model(**batch, num_items_in_batch=n_items).loss
        test_eq(loss.item(), 0.0)
        loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

def test_supervised_positions_need_the_padding_on_the_right():
    model = VLM(small_config()).eval()
    samples = [torch.tensor([2, 9, 8, 7, 1]), torch.tensor([2, 5, 1])]
    samples = [
        {"input_ids": ids, "labels": ids.masked_fill(torch.arange(len(ids)) == 0, IGNORE_INDEX)}
        for ids in samples
    ]
    right, left = (pad_samples(samples, 0, side) for side in ("right", "left"))
    with torch.no_grad():
        whole = model(**right).loss
        test_close(model(**supervised(right)).loss, whole, eps=1e-5)
        test_close(model(**left).loss, whole, eps=1e-5)  # the mask is used
        with expect_fail(ConfigError, contains="need padding on the right"):
            model(**supervised(left))
        image = torch.tensor([[2, model.config.image_token_id, 1]])
        with expect_fail(DataError, contains="1 image placeholder(s) in input_ids and no image"):
            model(input_ids=image, labels=image, supervised_positions=torch.tensor([1]))

def test_packed_samples_do_not_see_each_other():
    for family in FAMILIES:
        for attention in ("eager", "sdpa"):
            model = packing_model(family, attention)
            packed, alone, loss, sum_of_losses = packed_and_alone(model, packing_samples())
            test_close(packed, alone, eps=1e-5)  # as if alone: positions, attention, targets
            test_close(loss, sum_of_losses, eps=1e-4)
            other = packed_and_alone(model, packing_samples(first=60))[0]
            assert (other[:3] - packed[:3]).abs().max() > 1e-3  # sample 1 did change
            # and the others did not notice
            assert (other[3:] - packed[3:]).abs().max() < 1e-6, (family, attention)

def test_other_ways_to_pack_leak():
    samples, model = packing_samples(), packing_model("gemma", "eager")
    joined = [expand_image_tokens(s, 16, 300) for s in samples]
    joined = supervised(pad_samples([concatenate_samples(joined)], 0))
    photos = dict(
        pixel_values=torch.stack([s["image"] for s in samples[:2]]),
        pixel_values_aux=torch.stack([s["image_aux"] for s in samples[:2]]),
    )
    right = packed_and_alone(model, samples)[0]
    with torch.no_grad():
        forgotten = {k: v for k, v in joined.items() if k != "sample_ids"}
        forgotten = model(**forgotten, **photos).supervised_logits
        test_eq(len(forgotten), len(right))
        # the first sample is right, the rest is not
        assert (forgotten[:3] - right[:3]).abs().max() < 1e-5
        assert (forgotten[3:] - right[3:]).abs().max() > 1e-2
        embeds, _ = model.embed_inputs(joined["input_ids"], **photos)
        own = joined["sample_ids"]
        mask = (own[:, :, None] == own[:, None, :]).tril()[:, None]
        inputs = dict(inputs_embeds=embeds, position_ids=restart_positions(own), use_cache=False)

        def run(model, mask):
            return model.language_model.base_model(**inputs, attention_mask=mask).last_hidden_state

        want = run(model, None)
        assert (run(model, mask) - want).abs().max() > 1e-2
        # numbers to add: right
        added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        test_close(run(model, added), want, eps=1e-5)
        model = packing_model("gemma3_text", "sdpa")
        assert (run(model, mask) - run(model, None)).abs().max() > 1e-2  # no windows any more

def test_text_is_scaled_once_and_photos_are_not():
    torch.manual_seed(0)
    model, batch = VLM(small_config()), small_batch()
    with torch.no_grad():
        photos = batch["pixel_values"], batch["pixel_values_aux"]
        inputs_embeds, _ = model.embed_inputs(batch["input_ids"], None, *photos)
        table = model.language_model.get_input_embeddings().weight
        test_close(inputs_embeds[1, 0], table[2] * 16**0.5, eps=1e-5)
        rows = model.image_encoder(*photos)[0]
        test_close(inputs_embeds[0, 2:18], rows, eps=1e-5)

def test_text_only_batch_keeps_the_vision_path_in_the_graph():
    torch.manual_seed(0)
    model = VLM(small_config()).train()
    ids, labels = torch.tensor([[2, 30, 31, 1]]), torch.tensor([[-100, -100, 31, 1]])
    text_only = dict(input_ids=ids, labels=labels)
    out = model(**text_only)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    test_eq(max(float(p.grad.abs().max()) for p in model.image_encoder.parameters()), 0)
    logits = model.language_model(input_ids=ids).logits[0, 1:3]
    alone = F.cross_entropy(logits, torch.tensor([31, 1]))
    test_close(out.loss, alone, eps=1e-5)
    # no gradient wanted: no photo run
    with torch.no_grad():
        test_close(model.eval()(**text_only).loss, alone, eps=1e-5)

def test_crops_and_whole_photo_are_read():
    torch.manual_seed(0)
    hd = VLM(small_config(image_grid=2, image_global=True, image_size_aux=128)).eval()
    photos = sample_image(), sample_image(300, 400)
    pixels = torch.stack([to_bytes(resize_to_square(image, 128)) for image in photos])
    colors = dict(mean=hd.config.image_mean, std=hd.config.image_std)
    crops = dict(image_grid=2, image_global=True)
    floats = [prepare_image(image, 128, 32, **colors, **crops) for image in photos]
    batch = dict(
        input_ids=torch.tensor([[2, -200, 20, -200, 21]]),
        labels=torch.tensor([[-100, -100, 20, -100, 21]]),
    )
    with torch.no_grad():
        from_bytes = hd(**batch, pixel_values_aux=pixels)
        from_floats = hd(
            **batch,
            pixel_values=torch.stack([f["image"] for f in floats]),
            pixel_values_aux=torch.stack([f["image_aux"] for f in floats]),
        )
    length = from_bytes.logits.shape[1]
    test_eq(length, 3 + 2 * 80)
    test_close(from_bytes.logits, from_floats.logits, eps=1e-4)
    with expect_fail(ConfigError, contains="this model has image_grid 2"):
        wrong = dict(pixel_values=torch.zeros(2, 3, 32, 32))
        hd(**batch, **wrong, pixel_values_aux=torch.zeros(2, 3, 128, 128))

def test_saved_models_come_back_through_the_auto_classes():
    torch.manual_seed(0)
    for changes in ({}, dict(vision_aux_config=None), dict(projector_type="linear")):
        model = VLM(small_config(**changes)).eval()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")
            for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
                assert type(auto.from_pretrained(folder, attn_implementation="sdpa")) is VLM
            read = AutoConfig.from_pretrained(folder).to_dict()
            test_eq(read["text_config"], model.config.to_dict()["text_config"])
        assert type(again) is VLM and again.language_model.config._attn_implementation == "eager"
        pairs = zip(model.parameters(), again.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight  # still tied
        with torch.no_grad():
            test_close(again(**small_batch()).loss, model(**small_batch()).loss, eps=1e-5)
        again.set_attn_implementation("sdpa")
        for part in (again.language_model, again.image_encoder.vision_tower):
            test_eq(part.config._attn_implementation, "sdpa")

def test_a_second_save_and_other_ways_to_load():
    torch.manual_seed(0)
    model = VLM(small_config()).eval()
    with tempfile.TemporaryDirectory() as folder:
        for size in ("10KB", "5GB", "10KB"):
            for p in model.parameters(): p.data += 0.01
            model.save_pretrained(folder, max_shard_size=size)
            again = AutoModelForImageTextToText.from_pretrained(folder)
            pairs = zip(model.parameters(), again.parameters(), strict=True)
            assert all(torch.equal(p, q) for p, q in pairs), size
        placed = AutoModelForImageTextToText.from_pretrained(folder, device_map="auto").eval()
        half = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        want = model(**small_batch()).loss
        test_close(placed(**small_batch()).loss, want, eps=1e-6)
        test_close(half(**small_batch()).loss, want, eps=0.05)
    encoder = half.image_encoder
    test_eq({p.dtype for p in encoder.mining.parameters()}, {torch.float32})
    test_eq({p.dtype for p in encoder.mm_projector.parameters()}, {torch.bfloat16})

def test_generation_is_transformers_own():
    model, batch = talking_model(), question_batch()
    with torch.no_grad():
        greedy = new_ids(model, batch)
        row, images = batch["input_ids"][:1], {k: v for k, v in batch.items() if k.startswith("pixel")}
        for _ in range(5):
            logits = model(input_ids=row, **images).logits
            row = torch.cat([row, logits[:, -1:].argmax(-1)], 1)
        test_eq(greedy[0], row[0, -5:])
        for settings in (
            dict(use_cache=False),
            dict(cache_implementation="dynamic"),
            dict(cache_implementation="static"),
        ):
            test_eq(new_ids(model, batch, **settings), greedy)
        # padding and neighbors do not matter
        test_eq(greedy[1:], new_ids(model, dict(input_ids=batch["input_ids"][1:, -2:])))
        beams = log_likelihood(model, batch, new_ids(model, batch, num_beams=4))
        for beam, single in zip(beams, log_likelihood(model, batch, greedy)):
            assert beam >= single - 1e-4
        sampled = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            sampled.append(new_ids(model, batch, max_new_tokens=8, do_sample=True).tolist())
    assert sampled[0] == sampled[1] != sampled[2]
    with expect_fail(ConfigError, contains="prompt lookup may propose image_token_id 300"):
        new_ids(model, batch, prompt_lookup_num_tokens=2)
    with expect_fail(ConfigError, contains="prompt lookup may propose image_token_id 300"):
        model.generate(**batch, generation_config=GenerationConfig(prompt_lookup_num_tokens=2))
    with expect_fail(DataError, contains="prompts are padded on the right"):
        model.generate(**question_batch("right"))
    with expect_fail(DataError, contains="16 image placeholder(s) in input_ids and no image"):
        new_ids(model, {"input_ids": batch["input_ids"][:1]})
    with expect_fail(DataError, contains="16 image placeholder(s) in input_ids for 2 image(s)"):
        new_ids(model, dict(input_ids=row[:, :-5], pixel_values_aux=torch.zeros(2, 3, 64, 64).byte()))

def test_beams_share_images_and_processors_see_text():
    model = talking_model()
    counts = [2, 0, 1]
    ids = torch.tensor([[2, -200, 106, -200, 108], [2, 30, 31, 32, 33], [2, 40, 41, 42, -200]])
    batch = expand_sentinels(ids, None, 16, 300, side="left")
    images = dict(pixel_values=torch.randn(3, 3, 32, 32), pixel_values_aux=torch.randn(3, 3, 64, 64))
    watch = dict(num_beams=3, num_return_sequences=2)
    beams = new_ids(model, {**batch, **images}, **watch)
    first = 0
    for n, count in enumerate(counts):
        row = batch["input_ids"][n][batch["attention_mask"][n]][None]
        own = {k: v[first : first + count] for k, v in images.items() if count}
        test_eq(new_ids(model, dict(input_ids=row, **own), **watch), beams[2 * n : 2 * n + 2])
        first += count
    plain_ids = new_ids(model, {**batch, **images})
    for settings in (
        dict(repetition_penalty=0.1, no_repeat_ngram_size=2),  # prompt tokens again
        dict(bad_words_ids=[[int(i)] for i in plain_ids[:, 0].unique()]),
        dict(suppress_tokens=plain_ids[:, 0].unique().tolist()),
        dict(prefix_allowed_tokens_fn=lambda n, seen: [5, 6]),
    ):
        out = new_ids(model, {**batch, **images}, **settings)
        assert not torch.equal(out, plain_ids), settings
    assert set(out.flatten().tolist()) <= {5, 6}
    mgm = model.generate(ids, **images, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(mgm, torch.cat([ids, plain_ids], 1))

def test_streamers_criteria_and_drafts_see_the_prompt():
    from transformers import StoppingCriteria, StoppingCriteriaList
    from transformers.generation import BaseStreamer

    model, draft = talking_model(), talking_model(seed=1)
    batch = {k: v[:1] for k, v in question_batch().items()}
    greedy = new_ids(model, batch)

    class Written(BaseStreamer):
        ids = ()

        def put(self, value): self.ids = (*self.ids, *value.flatten().tolist())

        def end(self): pass

    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= n_prompt + 2)

    written, n_prompt = Written(), batch["input_ids"].shape[1]
    new_ids(model, batch, streamer=written)
    test_eq(list(written.ids), batch["input_ids"][0].tolist() + greedy[0].tolist())
    stopped = new_ids(model, batch, stopping_criteria=StoppingCriteriaList([AfterTwo()]))
    test_eq(stopped, greedy[:, :2])
    logging.set_verbosity_error()  # transformers warns of arguments that it passes itself
    test_eq(new_ids(model, batch, assistant_model=draft), greedy)
    logging.set_verbosity_warning()
    out = model.generate(
        **batch,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert scores.shape == (1, 5) and scores.isfinite().all()

def test_other_ways_into_the_model():
    from transformers import DynamicCache

    model, batch = talking_model(), {k: v[:1] for k, v in question_batch().items()}
    greedy, cache = new_ids(model, batch)[0], DynamicCache()
    with torch.no_grad():
        out = model(**batch, past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        step = out.logits[:, -1:].argmax(-1)
        second = model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)
        test_eq([int(step), int(second)], greedy[:2].tolist())
        last = model(**batch, logits_to_keep=1)
        test_close(last.logits, out.logits[:, -1:], eps=1e-5)
        as_tuple = model(**batch, return_dict=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.logits)
        test_eq(len(model(**batch, output_hidden_states=True).hidden_states), 3)
        features = model.get_image_features(batch["pixel_values"], batch["pixel_values_aux"])
        test_eq(features.pooler_output, out.image_hidden_states)
        embeds = model.embed(batch["input_ids"])
        images = {k: v for k, v in batch.items() if k.startswith("pixel")}
        with expect_fail(ConfigError, contains="resize_token_embeddings to more"):
            model(inputs_embeds=embeds, **images)
        model.resize_token_embeddings(320, mean_resizing=False)
        test_eq((model.config.vocab_size, model.config.text_config.vocab_size), (320, 320))
        embeds = model.embed(batch["input_ids"])  # now with the placeholder's own embedding
        again = model(inputs_embeds=embeds, **images).logits
        test_close(again[..., :300], out.logits, eps=1e-5)
        # now the prompt's own continuation can be proposed, placeholders and all
        resized = new_ids(model, batch)
        test_eq(new_ids(model, batch, prompt_lookup_num_tokens=2), resized)
        test_eq(
            model.generate(inputs_embeds=embeds, **images, max_new_tokens=2, do_sample=False).shape[1],
            2,
        )
    model.set_attn_implementation({"text_config": "eager"})
    parts = model.language_model, model.image_encoder.vision_tower
    test_eq([p.config._attn_implementation for p in parts], ["eager", "sdpa"])
    with expect_fail(ConfigError, contains="no attention in 'vision_aux_config'"):
        model.set_attn_implementation({"vision_aux_config": "eager"})

def test_base_model_is_everything_but_the_head():
    import copy

    model, batch = VLM(small_config()).eval(), plain(small_batch())
    with torch.no_grad():
        out = model.base_model(**{key: value for key, value in batch.items() if key != "labels"})
        logits = model.get_output_embeddings()(out.last_hidden_state)
        test_close(logits, model(**batch).logits, eps=1e-5)
    assert not any("base_model" in name for name, _ in model.named_modules())
    with expect_fail(ConfigError, contains="DataCollatorForSupervisedDataset.for_model"):
        model.base_model(**sentinel_batch())
    for own in (model, copy.deepcopy(model)):
        with expect_fail(ConfigError, contains="model.resize_token_embeddings(301) first"):
            own.get_input_embeddings()(batch["input_ids"])
        own.embed(batch["input_ids"])  # looked up as 0, and overwritten with image features
        with expect_fail(ConfigError):
            own.get_input_embeddings()(batch["input_ids"])

def test_adapters_and_checkpointing_change_no_loss():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = VLM(small_config()).train()
    want = model(**small_batch())
    want.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    with warnings.catch_warnings():
        # transformers 5.23 has a new name for it, 5.17 does not
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    out = model(**small_batch())
    out.loss.backward()
    test_close(out.loss, want.loss, eps=1e-6)
    for n, p in model.named_parameters():
        test_close(p.grad, gradients[n], eps=1e-5)
    targets = r".*language_model.*\.(q|v)_proj"
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=targets, modules_to_save=["mm_projector"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, lora)
    test_close(adapted(**small_batch()).loss, want.loss, eps=1e-6)  # adapters begin at zero
    names = [n for n, p in adapted.named_parameters() if p.requires_grad]
    names = [n.removeprefix("base_model.model.") for n in names]
    moving = sorted({re.sub(r"\.(lora_|modules_to_save).*", "", n) for n in names})
    last = [name.split(".")[-1] for name in moving]
    test_eq(last, ["mm_projector", "q_proj", "v_proj", "q_proj", "v_proj"])
    assert not any("vision" in name for name in moving)

def test_frozen_towers_stay_in_evaluation_mode():
    tower = dict(hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, patch_size=2)
    model = VLM(small_config(vision_aux_config={**tower, "drop_path_rate": 0.5}))
    model.train()
    assert model.image_encoder.vision_tower_aux.training
    model.image_encoder.vision_tower_aux.requires_grad_(False)
    model.train()
    assert not model.image_encoder.vision_tower_aux.training
    assert model.image_encoder.vision_tower.training
    assert model.training
    photos = torch.randn(2, 3, 64, 64)
    first, second = (model.image_encoder.high_features(photos) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)

def test_calibrated_rows_are_as_large_as_words():
    torch.manual_seed(0)
    model, batch = VLM(small_config()), small_batch()
    before, words = match_embedding_scale(model, batch["pixel_values"], batch["pixel_values_aux"])
    after = rms(model.image_encoder(batch["pixel_values"], batch["pixel_values_aux"]))
    test_close(after, words, eps=1e-4)
    assert before < 0.5 * words
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)  # bytes will do
    before, words = match_embedding_scale(model, None, pixels)
    test_close(rms(model.encode_images(None, pixels)), words, eps=1e-4)
