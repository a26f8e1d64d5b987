"Derived from nbs/08f_image_encoder.ipynb by `make tests`; edit the notebook, not this file."
import re
import torch
from torch import nn
from vlm_lit.core import ConfigError
from vlm_lit.models.mining import PatchInfoMining, from_one_grid, to_one_grid
from vlm_lit.models.towers import build_vision_tower, patch_features, stage_maps
import json
from pathlib import Path
from types import SimpleNamespace
import matplotlib.pyplot as plt
from fastcore.test import test_eq, test_close, expect_fail
from transformers import CLIPVisionConfig, ConvNextConfig
from transformers import SiglipVisionConfig
from transformers.utils.logging import disable_progress_bar
from vlm_lit.core import peek
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import grid_crops
import torch.nn.functional as F
from vlm_lit.models.towers import EfficientNetLiteConfig, VIT_MODEL_TYPES
from vlm_lit.models.mining import MiningLayers
from vlm_lit.models.image_encoder import ImageEncoder
from vlm_lit.models.image_encoder import last_linear
from vlm_lit.models.image_encoder import make_projector

def setup_module():
    global benchmark_results, clip_config, convnext_config, example, folders, images, large, mining_in_loops, mining_in_windows, same_weights, siglip_config, small, small_encoder, to_windows, upsampled
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
        "MGM's formulation; `pool` averages the joined map, for images read as a whole."
        windows = to_windows(F.avg_pool2d(upsampled(maps), pool), round(low.shape[1] ** 0.5))
        q = layers.vlm_uni_query_projector(low)
        k = layers.vlm_uni_aux_projector(windows)
        v = layers.vlm_uni_val_projector(windows)
        attention = (torch.einsum("npd,npwd->npw", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        return low + torch.einsum("npw,npwd->npd", attention, v)
    def small_encoder(vision=clip_config, aux=convnext_config, **changes):
        """An encoder of a few thousand weights; its configuration is `VLMConfig`'s, written out, for
    that is of a later notebook."""
        config = dict(vision_config=vision, vision_aux_config=aux, projector_type="mlp2x_gelu")
        config |= dict(text_config=SimpleNamespace(hidden_size=24), image_grid=1, image_global=False)
        config |= dict(select_layer=-2, aux_stages=list(range(3))) | changes
        if vision.model_type in VIT_MODEL_TYPES:
            config["vision_size"] = vision.hidden_size
        else: config["vision_size"] = vision.hidden_sizes[config["select_layer"]]
        config["vision_size_aux"] = aux and sum(aux.hidden_sizes[n] for n in config["aux_stages"])
        torch.manual_seed(0)
        return ImageEncoder(SimpleNamespace(**config)).eval().requires_grad_(False)
    large = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(large, size=32, mode="bilinear")

def test_layers_of_a_projector():
    watch = ["kind", "widths", "[type(layer).__name__ for layer in layers[1:]]"]
    with Breakpoint(make_projector, at="return nn.Sequential", watch=watch) as bp:
        make_projector("mlp2x_gelu", 16, 24)
    bp.expect({watch[2]: ["Linear", "GELU", "Linear"]}, widths=[16, 24, 24])

def test_queries_and_maps_of_two_images():
    encoder = small_encoder()
    watch = ["low.shape", "[tuple(m.shape) for m in maps]"]
    with Breakpoint(ImageEncoder.features, at="return low if maps", watch=watch) as bp:
        tokens = encoder(images, large)
    bp.expect({"low.shape": (2, 16, 16), "[m.shape[-1] for m in maps]": [32, 16, 8]})
    bp.expect_return({"result.shape": (2, 16, 16)})

def test_features_of_another_image():
    encoder = small_encoder()
    swap = {"maps": lambda maps: [m.flip(0) for m in maps]}
    with Breakpoint(ImageEncoder.features, "return low if maps", "maps[0]", set=swap) as bp:
        encoder.features(images, large)
    right, wrong = (outcome["result"] for outcome in bp.hits[0].outcomes)
    print("tokens that differ per image:", (right != wrong).any(-1).sum(1).tolist())
    bp.expect_changed({"result[0, 0, 0].item()": (0.1643, -0.0549)}, tolerance=0.001)

def test_crops_are_mined_as_one_grid():
    encoder = small_encoder(image_grid=2, image_global=True)
    largest = F.interpolate(large, size=128, mode="bilinear")
    crops = grid_crops(largest, image_size=32, image_grid=2, image_global=True)
    watch = ["low.shape", "crops.shape", "mined.shape"]
    with Breakpoint(ImageEncoder.crop_features, at="crops = from_one_grid", watch=watch) as bp:
        encoder(crops, largest)
    bp.expect({"low.shape": (2, 5, 16, 16), "crops.shape": (2, 4, 16, 16), "mined.shape": (2, 64, 16)})
    bp.expect_return({"result.shape": (2, 5 * 16, 16)})

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

def test_projectors_by_name():
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

def test_an_image_becomes_sixteen_tokens():
    encoder = small_encoder()
    low, maps = encoder.low_features(images), encoder.high_features(large)
    rows = encoder(images, large)
    stages = {f"stage {n}": m for n, m in enumerate(maps)}
    test_eq(tuple(rows.shape), (2, 16, 24))
    want = encoder.mm_projector(mining_in_windows(encoder.mining, low, maps))
    test_close(rows, want, eps=1e-5)
    # the large image matters
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

def test_whole_image_comes_first():
    encoder = small_encoder(image_grid=2, image_global=True)
    largest = F.interpolate(large, size=128, mode="bilinear")
    crops = grid_crops(largest, image_size=32, image_grid=2, image_global=True)
    rows, maps = encoder.features(crops, largest), encoder.high_features(largest)
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
