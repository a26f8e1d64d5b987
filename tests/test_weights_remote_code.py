"Derived from nbs/10h_remote_code.ipynb by `make tests`; edit the notebook, not this file."
import ast, re
from importlib.resources import files
from pathlib import Path
from vlm_lit import __version__
from vlm_lit.core import ConfigError
from vlm_lit.files import read_json, write_json, write_text
import json, os, subprocess, sys, tempfile, textwrap
from unittest.mock import patch
import torch
from fastcore.test import test_eq, expect_fail
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoProcessor, AutoTokenizer, CLIPVisionConfig, LlamaConfig, pipeline
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import sample_image
from vlm_lit.models.config import VLMConfig
from vlm_lit.models.vlm import VLM
from vlm_lit.processor import VLMProcessor
from vlm_lit.weights.language_models import quiet
from vlm_lit.weights.model_card import model_card
from vlm_lit.weights.presets import make_model, preset_config
from vlm_lit.weights.saving import load_model, save_model
from small_parts import TINY_TEXT, TINY_VISION, hushed, same, small_tokenizer
import vlm_lit.evaluation.generation
from vlm_lit.weights.remote_code import flat_source
from vlm_lit.weights.remote_code import module_source
from vlm_lit.weights.remote_code import needed_modules
from vlm_lit.weights.remote_code import own_imports
from vlm_lit.weights.remote_code import write_code

def setup_module():
    global MODELS, NEW, OUTSIDE, _, answers_of, card_code, mining_model, model, other, p, photo, plain_model, question, question_turn, run_outside, said_by, save, write_folders
    sys.path[:0] = ["../tests", "tests"]
    def mining_model():
        "A model of MGM's shape from scratch, and its processor."
        tokenizer = small_tokenizer()
        model = make_model(preset_config("tiny", tokenizer)).eval()
        return model, VLMProcessor.for_model(model.config, tokenizer)
    def plain_model():
        "A model of LLaVA's shape from scratch, and its processor."
        tokenizer = small_tokenizer()
        text = LlamaConfig(**{**TINY_TEXT, "vocab_size": len(tokenizer)})
        config = VLMConfig(text, CLIPVisionConfig(**TINY_VISION), image_size=28, select_layer=-2)
        return make_model(config).eval(), VLMProcessor.for_model(config, tokenizer, aspect="pad")
    def save(model, processor, folder):
        "A model folder as training leaves it."
        processor.set_generation_config(model)
        with hushed():
            save_model(model, folder)
            processor.save_pretrained(folder)
    MODELS = {"mining": mining_model(), "plain": plain_model()}
    for model, _ in MODELS.values():
        for p in model.language_model.parameters():
            p.data *= 3
    OUTSIDE = '''
import contextlib, io, json, sys
sys.modules["vlm_lit"] = None
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

trust, limit = dict(trust_remote_code=True), dict(max_new_tokens=8, do_sample=False)
image, question = Image.open("photo.png"), "what color is the shape?"
content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
messages, said = [{"role": "user", "content": content}], {}
for name in ("mining", "plain"):
    model = AutoModelForImageTextToText.from_pretrained(name, **trust)
    processor = AutoProcessor.from_pretrained(name, **trust)
    causal = AutoModelForCausalLM.from_pretrained(name, **trust)
    images = AutoImageProcessor.from_pretrained(name, **trust)
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
    inputs = processor.apply_chat_template(messages, return_tensors="pt", **options)
    with torch.no_grad(): logits = model(**inputs).logits
    with torch.no_grad(): assert torch.equal(logits, causal(**inputs).logits)
    pixels = images(image)["pixel_values"]
    assert torch.equal(pixels, inputs["pixel_values"])
    save_file({"logits": logits, "ids": inputs["input_ids"], "pixels": pixels}, name + ".st")
    new = model.generate(**inputs, **limit)[:, inputs["input_ids"].shape[1]:]
    pipe = pipeline("image-text-to-text", model=name, **trust)
    short = dict(max_new_tokens=8)  # the folder's generation_config is greedy
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    answers = [pipe(text=messages, return_full_text=False, **short)]
    answers += [pipe(images=image, text=text, return_full_text=False, **short)]
    answers += [pipe(images=image, text=f"<image> {question}", **short)]
    config = AutoConfig.from_pretrained(name, **trust)
    made = [type(x).__module__ for x in (config, model, processor, images)]
    said[name] = [processor.answers(new), [a[0]["generated_text"] for a in answers], made]
    model.save_pretrained(name + "-again")  # transformers takes the code along
    again = AutoModelForCausalLM.from_pretrained(name + "-again", **trust)
    with torch.no_grad(): assert torch.equal(logits, again(**inputs).logits)
errors = []
for auto in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):
    try: auto.from_pretrained(name, trust_remote_code=False)
    except ValueError as e: errors.append(str(e))
newer = AutoModelForCausalLM.from_pretrained("newer", **trust)
said["newer"] = [getattr(x, "is_newer", False) for x in (causal, newer)]
with contextlib.redirect_stdout(io.StringIO()) as out: exec(open("card.py").read(), {})
said["card"] = out.getvalue()[:-1]
assert not [m for m in sys.modules if m.startswith("vlm_lit.")]
print(json.dumps([said, errors]))
'''
    def run_outside(folder):
        "What a process without this package says of models; it runs in their folder."
        env = {**os.environ, "HF_MODULES_CACHE": f"{folder}/modules", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", OUTSIDE]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])
    photo, question = sample_image(64, 48), "what color is the shape?"
    def question_turn(text=question, image=photo):
        "A message with an image."
        parts = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        return [{"role": "user", "content": parts}]
    def card_code(model):
        "The code of transformers in a model card."
        card = model_card(model, opens_with="transformers")
        return re.findall("```python\n(.*?)```", card, re.DOTALL)[-1]
    def write_folders(folder):
        "The models with their code, one of them changed, and the code of a model card."
        photo.save(folder / "photo.png")
        photo.save(folder / "image.png")
        places = {"mining": "mining", "plain": "plain", "newer": "plain"}
        for place, name in {**places, "path/to/this/folder": "mining"}.items():
            save(*MODELS[name], folder / place)
            write_code(folder / place)
        path = folder / "newer/vlm_lit_models_vlm.py"
        path.write_text(path.read_text() + "\nVLM.is_newer = True\n")
        (folder / "card.py").write_text(card_code(MODELS["mining"][0]))
    def answers_of(name, questions=(question,), images=(photo,), n=8):
        "What `generate` of one of the models answers."
        model, processor = MODELS[name]
        inputs = processor(list(questions), list(images))
        return processor.answers(model.generate(**inputs, max_new_tokens=n), inputs)
    def said_by(found):
        "Texts of what a pipeline returns."
        outputs = [out[0] if isinstance(out, list) else out for out in found]
        return [out["generated_text"].strip() for out in outputs]
    NEW = dict(return_full_text=False, max_new_tokens=8)
    other = sample_image(40, 70)

def test_imports_inside_functions_are_found():
    source = "def f():\n    from ..core import peek\nfrom os import path"
    with Breakpoint(own_imports, at="if package == PACKAGE", watch="node.level package rest") as bp:
        own_imports(source, "text.labels")
    bp.expect_each(package=["os", "vlm_lit"], rest=[[], ["core"]])

def test_registrations_are_left_out():
    watch = ["lines[node.lineno - 1]"]
    at = "lines[node.lineno - 1 : node.end_lineno]"
    with Breakpoint(flat_source, at=at, watch=watch) as bp:
        copy = flat_source("models.vlm")
    assert ".register(VLMConfig" in module_source("models.vlm")
    assert ".register(VLMConfig" not in copy
    bp.expect({watch[0]: lambda line: line.startswith("AutoConfig.register")}, hits=4)
    bp.expect_after({watch[0]: ""})

def test_only_what_a_model_needs_goes_along():
    names = needed_modules()
    assert {"core", "models.vlm", "models.mining", "processor", "text.labels"} <= {*names}
    rooms = {name.split(".")[0] for name in names}
    test_eq(rooms & {"training", "data", "weights", "evaluation", "commands", "cli"}, set())
    found = own_imports("def f():\n    from ..core import peek\nfrom os import path", "text.labels")
    test_eq([name for _, name in found], ["core"])
    for statement, names in {
        "from vlm_lit.text.jinja import x": ["text.jinja"],
        "from . import jinja": ["text.jinja"],
        "from . import jinja, labels as own": ["text.jinja", "text.labels"],
        "from vlm_lit import core": ["core"],
        "from .. import core, __version__": ["core", "__init__"],
        "from ..models import *": ["models.__init__"],
        "import os, vlm_lit.core as own": ["core"],
        "import vlm_lit": ["__init__"],
        "from .gone import x": ["text.gone"],
        "import vlm_lit_other, json": [],
    }.items():
        test_eq([name for _, name in own_imports(statement, "text.labels")], names)

def test_copies_differ_in_imports_and_registrations_only():
    def rest(source):
        "A syntax tree without imports and registrations."
        tree = ast.parse(source)
        tree.body = [node for node in tree.body if not is_registration(node)]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom): node.module, node.level = "", 0
        return ast.dump(tree)

    def is_registration(node):
        text = ast.unparse(node)
        return ".register(" in text and ("VLMConfig" in text or "VLMProcessor" in text)

    for name in needed_modules():
        copy = flat_source(name)
        test_eq(rest(copy), rest(module_source(name)))
        assert copy.startswith(f"# vlm_lit {__version__}: {name}. ") and "Apache-2.0\n" in copy[:100]
        imported = [n for n in ast.walk(ast.parse(copy)) if isinstance(n, ast.ImportFrom)]
        assert not any(n.level == 0 and n.module.startswith("vlm_lit") for n in imported), name
        test_eq({n.level for n in imported} - {0, 1}, set())
    assert ".register(VLMConfig" not in flat_source("models.vlm")
    assert "AutoModel.register(EfficientNetLiteConfig" in flat_source("models.towers")

def test_a_module_that_is_imported_whole_is_refused():
    wholes = ["from . import jinja", "from .. import core", "import vlm_lit.core", "import vlm_lit"]
    for statement in wholes:
        text = f"x = 1\n{statement}"
        with patch.dict(flat_source.__globals__, module_source=lambda module: text):
            with expect_fail(ConfigError, contains="text.labels, line 2: transformers does not copy"):
                flat_source("text.labels")

def test_nothing_of_a_model_becomes_code():
    written = []
    for model, processor in MODELS.values():
        with tempfile.TemporaryDirectory() as folder:
            own = getattr(model.config, "parts", None)
            model.config.parts = {**(own or {}), "license": "x\nimport os"}
            save(model, processor, folder)
            model.config.parts = own
            old = Path(folder) / "vlm_lit_of_an_older_version.py"
            old.write_text("raise SystemExit")
            paths = write_code(folder)
            assert not old.exists()
            written.append({path.name: path.read_text() for path in paths})
            test_eq(written[-1].keys(), {path.name for path in Path(folder).glob("*.py")})
            test_eq(write_code(folder), paths)  # a second time changes nothing
            test_eq({path.name: path.read_text() for path in paths}, written[-1])
    test_eq(written[0], written[1])
    with tempfile.TemporaryDirectory() as folder:
        with expect_fail(ConfigError, contains="config.json is missing"):
            write_code(folder)
        test_eq([*Path(folder).iterdir()], [])

def test_a_process_without_the_package_computes_the_same():
    with tempfile.TemporaryDirectory() as folder:
        write_folders(Path(folder))
        said, errors = run_outside(folder)
        for name, (model, processor) in MODELS.items():
            inputs, theirs = processor(question, photo), load_file(f"{folder}/{name}.st")
            with torch.no_grad(): logits = model(**inputs).logits
            assert torch.equal(theirs["logits"], logits)
            test_eq(theirs["ids"].tolist(), inputs["input_ids"].tolist())
            assert torch.equal(theirs["pixels"], inputs["pixel_values"])
            answers, piped, made = said[name]
            test_eq(answers, answers_of(name))
            test_eq([text.strip() for text in piped[:2]], answers * 2)
            assert question in piped[2] and len(piped[2]) > len(question) + 8
            assert all(module.startswith("transformers_modules.") for module in made), made
        test_eq(said["newer"], [False, True])
        model, processor = MODELS["mining"]
        inputs = processor("What is in the image?", photo)
        new = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
        test_eq(said["card"], processor.batch_decode(new, skip_special_tokens=True)[0])
    test_eq(len(errors), 3)
    for error in errors: assert "trust_remote_code=True" in error
    card = ModelCard(model_card(MODELS["plain"][0], opens_with="transformers"))
    test_eq(card.data.pipeline_tag, "image-text-to-text")
    test_eq(card_code(MODELS["plain"][0]).count("trust_remote_code=True"), 2)

def test_registered_classes_come_first():
    for name, (model, processor) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder, hushed():
            save(model, processor, folder)
            write_code(folder)
            for trust in ({}, {"trust_remote_code": True}):
                opened = AutoModelForImageTextToText.from_pretrained(folder, **trust)
                own = AutoProcessor.from_pretrained(folder, **trust)
                images = AutoImageProcessor.from_pretrained(folder, **trust)
                assert type(opened) is VLM and type(own) is VLMProcessor and same(opened, model)
                test_eq(type(images), type(processor.image_processor))
            loaded = load_model(folder)
            assert same(loaded, model)
            save(loaded, processor, f"{folder}/again")
            assert "auto_map" not in read_json(Path(folder) / "again/config.json")

def test_pipelines_answer_as_generate_does():
    for name, (model, processor) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder, hushed(), quiet():
            save(model, processor, folder)
            pipe = pipeline("image-text-to-text", model=folder)
            test_eq(said_by(pipe(text=question_turn(), **NEW)), answers_of(name))
            two = pipe(text=question_turn(), **{**NEW, "max_new_tokens": 2})
            test_eq(said_by(two), answers_of(name, n=2))
            [whole] = pipe(text=question_turn(), max_new_tokens=8)
            test_eq(whole["generated_text"][-1]["content"].strip(), answers_of(name)[0])
            turns = [question_turn(), question_turn("blue?", other)]
            wanted = answers_of(name, [question, "blue?"], [photo, other])
            for size in (1, 2):
                test_eq(said_by(pipe(text=turns, batch_size=size, **NEW)), wanted)
            prompts = [processor.apply_chat_template(t, add_generation_prompt=True) for t in turns]
            test_eq(said_by(pipe(images=[photo, other], text=prompts, **NEW)), wanted)

def test_text_pipelines_write_without_images():
    for name, (model, processor) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder, hushed():
            save(model, processor, folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
            causal = AutoModelForCausalLM.from_pretrained(folder)
            pipe = pipeline("text-generation", model=causal, tokenizer=tokenizer)
            plain = dict(NEW, do_sample=False)  # this pipeline samples unless it is told not to
            turns = [[{"role": "user", "content": text}] for text in (question, "blue?")]
            [alone] = answers_of(name, images=[None])
            for own in (pipe, pipeline("text-generation", model=folder)):
                test_eq(said_by(own(turns[0], **plain)), [alone])
            wanted = answers_of(name, [question, "blue?"], [None, None])
            test_eq(said_by(pipe(turns, batch_size=2, **plain)), wanted)
            inputs = tokenizer("a blue", return_tensors="pt")
            new = model.generate(**inputs, max_new_tokens=8)[0, inputs.input_ids.shape[1] :]
            wanted = tokenizer.decode(new, skip_special_tokens=True)
            test_eq(said_by(pipe("a blue", **plain)), [wanted.strip()])
