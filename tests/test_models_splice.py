"Derived from nbs/09a_splice.ipynb by `make tests`; edit the notebook, not this file."
import torch
from vlm_lit.core import ConfigError, DataError
from vlm_lit.padding import expand_image_tokens, pad_samples
from fastcore.test import test_eq, expect_fail
from vlm_lit.core import IMAGE_TOKEN_INDEX
from vlm_lit.debug.breakpoints import Breakpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
from vlm_lit.models.splice import check_image_tokens
from vlm_lit.models.splice import check_packing
from vlm_lit.models.splice import expand_sentinels
from vlm_lit.models.splice import merge_image_features
from vlm_lit.models.splice import packing_leak
from vlm_lit.models.splice import restart_positions

def setup_module():
    global small_model, splice
    torch.set_printoptions(precision=3, sci_mode=False)
    disable_progress_bar()
    def splice(ids, labels, mask, table, images):
        "MGM's loop: cut at each sentinel, put features in between, pad with zeros."
        queue, rows, row_labels = iter(images), [], []
        for own, targets, filled in zip(ids, labels, mask):
            vectors, kept = [], []
            for token, target in zip(own[filled], targets[filled]):
                is_image = token == IMAGE_TOKEN_INDEX
                part = next(queue) if is_image else table[token][None]
                vectors.append(part)
                kept += [-100] * len(part) if is_image else [int(target)]
            rows.append(torch.cat(vectors))
            row_labels.append(torch.tensor(kept))
        return rows, row_labels
    def small_model(kind, **changes):
        "A language model of two layers with random weights."
        torch.manual_seed(0)
        sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        sizes |= dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
        config = AutoConfig.for_model(kind, **{**sizes, **changes})
        return AutoModelForCausalLM.from_config(config)

def test_features_of_three_images():
    ids = torch.tensor([[2, 300, 300, 300, 5, 300, 300, 300], [2, 7, 300, 300, 300, 0, 0, 0]])
    images = torch.tensor([[100.0, 101, 102], [200, 201, 202], [300, 301, 302]])[..., None]
    text = ids.masked_fill(ids == 300, 0)[..., None].float()
    watch = ["is_image.sum(1)", "features[..., 0].int()"]
    with Breakpoint(merge_image_features, at="return inputs_embeds", watch=watch) as bp:
        merge_image_features(text, ids == 300, images)
    bp.expect({"is_image.sum(1)": [6, 3]})
    rows = [[2, 100, 101, 102, 5, 200, 201, 202], [2, 7, 300, 301, 302, 0, 0, 0]]
    bp.expect_return({"result[..., 0].int().tolist()": rows})

def test_swapped_images_raise_nothing():
    ids = torch.tensor([[2, 300, 300, 5], [2, 7, 300, 300]])
    images = torch.tensor([[100.0, 101], [200, 201]])[..., None]
    swap = {"features": lambda features: features.flip(0)}
    with Breakpoint(merge_image_features, "return inputs_embeds", "features", set=swap) as bp:
        merge_image_features(ids[..., None].float(), ids == 300, images)
    rows = "result[..., 0].int().tolist()"
    bp.expect_changed({f"{rows}[0]": ([2, 100, 101, 5], [2, 200, 201, 5])})
    bp.expect_changed({f"{rows}[1]": ([2, 7, 200, 201], [2, 7, 100, 101])})

def test_sentinels_become_placeholders():
    ids = torch.tensor([[2, -200, 5, -200, 6], [2, -200, 7, 8, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    watch = ["attention_mask.sum(1)", "[len(sample['input_ids']) for sample in samples]"]
    with Breakpoint(expand_sentinels, at="return pad_samples", watch=watch) as bp:
        expand_sentinels(ids, mask, 3, 300, "left")
    bp.expect({watch[1]: [9, 6]})
    bp.expect_return({"input_ids[1].tolist()": [0, 0, 0, 2, 300, 300, 300, 7, 8]})

def test_masked_copy_is_mgms_splice_to_the_bit():
    torch.manual_seed(0)
    table = torch.randn(10, 4)
    for _ in range(30):
        batch, length = int(torch.randint(1, 5, ())), int(torch.randint(1, 9, ()))
        ids = torch.randint(1, 9, (batch, length))
        labels = ids.clone()
        ids[torch.rand(batch, length) < 0.25] = IMAGE_TOKEN_INDEX
        mask = torch.arange(length) < torch.randint(1, length + 1, (batch,))[:, None]
        images = torch.randn(int(((ids == IMAGE_TOKEN_INDEX) & mask).sum()), 3, 4)
        want, want_labels = splice(ids, labels, mask, table, images)
        for side in ("right", "left"):
            out = expand_sentinels(ids, mask, 3, 9, side, labels=labels)
            own = merge_image_features(table[out["input_ids"]], out["input_ids"] == 9, images)
            filled = out["attention_mask"]
            assert all(torch.equal(a[m], b) for a, m, b in zip(own, filled, want))
            assert all(torch.equal(a[m], b) for a, m, b in zip(out["labels"], filled, want_labels))
            assert (out["labels"][~filled] == -100).all()
    print("30 batches, both sides: equal")

def test_positions_count_from_0_in_each_sample():
    own = torch.tensor([[1, 1, 2, 2, 2, 2, 3, 3, 3, 0, 0]])
    watch = ["place[0].tolist()", "begins.int()[0].tolist()"]
    with Breakpoint(restart_positions, at="return place", watch=watch) as bp:
        restart_positions(own)
    bp.expect({"begins[0].nonzero().flatten().tolist()": [0, 2, 6, 9]})
    bp.expect_return({"result[0].tolist()": [0, 1, 0, 1, 2, 3, 0, 1, 2, 0, 1]})

def test_without_beginnings_a_row_is_one_text():
    first = {"begins": lambda begins: begins.cumsum(1) * begins == 1}  # the first one only
    with Breakpoint(restart_positions, at="return place", watch="begins", set=first) as bp:
        restart_positions(torch.tensor([[1, 1, 2, 2, 2]]))
    bp.expect_changed({"result[0].tolist()": ([0, 1, 0, 1, 2], [0, 1, 2, 3, 4])})

def test_opt_does_not_keep_packed_samples_apart():
    watch = ["float((after_before - after_other).abs().max()) > 0", "states.shape"]
    with Breakpoint(packing_leak, at="return float", watch=watch) as bp:
        check_packing(small_model("llama"))
        with expect_fail(ConfigError, contains="see each other in a opt"):
            check_packing(small_model("opt", ffn_dim=64, word_embed_proj_dim=32))
    bp.expect_each({watch[0]: [False, True], watch[1]: [(3, 12, 32), (3, 12, 32)]})

def test_images_take_their_own_places():
    ids = torch.tensor([[2, 300, 300, 300, 5, 300, 300, 300], [2, 7, 300, 300, 300, 0, 0, 0]])
    images = torch.tensor([[100.0, 101, 102], [200, 201, 202], [300, 301, 302]])[..., None]
    text = ids.masked_fill(ids == 300, 0)[..., None].float()
    merged = merge_image_features(text, ids == 300, images)[..., 0].int().tolist()
    test_eq(merged, [[2, 100, 101, 102, 5, 200, 201, 202], [2, 7, 300, 301, 302, 0, 0, 0]])
    check_image_tokens(ids == 300, 3, 3)
    with expect_fail(DataError, contains="9 image placeholder(s) in input_ids for 2 image(s) of 3"):
        check_image_tokens(ids == 300, 2, 3)
    with expect_fail(DataError, contains="9 image placeholder(s) in input_ids and no image; if a Tr"):
        check_image_tokens(ids == 300, 0, 3)

def test_masked_copy_compiles_without_a_break():
    def compiled_part(ids, text, features):
        return merge_image_features(text, ids == 300, features)

    fast = torch.compile(compiled_part, fullgraph=True, backend="eager")
    ids = torch.tensor([[2, 300, 300, 5], [2, 7, 300, 300]])
    text, features = torch.randn(2, 4, 4), torch.randn(2, 2, 4)
    assert torch.equal(fast(ids, text, features), compiled_part(ids, text, features))

def test_positions_restart_with_each_sample():
    own = torch.tensor([[1, 1, 2, 2, 2, 2, 3, 3, 3, 0, 0]])
    test_eq(restart_positions(own)[0].tolist(), [0, 1, 0, 1, 2, 3, 0, 1, 2, 0, 1])
    # sentinels of packed rows, expanded: the number of the sample is repeated
    ids = torch.tensor([[5, 6, -200, 7, 8, 9, 5, 0, 0]])
    numbers = torch.tensor([[1, 1, 2, 2, 3, 3, 3, 0, 0]])
    out = expand_sentinels(ids, numbers > 0, 3, 300, sample_ids=numbers)
    test_eq(out["sample_ids"][0].tolist(), [1, 1, 2, 2, 2, 2, 3, 3, 3])
    # a sample of one token, too
    positions = restart_positions(torch.tensor([[1, 2, 2, 0, 0], [1, 1, 1, 1, 1]]))
    test_eq(positions.tolist(), [[0, 0, 1, 0, 1], [0, 1, 2, 3, 4]])

def test_packing_is_tried_on_every_family():
    from transformers.utils import logging

    logging.set_verbosity_error()  # of kernels that are not installed
    apart = {"llama": {}, "mistral": dict(sliding_window=4), "qwen2": {}, "gemma": dict(head_dim=8)}
    apart |= {"gemma3_text": dict(head_dim=8), "mixtral": dict(num_local_experts=2), "phi": {}}
    apart |= {"gpt_neox": {}, "olmo2": {}}
    small = dict(n_layer=2, n_head=4)
    mamba = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
    linear = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8)
    linear |= dict(linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, head_dim=8)
    linear |= dict(moe_intermediate_size=16, shared_expert_intermediate_size=16)
    mixed = dict(layer_types=["linear_attention", "full_attention"])
    leaking = {"bloom": small, "falcon": {}, "mamba": {}, "bert": {}, "falcon_h1": mamba}
    leaking |= {"lfm2": dict(layer_types=["conv", "full_attention"]), "qwen3_next": linear | mixed}
    for kinds, is_apart in [(apart, True), (leaking, False)]:
        for kind, changes in kinds.items():
            for dtype in (torch.float32, torch.bfloat16):
                leak = packing_leak(small_model(kind, **changes).to(dtype))
                assert (leak < 2e-4) == is_apart, (kind, dtype, leak)
    model = small_model("llama").train()
    check_packing(model)
    assert model.training and all(p.grad is None for p in model.parameters())
    with Breakpoint(packing_leak, at="was_training =") as bp: check_packing(model)
    test_eq(bp.hits, [])  # not tried twice
    model.config._attn_implementation = "flash_attention_2"
    with expect_fail(ConfigError, contains="need attention 'sdpa' or 'eager'"):
        check_packing(model)
