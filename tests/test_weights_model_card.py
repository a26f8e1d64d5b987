"Derived from nbs/10da_model_card.ipynb by `make tests`; edit the notebook, not this file."
import json, re
from pathlib import Path
import yaml
from huggingface_hub import ModelCardData
from vlm_lit.core import ConfigError
from vlm_lit.files import named_folders, read_json
from vlm_lit.models.vlm import VLM
from vlm_lit.weights.presets import PARTS, is_scratch
import copy, sys, tempfile
from fastcore.test import test_eq, expect_fail
from huggingface_hub import ModelCard
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.files import write_json, write_text
from vlm_lit.processor import VLMProcessor
from vlm_lit.weights.presets import make_model, preset_config
from small_parts import mgm_models, small_tokenizer
from vlm_lit.weights.model_card import OPENS_WITH
from vlm_lit.weights.model_card import _is_hub_name
from vlm_lit.weights.model_card import _table
from vlm_lit.weights.model_card import escape_markdown
from vlm_lit.weights.model_card import model_card
from vlm_lit.weights.model_card import read_card
from vlm_lit.weights.model_card import read_run

def setup_module():
    global LLAVA_7B, MGM_2B, ODD, TINY, write_runs
    sys.path[:0] = ["../tests", "tests"]
    MGM_2B, LLAVA_7B = mgm_models()
    TINY = make_model(preset_config("tiny", small_tokenizer()))
    ODD = "x\n---\nlicense: mit"
    def write_runs(folder):
        "Two stages as runs leave them, the second with odd names in its data."
        for name, start, sources in [
            ("stage1", {"preset": "mgm-2b"}, [{"path": "caps.json", "license": "cc-by-4.0"}]),
            ("stage2", {"from": f"{folder}/stage1"}, [{"path": "a.json", "name": ODD}, {"path": "b"}]),
        ]:
            run = Path(folder) / name
            run.mkdir()
            data = {"train": sources, "max_length": 512}
            training = {"learning_rate": 1e-3, "max_steps": -1, "trainable_modules": ["projector"]}
            recipe = {"model": start, "data": data, "training": training, "lora": None}
            write_text(run / "recipe.yaml", yaml.safe_dump(recipe))
            records = {f"{k}": f"{k + 2} records, checksum 1a2b" for k in range(len(sources))}
            write_json(run / "data.json", records)
            found = {"loss": 1.25, "n": 40, "exact": 0.5, "exact_by_type": {"<b>": 0.25, "color": 0.75}}
            write_json(run / "result.json", {"steps": 9, "loss": 1.5, "validation": found})
        scores = {"exact": {"all": 0.6, "color": 0.6}}
        guess = {"majority": {"exact": {"all": 0.2, "color": 0.2}}}
        found = {"n": 80, "n_by_type": {"color": 80}, "metrics": scores, "baselines": guess}
        write_json(run / "eval-test.json", {**found, "skipped": []})
        return run

def test_a_name_is_one_line():
    odd = "x\n---\nlicense: mit"
    with Breakpoint(escape_markdown, at="return re.sub", watch="text line", set={"line": odd}) as bp:
        escape_markdown(odd)
    bp.expect(line="x --- license: mit")
    bp.expect_changed(result=(r"x --- license\: mit", "x\n---\nlicense\\: mit"))

def test_a_hostile_name_stays_text_in_the_card():
    with tempfile.TemporaryDirectory() as folder:
        runs = read_run(write_runs(folder))
    for opens_with in OPENS_WITH:
        card = model_card(MGM_2B, runs, opens_with)
        found = ModelCard(card)
        test_eq(found.data.license, "gemma")
        test_eq(card.count("\n---\n"), 1)
        assert r"| x --- license\: mit | 2 | not given |" in found.text
        assert r"type \<b\> | 0.25" in card and "<b>" not in card
        assert "| exact, baseline majority | 0.2 | 0.2 |" in card
        assert "| caps.json | 2 | cc-by-4.0 |" in card and "learning\\_rate | 0.001" in card
        assert card.index("Stage 1: stage1") < card.index("Stage 2: stage2")
        assert folder not in card

def test_head_promises_what_the_folder_keeps():
    card = lambda *args, **kw: ModelCard(model_card(*args, **kw))
    plain = card(TINY)
    test_eq((plain.data.license, plain.data.library_name), ("apache-2.0", "vlm_lit"))
    test_eq((plain.data.pipeline_tag, plain.data.base_model, plain.data.datasets), (None, None, None))
    assert "from scratch" in plain.text and "No evaluation is recorded" in plain.text
    assert "transformers" not in plain.text and "## Training" not in plain.text
    code = card(LLAVA_7B, opens_with="llava-hf")
    test_eq((code.data.license, code.data.pipeline_tag), ("llama2", "image-text-to-text"))
    assert "lmsys/vicuna-7b-v1.5" in code.data.base_model
    assert "trust_remote_code" not in code.text and "vlm_lit import" not in code.text
    both = card(MGM_2B, opens_with="transformers", name="me/mine").text
    assert 'from_pretrained("me/mine", trust_remote_code=True)' in both
    assert 'snapshot_download("me/mine")' in both and "# me/mine" in both
    sources = [{"path": "a.json", "name": "owner/set", "license": "mit"}, {"path": "own/b.json"}]
    run = {"name": "r", "recipe": {"data": {"train": sources}}}
    test_eq(card(TINY, [run]).data.datasets, ["owner/set"])
    for license in ("mit\n---\nlicense: x", "Gemma Terms", None, 3):
        model = copy.copy(TINY)
        model.config = copy.deepcopy(TINY.config)
        model.config.parts["license"] = license
        test_eq(card(model).data.license, "other")
    with expect_fail(ConfigError, contains="opens_with must be one of"):
        model_card(TINY, (), "onnx")

def test_text_of_data_is_escaped():
    for text in ("x\n---\nlicense: mit", "[a](b) | <img src=x>", "a\u2028# b\x1b[2J\u202e"):
        print(escape_markdown(text))
    test_eq(escape_markdown("x\n---\nlicense: mit"), r"x --- license\: mit")
    test_eq(escape_markdown("[a](b) | <i>"), r"\[a\](b) \| \<i\>")
    test_eq(escape_markdown("a\u2028# b\x1b\u202e"), r"a \# b")
    test_eq(_table(["a", "b"], [["1", ""], ["2", ""]]), ["| a |", "| --- |", "| 1 |", "| 2 |", ""])
    assert _is_hub_name("openai/clip-vit-large-patch14-336")
    assert not any(map(_is_hub_name, ("gemma", "a/b/c", "a/b\n", "../b", {"config": {}}, None)))

def test_a_card_written_again_keeps_what_is_from_the_run():
    with tempfile.TemporaryDirectory() as folder:
        runs = read_run(write_runs(folder))
        runs[1]["recipe"]["data"]["train"][0]["name"] = "owner/set"
        first = model_card(MGM_2B, runs, "transformers")
        write_text(Path(folder) / "README.md", first)
        earlier = read_card(folder)
        test_eq(model_card(MGM_2B, (), "transformers", earlier=earlier), first)
        assert "had at most 512 tokens" in first and "some training data is not given" in first
        again = ModelCard(model_card(MGM_2B, earlier=earlier, name="me/mine"))
        test_eq((again.data.datasets, again.text.split("\n")[1]), (["owner/set"], "# me/mine"))
        for head in (
            "datasets: [",
            "datasets: x",
            "datasets:\n- {a: b}\n- ../x\n- |\n  a/b\n  c",
            "- 1",
        ):
            write_text(Path(folder) / "README.md", f"---\n{head}\n---\n{first}")
            assert ModelCard(model_card(TINY, earlier=read_card(folder))).data.datasets is None
        write_text(Path(folder) / "README.md", "# Mine\n\nmade with vlm_lit")
        test_eq(read_card(folder), {"title": ["Mine"], "datasets": []})

def test_runs_are_read_with_the_stages_before_them():
    with tempfile.TemporaryDirectory() as folder:
        runs = read_run(write_runs(folder))
        print([run["name"] for run in runs], runs[1]["records"], list(runs[0]["evaluations"]))
        test_eq([run["name"] for run in runs], ["stage2", "stage1"])
        test_eq((list(runs[0]["evaluations"]), runs[1]["evaluations"]), (["eval-test"], {}))
        (Path(folder) / "stage1/result.json").unlink()
        test_eq(read_run(Path(folder) / "stage1")[0]["result"], {})
        write_text(Path(folder) / "stage1/recipe.yaml", "model: {from: " + f"{folder}/stage1" + "}")
        test_eq(len(read_run(Path(folder) / "stage1")), 1)  # a run that names itself
        test_eq(read_run(folder)[0]["recipe"], {})
        for text in ("a: [", "- a"):
            write_text(Path(folder) / "stage1/recipe.yaml", text)
            with expect_fail(ConfigError, contains="recipe.yaml"):
                read_run(Path(folder) / "stage1")
