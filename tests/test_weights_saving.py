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
from vlm_lit.weights.language_models import LOAD_ERRORS, quiet, read_state, some, weights_of
from vlm_lit.weights.presets import PARTS, is_scratch
from vlm_lit.weights.interchange import save_projector, shards
import os, tempfile
import pytest
from fastcore.test import test_eq, expect_fail
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel, GemmaConfig, LlamaConfig, PreTrainedTokenizerFast
import importlib.util, io, struct
from contextlib import contextmanager, redirect_stderr
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.weights.build import build_model
from vlm_lit.weights.presets import load_preset, make_model, preset_config
from vlm_lit.weights.interchange import load_projector, mgm_factor, projector_tensors
import transformers.modeling_gguf_pytorch_utils as conversion
from vlm_lit.weights.saving import *

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
