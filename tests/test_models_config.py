"Derived from nbs/09_config.ipynb by `make tests`; edit the notebook, not this file."
import copy
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from vlm_lit.core import ConfigError, nearest
from vlm_lit.models.towers import VIT_MODEL_TYPES, CONV_MODEL_TYPES
from vlm_lit.debug.breakpoints import Breakpoint
from fastcore.test import test_eq, expect_fail
from transformers.utils.logging import disable_progress_bar
import torch
from vlm_lit.models.config import VLMConfig

def setup_module():
    global SMALL_TEXT, SPECIAL_IDS, small_config
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

def test_windows_of_mgm_2b():
    convnext = dict(hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3])
    watch = ["self.grid", "self.grid_aux", "self.num_image_tokens", "self.vision_size_aux"]
    with Breakpoint(VLMConfig.check, at="if self.grid_aux %", watch=watch) as bp:
        VLMConfig(text_config=dict(model_type="gemma"), vision_aux_config=convnext)
    bp.expect({"self.image_size": 336, "self.patch_size": 14, "self.grid": 24, "self.grid_aux": 192})
    bp.expect({"self.num_image_tokens": 576, "self.vision_size_aux": 192 + 384 + 768 + 1536})
    bp.expect({"self.grid_aux // self.grid": 8})

def test_answers_of_the_exercises():
    test_eq(small_config(image_size_aux=72).grid_aux, 36)
    with expect_fail(ConfigError, contains="18"):
        small_config(image_size_aux=72, aux_stages=[1])
    test_eq(small_config(image_size_aux=80, aux_stages=[1]).grid_aux, 20)

def test_geometry_of_the_configuration():
    cfg = small_config()
    test_eq((cfg.grid, cfg.num_image_tokens, cfg.grid_aux), (4, 16, 32))
    test_eq((cfg.vision_size, cfg.vision_size_aux, cfg.vocab_size), (16, 20, 300))
    test_eq((cfg.image_token_id, small_config(image_token_id=7).image_token_id), (300, 7))
    test_eq(small_config(aux_stages=[-1]).grid_aux, 16)  # the last stage alone
    mgm = dict(
        text_config=dict(model_type="gemma"),
        vision_aux_config=dict(hidden_sizes=[192, 384, 768, 1536], depths=[3, 3, 27, 3]),
    )
    cfg = VLMConfig(**mgm)
    test_eq((cfg.num_image_tokens, cfg.grid_aux, cfg.vision_size_aux), (576, 192, 2880))
    # MGM-HD: four crops and the whole
    hd = VLMConfig(**mgm, image_grid=2, image_global=True, image_size_aux=1536)
    test_eq((hd.num_image_tokens, hd.grid_aux), (2880, 384))
    test_eq(VLMConfig.from_dict(hd.to_dict()).to_dict(), hd.to_dict())
    # LLaVA reads its small picture as it is
    test_eq((VLMConfig().image_size_aux, VLMConfig(image_grid=2).image_size_aux), (336, 672))
    with expect_fail(ConfigError, contains="not a multiple of patch_size"):
        small_config(image_size=30)
    with expect_fail(ConfigError, contains="cannot be shared by"):
        small_config(image_size_aux=70)
    test_eq(small_config(aux_stages=[-1, 0]).aux_stages, [0, 1])
    with expect_fail(ConfigError, contains="there is no stage 2"):
        small_config(aux_stages=[2])
    with expect_fail(ConfigError, contains="has no stages to mine"):
        small_config(vision_aux_config=dict(model_type="siglip_vision_model"))
    with expect_fail(ConfigError, contains="image_size_aux 65 is not a multiple of 2, the pixels"):
        small_config(image_size_aux=65)
    lite = dict(model_type="efficientnet_lite")
    with expect_fail(ConfigError, contains="image_size_aux 65 is not a multiple of 2, the pixels"):
        small_config(image_size_aux=65, vision_aux_config=lite)
    with expect_fail(ConfigError, contains="at least 2 with image_global"):
        small_config(image_global=True)
    with expect_fail(ConfigError, contains="the low-resolution tower reads 336 pixels"):
        VLMConfig(image_size=224)

def test_parts_that_are_none_are_refused():
    for part in ("text_config", "vision_config", "vision_aux_config"):
        for value in ([1], "gemma", 3, True):
            with expect_fail(ConfigError, contains="keys and values"):
                small_config(**{part: value})
        with expect_fail(ConfigError, contains="unknown model type 'nothing_such'"):
            small_config(**{part: dict(model_type="nothing_such")})
    with expect_fail(ConfigError, contains="did you mean 'gemma'?"):
        small_config(text_config=dict(model_type="gema"))
    for name in ("image_size", "image_size_aux", "image_grid"):
        for value in (0, -1, 2.5, "32", float("nan"), True):
            with expect_fail(ConfigError, contains=name):
                small_config(**{name: value})
    with expect_fail(ConfigError, contains="vision_config.patch_size must be"):
        small_config(vision_config=dict(patch_size=0))
