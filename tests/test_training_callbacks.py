"Derived from nbs/16b_callbacks.ipynb by `make tests`; edit the notebook, not this file."
import json, math, signal, statistics, threading, time
from collections import deque
from pathlib import Path
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback
from vlm_lit.core import ConfigError, progress_console
from vlm_lit.files import write_rows
from vlm_lit.training.meter import read_metrics
import io, os
from types import SimpleNamespace
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.training.callbacks import ConsoleProgress
from vlm_lit.training.callbacks import LossGuard
from vlm_lit.training.callbacks import StopOnSignal

def test_stop_at_a_spike():
    guard = LossGuard(None, Path("bad_steps.jsonl"))
    guard.recent.extend([1.0] * 9 + [9.0])
    args = SimpleNamespace(spike_factor=3.0)
    watch = [
        "loss",
        "args.spike_factor",
        "statistics.median(self.recent)",
        "statistics.mean(self.recent)",
    ]
    with Breakpoint(
        LossGuard.reason, at="if enough and loss", watch=watch, set={"enough": False}
    ) as bp:
        guard.reason(3.1, 1.0, args)
    bp.expect({"statistics.median(self.recent)": 1.0, "statistics.mean(self.recent)": 1.8})
    bp.expect_changed(result=("the loss is 3.1, the median of the last steps 1", None))

def test_stop_after_a_signal():
    messages = []
    stop = StopOnSignal(messages.append)
    control = SimpleNamespace(should_save=False, should_training_stop=False, should_log=False)
    stop.on_train_begin(None, None, None)
    watch = ["self.number", "vars(control)"]
    with Breakpoint(StopOnSignal.on_step_end, at="control.should_log", watch=watch) as bp:
        stop.on_step_end(None, None, control)  # nothing was received: the line is not reached
        os.kill(os.getpid(), signal.SIGTERM)
        stop.on_step_end(None, None, control)
    stop.restore()
    assert messages == ["stopping after this step; a second Ctrl-C stops at once"]
    bp.expect(
        {"self.number": signal.SIGTERM, "vars(control)": dict.fromkeys(vars(control), False)}, hits=1
    )
    bp.expect_after({"vars(control)": dict.fromkeys(vars(control), True)})

def test_guard_names_what_is_wrong():
    guard = LossGuard(None, Path("bad_steps.jsonl"))
    args = SimpleNamespace(spike_factor=3.0)
    assert guard.reason(float("nan"), 1.0, args) == "the loss is nan"
    assert guard.reason(1.0, float("inf"), args) == "the gradient's norm is inf"
    guard.recent.extend([1.0] * 10)
    assert guard.reason(2.9, 1.0, args) is None and "3.1, the median" in guard.reason(3.1, 1.0, args)
    assert guard.reason(99.0, 1.0, SimpleNamespace(spike_factor=None)) is None

def test_signal_saves_and_stops():
    import os

    said, stop = [], StopOnSignal(lambda text: said.append(text))
    stop.on_train_begin(None, None, None)
    control = SimpleNamespace(should_save=False, should_training_stop=False, should_log=False)
    stop.on_step_end(None, None, control)
    assert not control.should_save
    os.kill(os.getpid(), signal.SIGTERM)
    stop.on_step_end(None, None, control)
    assert control.should_save
    assert control.should_training_stop
    assert stop.number == signal.SIGTERM
    assert said
    stop.restore()
    handler = signal.getsignal(signal.SIGTERM)
    assert handler is signal.SIG_DFL or handler != stop._note

def test_a_line_without_a_terminal():
    out = Console(file=io.StringIO(), force_terminal=False, force_jupyter=False, width=200)
    shown = ConsoleProgress(out, every=0)
    state = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=8)
    shown.on_train_begin(None, state, None)
    silent, logging = SimpleNamespace(should_log=False), SimpleNamespace(should_log=True)
    shown.on_step_end(None, SimpleNamespace(**{**vars(state), "global_step": 1}), silent)
    shown.on_step_end(None, state, logging)  # the values of this step come next
    shown.on_log(None, state, None, logs={"loss": 1.5, "data_wait": 0.5})
    shown.on_log(None, state, None, logs={"eval_loss": 2.5})
    shown.on_step_end(None, SimpleNamespace(**{**vars(state), "global_step": 5}), silent)
    lines = out.file.getvalue().splitlines()
    assert lines[:3] == ["step 1/8", "step 3/8  loss 1.5000  waiting 50%", "step 3/8  eval loss 2.5000"]
    assert lines[3:] == ["step 5/8  (step 3: loss 1.5000  waiting 50%)"]

def test_waiting_for_data_is_said_once():
    out = Console(file=io.StringIO(), force_terminal=False, force_jupyter=False, width=200)
    shown, args = ConsoleProgress(out, every=1e9), SimpleNamespace(dataloader_num_workers=0)
    for step, wait in [(10, 0.9), (20, 0.2), (30, 0.64), (40, 0.8)]:
        state = SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=50)
        shown.last = time.monotonic()  # no other line is due
        shown.on_log(args, state, None, logs={"loss": 1.5, "data_wait": wait})
    print(out.file.getvalue())
    assert out.file.getvalue().count("\n") == 1 and "step 30/50  64% of the time" in out.file.getvalue()
    assert "training.dataloader_num_workers is 0, try 2" in out.file.getvalue()
