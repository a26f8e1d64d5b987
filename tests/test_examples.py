"The examples: their scripts are what the notebooks say, and write what the recipes expect."

import importlib.util, json, re, sys
from pathlib import Path
import pytest, yaml
from vlm_lit.core import ConfigError
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.processor import VLMProcessor
from vlm_lit.text.tokenizer import adds_bos, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples/easy_vqa"

def load(path):
    "A script as a module."
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

@pytest.fixture(scope="module")
def script(): return load(FOLDER / "prepare.py")

@pytest.fixture(scope="module")
def data(script, tmp_path_factory):
    "The whole data set, written once."
    pytest.importorskip("easy_vqa")
    out = tmp_path_factory.mktemp("data") / "easy_vqa"
    script.prepare(out)
    return out

def test_scripts_are_what_their_notebooks_say():
    sys.path.insert(0, str(ROOT / "tools"))
    try: assert load(ROOT / "tools/examples.py").stale() == []
    finally: sys.path.remove(str(ROOT / "tools"))

def test_examples_use_public_names_only():
    for path in ROOT.glob("examples/*/*.py"):
        for names in re.findall(r"^from vlm_lit\S* import (.+)$", path.read_text(), re.M):
            assert not any(name.strip().startswith("_") for name in names.split(",")), (path, names)

def test_data_is_llava_records_with_images_and_types(data):
    counts = {"captions": 3542, "train": 38575, "test": 9673}
    records = {
        name: [json.loads(line) for line in (data / f"{name}.jsonl").open()] for name in counts
    }
    assert {name: len(own) for name, own in records.items()} == counts
    assert {r["type"] for r in records["test"]} == {"color", "shape", "yes_no"}
    assert records["captions"][0]["conversations"][1]["value"] == "a blue rectangle"
    assert {r["image"] for own in records.values() for r in own} <= {
        str(p.relative_to(data)) for p in data.glob("images/*/*.png")
    }

def test_tokenizer_is_small_adds_bos_and_keeps_texts(data):
    tokenizer = load_tokenizer(data / "tokenizer")
    assert adds_bos(tokenizer) and 300 < len(tokenizer) < 600
    assert tokenizer.convert_ids_to_tokens(range(6)) == [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<start_of_turn>",
        "<end_of_turn>",
    ]
    ds = LazySupervisedDataset(
        data / "test.jsonl", VLMProcessor(tokenizer, image_size=32, image_size_aux=64)
    )
    for i in range(0, 300, 7):
        item = ds[i]
        supervised = [k for k in item["labels"].tolist() if k >= 0]
        # a word, its end of turn, newline, EOS
        assert len(item["input_ids"]) <= 26 and len(supervised) == 4
        assert (
            tokenizer.decode(supervised)
            == ds.records[i]["conversations"][1]["value"] + "<end_of_turn>\n<eos>"
        )
    strange = "Größe 猫 \U0001f642\n\n x"
    assert tokenizer.decode(tokenizer(strange).input_ids, skip_special_tokens=True) == strange

def test_a_second_call_changes_nothing_and_foreign_folders_are_kept(
    script, data, tmp_path, monkeypatch
):
    before = {p: p.stat().st_mtime_ns for p in data.rglob("*")}
    facts = script.prepare(data)
    assert {p: p.stat().st_mtime_ns for p in data.rglob("*")} == before
    for recipe in sorted(FOLDER.glob("stage*.yaml")):
        model = yaml.safe_load(recipe.read_text())["model"]
        assert "from" in model or {key: model[key] for key in ("image_mean", "image_std")} == {
            key: facts[key] for key in ("image_mean", "image_std")
        }
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="no folder of this script"):
        script.prepare(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install easy-vqa"):
        script.prepare(tmp_path / "new")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="^prepare.py: the package easy-vqa is not installed"):
        script.main()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
