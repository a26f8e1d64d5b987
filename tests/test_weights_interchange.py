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
from vlm_lit.weights.language_models import read_state, some, weights_of
import os, tempfile
import pytest
from fastcore.test import test_eq, expect_fail
from transformers import CLIPConfig, CLIPModel, GemmaConfig, LlamaConfig
from vlm_lit.images import finish_images
import importlib.util, io, struct
from contextlib import contextmanager, redirect_stderr
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from vlm_lit.files import write_json
from vlm_lit.models.config import sub_config
from vlm_lit.weights.build import build_model
from vlm_lit.weights.language_models import quiet
import transformers.modeling_gguf_pytorch_utils as conversion
from vlm_lit.weights.interchange import *

def setup_module():
    global GOLDEN, LLAVA_7B, MAPS, MGM, MGM_2B, OPEN_CLIP, RECORDED, TEXT_TOWER, TINY_TEXT, TINY_VISION, fake_hub, gguf_words, hub_cache, hushed, mgm_file, mgm_hub, mgm_parts, needs, own_cache, own_cache_folder, picture_rows, same, save_as_mgm, save_clip, save_open_clip, write_gguf
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
    def mgm_hub():
        "MGM-2B's and LLaVA-7B's parts in tiny, by their hub names."
        torch.manual_seed(0)
        with fake_hub() as put, quiet(), hushed():
            gemma = AutoModelForCausalLM.from_config(GemmaConfig(**TINY_TEXT))
            put("google/gemma-2b-it", gemma.save_pretrained)
            config = LlamaConfig(**TINY_TEXT, tie_word_embeddings=False)
            put("lmsys/vicuna-7b-v1.5", AutoModelForCausalLM.from_config(config).save_pretrained)
            put("openai/clip-vit-large-patch14-336", save_clip)
            put("laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup", save_open_clip)
            yield
    mgm_parts = contextmanager(mgm_hub)
    MGM = dict(image_size=28, image_size_aux=64)
    def picture_rows(model, n=2, seed=0):
        "Rows of the same random pictures; half precision as in training, under autocast."
        side, rng = model.config.image_size_aux, torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=rng)
        half = model.dtype != torch.float32
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model.encode_images(None, pixels, model.embed(torch.tensor([[1]])))
    def gguf_words(path, n):
        """The first tokens of a GGUF file, read off its header; transformers would take half a minute
    for the whole."""
        sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
        with path.open("rb") as file:

            def number(kind):
                return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

            def skip(kind, n=1):
                if kind in sizes: return file.seek(sizes[kind] * n, 1)
                for _ in range(n):
                    file.seek(number("Q"), 1) if kind == 8 else skip(number("I"), number("Q"))

            assert file.read(8) == b"GGUF\x03\x00\x00\x00"
            number("Q")
            for _ in range(number("Q")):
                name, kind = file.read(number("Q")), number("I")
                if name == b"tokenizer.ggml.tokens":
                    number("I"), number("Q")
                    return [file.read(number("Q")).decode() for _ in range(n)]
                skip(kind)
    def mgm_file(path, model, prefix="model.", seed=1, **more):
        "A projector file with random numbers, in bf16 as MGM's are."
        torch.manual_seed(seed)
        shapes = {n: t.shape for n, t in projector_tensors(model).items()}
        state = {prefix + n: torch.randn(shape).bfloat16() for n, shape in shapes.items()}
        torch.save({**state, **more}, path)
        return {n.removeprefix(prefix): t for n, t in state.items()}
    def save_as_mgm(model, folder):
        "A checkpoint as MGM publishes it, in two shards, with an index."
        factor, out = mgm_factor(model.config.text_config), {}
        for name, tensor in weights_of(model).items():
            if name.startswith("language_model."):
                out[name.removeprefix("language_model.")] = tensor
            elif ".vision_tower." in name:
                inside = name.split("vision_tower.")[1]
                out["model.vision_tower.vision_tower.vision_model." + inside] = tensor
            elif "mm_projector" in name:
                own = tensor / factor if "mm_projector.2" in name else tensor
                out["model." + name.removeprefix("image_encoder.")] = own
            elif ".mining." in name:
                out["model." + name.split("mining.")[1]] = tensor
        names, index = list(out), {}
        for n, part in enumerate((names[::2], names[1::2])):
            file = f"model-0000{n + 1}-of-00002.safetensors"
            save_file({k: out[k].clone() for k in part}, Path(folder) / file)
            index |= {k: file for k in part}
        write_json(Path(folder) / "model.safetensors.index.json", {"weight_map": index})
    with mgm_parts():
        MGM_2B, LLAVA_7B = build_model("mgm-2b", **MGM), build_model("llava-7b", **MGM)

def test_factor_is_that_of_transformers_4():
    kinds = ("gemma", "gemma2", "llama", "qwen2", "gemma3_text")
    factors = [mgm_factor(sub_config(dict(hidden_size=2048), kind)) for kind in kinds]
    test_eq(factors, [2048**0.5, 2048**0.5, 1, 1, 1])
    # today: the table scales words, and the model leaves rows alone
    model = AutoModelForCausalLM.from_config(GemmaConfig(**TINY_TEXT))
    words, raw = model.get_input_embeddings()(torch.tensor([5])), model.get_input_embeddings().weight[5]
    torch.testing.assert_close(words[0], raw * mgm_factor(model.config))
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
        features = MGM_2B.image_encoder.features(finished["images"], finished["images_aux"])
        names = ("0.weight", "0.bias", "2.weight", "2.bias")
        layers = [state[f"mm_projector.{n}"].float() for n in names]
        # MGM's own
        inside = nn.functional.gelu(nn.functional.linear(features, *layers[:2]))
        rows = nn.functional.linear(inside, *layers[2:])
        got = MGM_2B.encode_images(None, pixels, rows)
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
        test_eq(report.wrong, ("mm_projector.0.bias (3,) for (32,)",))
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
