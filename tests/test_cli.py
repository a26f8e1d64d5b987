"Derived from nbs/16_cli.ipynb by `make tests`; edit the notebook, not this file."
import os
import json, platform, shlex, time, warnings
from dataclasses import asdict, replace
from importlib.metadata import version as package_version, PackageNotFoundError
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Optional
import torch, typer
from accelerate import Accelerator
from rich.console import Console
from vlm_lit.core import ConfigError, DataError, progress_console
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.images import make_square, open_image, rows_per_image, sample_image, to_bytes
from vlm_lit.dataset import CAPTION_QUESTION, LazySupervisedDataset, PreparedTexts, balance_answers, easy_vqa_folder, easy_vqa_questions, easy_vqa_records, llava_record, positive_questions, prepare_dataset
from vlm_lit.model import VLM
from vlm_lit.weights import build_model, channel_statistics, export_model, ids_in_use, load_model, load_preset, load_preset_tokenizer, preset_names, read_json, save_model, save_projector, write_json
from vlm_lit.training import ALIGNED, Interrupted, TrainConfig, preset_stages, read_metrics, read_progress, train
from vlm_lit.generation import VLMProcessor, answer
from vlm_lit.evaluation import accuracy_table, evaluate, fixed_sample, format_table, majority_answer, question_prior, normalised
from vlm_lit.audit import AuditSettings, audit
from vlm_lit.reports import audit_lines, audit_page, plot_curves, plot_samples, walk_lines
import shlex
from tempfile import mkdtemp
from fastcore.test import test_eq, expect_fail
from typer.testing import CliRunner
from vlm_lit.dataset import read_records
from vlm_lit.cli import *

def setup_module():
    global data_file, data_folder, few, quiet, run, runner, turns
    few = tuple(replace(stage, steps=3, groups_per_batch=4, log_every=1) for stage in preset_stages(load_preset("tiny")))
    quiet = Console(quiet=True)
    runner = CliRunner()
    def run(line): return runner.invoke(app, shlex.split(line), env={"COLUMNS": "110", "TERM": "dumb"})
    data_folder = Path(mkdtemp())
    def turns(*texts): return [{"from": ("human", "gpt")[n % 2], "value": t} for n,t in enumerate(texts)]
    def data_file(record):
        sample_image().save(data_folder/"photo.png")
        (data_folder/"broken.png").write_bytes(b"not an image")
        (data_folder/"data.json").write_text(json.dumps([record]))
        return data_folder/"data.json"

def test_run_folder_is_made_once_and_compared_on_resume():
    with TemporaryDirectory() as root:
        folder, config = Path(root)/"a", run_config("tiny", 0, False, preset_stages(load_preset("tiny")))
        open_run(folder, config, resume=False)
        with expect_fail(ConfigError, contains="already holds a run; go on with --resume"): open_run(folder, config, resume=False)
        open_run(folder, config, resume=True)
        with expect_fail(ConfigError, contains="other settings: seed is 0, not 1. Go on with: vlm-lit pretrain --name a"): open_run(folder, {**config, "seed": 1}, resume=True)
        shorter = run_config("tiny", 0, False, tuple(replace(stage, steps=7) for stage in preset_stages(load_preset("tiny"))))
        with expect_fail(ConfigError, contains="captions.steps is 600, not 7; questions.steps is 600, not 7; test_questions is left out, not 20. Go"): open_run(folder, {**shorter, "test_questions": 20}, resume=True)
        with expect_fail(ConfigError, contains="other settings: stages is captions, questions, not captions. Go"): open_run(folder, {**config, "stages": config["stages"][:1]}, resume=True)
        with expect_fail(ConfigError, contains="to go on with; look at --name"): open_run(Path(root)/"none", config, resume=True)
        assert not (Path(root)/"none").exists()
        (Path(root)/"b").mkdir()
        (Path(root)/"b"/"letters.txt").write_text("x")
        with expect_fail(ConfigError, contains="is not empty and holds no run"): open_run(Path(root)/"b", config, resume=False)

def test_small_run_leaves_every_file():
    with TemporaryDirectory() as root:
        result = pretrain_run(Path(root)/"run", stages=few, limit=40, console=quiet)
        left = sorted(p.name for p in (Path(root)/"run").iterdir())
        stages = [row["stage"] for row in read_metrics(Path(root)/"run"/"metrics.jsonl")]
        model = load_model(Path(root)/"run"/"model")
    print(left)
    test_eq(left, ["checkpoint", "config.json", "curves.png", "metrics.jsonl", "model", "predictions.jsonl", "result.json", "samples.png", "tables.json"])
    test_eq(stages, ["captions"]*3 + ["questions"]*3)
    test_eq(sorted(result), ["baseline_tables", "baselines", "config", "machine", "samples_per_second", "stages", "test", "train_seconds", "versions"])
    test_eq(sorted(result["baselines"]), ["blind", "majority", "question", "untrained"])
    test_eq((result["test"]["n"], result["baseline_tables"]["majority"]["n"], result["baselines"]["blind"]), (40, 40, None))

def test_every_kind_of_data_and_objective_trains():
    with TemporaryDirectory() as root:
        kinds = [("words", "captions", "words"), ("mixed", "both", "answers"), ("fair", "balanced", "answers"), ("easy", "positive", "answers")]
        stages = tuple(replace(few[0], name=name, data=data, objective=objective) for name,data,objective in kinds)
        pretrain_run(Path(root)/"run", stages=stages, limit=40, console=quiet)
        rows = read_metrics(Path(root)/"run"/"metrics.jsonl")
    test_eq([row["stage"] for row in rows], ["words"]*3 + ["mixed"]*3 + ["fair"]*3 + ["easy"]*3)
    _, processor = easy_vqa_model(load_preset("tiny"))
    records = {data: easy_vqa_dataset("test", data, processor, limit=None).records for data in ("captions", "questions", "both", "balanced", "positive")}
    test_eq(len(records["both"]), len(records["questions"]) + 6*len(records["captions"]))
    test_eq([r["id"] for r in records["balanced"]], [r["id"] for r in balance_answers(easy_vqa_records("test", 2))])
    test_eq([r["id"] for r in records["positive"]], [r["id"] for r in balance_answers(positive_questions(easy_vqa_records("test", 2)))])

def test_blind_baseline_belongs_to_the_default_recipe():
    default = run_config("tiny", 5, False, tuple(replace(stage, seed=5) for stage in preset_stages(load_preset("tiny"))))
    assert .5 < blind_table(default)["accuracy"] < .7 and blind_table(default)["n"] == 9673
    test_eq(blind_table({**default, "limit": 40}), None)

def test_every_mistake_is_one_line_and_exit_code_2():
    good = turns("<image>\nq", "a")
    mistakes = {
        "missing image":      ({"id": 7, "image": "gone.png", "conversations": good}, "record 7: no image 'gone.png'"),
        "broken image":       ({"id": 7, "image": "broken.png", "conversations": good}, "record 7: image 'broken.png' cannot be read"),
        "path outside":       ({"id": 7, "image": "../photo.png", "conversations": good}, "record 7: image path '../photo.png' leaves the image folder"),
        "no conversations":   ({"id": 7, "image": "photo.png"}, "record 7: no 'conversations'"),
        "unknown role":       ({"id": 7, "conversations": [{"from": "bot", "value": "q"}]}, "record 7, turn 0: unknown role 'bot'"),
        "same role twice":    ({"id": 7, "conversations": [{"from": "human", "value": "q"}]*2}, "record 7, turn 1: two turns of 'human' in a row"),
        "more tags":          ({"id": 7, "image": "photo.png", "conversations": turns("<image> <image>", "a")}, "record 7: 2 <image> tag(s) for 1 image(s)"),
        "fewer tags":         ({"id": 7, "image": "photo.png", "conversations": turns("q", "a")}, "record 7: 0 <image> tag(s) for 1 image(s)"),
        "control token":      ({"id": 7, "conversations": turns("q<end_of_turn>", "a")}, "record 7, turn 0: the text spells the control token '<end_of_turn>'"),
    }
    for name,(record,message) in mistakes.items():
        out = run(f"walk {data_file(record)}")
        print(f"{name:17} exit {out.exit_code}  {out.stderr.strip()[:110]}".replace(str(data_folder), "data"))
        assert out.exit_code == 2 and out.stderr.startswith("error: ") and message in out.stderr and "Traceback" not in out.output, (name, out.output)

def test_audit_has_three_exit_codes():
    def write_lines(name, *records):
        path = data_folder/name
        path.write_text("\n".join(json.dumps(record) for record in records))
        return path
    sample_image().save(data_folder/"photo.png")
    clean = write_lines("clean.jsonl", {"id": 1, "image": "photo.png", "conversations": turns("<image>\nq", "a")}, {"id": 2, "conversations": turns("q", "a")})
    dirty = write_lines("dirty.jsonl", {"id": 1, "image": "gone.png", "conversations": turns("<image>\nq", "a")}, {"id": 2, "conversations": turns("q<eos>", "a")})
    for path,flags in [(clean, ""), (dirty, ""), (dirty, "--template gema"), (data_folder/"no.json", "")]:
        out = run(f"audit {path} --image-folder {data_folder} --workers 0 {flags}")
        print(f"exit {out.exit_code}  {(out.stdout + out.stderr).splitlines()[0][:110]}".replace(str(data_folder), "data"))
        test_eq(out.exit_code, 0 if path == clean else 1 if (path == dirty and not flags) else 2)
    page = data_folder/"page.html"
    out = run(f"audit {dirty} --image-folder {data_folder} --workers 0 --json --html {page}")
    report = json.loads(out.stdout)
    test_eq((out.exit_code, report["errors"], sorted(report["findings"])), (1, 2, ["control_tokens", "image_missing"]))
    assert "NOT OK" in page.read_text() and "error: no folder" in run(f"audit {clean} --html {data_folder}/no/x.html").stderr

def test_prepare_writes_texts_once_and_says_what_was_left_out():
    with TemporaryDirectory() as folder:
        clean, bad = Path(folder)/"clean.jsonl", Path(folder)/"bad.jsonl"
        rows = [json.dumps({"id": n, "conversations": turns("q", f"answer {n}")}) for n in range(9)]
        clean.write_text("\n".join(rows))
        bad.write_text("\n".join([*rows, json.dumps({"id": 9, "conversations": turns("q<eos>", "a")})]))
        done = run(f"prepare {clean} --out {folder}/ready --workers 1")
        print(done.stdout.replace(folder, "DATA"))
        test_eq(done.exit_code, 0)
        assert "9 records" in done.stdout and (Path(folder)/"ready/ids.npy").is_file()
        again = run(f"prepare {clean} --out {folder}/ready --workers 1")
        test_eq(again.stdout, done.stdout)
        refused, allowed = run(f"prepare {bad} --out {folder}/bad --workers 1"), run(f"prepare {bad} --out {folder}/bad --workers 1 --allow-bad 0.2")
        print(refused.stderr.strip()[:90])
        assert refused.exit_code == 2 and "record 9, turn 0" in refused.stderr and "vlm-lit audit" in refused.stderr and "--allow-bad" in refused.stderr and not refused.stdout
        assert allowed.exit_code == 0 and "1 left out, see" in allowed.stdout

def test_settings_that_cannot_work_are_answered():
    path = data_file({"id": 7, "image": "photo.png", "conversations": turns("<image>\nq", "a")})
    with TemporaryDirectory() as runs:
        open_run(Path(runs)/"old", run_config("tiny", 0, False, preset_stages(load_preset("tiny"))), resume=False)
        cases = {f"walk {path} --template gema": "unknown template 'gema'; there are: chatml_direct, default", f"walk {path} --index 5": "--index 5: the data has 1 record(s)",
                 "walk gone.json": "no data file 'gone.json'", f"walk {path} --tokenizer ./gone": "no such folder", f"walk {path} --aspect wide": "aspect must be",
                 f"walk {path} --image-folder gone": "no image folder 'gone'", f"walk {path} --control-tokens maybe": "control_tokens must be",
                 f"pretrain --runs {runs} --name old": "already holds a run", f"pretrain --runs {runs} --name new --preset huge": "unknown preset 'huge'",
                 f"pretrain --runs {runs} --name new2 --steps 0,0": "leaves no stage", f"pretrain --runs {runs} --name new4 --steps 5": "the preset has 2 stages (captions, questions)",
                 f"pretrain --runs {runs} --name new6 --preset mgm-2b": "has no stages", f"pretrain --runs {runs} --name new3 --limit 0": "--limit must be",
                 f"pretrain --runs {runs} --name new5 --preset ./gone.json": "cannot read",
                 "export nothing --to hf": "no run 'nothing'", "export nothing --to gguf": "--to must be hf or mgm", "generate nothing photo.png hi": "no run 'nothing'", "eval nothing": "no run 'nothing'", f"eval {runs}/old": "is not finished; go on with",
                 f"pretrain --runs {runs} --name odl --resume": "to go on with; look at --name", f"pretrain --runs {runs} --name old --steps 5,5 --resume": "captions.steps is 600, not 5"}
        for line,message in cases.items():
            out = run(line)
            assert out.exit_code == 2 and message in out.stderr and "Traceback" not in out.output, (line, out.output)
    print(len(cases), "mistakes answered")

def test_tokenizer_without_bos_is_refused():
    from tokenizers import processors
    headless = load_tokenizer("gemma")
    headless.backend_tokenizer.post_processor = processors.Sequence([])
    with TemporaryDirectory() as folder:
        headless.save_pretrained(folder)
        out = run(f"walk {data_file({'id': 7, 'conversations': turns('q', 'a')})} --tokenizer {folder}")
    print(out.stderr.strip())
    assert out.exit_code == 2 and "needs a tokenizer that begins every text with BOS" in out.stderr

def test_walk_without_data_shows_the_seed():
    out = run("walk")
    print(out.output[:420])
    assert out.exit_code == 0 and "[[2, 106, 1645, 108], [2, 108, 1841," in out.output and "8 of 25 tokens learned" in out.output

def test_commands_work_on_a_small_run():
    with TemporaryDirectory() as runs:
        small = f"pretrain --runs {runs} --name small --steps 2,2 --limit 30"
        out = run(small)
        assert out.exit_code == 0 and "% of test questions" in out.output and "this model" in out.output, out.output
        table = [line for line in out.output.splitlines() if line.startswith("this model")]
        again = run(f"eval {runs}/small")
        test_eq([line for line in again.output.splitlines() if line.startswith("this model")], table)
        image = easy_vqa_folder()/"test/images/0.png"
        reply = run(f"generate {runs}/small {image} 'what color is the shape?'")
        test_eq(reply.exit_code, 0)
        for wrong,said in [("gone.png 'what color?'", "error: no image file 'gone.png'"), (f"{image} ' '", "error: the question is empty"), (f"{image} '<eos> what?'", "error: the text spells the control token '<eos>'; remove it, or pass --control-tokens escape")]:
            out = run(f"generate {runs}/small {wrong}")
            assert out.exit_code == 2 and out.stderr.startswith(said), (out.stderr, said)
        fewer = run(f"eval {runs}/small --test-questions 10").output
        test_eq([line.split()[-1] for line in fewer.splitlines()[1:]], ["10"]*3)              # the model, majority, question: of the same ten
        for to,wanted in [("hf", {"README.md", "config.json", "model.safetensors", "processor_config.json"}), ("mgm", {"config.json", "mm_projector.bin"})]:
            test_eq(run(f"export {runs}/small --to {to}").exit_code, 0)
            assert wanted <= {p.name for p in (Path(runs)/"small"/f"export-{to}").iterdir()}
        assert table[0] in (Path(runs)/"small/export-hf/README.md").read_text()               # the card gives the result
        assert "no run" in run(f"generate {runs}/small/export-hf {image} hi").stderr
        assert "is there already" in run(f"export {runs}/small --to mgm").stderr
        assert run(small).exit_code == 2                          # the folder holds a run now
        resumed = run(small + " --resume")                        # a finished run: trains nothing, tests again
        assert resumed.exit_code == 0, (resumed.output, repr(resumed.exception))
        test_eq([line for line in resumed.output.splitlines() if line.startswith("this model")], table)
    print("pretrain, eval, generate, export, resume: fine")

def test_ctrl_c_saves_and_says_how_to_go_on():
    import signal, threading
    with TemporaryDirectory() as runs:
        line = f"pretrain --runs {runs} --name cut --steps 400,2 --limit 30"
        def press():
            while not (Path(runs)/"cut"/"metrics.jsonl").exists() or not read_metrics(Path(runs)/"cut"/"metrics.jsonl"): time.sleep(.05)
            signal.raise_signal(signal.SIGINT)
        threading.Thread(target=press, daemon=True).start()
        out = run(line)
        saved, told = read_progress(Path(runs)/"cut"/"checkpoint"), run(f"generate {runs}/cut {easy_vqa_folder()/'test/images/0.png'} hi").stderr
        command = out.stderr.strip().splitlines()[-1].partition("go on with: vlm-lit ")[2]
    print(out.stderr.strip().splitlines()[-1].replace(runs, "runs"))
    assert out.exit_code == 130 and 0 < saved["step"] < 400
    test_eq(command, f"pretrain --name cut --runs {runs} --limit 30 --steps 400,2 --resume")
    assert told.strip().endswith(command)                     # whoever asks too early is told the same

def test_stopped_run_goes_on_with_the_command_that_is_shown():
    from unittest.mock import patch
    with TemporaryDirectory() as runs:
        with patch(f"{pretrain_run.__module__}.evaluate", side_effect=KeyboardInterrupt): out = run(f"pretrain --runs {runs} --name asked --steps 0,3 --limit 30 --seed 2 --test-questions 5 --blind")
        command = out.stderr.strip().splitlines()[-1].partition("go on with: vlm-lit ")[2]
        print(command.replace(runs, "runs"))
        test_eq((out.exit_code, command), (130, f"pretrain --name asked --runs {runs} --seed 2 --limit 30 --steps 0,3 --test-questions 5 --blind --resume"))
        done = run(command)
        test_eq(run(f"export {runs}/asked --to hf").exit_code, 0)
        assert "with black pictures" in (Path(runs)/"asked/export-hf/README.md").read_text()
        assert done.exit_code == 0 and "vlm-lit generate" in done.stdout, done.output
        test_eq(run("--version").output.split()[0], "vlm-lit")
