"Derived from nbs/08b_vision.ipynb by `make tests`; edit the notebook, not this file."
import re
from contextlib import nullcontext
from functools import lru_cache
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithNoAttention
from vlm_lit.core import ConfigError
import copy, json, tempfile, weakref
from pathlib import Path
from types import SimpleNamespace
import matplotlib.pyplot as plt
from fastcore.test import test_eq, test_close, expect_fail
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.utils.logging import disable_progress_bar
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.core import peek
from vlm_lit.images import grid_crops, make_square, sample_image, to_bytes
from vlm_lit.models.towers import *

def setup_module():
    global CASES, LiveBytes, WIDTHS, benchmark_results, brightness_maps, clip_config, convnext_config, cost, example, fast, folders, images, large, mining_in_loops, mining_in_windows, relative, results, same_weights, siglip_config, small, small_encoder, teach, to_windows, upsampled, wishes
    torch.set_printoptions(precision=3, sci_mode=False)
    disable_progress_bar()
    folders = (Path("../benchmarks/results"), Path("benchmarks/results"))
    benchmark_results = next(folder for folder in folders if folder.is_dir())
    small = dict(hidden_size=16, intermediate_size=32, image_size=32, patch_size=8)
    small |= dict(num_hidden_layers=4, num_attention_heads=2)
    clip_config, siglip_config = CLIPVisionConfig(**small), SiglipVisionConfig(**small)
    small = dict(hidden_sizes=[8, 12, 16], depths=[1, 2, 1], num_stages=3, patch_size=2)
    convnext_config = ConvNextConfig(**small, layer_scale_init_value=1.0)
    def same_weights(part, whole):
        "Copy into a cut tower what the whole one has."
        own = part.state_dict()
        part.load_state_dict({name: t for name, t in whole.state_dict().items() if name in own})
        return part.eval()
    def upsampled(maps):
        "All maps at the size of the first, channels joined."
        options = dict(size=maps[0].shape[-2:], mode="bilinear", align_corners=False)
        return torch.cat([F.interpolate(m, **options) for m in maps], 1)
    def mining_in_loops(layers, low, maps):
        "q + softmax(q kᵀ / sqrt(d)) v, one query at a time."
        joined = upsampled(maps)
        grid = round(low.shape[1] ** 0.5)
        out = []
        w = joined.shape[-1] // grid
        for n in range(len(low)):
            for p in range(grid * grid):
                row, col = divmod(p, grid)
                window = joined[n, :, row * w : row * w + w, col * w : col * w + w].flatten(1).T
                q = layers.vlm_uni_query_projector(low[n, p])
                k = layers.vlm_uni_aux_projector(window)
                v = layers.vlm_uni_val_projector(window)
                out.append(low[n, p] + (q @ k.T / len(q) ** 0.5).softmax(-1) @ v)
        return torch.stack(out).reshape(low.shape)
    def example(grid=4, channels=(8, 12), sides=(16, 8), width=16, n=2, seed=0, layers=MiningLayers):
        "Layers with random weights that matter, and random features."
        torch.manual_seed(seed)
        layers = layers(width, sum(channels))
        for p in layers.parameters(): p.data += 0.3 * torch.randn_like(p)
        low = torch.randn(n, grid * grid, width)
        return layers, low, [torch.randn(n, c, side, side) for c, side in zip(channels, sides)]
    def to_windows(joined, grid):
        "(n, channels, side, side) -> (n, grid*grid, window*window, channels)"
        n, channels, side, _ = joined.shape
        cut = joined.reshape(n, channels, grid, side // grid, grid, side // grid)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, grid * grid, -1, channels)
    def mining_in_windows(layers, low, maps, pool=1):
        "MGM's formulation; `pool` averages the joined map, for pictures read as a whole."
        windows = to_windows(F.avg_pool2d(upsampled(maps), pool), round(low.shape[1] ** 0.5))
        q = layers.vlm_uni_query_projector(low)
        k = layers.vlm_uni_aux_projector(windows)
        v = layers.vlm_uni_val_projector(windows)
        attention = (torch.einsum("npd,npwd->npw", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        return low + torch.einsum("npw,npwd->npd", attention, v)
    CASES = {
        "plain": dict(),
        "odd sides": dict(grid=3, sides=(15, 7)),
        "last stage alone": dict(channels=(12,), sides=(16,)),
        "four stages": dict(grid=3, channels=(4, 6, 8, 10), sides=(24, 12, 6, 3)),
        "windows smaller than a cell": dict(grid=8, channels=(4, 6, 8), sides=(16, 8, 2)),
        "one query": dict(grid=1, sides=(5, 3)),
        "whole picture": dict(grid=2, sides=(16, 8), pool=2),
    }
    def relative(got, want, size=None):
        "Norm of the difference over the norm of `size`, or of what is wanted."
        size = want if size is None else size
        return float((got.float() - want.float()).norm() / size.float().norm())
    def results(run, mining, low, maps, pool):
        "Output and all gradients of one version."
        mining, low = copy.deepcopy(mining), low.clone().requires_grad_()
        maps = [m.clone().requires_grad_() for m in maps]
        out = run(mining, low, maps, pool)
        torch.manual_seed(1)
        (out * torch.randn(out.shape)).sum().backward()
        grads = {
            "low": low.grad,
            **{f"map {n}": m.grad for n, m in enumerate(maps)},
            **{name: p.grad for name, p in mining.named_parameters()},
        }
        return out.detach(), grads
    fast = lambda mining, *args: mining(*args)
    class LiveBytes(TorchDispatchMode):
        "The most bytes that tensors made inside took at one moment."

        def __init__(self):
            super().__init__()
            self.now = 0
            self.peak = 0
            self.known = weakref.WeakKeyDictionary()

        def add(self, bytes):
            self.now += bytes
            self.peak = max(self.peak, self.now)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, torch.Tensor):  # was there before
                    self.known.setdefault(t.untyped_storage(), True)
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if not isinstance(t, torch.Tensor) or t.untyped_storage() in self.known:
                    continue
                storage = t.untyped_storage()
                self.known[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
            return out
    WIDTHS = dict(channels=(192, 384, 768, 1536), width=1024)
    def cost(run, side, device="meta", widths=WIDTHS, backward=True, frozen=False):
        """Peak of live bytes and number of multiplications in matrix products, for one picture in
    float32."""
        channels, width = widths["channels"], widths["width"]
        with torch.device(device):
            mining = PatchInfoMining(width, sum(channels))
            low = torch.randn(1, (side // 8) ** 2, width)
            maps = [torch.randn(1, c, side // 2**n, side // 2**n) for n, c in enumerate(channels)]
        if not frozen:
            low, maps = low.requires_grad_(), [m.requires_grad_() for m in maps]
        counter = FlopCounterMode(display=False)
        with LiveBytes() as live, counter as flops, torch.set_grad_enabled(backward):
            out = run(mining, low, maps, 1)
            if backward: out.sum().backward()
        return live.peak, flops.get_total_flops() // 2
    def brightness_maps(picture):
        """(n, side, side) of -1 to 1 -> two stages of four channels; the constant ones let LayerNorm
    keep the size."""
        fine = torch.stack([picture, -picture, torch.ones_like(picture), -torch.ones_like(picture)], 1)
        return [fine, F.avg_pool2d(fine, 2)]
    def wishes(sign):
        "(n, num_queries) of +1 and -1 -> queries of eight numbers."
        return torch.stack([sign, -sign, torch.ones_like(sign), -torch.ones_like(sign)] * 2, -1)
    def teach(steps=150):
        """Mining that finds the brightest or the darkest value, from random clouds; and the loss of
    every step."""
        torch.manual_seed(0)
        mining = PatchInfoMining(8, 8)
        optimizer, losses = torch.optim.Adam(mining.parameters(), 1e-2), []
        for _ in range(steps):
            clouds = F.interpolate(torch.rand(8, 1, 8, 8) * 2 - 1, size=24, mode="bilinear")[:, 0]
            sign, windows = torch.rand(8, 9).round() * 2 - 1, to_windows(clouds[:, None], 3)[..., 0]
            low = wishes(sign)
            found = (mining(low, brightness_maps(clouds)) - low)[..., 0]
            wanted = (windows * sign[..., None]).amax(-1) * sign
            loss = (found - wanted).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return mining.requires_grad_(False), losses
    def small_encoder(vision=clip_config, aux=convnext_config, **changes):
        """An encoder of a few thousand weights; its configuration is `VLMConfig`'s, written out, for
    that is of a later notebook."""
        config = dict(vision_config=vision, vision_aux_config=aux, projector_type="mlp2x_gelu")
        config |= dict(text_config=SimpleNamespace(hidden_size=24), image_grid=1, image_global=False)
        config |= dict(select_layer=-2, aux_stages=list(range(3))) | changes
        if vision.model_type in PATCH_TOWERS:
            config["vision_size"] = vision.hidden_size
        else: config["vision_size"] = vision.hidden_sizes[config["select_layer"]]
        config["vision_size_aux"] = aux and sum(aux.hidden_sizes[n] for n in config["aux_stages"])
        torch.manual_seed(0)
        return ImageEncoder(SimpleNamespace(**config)).eval().requires_grad_(False)
    large = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(large, size=32, mode="bilinear")

def test_selected_layers_are_counted_as_transformers_does():
    clip = CLIPVisionConfig(num_hidden_layers=24)
    convnext = ConvNextConfig(hidden_sizes=[8, 12, 16, 20])
    clip_depths = {n: tower_depth(clip, n) for n in (-1, -2, 0, 23)}
    convnext_depths = {n: tower_depth(convnext, n) for n in (-1, -2, 0)}
    print("CLIP-L:", clip_depths, " ConvNeXt:", convnext_depths)
    test_eq([tower_depth(clip, n) for n in (-1, -2, -25, 0, 23, 24)], [24, 23, 0, 0, 23, 24])
    test_eq([tower_depth(convnext, n) for n in (-1, -2, -4, 0, 3)], [4, 3, 1, 1, 4])
    for config, wrong in ((clip, 25), (clip, -26), (convnext, 4), (convnext, -5)):
        with expect_fail(ConfigError, contains=f"select_layer {wrong} is none of a"):
            tower_depth(config, wrong)
    message = "no tower of model type 'gemma'; there are: clip_vision_model"
    with expect_fail(ConfigError, contains=message):
        tower_depth(AutoConfig.for_model("gemma"), -1)

def test_what_is_behind_the_features_is_not_kept():
    weights = lambda tower: sum(p.numel() for p in tower.parameters())
    for config in (clip_config, siglip_config, convnext_config):
        kept = {n: f"{weights(make_tower(config, n)):,}" for n in (-1, -2, -3)}
        whole = weights(AutoModel.from_config(config))
        print(config.model_type.ljust(20), kept, "of", f"{whole:,}")
    test_eq([len(make_tower(clip_config, n).encoder.layers) for n in (-1, -2, 0)], [4, 3, 0])
    test_eq([len(make_tower(convnext_config, n).encoder.stages) for n in (-1, -2, 0)], [3, 2, 1])
    names = [name for name, _ in make_tower(siglip_config).named_parameters()]
    assert not any("head" in name or "post_layernorm" in name for name in names)
    names = [name for name, _ in make_tower(convnext_config).named_parameters()]
    assert not any(name.startswith("layernorm") for name in names)

def test_features_are_those_of_the_whole_tower():
    torch.manual_seed(0)
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pairs = [(clip_config, CLIPVisionModel), (siglip_config, SiglipVisionModel)]
        for config, whole in [(config, cls(config)) for config, cls in pairs]:
            states = whole.eval()(pictures, output_hidden_states=True).hidden_states
            test_eq(len(states), 5)
            for n in (-1, -2, -4, 0, 2):
                tokens = states[n][:, 1:] if config is clip_config else states[n]
                cut = same_weights(make_tower(config, n), whole)
                assert torch.equal(patch_features(cut, pictures, n), tokens)
                assert tokens.shape == (2, 16, 16)

def test_stage_maps_are_convnexts_hidden_states():
    torch.manual_seed(0)
    # 44 is odd two halvings down: 22, 11, 5
    whole, pictures = ConvNextModel(convnext_config).eval(), torch.randn(2, 3, 44, 44)
    with torch.no_grad():
        states = whole(pictures, output_hidden_states=True).hidden_states
        maps = stage_maps(same_weights(make_tower(convnext_config), whole), pictures)
        test_eq([tuple(m.shape) for m in maps], [(2, 8, 22, 22), (2, 12, 11, 11), (2, 16, 5, 5)])
        test_eq(len(states), 4)  # the input of the first stage, and each one's output
        for ours, theirs in zip(maps, states[1:]): assert torch.equal(ours, theirs)
        cut = same_weights(make_tower(convnext_config, -2), whole)
        assert torch.equal(patch_features(cut, pictures, -2), states[2].flatten(2).transpose(1, 2))

def test_towers_of_bf16_take_float_pictures():
    torch.manual_seed(0)
    pictures = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for config in (clip_config, siglip_config, convnext_config):
            tower = make_tower(config).eval()
            exact, half = patch_features(tower, pictures), patch_features(tower.bfloat16(), pictures)
            test_eq(half.dtype, torch.bfloat16)
            assert (half.float() - exact).norm() < 0.02 * exact.norm()

def test_class_token_would_move_every_patch():
    torch.manual_seed(0)
    grey, dot = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    dot[:, :, 8:16, 16:24] = 3
    with torch.no_grad():
        tower = make_tower(clip_config, -2).eval()
        place = lambda features: divmod(int(features.norm(dim=-1)[0, :16].argmax()), 4)
        right = place(patch_features(tower, dot) - patch_features(tower, grey))
        wrong = place(tower(dot).last_hidden_state - tower(grey).last_hidden_state)
    print("row, column of the dot:", right, " with the class token:", wrong)
    test_eq((right, wrong), ((1, 2), (1, 3)))

def test_resolutions_of_efficientnet_lite():
    lite = EfficientNetLiteConfig()
    print({lite.patch_size * 2**n: channels for n, channels in enumerate(lite.hidden_sizes)})
    test_eq(lite.hidden_sizes, [16, 24, 40, 112, 320])
    layout = dict(widths=(8, 8, 12), repeats=(1, 1, 1), kernels=(3, 3, 3), strides=(1, 1, 2))
    test_eq(AutoConfig.for_model("efficientnet_lite", **layout).hidden_sizes, [8, 12])
    test_eq(EfficientNetLiteConfig.from_dict(lite.to_dict()).to_dict(), lite.to_dict())

def test_odd_padding_goes_to_the_right():
    def digits(conv, row):
        """The output for a single row of pixels of a kernel that weighs the three neighbours with 1,
    10, 100."""
        conv.weight.data.zero_()[0, 0, 1] = torch.tensor([1.0, 10, 100])
        pixels = torch.tensor(row, dtype=torch.float)[None, None, None].expand(1, 1, len(row), -1)
        return [int(x) for x in conv(pixels)[0, 0, 0]]

    ours = SamePadConv2d(1, 1, 3, 2, bias=False)
    symmetric = nn.Conv2d(1, 1, 3, 2, padding=1, bias=False)
    print(digits(ours, [1, 2, 3, 4]), digits(symmetric, [1, 2, 3, 4]))
    test_eq(digits(ours, [1, 2, 3, 4]), [321, 43])
    test_eq(digits(symmetric, [1, 2, 3, 4]), [210, 432])
    # an odd side: nothing odd is left over, both agree
    test_eq(digits(ours, [1, 2, 3, 4, 5]), digits(symmetric, [1, 2, 3, 4, 5]))

def test_block_adds_its_input_where_shapes_allow():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 7, 7)
    for out, stride, side in ((8, 1, 7), (12, 1, 7), (8, 2, 4)):
        block = InvertedBottleneck(8, out, 3, stride, 6, 1e-3).eval()
        block.layers[-1].weight.data.zero_()  # nothing comes through the layers
        test_eq(tuple(block(x).shape), (1, out, side, side))
        test_eq(block(x).abs().sum().item(), x.abs().sum().item() if (out, stride) == (8, 1) else 0)
    # without expansion there is nothing to widen
    test_eq(len(InvertedBottleneck(8, 8, 3, 1, 1, 1e-3).layers), 5)

def test_efficientnet_lite_has_the_published_size():
    torch.manual_seed(0)
    lite, cut = make_tower(EfficientNetLiteConfig()), make_tower(EfficientNetLiteConfig(), -2)
    whole, part = (sum(p.numel() for p in tower.parameters()) for tower in (lite, cut))
    print(f"{whole:,} weights; cut behind stage -2: {part:,}")
    with torch.no_grad():
        peek(**{f"stage {n}": m for n, m in enumerate(lite(torch.randn(1, 3, 128, 128)).hidden_states)})
    # left out here: a convolution with its normalisation, and a layer for 1,000 classes
    classifier = 320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    # Lite0 is published with 4.7 million
    test_eq(round((sum(p.numel() for p in lite.parameters()) + classifier) / 1e5), 47)
    with torch.no_grad():
        shapes = [tuple(m.shape[1:]) for m in stage_maps(lite, torch.randn(1, 3, 65, 65))]
        test_eq(shapes, [(16, 33, 33), (24, 17, 17), (40, 9, 9), (112, 5, 5), (320, 3, 3)])
        test_eq(tuple(patch_features(cut, torch.randn(1, 3, 64, 64), -2).shape), (1, 16, 112))
        test_eq(stage_maps(lite.bfloat16(), torch.randn(1, 3, 32, 32))[0].dtype, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        lite.save_pretrained(folder)
        again = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in lite.state_dict().items())
    assert len(again) == len(lite.state_dict())

def test_statistics_stay_frozen():
    torch.manual_seed(0)
    lite, picture = make_tower(EfficientNetLiteConfig()), torch.randn(1, 3, 64, 64)

    def drift(tower, *, forced):
        """How far its features move, relative to their size, when it has seen five other batches in
    training mode."""
        with torch.no_grad():
            before = patch_features(tower.eval(), picture)
            nn.Module.train(tower) if forced else tower.train()
            for _ in range(5): patch_features(tower, 2 + torch.randn(4, 3, 64, 64))
            return float((patch_features(tower.eval(), picture) - before).norm() / before.norm())

    as_asked = drift(lite, forced=False)
    far = drift(copy.deepcopy(lite), forced=True) > 0.5
    print("train():", as_asked, " training mode forced:", f"moved by more than half: {far}")
    test_eq(drift(lite, forced=False), 0)
    assert not make_tower(EfficientNetLiteConfig()).training
    assert not any(part.training for part in lite.train().modules())
    assert drift(copy.deepcopy(lite), forced=True) > 0.5

def test_loops_follow_the_formula():
    shapes = {name: tuple(p.shape) for name, p in MiningLayers(16, 20).named_parameters()}
    print({name: shape for name, shape in shapes.items() if "aux" in name})
    kinds = ("0.weight", "0.bias", "1.weight", "1.bias")
    parts = ("query", "aux", "val")
    test_eq(set(shapes), {f"vlm_uni_{part}_projector.{kind}" for part in parts for kind in kinds})
    layers, low, maps = example()
    values = layers.vlm_uni_val_projector(upsampled(maps)[:, :, :4, :4].flatten(2).transpose(1, 2))
    for p in layers.vlm_uni_aux_projector[1].parameters(): p.data.zero_()
    test_close(mining_in_loops(layers, low, maps)[:, 0], low[:, 0] + values.mean(1), eps=1e-5)
    for p in layers.vlm_uni_val_projector[1].parameters(): p.data.zero_()
    assert torch.equal(mining_in_loops(layers, low, maps), low)

def test_windows_lie_under_their_queries():
    numbered = torch.arange(16.0).reshape(1, 1, 4, 4)
    windows = to_windows(numbered, 2)[0, :, :, 0].int().tolist()
    print(numbered[0, 0].int().tolist(), "->", windows)
    test_eq(windows, [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])

def test_windows_equal_loops():
    for grid, sides in ((4, (16, 8)), (3, (15, 7)), (1, (5, 2))):
        layers, low, maps = example(grid, sides=sides)
        test_close(mining_in_windows(layers, low, maps), mining_in_loops(layers, low, maps), eps=1e-5)

def test_plain_reshape_takes_strips():
    numbered = torch.arange(16.0).reshape(1, 1, 4, 4)
    strip = numbered.reshape(4, 4).int().tolist()[0]
    window = to_windows(numbered, 2)[0, 0, :, 0].int().tolist()
    print(strip, "is the first strip,", window, "the first window")
    assert strip != window

def test_joined_map_takes_212_mb():
    channels, side = (192, 384, 768, 1536), 192
    own = sum(c * (side // 2**n) ** 2 for n, c in enumerate(channels))
    joined = sum(channels) * side**2
    print(
        f"in bf16: {2 * joined / 1e6:.0f} MB joined, {2 * own / 1e6:.0f} MB as the "
    f"tower made them: {joined / own:.0f} times as much"
    )
    test_eq(round(2 * joined / 1e6), 212)
    test_eq(round(2 * own / 1e6), 27)

def test_enlarging_two_cells_to_four():
    cells, weights = axis_weights(side=2, base=4, grid=1)
    print(cells.tolist(), weights[0].tolist())
    test_eq(cells.tolist(), [[0, 1]])
    test_eq(weights[0].tolist(), [[1, 0], [0.75, 0.25], [0.25, 0.75], [1 - 1, 1]])
    enlarged = F.interpolate(torch.tensor([[[10.0, 20]]]), size=4, mode="linear").flatten()
    test_eq((weights[0] @ torch.tensor([10.0, 20])).tolist(), enlarged.tolist())

def test_each_query_has_its_cells_and_a_border():
    cells, weights = axis_weights(side=6, base=12, grid=3)
    test_eq(cells.tolist(), [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]])
    want = [[0.25, 0.75, 0, 0], [0, 0.75, 0.25, 0], [0, 0.25, 0.75, 0], [0, 0, 0.75, 0.25]]
    test_eq(weights[1].tolist(), want)
    # MGM-2B's last stage: one cell under a query, and its two neighbours
    test_eq(axis_weights(side=24, base=192, grid=24)[0].shape[1], 3)
    x = torch.randn(7)
    # odd sizes; windows smaller than a cell; pooled
    sizes = [(7, 7, 7, 1), (7, 15, 5, 1), (3, 24, 12, 1), (7, 28, 7, 2), (1, 6, 2, 1)]
    for side, base, grid, pool in sizes:
        cells, weights = axis_weights(side, base, grid, pool)
        whole = F.interpolate(x[None, None, :side], size=base, mode="linear")[0, 0]
        want = whole.reshape(-1, pool).mean(1).reshape(grid, -1)
        test_close((weights @ x[cells][..., None])[..., 0], want, eps=1e-6)

def test_align_corners_moves_features():
    truth = torch.arange(192) + 0.5  # where each position of the finest map lies
    # where each cell of the last map lies, in the same measure
    ramp = (8 * (torch.arange(24) + 0.5))[None, None]
    error = {}
    for aligned in (False, True):
        enlarged = F.interpolate(ramp, size=192, mode="linear", align_corners=aligned)[0, 0]
        error[aligned] = (enlarged - truth)[8:-8].abs().max().item()
    print({f"align_corners={aligned}": f"{4 * far:.1f} pixels off" for aligned, far in error.items()})
    test_close(error[False], 0, eps=1e-4)
    assert 3 < error[True] < 4

def test_window_weights_make_the_windows():
    torch.manual_seed(0)
    for side, base, grid, pool in ((6, 12, 3, 1), (5, 15, 3, 1), (2, 16, 8, 1), (6, 12, 3, 2)):
        features = torch.randn(2, 4, side, side)
        cells, weights = window_weights(side, base, grid, pool, "cpu")
        whole = F.interpolate(features, size=(base, base), mode="bilinear")
        want = to_windows(F.avg_pool2d(whole, pool), grid)
        test_close(weights @ cells_under(features, cells), want, eps=1e-5)

def test_enlarging_commutes_with_channels():
    torch.manual_seed(0)
    features, layer = torch.randn(1, 12, 6, 6), torch.randn(5, 12)
    enlarge = lambda m: F.interpolate(m, scale_factor=4, mode="bilinear")
    mix = lambda m: torch.einsum("dc,nchw->ndhw", layer, m)
    one, other = mix(enlarge(features)), enlarge(mix(features))
    peek(**{"enlarged, then mixed": one, "mixed, then enlarged": other})
    test_close(one, other, eps=1e-5)

def test_query_can_be_folded_into_features():
    torch.manual_seed(0)
    q = torch.randn(16)
    W = torch.randn(16, 20)
    b = torch.randn(16)
    window = torch.randn(9, 20)
    keys_first, query_first = q @ (window @ W.T + b).T, (q @ W) @ window.T
    print("difference of the scores:", keys_first - query_first)
    test_close(keys_first - query_first, (q @ b).expand(9), eps=1e-4)
    test_close((keys_first / 4).softmax(-1), (query_first / 4).softmax(-1), eps=1e-5)
    # positions for each query at MGM-2B's size, and so many times fewer products with W
    test_eq(192**2 // 24**2, 64)

def test_statistics_are_those_of_the_enlarged_map():
    torch.manual_seed(0)
    features, query = torch.randn(2, 12, 6, 6), torch.randn(2, 9, 12)
    windows = to_windows(F.interpolate(features, size=(12, 12), mode="bilinear"), 3)
    score, total, energy = stage_statistics(features, query, *window_weights(6, 12, 3, 1, "cpu"))
    peek(score=score, total=total, energy=energy)
    test_close(score, torch.einsum("npwc,npc->npw", windows, query), eps=1e-4)
    test_close(total, windows.sum(-1), eps=1e-4)
    test_close(energy, windows.square().sum(-1), eps=1e-4)

def test_squares_must_not_be_enlarged():
    pair = torch.tensor([[[-1.0, 1.0]]])
    enlarge = lambda x: F.interpolate(x, size=8, mode="linear").flatten().tolist()
    squares = [round(x * x, 2) for x in enlarge(pair)]
    print("square of the enlarged:", squares, " enlarged squares:", enlarge(pair**2))
    assert enlarge(pair**2) == [1] * 8 and min(x * x for x in enlarge(pair)) < 0.1

def test_scores_are_query_times_key():
    layers, low, maps = example(3, sides=(12, 5))
    windows = to_windows(upsampled(maps), 3)
    with torch.no_grad():
        query = layers.vlm_uni_query_projector(low)
        places = [window_weights(side, 12, 3, 1, "cpu") for side in (12, 5)]
        score, mean, rstd = window_scores(query, layers.vlm_uni_aux_projector, maps, places)
        peek(score=score, mean=mean, rstd=rstd)
        keys = layers.vlm_uni_aux_projector(windows)
        test_close(score, torch.einsum("npd,npwd->npw", query, keys), eps=1e-4)
        test_close(mean, windows.mean(-1), eps=1e-5)
        test_close(rstd, (windows.var(-1, correction=0) + 1e-5).rsqrt(), eps=1e-4)

def test_attention_is_handed_down_to_cells():
    cells, weights = axis_weights(side=2, base=4, grid=1)
    print("shares of the two cells:", (torch.tensor([0.0, 1, 0, 0]) @ weights[0]).tolist())
    test_eq((torch.tensor([0.0, 1, 0, 0]) @ weights[0]).tolist(), [0.75, 0.25])
    torch.manual_seed(0)
    features, share = torch.randn(2, 12, 6, 6), torch.rand(2, 9, 16)
    windows = to_windows(F.interpolate(features, size=(12, 12), mode="bilinear"), 3)
    average = stage_average(features, share, *window_weights(6, 12, 3, 1, "cpu"))
    test_close(average, torch.einsum("npw,npwc->npc", share, windows), eps=1e-4)

def test_mining_equals_windows_and_loops():
    mining, low, maps = example(layers=PatchInfoMining)
    with torch.no_grad():
        out = mining(low, maps)
        windows = mining_in_windows(mining, low, maps)
        loops = mining_in_loops(mining, low, maps)
        errors = [(out - want).norm() / (want - low).norm() for want in (windows, loops)]
        print(
            f"relative to what was found: {errors[0]:.0e} against windows, "
        f"{errors[1]:.0e} against loops"
        )
        assert max(errors) < 1e-5
        test_close(mining.attention(low, maps).sum(-1), torch.ones(2, 16), eps=1e-5)
    assert (out - low).norm() > 0.5 * low.norm()  # it found something
    with expect_fail(ConfigError, contains="17 queries make no square; is a class token among them?"):
        mining(torch.randn(2, 17, 16), maps)
    message = "16 high-resolution features a side cannot be shared by 3 queries a side"
    with expect_fail(ConfigError, contains=message): mining(low[:, :9], maps)

def test_outputs_and_gradients_equal_the_straightforward_ones():
    for name, case in CASES.items():
        case, pool = dict(case), case.get("pool", 1)
        case.pop("pool", None)
        mining, low, maps = example(layers=PatchInfoMining, **case)
        (want, want_grads), (got, got_grads) = (
            results(run, mining, low, maps, pool) for run in (mining_in_windows, fast)
        )
        largest = max(want_grads.values(), key=lambda g: g.norm())
        errors = []
        for k, g in want_grads.items():
            size = largest if g.norm() < 1e-4 * largest.norm() else None
            errors.append(relative(got_grads[k], g, size))
        worst = max(errors)
        print(f"{name:28} output {relative(got, want, want - low):.0e}   gradients {worst:.0e}")
        assert relative(got, want, want - low) < 1e-5
        assert worst < 1e-5
        assert len(got_grads) == 13 + len(maps)

def test_bf16_inputs_lose_nothing():
    sizes = dict(grid=6, channels=(24, 48, 96), sides=(48, 24, 12), width=64)
    mining, low, maps = example(layers=PatchInfoMining, **sizes)
    mining, low = mining.bfloat16(), low.bfloat16()
    maps = [m.bfloat16() for m in maps]
    with torch.no_grad():
        want = mining_in_windows(copy.deepcopy(mining).float(), low.float(), [m.float() for m in maps])
        found = want - low.float()
        before = mining(low.float(), maps)
        after = mining(low, maps)
        plain = mining_in_windows(mining, low, maps)
        print(
            f"before rounding {relative(before, want, found):.0e}, rounded "
        f"{relative(after, want.bfloat16(), found):.0e}, straightforward in bf16 "
        f"{relative(plain, want.bfloat16(), found):.0e}"
        )
        test_eq(after.dtype, torch.bfloat16)
        assert relative(before, want, found) < 1e-5
        assert relative(after, want.bfloat16(), found) < 1e-3
        assert relative(plain, want.bfloat16(), found) > 5e-3

def test_inference_mixed_precision_and_adapters():
    axis_weights.cache_clear()
    with torch.inference_mode(): axis_weights(3, 9, 3)
    assert not axis_weights(3, 9, 3)[1].is_inference()
    (axis_weights(3, 9, 3)[1] * torch.ones(3, requires_grad=True)).sum().backward()
    mining, low, maps = example(layers=PatchInfoMining)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = mining(low, maps)
        seen = mining.attention(low, maps)
    # autocast does not reach inside
    assert torch.equal(out, mining(low, maps)) and torch.equal(seen, mining.attention(low, maps))
    adapted = copy.deepcopy(mining)
    adapted.vlm_uni_val_projector[1] = nn.Identity()  # as an adapter would stand there
    with expect_fail(ConfigError, contains="put 'mining' into modules_to_save"):
        adapted(low, maps)
    flat = [torch.ones_like(m) for m in maps]  # no deviation at all: LayerNorm's epsilon, and no NaN
    test_close(mining(low, flat), mining_in_windows(mining, low, flat), eps=1e-3)

def test_counting_without_computing_counts_the_same():
    axis_weights.cache_clear()  # tables are made once and kept; count them in neither or both
    for run in (mining_in_windows, fast):
        cost(run, 32)
        widths = dict(channels=(24, 48, 96, 192), width=128)
        on_cpu, on_meta = (cost(run, 32, device, widths)[0] for device in ("cpu", "meta"))
        assert abs(on_cpu / on_meta - 1) < 0.1, (on_cpu, on_meta)

def test_mining_takes_about_a_tenth():
    print(f"{'one picture, float32':36}{'peak MB':>24}{'billion multiplications':>28}")
    kinds = {
        "forward": dict(backward=False),
        "and all gradients": {},
        "frozen tower": dict(frozen=True),
    }
    for title, side in (("MGM-2B, 768 pixels", 192), ("MGM-2B-HD, 1536 pixels", 384)):
        for what, changes in kinds.items():
            slow_peak, slow_work = cost(mining_in_windows, side, **changes)
            fast_peak, fast_work = cost(fast, side, **changes)
            peaks = f"{slow_peak / 1e6:7,.0f} -> {fast_peak / 1e6:4,.0f} ({fast_peak / slow_peak:.2f})"
            works = f"{slow_work / 1e9:12,.0f} -> {fast_work / 1e9:4,.1f} ({fast_work / slow_work:.3f})"
            print(f"{title:24}{what:20}{peaks}{works}")
            assert fast_peak < slow_peak / 9 and fast_work < slow_work / 30 and slow_peak > 1e9

def test_mining_compiles_without_a_graph_break():
    torch._dynamo.reset()
    mining, low, maps = example(layers=PatchInfoMining, n=4)
    compiled = torch.compile(mining, fullgraph=True, backend="eager")
    for n in (4, 2):
        some = low[:n], [m[:n] for m in maps]
        test_close(compiled(*some), mining(*some), eps=1e-6)
    _, other_low, other_maps = example(2, sides=(12, 6))  # another size is another graph, not an error
    test_close(compiled(other_low, other_maps), mining(other_low, other_maps), eps=1e-6)
    compiled(low, maps).sum().backward()
    got = [p.grad.clone() for p in mining.parameters()]
    mining.zero_grad()
    mining(low, maps).sum().backward()
    for ours, eager in zip(got, mining.parameters()):
        test_close(ours, eager.grad, eps=1e-4)

def test_queries_see_their_window_and_one_coarse_cell_beyond():
    mining, low, maps = example(channels=(8, 12, 6), sides=(16, 8, 4), layers=PatchInfoMining, n=1)

    def moved(stage, cells):
        "Which queries' outputs change with the first `cells` x `cells` of a stage."
        changed = [m.clone() for m in maps]
        changed[stage][:, :, :cells, :cells] += 3 * torch.randn(1, maps[stage].shape[1], cells, cells)
        difference = (mining(low, changed) - mining(low, maps)).abs().amax(-1)[0]
        return (difference > 0).nonzero().flatten().tolist()

    for stage, cells in enumerate((4, 2, 1)):
        print(f"stage {stage}, {cells} x {cells} cells under query 0: queries", moved(stage, cells))
    test_eq(moved(0, 4), [0])
    # the cell at the border is mixed into the first position of each neighbour
    test_eq(moved(1, 2), [0, 1, 4, 5])
    test_eq(moved(1, 1), [0])  # a cell that does not touch the border is not
    # one cell is the whole window here; it reaches the neighbours, and no further
    test_eq(moved(2, 1), [0, 1, 4, 5])

def test_queries_learn_where_to_look():
    mining, losses = teach()
    print(
        f"mean squared error: {sum(losses[:10]) / 10:.2f} in the first ten steps, "
    f"{sum(losses[-10:]) / 10:.3f} in the last ten"
    )
    assert sum(losses[-10:]) < sum(losses[:10]) / 10
    grey = to_bytes(make_square(sample_image(), 192)).float().mean(0)
    photo = F.avg_pool2d(grey[None], 4) / 127.5 - 1
    windows = to_windows(photo[:, None], 6)[..., 0]
    spread = windows.amax(-1) - windows.amin(-1)
    looks = {}
    for wish in (1, -1):
        looks[wish] = mining.attention(wishes(torch.full((1, 36), float(wish))), brightness_maps(photo))
        reached = (looks[wish] * windows).sum(-1)  # mean brightness under the attention
        wanted = windows.amax(-1) if wish == 1 else windows.amin(-1)
        off = (reached - wanted).abs()[spread > 0.5].mean()
        blind = (windows.mean(-1) - wanted).abs()[spread > 0.5].mean()
        name = "light" if wish == 1 else "dark"
        print(
            f"asked for {name}: brightness under the attention is "
        f"{off:.2f} off what was asked for; under an even look {blind:.2f}"
        )
        assert off < blind / 2
    light, dark = ((looks[wish] * windows).sum(-1)[spread > 0.5].min() for wish in (1, -1))
    assert light > dark

def test_crops_are_laid_out_as_the_picture():
    numbered = torch.arange(16.0).reshape(1, 1, 4, 4).expand(-1, 3, -1, -1)
    # a pixel is a patch here
    crops = grid_crops(numbered, image_size=2, image_grid=2)[:, :, :1].flatten(2)[..., None]
    patches = crops[0, ..., 0].int().tolist()
    print("crops:", patches)
    test_eq(patches, [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    test_eq(to_one_grid(crops, 2, 2).flatten().int().tolist(), list(range(16)))
    crops = torch.randn(2, 9, 4, 5)
    test_eq(from_one_grid(to_one_grid(crops, 3, 2), 3, 2), crops)

def test_crops_and_whole_equal_the_straightforward_way():
    mining, crops, maps = example(3, channels=(6, 10), sides=(24, 12), layers=PatchInfoMining, n=8)
    crops, whole = crops.reshape(2, 4, 9, 16), torch.randn(2, 9, 16)
    maps = [m[:2] for m in maps]
    with torch.no_grad():
        joined = upsampled(maps)
        quarters = [joined[:, :, row : row + 12, col : col + 12] for row in (0, 12) for col in (0, 12)]
        want = torch.stack([mining_in_windows(mining, crops[:, n], [quarters[n]]) for n in range(4)], 1)
        got = from_one_grid(mining(to_one_grid(crops, 2, 3), maps), 2, 3)
        assert relative(got, want, want - crops) < 1e-5
        halved = F.interpolate(joined, scale_factor=0.5, mode="bilinear")
        want = mining_in_windows(mining, whole, [halved])
        assert relative(mining(whole, maps, pool=2), want, want - whole) < 1e-5
        # other queries would find other things
        assert relative(mining(crops.flatten(0, 1)[:2], maps, pool=2), want) > 0.1

def test_cutting_before_enlarging_leaves_seams():
    torch.manual_seed(0)
    coarse = torch.randn(1, 3, 6, 6)
    enlarge = lambda m: F.interpolate(m, scale_factor=4, mode="bilinear")
    seam = (enlarge(coarse)[..., :12] - enlarge(coarse[..., :3])).abs().amax((0, 1, 2))
    print("difference in the columns of the left half:", seam)
    assert (seam[:-2] == 0).all() and (seam[-2:] > 0.1).all()

def test_projectors_by_name():
    for kind in ("linear", "mlp2x_gelu"):
        print(kind.ljust(12), make_projector(kind, 16, 24))
    # LLaVA's names
    names = list(make_projector("mlp2x_gelu", 16, 24).state_dict())
    test_eq(names, ["0.weight", "0.bias", "2.weight", "2.bias"])
    parameters = make_projector("mlp3x_gelu", 16, 24).parameters()
    shapes = [tuple(p.shape) for p in parameters if p.dim() == 2]
    test_eq(shapes, [(24, 16), (24, 24), (24, 24)])
    test_eq([type(layer).__name__ for layer in make_projector("mlp1x_gelu", 16, 24)], ["Linear"])
    x = torch.randn(2, 9, 16)
    assert make_projector("identity", 16, 16)(x) is x
    mlp = make_projector("mlp2x_gelu", 16, 24)
    inside = F.gelu(F.linear(x, mlp[0].weight, mlp[0].bias))
    test_close(mlp(x), F.linear(inside, mlp[2].weight, mlp[2].bias), eps=1e-6)
    assert last_linear(mlp) is mlp[2] and last_linear(nn.Identity()) is None
    line = make_projector("linear", 16, 24)
    assert last_linear(line) is line
    message = "needs equal widths, the features have 16, the language model 24"
    with expect_fail(ConfigError, contains=message):
        make_projector("identity", 16, 24)
    for wrong in ("mlp0x_gelu", "mlpx_gelu", "mlp2x_relu", "resampler", ""):
        with expect_fail(ConfigError, contains=f"unknown projector {wrong!r}; there are: linear"):
            make_projector(wrong, 16, 24)

def test_picture_becomes_sixteen_rows():
    encoder = small_encoder()
    low, maps = encoder.low_features(images), encoder.high_features(large)
    rows = encoder(images, large)
    stages = {f"stage {n}": m for n, m in enumerate(maps)}
    peek(low=low, **stages, features=encoder.features(images, large), rows=rows)
    test_eq(tuple(rows.shape), (2, 16, 24))
    want = encoder.mm_projector(mining_in_windows(encoder.mining, low, maps))
    test_close(rows, want, eps=1e-5)
    # the large picture matters
    assert not torch.allclose(encoder(images, large), encoder(images, -large))
    llava = small_encoder(aux=None)  # no second tower: LLaVA
    test_eq(llava(images), llava.mm_projector(llava.low_features(images)))
    test_eq(tuple(small_encoder(vision=siglip_config)(images, large).shape), (2, 16, 24))
    test_eq([p.dtype for p in (small_encoder().bfloat16()(images, large),)], [torch.bfloat16])

def test_stages_not_mined_are_not_built():
    encoder = small_encoder(aux_stages=[1])
    test_eq(len(encoder.vision_tower_aux.encoder.stages), 2)
    assert torch.equal(encoder.high_features(large)[0], stage_maps(encoder.vision_tower_aux, large)[1])
    layout = dict(widths=(8, 12, 16), repeats=(1, 1, 1), kernels=(3, 3, 5), strides=(1, 2, 2))
    lite = EfficientNetLiteConfig(stem_size=8, **layout)
    # the same network for both: 32/8 = 4 queries a side
    both = small_encoder(vision=lite, aux=lite, select_layer=-1)
    test_eq(tuple(both(images, large).shape), (2, 16, 24))
    test_eq(both.mining.vlm_uni_aux_projector[0].normalized_shape, (36,))

def test_whole_picture_comes_first():
    encoder = small_encoder(image_grid=2, image_global=True)
    largest = F.interpolate(large, size=128, mode="bilinear")
    crops = grid_crops(largest, image_size=32, image_grid=2, image_global=True)
    rows, maps = encoder.features(crops, largest), encoder.high_features(largest)
    peek(images=crops, images_aux=largest, features=rows)
    test_eq(tuple(rows.shape), (2, 80, 16))
    joined = upsampled(maps)
    low = [encoder.low_features(crops[:, n]) for n in range(5)]
    halved = F.interpolate(joined, scale_factor=0.5, mode="bilinear")
    test_close(rows[:, :16], mining_in_windows(encoder.mining, low[4], [halved]), eps=1e-5)
    for n in range(4):
        row, col = (32 * k for k in divmod(n, 2))
        quarter = joined[:, :, row : row + 32, col : col + 32]
        want = mining_in_windows(encoder.mining, low[n], [quarter])
        test_close(rows[:, 16 + 16 * n : 32 + 16 * n], want, eps=1e-5)
    test_eq(tuple(small_encoder(image_grid=2)(crops[:, :4], largest).shape), (2, 64, 24))  # crops alone
    # LLaVA with crops
    test_eq(tuple(small_encoder(image_grid=2, image_global=True, aux=None)(crops).shape), (2, 80, 24))

def test_encoder_compiles_without_a_graph_break():
    torch._dynamo.reset()
    largest = F.interpolate(large, size=128, mode="bilinear")
    crops = grid_crops(largest, image_size=32, image_grid=2, image_global=True)
    whole = small_encoder(image_grid=2, image_global=True)
    for encoder, args in ((small_encoder(), (images, large)), (whole, (crops, largest))):
        compiled = torch.compile(encoder, fullgraph=True, backend="eager")
        with torch.no_grad(): test_close(compiled(*args), encoder(*args), eps=1e-5)

def test_mining_helps_in_the_kept_ablation():
    ablation = json.loads((benchmark_results / "mining_ablation.json").read_text())
    without, mined = (
        [run["accuracy"] for run in ablation["runs"] if run["arm"] == arm]
        for arm in ("without mining", "with mining")
    )
    test_eq((len(without), len(mined), {run["steps"] for run in ablation["runs"]}), (3, 3, {300}))
    # "fourteen points", "ten points above the best without"
    assert sum(mined) / 3 - sum(without) / 3 > 0.135 and min(mined) - max(without) > 0.095
    assert (sum(mined) / 3 - sum(without) / 3) / (1 - sum(without) / 3) > 0.7  # "three of four"
