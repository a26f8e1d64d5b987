"Derived from nbs/12a_pretrained.ipynb by `make tests`; edit the notebook, not this file."
from pathlib import Path
import torch
from safetensors.torch import save_file
from vlm_lit.core import ConfigError, nearest
from vlm_lit.processor import VLMProcessor
from vlm_lit.models.vlm import VLM
from vlm_lit.files import check_checksum, named_folders, read_json, write_file, write_json
from vlm_lit.weights.presets import PRESET_FIELDS
from vlm_lit.weights.build import build_model
from vlm_lit.weights.towers import cast
from vlm_lit.weights.saving import load_model
from vlm_lit.weights.llava_hf import is_llava_hf, load_llava_hf, read_llava_hf_processor
from vlm_lit.weights.build import load_preset_tokenizer
from vlm_lit.weights.interchange import load_projector
from vlm_lit.weights.presets import preset_names
from vlm_lit.weights.presets import preset_settings
from vlm_lit.weights.language_models import read_state, reading
from vlm_lit.weights.interchange import save_projector
from vlm_lit.weights.language_models import weights_of
from vlm_lit.weights.adapters import check_tensors, add_lora, has_lora, load_lora, merge_lora
from vlm_lit.weights.adapters import nearest_names, save_lora
from vlm_lit.text.tokenizer import check_placeholder, placeholder_id
import json, os, shutil, sys, textwrap
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.weights.saving import export_model, save_model
from small_parts import TINY, logits, shake, workshop
from vlm_lit.weights.language_models import quiet
from vlm_lit.weights.pretrained import _load_checkpoint
from vlm_lit.weights.pretrained import open_model
from vlm_lit.weights.pretrained import read_base
from vlm_lit.weights.pretrained import resolve_model
from vlm_lit.weights.pretrained import save_trainable
from vlm_lit.weights.pretrained import write_base

def setup_module():
    global make_run
    sys.path[:0] = ["../tests", "tests"]
    def make_run(folder, lora=None, seed=5):
        "What a finished run leaves, and two more copies; its logits."
        (folder / "checkpoint-20").mkdir(parents=True)
        model, processor = resolve_model(TINY, seed)
        shake(model, "image_encoder.mining", "image_encoder.mm_projector")
        if lora:
            add_lora(model, lora)
            for n, p in model.named_parameters():
                p.data += 0.02 * torch.randn_like(p) * (".lora_" in n)
        want = logits(model, processor)
        save_trainable(model, folder / "checkpoint-20")
        write_base(folder / "checkpoint-20", TINY, seed, lora)
        model.config.save_pretrained(folder / "checkpoint-20")
        if lora: merge_lora(model)
        save_model(model, folder / "model")
        export_model(model, folder / "export")
        with quiet(): model.save_pretrained(folder / "plain")
        for name in ("checkpoint-20", "model", "export", "plain"):
            processor.save_pretrained(folder / name)
        (folder / "recipe.yaml").write_text("model: {preset: tiny, tokenizer: tokenizer}\n")
        return want

def test_a_section_is_a_preset_and_changes():
    with workshop(), Breakpoint(resolve_model, at="if base is None", watch="preset base changes") as bp:
        model, processor = resolve_model({**TINY, "image_aspect_ratio": "pad"})
    test_eq(processor.image_processor.aspect, "pad")
    bp.expect(preset="tiny", base=None)
    bp.expect(changes={"tokenizer": "tokenizer", "image_aspect_ratio": "pad"})

def test_a_checkpoint_needs_the_seed_of_its_base():
    at, changed = "section, own = dict(base", {"base": lambda base: {**base, "seed": 0}}
    watch = "base['model'] base['seed'] base['lora']"
    with workshop():
        want, folder = make_run(Path("runs/mine"), {"r": 4, "alpha": 8}), "runs/mine/checkpoint-20"
        test_close(logits(*open_model(folder, "cpu")), want, eps=1e-5)
        with Breakpoint(_load_checkpoint, at=at, watch=watch, set=changed) as bp:
            other = logits(*open_model(folder, "cpu"))
    print(f"largest difference of a logit with another seed: {(other - want).abs().max():.1f}")
    assert (other - want).abs().max() > 0.1
    norm = "round(float(result[0].get_input_embeddings().weight.norm()), 2)"
    bp.expect({"base['seed']": 5}).expect_changed(
        {norm: (17.27, lambda norm: abs(norm - 17.27) > 0.001)}
    )

def test_lora_without_peft_says_what_to_install():
    import sys

    with workshop():
        model, _ = resolve_model(TINY)
    kept, sys.modules["peft"] = sys.modules.get("peft"), None
    try:
        with expect_fail(ConfigError, contains="pip install 'vlm_lit[peft]'"):
            add_lora(model, {})
    finally:
        sys.modules.pop("peft")
        if kept is not None: sys.modules["peft"] = kept

def test_sections_of_recipes_are_checked():
    with workshop():
        model, processor = resolve_model({**TINY, "template": "plain"}, seed=3)
        test_eq((processor.template, model.config.parts["template"]), ("plain", "plain"))
        test_eq(model.config.vocab_size, len(processor.tokenizer))
        test_eq({p.dtype for p in model.parameters()}, {torch.float32})
        again = resolve_model({**TINY, "template": "plain"}, seed=3)
        assert torch.equal(logits(model, processor), logits(*again))
        for section, words in [
            ({"presets": "tiny"}, "unknown key 'presets'; did you mean 'preset'"),
            ({}, "name either `preset` or `from`"),
            ({"preset": "tiny", "from": "x"}, "name either"),
            ("tiny", "must be keys and values"),
            ({"preset": "huge"}, "unknown preset 'huge'"),
            ({"preset": "tiny"}, "from scratch brings no tokenizer"),
            ({"from": "x", "image_size": 64}, "image_size is decided by 'x'"),
            ({**TINY, "template": "v9"}, "unknown template"),
            ({**TINY, "tokenizer": "./gone"}, "'./gone'"),
            ({**TINY, "projector": "gone.bin"}, "cannot read weights from gone.bin"),
            ({**TINY, "image_aspect_ratio": "wide"}, "must be 'square' or 'pad'"),
        ]:
            with expect_fail(ConfigError, contains=words): resolve_model(section)

def test_projectors_are_loaded_by_name():
    with workshop():
        model, processor = resolve_model(TINY)
        shake(model, "image_encoder.mm_projector")
        save_projector(model, "mm_projector.bin")
        again, _ = resolve_model({**TINY, "projector": "mm_projector.bin"})
        test_close(logits(again, processor), logits(model, processor), eps=1e-5)
        with expect_fail(ConfigError, contains="does not fit the model"):
            resolve_model({**TINY, "vision_tower_aux": None, "projector": "mm_projector.bin"})

def test_every_folder_opens_to_the_same_logits():
    names = ["mine", "runs/mine", "runs/mine/model", "runs/mine/checkpoint-20", "runs/mine/plain"]
    for lora in (None, {"r": 4, "alpha": 8}):
        with workshop():
            want = make_run(Path("runs/mine"), lora)
            for name in (*names, Path("runs/mine/export")):
                model, processor = open_model(name, "cpu")
                test_close(logits(model, processor), want, eps=1e-5)
                assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
                stops = processor.generation_settings()["eos_token_id"]
                test_eq(model.generation_config.eos_token_id, stops)
            shutil.rmtree("tokenizer")  # a checkpoint has its own
            test_close(logits(*open_model("runs/mine/checkpoint-20", "cpu")), want, eps=1e-5)
            os.chdir("runs/mine")  # and opens from anywhere
            test_close(logits(*open_model("checkpoint-20", "cpu")), want, eps=1e-5)

def test_llava_of_transformers_is_a_model_folder():
    from vlm_lit.weights.llava_hf import export_llava_hf

    chat = (
        "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    )
    with workshop():
        shape = {"vision_tower_aux": None, "aux_stages": None, "image_size_aux": 32}
        model, processor = resolve_model({**TINY, **shape})
        export_llava_hf(model, processor, "llava", chat)
        test_eq(open_model("llava", "cpu")[1].template, "hf")
        section, want = {"from": "llava", "template": "gemma"}, logits(model, processor)
        again, own = resolve_model(section)
        test_eq((own.template, own.image_processor.aspect), ("gemma", "square"))
        test_eq(len(logits(again, own)), len(want) + 1)
        test_close(logits(again, own)[: len(want)], want, eps=1e-5)
        # a stage's checkpoint names the folder, and opens to what was trained
        shake(again, "image_encoder.mm_projector")
        Path("checkpoint-1").mkdir()
        save_trainable(again, "checkpoint-1")
        write_base("checkpoint-1", section, 0)
        test_close(logits(*open_model("checkpoint-1", "cpu")), logits(again, own), eps=1e-5)

def test_stages_start_from_runs():
    with workshop():
        want = make_run(Path("runs/one"))
        test_eq(resolve_model(TINY)[1].image_processor.resize, "torch")
        for kernel in ("pillow", "torch"):  # that of the run, whatever new models have
            path = Path("runs/one/model/processor_config.json")
            saved = json.loads(path.read_text())
            saved["image_processor"]["resize"] = kernel
            path.write_text(json.dumps(saved))
            test_eq(resolve_model({"from": "one"})[1].image_processor.resize, kernel)
        changes = {"template": "plain", "image_mean": [0.4, 0.4, 0.4]}
        model, processor = resolve_model({"from": "one", **changes})
        test_eq(processor.template, "plain")
        test_eq((processor.image_processor.image_mean, model.config.image_mean), ([0.4] * 3, [0.4] * 3))
        test_eq(model.generation_config.eos_token_id, processor.generation_settings()["eos_token_id"])
        half, _ = resolve_model({"from": "one"}, dtype=torch.bfloat16)
        test_eq(half.language_model.dtype, torch.bfloat16)
        test_eq(half.image_encoder.mm_projector[0].weight.dtype, torch.float32)
        section, folder = {"from": "runs/one"}, Path("runs/two/checkpoint-3")
        model, processor = resolve_model(section)
        test_close(logits(model, processor), want, eps=1e-5)
        shake(model, "language_model")
        folder.mkdir(parents=True)
        save_trainable(model, folder)
        write_base(folder, section, 0)
        test_eq(sorted(p.name for p in folder.iterdir()), ["base.json", "trainable.safetensors"])
        after = logits(model, processor)
        test_close(logits(*open_model(folder, "cpu")), after, eps=1e-5)
        os.chdir("runs/two")
        test_close(logits(*open_model("checkpoint-3", "cpu")), after, eps=1e-5)

def test_folders_without_a_model_are_named():
    with workshop():
        run, folder = Path("runs/mine"), Path("runs/mine/checkpoint-20")
        make_run(run, {"r": 4})
        for path in ("model", "export", "plain"): shutil.rmtree(run / path)
        message = (
            "is not finished; resume with: vlm-lit train runs/mine/recipe.yaml --resume; its "
        "newest checkpoint is runs/mine/checkpoint-20"
        )
        for name in (run, "mine"):
            with expect_fail(ConfigError, contains=message): open_model(name)
        with expect_fail(ConfigError, contains="run 'runs/mine' is not finished"):
            resolve_model({"from": "runs/mine"})
        with expect_fail(ConfigError, contains="no model in 'tokenizer': config.json is missing"):
            open_model("tokenizer")
        for name in ("yours", "./mine", "../mine"):
            with expect_fail(ConfigError, contains=f"no model {name!r}"):
                open_model(name)
        with expect_fail(ConfigError, contains="no model 'yours'"):
            resolve_model({"from": "yours"})
        base, weights = read_base(folder), read_state(folder / "trainable.safetensors")
        write_base(folder, {"from": "runs/gone"}, 0, {"r": 4})
        message = "cannot be opened without its base: no model 'runs/gone'"
        with expect_fail(ConfigError, contains=message): open_model(folder)
        write_base(folder, base["model"], base["seed"], {"r": 8})
        with expect_fail(ConfigError, contains="wrong shape 56"):
            open_model(folder)
        write_base(folder, {**base["model"], "vision_tower_aux": None}, base["seed"], base["lora"])
        message = "trainable.safetensors does not fit the model: unexpected"
        with expect_fail(ConfigError, contains=message): open_model(folder)
        (folder / "base.json").write_text("{}")
        with expect_fail(ConfigError, contains="must hold model, seed and lora"):
            open_model(folder)
        write_base(folder, **{"section": base["model"], "seed": base["seed"], "lora": base["lora"]})
        (folder / "adapter_model.safetensors").unlink()
        with expect_fail(ConfigError, contains="no adapter in 'runs/mine/checkpoint-20'"):
            open_model(folder)
        (folder / "trainable.safetensors").write_bytes(b"half")
        with expect_fail(ConfigError, contains="cannot read weights from trainable.safetensors"):
            open_model(folder)
        with expect_fail(ConfigError, contains="base.json is missing"):
            read_base(run)
        make_run(Path("runs/other"))
        (Path("runs/other/model/processor_config.json")).unlink()
        with expect_fail(ConfigError, contains="no processor in 'runs/other/model'"):
            open_model("other")
