"Derived from nbs/21_cli.ipynb by `make tests`; edit the notebook, not this file."
import json, os, sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
import typer
from typer import Argument, BadParameter, Option
from typer.core import TyperGroup
from vlm_lit import __version__
from vlm_lit.commands import CHAT_HELP, check_out, example_record, export_folder, image_files, load
from vlm_lit.commands import check_push, echo, load_preparation, open_records, print_conversion
from vlm_lit.commands import print_status, push_folder
from vlm_lit.commands import RECIPE_FLAGS, recipe_overrides, report_found, run_folder, set_flags
from vlm_lit.commands import split_words, talk, train_run, user_errors
from vlm_lit.commands import write_answers, write_page
from vlm_lit.core import ConfigError, DataError, printable, progress_console
import re, shlex, subprocess, textwrap
from tempfile import mkdtemp
from types import SimpleNamespace
from unittest.mock import patch
import pyarrow as pa, pyarrow.parquet as pq, torch, yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner
from vlm_lit.commands import NO_ANSWER
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.processor import VLMProcessor
from vlm_lit.images import sample_image
from vlm_lit.models.config import VLMConfig
from vlm_lit.weights.presets import make_model
from vlm_lit.weights.saving import save_model
from vlm_lit.cli import app
from vlm_lit.cli import audit_data
from vlm_lit.cli import convert_data
from vlm_lit.cli import train

def setup_module():
    global TRAIN, good, place, refuses, result, run, runner, show, small_model, small_tokenizer, train_records, turns, write
    torch.set_num_threads(1)
    def small_tokenizer():
        "A byte-level tokenizer with Gemma's control tokens."
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        special = "<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn>".split()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, show_progress=False, initial_alphabet=alphabet
        )
        tok.train_from_iterator(["user\nmodel\nWhat is it?\na box"], trainer)
        tok.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
        )
        named = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad")}
        return PreTrainedTokenizerFast(tokenizer_object=tok, **named)
    def small_model(folder):
        "Two towers, mining, projector and decoder, with their processor."
        tokenizer = small_tokenizer()
        text = dict(
            model_type="gemma",
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=64,
        )
        vision = dict(
            model_type="clip_vision_model",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        aux = dict(
            model_type="convnext", num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=2
        )
        config = VLMConfig(text, vision, aux, image_size=16, image_size_aux=32, select_layer=-1)
        model, processor = make_model(config, 0), VLMProcessor.for_model(config, tokenizer)
        batch = processor([good, turns("Hello", "Hi")], [sample_image(), None])
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(40):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        save_model(model.eval(), folder)
        processor.save_pretrained(folder)
        tokenizer.save_pretrained(folder.parents[2] / "tokenizer")
    def turns(*texts):
        return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    def write(name, content):
        "A file for the commands."
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path
    place, runner = Path(mkdtemp()), CliRunner()
    good = turns("<image>\nWhat is it?", "a box")
    train_records = [{"id": n, "image": "images/photo.png", "conversations": good} for n in range(3)]
    write("train.json", [*train_records, {"id": 3, "conversations": turns("Hello", "Hi")}])
    write("val.json", [{**r, "type": "object"} for r in train_records[:2]])
    write("my.py", "def length(prediction, answer, record): return len(prediction)")
    write("rows.csv", "q,a,hint\nWhat?,a box,look left\nWho?,,\n")
    write("images/broken.png", "not an image")
    sample_image().save(place / "images/photo.png")
    sample_image(300, 300).save(place / "images/square.png")
    small_model(place / "runs/mine/model")
    result = {"steps": 600, "loss": 0.1234, "train_seconds": 51.2}
    write("runs/mine/result.json", {**result, "validation": {"loss": 0.2, "exact": 0.75}})
    write("runs/half/recipe.yaml", "model: {preset: tiny}\ndata: {train: [{path: train.json}]}\n")
    (place / "runs/half/checkpoint-2").mkdir()
    def run(line, input=None):
        "A command; `@` begins a path of the folder above."
        words = [word.replace("@", f"{place}/") for word in shlex.split(line)]
        return runner.invoke(
            app, words, input, env={"COLUMNS": "100", "TERM": "dumb"}, prog_name="vlm-lit"
        )
    def show(line, input=None, n=8):
        "Print a command, the first lines of its output, folded, and its exit code."
        out = run(line, input)
        lines = out.output.replace(f"{place}/", "").replace(str(place), ".").rstrip().split("\n")
        lines = [line for line in lines if not re.match(r"step \d+/|seconds ", line)]  # they vary
        rows = ["$ vlm-lit"]
        for part in re.split(" (?=--)", line.replace("@", "")):
            if len(rows[-1]) + len(part) > 92: rows.append("   ")
            rows[-1] += f" {part}"
        print(" \\\n".join(rows))
        for text in lines[:n]:
            folded = textwrap.wrap(text, 96, subsequent_indent="    ")
            print(text if len(text) < 100 else "\n".join(folded))
        if len(lines) > n: print("…")
        print(*[f"(exit code {out.exit_code})"] * (out.exit_code != 0), "", sep="\n")
    def refuses(line, message, input=None):
        "Check that a command ends in one line and exit code 2."
        out = run(line, input)
        assert out.exit_code == 2 and message in out.stderr, (line, out.output, out.exception)
        assert out.stderr.startswith("error: ") and out.stderr.count("\n") == 1, out.stderr
    TRAIN = (
        "train --preset tiny --model.tokenizer @tokenizer --data @train.json --image-folder @. "
    "--runs @runs --training.max_steps 3 --training.use_cpu true --training.save_steps 1 "
    "--training.disable_tqdm true"
    )

def test_walk_shows_the_example_and_any_record():
    out = run("walk").output
    assert "[[2, 106, 1645, 108], [2, 108, 1841," in out and "image_aux[0] = (3, 768, 768)" in out
    out = run("walk @train.json --index 3 --preset @runs/mine").output
    assert "Hi" in out and "image_aux" not in out
    out = run("walk @train.json --preset @runs/mine --aspect pad").output
    assert "image_aux[0] = (3, 32, 32)" in out

def test_walk_refuses_what_cannot_work():
    refuses("walk @gone.json", "no data file")
    refuses("walk @train.json --index 5", "--index 5: the data has 4 record(s)")
    refuses("walk @train.json --template gema", "unknown template 'gema'")
    refuses("walk @train.json --tokenizer ./gone", "no such folder")
    refuses("walk @train.json --aspect wide", "aspect must be")
    refuses("walk @train.json --image-folder @gone", "no image folder")
    refuses("walk @train.json --control-tokens maybe", "--control-tokens must be")
    refuses("walk @train.json --preset smoll", "unknown preset 'smoll'; did you mean 'smol'?")
    refuses("walk @train.json --preset @runs/half", "is not finished; resume with: vlm-lit train")
    refuses("walk @train.json --preset tiny", "tokenizer")
    write("wrong.json", [{"id": 7, "conversations": turns("q<end_of_turn>\x1b[2J", "a")}])
    refuses("walk @wrong.json", "--control-tokens escape")

def test_stop_where_the_exit_code_is_decided():
    write(
        "two.json",
        [
            {"id": 1, "image": "gone.png", "conversations": good},
            {"id": 2, "conversations": turns("q<eos>", "a")},
        ],
    )
    watch = ["report['errors']", "report['ok']"]
    with Breakpoint(audit_data, at='if not report["ok"]', watch=watch) as bp:
        out = run("audit @two.json --image-folder @. --workers 0")
    assert out.exit_code == 1
    bp.expect({"report['errors']": 2, "report['ok']": False}, hits=1)

def test_stop_in_the_command_train():
    line = "train --preset smol --data train.json --training.max_steps 5 --print-config"
    watch = ["preset", "str(data)", "recipe", "print_config", "overrides[-2:]"]
    with Breakpoint(train, at="folder = run_folder", watch=watch) as bp:
        out = run(line)
    assert out.exit_code == 0 and "  max_steps: 5\n" in out.stdout
    bp.expect({"preset": "smol", "str(data)": "train.json", "print_config": True, "name": None})
    bp.expect(
        {"recipe": ["--training.max_steps", "5"], "overrides[-2:]": ["--training.max_steps", "5"]}
    )

def test_stop_after_a_conversion():
    watch = ["found.n_records", "found.errors", "found.ignored"]
    with Breakpoint(convert_data, at="is_written = print_conversion", watch=watch) as bp:
        run("convert @rows.csv @stop.jsonl --columns question=q,answer=a --skip-bad --force")
    error = "record 1: no column 'a'; there are: 'q'"
    bp.expect({"found.n_records": 1, "found.errors": [error], "found.ignored": {"hint": 1}})

def test_walk_writes_a_page_whole_or_says_why_not():
    out = run("walk @train.json --index 3 --preset @runs/mine --html @walk.html")
    assert out.exit_code == 0 and out.stdout.startswith("the page is in ") and "the mask" in out.stdout
    page = (place / "walk.html").read_text()
    assert page.startswith("<!doctype html>") and page.endswith("</html>\n") and "of dataset[3]" in page
    write("wrong.json", [{"id": 7, "conversations": turns("q<end_of_turn>", "<script>x()</script>")}])
    out = run("walk @wrong.json --preset @runs/mine --html @walk.html")
    assert out.exit_code == 2 and "record 7, turn 0" in out.stderr
    page = (place / "walk.html").read_text()
    assert "this record cannot be used" in page and page.count("<script") == 1
    assert not list(place.glob("*.part"))
    refuses("walk @train.json --preset @runs/mine --html @no/walk.html", "no folder")
    refuses("walk @train.json --preset @runs/mine --html @images", "images")

def test_help_is_quick_because_torch_is_not_imported():
    code = """import sys
from typer.testing import CliRunner
from vlm_lit.cli import app
for name in ([], ["train"], ["generate"], ["eval"], ["replay"]):
    out = CliRunner().invoke(app, [*name, "--help"])
    assert out.exit_code == 0 and "Usage" in out.output, out.output
assert not {"torch", "transformers", "numpy", "PIL"} & set(sys.modules), sys.modules.keys()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run("--version").output.split()[0] == "vlm-lit"
    assert "..." not in run("--help").output.split("Commands:")[1]

def test_audit_has_three_exit_codes():
    dirty = [{"id": 1, "image": "gone.png", "conversations": good}]
    dirty += [{"id": 2, "conversations": turns("q<eos>", "a")}]
    write("dirty.json", dirty)
    assert run("audit @train.json --image-folder @. --workers 0").exit_code == 0
    out = run("audit @dirty.json --image-folder @. --workers 0 --json --html @page.html")
    report = json.loads(out.stdout)
    assert (out.exit_code, report["errors"]) == (1, 2) and "NOT OK" in (place / "page.html").read_text()
    assert sorted(report["findings"]) == ["control_tokens", "image_missing"]
    refuses("audit @train.json --html @no/x.html", "no folder")
    refuses("audit @gone.json", "no data file")

    def count(flags):
        "Positions of the longest record."
        report = json.loads(run(f"audit @train.json --json --workers 0 {flags}").stdout)
        return report["lengths"]["max"]

    assert count("") - count("--preset tiny --tokenizer gemma") == 576 - 16

def test_audit_opens_compares_and_writes_what_passes():
    out = run("audit @train.json --image-folder @. --preset @runs/mine --workers 0")
    assert out.exit_code == 0 and "images were opened" in out.output, out.output
    out = run("audit @train.json --preset @runs/mine --workers 0 --no-images")
    assert "images were not looked for" in out.output
    broken = [{"id": 1, "image": "images/broken.png", "conversations": good}]
    write("broken.json", [*broken, {"id": 2, "conversations": turns("q", "a")}])
    line = "audit @broken.json --image-folder @. --preset @runs/mine --workers 0"
    for path in place.glob("clean*"): path.unlink()
    out = run(f"{line} --fix @clean.jsonl --html @audit.html --against @train.json")
    assert out.exit_code == 1 and "1 records that pass are in" in out.output, out.output
    assert [json.loads(own)["id"] for own in (place / "clean.jsonl").open()] == [2]
    assert "image_unreadable" in (place / "clean.left-out.jsonl").read_text()
    assert "</html>" in (place / "audit.html").read_text()
    refuses(f"{line} --fix @clean.jsonl", "is there already")
    refuses(f"{line} --fix @clean.json", "are written as .jsonl")
    refuses(f"{line} --no-images --decode-images", "give one of them")
    refuses(f"{line} --against @gone.json", "no data file")
    write(
        "odd.json", "[{\"id\": NaN, \"conversations\": 3}, {\"id\": \"\\ud83d\", \"conversations\": 3}]"
    )
    out = run("audit @odd.json --preset @runs/mine --workers 0 --json --html @odd.html")
    if out.exit_code == 1:  # read; a file that is refused as a whole has exit code 2
        assert json.loads(out.stdout, parse_constant=lambda name: 1 / 0)["records"] == 2
        out.stdout.encode("utf-8")

def test_convert_has_three_exit_codes_and_keeps_files():
    out = run("convert @rows.csv @new.jsonl --columns question=q,answer=a")
    assert out.exit_code == 1 and not (place / "new.jsonl").exists()
    assert "record 1: no column 'a'" in out.stderr and "nothing is written: mend them" in out.stdout
    flags = "--columns question=q,answer=a --skip-bad"
    out = run(f"convert @rows.csv @new.jsonl {flags}")
    assert out.exit_code == 0 and "left out: record 1: no column 'a'" in out.stderr
    lines = ["rows.csv: question and answer", "1 records, 0 images"]
    lines += ["1 records hold text in 'hint', which is not used", "1 records cannot be read"]
    assert out.stdout.splitlines()[:4] == lines, out.stdout
    refuses(f"convert @rows.csv @new.jsonl {flags}", "is there already")
    assert run(f"convert @rows.csv @new.jsonl {flags} --force").exit_code == 0
    refuses("convert @gone.csv @x.jsonl", "no data file")
    refuses("convert @train.json @x.jsonl --split test", "train.json is one file, without splits")
    refuses("convert @train.json @x.jsonl --columns qestion=q", "did you mean 'question'?")
    refuses("convert @train.json @x.json", "ends in .jsonl")
    write(
        "esc.jsonl",
        json.dumps({"id": "a\x1b[2J", "question": "q", "answer": "a", "\x1bx": "t"}) + "\n{}",
    )
    out = run("convert @esc.jsonl @esc2.jsonl --skip-bad")
    assert "\x1b" not in out.stdout + out.stderr and "\\x1bx" in out.stdout

def test_split_and_columns_reach_every_command_that_reads_data():
    write("more/train.parquet", "")
    write("more/test.parquet", "")
    for name in ("train", "test"):
        rows = [{"q": f"<image>\nWhat is {name}?", "a": "a box", "image": "images/photo.png"}]
        pq.write_table(pa.Table.from_pylist(rows), place / f"more/{name}.parquet")
    named = "--columns question=q,answer=a --image-folder @."
    commands = ["audit @more --workers 0", "walk @more", "losses @runs/mine @more"]
    commands += ["eval @runs/mine --data @more"]
    for command in commands:
        refuses(
            f"{command} {named}", "more holds several splits; give one of them as split: test, train"
        )
        out = run(f"{command} {named} --split test")
        assert out.exit_code == 0, (command, out.output, out.exception)
    splits = "--split train --val-split test --print-config"
    out = run(f"train --preset tiny --data @more --val @more {named} {splits}")
    found = yaml.safe_load(out.stdout)["data"]
    columns = {"question": "q", "answer": "a"}
    assert [own[0]["split"] for own in (found["train"], found["eval"])] == ["train", "test"]
    assert found["train"][0]["columns"] == found["eval"][0]["columns"] == columns
    refuses("train @more/x.yaml --split test", "--split")
    line = f"plan --preset tiny --model.tokenizer gemma --data @more --no-measure --json {named}"
    refuses(line, "more holds several splits; give one of them as split: test, train")
    out = run(f"{line} --split train")
    assert json.loads(out.stdout)["data"]["records"] == 1, out.output
    against = f"audit @more {named} --split train --workers 0 --against @more"
    refuses(against, "more holds several splits")
    out = run(f"{against} --val-split test --json")
    assert json.loads(out.stdout)["against"] == {"records": 1, "errors": 0}, out.output

def test_train_answers_every_mistake_in_a_recipe():
    write(
        "slip.yaml",
        "model: {preset: smol}\ndata: {train: [{path: train.json}]}\ntraining: {max_stps: 5}\n",
    )
    write("good.yaml", "model: {preset: smol}\ndata: {train: [{path: train.json}]}\n")
    refuses("train @slip.yaml", "slip.yaml: unknown key 'training.max_stps'; did you mean 'max_steps'?")
    refuses("train @good.yaml --training.max_steps many", "--training.max_steps: ")
    refuses("train @good.yaml --training.max_steps", "--training.max_steps has no value")
    refuses("train @good.yaml --model.preset smoll", "unknown preset 'smoll'; did you mean 'smol'?")
    refuses("train @gone.yaml", "no such recipe; recipes/own-data.yaml is one to copy")
    refuses("train @train.json", "for training on records give them with --preset NAME --data")
    refuses("train @good.yaml --nme x", "unknown option '--nme'; did you mean '--name'?")
    refuses("train @good.yaml -x", "unknown option '-x'")
    refuses("train @good.yaml --data x.json", "are for training without a recipe")
    refuses("train", "give a recipe file, or --preset and --data")
    refuses("train --resume --name none --runs @runs", "no run 'none' in")

def test_plan_says_what_train_would_do():
    line = TRAIN.replace("train ", "plan ", 1)
    out = run(f"{line} --no-measure")
    assert out.exit_code == 0 and "are used" in out.output and "measured" not in out.output, out.output
    found = json.loads(run(f"{line} --json").stdout)
    assert found["measured"]["steps_measured"] == 3 and found["hours"] is not None
    write("lost.json", [{"id": 1, "image": "gone.png", "conversations": good}] * 4)
    out = run(f"{line} --no-measure --data @lost.json --image-folder @.")
    assert out.exit_code in (1, 2) and "Traceback" not in out.output, out.output
    refuses("plan @gone.yaml", "no such recipe")
    refuses("plan", "give a recipe file, or --preset and --data")
    refuses(f"{line} --training.learning_ratee 1", "did you mean 'learning_rate'")

def test_train_refuses_before_step_1():
    def says(flags, message): refuses(f"{TRAIN} --name bad {flags}", message)

    says("--image-folder @gone", "no image folder")
    says("--data @gone.json", "no data file")
    says("--data.template llama_3", "template")
    says("--resume", "no run in")
    says("--tokenizer gemma", "has its section, as in --model.tokenizer")
    says("--overlength skip", "has its section, as in --data.overlength")
    says(
        "--training.learning_rate fast", "error: --training.learning_rate: expected number, got 'fast'"
    )
    refuses(
        "train --preset @runs/half --data @train.json --runs @runs --training.use_cpu true",
        "is not finished; resume with: vlm-lit train",
    )
    says("--lora.target_modules [q_prj]", "target_modules 'q_prj' fits no linear layer")
    says("--training.trainable_modules []", "nothing would train")
    says("--training.global_batch_size 7", "global_batch_size 7 is not a multiple")
    assert not (place / "runs/bad").exists()
    refuses(f"{TRAIN} --name mine", "holds a finished run; train on from it with --preset ")

def test_train_gives_recipe_folder_and_resume_to_the_run():
    seen = []

    def fake(recipe, folder, resume):
        "Instead of a run."
        seen.append((recipe, folder, resume))
        return {"steps": 5, "loss": 0.5, "validation": {"exact": 1.0}}

    write("good.yaml", "model: {preset: smol}\ndata: {train: [{path: train.json}]}\n")
    with patch.dict(sys.modules, {"vlm_lit.training.run": SimpleNamespace(train=fake)}):
        out = run("train @good.yaml --runs @runs --training.max_steps 5")
        assert out.exit_code == 0 and "vlm-lit chat" in out.output, out.output
        run("train --preset tiny --data @train.json --runs @runs")
        run("train @runs/half/recipe.yaml --resume")
        run("train --name half --runs @runs --resume")
        run("train --preset @runs/mine --data @train.json --name next")
    assert [path.name for _, path, _ in seen] == ["good", "train", "half", "half", "next"]
    assert [resume for *_, resume in seen] == [False, False, True, True, False]
    assert seen[0][0].training == {"max_steps": 5}
    assert seen[4][0].model == {"from": f"{place}/runs/mine"}
    assert seen[2][1] == place / "runs/half"

def test_generate_answers_per_image():
    one = run("generate @runs/mine @images/photo.png -q hi --max-new-tokens 4").stdout
    two = "generate @runs/mine @images/photo.png @images/square.png -q hi --max-new-tokens 4"
    two = run(two).stdout
    assert two.splitlines()[0] == f"{place}/images/photo.png\t{one.rstrip(chr(10))}"
    (place / "some").mkdir()
    for name in "ba": sample_image(20, 20).save(place / f"some/{name}.png")
    out = run("generate @runs/mine @some -q hi --max-new-tokens 4 --out @some.jsonl --batch-size 1")
    rows = [json.loads(row) for row in (place / "some.jsonl").read_text().splitlines()]
    assert out.exit_code == 0 and [Path(row["image"]).name for row in rows] == ["a.png", "b.png"]
    assert rows[0].keys() == {"id", "image", "question", "answer"}
    (place / "link.png").symlink_to(place / "images/photo.png")
    assert run("generate @runs/mine @link.png -q hi --max-new-tokens 4").stdout == one

def test_generate_goes_on_after_a_broken_image():
    (place / "mixed").mkdir()
    for name in "ac": sample_image(20, 20).save(place / f"mixed/{name}.png")
    (place / "mixed/b.png").write_bytes(b"no image")
    out = run("generate @runs/mine @mixed -q hi --max-new-tokens 2 --batch-size 2")
    assert out.exit_code == 1 and out.stdout.count("\n") == 2, out.output
    assert "mixed/b.png': image 'b.png' cannot be read" in out.stderr
    assert out.stderr.endswith("1 of 3 images could not be read\n")
    out = run("generate @runs/mine @mixed -q hi --max-new-tokens 2 --out @mixed.jsonl")
    rows = [json.loads(row) for row in (place / "mixed.jsonl").read_text().splitlines()]
    assert out.exit_code == 1 and [(r["id"], Path(r["image"]).name) for r in rows] == [
        (0, "a.png"),
        (2, "c.png"),
    ]
    refuses("generate @runs/mine @mixed/b.png -q hi --out @none.jsonl", "cannot be read")
    refuses("generate @runs/mine @mixed -q '<eos>' --out @none.jsonl", "pass --control-tokens escape")
    assert not (place / "none.jsonl").exists()

def test_generate_and_chat_refuse_in_one_line():
    image = "@images/photo.png"
    refuses("generate nothing @images/photo.png -q hi", "no model 'nothing'")
    refuses("generate tiny @images/photo.png -q hi", "'tiny' is a preset, a model that is not trained")
    refuses("generate @runs/half @images/photo.png -q hi", "its newest checkpoint is")
    refuses("generate @runs/mine @gone.png -q hi", "no image file")
    refuses("generate @runs/mine @runs -q hi", "no image in")
    refuses("generate @runs/mine @images/broken.png -q hi", "cannot be read")
    refuses("generate @runs/mine @images/photo.png -q ' '", "the question is empty")
    refuses("generate @runs/mine @images/photo.png -q '<eos> hi'", "pass --control-tokens escape")
    refuses(
        "generate @runs/mine @images/photo.png -q hi --control-tokens no", "refuse, escape or allow"
    )
    refuses("generate @runs/mine @images/photo.png -q hi --out @train.json", "is there already")
    refuses(
        "generate @runs/mine @images/photo.png -q hi --out @no/x.jsonl", "for x.jsonl; make it first"
    )
    refuses("chat @runs/mine @gone.png", "no image file")

def test_chat_streams_and_survives_mistakes():
    lines = [
        "What is it?",
        "/image @gone.png",
        "/image @images/broken.png",
        "<eos>",
        "/help",
        "And now?",
    ]
    out = run(
        "chat @runs/mine @images/photo.png --max-new-tokens 4",
        "\n".join(lines).replace("@", f"{place}/"),
    )
    assert out.exit_code == 0 and out.stdout.count("\n") >= 2, out.output
    said = [row for row in out.stderr.splitlines() if row != NO_ANSWER]
    assert [row.split(":")[0] for row in said] == ["error"] * 3 + [CHAT_HELP], out.stderr
    assert "--control-tokens escape" in said[2]
    one = run("generate @runs/mine @images/photo.png -q 'What is it?' --max-new-tokens 4").stdout
    assert out.stdout.startswith(one.rstrip("\n"))

def test_eval_writes_predictions_and_refuses():
    out = run(
        "eval @runs/mine --data @val.json --out @p.jsonl --sample 1 --blank-images --json "
    "--max-new-tokens 3"
    )
    found = json.loads(out.stdout)
    assert found["n"] == 1 and "predictions" not in found and found["n_by_type"] == {"object": 1}
    assert len((place / "p.jsonl").read_text().splitlines()) == 1
    refuses("eval @runs/mine --data @gone.json", "no data file")
    refuses("eval @runs/mine --data @val.json --metric my.py", "unknown metric")
    refuses("eval @runs/mine --data @val.json --image-folder @gone", "no image folder")
    refuses("eval @runs/mine --data @val.json --out @no/p.jsonl", "for p.jsonl; make it first")
    refuses("eval @runs/half --data @val.json", "is not finished")

def test_export_of_any_model_folder():
    out = run("export @runs/mine --out @hf --dtype bfloat16")
    assert out.exit_code == 0 and "exact answers" in (place / "hf/README.md").read_text(), out.output
    wanted = {"README.md", "config.json", "model.safetensors", "processor_config.json"}
    assert wanted <= {path.name for path in (place / "hf").iterdir()}
    size = lambda folder: (folder / "model.safetensors").stat().st_size
    assert size(place / "hf") < 0.6 * size(place / "runs/mine/model")
    assert run("generate @hf @images/photo.png -q hi --max-new-tokens 2").exit_code == 0
    out = run("export @hf --to mgm --out @hf-mgm")
    assert out.exit_code == 0 and "projector only" in out.stdout
    refuses("export @runs/mine --to onnx", "--to: hf, llava-hf, gguf, mgm or llava; got 'onnx'")
    refuses("export @runs/mine --to llava-hf", "no high-resolution tower with mining; use --to hf")
    refuses("export @runs/mine --dtype int3", "--dtype: float32")
    refuses("export @hf --out @images", "is there already")
    refuses("export @runs/mine --private", "--private is for --push OWNER/NAME")
    refuses("export @runs/mine --push a/b/c --out @never", "--push: Repo id must be")
    refuses("export nothing", "no model 'nothing'")

def test_export_without_out_writes_beside_and_keeps_the_card():
    out = run("export @runs/mine --out @one")
    assert out.exit_code == 0, out.output
    before = sorted(path.name for path in (place / "one").iterdir())
    out = run("export @one")
    assert out.exit_code == 0 and str(place / "one-hf/README.md") in out.stdout, out.output
    assert sorted(path.name for path in (place / "one").iterdir()) == before
    first, second = [(place / name / "README.md").read_text() for name in ("one", "one-hf")]
    assert (
        "exact answers" in first
        and first[first.index("## Results") :] == second[second.index("## Results") :]
    )
    refuses("export @one", "is there already; choose another --out")
    write("lora/adapter_config.json", {"base_model_name_or_path": "me/base"})
    refuses("export @lora", "an adapter of peft, of the base model 'me/base'; merge it first")
    assert "llama.cpp" in run("export --help").stdout

def test_llava_of_transformers_serves_every_command():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    )
    own = VLMConfig.from_pretrained(place / "runs/mine/model")
    text = dict(model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    text |= dict(num_attention_heads=2, vocab_size=own.vocab_size)
    config = VLMConfig(text, own.vision_config, image_size=16, select_layer=-1)
    model = make_model(config, 1)
    processor = VLMProcessor.for_model(config, tokenizer, "hf")
    save_model(model, place / "plain")
    processor.save_pretrained(place / "plain")
    out = run("export @plain --to llava-hf --out @llava")
    assert out.exit_code == 0 and "model.safetensors" in out.stdout, out.output
    said = [
        run(f"generate @{name} @images/photo.png -q hi --max-new-tokens 6").stdout
        for name in ("plain", "llava")
    ]
    assert said[0] == said[1] and said[0].strip(), said
    for line in (
        "audit @train.json --preset @llava --image-folder @. --workers 1",
        "walk @train.json --preset @llava --template gemma --image-folder @.",
        "eval @llava --data @val.json --image-folder @. --max-new-tokens 2",
        "export @llava --to hf --out @back",
        "generate @back @images/photo.png -q hi --max-new-tokens 2",
        "export @llava --to llava --out @projector",
        "export @plain --to gguf --out @gguf --dtype float16",
    ):
        out = run(line)
        assert out.exit_code == 0, (line, out.output, out.exception)
    written = sorted(path.name for path in (place / "gguf").iterdir())
    assert written == ["mmproj.gguf", "model.gguf"]
    refuses("export @runs/mine --to gguf", "llama.cpp's LLaVA has no high-resolution tower")

def test_export_is_pushed_after_it_is_written():
    import huggingface_hub
    from huggingface_hub import constants

    pushed = {}

    class FakeApi:
        "A hub that notes what it gets."

        def create_repo(self, name, private, exist_ok):
            pushed["private"] = private
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            pushed[repo_id] = sorted(path.name for path in folder_path.iterdir())

    with (
        patch.object(constants, "HF_HUB_OFFLINE", False),
        patch.object(huggingface_hub, "get_token", lambda: "hf_x"),
        patch.object(huggingface_hub, "HfApi", FakeApi),
    ):
        out = run("export @runs/mine --out @pushed --push me/mine --private")
    assert out.exit_code == 0, out.output
    print(out.stdout.splitlines()[-1])
    assert out.stdout.splitlines()[-1] == "uploaded to https://huggingface.co/me/mine"
    assert pushed["private"] and "README.md" in pushed["me/mine"]
    assert 'snapshot_download("me/mine")' in (place / "pushed/README.md").read_text()
    with patch.object(constants, "HF_HUB_OFFLINE", True):
        refuses("export @runs/mine --out @never --push me/mine", "HF_HUB_OFFLINE is set")
    assert not (place / "never").exists()

def test_exported_files_have_the_mode_of_the_umask():
    for umask, expected in [(0o022, "0o644"), (0o027, "0o640")]:
        before = os.umask(umask)
        try:
            for to in ("hf", "mgm"):
                assert run(f"export @runs/mine --to {to} --out @mode-{to}-{umask}").exit_code == 0
        finally: os.umask(before)
        written = [path for path in place.glob(f"mode-*-{umask}/*")]
        assert {oct(path.stat().st_mode & 0o777) for path in written} == {expected}

def test_a_mistake_in_an_option_is_one_line():
    for words, message in [
        ("walk --image-foldr x", "error: no such option: --image-foldr"),
        ("audit records.json --workers two", "error: invalid value for '--workers'"),
        ("nosuch", "error: no such command 'nosuch'; see vlm-lit -h"),
        ("generate model", "error: missing argument 'images'; see vlm-lit generate -h"),
    ]:
        refuses(words, message)

def test_a_preset_or_a_run_is_a_tokenizer_by_name():
    plain = run("walk @train.json --index 3 --tokenizer @tokenizer").stdout
    for name in ("@runs/mine", "@runs/mine/model"):
        assert run(f"walk @train.json --index 3 --tokenizer {name}").stdout == plain
    refuses("walk @train.json --tokenizer tiny", "from scratch brings no tokenizer")
    refuses("audit @train.json --tokenizer tiny", "give --tokenizer: a folder")
    refuses("train --preset tiny --data @train.json --runs @runs", "give --model.tokenizer: a folder")
    refuses("train --preset tiny --model.tokenizer tiny --data @train.json --runs @runs", "brings no")

def test_image_folder_left_out_is_the_folder_of_the_data():
    alone = write("alone/data.json", [{**train_records[0], "image": "photo.png"}])
    for line in (
        "walk @alone/data.json --preset @runs/mine",
        "audit @alone/data.json --preset @runs/mine --workers 0",
        "losses @runs/mine @alone/data.json",
        "eval @runs/mine --data @alone/data.json --max-new-tokens 1",
        f"{TRAIN} --data @alone/data.json --name alone --training.max_steps 1",
    ):
        line = line.replace("--image-folder @. ", "")
        (alone.parent / "photo.png").unlink(missing_ok=True)
        out = run(line)
        assert out.exit_code in (1, 2) and "no image 'photo.png'" in out.output, (line, out.output)
        sample_image().save(alone.parent / "photo.png")
        assert run(line).exit_code == 0, line
        (alone.parent / "photo.png").unlink()
        out = run(f"{line} --image-folder @images" + " --name alone2" * line.startswith("train"))
        assert out.exit_code == 0, (line, out.output)
    assert run("audit @alone/data.json --preset @runs/mine --workers 0 --no-images").exit_code == 0

def test_an_empty_word_is_refused():
    for line in ("walk ''", "walk --preset ''", "generate @runs/mine '' -q hi", "train --data ''"):
        refuses(line, "an empty word after")
    refuses("''", "an empty word; is a variable of the shell empty?")

def test_nothing_that_a_terminal_obeys_is_printed():
    odd = "\x1b[2J\x07\x9b\u202e\u2066\r\n"
    file = f"odd{odd}.png".replace("\n", "\u2028")
    (place / "images" / file).write_bytes((place / "images/photo.png").read_bytes())
    texts = turns(f"<image>\nwhat{odd}is it?", f"a{odd}box")
    write("odd.json", [{"id": odd, "image": f"images/{file}", "type": odd, "conversations": texts}])
    wrong = [{"id": odd, "image": f"{file}", "conversations": turns("<image>\nq", f"a{odd}<eos>")}]
    write("odd_wrong.json", wrong)
    write("odd_type.json", [{"id": odd, "type": odd, "conversations": turns(f"q{odd}", f"a{odd}")}])
    (place / "images/photo.png").rename(place / "kept.png")
    folder = place / "names"
    folder.mkdir()
    (folder / file).write_bytes((place / "kept.png").read_bytes())
    (folder / f"broken{file}").write_bytes(b"no image")
    (place / "kept.png").rename(place / "images/photo.png")
    for line in [
        "walk @odd.json --preset @runs/mine",
        "audit @odd.json --preset @runs/mine --workers 0",
        "audit @odd_wrong.json --preset @runs/mine --workers 0",
        "walk @odd_wrong.json --preset @runs/mine",
        "generate @runs/mine @names -q hi --max-new-tokens 2",
        f"generate @runs/mine {shlex.quote(f'@names/{file}')} -q hi --max-new-tokens 2",
        f"generate @runs/mine {shlex.quote(f'@gone/{file}')} -q hi",
        "eval @runs/mine --data @odd.json --max-new-tokens 2",
        "eval @runs/mine --data @odd_type.json --max-new-tokens 2 --json",
        "eval @runs/mine --data @odd_wrong.json --max-new-tokens 2",
        "losses @runs/mine @odd.json",
        f"losses @runs/mine {shlex.quote(f'@gone/{file}')}",
        f"{TRAIN} --data @odd_wrong.json --name odd",
        f"export {shlex.quote(f'@gone/{file}')}",
        f"replay {shlex.quote(f'@gone/{file}')} --step 1",
        f"{shlex.quote(file)}",
        f"walk --{shlex.quote(file)}",
    ]:
        out = run(line)
        obeyed = {c for c in out.output if not c.isprintable() and c not in "\n\t"}
        assert not obeyed and out.output, (line, obeyed, out.output)
        assert out.exception is None or isinstance(out.exception, SystemExit), (line, out.exception)
    out = run(f"chat @runs/mine {shlex.quote(f'@gone/{file}')}", f"hi{odd}\n/image {file}\n")
    assert not {c for c in out.output if not c.isprintable()} - {"\n"}, out.output

def test_no_message_of_the_package_names_an_argument_that_is_an_option():
    import ast
    import vlm_lit
    from vlm_lit import commands

    def messages():
        "The texts of all `ConfigError` and `DataError` of the package, without their values."
        for path in Path(vlm_lit.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not node.args: continue
                if getattr(node.func, "id", "") not in ("ConfigError", "DataError"):
                    continue
                parts = getattr(node.args[0], "values", [node.args[0]])
                texts = [p.value if isinstance(p, ast.Constant) else "7" for p in parts]
                if texts != ["7"]: yield "".join(texts)

    found, changed = list(messages()), 0
    for command in typer.main.get_command(app).commands.values():
        commands.set_flags(command.params)
        flags = commands._FLAGS.get()
        names = "|".join(name for name in flags if "_" in name) or "(?!)"
        for text in found:
            said = commands.name_flags(text, flags)
            unquoted = re.sub(commands._QUOTED, "", said)
            assert not re.search(rf"(?<![\w./-])({names})(?![\w/]|[.-]\w)", unquoted), said
            assert commands.name_flags(said, flags) == said  # once is enough
            changed += said != text
    print(f"{len(found)} messages, {changed} changed for some command")
    assert len(found) > 250 and changed > 50
    commands.set_flags([])

def test_doctor_prints_facts_and_fails_on_a_wrong_mask():
    out = run("doctor")
    assert out.exit_code == 0 and "torch" in out.stdout, out.output
    for problems, code in [([], 0), (["gemma: a header is supervised"], 1)]:
        fake = SimpleNamespace(known_answers=lambda: problems, environment_info=lambda: {"python": "3"})
        with patch.dict(sys.modules, {"vlm_lit.training.doctor": fake}):
            out = run("doctor")
        assert out.exit_code == code and "python" in out.stdout, out.output
        assert (
            out.stdout.splitlines()[-1]
            == (problems or ["known answers: the bundled tokenizer and template give the right mask"])[
                0
            ]
        )

def test_replay_and_losses_print_and_write_a_page():
    assert run(f"{TRAIN} --name again --training.max_steps 2 --training.save_steps 1").exit_code == 0
    out = run("replay @runs/again --step 2 --watch loss --html @step.html")
    assert out.exit_code == 0 and "equal to the logged one to the bit" in out.stdout, out.output
    assert "<h1>Step 2 of again</h1>" in (place / "step.html").read_text()
    out = run("losses @runs/again @train.json --image-folder @. --worst 2 --html @losses.html")
    assert out.exit_code == 0 and out.stdout.count(": loss ") == 2 and (place / "losses.html").is_file()
    refuses("replay @runs/none --step 1", "no run")
    refuses("replay @runs/again --step 1 --at nothing", "nothing")
    refuses("losses @runs/again @gone.json", "no data file")
    refuses("losses @runs/mine @train.json --html @no/x.html", "for x.html; make it first")
    refuses("replay @runs/mine --step 1 --html @no/x.html", "for x.html; make it first")
