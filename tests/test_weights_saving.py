"Derived from nbs/10e_saving.ipynb by `make tests`; edit the notebook, not this file."
import re
from pathlib import Path
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from vlm_lit.core import ConfigError
from vlm_lit.files import read_json
from vlm_lit.files import write_json, write_text
from vlm_lit.models.vlm import VLM
from vlm_lit.models.config import VLMConfig
from vlm_lit.weights.language_models import LOAD_ERRORS, mismatched_names, quiet, read_state, format_names, raise_misfit, weights_of
from vlm_lit.weights.presets import PARTS, is_scratch
from vlm_lit.weights.interchange import save_projector, shards
import sys
import tempfile
from fastcore.test import test_eq, expect_fail
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.weights.build import build_model
from vlm_lit.weights.presets import load_preset, make_model, preset_config
from vlm_lit.weights.interchange import load_projector
from small_parts import MGM, mgm_models, mgm_parts, picture_rows, same, small_tokenizer
from vlm_lit.weights.saving import export_model
from vlm_lit.weights.saving import load_model
from vlm_lit.weights.saving import load_weights
from vlm_lit.weights.saving import mgm_config
from vlm_lit.weights.saving import model_card
from vlm_lit.weights.saving import save_model

def setup_module():
    global LLAVA_7B, MGM_2B, SMOL, small_tok, tiny, tok
    sys.path[:0] = ["../tests", "tests"]
    tok, small_tok = load_tokenizer("gemma"), small_tokenizer()
    SMOL = load_preset("smol")
    def tiny(seed=0, **overrides):
        return make_model(preset_config("tiny", small_tok, **overrides), seed)
    MGM_2B, LLAVA_7B = mgm_models()

def test_model_comes_back_from_disk_bit_for_bit():
    with mgm_parts(): half = build_model("mgm-2b", dtype=torch.bfloat16, **MGM)
    for model in (tiny(), MGM_2B, LLAVA_7B, half):
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, folder)
            again = load_model(folder)
            with quiet(): plain = AutoModelForCausalLM.from_pretrained(folder)
            names = sorted(p.name for p in Path(folder).iterdir())
            test_eq(names[:2], ["README.md", "config.json"])
            test_eq(names[2:], ["generation_config.json", "model.safetensors"])
            assert load_file(Path(folder) / "model.safetensors").keys() == weights_of(model).keys()
            assert "/tmp" not in (Path(folder) / "config.json").read_text()
        assert same(again, model)
        assert [p.dtype for p in again.parameters()] == [p.dtype for p in model.parameters()]
        assert type(plain) is VLM and (model is half or same(plain, model))
        skip = {"dtype", "_name_or_path", "architectures", "transformers_version"}

        def plain_config(m):
            kept = {k for k in m.config.to_dict() if not k.endswith("_config")} - skip
            return {k: v for k, v in m.config.to_dict().items() if k in kept}

        test_eq(plain_config(again), plain_config(model))
        test_eq(again.config.aux_stages, model.config.aux_stages)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        test_eq(again.get_output_embeddings().weight is again.get_input_embeddings().weight, tied)
        # weights are equal to the bit (above); sums depend on where in memory they lie
        rows, wanted = picture_rows(again), picture_rows(model)
        assert (rows - wanted).norm() < (1e-5 if model.dtype == torch.float32 else 0.02) * wanted.norm()
    with tempfile.TemporaryDirectory() as folder:
        save_model(MGM_2B, folder, max_shard_size="40KB")
        assert len(list(Path(folder).glob("model-*.safetensors"))) > 1
        assert (Path(folder) / "model.safetensors.index.json").is_file()
        assert same(load_model(folder), MGM_2B)

def test_half_a_model_is_refused():
    model = tiny()
    with tempfile.TemporaryDirectory() as folder:
        with expect_fail(ConfigError, contains="config.json is missing"):
            load_model(folder)
        save_model(model, folder)
        path, weights = Path(folder) / "model.safetensors", weights_of(model)
        save_file({n: weights[n] for n in list(weights)[::2]}, path, metadata={"format": "pt"})
        with expect_fail(ConfigError, contains="model.safetensors does not fit the model: missing"):
            load_weights(model, path)
        with expect_fail(ConfigError, contains="does not fit the model: missing"):
            load_model(folder)
        save_file({**weights, "more": torch.ones(1)}, path, metadata={"format": "pt"})
        with expect_fail(ConfigError, contains="unexpected 1 (more)"):
            load_model(folder)
        name = "image_encoder.mm_projector.0.bias"
        save_file({**weights, name: torch.ones(3)}, path, metadata={"format": "pt"})
        with expect_fail(ConfigError, contains=f"wrong shape 1 ({name})"):
            load_model(folder)
        with expect_fail(ConfigError, contains=f"wrong shape 1 ({name} (3,) for (128,))"):
            load_weights(model, path)
        path.write_bytes(b"not weights")
        with expect_fail(ConfigError, contains="cannot read weights"):
            load_model(folder)
        path.unlink()
        with expect_fail(ConfigError, contains="no weights in"): load_model(folder)
        save_file(weights, path, metadata={"format": "pt"})
        (Path(folder) / "optimizer.pt").write_bytes(b"")
        message = "holds pickles, which can run code when opened: 1 (optimizer.pt)"
        with expect_fail(ConfigError, contains=message): load_model(folder)
        for text, words in [("{", "cannot read"), ('{"a": 1}', "is not the configuration of a model")]:
            (Path(folder) / "config.json").write_text(text)
            with expect_fail(ConfigError, contains=words): load_model(folder)

def test_exports_are_read_again():
    with tempfile.TemporaryDirectory() as folder:
        export_model(MGM_2B, Path(folder) / "hf", "hf")
        card = (Path(folder) / "hf/README.md").read_text()
        assert same(load_model(Path(folder) / "hf"), MGM_2B)
        head = "license: gemma\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags:\n"
        assert card.startswith("---\n" + head)
        assert "- google/gemma-2b-it" in card
        export_model(MGM_2B, Path(folder) / "mgm", "mgm")
        with mgm_parts(): fresh = build_model("mgm-2b", seed=9, **MGM)
        assert load_projector(fresh, Path(folder) / "mgm/mm_projector.bin").fits
        torch.testing.assert_close(picture_rows(fresh), picture_rows(MGM_2B), atol=1e-5, rtol=1e-5)
        config = read_json(Path(folder) / "mgm/config.json")
        test_eq((config["model_type"], config["hidden_size"]), ("mgm_gemma", 32))
        test_eq((config["mm_hidden_size"], config["mm_hidden_size_aux"]), (32, 54))
        test_eq(config["mm_vision_select_layer"], -2)
        llava = mgm_config(LLAVA_7B.config)
        assert not {"mm_vision_tower_aux", "image_size_aux"} & llava.keys()
        assert llava["architectures"] == ["LlavaLlamaForCausalLM"]
        assert "from scratch" in model_card(tiny()) and "base_model" not in model_card(tiny())
        with expect_fail(ConfigError, contains="cannot export to 'onnx'; there are: hf, mgm, llava"):
            export_model(MGM_2B, folder, "onnx")
        with expect_fail(ConfigError, contains="use export_llava_hf(model, processor, folder)"):
            export_model(MGM_2B, folder, "llava-hf")
        with expect_fail(ConfigError, contains="no high-resolution tower with mining; use --to mgm"):
            export_model(MGM_2B, folder, "llava")
        export_model(LLAVA_7B, Path(folder) / "llava", "llava")
        test_eq(read_json(Path(folder) / "llava/config.json")["model_type"], "llava_llama")
        assert load_projector(LLAVA_7B, Path(folder) / "llava/mm_projector.bin").fits
        with expect_fail(ConfigError, contains="is not the configuration of a model of this project"):
            load_model(Path(folder) / "mgm")
