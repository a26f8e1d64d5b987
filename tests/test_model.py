"Derived from nbs/09_model.ipynb by `make tests`; edit the notebook, not this file."
from dataclasses import asdict, dataclass, field
import torch
from torch import nn
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN_INDEX, ConfigError, DataError
from vlm_lit.images import finish_images
import matplotlib.pyplot as plt
from dataclasses import replace
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.batches import DataCollatorForSupervisedDataset, expanded_length, join_samples, pad_samples
from vlm_lit.breakpoints import Breakpoint
from vlm_lit.core import peek
from vlm_lit.images import make_square, prepare_image, sample_image, to_bytes
from vlm_lit.model import *

def setup_module():
    global FAMILIES, packed_and_alone, packing_model, packing_samples, small_batch, small_config
    torch.set_printoptions(precision=3, sci_mode=False)
    def small_config(**changes):
        "A model of a few thousand weights, for examples."
        text = dict(model_type="gemma", vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                    intermediate_size=32, initializer_range=.25, pad_token_id=0, bos_token_id=2, eos_token_id=1)
        vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
        vision_aux = dict(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2)
        return VLMConfig(**{**dict(text=text, vision=vision, vision_aux=vision_aux, image_size=32, image_size_aux=64, select_layer=-1, vocab_size=300), **changes})
    def small_batch():
        "Two samples: a picture and an answer of two tokens; text only, shorter, padded."
        torch.manual_seed(0)
        return dict(input_ids=torch.tensor([[2, 106, -200, 108, 20, 21, 1], [2, 30, 31, 1, 0, 0, 0]]),
                    labels=torch.tensor([[-100, -100, -100, -100, 20, 21, 1], [-100, -100, 31, 1, -100, -100, -100]]),
                    attention_mask=torch.tensor([[1]*7, [1]*4 + [0]*3]).bool(), images=torch.randn(1, 3, 32, 32), images_aux=torch.randn(1, 3, 64, 64))
    FAMILIES = {"gemma": {}, "llama": {}, "qwen2": {}, "mistral": {"sliding_window": 4}, "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}}
    def packing_model(family="gemma", attention="sdpa"):
        "A small model of one family, with the attention implementation of that name."
        torch.manual_seed(0)
        text = {**small_config().text, "model_type": family, **FAMILIES[family]}
        if family in ("qwen2",): text.pop("head_dim")
        model = VLM(small_config(text=text)).eval()
        model.language_model.set_attn_implementation(attention)
        return model
    def packing_samples(first=20):
        "Three samples; the first one's words and picture follow from `first`."
        make = lambda ids, seed: {"input_ids": torch.tensor(ids), "labels": torch.where(torch.tensor(ids) > 10, torch.tensor(ids), -100),
                                  **({"image": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed)), "image_aux": torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(seed + 1))} if -200 in ids else {})}
        return [make([2, -200, first, first + 1, first + 2], first), make([2, 30, -200, 31, 32], 900), make([11, 40, 41], 0)]
    def packed_and_alone(model, samples):
        "Logits of all samples in one row, in their order, and each from a batch of its own; and the two losses as sums."
        joined = pad_samples([join_samples(samples)], 0)
        pictures = lambda own: {"images" if k == "image" else "images_aux": torch.stack([s[k] for s in own if k in s]) for k in ("image", "image_aux") if any(k in s for s in own)}
        with torch.no_grad():
            packed = model(**joined, **pictures(samples), num_items=1)
            alone = [model(**pad_samples([s], 0), **pictures([s]), num_items=1) for s in samples]
        return packed.logits, torch.cat([a.logits for a in alone]), packed.loss, sum(a.loss for a in alone)

def test_geometry_of_the_configuration():
    test_eq((small_config().grid, small_config().num_patches, small_config().grid_aux), (4, 16, 16))
    mgm = VLMConfig(text={}, vision=dict(patch_size=14), vision_aux=dict(patch_size=4, hidden_sizes=[192, 384, 768, 1536]))
    test_eq((mgm.grid, mgm.num_patches), (24, 576))
    with expect_fail(ConfigError, contains="not a multiple of patch_size"): small_config(image_size=30)
    with expect_fail(ConfigError, contains="cannot be shared by"): small_config(image_size_aux=72)
    with expect_fail(ConfigError, contains="must hold unk_id"): small_config(used_ids=(1, 2))

def test_windows_lie_under_their_queries():
    numbered = torch.arange(16.).reshape(1, 1, 4, 4)
    print(numbered[0, 0].int().tolist())
    print(to_windows(numbered, 2)[0, :, :, 0].int().tolist())
    test_eq(to_windows(numbered, 2)[0, :, :, 0].int().tolist(), [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])

def test_query_sees_its_own_window_only():
    torch.manual_seed(0)
    mining = PatchInfoMining(16, 12)
    low, high = torch.randn(1, 16, 16), torch.randn(1, 12, 16, 16)
    changed = high.clone()
    changed[:, :, :4, :4] += 1 + torch.rand(12, 4, 4)
    moved = (mining(low, changed) - mining(low, high)).abs().amax(-1)[0] > 1e-6
    print(moved.int().reshape(4, 4).tolist())
    test_eq(moved.nonzero().flatten().tolist(), [0])
    test_close(mining.attention(low, to_windows(high, 4)).sum(-1), torch.ones(1, 16), eps=1e-5)

def test_mining_equals_the_formula_in_a_loop():
    torch.manual_seed(1)
    mining = PatchInfoMining(16, 12)
    low, high = torch.randn(2, 4, 16), torch.randn(2, 12, 6, 6)
    out = mining(low, high)
    for n in range(2):
        for p in range(4):
            row, col = divmod(p, 2)
            window = high[n, :, 3*row:3*row+3, 3*col:3*col+3].flatten(1).T
            q, k, v = mining.vlm_uni_query_projector(low[n, p]), mining.vlm_uni_aux_projector(window), mining.vlm_uni_val_projector(window)
            test_close(out[n, p], low[n, p] + (q@k.T/16**.5).softmax(-1)@v, eps=1e-5)

def test_picture_becomes_sixteen_rows():
    torch.manual_seed(0)
    encoder = ImageEncoder(small_config())
    images, images_aux = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        test_eq(tuple(encoder.low_features(images).shape), (2, 16, 16))
        test_eq(tuple(encoder.high_features(images_aux).shape), (2, 12, 16, 16))
        rows = encoder(images, images_aux)
    test_eq(tuple(rows.shape), (2, 16, 16))
    assert not torch.allclose(rows, encoder(images, -images_aux))      # the large picture matters
    test_eq(tuple(ImageEncoder(small_config(vision_aux=None))(images).shape), (2, 16, 16))   # LLaVA: no second tower

def test_pictures_land_in_their_own_gaps():
    ids = torch.tensor([[2, -200, 5, -200], [2, 7, -200, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    plan = plan_splice(ids, mask, num_patches=3)
    text = ids.clamp(min=0)[..., None].float()
    pictures = torch.tensor([[100., 101, 102], [200, 201, 202], [300, 301, 302]])[..., None]
    spliced = splice(plan, text, pictures)[..., 0].int().tolist()
    print(*spliced, sep="\n")
    test_eq(spliced, [[2, 100, 101, 102, 5, 200, 201, 202], [2, 7, 300, 301, 302, 0, 0, 0]])
    labels = torch.tensor([[-100, -100, 5, -100], [-100, 7, -100, -100]])
    test_eq(splice_labels(plan, labels).tolist(), [[-100, -100, -100, -100, 5, -100, -100, -100], [-100, 7, -100, -100, -100, -100, -100, -100]])
    test_eq(plan.filled.int().tolist(), [[1]*8, [1]*5 + [0]*3])

def test_splice_equals_a_loop_over_samples():
    torch.manual_seed(0)
    for _ in range(30):
        batch, length = int(torch.randint(1, 5, ())), int(torch.randint(1, 9, ()))
        ids = torch.randint(1, 9, (batch, length))
        ids[torch.rand(batch, length) < .25] = -200
        lengths = torch.randint(1, length + 1, (batch,))
        mask = torch.arange(length) < lengths[:, None]
        ids[~mask] = 0
        text, pictures = torch.randn(batch, length, 4), torch.randn(int((ids == -200).sum()), 3, 4)
        plan, queue = plan_splice(ids, mask, 3), iter(pictures)
        out = splice(plan, text, pictures)
        for b in range(batch):
            rows = torch.cat([next(queue) if ids[b, t] == -200 else text[b, t:t+1] for t in range(int(lengths[b]))])
            assert torch.equal(out[b, :len(rows)], rows) and plan.filled[b].sum() == len(rows) and (out[b, len(rows):] == 0).all()

def test_only_states_before_learned_tokens_are_selected():
    states = torch.arange(10.).reshape(2, 5, 1)
    labels = torch.tensor([[-100, -100, 11, 12, -100], [-100, -100, -100, -100, 13]])
    rows, targets = select_learned(states, labels)
    print(rows.flatten().tolist(), targets.tolist())
    test_eq(rows.flatten().tolist(), [1, 2, 8])      # one before each label
    test_eq(targets.tolist(), [11, 12, 13])

def test_positions_restart_with_each_sample():
    ids = torch.tensor([[5, 6, -200, 7, 8, 9, 5, 0, 0]])
    own = torch.tensor([[1, 1, 2, 2, 3, 3, 3, 0, 0]])
    plan = plan_splice(ids, own > 0, 3)
    print(splice_sample_ids(plan, own).tolist())
    print(restart_positions(splice_sample_ids(plan, own)).tolist())
    test_eq(splice_sample_ids(plan, own)[0].tolist(), [1, 1, 2, 2, 2, 2, 3, 3, 3])
    test_eq(restart_positions(splice_sample_ids(plan, own))[0].tolist(), [0, 1, 0, 1, 2, 3, 0, 1, 2])
    wide = plan_splice(torch.tensor([[-200, 7], [5, 6]]), torch.ones(2, 2).bool(), 3)       # the second row is padded only by the splice
    test_eq(splice_sample_ids(wide, torch.tensor([[1, 1], [1, 2]])).tolist(), [[1, 1, 1, 1], [1, 2, 0, 0]])
    test_eq(restart_positions(torch.tensor([[1, 2, 2, 0, 0], [1, 1, 1, 1, 1]])).tolist(), [[0, 0, 1, 0, 1], [0, 1, 2, 3, 4]])   # a sample of one token, too

def test_ids_without_a_row_are_read_as_unknown():
    table = IdTable(small_config(used_ids=(1, 3, 107, 250)))
    ids = torch.tensor([250, 107, 42, 1])
    print(table.to_rows(ids).tolist(), table.to_ids(table.to_rows(ids)).tolist())
    test_eq(table.to_rows(ids).tolist(), [3, 2, 1, 0])
    test_eq(table.to_ids(table.to_rows(ids)).tolist(), [250, 107, 3, 1])
    test_eq(table.has_row(ids).tolist(), [True, True, False, True])
    test_eq(IdTable(small_config()).to_rows(ids).tolist(), ids.tolist())

def test_head_computes_learned_rows_only():
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
    inputs_embeds, plan = model.prepare(**{k: v for k,v in small_batch().items() if k != "labels"})
    logits = model.language_model(inputs_embeds=inputs_embeds, attention_mask=plan.filled).logits
    all_rows = F.cross_entropy(logits[:, :-1].flatten(0, 1), splice_labels(plan, small_batch()["labels"])[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    all_rows.backward()
    print(f"{out.loss:.6f} {all_rows:.6f}")
    test_close(out.loss, all_rows, eps=1e-5)
    for a,b in zip(ours, [p.grad for p in model.parameters() if p.grad is not None], strict=True): test_close(a, b, eps=1e-5)

def test_picture_shown_twice_is_encoded_once():
    torch.manual_seed(0)
    model, one = VLM(small_config()), small_batch()
    twice = {**one, "input_ids": torch.tensor([[2, -200, 20, 1], [2, -200, 30, 1]]), "labels": torch.tensor([[-100, -100, 20, 1], [-100, -100, 30, 1]]), "attention_mask": torch.ones(2, 4).bool()}
    with torch.no_grad():
        indexed = model(**twice, image_index=torch.tensor([0, 0])).logits
        repeated = model(**{**twice, "images": one["images"].repeat(2, 1, 1, 1), "images_aux": one["images_aux"].repeat(2, 1, 1, 1)}).logits
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
    with expect_fail(DataError, contains="1 image sentinel(s) in input_ids for 0 image(s)"): model(**{**batch, "images": None})
    compact = VLM(small_config(used_ids=(0, 1, 2, 3, 20, 21, 30, 106, 108)))
    with expect_fail(DataError, contains="a label has no row"): compact(**batch)

def test_compact_table_has_few_rows_and_gemma_ids():
    compact = VLM(small_config(used_ids=(0, 1, 2, 3, 20, 21, 30, 31, 106, 108)))
    test_eq(compact.language_model.get_input_embeddings().weight.shape[0], 10)
    out = compact(**small_batch())
    test_eq(compact.id_table.to_ids(out.targets).tolist(), [20, 21, 1, 31, 1])
    test_eq(tuple(out.logits.shape), (5, 10))

def test_bytes_give_the_logits_of_floats():
    torch.manual_seed(0)
    model, batch = VLM(small_config()).eval(), small_batch()
    pixels = to_bytes(make_square(sample_image(), 64))
    floats = prepare_image(sample_image(), 64, 32, mean=model.cfg.image_mean, std=model.cfg.image_std)
    text = {k: v for k,v in batch.items() if not k.startswith("images")}
    with torch.no_grad():
        ours, want = model(**text, images_aux=pixels[None]), model(**text, images=floats["image"][None], images_aux=floats["image_aux"][None])
    print(f"largest difference {float((ours.logits - want.logits).abs().max()):.0e}" if not torch.equal(ours.logits, want.logits) else "equal")
    test_close(ours.logits, want.logits, eps=1e-5)
    test_close(model.double()(**text, images_aux=pixels[None]).logits, want.logits.double(), eps=1e-4)       # finished in the model's own type
    with expect_fail(DataError, contains="1 image sentinel(s) in input_ids for 2 image(s)"): model(**text, images_aux=pixels.repeat(2, 1, 1, 1))
    with expect_fail(DataError, contains="bytes in images_aux alone"): model.float()(**text, images=floats["image"][None], images_aux=pixels[None])
    with expect_fail(ConfigError, contains="reads each picture whole"): model(**text, images=floats["image"][None, None], images_aux=floats["image_aux"][None])

def test_packed_samples_do_not_see_each_other():
    for family in FAMILIES:
        for attention in ("eager", "sdpa"):
            model = packing_model(family, attention)
            packed, alone, loss, sum_of_losses = packed_and_alone(model, packing_samples())
            test_close(packed, alone, eps=1e-5)                                      # as if alone: positions, attention, targets
            test_close(loss, sum_of_losses, eps=1e-4)
            other = packed_and_alone(model, packing_samples(first=60))[0]
            assert (other[:3] - packed[:3]).abs().max() > 1e-3                        # sample 1 did change
            assert (other[3:] - packed[3:]).abs().max() < 1e-6, (family, attention)   # and the others did not notice

def test_collator_and_model_agree_on_packed_rows():
    model = packing_model()
    samples = packing_samples()
    batch = DataCollatorForSupervisedDataset(0, max_length=44, image_rows=16)(samples)
    test_eq(batch["input_ids"].shape[0], 1)                                           # 20 + 20 + 3 positions
    test_eq([expanded_length(s["input_ids"], 16) for s in samples], [20, 20, 3])
    plain = DataCollatorForSupervisedDataset(0)(samples)
    with torch.no_grad(): test_close(model(**batch, num_items=1).loss, model(**{k: v for k,v in plain.items()}, num_items=1).loss, eps=1e-4)
    careless = {**batch, "labels": torch.where(batch["attention_mask"], batch["input_ids"], -100)}     # labels that somebody else joined
    with torch.no_grad(): test_eq(model(**careless).targets.tolist(), [20, 21, 22, 30, 31, 32, 40, 41])   # no 11, no second 2
    model.language_model.config._attn_implementation = "flash_attention_2"
    with expect_fail(ConfigError, contains="packed rows need attention"): model(**batch)

def test_other_ways_to_pack_leak():
    samples, model = packing_samples(), packing_model("gemma", "eager")
    joined = pad_samples([join_samples(samples)], 0)
    pictures = dict(images=torch.stack([s["image"] for s in samples[:2]]), images_aux=torch.stack([s["image_aux"] for s in samples[:2]]))
    right = packed_and_alone(model, samples)[0]
    with torch.no_grad():
        forgotten = model(**{k: v for k,v in joined.items() if k != "sample_ids"}, **pictures).logits
        test_eq(len(forgotten), len(right))
        print(f"without sample_ids: {float((forgotten - right)[3:].abs().max()):.2f}")
        assert (forgotten[:3] - right[:3]).abs().max() < 1e-5 and (forgotten[3:] - right[3:]).abs().max() > 1e-2      # the first sample is right, the rest is not
        embeds, plan = model.prepare(joined["input_ids"], joined["attention_mask"], **pictures)
        own = splice_sample_ids(plan, joined["sample_ids"])
        mask = (own[:, :, None] == own[:, None, :]).tril()[:, None]
        run = lambda model, mask: model.language_model.base_model(inputs_embeds=embeds, attention_mask=mask, position_ids=restart_positions(own), use_cache=False).last_hidden_state
        want = run(model, None)
        print(f"four axes of True and False, eager: {float((run(model, mask) - want).abs().max()):.2f}")
        assert (run(model, mask) - want).abs().max() > 1e-2
        test_close(run(model, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)), want, eps=1e-5)      # numbers to add: right
        model = packing_model("gemma3_text", "sdpa")
        assert (run(model, mask) - run(model, None)).abs().max() > 1e-2                                                      # no windows any more

def test_text_is_scaled_once_and_pictures_are_not():
    torch.manual_seed(0)
    model, batch = VLM(small_config()), small_batch()
    with torch.no_grad():
        inputs_embeds, plan = model.prepare(**{k: v for k,v in batch.items() if k != "labels"})
        table = model.language_model.get_input_embeddings().weight
        test_close(inputs_embeds[1, 0], table[2]*16**.5, eps=1e-5)
        test_close(inputs_embeds[0, 2:18], model.image_encoder(batch["images"], batch["images_aux"])[0], eps=1e-5)
    print("text x", 16**.5, " pictures x 1")

def test_calibrated_rows_are_as_large_as_words():
    torch.manual_seed(0)
    model, batch = VLM(small_config()), small_batch()
    before, words = calibrate_projector(model, batch["images"], batch["images_aux"])
    after = rms(model.image_encoder(batch["images"], batch["images_aux"]))
    print(f"image rows {before:.3f} -> {after:.3f}, words {words:.3f}")
    test_close(after, words, eps=1e-4)
    assert before < .5*words
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)                                # bytes will do
    before, words = calibrate_projector(model, None, pixels)
    test_close(rms(model.encode_images(None, pixels, torch.zeros(1, 16))), words, eps=1e-4)
