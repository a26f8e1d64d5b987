"Derived from nbs/10_presets.ipynb by `make tests`; edit the notebook, not this file."
import math
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
import torch
from torch import nn
from vlm_lit.core import ConfigError, nearest
from vlm_lit.files import read_json
from vlm_lit.models.vlm import VLM
from vlm_lit.models.config import VLMConfig
import sys
import tempfile
import textwrap
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.files import write_json
from vlm_lit.text.tokenizer import load_tokenizer
from small_parts import same, small_tokenizer
from vlm_lit.weights.presets import channel_statistics
from vlm_lit.weights.presets import check_preset
from vlm_lit.weights.presets import init_position_embeddings
from vlm_lit.weights.presets import load_preset
from vlm_lit.weights.presets import make_model
from vlm_lit.weights.presets import preset_config
from vlm_lit.weights.presets import preset_names
from vlm_lit.weights.presets import preset_settings
from vlm_lit.weights.presets import scratch_text_config
from vlm_lit.weights.presets import seeded

def setup_module():
    global SMOL, small_tok, tiny, tok
    sys.path[:0] = ["../tests", "tests"]
    tok, small_tok = load_tokenizer("gemma"), small_tokenizer()
    SMOL = load_preset("smol")
    def tiny(seed=0, **overrides):
        return make_model(preset_config("tiny", small_tok, **overrides), seed)

def test_a_misspelt_field_is_not_a_default():
    misspelt = {**load_preset("tiny"), "image_sise": 64}
    with Breakpoint(check_preset, at="if unknown or missing", watch="unknown missing name") as bp:
        with expect_fail(ConfigError, contains="unknown ['image_sise'], missing []"):
            check_preset(misspelt, "own")
    bp.expect(unknown=["image_sise"], missing=[])

def test_vocabulary_is_the_tokenizers():
    stops = []
    for tokenizer in (small_tok, tok):
        with Breakpoint(scratch_text_config, at="return {**settings", watch="rows ids") as bp:
            preset_config("tiny", tokenizer)
        stops.append(bp)
    stops[0].diff(stops[1], titles=("own texts", "Gemma")).expect(rows=(296, 256_000))

def test_position_embeddings_start_as_large_as_the_patches():
    weight = "embeddings.position_embedding.weight.std()"
    at = "nn.init.normal_(embeddings.position_embedding"
    with Breakpoint(init_position_embeddings, at=at, watch=weight) as bp:
        model = make_model(preset_config("tiny", small_tok))
    bp.expect({weight: 0.02}, tolerance=5e-3, hits=1)
    bp.expect_after({weight: 1.0}, tolerance=0.1)

def test_position_is_lost_in_the_default_initialization():
    config = preset_config("tiny", small_tok)
    with seeded(0): default = VLM(config)
    share = {}
    for name, made in (("ours", make_model(config)), ("transformers' default", default)):
        embeddings = made.image_encoder.vision_tower.embeddings
        patches = embeddings.patch_embedding(torch.randn(64, 3, 32, 32)).var().item()
        positions = embeddings.position_embedding.weight.var().item()
        share[name] = positions / (patches + positions)
        print(f"{name:22} share of the position: {share[name]:.3f}")
    width = config.text_config.hidden_size
    print(f"decoder: {width} ** -0.5 = {width**-0.5:.3f}; 0.02 is for {0.02**-2:,.0f} columns")
    assert 0.4 < share["ours"] < 0.6 and share["transformers' default"] < 0.01
    test_close(config.text_config.initializer_range, width**-0.5, eps=1e-6)

def test_answers_of_the_exercises():
    whole, one = tiny(), tiny(vision_tower_aux=None)
    test_eq((whole.config.num_image_tokens, one.config.num_image_tokens), (16, 16))
    weights = lambda part: sum(p.numel() for p in part.parameters())
    for name in ("vision_tower", "mm_projector"):
        test_eq(*(weights(getattr(model.image_encoder, name)) for model in (one, whole)))
    test_eq(weights(one.language_model), weights(whole.language_model))
    assert one.image_encoder.vision_tower_aux is None and one.image_encoder.mining is None

def test_presets_are_files():
    test_eq(set(preset_names()), {"tiny", "smol", "gemma3-270m", "mgm-2b", "llava-7b"})
    for name in preset_names(): load_preset(name)
    message = "unknown preset 'huge'; there are: gemma3-270m, llava-7b, mgm-2b, smol, tiny"
    with expect_fail(ConfigError, contains=message): load_preset("huge")
    with tempfile.TemporaryDirectory() as folder:
        path, known = Path(folder) / "own.json", load_preset("tiny")
        write_json(path, {**known, "image_size": 64})
        test_eq(load_preset(path)["image_size"], 64)
        for change, words in [
            ({"image_sise": 3}, "unknown ['image_sise'], missing []"),
            ({"image_size": "big"}, "image_size cannot be 'big'"),
            ({"image_grid": True}, "image_grid cannot be True"),
            ({"language_model": {"hub": "x"}}, "language_model: a source is a name"),
            ({"image_aspect_ratio": "wide"}, "must be 'square' or 'pad'"),
            ({"image_sise": 3}, "did you mean 'image_size'?"),
            ({"image_size": 0}, "image_size must be at least 1, got 0"),
            ({"image_grid": -1}, "image_grid must be at least 1, got -1"),
            ({"aux_stages": ["1"]}, "aux_stages must be whole numbers"),
            ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean must be three finite numbers"),
            ({"image_mean": [0.5]}, "image_mean must be three finite numbers"),
            ({"image_std": [0.5, 0, 0.5]}, "image_std must be three finite numbers"),
            ({"language_model": {"config": [1]}}, "language_model: config cannot be [1]"),
            ({"tokenizer": {"package": 3, "file": "a", "install": "b"}}, "package cannot be 3"),
        ]:
            write_json(path, {**known, **change})
            with expect_fail(ConfigError, contains=words): load_preset(path)
        write_json(path, {k: v for k, v in known.items() if k != "template"})
        with expect_fail(ConfigError, contains="missing ['template']"):
            load_preset(path)
        path.write_text("{")
        with expect_fail(ConfigError, contains="cannot read"): load_preset(path)

def test_statistics_are_those_of_the_images():
    black = torch.zeros(3, 2, 2, dtype=torch.uint8)
    white = torch.full((3, 2, 2), 255, dtype=torch.uint8)
    mean, std = channel_statistics([black, white])
    test_eq(mean, (0.5, 0.5, 0.5))
    test_close(torch.tensor(std), torch.full((3,), (8 * 0.25 / 7) ** 0.5), eps=1e-4)

def test_a_replaced_part_brings_its_own_license():
    license = lambda *args, **kw: preset_settings(*args, **kw)["license"]
    test_eq(license("smol", image_size=64), "apache-2.0")
    test_eq(license("smol", language_model={"config": {"model_type": "gemma"}}), "apache-2.0")
    test_eq(license("smol", language_model="google/gemma-2b-it"), "other")
    test_eq(license("smol", language_model="google/gemma-2b-it", license="gemma"), "gemma")
    test_eq(license("mgm-2b", vision_tower_aux=None), "gemma")

def test_tiny_is_small_and_starts_the_same_for_a_seed():
    a = tiny(0)
    b = tiny(0)
    c = tiny(1)
    cfg = a.config
    test_eq((cfg.num_image_tokens, cfg.image_size, cfg.image_size_aux), (16, 32, 64))
    test_eq((cfg.aux_stages, cfg.vocab_size), ([1], len(small_tok)))
    assert same(a, b) and not same(a, c)
    assert 900_000 < sum(p.numel() for p in a.parameters()) < 1_300_000
    state = torch.get_rng_state()
    tiny()
    assert torch.equal(state, torch.get_rng_state())
    places = a.image_encoder.vision_tower.embeddings.position_embedding.weight
    test_eq(round(places.std().item(), 1), 1.0)
    with expect_fail(ConfigError, contains="from scratch brings no tokenizer; give"):
        preset_config("tiny")
    with expect_fail(ConfigError, contains="unknown ['imagesize']"):
        preset_config("tiny", small_tok, imagesize=3)
    with expect_fail(ConfigError, contains="language_model comes with its own configuration"):
        preset_config("mgm-2b")
