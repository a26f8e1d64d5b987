"Derived from nbs/15b_meter.ipynb by `make tests`; edit the notebook, not this file."
import json, time, torch
from pathlib import Path
from transformers import TrainerCallback
from vlm_lit.core import ConfigError
from vlm_lit.files import write_rows
import tempfile
from types import SimpleNamespace
from unittest.mock import patch
from vlm_lit.data.collator import BatchInfo
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.training.meter import Meter
from vlm_lit.training.meter import MetricsFile
from vlm_lit.training.meter import read_metrics

def setup_module():
    global Clock, slow_batches, two_steps
    class Clock:
        "Replaces `time`; seconds pass only in `sleep`."

        now = 0.0

        def perf_counter(self): return self.now

        def sleep(self, seconds): self.now += seconds
    def slow_batches(clock):
        "Two batches of one sample from each of two sources."
        for k in range(2):
            clock.sleep(0.05)
            yield {"info": BatchInfo([2 * k, 2 * k + 1], [0, 1], [30, 20], [1, 0], [4, 6])}
    def two_steps(counts_fetch=True):
        "The log line of two steps; `counts_fetch`: whether the clock runs while a batch is fetched."
        clock, meter = Clock(), Meter(["captions", "dialogues"])
        with patch.dict(Meter.start.__globals__, {"time": clock}):
            if counts_fetch: meter.start()
            for batch in meter.timed(slow_batches(clock)):
                if not counts_fetch: meter.start()
                meter.add_losses(batch["info"], torch.tensor([1.0] * 4 + [2.0] * 6))
                clock.sleep(0.01)
                if not counts_fetch: meter.stop()
            return meter.row()

def test_waiting_is_measured_at_each_fetch():
    watch = ["round(self.waited, 2)", "self.samples"]
    with Breakpoint(Meter.timed, at="self._count(batch", watch=watch) as bp:
        row = two_steps()
    print(f"data_wait {row['data_wait']:.3f}, {row['samples_per_second']:.0f} samples per second")
    bp.expect_each({"round(self.waited, 2)": [0.05, 0.1], "self.samples": [0, 2]})

def test_a_clock_without_the_fetch_shows_a_fast_run():
    def stopped(counts_fetch):
        watch = ["round(counts[0] / seconds)", "round(self.waited / seconds, 2)", "self.samples"]
        with Breakpoint(Meter.row, at="row = {", watch=watch) as bp:
            two_steps(counts_fetch)
        return bp

    diff = stopped(True).diff(stopped(False), titles=("the meter", "a clock of the step alone"))
    diff.expect({"round(counts[0] / seconds)": (33, 200), "round(self.waited / seconds, 2)": (0.83, 5)})

def test_a_resumed_run_removes_the_lines_that_come_again():
    path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"step": 8, "lo')
    state = SimpleNamespace(is_world_process_zero=True, global_step=4)
    steps = "[row['step'] for row in read_metrics(self.path)]"
    with Breakpoint(MetricsFile.on_train_begin, at="write_rows(", watch=[steps, "len(rows)"]) as bp:
        MetricsFile(path, Meter(["a"])).on_train_begin(None, state, None)
    bp.expect({steps: [2, 4, 6], "len(rows)": 2}).expect_after({steps: [2, 4]})

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
