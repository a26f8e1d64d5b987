"Derived from nbs/09b_model.ipynb by `make tests`; edit the notebook, not this file."
import copy
import torch
from dataclasses import dataclass
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from vlm_lit.core import IGNORE_INDEX, ConfigError, DataError
from vlm_lit.images import finish_images
from vlm_lit.models.towers import VIT_MODEL_TYPES
from vlm_lit.models.image_encoder import ImageEncoder, last_linear
from vlm_lit.models.splice import MergePlan, check_packing, check_pictures, plan_merge
from vlm_lit.models.splice import merge_image_features, merge_labels, merge_sample_ids, restart_positions
from vlm_lit.models.config import VLMConfig
import re, tempfile, warnings
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.data.collator import DataCollatorForSupervisedDataset, concatenate_samples
from vlm_lit.text.sentinels import num_tokens_with_images
from vlm_lit.padding import pad_samples
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.core import peek
from vlm_lit.images import resize_to_square, prepare_image, sample_image, to_bytes
from transformers.utils.logging import disable_progress_bar
from vlm_lit.models.vlm import VLM
from vlm_lit.models.vlm import match_embedding_scale
from vlm_lit.models.vlm import rms
from vlm_lit.models.vlm import run_language_model
from vlm_lit.models.vlm import supervised_positions

def setup_module():
    global FAMILIES, HEADS, SMALL_TEXT, SPECIAL_IDS, TINY_TEXT, log_likelihood, packed_and_alone, packing_model, packing_samples, question_batch, small_batch, small_config, tiny_language_model
    torch.set_printoptions(precision=3, sci_mode=False)
    disable_progress_bar()
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
    def small_batch():
        "Two samples: a picture and an answer of two tokens; text only, shorter, padded."
        torch.manual_seed(0)
        labels = [[-100, -100, -100, -100, 20, 21, 1], [-100, -100, 31, 1, -100, -100, -100]]
        return dict(
            input_ids=torch.tensor([[2, 106, -200, 108, 20, 21, 1], [2, 30, 31, 1, 0, 0, 0]]),
            labels=torch.tensor(labels),
            attention_mask=torch.tensor([[1] * 7, [1] * 4 + [0] * 3]).bool(),
            images=torch.randn(1, 3, 32, 32),
            images_aux=torch.randn(1, 3, 64, 64),
        )
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
        "Three samples; the first one's words and picture follow from `first`."

        def picture(side, seed):
            return torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed))

        def make(ids, seed):
            pictures = {"image": picture(32, seed), "image_aux": picture(64, seed + 1)}
            if -200 not in ids: pictures = {}
            ids = torch.tensor(ids)
            return {"input_ids": ids, "labels": torch.where(ids > 10, ids, -100), **pictures}

        return [
            make([2, -200, first, first + 1, first + 2], first),
            make([2, 30, -200, 31, 32], 900),
            make([11, 40, 41], 0),
        ]
    def packed_and_alone(model, samples):
        """Logits of all samples in one row, in their order, and each from a batch of its own; and the
    two losses as sums."""
        joined = pad_samples([concatenate_samples(samples)], 0)

        def pictures(own):
            found = {
                "images": [s["image"] for s in own if "image" in s],
                "images_aux": [s["image_aux"] for s in own if "image_aux" in s],
            }
            return {key: torch.stack(images) for key, images in found.items() if images}

        one = lambda s: {**pad_samples([s], 0), **pictures([s])}
        with torch.no_grad():
            packed = model(**joined, **pictures(samples), num_items_in_batch=1)
            alone = [model(**one(s), num_items_in_batch=1) for s in samples]
        logits = torch.cat([a.logits for a in alone])
        return packed.logits, logits, packed.loss, sum(a.loss for a in alone)
    def question_batch():
        "Two prompts of unequal length, one with a picture, padded on the right."
        batch = small_batch()
        return {
            **{k: v for k, v in batch.items() if k != "labels"},
            "input_ids": torch.tensor([[2, 106, -200, 108], [2, 30, 0, 0]]),
            "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
        }
    def log_likelihood(model, batch, answers):
        "Of each answer under the model, by one forward pass an answer, padding-free."
        out = []
        for ids, mask, answer in zip(batch["input_ids"], batch["attention_mask"], answers):
            row = torch.cat([ids[mask.bool()], answer])[None]
            pictures = {k: v for k, v in batch.items() if k.startswith("images") and -200 in row}
            logits = model(input_ids=row, **pictures).logits[0, -len(answer) - 1 : -1]
            out.append(float(logits.log_softmax(-1).gather(1, answer[:, None]).sum()))
        return out

def test_supervised_positions_precede_supervised_tokens():
    labels = torch.tensor([[-100, -100, 11, 12, -100], [-100, -100, -100, -100, 13]])
    places, targets = supervised_positions(labels)
    print(places.tolist(), targets.tolist())
    test_eq(places.tolist(), [1, 2, 8])  # one before each label; 8 is place 3 of the second row
    test_eq(targets.tolist(), [11, 12, 13])
    test_eq([len(x) for x in supervised_positions(torch.full((2, 3), -100))], [0, 0])
    # a first token is predicted by nobody, not by the row before
    test_eq(supervised_positions(torch.tensor([[7, -100], [8, 9]]))[1].tolist(), [9])

def test_every_familys_logits_are_its_own():
    embeds, places = torch.randn(2, 5, 16), torch.tensor([1, 4, 8])
    for family in HEADS:
        model = tiny_language_model(family)
        with torch.no_grad():
            want = model(inputs_embeds=embeds).logits.flatten(0, 1)[places]
            got = run_language_model(model, embeds, places).logits
            states = model.base_model(inputs_embeds=embeds).last_hidden_state
            bare = model.get_output_embeddings()(states.flatten(0, 1)[places])
        words = f"off by up to {float((bare - want).abs().max()):.2f}"
        if torch.allclose(bare, want, atol=1e-5): words = "equal"
        print(f"{family:8} {tuple(got.shape)}  head called by hand: {words}")
        test_close(got, want, eps=1e-5)
        assert not model.get_output_embeddings()._forward_pre_hooks  # and nothing stays behind
        test_eq(torch.allclose(bare, want, atol=1e-3), family not in ("gemma2", "cohere", "granite"))

def test_head_computes_supervised_positions_only():
    torch.manual_seed(0)
    model = VLM(small_config())
    out = model(**small_batch())
    peek(logits=out.logits, targets=out.targets, loss=out.loss)
    test_eq((tuple(out.inputs_embeds.shape), tuple(out.logits.shape)), ((2, 22, 16), (5, 300)))
    test_eq(out.targets.tolist(), [20, 21, 1, 31, 1])
    assert torch.isfinite(out.loss)

def test_loss_equals_the_loss_over_all_logits():
    torch.manual_seed(0)
    model = VLM(small_config())
    out = model(**small_batch())
    out.loss.backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    inputs_embeds, plan = model.prepare(**{k: v for k, v in small_batch().items() if k != "labels"})
    logits = model.language_model(inputs_embeds=inputs_embeds, attention_mask=plan.filled).logits
    labels = merge_labels(plan, small_batch()["labels"])[:, 1:].flatten()
    logits = logits[:, :-1].flatten(0, 1)
    all_rows = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
    all_rows.backward()
    print(f"{out.loss:.6f} {all_rows:.6f}")
    test_close(out.loss, all_rows, eps=1e-5)
    for a, b in zip(ours, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        test_close(a, b, eps=1e-5)

def test_token_losses_are_the_parts_of_the_loss():
    torch.manual_seed(0)
    out = VLM(small_config())(**small_batch())
    for target, loss in zip(out.targets.tolist(), out.token_losses.tolist()):
        print(f"{target:4}  {loss:.3f}")
    test_close(out.token_losses.mean(), out.loss, eps=1e-6)
    test_close(out.token_losses, -out.logits.log_softmax(-1)[range(5), out.targets], eps=1e-5)
    test_close(out.loss, F.cross_entropy(out.logits, out.targets, reduction="sum") / 5, eps=1e-6)
    assert out.token_losses.dtype == torch.float32 and not out.token_losses.requires_grad

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
        print(f"autocast {enabled!s:5}  {losses};  read in {out.inputs_embeds.dtype}")
        test_close(out.loss, want, eps=0.05)
        test_eq(({p.grad.dtype for p in trained}, out.loss.dtype), ({torch.float32}, torch.float32))
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in trained)
    model.image_encoder.vision_tower.to(torch.bfloat16)
    model.image_encoder.vision_tower_aux.to(torch.bfloat16)
    # frozen towers, too
    with torch.autocast("cpu", dtype=torch.bfloat16):
        test_close(model(**small_batch()).loss, want, eps=0.05)

def test_picture_shown_twice_is_encoded_once():
    torch.manual_seed(0)
    model, one = VLM(small_config()), small_batch()
    twice = {
        **one,
        "input_ids": torch.tensor([[2, -200, 20, 1], [2, -200, 30, 1]]),
        "labels": torch.tensor([[-100, -100, 20, 1], [-100, -100, 30, 1]]),
        "attention_mask": torch.ones(2, 4).bool(),
    }
    with torch.no_grad():
        indexed = model(**twice, image_index=torch.tensor([0, 0])).logits
        pictures = {key: one[key].repeat(2, 1, 1, 1) for key in ("images", "images_aux")}
        repeated = model(**{**twice, **pictures}).logits
    test_close(indexed, repeated, eps=1e-5)

def test_padding_changes_nothing():
    torch.manual_seed(0)
    model, batch = VLM(small_config()).eval(), small_batch()
    with torch.no_grad():
        together = model(**batch).logits[3:]
        alone = model(input_ids=batch["input_ids"][1:, :4], labels=batch["labels"][1:, :4]).logits
    test_close(together, alone, eps=1e-5)

def test_disagreeing_batches_are_refused():
    model, batch = VLM(small_config()), small_batch()
    with expect_fail(DataError, contains="1 image sentinel(s) in input_ids for 0 image(s)"):
        model(**{**batch, "images": None})

def test_bytes_give_the_logits_of_floats():
    torch.manual_seed(0)
    model, batch = VLM(small_config()).eval(), small_batch()
    pixels = to_bytes(resize_to_square(sample_image(), 64))
    colors = dict(mean=model.config.image_mean, std=model.config.image_std)
    floats = prepare_image(sample_image(), 64, 32, **colors)
    text = {k: v for k, v in batch.items() if not k.startswith("images")}
    with torch.no_grad():
        ours = model(**text, images_aux=pixels[None])
        want = model(**text, images=floats["image"][None], images_aux=floats["image_aux"][None])
    largest = float((ours.logits - want.logits).abs().max())
    print(f"largest difference {largest:.0e}" if largest else "equal")
    test_close(ours.logits, want.logits, eps=1e-5)
    # finished in the model's own type
    test_close(model.double()(**text, images_aux=pixels[None]).logits, want.logits.double(), eps=1e-4)
    with expect_fail(DataError, contains="1 image sentinel(s) in input_ids for 2 image(s)"):
        model(**text, images_aux=pixels.repeat(2, 1, 1, 1))
    with expect_fail(DataError, contains="bytes in images_aux alone"):
        model.float()(**text, images=floats["image"][None], images_aux=pixels[None])
    with expect_fail(ConfigError, contains="this model has image_grid 1"):
        model(**text, images=floats["image"][None, None], images_aux=floats["image_aux"][None])

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

def test_collator_and_model_agree_on_packed_rows():
    model = packing_model()
    samples = packing_samples()
    batch = DataCollatorForSupervisedDataset(0, max_length=44, num_image_tokens=16)(samples)
    test_eq(batch["input_ids"].shape[0], 1)  # 20 + 20 + 3 positions
    test_eq([num_tokens_with_images(s["input_ids"], 16) for s in samples], [20, 20, 3])
    plain = DataCollatorForSupervisedDataset(0)(samples)
    with torch.no_grad():
        loss = model(**batch, num_items_in_batch=1).loss
        test_close(loss, model(**plain, num_items_in_batch=1).loss, eps=1e-4)
    # labels that somebody else joined
    careless = {**batch, "labels": torch.where(batch["attention_mask"], batch["input_ids"], -100)}
    # no 11, no second 2
    with torch.no_grad():
        test_eq(model(**careless).targets.tolist(), [20, 21, 22, 30, 31, 32, 40, 41])
    model.language_model.config._attn_implementation = "flash_attention_2"
    with expect_fail(ConfigError, contains="packed rows need attention"):
        model(**batch)

def test_other_ways_to_pack_leak():
    samples, model = packing_samples(), packing_model("gemma", "eager")
    joined = pad_samples([concatenate_samples(samples)], 0)
    pictures = dict(
        images=torch.stack([s["image"] for s in samples[:2]]),
        images_aux=torch.stack([s["image_aux"] for s in samples[:2]]),
    )
    right = packed_and_alone(model, samples)[0]
    with torch.no_grad():
        forgotten = model(**{k: v for k, v in joined.items() if k != "sample_ids"}, **pictures).logits
        test_eq(len(forgotten), len(right))
        print(f"without sample_ids: {float((forgotten - right)[3:].abs().max()):.2f}")
        # the first sample is right, the rest is not
        assert (forgotten[:3] - right[:3]).abs().max() < 1e-5
        assert (forgotten[3:] - right[3:]).abs().max() > 1e-2
        embeds, plan = model.prepare(joined["input_ids"], joined["attention_mask"], **pictures)
        own = merge_sample_ids(plan, joined["sample_ids"])
        mask = (own[:, :, None] == own[:, None, :]).tril()[:, None]
        inputs = dict(inputs_embeds=embeds, position_ids=restart_positions(own), use_cache=False)

        def run(model, mask):
            return model.language_model.base_model(**inputs, attention_mask=mask).last_hidden_state

        want = run(model, None)
        print(f"four axes of True and False, eager: {float((run(model, mask) - want).abs().max()):.2f}")
        assert (run(model, mask) - want).abs().max() > 1e-2
        # numbers to add: right
        added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        test_close(run(model, added), want, eps=1e-5)
        model = packing_model("gemma3_text", "sdpa")
        assert (run(model, mask) - run(model, None)).abs().max() > 1e-2  # no windows any more

def test_text_is_scaled_once_and_pictures_are_not():
    torch.manual_seed(0)
    model, batch = VLM(small_config()), small_batch()
    with torch.no_grad():
        inputs_embeds, plan = model.prepare(**{k: v for k, v in batch.items() if k != "labels"})
        table = model.language_model.get_input_embeddings().weight
        test_close(inputs_embeds[1, 0], table[2] * 16**0.5, eps=1e-5)
        rows = model.image_encoder(batch["images"], batch["images_aux"])[0]
        test_close(inputs_embeds[0, 2:18], rows, eps=1e-5)
    print("text x", 16**0.5, " pictures x 1")

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
    # no gradient wanted: no picture run
    with torch.no_grad():
        test_close(model.eval()(**text_only).loss, alone, eps=1e-5)

def test_crops_and_whole_picture_are_read():
    torch.manual_seed(0)
    hd = VLM(small_config(image_grid=2, image_global=True, image_size_aux=128)).eval()
    pictures = sample_image(), sample_image(300, 400)
    pixels = torch.stack([to_bytes(resize_to_square(image, 128)) for image in pictures])
    colors = dict(mean=hd.config.image_mean, std=hd.config.image_std)
    crops = dict(image_grid=2, image_global=True)
    floats = [prepare_image(image, 128, 32, **colors, **crops) for image in pictures]
    batch = dict(
        input_ids=torch.tensor([[2, -200, 20, -200, 21]]),
        labels=torch.tensor([[-100, -100, 20, -100, 21]]),
    )
    with torch.no_grad():
        from_bytes = hd(**batch, images_aux=pixels)
        from_floats = hd(
            **batch,
            images=torch.stack([f["image"] for f in floats]),
            images_aux=torch.stack([f["image_aux"] for f in floats]),
        )
    length = from_bytes.inputs_embeds.shape[1]
    print(f"{hd.config.num_image_tokens} rows a picture; the row is {length} positions long")
    test_eq(from_bytes.inputs_embeds.shape[1], 3 + 2 * 80)
    test_close(from_bytes.logits, from_floats.logits, eps=1e-4)
    with expect_fail(ConfigError, contains="this model has image_grid 2"):
        hd(**batch, images=torch.zeros(2, 3, 32, 32), images_aux=torch.zeros(2, 3, 128, 128))

def test_saved_models_come_back_through_the_auto_classes():
    torch.manual_seed(0)
    for changes in ({}, dict(vision_aux_config=None), dict(projector_type="linear")):
        model = VLM(small_config(**changes)).eval()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
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

def test_generation_is_transformers_own():
    torch.manual_seed(0)
    model, batch = VLM(small_config()).eval(), question_batch()
    with torch.no_grad():
        five = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
        greedy = model.generate(**batch, **five)
        row = [2, 106, -200, 108]
        pictures = {key: batch[key] for key in ("images", "images_aux")}
        for _ in range(5):
            logits = model(input_ids=torch.tensor([row]), **pictures).logits
            row.append(int(logits[0, -1].argmax()))
        print(greedy.tolist())
        test_eq(greedy[0].tolist(), row[4:])
        test_eq(greedy, model.generate(**batch, **five, use_cache=False))
        # padding and neighbors do not matter
        test_eq(greedy[1:], model.generate(batch["input_ids"][1:, :2], **five))
        beams = log_likelihood(model, batch, model.generate(**batch, **five, num_beams=4))
        for beam, single in zip(beams, log_likelihood(model, batch, greedy)):
            assert beam >= single - 1e-4
        sampled = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            new_ids = model.generate(**batch, max_new_tokens=8, do_sample=True, eos_token_id=None)
            sampled.append(new_ids.tolist())
    assert sampled[0] == sampled[1] != sampled[2]

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
    print("moving:", *moving)
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
    pictures = torch.randn(2, 3, 64, 64)
    first, second = (model.image_encoder.high_features(pictures) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)

def test_calibrated_rows_are_as_large_as_words():
    torch.manual_seed(0)
    model, batch = VLM(small_config()), small_batch()
    before, words = match_embedding_scale(model, batch["images"], batch["images_aux"])
    after = rms(model.image_encoder(batch["images"], batch["images_aux"]))
    print(f"image rows {before:.3f} -> {after:.3f}, words {words:.3f}")
    test_close(after, words, eps=1e-4)
    assert before < 0.5 * words
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)  # bytes will do
    before, words = match_embedding_scale(model, None, pixels)
    test_close(rms(model.encode_images(None, pixels, torch.zeros(1, 16))), words, eps=1e-4)
