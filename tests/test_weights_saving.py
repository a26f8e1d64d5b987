"Derived from nbs/10e_saving.ipynb by `make tests`; edit the notebook, not this file."
from pathlib import Path
from tempfile import TemporaryDirectory
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from vlm_lit.core import ConfigError
from vlm_lit.files import CHECKSUMS, apply_umask, check_checksum, read_json, to_disk
from vlm_lit.files import write_checksums, write_json, write_text
from vlm_lit.models.vlm import VLM
from vlm_lit.models.config import VLMConfig
from vlm_lit.weights.language_models import check_finite, mismatched_names, quiet, read_state, reading, raise_misfit, used_generation_config, weights_of
from vlm_lit.weights.model_card import model_card
from vlm_lit.weights.interchange import save_projector, shards
import os, sys
import tempfile
from fastcore.test import test_eq, expect_fail
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.weights.build import build_model
from vlm_lit.weights.presets import load_preset, make_model, preset_config
from vlm_lit.weights.interchange import load_projector
from small_parts import MGM, mgm_models, mgm_parts, picture_rows, same, small_tokenizer
from vlm_lit.weights.saving import export_model
from vlm_lit.weights.saving import load_model
from vlm_lit.weights.saving import load_weights
from vlm_lit.weights.saving import mgm_config
from vlm_lit.weights.saving import save_model

def setup_module():
    global LLAVA_7B, MGM_2B, SMOL, small_tok, tiny, tok
    sys.path[:0] = ["../tests", "tests"]
    tok, small_tok = load_tokenizer("gemma"), small_tokenizer()
    SMOL = load_preset("smol")
    def tiny(seed=0, **overrides):
        return make_model(preset_config("tiny", small_tok, **overrides), seed)
    MGM_2B, LLAVA_7B = mgm_models()

def test_a_second_save_removes_the_file_of_the_first():
    with tempfile.TemporaryDirectory() as folder:
        save_model(tiny(0), folder)
        with Breakpoint(save_model, at="old.unlink()", watch="old.name") as bp:
            save_model(tiny(1), folder, max_shard_size="1MB")
        files = sorted(path.name for path in Path(folder).glob("model*"))
        assert same(load_model(folder), tiny(1))
    print(len(files), "files:", files[0], "...", files[-1])
    bp.expect_each({"old.name": ["checksums.json", "model.safetensors"]})

def test_the_weights_of_two_saves_are_refused():
    save = PreTrainedModel.save_pretrained
    with tempfile.TemporaryDirectory() as folder, quiet():
        save(tiny(0), folder)
        save(tiny(1), folder, max_shard_size="1MB")
        assert same(AutoModelForCausalLM.from_pretrained(folder), tiny(0))  # not the second
        watch = "whole.name len(paths) gone"
        with Breakpoint(shards, at="if whole.is_file() and whole not in", watch=watch) as bp:
            with expect_fail(ConfigError, contains="holds weights of two saves"):
                load_model(folder)
    bp.expect({"whole.name": "model.safetensors", "len(paths) > 1": True, "gone": []})

def test_half_of_the_weights_are_missing():
    model = tiny()
    with tempfile.TemporaryDirectory() as folder, quiet():
        save_model(model, folder)
        path, weights = Path(folder) / "model.safetensors", weights_of(model)
        half = {name: weights[name] for name in list(weights)[::2]}
        save_file(half, path, metadata={"format": "pt"})
        with Breakpoint(
            load_model, at="raise_misfit(", watch="len(missing) unexpected len(types)"
        ) as bp:
            with expect_fail(ConfigError, contains="does not fit the model: missing"):
                load_model(folder)
        found = AutoModelForCausalLM.from_pretrained(folder)
    assert not same(found, model)  # transformers has loaded it, half at random
    bp.expect({"len(missing)": len(weights) - len(half)}, unexpected=set())

def test_model_comes_back_from_disk_bit_for_bit():
    with mgm_parts(): half = build_model("mgm-2b", dtype=torch.bfloat16, **MGM)
    for model in (tiny(), MGM_2B, LLAVA_7B, half):
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, folder)
            again = load_model(folder)
            with quiet(): plain = AutoModelForCausalLM.from_pretrained(folder)
            names = sorted(p.name for p in Path(folder).iterdir())
            test_eq(names[:3], ["README.md", "checksums.json", "config.json"])
            test_eq(names[3:], ["generation_config.json", "model.safetensors"])
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
        (Path(folder) / CHECKSUMS).unlink()  # or each of these files would be called damaged
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
        path.unlink()
        torch.save(weights, Path(folder) / "pytorch_model.bin")
        message = "holds its weights as a pickle, pytorch_model.bin, which can run code when opened"
        with expect_fail(ConfigError, contains=message): load_model(folder)
        for text, words in [("{", "cannot read"), ('{"a": 1}', "is not the configuration of a model")]:
            (Path(folder) / "config.json").write_text(text)
            with expect_fail(ConfigError, contains=words): load_model(folder)

def test_a_flipped_bit_and_values_that_are_not_finite_are_refused():
    model = tiny()
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        path, weights = Path(folder) / "model.safetensors", weights_of(model)
        data = bytearray(path.read_bytes())
        data[-5] ^= 1  # of the last weight's mantissa
        path.write_bytes(data)
        with expect_fail(ConfigError, contains="model.safetensors' is damaged"):
            load_model(folder)
        with expect_fail(ConfigError, contains="model.safetensors' is damaged"):
            read_state(path)
        (Path(folder) / CHECKSUMS).unlink()
        assert not same(load_model(folder), model)  # another project's folder has no checksums
        name = "image_encoder.mm_projector.0.bias"
        for value in (float("nan"), float("inf")):
            bad = {**weights, name: torch.full_like(weights[name], value)}
            save_file(bad, path, metadata={"format": "pt"})
            for read in (lambda: load_model(folder), lambda: load_weights(model, path)):
                with expect_fail(ConfigError, contains=f"are not finite: 1 ({name})"):
                    read()
        save_model(model, folder)
        with quiet():
            tiny(1).save_pretrained(folder)  # transformers' own brings no checksums
        assert same(load_model(folder), tiny(1)) and not (Path(folder) / CHECKSUMS).exists()

def test_a_damaged_configuration_is_one_line():
    with tempfile.TemporaryDirectory() as folder:
        save_model(tiny(), folder)
        path = Path(folder) / "config.json"
        config = read_json(path)
        damaged = [[], None, 3, {}, {"model_type": "vlm_lit"}]  # the last one is Gemma, 7B
        for key in ("text_config", "vision_config", "image_size", "aux_stages"):
            damaged += [{**config, key: value} for value in ("x", -1, [1], {"model_type": "x"})]
        for key in ("hidden_size", "vocab_size", "model_type"):
            for value in (None, "x", 0, {}):
                damaged.append({**config, "text_config": {**config["text_config"], key: value}})
        for value in damaged:
            write_json(path, value)
            try: load_model(folder)
            except ConfigError as e: assert "\n" not in str(e), value

def test_a_folder_of_transformers_trainer_is_read_without_its_pickles():
    class Bomb:
        def __reduce__(self): return (os.mkdir, (f"{folder}/went_off",))

    model = tiny()
    with tempfile.TemporaryDirectory() as folder:
        with quiet(): model.save_pretrained(folder)
        for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save(Bomb(), Path(folder) / name)
        (Path(folder) / "pytorch_model.bin").write_bytes(b"not opened")
        (Path(folder) / "trainer_state.json").write_text("{}")
        assert same(load_model(folder), model)
        assert not (Path(folder) / "went_off").exists()
        (Path(folder) / "adapter_config.json").write_text("{}")
        with expect_fail(ConfigError, contains="holds a model and an adapter"):
            load_model(folder)

def test_a_second_save_replaces_the_weights_of_the_first():
    first, second = tiny(0), tiny(1)
    with tempfile.TemporaryDirectory() as folder:
        names = lambda: sorted(path.name for path in Path(folder).glob("model*"))
        (Path(folder) / "model_notes.txt").write_text("mine")
        for model, size in [(first, "1MB"), (second, "5GB"), (first, "1MB"), (second, "2MB")]:
            save_model(model, folder, max_shard_size=size)
            print(f"shards of at most {size}: {len(names()) - 1} files")
            assert same(load_model(folder), model)
            with quiet():
                assert same(AutoModelForCausalLM.from_pretrained(folder), model)
            files, is_whole = names(), size == "5GB"
            test_eq("model.safetensors" in files, is_whole)
            test_eq("model.safetensors.index.json" in files, not is_whole)
            test_eq((Path(folder) / "model_notes.txt").read_text(), "mine")
            test_eq([path.name for path in Path(folder).glob(".*")], [])
        # transformers' own method, and what copies of two saves in one folder would be
        with quiet(): first.save_pretrained(folder)
        assert same(load_model(folder), first)
        whole = (Path(folder) / "model.safetensors").read_bytes()
        with quiet(): second.save_pretrained(folder, max_shard_size="1MB")
        with quiet():
            assert same(AutoModelForCausalLM.from_pretrained(folder), second)
        (Path(folder) / "model.safetensors").write_bytes(whole)
        with expect_fail(ConfigError, contains="holds weights of two saves"):
            load_model(folder)

def test_generation_settings_that_transformers_would_not_save():
    model = tiny()
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            model.generation_config.update(do_sample=False, temperature=0.7, top_p=0.6)
        with expect_fail(ValueError, contains="GenerationConfig is invalid"), quiet():
            model.save_pretrained(folder)
        with quiet(): save_model(model, folder)
        test_eq(model.generation_config.temperature, 0.7)  # the caller's own is left as it was
        saved = load_model(folder).generation_config
        test_eq((saved.do_sample, saved.temperature, saved.top_p), (False, None, None))
        model.generation_config.num_return_sequences = 3
        message = "model.generation_config cannot be saved: Greedy methods"
        with expect_fail(ConfigError, contains=message): save_model(model, folder)
        test_eq(sorted(path.name for path in Path(folder).glob(".*")), [])

def test_exports_are_read_again():
    with tempfile.TemporaryDirectory() as folder:
        export_model(MGM_2B, Path(folder) / "hf", "hf")
        card = (Path(folder) / "hf/README.md").read_text()
        assert same(load_model(Path(folder) / "hf"), MGM_2B)
        assert "license: gemma\n" in card.split("\n---\n")[0]
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

def test_saved_files_have_the_mode_of_the_umask():
    model = tiny()
    mode = lambda path: oct(path.stat().st_mode & 0o777)
    for umask, expected in [(0o022, "0o644"), (0o027, "0o640")]:
        with tempfile.TemporaryDirectory() as folder:
            before = os.umask(umask)
            try:
                save_model(model, f"{folder}/whole")
                save_model(model, f"{folder}/shards", max_shard_size="1MB")
                export_model(model, f"{folder}/hf", "hf")
                export_model(model, f"{folder}/mgm", "mgm")
                save_projector(model, f"{folder}/mm_projector.safetensors")
            finally: os.umask(before)
            written = [path for path in Path(folder).rglob("*") if path.is_file()]
            test_eq({mode(path) for path in written}, {expected})
            test_eq(mode(Path(folder) / "whole"), "0o755" if umask == 0o022 else "0o750")
