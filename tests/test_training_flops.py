"Derived from nbs/15a_flops.ipynb by `make tests`; edit the notebook, not this file."
import torch
from vlm_lit.core import ConfigError
from vlm_lit.models.towers import VIT_MODEL_TYPES, tower_depth
import io
import matplotlib.pyplot as plt
from IPython import display
from fastcore.test import test_eq, test_close, expect_fail
from torch.utils.flop_counter import FlopCounterMode
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from transformers import ConvNextConfig
from vlm_lit.models.vlm import VLM
from vlm_lit.models.config import VLMConfig
from vlm_lit.models.towers import EfficientNetLiteConfig, build_vision_tower, stage_maps
from vlm_lit.models.mining import PatchInfoMining
from vlm_lit.training.flops import backward_products, causal_pairs, mining_products, tower_ops
from vlm_lit.models.splice import expand_sentinels
from vlm_lit.padding import supervised_positions
from vlm_lit.training.flops import PARTS
from vlm_lit.training.flops import flops_table
from vlm_lit.training.flops import peak_flops
from vlm_lit.training.flops import trainable_parts
from vlm_lit.training.flops import training_flops
from vlm_lit.training.flops import vit_ops

def setup_module():
    global CLIP_L, CONVNEXT_L, GEMMA_2B, MGM_2B, SAMPLE, STAGE_1, STAGE_2, counted, show, small_config
    plt.rcParams.update({"figure.dpi": 100, "font.size": 9, "figure.facecolor": "white"})
    CLIP_L = dict(model_type="clip_vision_model", image_size=336, patch_size=14, hidden_size=1024)
    CLIP_L |= dict(intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    def show(figure):
        "A figure as a notebook displays it."
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=80)
        plt.close(figure)
        return display.Image(out.getvalue())
    GEMMA_2B = dict(vocab_size=256_000, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18)
    GEMMA_2B |= dict(num_attention_heads=8, num_key_value_heads=1, head_dim=256)
    CONVNEXT_L = dict(hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3])
    MGM_2B = VLMConfig(
        text_config=dict(model_type="gemma", **GEMMA_2B),
        vision_aux_config=dict(model_type="convnext", **CONVNEXT_L),
    )
    STAGE_1, STAGE_2 = {"mining", "projector"}, {"mining", "projector", "language_model"}
    SAMPLE = dict(lengths=[576 + 63], n_images=1, n_supervised=20)
    def small_config(aux=False, **changes):
        "A `VLMConfig` of a few thousand weights."
        common = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        text = dict(model_type="gemma", vocab_size=10, intermediate_size=16, **common)
        text |= dict(num_key_value_heads=1, head_dim=4)
        vision = dict(model_type="clip_vision_model", intermediate_size=12, **common)
        vision |= dict(image_size=8, patch_size=4)
        high = dict(model_type="convnext", hidden_sizes=[4, 6], depths=[1, 2])
        high |= dict(num_stages=2, patch_size=2)
        sizes = dict(image_size=8, select_layer=-1, projector_type="linear", image_size_aux=16)
        return VLMConfig({**text, **changes}, vision, high if aux else None, **sizes)
    def counted(config, trainable, backward=True, n=3):
        "FLOPs of a step by PyTorch's counter, and by ours with all pairs of attention."
        torch.manual_seed(0)
        model = VLM(config)
        model.set_attn_implementation("eager")
        for name, p in model.named_parameters():
            parts = name.replace("mm_projector", "projector").split(".")
            p.requires_grad_(bool(set(parts) & set(trainable)))
        ids = torch.randint(1, 9, (n, 7))
        ids[:, 1] = IMAGE_TOKEN_INDEX
        labels = ids.clone()
        labels[:, :4] = IGNORE_INDEX
        images = {"pixel_values": torch.randn(n, 3, config.image_size, config.image_size)}
        if config.vision_aux_config:
            images["pixel_values_aux"] = torch.randn(n, 3, config.image_size_aux, config.image_size_aux)
        length, text = 6 + config.num_image_tokens, config.text_config
        tokens = config.num_image_tokens, config.image_token_id
        batch = {**expand_sentinels(ids, None, *tokens, labels=labels), **images}
        places = supervised_positions(batch["labels"])
        with FlopCounterMode(display=False) as counter:
            loss = model(**batch, supervised_positions=places).loss
            if backward and trainable: loss.backward()
        table = flops_table(model, trainable_parts(model), [length] * n, n, 3 * n)
        masked_pairs = n * text.num_hidden_layers * length * (length - 1) // 2
        masked = 4 * masked_pairs * text.num_attention_heads * text.head_dim
        backward = backward and bool(trainable)
        ours = sum(f + b * backward for f, b in table.values()) + masked * (1 + 2 * backward)
        return counter.get_total_flops(), ours

def test_operations_of_one_layer_of_a_tower():
    config = VLMConfig(text_config={"model_type": "gemma"}, vision_config=CLIP_L).vision_config
    with Breakpoint(vit_ops, at="return [(stem, True)", watch="width patches n linear stem") as bp:
        ops = tower_ops(config, -2, 336)
    print(f"{sum(flops for flops, _ in ops) / 1e9:.0f} GFLOPs per image")
    bp.expect(patches=24 * 24, n=577, linear=4 * 1024**2 + 2 * 1024 * 4096)

def test_a_frozen_language_model_still_has_a_backward_pass():
    watch = ["below", "[n for _, n in parts['projector']]", "[n for _, n in parts['decoder']]"]
    with Breakpoint(flops_table, at="return table", watch=watch) as bp:
        stage_1 = flops_table(MGM_2B, STAGE_1, **SAMPLE)
    bp.expect({watch[1]: [2, 2], watch[2]: [1, 2]}, below=True)

def test_without_input_gradients_the_count_is_too_small():
    at, tera = 'parts["decoder"] =', "round(sum(map(sum, result.values())) / 1e12, 2)"
    with Breakpoint(flops_table, at=at, watch="language below", set={"below": False}) as bp:
        flops_table(MGM_2B, STAGE_1, **SAMPLE)
    bp.expect_changed({tera: (6.42, 3.8)})

def test_shares_of_mgm_2b():
    stage_1 = flops_table(MGM_2B, STAGE_1, **SAMPLE)
    total = training_flops(MGM_2B, STAGE_1, **SAMPLE)
    share = {part: sum(both) / total for part, both in stage_1.items()}
    print(*[f"{part} {100 * x:.1f} %" for part, x in share.items()], sep="\n")
    assert 0.78 < share["decoder"] + share["head"] < 0.84
    assert share["mining"] + share["projector"] < 0.01
    test_eq(stage_1["vision_tower"][1], 0)
    test_eq(stage_1["head"], (2 * 20 * 2048 * 256_000,) * 2)

def test_the_usual_estimate_is_too_generous():
    with torch.device("meta"): model = VLM(MGM_2B)
    parameters = sum(p.numel() for p in model.parameters())
    usual = 6 * parameters * SAMPLE["lengths"][0]
    total = training_flops(model, STAGE_1, **SAMPLE)
    weights = f"{parameters / 1e9:.2f}e9 weights"
    print(f"{weights}: {usual / 1e12:.1f} TFLOPs, {usual / total:.2f}x our count")
    print(f"an MFU of 30 % would be reported as {0.3 * usual / total:.0%}")
    assert 1.7 < usual / total < 1.9

def test_pytorch_counts_the_same():
    config = small_config(num_hidden_layers=2, head_dim=16, hidden_size=32, vocab_size=50)
    settings = [
        set(),
        {"projector"},
        {"language_model"},
        {"projector", "language_model"},
        {"vision_tower"},
        {"vision_tower", "projector", "language_model"},
    ]
    for trainable in settings:
        for backward in (False, True):
            theirs, ours = counted(config, trainable, backward)
            assert abs(ours / theirs - 1) < 0.005, (trainable, backward, theirs, ours)
        print(f"{ours:10,} {theirs:10,} {100 * (ours / theirs - 1):6.2f} %", sorted(trainable))

def test_backward_passes_depend_on_what_lies_below():
    two_layers = [(100, True), (100, True)]
    test_eq([n for _, n in backward_products(two_layers, False, False)], [0, 0])
    test_eq([n for _, n in backward_products(two_layers, True, False)], [1, 2])
    test_eq([n for _, n in backward_products(two_layers, False, True)], [1, 1])
    test_eq([n for _, n in backward_products(two_layers, True, True)], [2, 2])
    cases = [(False, False), (True, False), (False, True), (True, True)]
    test_eq([backward_products([(7, False)], t, b)[0][1] for t, b in cases], [0, 0, 2, 2])

def test_pairs_by_hand():
    for length, window in ((4, None), (4, 2), (2, 9)):
        mask = torch.ones(length, length).tril().triu(1 - (window or length))
        print(f"{length} tokens, window {window}:", causal_pairs([length], window), "pairs")
        test_eq(causal_pairs([length], window), int(mask.sum()))
    test_eq(causal_pairs([3, 5]), 6 + 15)

def test_count_by_hand():
    table = flops_table(small_config(), {"projector"}, [6], 1, 2)
    # stem, 5 positions, attention
    tower = 2 * 4 * 48 * 8 + 2 * 5 * (4 * 8 * 8 + 2 * 8 * 12) + 2 * (2 * 5 * 5 * 8)
    projector = 2 * 4 * 8 * 8
    attention = 2 * (2 * 21 * 8)  # 21 = 6·7/2 pairs, 2 heads of 4
    decoder = 2 * 6 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    head = 2 * 2 * 8 * 10
    print(table)
    test_eq(
        table,
        {
            "vision_tower": (tower, 0),
            "projector": (projector, projector),
            "decoder": (decoder + attention, decoder + 2 * attention),
            "head": (head, head),
        },
    )
    test_eq(
        sum(f for f, _ in mining_products(small_config(aux=True), True, False, False)),
        2 * 4 * 8 * 8 + 2 * (2 * 4 * 8 * 10) + 2 * (2 * 4 * 16 * 10),
    )  # 4 queries, windows of 4x4

def test_convolutional_towers_count_the_same():
    convnext = ConvNextConfig(hidden_sizes=[8, 12, 16], depths=[1, 2, 1], num_stages=3, patch_size=2)
    lite = EfficientNetLiteConfig()
    for config, side in ((convnext, 32), (lite, 64), (lite, 50)):
        for layer in (-1, -2):
            tower, pixels = build_vision_tower(config, layer), torch.randn(2, 3, side, side)
            with FlopCounterMode(display=False) as forward, torch.no_grad():
                stage_maps(tower, pixels)
            test_eq(2 * sum(f for f, _ in tower_ops(config, layer, side)), forward.get_total_flops())
        print(config.model_type, side, "pixels:", f"{forward.get_total_flops() // 2:,} FLOPs per image")

def test_mining_counts_as_the_model_not_as_its_implementation():
    widths = MGM_2B.vision_aux_config.hidden_sizes
    with torch.device("meta"):
        mining, low = PatchInfoMining(MGM_2B.vision_size, sum(widths)), torch.empty(1, 576, 1024)
        maps = [torch.empty(1, c, 192 >> k, 192 >> k) for k, c in enumerate(widths)]
    with FlopCounterMode(display=False) as counter:
        mining(low, maps).sum().backward()
    products = mining_products(MGM_2B, True, False, False)
    ours = sum(f + f * n for f, n in products)
    windows, total = 2 * products[2][0] / 1e9, sum(f for f, _ in products) / 1e9
    print(f"{counter.get_total_flops() / ours:.2f}x our count")
    print(f"windows are {windows:.2f} of {total:.2f} GFLOPs")
    assert 1 < counter.get_total_flops() / ours < 1.3

def test_more_is_never_less():
    from itertools import combinations

    base = dict(lengths=[30, 50], n_images=2, n_supervised=9)
    config = small_config(aux=True)
    names = (*PARTS, "lora")
    chosen = [set(c) for n in range(len(names) + 1) for c in combinations(names, n)]
    cost = {frozenset(c): training_flops(config, c, **base) for c in chosen}
    for c in chosen:
        for part in set(names) - c:
            assert cost[frozenset(c | {part})] >= cost[frozenset(c)], (c, part)
    for change in (dict(lengths=[31, 50]), dict(n_images=3), dict(n_supervised=10)):
        assert training_flops(config, {"lora"}, **{**base, **change}) > cost[frozenset({"lora"})]
    test_eq(training_flops(config, {"lora"}, **base), training_flops(config, {"lora"}, [50, 30], 2, 9))
    plain = small_config()  # has no mining: naming it changes nothing
    test_eq(training_flops(plain, STAGE_1, **base), training_flops(plain, {"projector"}, **base))
    forward = sum(f for f, _ in flops_table(config, set(), **base).values())
    test_eq(cost[frozenset()], forward)  # nothing trains: forward only
    with expect_fail(ConfigError, contains="no part 'head'"):
        training_flops(config, {"head"}, **base)

def test_parts_that_train_are_found():
    model = VLM(small_config(aux=True)).requires_grad_(False)
    test_eq(trainable_parts(model), set())
    model.image_encoder.vision_tower_aux.requires_grad_()
    model.image_encoder.mm_projector.requires_grad_()
    test_eq(trainable_parts(model), {"vision_tower_aux", "projector"})
    test_eq(trainable_parts(model.requires_grad_()), set(PARTS))

def test_peaks_by_name():
    names = [
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA H200",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA L40S",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Tesla T4",
    ]
    peaks = [peak_flops(name) for name in names]
    test_eq(peaks[:6], [989.4e12, 756.5e12, 989.4e12, 312e12, 165.2e12, 362.05e12])
    test_eq(peak_flops("NVIDIA H100 80GB HBM3", torch.float32), None)
    test_eq(peaks[6:], [None, None])
