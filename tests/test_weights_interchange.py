"Derived from nbs/10d_interchange.ipynb by `make tests`; edit the notebook, not this file."
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
import torch
from safetensors.torch import save_file
from vlm_lit.core import ConfigError
from vlm_lit.files import read_json
from vlm_lit.files import write_file
from vlm_lit.models.vlm import VLM
from vlm_lit.models.image_encoder import last_linear
from vlm_lit.weights.towers import CONVNEXT_NAMES, translated
from vlm_lit.weights.language_models import read_state, format_names, weights_of
import sys
import tempfile
import textwrap
from fastcore.test import test_eq, expect_fail
from transformers import GemmaConfig
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import finish_images
from torch import nn
from transformers import AutoModelForCausalLM
from vlm_lit.files import write_json
from vlm_lit.models.config import sub_config
from vlm_lit.weights.build import build_model
from small_parts import MGM, TINY_TEXT, mgm_file, mgm_models, mgm_parts, picture_rows, save_as_mgm
from vlm_lit.weights.interchange import fill_tensors
from vlm_lit.weights.interchange import gemma_embedding_scale
from vlm_lit.weights.interchange import load_mgm
from vlm_lit.weights.interchange import load_projector
from vlm_lit.weights.interchange import mgm_name
from vlm_lit.weights.interchange import projector_tensors
from vlm_lit.weights.interchange import save_projector

def setup_module():
    global LLAVA_7B, MGM_2B
    sys.path[:0] = ["../tests", "tests"]
    MGM_2B, LLAVA_7B = mgm_models()

def test_only_the_last_layer_takes_the_factor():
    watch = "n factor want[n].std() state[n].std()"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mm_projector.bin"
        mgm_file(path, MGM_2B)
        with Breakpoint(fill_tensors, at="want[n].copy_(", watch=watch, when="times_factor") as bp:
            load_projector(MGM_2B, path)
    bp.expect_each(n=["mm_projector.2.weight", "mm_projector.2.bias"], factor=[32**0.5] * 2)

def test_without_the_factor_image_tokens_are_too_small():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mm_projector.bin"
        mgm_file(path, MGM_2B)
        load_projector(MGM_2B, path)
        right, watch = picture_rows(MGM_2B).std(), "factor len(matched)"
        once, change = lambda found: "n" not in found, {"factor": 1.0}
        with Breakpoint(fill_tensors, "for n in matched", watch, when=once, set=change) as bp:
            load_projector(MGM_2B, path)
        wrong = picture_rows(MGM_2B).std()
        load_projector(MGM_2B, path)
    print(f"standard deviation of image tokens: {right:.3g} with the factor, {wrong:.3g} without")
    torch.testing.assert_close(right / wrong, torch.tensor(32**0.5))
    bp.expect_changed(factor=(32**0.5, 1.0))

def test_a_name_of_mgm_becomes_ours():
    at, layer = 'return "image_encoder.vision_tower_aux."', "encoder.stages.1.layers.0"
    with Breakpoint(mgm_name, at=at, watch="inside theirs") as bp:
        mgm_name("model.vision_tower_aux.vision_stages.1.blocks.0.gamma")
    bp.expect(theirs="stages.1.blocks.0.gamma")
    bp.expect_return(result=f"image_encoder.vision_tower_aux.{layer}.layer_scale_parameter")

def test_factor_is_that_of_transformers_4():
    kinds = ("gemma", "gemma2", "llama", "qwen2", "gemma3_text")
    factors = [gemma_embedding_scale(sub_config(dict(hidden_size=2048), kind)) for kind in kinds]
    test_eq(factors, [2048**0.5, 2048**0.5, 1, 1, 1])
    # transformers 5: the table scales text, and the model leaves image tokens as they are
    model = AutoModelForCausalLM.from_config(GemmaConfig(**TINY_TEXT))
    words, raw = model.get_input_embeddings()(torch.tensor([5])), model.get_input_embeddings().weight[5]
    torch.testing.assert_close(words[0], raw * gemma_embedding_scale(model.config))
    seen = []
    note = lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"])
    hook = model.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    rows = torch.randn(1, 3, 32)
    model(inputs_embeds=rows)
    hook.remove()
    torch.testing.assert_close(seen[0], rows)

def test_projector_files_load_with_any_prefix():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mm_projector.bin"
        prefixes = ["", "model.", "base_model.model.model.", "module.model.", "module."]
        for seed, prefix in enumerate(prefixes):
            for model in (MGM_2B, LLAVA_7B):
                state = mgm_file(path, model, prefix, seed)
                report = load_projector(model, path)
                assert report.fits
                assert len(report.matched) == len(state) == len(projector_tensors(model))
                last = {f"mm_projector.2.{n}" for n in ("weight", "bias")}
                for name, tensor in projector_tensors(model).items():
                    factor = 32**0.5 if model is MGM_2B and name in last else 1.0
                    want = (state[name].double() * factor).float()
                    torch.testing.assert_close(tensor.detach(), want, atol=0, rtol=0)
                test_eq(report.factor, 32**0.5 if model is MGM_2B else 1.0)
        test_eq(set(report.by_part()), {"mm_projector"})
        save_file({f"model.{n}": t for n, t in state.items()}, path.with_suffix(".safetensors"))
        assert load_projector(LLAVA_7B, path.with_suffix(".safetensors")).fits
        torch.save({"model": {n.removeprefix("mm_projector."): t for n, t in state.items()}}, path)
        assert load_projector(LLAVA_7B, path).fits
        names = ("model.mm_projector.0.bias", "mm_projector.0.bias")
        torch.save({name: torch.ones(32) for name in names}, path)
        with expect_fail(ConfigError, contains="holds mm_projector.0.bias twice"):
            load_projector(LLAVA_7B, path)

def test_rows_of_a_loaded_projector_are_mgms_times_the_factor():
    with tempfile.TemporaryDirectory() as folder:
        state = mgm_file(Path(folder) / "mm_projector.bin", MGM_2B)
        load_projector(MGM_2B, Path(folder) / "mm_projector.bin")
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    finished = finish_images(pixels, 28, MGM_2B.config.image_mean, MGM_2B.config.image_std)
    with torch.no_grad():
        features = MGM_2B.image_encoder.features(finished["pixel_values"], finished["pixel_values_aux"])
        names = ("0.weight", "0.bias", "2.weight", "2.bias")
        layers = [state[f"mm_projector.{n}"].float() for n in names]
        # MGM's own
        inside = nn.functional.gelu(nn.functional.linear(features, *layers[:2]))
        rows = nn.functional.linear(inside, *layers[2:])
        got = MGM_2B.encode_images(None, pixels)
        torch.testing.assert_close(got, rows * 32**0.5, atol=1e-4, rtol=1e-5)

def test_projector_files_that_do_not_fit_are_reported():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mm_projector.bin"
        before = {n: t.clone() for n, t in projector_tensors(MGM_2B).items()}
        state = mgm_file(path, MGM_2B, seed=7)
        del state["vlm_uni_val_projector.1.bias"]
        wrong = {"mm_projector.0.bias": torch.zeros(3), "model.image_newline": torch.zeros(3)}
        torch.save({**state, **wrong, "model.vision_tower.vision_tower.x": torch.zeros(1)}, path)
        with expect_fail(ConfigError, contains="does not fit the model; pass strict=False"):
            load_projector(MGM_2B, path)
        assert all(torch.equal(t, before[n]) for n, t in projector_tensors(MGM_2B).items())
        report = load_projector(MGM_2B, path, strict=False)
        test_eq(report.missing, ("vlm_uni_val_projector.1.bias",))
        test_eq(report.unexpected, ("model.image_newline",))
        test_eq(report.mismatched, ("mm_projector.0.bias (3,) for (32,)",))
        test_eq(report.left_out, ("model.vision_tower.vision_tower.x",))
        test_eq(report.by_part()["vlm_uni_val_projector"], Counter(matched=3, missing=1))
        assert "1 missing" in str(report) and "image_newline" in str(report) and not report.fits
        name = "mm_projector.0.weight"
        got = projector_tensors(MGM_2B)[name].detach()
        torch.testing.assert_close(got, state[name].float())
        mgm_file(path, LLAVA_7B)
        with expect_fail(ConfigError, contains="vlm_uni_query_projector 4 missing"):
            load_projector(MGM_2B, path)
        mgm_file(path, MGM_2B)
        with expect_fail(ConfigError, contains="4 unexpected"):
            load_projector(LLAVA_7B, path)

def test_projector_files_go_out_as_they_came_in():
    with tempfile.TemporaryDirectory() as folder:
        came, went = Path(folder) / "came.bin", Path(folder) / "mm_projector.bin"
        for model in (MGM_2B, LLAVA_7B):
            mgm_file(came, model)
            load_projector(model, came)
            save_projector(model, went, dtype=torch.bfloat16)
            a, b = read_state(came), read_state(went)
            assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
            assert not list(Path(folder).glob("*.part"))
            rows = picture_rows(model)
            for name in ("mm_projector.bin", "mm_projector.safetensors"):
                save_projector(model, Path(folder) / name)  # float32
                load_projector(model, Path(folder) / name)
                torch.testing.assert_close(picture_rows(model), rows, atol=1e-6, rtol=1e-6)
        torch.manual_seed(3)
        for p in LLAVA_7B.image_encoder.mm_projector.parameters(): p.data.normal_()
        save_projector(LLAVA_7B, went)
        want = projector_tensors(LLAVA_7B)
        assert all(torch.equal(read_state(went)[f"model.{n}"], t) for n, t in want.items())

def test_whole_checkpoints_of_mgm_load():
    with mgm_parts():
        a, b = build_model("mgm-2b", seed=1, **MGM), build_model("mgm-2b", seed=2, **MGM)
    for p in b.language_model.parameters(): p.data.normal_()
    aux = [p.clone() for p in b.image_encoder.vision_tower_aux.parameters()]
    with tempfile.TemporaryDirectory() as folder:
        save_as_mgm(a, folder)
        report = load_mgm(b, folder)
        assert report.fits
        # not in the checkpoint, so kept
        assert all(map(torch.equal, aux, b.image_encoder.vision_tower_aux.parameters()))
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, msg=name)
        test_eq(
            mgm_name("model.vision_tower_aux.vision_stages.1.blocks.0.gamma"),
            "image_encoder.vision_tower_aux.encoder.stages.1.layers.0.layer_scale_parameter",
        )
        path = Path(folder) / "model.safetensors.index.json"
        index = read_json(path)["weight_map"]
        frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
        stray = {"model.stray": torch.ones(1), frequencies: torch.ones(8)}
        save_file(stray, Path(folder) / "more.safetensors")
        write_json(path, {"weight_map": {**index, "model.stray": "more.safetensors"}})
        more = load_mgm(b, folder, strict=False)
        test_eq(more.unexpected, ("language_model.model.stray",))
        test_eq(more.left_out, (f"language_model.{frequencies}",))
        half = {k: v for k, v in index.items() if v.startswith("model-00001")}
        write_json(path, {"weight_map": half})
        with expect_fail(ConfigError, contains="does not fit the model"):
            load_mgm(b, folder)
        write_json(path, {"weight_map": {**index, "x": "../elsewhere.safetensors"}})
        with expect_fail(ConfigError, contains="names files that are not there"):
            load_mgm(b, folder)
    with tempfile.TemporaryDirectory() as folder:
        with expect_fail(ConfigError, contains="neither model.safetensors nor pytorch_model.bin"):
            load_mgm(b, folder)
