"Derived from nbs/19a_plan.ipynb by `make tests`; edit the notebook, not this file."
import math, shutil, statistics, time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
import numpy as np, torch
from transformers import TrainerCallback
from vlm_lit.core import ConfigError, DataError, printable
from vlm_lit.data.audit import AuditChunks, count_all
from vlm_lit.data.data_findings import RECORD
from vlm_lit.data.findings import AuditSettings, severity
from vlm_lit.training.recipe import Recipe
from vlm_lit.training.run import Prepared, prepare_run, record_checksums, shared_records
from vlm_lit.training.run import training_arguments
import json, sys, tempfile
import pytest
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import sample_image
from vlm_lit.training.recipe import load_recipe
from small_parts import small_tokenizer, talk
from vlm_lit.training.plan import _problems
from vlm_lit.training.plan import _size
from vlm_lit.training.plan import count_data
from vlm_lit.training.plan import count_steps
from vlm_lit.training.plan import make_plan
from vlm_lit.training.plan import measure_steps
from vlm_lit.training.plan import measured_recipe
from vlm_lit.training.plan import plan_lines

def setup_module():
    global k, place, prepared, record, records, small_recipe
    sys.path[:0] = ["../tests", "tests"]
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp())
    small_tokenizer().save_pretrained(place / "tokenizer")
    for k in range(4): sample_image(40 + k, 30).save(place / f"{k}.png")
    def record(k):
        "With an image, every third one without."
        own = {"id": k, "conversations": talk("hi" if k % 3 == 0 else "<image>\nWhat is it?")}
        return own if k % 3 == 0 else {**own, "image": f"{k % 4}.png"}
    def small_recipe(records, *overrides, **training):
        "A recipe for `tiny` on some records."
        (place / "train.json").write_text(json.dumps(records))
        training = {
            "max_steps": 6, "per_device_train_batch_size": 2, "global_batch_size": 4,
            "dataloader_num_workers": 0, "logging_steps": 1, "save_steps": 3, "use_cpu": True,
            "log_level": "error", "disable_tqdm": True, **training,
        }  # fmt: skip
        data = {"max_length": 64, "overlength": "skip", "eval_samples": 0}
        data["train"] = [{"path": str(place / "train.json"), "image_folder": str(place)}]
        text = {"model_type": "gemma", "hidden_size": 32, "num_hidden_layers": 1, "head_dim": 16}
        text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
        model = {"preset": "tiny", "tokenizer": str(place / "tokenizer")}
        model["language_model"] = {"config": text}
        sections = {"model": model, "data": data, "training": training}
        words = [word for key, own in sections.items() for word in (f"--{key}", json.dumps(own))]
        return load_recipe(overrides=[*words, *overrides])
    records = [record(k) for k in range(12)]
    records[1]["image"] = "gone.png"
    records[3]["conversations"] = talk("hi", "a" * 400)
    prepared = prepare_run(measured_recipe(small_recipe(records), 1), place / "counted")

def test_stop_where_records_are_counted():
    with Breakpoint(count_data, at="used = lengths", watch="len(found) skipped") as bp:
        lengths, found = count_data(prepared.train)
    print(found["used"], found["not_used"])
    bp.expect({"len(found)": 12, "skipped": {"image_missing": 1, "over_length": 1}})
    assert lengths.tolist().count(0) == 2 and lengths[1] == lengths[3] == 0

def test_stop_at_the_padding_of_a_step():
    lengths, _ = count_data(prepared.train)
    even = {"lengths": lambda lengths: np.full_like(lengths, 40)}
    watch = "len(chosen) lengths[:4]"
    with Breakpoint(count_steps, at="tokens, area = ", watch=watch, set=even) as bp:
        count_steps(prepared, lengths, prepared.trainer.args)
    bp.expect({"len(chosen)": 3})
    bp.expect_changed({"result['tokens_of_positions'] == 1": (False, True)})

def test_stop_after_the_measured_steps():
    recipe = small_recipe([record(k) for k in range(12)])
    with Breakpoint(measure_steps, at="row = trainer.meter.row()", watch="len(clock.seconds)") as bp:
        plan = make_plan(recipe, place)
    bp.expect({"len(clock.seconds)": 3, "len(clock.times)": 5})
    assert plan["measured"]["seconds_per_step"] > 0 and plan["problems"] == []

def test_a_plan_counts_what_training_does():
    from vlm_lit.training.run import train
    from rich.console import Console
    import io

    for batching, extra in [("shuffled", []), ("grouped", []), ("packed", [])]:
        recipe = small_recipe([record(k) for k in range(24)], batching=batching, max_steps=-1)
        recipe.training["num_train_epochs"] = 2
        plan = make_plan(recipe, place, measure=0)
        out = place / f"run-{batching}"
        result = train(recipe, out, console=Console(file=io.StringIO()))
        assert result["steps"] == plan["steps"]["steps"], (batching, result["steps"], plan["steps"])
        assert plan["measured"] is None and plan["hours"] is None
        size = sum(f.stat().st_size for f in next(out.glob("checkpoint-*")).iterdir() if f.is_file()
                   and f.name in ("trainable.safetensors", "optimizer.pt"))  # fmt: skip
        assert 0.8 < size / plan["memory"]["checkpoint_bytes"] < 1.3, (size, plan["memory"])

def test_what_would_stop_a_run_is_a_problem():
    records = [record(k) for k in range(12)]
    records[2]["image"] = "gone.png"
    plan = make_plan(small_recipe(records), place, measure=0)
    assert "8.3% of the records are bad" in plan["problems"][0]
    assert plan["data"]["not_used"] == {"image_missing": 1}
    allowed = small_recipe(records, "--data.bad_samples.max_fraction", "0.5")
    assert make_plan(allowed, place, measure=0)["problems"] == []
    full = {**plan, "disk_free_bytes": 5, "measured": {"why": "record 3: gone"}}
    problems = _problems(full, allowed)
    assert "5 bytes are free" in problems[0] and "record 3: gone" in problems[1]
    with pytest.raises(ConfigError, match="2 or more"):
        make_plan(allowed, place, measure=1)
    long = [{**record(0), "conversations": talk("a", "b " * 40)}] * 4
    cut = small_recipe([{**r, "id": n} for n, r in enumerate(long)], "--data.overlength", "truncate")
    found = count_data(prepare_run(cut, place / "cut").train)[1]
    assert (found["used"], found["not_used"]) == (0, {"over_length": 4})
    hints = make_plan(small_recipe([{**record(k), "hint": "left"} for k in range(3)]), place, measure=0)
    assert "keys not read     in 3 records, which hold text there" in plan_lines(hints)
    assert not any("not read" in line for line in plan_lines(plan))
    same = [{"path": str(place / "train.json"), "image_folder": str(place)}]
    seen = make_plan(small_recipe([record(0)], "--data.eval", json.dumps(same)), place, measure=0)
    (warning,) = (line for line in plan_lines(seen) if line.startswith("warning: "))
    assert "train.json has the same records as data.train" in warning and not plan["warnings"]
    assert _size(None) == "not known" and _size(1536) == "1.5 KiB" and _size(2**41) == "2.0 TiB"
    assert not list(place.glob("**/checkpoint-*/../plan*"))
