"Derived from nbs/08d_towers.ipynb by `make tests`; edit the notebook, not this file."
import torch
from torch import nn
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithNoAttention
from vlm_lit.core import ConfigError
import copy, tempfile
from fastcore.test import test_eq, expect_fail
from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.utils.logging import disable_progress_bar
from vlm_lit.core import peek
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.models.towers import EfficientNetLiteConfig
from vlm_lit.models.towers import EfficientNetLiteModel
from vlm_lit.models.towers import InvertedBottleneck
from vlm_lit.models.towers import SamePadConv2d
from vlm_lit.models.towers import build_vision_tower
from vlm_lit.models.towers import patch_features
from vlm_lit.models.towers import stage_maps
from vlm_lit.models.towers import tower_depth

def setup_module():
    global clip_config, convnext_config, same_weights, siglip_config, small
    torch.set_printoptions(precision=3, sci_mode=False)
    disable_progress_bar()
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

def test_depth_of_the_selected_layer():
    clip = CLIPVisionConfig(num_hidden_layers=24)
    convnext = ConvNextConfig(hidden_sizes=[8, 12, 16, 20])
    with Breakpoint(tower_depth, at="return depth", watch="kind select_layer most depth") as bp:
        for config in (clip, convnext): tower_depth(config, -2)
    bp.expect_each(most=[24, 4], depth=[23, 3])

def test_class_token_is_dropped():
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    clip = build_vision_tower(clip_config, -2).eval()
    with Breakpoint(patch_features, at="return features[:, 1:]", watch="kind features") as bp:
        patch_features(clip, images)
    bp.expect({"features.shape": (2, 17, 16)}, kind="clip_vision_model")
    bp.expect_return({"result.shape": (2, 16, 16)})

def test_class_token_would_move_every_patch():
    torch.manual_seed(0)
    dot = torch.zeros(2, 3, 32, 32)  # a gray image, and one with a bright patch
    dot[1, :, 8:16, 16:24] = 3
    clip = build_vision_tower(clip_config, -2).eval()
    moved = {"features": lambda features: features.roll(1, 1)}
    with Breakpoint(patch_features, "return features[:, 1:]", "features", set=moved) as bp:
        patch_features(clip, dot)
    brightest = "(result[1] - result[0]).norm(dim=-1).argmax().item()"
    bp.expect_changed({brightest: (6, 7)})

def test_maps_are_halved_from_stage_to_stage():
    images = torch.randn(2, 3, 32, 32)
    with Breakpoint(stage_maps, at="return maps", watch="[tuple(m.shape) for m in maps]") as bp:
        stage_maps(build_vision_tower(convnext_config), images)
    shapes = [(2, 8, 16, 16), (2, 12, 8, 8), (2, 16, 4, 4)]
    bp.expect({"[tuple(m.shape) for m in maps]": shapes})

def test_odd_padding_goes_to_the_right():
    conv = SamePadConv2d(1, 1, 3, 2, bias=False)
    conv.weight.data.zero_()[0, 0, 1] = torch.tensor([1.0, 10, 100])
    pixels = torch.tensor([1.0, 2, 3, 4]).expand(1, 1, 4, 4)
    equally = {"pads": [1, 1, 1, 1]}
    with Breakpoint(SamePadConv2d.forward, at="return super", watch="pads", set=equally) as bp:
        conv(pixels)
    bp.expect(pads=[0, 1, 0, 1])
    bp.expect_changed({"result[0, 0, 0].int().tolist()": ([321, 43], [210, 432])})

def test_efficientnet_lite_is_cut_too():
    torch.manual_seed(0)
    lite = EfficientNetLiteConfig()
    for n in (-1, -2):
        print(f"up to stage {n}: {sum(p.numel() for p in build_vision_tower(lite, n).parameters()):,}")
    with Breakpoint(EfficientNetLiteModel.forward, "return Base", "[m.shape[1:] for m in maps]") as bp:
        build_vision_tower(lite)(torch.randn(1, 3, 128, 128))
    bp.expect({"len(maps)": 5, "maps[-1].shape": (1, 320, 4, 4)})

def test_training_mode_would_move_a_frozen_tower():
    torch.manual_seed(0)
    lite, image = build_vision_tower(EfficientNetLiteConfig()), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = patch_features(lite, image)
        for train in (EfficientNetLiteModel.train, nn.Module.train):  # its own, and PyTorch's
            train(lite)
            for _ in range(5): patch_features(lite, 2 + torch.randn(4, 3, 64, 64))
            moved = (patch_features(lite.eval(), image) - before).norm() / before.norm()
            print(f"{train.__qualname__}: features moved by more than half: {bool(moved > 0.5)}")
            test_eq(bool(moved > 0.5), train is nn.Module.train)

def test_selected_layers_are_counted_as_transformers_does():
    clip = CLIPVisionConfig(num_hidden_layers=24)
    convnext = ConvNextConfig(hidden_sizes=[8, 12, 16, 20])
    clip_depths = {n: tower_depth(clip, n) for n in (-1, -2, 0, 23)}
    convnext_depths = {n: tower_depth(convnext, n) for n in (-1, -2, 0)}
    test_eq([tower_depth(clip, n) for n in (-1, -2, -25, 0, 23, 24)], [24, 23, 0, 0, 23, 24])
    test_eq([tower_depth(convnext, n) for n in (-1, -2, -4, 0, 3)], [4, 3, 1, 1, 4])
    for config, wrong in ((clip, 25), (clip, -26), (convnext, 4), (convnext, -5)):
        with expect_fail(ConfigError, contains=f"select_layer {wrong} is none of a"):
            tower_depth(config, wrong)
    message = "no tower of model type 'gemma'; there are: clip_vision_model"
    with expect_fail(ConfigError, contains=message):
        tower_depth(AutoConfig.for_model("gemma"), -1)

def test_what_follows_the_features_is_not_kept():
    weights = lambda tower: sum(p.numel() for p in tower.parameters())
    for config in (clip_config, siglip_config, convnext_config):
        kept = {n: f"{weights(build_vision_tower(config, n)):,}" for n in (-1, -2, -3)}
        whole = weights(AutoModel.from_config(config))
    test_eq([len(build_vision_tower(clip_config, n).encoder.layers) for n in (-1, -2, 0)], [4, 3, 0])
    test_eq(
        [len(build_vision_tower(convnext_config, n).encoder.stages) for n in (-1, -2, 0)], [3, 2, 1]
    )
    names = [name for name, _ in build_vision_tower(siglip_config).named_parameters()]
    assert not any("head" in name or "post_layernorm" in name for name in names)
    names = [name for name, _ in build_vision_tower(convnext_config).named_parameters()]
    assert not any(name.startswith("layernorm") for name in names)

def test_dot_is_found_where_it_is():
    torch.manual_seed(0)
    gray, dot = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    dot[:, :, 8:16, 16:24] = 3
    with torch.no_grad():
        tower = build_vision_tower(clip_config, -2).eval()
        place = lambda features: divmod(int(features.norm(dim=-1)[0, :16].argmax()), 4)
        right = place(patch_features(tower, dot) - patch_features(tower, gray))
        wrong = place(tower(dot).last_hidden_state - tower(gray).last_hidden_state)
    test_eq((right, wrong), ((1, 2), (1, 3)))

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
                cut = same_weights(build_vision_tower(config, n), whole)
                assert torch.equal(patch_features(cut, pictures, n), tokens)
                assert tokens.shape == (2, 16, 16)

def test_stage_maps_are_convnexts_hidden_states():
    torch.manual_seed(0)
    # 44 is odd two halvings down: 22, 11, 5
    whole, pictures = ConvNextModel(convnext_config).eval(), torch.randn(2, 3, 44, 44)
    with torch.no_grad():
        states = whole(pictures, output_hidden_states=True).hidden_states
        maps = stage_maps(same_weights(build_vision_tower(convnext_config), whole), pictures)
        test_eq([tuple(m.shape) for m in maps], [(2, 8, 22, 22), (2, 12, 11, 11), (2, 16, 5, 5)])
        test_eq(len(states), 4)  # the input of the first stage, and each one's output
        for ours, theirs in zip(maps, states[1:]): assert torch.equal(ours, theirs)
        cut = same_weights(build_vision_tower(convnext_config, -2), whole)
        assert torch.equal(patch_features(cut, pictures, -2), states[2].flatten(2).transpose(1, 2))

def test_towers_of_bf16_take_float_pictures():
    torch.manual_seed(0)
    pictures = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for config in (clip_config, siglip_config, convnext_config):
            tower = build_vision_tower(config).eval()
            exact, half = patch_features(tower, pictures), patch_features(tower.bfloat16(), pictures)
            test_eq(half.dtype, torch.bfloat16)
            assert (half.float() - exact).norm() < 0.02 * exact.norm()

def test_resolutions_of_efficientnet_lite():
    lite = EfficientNetLiteConfig()
    test_eq(lite.hidden_sizes, [16, 24, 40, 112, 320])
    layout = dict(widths=(8, 8, 12), repeats=(1, 1, 1), kernels=(3, 3, 3), strides=(1, 1, 2))
    test_eq(AutoConfig.for_model("efficientnet_lite", **layout).hidden_sizes, [8, 12])
    test_eq(EfficientNetLiteConfig.from_dict(lite.to_dict()).to_dict(), lite.to_dict())

def test_odd_sides_are_padded_alike():
    def digits(conv, row):
        """The output for a single row of pixels of a kernel that weighs the three neighbors with 1,
    10, 100."""
        conv.weight.data.zero_()[0, 0, 1] = torch.tensor([1.0, 10, 100])
        pixels = torch.tensor(row, dtype=torch.float)[None, None, None].expand(1, 1, len(row), -1)
        return [int(x) for x in conv(pixels)[0, 0, 0]]

    ours = SamePadConv2d(1, 1, 3, 2, bias=False)
    symmetric = nn.Conv2d(1, 1, 3, 2, padding=1, bias=False)
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
    lite, cut = (
        build_vision_tower(EfficientNetLiteConfig()),
        build_vision_tower(EfficientNetLiteConfig(), -2),
    )
    whole, part = (sum(p.numel() for p in tower.parameters()) for tower in (lite, cut))
    # left out here: a convolution with its normalization, and a layer for 1,000 classes
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
    lite, picture = build_vision_tower(EfficientNetLiteConfig()), torch.randn(1, 3, 64, 64)

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
    test_eq(drift(lite, forced=False), 0)
    assert not build_vision_tower(EfficientNetLiteConfig()).training
    assert not any(part.training for part in lite.train().modules())
    assert drift(copy.deepcopy(lite), forced=True) > 0.5
