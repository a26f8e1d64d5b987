"Derived from nbs/10g_gguf.ipynb by `make tests`; edit the notebook, not this file."
import json, re
from pathlib import Path
import torch
from torch import nn
from vlm_lit.core import ConfigError
from vlm_lit.models.towers import tower_depth
from vlm_lit.models.vlm import VLM
from vlm_lit.processor import VLMProcessor
from vlm_lit.text.tokenizer import adds_bos, control_tokens
from vlm_lit.weights.interchange import gemma_embedding_scale
from vlm_lit.weights.language_models import print_status, weights_of
from vlm_lit.weights.llava_hf import check_plain_llava
import copy
import sys
import tempfile
import numpy as np
from fastcore.test import test_eq, expect_fail
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, GemmaConfig
from transformers import LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.models.config import VLMConfig
from vlm_lit.weights.presets import make_model
from small_parts import TINY_TEXT, TINY_VISION, hushed, small_tokenizer, three_tokenizers
from vlm_lit.weights.gguf_export import export_gguf
from vlm_lit.weights.gguf_export import gguf_vocabulary
from vlm_lit.weights.gguf_export import interleave_halves
from vlm_lit.weights.gguf_export import load_gguf

def setup_module():
    global CLIP, FAMILIES, KINDS, SIGLIP, n_ids, read_gguf, tiny
    sys.path[:0] = ["../tests", "tests"]
    FAMILIES = three_tokenizers()
    KINDS = {"llama": LlamaConfig, "gemma": GemmaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}
    CLIP = CLIPVisionConfig(**TINY_VISION)
    SIGLIP = SiglipVisionConfig(**TINY_VISION)
    def n_ids(tokenizer): return max(tokenizer.get_vocab().values()) + 1
    def tiny(kind="llama", vision=CLIP, template="gemma", tokenizer=None, seed=0, **settings):
        "A model from scratch with one tower, and its processor."
        tokenizer = tokenizer or small_tokenizer()
        text = KINDS[kind](
            **{**TINY_TEXT, "vocab_size": n_ids(tokenizer) + 3}, **settings.pop("text", {})
        )
        config = VLMConfig(text, vision, image_size=28, **{"select_layer": -2, **settings})
        model = make_model(config, seed).eval()
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)  # norms and biases, too
        return model, VLMProcessor.for_model(config, tokenizer, template)
    def read_gguf(path):
        "Keys and tensors of a file."
        import gguf

        reader = gguf.GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {}
        for t in reader.tensors:
            data = gguf.quants.dequantize(np.array(t.data), t.tensor_type)
            shape = [int(n) for n in reversed(t.shape)]
            tensors[t.name] = torch.from_numpy(np.array(data)).float().reshape(shape)
        return keys, tensors

def test_rows_of_each_head_are_interleaved():
    rows = torch.arange(8)[:, None]
    with Breakpoint(interleave_halves, at="split = ", watch="heads tensor", set={"heads": 1}) as bp:
        interleave_halves(rows, 2)
    order = "result.flatten().tolist()"
    bp.expect_changed({order: ([0, 2, 1, 3, 4, 6, 5, 7], [0, 4, 1, 5, 2, 6, 3, 7])})

def test_rows_in_the_wrong_order_change_the_logits():
    def logits_read_back(model, processor, ids=torch.arange(5, 40)[None]):
        "Largest difference of logits between a model and its file, read by transformers."
        with tempfile.TemporaryDirectory() as folder, hushed(), torch.no_grad():
            export_gguf(model, processor, folder)
            again = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")
            return (again(ids).logits - model.language_model(ids).logits).abs().max().item()

    made, at = tiny(), "return split.transpose"
    right, back = logits_read_back(*made), lambda split: split.transpose(1, 2)
    with Breakpoint(interleave_halves, at=at, watch="heads split.shape", set={"split": back}) as bp:
        wrong = logits_read_back(*made)
    print(f"largest difference of a logit: {right} as written, {wrong:.2f} in the wrong order")
    test_eq(right, 0.0)
    assert wrong > 0.01
    bp.expect_each(heads=[2, 1] * 4)

def test_answers_of_the_exercises():
    from vlm_lit.weights.gguf_export import interleave_halves

    model, processor = tiny("qwen2")
    with tempfile.TemporaryDirectory() as folder, hushed():
        with Breakpoint(interleave_halves, at="return") as bp:
            export_gguf(model, processor, folder)
        keys, _ = read_gguf(f"{folder}/model.gguf")
    n = n_ids(processor.tokenizer)
    test_eq((len(bp.hits), n), (0, 296))
    test_eq(keys["tokenizer.ggml.tokens"][n:], [f"[PAD{k}]" for k in (296, 297, 298)])
    test_eq(set(keys["tokenizer.ggml.token_type"][n:]), {5})

def test_vocabularies_are_those_of_llama_cpp():
    gemma, llama, qwen = [gguf_vocabulary(t, n_ids(t) + 2) for t in FAMILIES]
    test_eq((gemma["model"], gemma["adds_space"]), ("llama", False))
    test_eq((llama["model"], llama["adds_space"]), ("llama", True))
    test_eq((qwen["model"], qwen["pre"]), ("gpt2", "qwen2"))
    test_eq(llama["tokens"][-2:], [f"[PAD{len(llama['tokens']) - n}]" for n in (2, 1)])
    test_eq(llama["types"][-2:], [5, 5])
    test_eq([llama["types"][llama["tokens"].index(t)] for t in ("<unk>", "<s>", "<0x0A>")], [2, 3, 6])
    tok = FAMILIES[1]
    merged = tok.backend_tokenizer.encode("in the", add_special_tokens=False).tokens
    score = dict(zip(llama["tokens"], llama["scores"]))
    assert all(score[t] < score["▁t"] or t == "▁t" for t in merged), merged

    def spm(text, found):
        "SentencePiece's merges, as llama.cpp runs them."
        score, pieces = dict(zip(found["tokens"], found["scores"])), list(text)
        while True:
            pairs = [(score.get(a + b), -n) for n, (a, b) in enumerate(zip(pieces, pieces[1:]))]
            pairs = [pair for pair in pairs if pair[0] is not None]
            if not pairs: return pieces
            n = -max(pairs)[1]
            pieces[n : n + 2] = [pieces[n] + pieces[n + 1]]

    for text in ("what is in the image?", "a  blue   circle", "an internal representation"):
        for t, found in zip(FAMILIES, (gemma, llama)):
            want = t.backend_tokenizer.encode(text, add_special_tokens=False).tokens
            test_eq(spm(("▁" if found["adds_space"] else "") + text.replace(" ", "▁"), found), want)
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with expect_fail(ConfigError, contains="no tokenizer like this one (WordLevel)"):
        gguf_vocabulary(words, 3)
    small = small_tokenizer()
    with expect_fail(ConfigError, contains="has the id"):
        gguf_vocabulary(small, 10)
    small.backend_tokenizer.normalizer = normalizers.Lowercase()
    with expect_fail(ConfigError, contains="no normalizer Lowercase"):
        gguf_vocabulary(small, 300)

def test_tensors_of_both_files_are_the_models():
    for kind, vision, layer in [
        ("llama", CLIP, -2),
        ("mistral", CLIP, -1),
        ("qwen2", CLIP, 1),
        ("gemma", SIGLIP, -2),
    ]:
        model, processor = tiny(kind, vision, select_layer=layer)
        with tempfile.TemporaryDirectory() as folder, hushed():
            export_gguf(model, processor, folder)
            keys, text = read_gguf(f"{folder}/model.gguf")
            clip, seen = read_gguf(f"{folder}/mmproj.gguf")
        c = model.config.text_config
        layer = model.language_model.base_model.layers[1]
        if kind in ("llama", "mistral"):
            for name, part, heads in (
                ("q", layer.self_attn.q_proj, 2),
                ("k", layer.self_attn.k_proj, 1),
            ):
                own = text[f"blk.1.attn_{name}.weight"].reshape(heads, -1, 2, c.hidden_size)
                test_eq(own.transpose(1, 2).reshape(part.weight.shape), part.weight.data)
                assert not torch.equal(text[f"blk.1.attn_{name}.weight"], part.weight)
        else:
            test_eq(text["blk.1.attn_q.weight"], layer.self_attn.q_proj.weight.data)
        if kind == "qwen2":
            test_eq(text["blk.1.attn_k.bias"], layer.self_attn.k_proj.bias.data)
        test_eq(text["blk.1.ffn_down.weight"], layer.mlp.down_proj.weight.data)
        test_eq(text["blk.1.attn_norm.weight"], layer.input_layernorm.weight.data + (kind == "gemma"))
        test_eq(text["token_embd.weight"], model.get_input_embeddings().weight.data)
        test_eq("output.weight" in text, kind != "gemma")
        test_eq(len(text), len(weights_of(model.language_model)))
        test_eq(keys["general.architecture"], "llama" if kind == "mistral" else kind)
        test_eq(keys["tokenizer.ggml.eot_token_id"], 5)
        test_eq((keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.add_bos_token"]), (2, True))
        encoder = model.image_encoder
        depth = len(encoder.vision_tower.encoder.layers)
        test_eq((clip["clip.vision.block_count"], clip["clip.vision.feature_layer"]), (depth, [depth]))
        test_eq(clip["clip.use_gelu"], vision is SIGLIP)
        layers = encoder.vision_tower.encoder.layers
        test_eq(seen["v.blk.0.attn_q.weight"], layers[0].self_attn.q_proj.weight.data)
        test_eq(seen["v.blk.0.ffn_up.bias"], layers[0].mlp.fc1.bias.data)
        test_eq(seen["mm.0.weight"], encoder.mm_projector[0].weight.data)
        factor = 32**0.5 if kind == "gemma" else 1
        torch.testing.assert_close(seen["mm.2.weight"] * factor, encoder.mm_projector[2].weight.data)
        test_eq(len(seen), len(weights_of(encoder)))
        assert not any(name.startswith("v.post_ln") for name in seen)

def test_transformers_reads_the_same_logits():
    ids = torch.arange(5, 40)[None]
    cases = [("llama", None), ("mistral", None), ("qwen2", None), ("llama", FAMILIES[1])]
    for kind, tokenizer in cases:
        model, processor = tiny(kind, tokenizer=tokenizer, template="v1" if tokenizer else "gemma")
        with tempfile.TemporaryDirectory() as folder, hushed():
            export_gguf(model, processor, folder)
            again = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")
            words = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        test_eq(again.config.vocab_size, model.config.vocab_size)
        with torch.no_grad():
            a, b = again(ids).logits, model.language_model(ids).logits
        test_eq((a - b).abs().max().item(), 0.0)
        text, own = "what color is the shape?", processor.tokenizer
        test_eq(words(text).input_ids, own(text).input_ids)

def test_half_precision_stays_what_it_is():
    for dtype, eps in [(torch.float16, 0), (torch.bfloat16, 0)]:
        model, processor = tiny()
        for p in model.parameters(): p.data = p.data.to(dtype)
        with tempfile.TemporaryDirectory() as folder, hushed():
            export_gguf(model, processor, folder)
            keys, text = read_gguf(f"{folder}/model.gguf")
            _, seen = read_gguf(f"{folder}/mmproj.gguf")
        test_eq(keys["general.file_type"], 1 if dtype == torch.float16 else 32)
        test_eq(text["token_embd.weight"], model.get_input_embeddings().weight.data.float())
        test_eq(text["output_norm.weight"], model.language_model.model.norm.weight.data.float())
        test_eq(seen["mm.2.weight"], model.image_encoder.mm_projector[2].weight.data.float())

def test_what_gguf_does_not_hold_is_named():
    from transformers import Gemma2Config, GPT2Config

    KINDS["gpt2"] = lambda **kw: GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=kw["vocab_size"], bos_token_id=2, eos_token_id=1
    )
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    for settings, words in [
        (dict(image_grid=2), "llama.cpp's LLaVA has no images in crops"),
        (dict(projector_type="linear"), "llama.cpp's LLaVA has no projector 'linear'"),
        (dict(kind="gpt2"), "no GGUF of a gpt2 language model"),
        (dict(kind="gemma", text={"tie_word_embeddings": False}), "has no name for lm_head.weight"),
        (dict(text={"rope_parameters": scaled}), "rope_type must be default, got linear"),
        (dict(text={"hidden_act": "relu"}), "hidden_act must be silu, got relu"),
        (
            dict(vision=CLIPVisionConfig(**TINY_VISION, hidden_act="relu")),
            "of the vision tower must be",
        ),
    ]:
        model, processor = tiny(**settings)
        with tempfile.TemporaryDirectory() as folder:
            with expect_fail(ConfigError, contains=words):
                export_gguf(model, processor, folder)
            test_eq(list(Path(folder).iterdir()), [])
    kept, sys.modules["gguf"] = sys.modules.get("gguf"), None
    try:
        with expect_fail(ConfigError, contains="pip install gguf"): load_gguf()
    finally: sys.modules["gguf"] = kept
