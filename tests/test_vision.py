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
from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel, SiglipVisionConfig, SiglipVisionModel
from transformers.utils.logging import disable_progress_bar
from vlm_lit.breakpoints import Breakpoint
from vlm_lit.core import peek
from vlm_lit.images import grid_crops, make_square, sample_image, to_bytes
from vlm_lit.vision import *

def setup_module():
    global CASES, LiveBytes, benchmark_results, brightness_maps, clip_config, convnext_config, cost, example, fast, images, large, mining_in_loops, mining_in_windows, relative, results, same_weights, siglip_config, small, small_encoder, teach, to_windows, upsampled, wishes
    torch.set_printoptions(precision=3, sci_mode=False)
    disable_progress_bar()
    benchmark_results = next(p for p in (Path("../benchmarks/results"), Path("benchmarks/results")) if p.is_dir())
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8)
    clip_config, siglip_config = CLIPVisionConfig(**small), SiglipVisionConfig(**small)
    convnext_config = ConvNextConfig(hidden_sizes=[8, 12, 16], depths=[1, 2, 1], num_stages=3, patch_size=2, layer_scale_init_value=1.0)
    def same_weights(part, whole):
        "Copy into a cut tower what the whole one has."
        part.load_state_dict({name: tensor for name,tensor in whole.state_dict().items() if name in part.state_dict()})
        return part.eval()
    def upsampled(maps):
        "All maps at the size of the first, channels joined."
        return torch.cat([F.interpolate(m, size=maps[0].shape[-2:], mode="bilinear", align_corners=False) for m in maps], 1)
    def mining_in_loops(layers, low, maps):
        "q + softmax(q kᵀ / sqrt(d)) v, one query at a time."
        joined, grid, out = upsampled(maps), round(low.shape[1]**.5), []
        w = joined.shape[-1]//grid
        for n in range(len(low)):
            for p in range(grid*grid):
                row, col = divmod(p, grid)
                window = joined[n, :, row*w:row*w+w, col*w:col*w+w].flatten(1).T
                q, k, v = layers.vlm_uni_query_projector(low[n, p]), layers.vlm_uni_aux_projector(window), layers.vlm_uni_val_projector(window)
                out.append(low[n, p] + (q@k.T/len(q)**.5).softmax(-1)@v)
        return torch.stack(out).reshape(low.shape)
    def example(grid=4, channels=(8, 12), sides=(16, 8), width=16, n=2, seed=0, layers=MiningLayers):
        "Layers with random weights that matter, and random features."
        torch.manual_seed(seed)
        layers = layers(width, sum(channels))
        for p in layers.parameters(): p.data += .3*torch.randn_like(p)
        return layers, torch.randn(n, grid*grid, width), [torch.randn(n, c, side, side) for c,side in zip(channels, sides)]
    def to_windows(joined, grid):
        "(n, channels, side, side) -> (n, grid*grid, window*window, channels)"
        n, channels, side, _ = joined.shape
        cut = joined.reshape(n, channels, grid, side//grid, grid, side//grid)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, grid*grid, -1, channels)
    def mining_in_windows(layers, low, maps, pool=1):
        "MGM's formulation; `pool` averages the joined map, for pictures read as a whole."
        windows = to_windows(F.avg_pool2d(upsampled(maps), pool), round(low.shape[1]**.5))
        q, k, v = layers.vlm_uni_query_projector(low), layers.vlm_uni_aux_projector(windows), layers.vlm_uni_val_projector(windows)
        return low + torch.einsum("npw,npwd->npd", (torch.einsum("npd,npwd->npw", q, k)/q.shape[-1]**.5).softmax(-1), v)
    CASES = {"plain": dict(), "odd sides": dict(grid=3, sides=(15, 7)), "last stage alone": dict(channels=(12,), sides=(16,)), "four stages": dict(grid=3, channels=(4, 6, 8, 10), sides=(24, 12, 6, 3)),
             "windows smaller than a cell": dict(grid=8, channels=(4, 6, 8), sides=(16, 8, 2)), "one query": dict(grid=1, sides=(5, 3)), "whole picture": dict(grid=2, sides=(16, 8), pool=2)}
    def relative(got, want, size=None):
        "Norm of the difference over the norm of `size`, or of what is wanted."
        return float((got.float() - want.float()).norm()/(want if size is None else size).float().norm())
    def results(run, mining, low, maps, pool):
        "Output and all gradients of one version."
        mining, low, maps = copy.deepcopy(mining), low.clone().requires_grad_(), [m.clone().requires_grad_() for m in maps]
        out = run(mining, low, maps, pool)
        torch.manual_seed(1)
        (out*torch.randn(out.shape)).sum().backward()
        grads = {"low": low.grad, **{f"map {n}": m.grad for n,m in enumerate(maps)}, **{name: p.grad for name,p in mining.named_parameters()}}
        return out.detach(), grads
    fast = lambda mining, *args: mining(*args)
    class LiveBytes(TorchDispatchMode):
        "The most bytes that tensors made inside took at one moment."
        def __init__(self):
            super().__init__()
            self.now, self.peak, self.known = 0, 0, weakref.WeakKeyDictionary()

        def add(self, bytes):
            self.now += bytes
            self.peak = max(self.peak, self.now)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, torch.Tensor): self.known.setdefault(t.untyped_storage(), True)        # was there before
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if not isinstance(t, torch.Tensor) or t.untyped_storage() in self.known: continue
                storage = t.untyped_storage()
                self.known[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
            return out
    def cost(run, side, device="meta", channels=(192, 384, 768, 1536), width=1024, backward=True, frozen=False):
        "Peak of live bytes and number of multiplications in matrix products, for one picture in float32."
        with torch.device(device):
            mining, low, maps = PatchInfoMining(width, sum(channels)), torch.randn(1, (side//8)**2, width), [torch.randn(1, c, side//2**n, side//2**n) for n,c in enumerate(channels)]
        if not frozen: low, maps = low.requires_grad_(), [m.requires_grad_() for m in maps]
        with LiveBytes() as live, FlopCounterMode(display=False) as flops, torch.set_grad_enabled(backward):
            out = run(mining, low, maps, 1)
            if backward: out.sum().backward()
        return live.peak, flops.get_total_flops()//2
    def brightness_maps(picture):
        "(n, side, side) of -1 to 1 -> two stages of four channels; the constant ones let LayerNorm keep the size."
        fine = torch.stack([picture, -picture, torch.ones_like(picture), -torch.ones_like(picture)], 1)
        return [fine, F.avg_pool2d(fine, 2)]
    def wishes(sign):
        "(n, num_queries) of +1 and -1 -> queries of eight numbers."
        return torch.stack([sign, -sign, torch.ones_like(sign), -torch.ones_like(sign)]*2, -1)
    def teach(steps=150):
        "Mining that finds the brightest or the darkest value, from random clouds; and the loss of every step."
        torch.manual_seed(0)
        mining = PatchInfoMining(8, 8)
        optimizer, losses = torch.optim.Adam(mining.parameters(), 1e-2), []
        for _ in range(steps):
            clouds = F.interpolate(torch.rand(8, 1, 8, 8)*2 - 1, size=24, mode="bilinear")[:, 0]
            sign, windows = torch.rand(8, 9).round()*2 - 1, to_windows(clouds[:, None], 3)[..., 0]
            low = wishes(sign)
            loss = ((mining(low, brightness_maps(clouds)) - low)[..., 0] - (windows*sign[..., None]).amax(-1)*sign).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad(); loss.backward(); optimizer.step()
        return mining.requires_grad_(False), losses
    def small_encoder(vision=clip_config, aux=convnext_config, **changes):
        "An encoder of a few thousand weights; its configuration is `VLMConfig`'s, written out, for that is of a later notebook."
        vision_size = vision.hidden_size if vision.model_type in PATCH_TOWERS else vision.hidden_sizes[changes.get("select_layer", -2)]
        config = dict(vision_config=vision, vision_aux_config=aux, text_config=SimpleNamespace(hidden_size=24), projector_type="mlp2x_gelu", image_grid=1, image_global=False,
                      select_layer=-2, aux_stages=list(range(3)), vision_size=vision_size) | changes
        config["vision_size_aux"] = aux and sum(aux.hidden_sizes[n] for n in config["aux_stages"])
        torch.manual_seed(0)
        return ImageEncoder(SimpleNamespace(**config)).eval().requires_grad_(False)
    large = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(large, size=32, mode="bilinear")

def test_selected_layers_are_counted_as_transformers_does():
    clip, convnext = CLIPVisionConfig(num_hidden_layers=24), ConvNextConfig(hidden_sizes=[8, 12, 16, 20])
    print("CLIP-L:", {n: tower_depth(clip, n) for n in (-1, -2, 0, 23)}, " ConvNeXt:", {n: tower_depth(convnext, n) for n in (-1, -2, 0)})
    test_eq([tower_depth(clip, n) for n in (-1, -2, -25, 0, 23, 24)], [24, 23, 0, 0, 23, 24])
    test_eq([tower_depth(convnext, n) for n in (-1, -2, -4, 0, 3)], [4, 3, 1, 1, 4])
    for config,wrong in ((clip, 25), (clip, -26), (convnext, 4), (convnext, -5)):
        with expect_fail(ConfigError, contains=f"select_layer {wrong} is none of a"): tower_depth(config, wrong)
    with expect_fail(ConfigError, contains="no tower of model type 'gemma'; there are: clip_vision_model"): tower_depth(AutoConfig.for_model("gemma"), -1)

def test_what_is_behind_the_features_is_not_kept():
    weights = lambda tower: sum(p.numel() for p in tower.parameters())
    for config in (clip_config, siglip_config, convnext_config):
        print(config.model_type.ljust(20), {n: f"{weights(make_tower(config, n)):,}" for n in (-1, -2, -3)}, "of", f"{weights(AutoModel.from_config(config)):,}")
    test_eq([len(make_tower(clip_config, n).encoder.layers) for n in (-1, -2, 0)], [4, 3, 0])
    test_eq([len(make_tower(convnext_config, n).encoder.stages) for n in (-1, -2, 0)], [3, 2, 1])
    assert not any("head" in name or "post_layernorm" in name for name,_ in make_tower(siglip_config).named_parameters())
    assert not any(name.startswith("layernorm") for name,_ in make_tower(convnext_config).named_parameters())

def test_features_are_those_of_the_whole_tower():
    torch.manual_seed(0)
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for config,whole in ((clip_config, CLIPVisionModel(clip_config)), (siglip_config, SiglipVisionModel(siglip_config))):
            states = whole.eval()(pictures, output_hidden_states=True).hidden_states
            test_eq(len(states), 5)
            for n in (-1, -2, -4, 0, 2):
                tokens = states[n][:, 1:] if config is clip_config else states[n]
                assert torch.equal(patch_features(same_weights(make_tower(config, n), whole), pictures, n), tokens) and tokens.shape == (2, 16, 16)

def test_stage_maps_are_convnexts_hidden_states():
    torch.manual_seed(0)
    whole, pictures = ConvNextModel(convnext_config).eval(), torch.randn(2, 3, 44, 44)      # 44 is odd two halvings down: 22, 11, 5
    with torch.no_grad():
        states, maps = whole(pictures, output_hidden_states=True).hidden_states, stage_maps(same_weights(make_tower(convnext_config), whole), pictures)
        test_eq([tuple(m.shape) for m in maps], [(2, 8, 22, 22), (2, 12, 11, 11), (2, 16, 5, 5)])
        test_eq(len(states), 4)                                                             # the input of the first stage, and each one's output
        for ours,theirs in zip(maps, states[1:]): assert torch.equal(ours, theirs)
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
            assert (half.float() - exact).norm() < .02*exact.norm()

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
    print({lite.patch_size*2**n: channels for n,channels in enumerate(lite.hidden_sizes)})
    test_eq(lite.hidden_sizes, [16, 24, 40, 112, 320])
    test_eq(AutoConfig.for_model("efficientnet_lite", widths=(8, 8, 12), repeats=(1, 1, 1), kernels=(3, 3, 3), strides=(1, 1, 2)).hidden_sizes, [8, 12])
    test_eq(EfficientNetLiteConfig.from_dict(lite.to_dict()).to_dict(), lite.to_dict())

def test_odd_padding_goes_to_the_right():
    def digits(conv, row):
        "The output for a single row of pixels of a kernel that weighs the three neighbours with 1, 10, 100."
        conv.weight.data.zero_()[0, 0, 1] = torch.tensor([1., 10, 100])
        return [int(x) for x in conv(torch.tensor(row, dtype=torch.float)[None, None, None].expand(1, 1, len(row), -1))[0, 0, 0]]

    ours, symmetric = SamePadConv2d(1, 1, 3, 2, bias=False), nn.Conv2d(1, 1, 3, 2, padding=1, bias=False)
    print(digits(ours, [1, 2, 3, 4]), digits(symmetric, [1, 2, 3, 4]))
    test_eq(digits(ours, [1, 2, 3, 4]), [321, 43])
    test_eq(digits(symmetric, [1, 2, 3, 4]), [210, 432])
    test_eq(digits(ours, [1, 2, 3, 4, 5]), digits(symmetric, [1, 2, 3, 4, 5]))      # an odd side: nothing odd is left over, both agree

def test_block_adds_its_input_where_shapes_allow():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 7, 7)
    for out,stride,side in ((8, 1, 7), (12, 1, 7), (8, 2, 4)):
        block = InvertedBottleneck(8, out, 3, stride, 6, 1e-3).eval()
        block.layers[-1].weight.data.zero_()                              # nothing comes through the layers
        test_eq(tuple(block(x).shape), (1, out, side, side))
        test_eq(block(x).abs().sum().item(), x.abs().sum().item() if (out, stride) == (8, 1) else 0)
    test_eq(len(InvertedBottleneck(8, 8, 3, 1, 1, 1e-3).layers), 5)       # without expansion there is nothing to widen

def test_efficientnet_lite_has_the_published_size():
    torch.manual_seed(0)
    lite, cut = make_tower(EfficientNetLiteConfig()), make_tower(EfficientNetLiteConfig(), -2)
    print(f"{sum(p.numel() for p in lite.parameters()):,} weights; cut behind stage -2: {sum(p.numel() for p in cut.parameters()):,}")
    with torch.no_grad(): peek(**{f"stage {n}": m for n,m in enumerate(lite(torch.randn(1, 3, 128, 128)).hidden_states)})
    classifier = 320*1280 + 2*1280 + 1280*1000 + 1000           # left out here: a convolution with its normalisation, and a layer for 1,000 classes
    test_eq(round((sum(p.numel() for p in lite.parameters()) + classifier)/1e5), 47)     # Lite0 is published with 4.7 million
    with torch.no_grad():
        test_eq([tuple(m.shape[1:]) for m in stage_maps(lite, torch.randn(1, 3, 65, 65))], [(16, 33, 33), (24, 17, 17), (40, 9, 9), (112, 5, 5), (320, 3, 3)])
        test_eq(tuple(patch_features(cut, torch.randn(1, 3, 64, 64), -2).shape), (1, 16, 112))
        test_eq(stage_maps(lite.bfloat16(), torch.randn(1, 3, 32, 32))[0].dtype, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        lite.save_pretrained(folder)
        again = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, again[name]) for name,tensor in lite.state_dict().items()) and len(again) == len(lite.state_dict())

def test_statistics_stay_frozen():
    torch.manual_seed(0)
    lite, picture = make_tower(EfficientNetLiteConfig()), torch.randn(1, 3, 64, 64)
    def drift(tower, *, forced):
        "How far its features move, relative to their size, when it has seen five other batches in training mode."
        with torch.no_grad():
            before = patch_features(tower.eval(), picture)
            nn.Module.train(tower) if forced else tower.train()
            for _ in range(5): patch_features(tower, 2 + torch.randn(4, 3, 64, 64))
            return float((patch_features(tower.eval(), picture) - before).norm()/before.norm())
    print("train():", drift(lite, forced=False), " training mode forced:", f"moved by more than half: {drift(copy.deepcopy(lite), forced=True) > .5}")
    test_eq(drift(lite, forced=False), 0)
    assert not make_tower(EfficientNetLiteConfig()).training and not any(part.training for part in lite.train().modules())
    assert drift(copy.deepcopy(lite), forced=True) > .5

def test_loops_follow_the_formula():
    print({name: tuple(p.shape) for name,p in MiningLayers(16, 20).named_parameters() if "aux" in name})
    test_eq(sorted(MiningLayers(16, 20).state_dict()), sorted(f"vlm_uni_{part}_projector.{n}.{kind}" for part in ("query", "aux", "val") for n in (0, 1) for kind in ("weight", "bias")))
    layers, low, maps = example()
    values = layers.vlm_uni_val_projector(upsampled(maps)[:, :, :4, :4].flatten(2).transpose(1, 2))
    for p in layers.vlm_uni_aux_projector[1].parameters(): p.data.zero_()
    test_close(mining_in_loops(layers, low, maps)[:, 0], low[:, 0] + values.mean(1), eps=1e-5)
    for p in layers.vlm_uni_val_projector[1].parameters(): p.data.zero_()
    assert torch.equal(mining_in_loops(layers, low, maps), low)

def test_windows_lie_under_their_queries():
    numbered = torch.arange(16.).reshape(1, 1, 4, 4)
    print(numbered[0, 0].int().tolist(), "->", to_windows(numbered, 2)[0, :, :, 0].int().tolist())
    test_eq(to_windows(numbered, 2)[0, :, :, 0].int().tolist(), [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])

def test_windows_equal_loops():
    for grid,sides in ((4, (16, 8)), (3, (15, 7)), (1, (5, 2))):
        layers, low, maps = example(grid, sides=sides)
        test_close(mining_in_windows(layers, low, maps), mining_in_loops(layers, low, maps), eps=1e-5)

def test_plain_reshape_takes_strips():
    numbered = torch.arange(16.).reshape(1, 1, 4, 4)
    print(numbered.reshape(4, 4).int().tolist()[0], "is the first strip,", to_windows(numbered, 2)[0, 0, :, 0].int().tolist(), "the first window")
    assert numbered.reshape(4, 4).tolist()[0] != to_windows(numbered, 2)[0, 0, :, 0].tolist()

def test_joined_map_takes_212_mb():
    channels, side = (192, 384, 768, 1536), 192
    own = sum(c*(side//2**n)**2 for n,c in enumerate(channels))
    print(f"in bf16: {2*sum(channels)*side**2/1e6:.0f} MB joined, {2*own/1e6:.0f} MB as the tower made them: {sum(channels)*side**2/own:.0f} times as much")
    test_eq(round(2*sum(channels)*side**2/1e6), 212)
    test_eq(round(2*own/1e6), 27)

def test_enlarging_two_cells_to_four():
    cells, weights = axis_weights(side=2, base=4, grid=1)
    print(cells.tolist(), weights[0].tolist())
    test_eq(cells.tolist(), [[0, 1]])
    test_eq(weights[0].tolist(), [[1, 0], [.75, .25], [.25, .75], [1-1, 1]])
    test_eq((weights[0]@torch.tensor([10., 20])).tolist(), F.interpolate(torch.tensor([[[10., 20]]]), size=4, mode="linear").flatten().tolist())

def test_each_query_has_its_cells_and_a_border():
    cells, weights = axis_weights(side=6, base=12, grid=3)
    test_eq(cells.tolist(), [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]])
    test_eq(weights[1].tolist(), [[.25, .75, 0, 0], [0, .75, .25, 0], [0, .25, .75, 0], [0, 0, .75, .25]])
    test_eq(axis_weights(side=24, base=192, grid=24)[0].shape[1], 3)      # MGM-2B's last stage: one cell under a query, and its two neighbours
    x = torch.randn(7)
    for side,base,grid,pool in ((7, 7, 7, 1), (7, 15, 5, 1), (3, 24, 12, 1), (7, 28, 7, 2), (1, 6, 2, 1)):      # odd sizes; windows smaller than a cell; pooled
        cells, weights = axis_weights(side, base, grid, pool)
        want = F.interpolate(x[None, None, :side], size=base, mode="linear")[0, 0].reshape(-1, pool).mean(1).reshape(grid, -1)
        test_close((weights@x[cells][..., None])[..., 0], want, eps=1e-6)

def test_align_corners_moves_features():
    truth = torch.arange(192) + .5                                                   # where each position of the finest map lies
    ramp = (8*(torch.arange(24) + .5))[None, None]                                   # where each cell of the last map lies, in the same measure
    error = {aligned: (F.interpolate(ramp, size=192, mode="linear", align_corners=aligned)[0, 0] - truth)[8:-8].abs().max().item() for aligned in (False, True)}
    print({f"align_corners={aligned}": f"{4*far:.1f} pixels off" for aligned,far in error.items()})
    test_close(error[False], 0, eps=1e-4)
    assert 3 < error[True] < 4

def test_window_weights_make_the_windows():
    torch.manual_seed(0)
    for side,base,grid,pool in ((6, 12, 3, 1), (5, 15, 3, 1), (2, 16, 8, 1), (6, 12, 3, 2)):
        features = torch.randn(2, 4, side, side)
        cells, weights = window_weights(side, base, grid, pool, "cpu")
        want = to_windows(F.avg_pool2d(F.interpolate(features, size=(base, base), mode="bilinear"), pool), grid)
        test_close(weights@cells_under(features, cells), want, eps=1e-5)

def test_enlarging_commutes_with_channels():
    torch.manual_seed(0)
    features, layer = torch.randn(1, 12, 6, 6), torch.randn(5, 12)
    enlarge, mix = (lambda m: F.interpolate(m, scale_factor=4, mode="bilinear")), (lambda m: torch.einsum("dc,nchw->ndhw", layer, m))
    peek(**{"enlarged, then mixed": mix(enlarge(features)), "mixed, then enlarged": enlarge(mix(features))})
    test_close(mix(enlarge(features)), enlarge(mix(features)), eps=1e-5)

def test_query_can_be_folded_into_features():
    torch.manual_seed(0)
    q, W, b, window = torch.randn(16), torch.randn(16, 20), torch.randn(16), torch.randn(9, 20)
    keys_first, query_first = q@(window@W.T + b).T, (q@W)@window.T
    print("difference of the scores:", keys_first - query_first)
    test_close(keys_first - query_first, (q@b).expand(9), eps=1e-4)
    test_close((keys_first/4).softmax(-1), (query_first/4).softmax(-1), eps=1e-5)
    test_eq(192**2//24**2, 64)                    # positions for each query at MGM-2B's size, and so many times fewer products with W

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
    pair = torch.tensor([[[-1., 1.]]])
    enlarge = lambda x: F.interpolate(x, size=8, mode="linear").flatten().tolist()
    print("square of the enlarged:", [round(x*x, 2) for x in enlarge(pair)], " enlarged squares:", enlarge(pair**2))
    assert enlarge(pair**2) == [1]*8 and min(x*x for x in enlarge(pair)) < .1

def test_scores_are_query_times_key():
    layers, low, maps = example(3, sides=(12, 5))
    windows = to_windows(upsampled(maps), 3)
    with torch.no_grad():
        query = layers.vlm_uni_query_projector(low)
        score, mean, rstd = window_scores(query, layers.vlm_uni_aux_projector, maps, [window_weights(side, 12, 3, 1, "cpu") for side in (12, 5)])
        peek(score=score, mean=mean, rstd=rstd)
        test_close(score, torch.einsum("npd,npwd->npw", query, layers.vlm_uni_aux_projector(windows)), eps=1e-4)
        test_close(mean, windows.mean(-1), eps=1e-5)
        test_close(rstd, (windows.var(-1, correction=0) + 1e-5).rsqrt(), eps=1e-4)

def test_attention_is_handed_down_to_cells():
    cells, weights = axis_weights(side=2, base=4, grid=1)
    print("shares of the two cells:", (torch.tensor([0., 1, 0, 0])@weights[0]).tolist())
    test_eq((torch.tensor([0., 1, 0, 0])@weights[0]).tolist(), [.75, .25])
    torch.manual_seed(0)
    features, share = torch.randn(2, 12, 6, 6), torch.rand(2, 9, 16)
    windows = to_windows(F.interpolate(features, size=(12, 12), mode="bilinear"), 3)
    test_close(stage_average(features, share, *window_weights(6, 12, 3, 1, "cpu")), torch.einsum("npw,npwc->npc", share, windows), eps=1e-4)

def test_mining_equals_windows_and_loops():
    mining, low, maps = example(layers=PatchInfoMining)
    with torch.no_grad():
        out, windows, loops = mining(low, maps), mining_in_windows(mining, low, maps), mining_in_loops(mining, low, maps)
        print(f"relative to what was found: {(out - windows).norm()/(windows - low).norm():.0e} against windows, {(out - loops).norm()/(loops - low).norm():.0e} against loops")
        assert (out - windows).norm() < 1e-5*(windows - low).norm() and (out - loops).norm() < 1e-5*(loops - low).norm()
        test_close(mining.attention(low, maps).sum(-1), torch.ones(2, 16), eps=1e-5)
    assert (out - low).norm() > .5*low.norm()                      # it found something
    with expect_fail(ConfigError, contains="17 queries make no square; is a class token among them?"): mining(torch.randn(2, 17, 16), maps)
    with expect_fail(ConfigError, contains="16 high-resolution features a side cannot be shared by 3 queries a side"): mining(low[:, :9], maps)

def test_outputs_and_gradients_equal_the_straightforward_ones():
    for name,case in CASES.items():
        case, pool = dict(case), case.get("pool", 1)
        case.pop("pool", None)
        mining, low, maps = example(layers=PatchInfoMining, **case)
        (want, want_grads), (got, got_grads) = (results(run, mining, low, maps, pool) for run in (mining_in_windows, fast))
        largest = max(want_grads.values(), key=lambda g: g.norm())
        worst = max(relative(got_grads[k], g, largest if g.norm() < 1e-4*largest.norm() else None) for k,g in want_grads.items())
        print(f"{name:28} output {relative(got, want, want - low):.0e}   gradients {worst:.0e}")
        assert relative(got, want, want - low) < 1e-5 and worst < 1e-5 and len(got_grads) == 13 + len(maps)

def test_bf16_inputs_lose_nothing():
    mining, low, maps = example(layers=PatchInfoMining, grid=6, channels=(24, 48, 96), sides=(48, 24, 12), width=64)
    mining, low, maps = mining.bfloat16(), low.bfloat16(), [m.bfloat16() for m in maps]
    with torch.no_grad():
        want = mining_in_windows(copy.deepcopy(mining).float(), low.float(), [m.float() for m in maps])
        found = want - low.float()
        before, after, plain = mining(low.float(), maps), mining(low, maps), mining_in_windows(mining, low, maps)
        print(f"before rounding {relative(before, want, found):.0e}, rounded {relative(after, want.bfloat16(), found):.0e}, straightforward in bf16 {relative(plain, want.bfloat16(), found):.0e}")
        test_eq(after.dtype, torch.bfloat16)
        assert relative(before, want, found) < 1e-5 and relative(after, want.bfloat16(), found) < 1e-3 and relative(plain, want.bfloat16(), found) > 5e-3

def test_inference_mixed_precision_and_adapters():
    axis_weights.cache_clear()
    with torch.inference_mode(): axis_weights(3, 9, 3)
    assert not axis_weights(3, 9, 3)[1].is_inference()
    (axis_weights(3, 9, 3)[1]*torch.ones(3, requires_grad=True)).sum().backward()
    mining, low, maps = example(layers=PatchInfoMining)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): out, seen = mining(low, maps), mining.attention(low, maps)
    assert torch.equal(out, mining(low, maps)) and torch.equal(seen, mining.attention(low, maps))      # autocast does not reach inside
    adapted = copy.deepcopy(mining)
    adapted.vlm_uni_val_projector[1] = nn.Identity()                                              # as an adapter would stand there
    with expect_fail(ConfigError, contains="put 'mining' into modules_to_save"): adapted(low, maps)
    flat = [torch.ones_like(m) for m in maps]                                                     # no deviation at all: LayerNorm's epsilon, and no NaN
    test_close(mining(low, flat), mining_in_windows(mining, low, flat), eps=1e-3)

def test_counting_without_computing_counts_the_same():
    axis_weights.cache_clear()                # tables are made once and kept; count them in neither or both
    for run in (mining_in_windows, fast):
        cost(run, 32)
        on_cpu, on_meta = (cost(run, 32, device, channels=(24, 48, 96, 192), width=128)[0] for device in ("cpu", "meta"))
        assert abs(on_cpu/on_meta - 1) < .1, (on_cpu, on_meta)

def test_mining_takes_about_a_tenth():
    print(f"{'one picture, float32':36}{'peak MB':>24}{'billion multiplications':>28}")
    for title,side in (("MGM-2B, 768 pixels", 192), ("MGM-2B-HD, 1536 pixels", 384)):
        for what,changes in {"forward": dict(backward=False), "and all gradients": dict(), "frozen tower": dict(frozen=True)}.items():
            (slow_peak, slow_work), (fast_peak, fast_work) = (cost(run, side, **changes) for run in (mining_in_windows, fast))
            print(f"{title:24}{what:20}{slow_peak/1e6:7,.0f} -> {fast_peak/1e6:4,.0f} ({fast_peak/slow_peak:.2f}){slow_work/1e9:12,.0f} -> {fast_work/1e9:4,.1f} ({fast_work/slow_work:.3f})")
            assert fast_peak < slow_peak/9 and fast_work < slow_work/30 and slow_peak > 1e9

def test_mining_compiles_without_a_graph_break():
    torch._dynamo.reset()
    mining, low, maps = example(layers=PatchInfoMining, n=4)
    compiled = torch.compile(mining, fullgraph=True, backend="eager")
    for n in (4, 2): test_close(compiled(low[:n], [m[:n] for m in maps]), mining(low[:n], [m[:n] for m in maps]), eps=1e-6)
    _, other_low, other_maps = example(2, sides=(12, 6))          # another size is another graph, not an error
    test_close(compiled(other_low, other_maps), mining(other_low, other_maps), eps=1e-6)
    compiled(low, maps).sum().backward()
    got = [p.grad.clone() for p in mining.parameters()]
    mining.zero_grad()
    mining(low, maps).sum().backward()
    for ours,eager in zip(got, mining.parameters()): test_close(ours, eager.grad, eps=1e-4)

def test_queries_see_their_window_and_one_coarse_cell_beyond():
    mining, low, maps = example(channels=(8, 12, 6), sides=(16, 8, 4), layers=PatchInfoMining, n=1)
    def moved(stage, cells):
        "Which queries' outputs change with the first `cells` x `cells` of a stage."
        changed = [m.clone() for m in maps]
        changed[stage][:, :, :cells, :cells] += 3*torch.randn(1, maps[stage].shape[1], cells, cells)
        return ((mining(low, changed) - mining(low, maps)).abs().amax(-1)[0] > 0).nonzero().flatten().tolist()
    for stage,cells in enumerate((4, 2, 1)): print(f"stage {stage}, {cells} x {cells} cells under query 0: queries", moved(stage, cells))
    test_eq(moved(0, 4), [0])
    test_eq(moved(1, 2), [0, 1, 4, 5])            # the cell at the border is mixed into the first position of each neighbour
    test_eq(moved(1, 1), [0])                     # a cell that does not touch the border is not
    test_eq(moved(2, 1), [0, 1, 4, 5])            # one cell is the whole window here; it reaches the neighbours, and no further

def test_queries_learn_where_to_look():
    mining, losses = teach()
    print(f"mean squared error: {sum(losses[:10])/10:.2f} in the first ten steps, {sum(losses[-10:])/10:.3f} in the last ten")
    assert sum(losses[-10:]) < sum(losses[:10])/10
    photo = F.avg_pool2d(to_bytes(make_square(sample_image(), 192)).float().mean(0)[None], 4)/127.5 - 1
    windows = to_windows(photo[:, None], 6)[..., 0]
    spread = windows.amax(-1) - windows.amin(-1)
    looks = {}
    for wish in (1, -1):
        looks[wish] = mining.attention(wishes(torch.full((1, 36), float(wish))), brightness_maps(photo))
        reached = (looks[wish]*windows).sum(-1)                           # mean brightness under the attention
        wanted = windows.amax(-1) if wish == 1 else windows.amin(-1)
        off, blind = (reached - wanted).abs()[spread > .5].mean(), (windows.mean(-1) - wanted).abs()[spread > .5].mean()
        print(f"asked for {'light' if wish == 1 else 'dark'}: brightness under the attention is {off:.2f} off what was asked for; under an even look {blind:.2f}")
        assert off < blind/2
    assert (looks[1]*windows).sum(-1)[spread > .5].min() > (looks[-1]*windows).sum(-1)[spread > .5].min()

def test_crops_are_laid_out_as_the_picture():
    numbered = torch.arange(16.).reshape(1, 1, 4, 4).expand(-1, 3, -1, -1)
    crops = grid_crops(numbered, image_size=2, image_grid=2)[:, :, :1].flatten(2)[..., None]          # a pixel is a patch here
    print("crops:", crops[0, ..., 0].int().tolist())
    test_eq(crops[0, ..., 0].int().tolist(), [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    test_eq(to_one_grid(crops, 2, 2).flatten().int().tolist(), list(range(16)))
    crops = torch.randn(2, 9, 4, 5)
    test_eq(from_one_grid(to_one_grid(crops, 3, 2), 3, 2), crops)

def test_crops_and_whole_equal_the_straightforward_way():
    mining, crops, maps = example(3, channels=(6, 10), sides=(24, 12), layers=PatchInfoMining, n=8)
    crops, whole, maps = crops.reshape(2, 4, 9, 16), torch.randn(2, 9, 16), [m[:2] for m in maps]
    with torch.no_grad():
        joined = upsampled(maps)
        quarters = [joined[:, :, row:row + 12, col:col + 12] for row in (0, 12) for col in (0, 12)]
        want = torch.stack([mining_in_windows(mining, crops[:, n], [quarters[n]]) for n in range(4)], 1)
        assert relative(from_one_grid(mining(to_one_grid(crops, 2, 3), maps), 2, 3), want, want - crops) < 1e-5
        halved = F.interpolate(joined, scale_factor=.5, mode="bilinear")
        want = mining_in_windows(mining, whole, [halved])
        assert relative(mining(whole, maps, pool=2), want, want - whole) < 1e-5
        assert relative(mining(crops.flatten(0, 1)[:2], maps, pool=2), want) > .1                     # other queries would find other things

def test_cutting_before_enlarging_leaves_seams():
    torch.manual_seed(0)
    coarse = torch.randn(1, 3, 6, 6)
    enlarge = lambda m: F.interpolate(m, scale_factor=4, mode="bilinear")
    seam = (enlarge(coarse)[..., :12] - enlarge(coarse[..., :3])).abs().amax((0, 1, 2))
    print("difference in the columns of the left half:", seam)
    assert (seam[:-2] == 0).all() and (seam[-2:] > .1).all()

def test_projectors_by_name():
    for kind in ("linear", "mlp2x_gelu"): print(kind.ljust(12), make_projector(kind, 16, 24))
    test_eq(list(make_projector("mlp2x_gelu", 16, 24).state_dict()), ["0.weight", "0.bias", "2.weight", "2.bias"])     # LLaVA's names
    test_eq([tuple(p.shape) for p in make_projector("mlp3x_gelu", 16, 24).parameters() if p.dim() == 2], [(24, 16), (24, 24), (24, 24)])
    test_eq([type(layer).__name__ for layer in make_projector("mlp1x_gelu", 16, 24)], ["Linear"])
    x = torch.randn(2, 9, 16)
    assert make_projector("identity", 16, 16)(x) is x
    mlp = make_projector("mlp2x_gelu", 16, 24)
    test_close(mlp(x), F.linear(F.gelu(F.linear(x, mlp[0].weight, mlp[0].bias)), mlp[2].weight, mlp[2].bias), eps=1e-6)
    assert last_linear(mlp) is mlp[2] and last_linear(nn.Identity()) is None
    line = make_projector("linear", 16, 24)
    assert last_linear(line) is line
    with expect_fail(ConfigError, contains="needs equal widths, the features have 16, the language model 24"): make_projector("identity", 16, 24)
    for wrong in ("mlp0x_gelu", "mlpx_gelu", "mlp2x_relu", "resampler", ""):
        with expect_fail(ConfigError, contains=f"unknown projector {wrong!r}; there are: linear"): make_projector(wrong, 16, 24)

def test_picture_becomes_sixteen_rows():
    encoder = small_encoder()
    peek(low=encoder.low_features(images), **{f"stage {n}": m for n,m in enumerate(encoder.high_features(large))}, features=encoder.features(images, large), rows=encoder(images, large))
    test_eq(tuple(encoder(images, large).shape), (2, 16, 24))
    want = encoder.mm_projector(mining_in_windows(encoder.mining, encoder.low_features(images), encoder.high_features(large)))
    test_close(encoder(images, large), want, eps=1e-5)
    assert not torch.allclose(encoder(images, large), encoder(images, -large))                # the large picture matters
    llava = small_encoder(aux=None)                                                           # no second tower: LLaVA
    test_eq(llava(images), llava.mm_projector(llava.low_features(images)))
    test_eq(tuple(small_encoder(vision=siglip_config)(images, large).shape), (2, 16, 24))
    test_eq([p.dtype for p in (small_encoder().bfloat16()(images, large),)], [torch.bfloat16])

def test_stages_not_mined_are_not_built():
    encoder = small_encoder(aux_stages=[1])
    test_eq(len(encoder.vision_tower_aux.encoder.stages), 2)
    assert torch.equal(encoder.high_features(large)[0], stage_maps(encoder.vision_tower_aux, large)[1])
    lite = EfficientNetLiteConfig(stem_size=8, widths=(8, 12, 16), repeats=(1, 1, 1), kernels=(3, 3, 5), strides=(1, 2, 2))
    both = small_encoder(vision=lite, aux=lite, select_layer=-1)                              # the same network for both: 32/8 = 4 queries a side
    test_eq((tuple(both(images, large).shape), both.mining.vlm_uni_aux_projector[0].normalized_shape), ((2, 16, 24), (36,)))

def test_whole_picture_comes_first():
    encoder = small_encoder(image_grid=2, image_global=True)
    largest = F.interpolate(large, size=128, mode="bilinear")
    crops = grid_crops(largest, image_size=32, image_grid=2, image_global=True)
    rows, maps = encoder.features(crops, largest), encoder.high_features(largest)
    peek(images=crops, images_aux=largest, features=rows)
    test_eq(tuple(rows.shape), (2, 80, 16))
    joined = upsampled(maps)
    whole = mining_in_windows(encoder.mining, encoder.low_features(crops[:, 4]), [F.interpolate(joined, scale_factor=.5, mode="bilinear")])
    test_close(rows[:, :16], whole, eps=1e-5)
    for n in range(4):
        row, col = (32*k for k in divmod(n, 2))
        want = mining_in_windows(encoder.mining, encoder.low_features(crops[:, n]), [joined[:, :, row:row + 32, col:col + 32]])
        test_close(rows[:, 16 + 16*n:32 + 16*n], want, eps=1e-5)
    test_eq(tuple(small_encoder(image_grid=2)(crops[:, :4], largest).shape), (2, 64, 24))               # crops alone
    test_eq(tuple(small_encoder(image_grid=2, image_global=True, aux=None)(crops).shape), (2, 80, 24))   # LLaVA with crops

def test_encoder_compiles_without_a_graph_break():
    torch._dynamo.reset()
    largest = F.interpolate(large, size=128, mode="bilinear")
    crops = grid_crops(largest, image_size=32, image_grid=2, image_global=True)
    for encoder,args in ((small_encoder(), (images, large)), (small_encoder(image_grid=2, image_global=True), (crops, largest))):
        with torch.no_grad(): test_close(torch.compile(encoder, fullgraph=True, backend="eager")(*args), encoder(*args), eps=1e-5)

def test_mining_helps_in_the_kept_ablation():
    ablation = json.loads((benchmark_results/"mining_ablation.json").read_text())
    without, mined = ([run["accuracy"] for run in ablation["runs"] if run["arm"] == arm] for arm in ("without mining", "with mining"))
    test_eq((len(without), len(mined), {run["steps"] for run in ablation["runs"]}), (3, 3, {300}))
    assert sum(mined)/3 - sum(without)/3 > .135 and min(mined) - max(without) > .095           # "fourteen points", "ten points above the best without"
    assert (sum(mined)/3 - sum(without)/3)/(1 - sum(without)/3) > .7                            # "three of four"
