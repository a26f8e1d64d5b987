"""What holds for the project as a whole: layers, dependencies, the seed's values, the wheel's
contents."""

import ast, importlib, json, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest
from vlm_lit.data.collator import DataCollatorForSupervisedDataset
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.images import sample_image
from vlm_lit.processor import VLMProcessor
from vlm_lit.text.labels import fill_template, preprocess
from vlm_lit.text.sentinels import preprocess_multimodal, tokenizer_image_token
from vlm_lit.text.templates import render
from vlm_lit.text.tokenizer import load_tokenizer, special_tokens

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import build

def numbered():
    "The notebooks that export a module, in order."
    return sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))

def test_notebooks_import_only_earlier_modules():
    earlier = {"debug.breakpoints"}  # the instrument: a stop may stand anywhere
    main = [nb for nb in numbered() if not nb.name.startswith("9")]
    for nb in numbered():  # what an appendix exports may be used anywhere
        if nb in main: continue
        earlier.add(re.search(r"#\|\s*default_exp ([\w.]+)", "\n".join(build.code_cells(nb)))[1])
    for nb in main:
        code = "\n".join(build.code_cells(nb))
        module = re.search(r"#\|\s*default_exp ([\w.]+)", code)[1]
        earlier |= {module, module.split(".")[0]}  # its own names, and those of its room
        later = set(re.findall(r"^\s*from vlm_lit\.([\w.]+) import", code, re.M)) - earlier
        assert not later, f"{nb.name} reaches forward to {sorted(later)}"
    assert {
        "core",
        "debug.breakpoints",
        "text.labels",
        "models.vlm",
        "training.trainer",
        "cli",
    } <= earlier

MAY_IMPORT = {  # room -> rooms that it may import; arrows run downward only
    "core": "",
    "files": "core",
    "hub": "",
    "debug": "core",
    "text": "core hub debug",
    "image_files": "core",
    "images": "core text image_files",
    "resize": "core images",
    "image_processor": "core images resize",
    "padding": "core",
    "processor": "core text images image_processor padding",
    "data": "core files hub debug text image_files images padding processor",
    "models": "core images image_processor padding processor",
    "weights": "core files hub text processor models",
    "evaluation": "core files text image_processor processor padding data models weights",
    "training": "core files debug text padding processor data models weights evaluation",
    "walk": "core debug text data",
    "reports": "core text evaluation",
    "commands": (
        "core files hub text images processor data models weights training evaluation walk reports"
    ),
    "cli": (
        "core text images processor data models weights training evaluation walk reports commands"
    ),
    "__main__": "cli",
}

def imports_of(module):
    "Modules of the package that a module imports by itself, also inside functions."
    path = ROOT / "vlm_lit" / (module.replace(".", "/") + ".py")
    found, home = set(), ["vlm_lit", *module.split(".")]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom): continue
        base = home[: -node.level] if node.level else []
        parts = [*base, *(node.module or "").split(".")]
        if parts[0] == "vlm_lit" and parts[1:]:
            found.add(".".join(filter(None, parts[1:])))
    return found - {""}

def modules():
    "Names of all modules."
    paths = sorted((ROOT / "vlm_lit").rglob("*.py"))
    names = [".".join(p.relative_to(ROOT / "vlm_lit").with_suffix("").parts) for p in paths]
    return [name for name in names if name != "_modidx" and not name.endswith("__init__")]

def test_rooms_import_downward_only():
    rooms = [name.split(".")[0] for name in modules()]
    assert set(rooms) == set(MAY_IMPORT), "a room is missing in the table, or gone"
    order = list(MAY_IMPORT)
    for room, allowed in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(room) for other in allowed.split()), room
    for module in modules():
        room = module.split(".")[0]
        other = {name.split(".")[0] for name in imports_of(module)} - {room}
        forbidden = other - set(MAY_IMPORT[room].split())
        assert not forbidden, f"{module} imports from {sorted(forbidden)}"
    # a library's file is not ours: the check sees what it should
    assert "core" in imports_of("training.trainer")
    assert "files" in imports_of("weights.language_models")

def test_module_is_run_like_the_command_and_ctrl_c_leaves_no_traceback(monkeypatch):
    words = [sys.executable, "-m", "vlm_lit", "audit", "-h"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "vlm_lit audit [OPTIONS]" in shown and "--image-folder" in shown
    import vlm_lit.cli
    from vlm_lit.__main__ import main

    def interrupted(): raise KeyboardInterrupt

    monkeypatch.setattr(vlm_lit.cli, "main", interrupted)
    with pytest.raises(SystemExit, match="130"): main()

def test_what_other_modules_import_is_exported():
    found = set()
    for module in modules():
        path = ROOT / "vlm_lit" / (module.replace(".", "/") + ".py")
        home = ["vlm_lit", *module.split(".")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom): continue
            parts = [*(home[: -node.level] if node.level else []), *(node.module or "").split(".")]
            if parts[0] == "vlm_lit" and len(parts) > 1 and parts[1] != "_modidx":
                found |= {(".".join(filter(None, parts)), alias.name) for alias in node.names}
    hidden = {
        (module, name)
        for module, name in found
        if not name.startswith("_") and module not in ("vlm_lit", "vlm_lit.cli")
        if name not in importlib.import_module(module).__all__
    }
    assert not hidden, f"#| exporti, and imported elsewhere: {sorted(hidden)}"
    assert ("vlm_lit.data.record_files", "scan_records") in found

def test_public_names_load_lazily():
    code = (
        "import sys, vlm_lit\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert vlm_lit.IGNORE_INDEX == -100 and 'torch' not in sys.modules\n"
        "for name in vlm_lit.__all__: getattr(vlm_lit, name)\n"
        "from vlm_lit import train, evaluate, audit, replay\n"
        "assert all(map(callable, (train, evaluate, audit, replay)))\n"
        "assert 'matplotlib' not in sys.modules\n"
        "try: vlm_lit.nothing\n"
        "except AttributeError as e: assert 'nothing' in str(e)\n"
        "else: raise SystemExit('a name that is not there was found')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

def test_package_imports_no_development_tools():
    for path in (ROOT / "vlm_lit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom): names = [node.module or ""]
            assert not {n.split(".")[0] for n in names} & {
                "nbdev",
                "fastcore",
                "torchvision",
                "pytest",
                "hypothesis",
                "pickle",
            }, f"{path.name}: {names}"

def test_notebooks_narrate_and_test():
    for nb in build.notebooks():
        cells = json.loads(nb.read_text(encoding="utf-8"))["cells"]
        code = build.code_cells(nb)
        words = sum(
            len("".join(c["source"]).split()) for c in cells if c["cell_type"] == "markdown"
        )
        assert words / len(code) >= 8, f"{nb.name}: {words} words for {len(code)} code cells"
        assert any("test" in build.directives(c) for c in code), f"{nb.name} has no test"

def test_every_public_function_has_a_docstring():
    for path in (ROOT / "vlm_lit").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name[0] == "_":
                continue
            assert ast.get_docstring(node), f"{path.name}: {node.name}"

def imported_packages(nodes):
    "Packages that import statements name, ours and the standard library's left out."
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    found -= {*sys.stdlib_module_names, "vlm_lit"}
    known_as = {"PIL": "pillow", "yaml": "pyyaml", "lmms_eval": "lmms-eval"}
    return {known_as.get(name, name) for name in found}

def test_requirements_are_imported_and_imports_required():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    names = lambda text: {re.split(r"[<>=]", r)[0] for r in text.split()}
    required = names(config["DEFAULT"]["requirements"])
    extras = names(
        " ".join(text for key, text in config["DEFAULT"].items() if key.startswith("extra_"))
    )
    trees = [
        ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "vlm_lit").rglob("*.py")
    ]
    at_import = imported_packages(node for tree in trees for node in tree.body)
    anywhere = imported_packages(node for tree in trees for node in ast.walk(tree))
    assert at_import <= required, f"imported but not required: {at_import - required}"
    lazily = anywhere - required - extras
    assert not lazily, f"imported in a function, but neither required nor an extra: {lazily}"
    # tokenizers is held to a version; jinja2 is what transformers renders chat templates with
    assert required - anywhere <= {"tokenizers", "jinja2"}, f"not imported: {required - anywhere}"

def test_package_names_no_example():
    "easy-VQA is one data set among others: the package does not know it."
    named = re.compile(r"easy.?vqa", re.IGNORECASE)
    files = [p for p in (ROOT / "vlm_lit").rglob("*") if p.suffix in (".py", ".json", ".yaml")]
    assert any(p.parent.name == "presets" for p in files)
    hits = [str(p.relative_to(ROOT)) for p in files if named.search(p.read_text(encoding="utf-8"))]
    assert not hits, f"easy-VQA is named in {hits}"

@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    "The seed's values, and its record as a dataset."
    values = json.loads((ROOT / "tests/worked_example.json").read_text(encoding="utf-8"))
    folder = tmp_path_factory.mktemp("images")
    sample_image().save(folder / "photo.png")
    record = {**values["record"], "id": "seed", "image": "photo.png"}
    return values, LazySupervisedDataset([record], VLMProcessor(load_tokenizer("gemma")), folder)

def test_every_value_of_the_worked_example(seed):
    values, ds = seed
    with (
        Breakpoint(LazySupervisedDataset.__getitem__, at="data = self.texts([i])[0]") as first,
        Breakpoint(preprocess_multimodal, at="return moved") as tags,
        Breakpoint(fill_template, at="roles = {") as empty,
        Breakpoint(fill_template, at="source = drop_greeting") as who,
        Breakpoint(fill_template, at="return conv") as full,
        Breakpoint(render, at="return Rendered") as text,
        Breakpoint(tokenizer_image_token, at="input_ids = insert_separator") as chunks,
        Breakpoint(preprocess, at='return {"input_ids"') as done,
    ):
        item = ds[0]
    tok = values["tokenizer"]
    assert {role: id for role, (_, id) in special_tokens(ds.tokenizer).items()} == {
        role: tok[role] for role in ("bos", "eos", "unk", "pad")
    }
    assert len(ds.tokenizer) == tok["vocab_size"]
    assert ds.tokenizer.convert_tokens_to_ids(["<start_of_turn>", "<end_of_turn>", "\n"]) == [
        tok["start_of_turn"],
        tok["end_of_turn"],
        tok["newline"],
    ]
    assert list(first["image_aux"][0].shape) == values["image_shape_after_processor"]
    assert tags["moved"] == values["after_preprocess_multimodal"]
    assert repr(empty["conv"]) == values["conversation_repr_before_messages"]
    assert who["roles"] == values["roles"]
    assert repr(full["conv"]) == values["conversation_repr_with_messages"]
    assert text["text"] == values["prompt"]
    assert chunks["prompt_chunks"] == values["prompt_chunks"]
    assert done["input_ids"][0].tolist() == values["input_ids"]
    assert done["labels"][0].tolist() == values["labels"]
    batch = DataCollatorForSupervisedDataset(ds.tokenizer.pad_token_id)([item])
    assert list(batch["input_ids"].shape) == values["input_ids_batch_shape"]
    assert (
        ds.tokenizer(values["answer_tokenized_alone"]["text"]).input_ids
        == values["answer_tokenized_alone"]["input_ids"]
    )
    assert list(item["image"].shape) == values["image_shape_after_interpolation"]
    assert list(item["image_aux"].shape) == values["image_aux_shape"]

def test_console_script_explains_itself():
    script = Path(sys.executable).with_name("vlm-lit")
    commands = (
        "walk audit plan train generate chat eval export doctor replay losses convert".split()
    )
    for command in ([], *([name] for name in commands)):
        done = subprocess.run([script, *command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "Usage: vlm-lit" in done.stdout, done.stderr
    wrong = subprocess.run([script, "walk", "gone.json"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.strip() == "error: no data file 'gone.json'"
    assert not wrong.stdout

def test_training_step_agrees_with_its_peers():
    """Losses and gradients of the reference algorithm, of transformers' LLaVA and of this project,
    on the same weights and batch."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/train_step.py", "--check", "--threads", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
