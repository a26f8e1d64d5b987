"Derived from nbs/20a_commands.ipynb by `make tests`; edit the notebook, not this file."
import gc, json, os, re, shlex, signal, sys, warnings
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import chain
from pathlib import Path
import typer
from vlm_lit.core import ConfigError, DataError, nearest, printable
from vlm_lit.files import named_folders
import textwrap
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch
import pytest
from fastcore.test import expect_fail
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import sample_image
from vlm_lit.training.callbacks import Interrupted
from vlm_lit.training.recipe import load_recipe
from vlm_lit.weights.saving import save_model
from small_parts import tiny_model, workshop
from vlm_lit.commands import _tower_config
from vlm_lit.commands import check_push
from vlm_lit.commands import export_folder
from vlm_lit.commands import image_files
from vlm_lit.commands import load_preparation
from vlm_lit.commands import name_flags
from vlm_lit.commands import push_folder
from vlm_lit.commands import run_folder
from vlm_lit.commands import short_recipe
from vlm_lit.commands import split_words
from vlm_lit.commands import train_run
from vlm_lit.commands import user_errors

def setup_module():

    sys.path[:0] = ["../tests", "tests"]

def test_messages_name_options_and_leave_data_alone():
    names = ("control_tokens", "image_folder", "aspect")
    flags = {name: "--" + name.replace("_", "-") for name in names}
    text = "record 'image_folder': aspect must be square; pass control_tokens='escape'"
    with Breakpoint(name_flags, at="return _NAMED.sub", watch="text", set={"flags": {}}) as bp:
        name_flags(text, flags)
    want = "record 'image_folder': --aspect must be square; pass --control-tokens escape"
    bp.expect_changed(result=(want, text))

def test_stop_where_image_tokens_follow_from_the_patch_size():
    coarser = {"vision": lambda vision: {**vision, "patch_size": 16}}
    watch = ["vision['patch_size']", "own['image_size']", "own['template']"]
    at = "config = VLMConfig(None"
    with Breakpoint(load_preparation, at=at, watch=watch, set=coarser) as bp:
        load_preparation("mgm-2b", "gemma")
    bp.expect({"vision['patch_size']": 14, "own['image_size']": 336, "own['template']": "gemma"})
    bp.expect_changed({"result.image_processor.num_image_tokens": (576, 441)})

def test_words_are_files_overrides_or_mistakes():
    words = ["a.yaml", "--a.b", "1", "--c.d=2", "b.yaml", "--e.f", "-3"]
    with Breakpoint(split_words, at="overrides += [word]", watch="flag equals overrides") as bp:
        files, overrides = split_words(words, [])
    assert [str(file) for file in files] == ["a.yaml", "b.yaml"]
    assert overrides == ["--a.b", "1", "--c.d=2", "--e.f", "-3"]
    with pytest.raises(ConfigError, match="has its section, as in --training.learning_rate"):
        split_words(["--learning-rate", "1e-3"], ["--name"])
    with pytest.raises(ConfigError, match="unknown option '--resum'; did you mean '--resume'"):
        split_words(["--resum"], ["--resume", "--name"])
    for rest in (["--training.seed", "3"], ["--training.seed=3"], ["--resum"], []):
        with pytest.raises(ConfigError, match="^--data.max_length has no value$"):
            split_words(["a.yaml", "--data.max_length", *rest], [])
    bp.expect_each(flag=["--a.b", "--c.d", "--e.f"], equals=["", "=", ""])

def test_errors_are_one_line_and_bugs_keep_their_traceback():
    said = []
    with patch("typer.echo", lambda text, **kw: said.append(text)):
        for error, code in [
            (ConfigError("a\nb\x1b[2J"), 2),
            (OSError(28, "No space left", "x"), 2),
            (KeyboardInterrupt(), 130),
        ]:
            with pytest.raises(typer.Exit) as found, user_errors(): raise error
            assert found.value.exit_code == code
        with pytest.raises(ZeroDivisionError), user_errors(): 1 / 0
    assert said == ["error: a b\\x1b[2J", "error: No space left: x", "interrupted"]

def test_what_is_quoted_or_part_of_a_path_is_data():
    from hypothesis import given, settings, strategies as st

    flags = {"image_folder": "--image-folder", "control_tokens": "--control-tokens"}

    @settings(max_examples=300, deadline=None)
    @given(st.text(max_size=12))
    def kept(text):
        "An id, a path and a key of a recipe stay as they are, whatever stands around the name."
        for data in (f"image_folder {text}", f"{text} control_tokens='escape'"):
            line = f"record {data!r}: no image {data + '.png'!r}"
            assert name_flags(line, flags) == line

    kept()
    for line in ("data.control_tokens: 7", "x/image_folder/y", "a image_folder.png", "--image-folder"):
        assert name_flags(line, flags) == line
    said = name_flags(
        "image_folder must be a folder. Give `image_folder`, or control_tokens='allow'.", flags
    )
    assert said == ("--image-folder must be a folder. Give --image-folder, or --control-tokens allow.")

def test_image_tokens_of_presets_without_their_weights():
    for name, count in [(None, 576), ("tiny", 16), ("smol", 16), ("mgm-2b", 576), ("llava-7b", 576)]:
        images = load_preparation(name, "gemma", "gemma").image_processor
        print(f"{name}: {images.num_image_tokens} tokens per image, {images.image_size} pixels")
        assert images.num_image_tokens == count
        assert images.resize == ("torch" if name else "pillow")
    for wrong in ({"aspect": "wide"}, {"control_tokens": "maybe"}):
        for name in (None, "llava-7b"):
            message = f"{list(wrong)[0]} must be one of"
            with expect_fail(ConfigError, contains=message):
                load_preparation(name, "gemma", **wrong)

def test_image_files_of_a_folder():
    with TemporaryDirectory() as folder:
        for name in ("b.PNG", "a.jpg", "notes.txt"):
            (Path(folder) / name).write_text("")
        assert [p.name for p in image_files([folder, f"{folder}/a.jpg"])] == ["a.jpg", "b.PNG", "a.jpg"]
        with pytest.raises(ConfigError, match="no image file"):
            image_files([f"{folder}/c.jpg"])
        (Path(folder) / "empty").mkdir()
        with pytest.raises(ConfigError, match="no image in"):
            image_files([f"{folder}/empty"])

def test_short_form_is_a_recipe_and_can_be_overridden():
    words = short_recipe("tiny", Path("train.json"), Path("images"), Path("val.json"))
    recipe = load_recipe(overrides=[*words, "--training.learning_rate", "2e-3", "--data.max_length=64"])
    print(recipe.data.train[0].path, recipe.data.train[0].image_folder)
    assert (recipe.training["learning_rate"], recipe.data.max_length) == (2e-3, 64)
    assert len(recipe.data.eval) == 1
    bare = load_recipe(overrides=short_recipe("tiny", Path("1.json")))
    assert bare.data.train[0].image_folder is None
    with pytest.raises(ConfigError, match="give a recipe file, or --preset and --data"):
        short_recipe("tiny", None)
    with pytest.raises(ConfigError, match="unknown preset 'tinny'; did you mean 'tiny'"):
        load_recipe(overrides=short_recipe("tinny", Path("train.json")))

def test_interrupted_runs_exit_as_the_signal_asks():
    def stopped(error, folder):
        "What is said of a run that an error ends, and the exit code."

        def train(recipe, folder, resume): raise error

        said = []
        with (
            patch.dict(sys.modules, {"vlm_lit.training.run": SimpleNamespace(train=train)}),
            patch("typer.echo", lambda text, **kw: said.append(text)),
            pytest.raises(typer.Exit) as found,
        ):
            train_run(None, Path(folder))
        return found.value.exit_code, said[0]

    with TemporaryDirectory() as folder:
        assert stopped(KeyboardInterrupt(), folder) == (130, "interrupted")
        (Path(folder) / "recipe.yaml").write_text("")
        for number, code in [(signal.SIGTERM, 0), (signal.SIGINT, 130)]:
            found, said = stopped(Interrupted(number, 7), folder)
            print(textwrap.fill(f"{found} {said.replace(folder, 'runs/mine')}", 96))
            assert found == code
            assert said.endswith(f"resume with: vlm-lit train {folder}/recipe.yaml --resume")

def test_run_folder_by_name_by_recipe_or_beside_it():
    with TemporaryDirectory() as folder:
        own, runs = Path(folder) / "recipe.yaml", Path("runs")
        assert run_folder([own], None, runs) == runs / "recipe"
        assert run_folder([own], "a", runs) == runs / "a"
        assert run_folder([own], None, runs, resume=True) == own.parent
        (own.parent / "metrics.jsonl").write_text("")
        assert run_folder([own], None, runs) == own.parent
        assert run_folder([Path("x/smol.yaml"), own], None, runs) == runs / "smol"

def test_an_exported_folder_carries_its_code():
    with workshop() as place:
        model, processor = tiny_model()
        save_model(model, place / "mine")
        processor.save_pretrained(place / "mine")
        for to, brings_code in (("hf", True), ("mgm", False)):
            out = export_folder("mine", to, place / to)
            assert (out / "vlm_lit_models_vlm.py").is_file() == brings_code
        config = json.loads((place / "hf/config.json").read_text())
        assert config["auto_map"]["AutoConfig"] == "vlm_lit_models_config.VLMConfig"
        card = (place / "hf/README.md").read_text()
        assert "pipeline_tag: image-text-to-text" in card and card.count("trust_remote_code=True") == 2
        again = export_folder("hf", "hf", place / "again")
        assert sorted(p.name for p in again.iterdir()) == sorted(
            p.name for p in out.parent.joinpath("hf").iterdir()
        )

def test_a_push_fails_in_one_line_and_keeps_the_export():
    import huggingface_hub
    from huggingface_hub import constants

    class FakeApi:
        "Keeps calls to the hub; fails with `error`."

        calls, error = [], None

        def create_repo(self, name, **kwargs):
            if self.error: raise self.error
            self.calls.append((name, kwargs))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{name.split('/')[-1]}")

        def upload_folder(self, **kwargs): self.calls.append(kwargs)

    online = patch.object(constants, "HF_HUB_OFFLINE", False)
    token = lambda value: patch.object(huggingface_hub, "get_token", lambda: value)
    with patch.object(constants, "HF_HUB_OFFLINE", True):
        with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set; unset it"):
            check_push("me/mine")
    with online, token(None), pytest.raises(ConfigError, match="or set HF_TOKEN"):
        check_push("me/mine")
    for wrong in ("a/b/c", "a b", "../up", ""):
        with pytest.raises(ConfigError, match="^--push: "): check_push(wrong)
    with online, token("hf_x"), patch.object(huggingface_hub, "HfApi", FakeApi):
        print(push_folder(Path("export-hf"), "mine", private=True))
        (name, created), uploaded = FakeApi.calls
        assert (name, created) == ("mine", {"private": True, "exist_ok": True})
        assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/mine", Path("export-hf"))
        unreachable = type("ConnectError", huggingface_hub.errors.HfHubHTTPError.__bases__[:1], {})
        for FakeApi.error in (OSError("403 Forbidden\nmore"), unreachable("no route")):
            with pytest.raises(ConfigError, match="try again with: hf upload me/mine") as found:
                push_folder(Path("export-hf"), "me/mine")
            print(textwrap.fill(str(found.value), 96))
            assert "\n" not in str(found.value)

def test_code_in_a_towers_folder_is_never_run():
    from vlm_lit.commands import _tower_config
    from vlm_lit.files import write_json

    with TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "config.json", {"model_type": "m", "auto_map": {"AutoConfig": "own.Own"}})
        (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Own: pass")
        with patch("builtins.input", lambda *_: "y"):  # the answer to transformers' question
            with expect_fail(ConfigError, contains="cannot be loaded: "):
                _tower_config(name, 336)
        assert not (folder / "ran").exists()
