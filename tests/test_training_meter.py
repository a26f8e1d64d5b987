"Derived from nbs/15b_meter.ipynb by `make tests`; edit the notebook, not this file."
import json, time, torch
from pathlib import Path
from transformers import TrainerCallback
from vlm_lit.files import write_rows
import tempfile
from types import SimpleNamespace
from fastcore.test import test_eq
from vlm_lit.data.collator import BatchInfo
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.training.meter import Meter
from vlm_lit.training.meter import MetricsFile
from vlm_lit.training.meter import read_metrics

def test_losses_are_summed_by_source():
    info = BatchInfo([0, 1], [0, 1], [30, 20], [1, 0], [4, 6])
    meter = Meter(["captions", "dialogues"])
    at, watch = "self.sums[0].index_add_", "which token_losses self.sums"
    with Breakpoint(Meter.add_losses, at=at, watch=watch) as bp:
        meter.add_losses(info, torch.tensor([1.0] * 4 + [2.0] * 6))
    bp.expect(which=[0] * 4 + [1] * 6)
    bp.expect_after({"self.sums": [[4.0, 12.0], [0.0, 0.0]]})

def test_a_resumed_run_removes_later_lines():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_text("".join(f'{{"step": {n}}}\n' for n in (2, 4, 6)) + '{"step": 8, "lo')
        state, at = SimpleNamespace(is_world_process_zero=True, global_step=4), "write_rows(self.path"
        with Breakpoint(MetricsFile.on_train_begin, at=at, watch="state.global_step rows") as bp:
            MetricsFile(path, Meter(["a"])).on_train_begin(None, state, None)
        test_eq([row["step"] for row in read_metrics(path)], [2, 4])
    bp.expect(rows=[{"step": 2}, {"step": 4}])

def test_meter_counts_by_source_and_by_the_wall():
    meter = Meter(["a", "b"], flops=lambda info: 10.0 * sum(info.lengths), peak=100.0, world_size=1)
    meter.start()
    for batch in meter.timed(iter([{"info": BatchInfo([0, 1], [0, 1], [30, 20], [1, 0], [4, 6])}])):
        meter.add_losses(batch["info"], torch.tensor([1.0] * 4 + [2.0] * 6))
        time.sleep(0.05)
    row = meter.row()
    assert row["loss/a"] == 1 and row["loss/b"] == 2 and row["draws/a"] == row["draws/b"] == 1
    assert row["supervised_tokens/b"] == 6 and row["data_wait"] < 0.5
    assert 0 < row["samples_per_second"] <= 2 / 0.05
    assert abs(row["mfu"] * 100 / (row["samples_per_second"] / 2 * 500) - 1) < 1e-6
    assert "mfu" not in Meter(["a"], flops=lambda info: 1.0, peak=None).row()

def test_evaluation_does_not_count():
    meter = Meter(["a"])
    meter.start()
    meter.stop()
    time.sleep(0.05)
    meter.start()
    time.sleep(0.01)
    meter._count(BatchInfo([0], [0], [3], [0], [1]))
    assert meter.row()["samples_per_second"] > 1 / 0.05

def test_metrics_file_forgets_what_comes_again():
    path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    meter = Meter(["a"])
    meter.logged_losses = [1.0, 2.0]
    file = MetricsFile(path, meter)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    file.on_train_begin(None, state, None)
    for state.global_step in (2, 4, 6):
        file.on_log(None, state, None, logs={"loss": 1.5})
    with open(path, "a") as cut: cut.write('{"step": 8, "lo')
    state.global_step = 4
    file.on_train_begin(None, state, None)
    assert [row["step"] for row in read_metrics(path)] == [2, 4]
    assert read_metrics(path)[0]["losses"] == [1.0, 2.0]
