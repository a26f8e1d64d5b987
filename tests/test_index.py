"Derived from nbs/index.ipynb by `make tests`; edit the notebook, not this file."
import json, tempfile
from pathlib import Path
from fastcore.test import test_eq

def setup_module():
    global results, root
    root = next(p for p in (Path(".."), Path(".")) if (p / "benchmarks/results").is_dir())
    results = root / "benchmarks/results"

def test_the_picture_of_the_readme():
    from vlm_lit import Breakpoint, LazySupervisedDataset, VLMProcessor, load_tokenizer, preprocess
    from vlm_lit.images import sample_image

    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder / "photo.png")
    question = {"from": "human", "value": "What is in the photo?\n<image>"}
    answer = {"from": "gpt", "value": "the box chain purse black"}
    record = {"id": "seed", "image": "photo.png", "conversations": [question, answer]}
    ds = LazySupervisedDataset([record], VLMProcessor(load_tokenizer("gemma")), folder)
    with Breakpoint(preprocess, at='return {"input_ids"', watch="input_ids[0] labels[0]") as bp:
        ds[0]
    bp.expect({"labels[0]": [-100] * 17 + [1175, 3741, 9488, 45189, 2656, 107, 108, 1]})

def test_commands_of_the_readme_exist():
    import shlex
    from typer.main import get_command
    from vlm_lit.cli import app

    commands = get_command(app).commands
    cells = json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    lines = [line for part in text.split("```sh\n")[1:] for line in part.split("```")[0].splitlines()]
    lines = [shlex.split(line, comments=True) for line in lines if line.startswith("vlm-lit")]
    for _, name, *words in lines:
        known = {option for p in commands[name].params for option in p.opts + p.secondary_opts}
        unknown = {w for w in words if w.startswith("-") and "." not in w} - known
        assert not unknown, f"vlm-lit {name}: {unknown}"
    test_eq(set(commands), {line[1] for line in lines})
