"The benchmark for ten minutes on a GPU runs whole on a CPU, and keeps what it has measured."

import importlib.util, json, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks/gpu.py"

def run(out, *options):
    "The result file of a dry run, and its exit status."
    words = [sys.executable, SCRIPT, "--dry", "--out", out, *options]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert (out / "gpu_dry.json").exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((out / "gpu_dry.json").read_text()), done.returncode

def load_script():
    "The script as a module."
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu(tmp_path):
    gpu = load_script()
    # tests/test_kills.py
    whole = [name for name in gpu.SECONDS if name not in ("training", "resume")]
    found, status = run(tmp_path, "--parts", ",".join(whole))
    parts = found["parts"]
    assert status == 0 and list(parts) == whole, parts
    failed = {
        f"{name}, {key}": result
        for name, part in parts.items()
        for key, result in part["results"].items()
        if {"failed", "timed_out"} & set(result)
    }
    assert not failed, failed
    assert all(result["equal"] for result in parts["equality"]["results"].values())
    assert list(parts["steps"]["results"]) == list(gpu.VARIANTS)
    assert set(found["bars"]) == set(gpu.BARS) - {"MFU"}  # no peak is known of a CPU
    assert 0 <= parts["loading"]["results"]["end to end"]["data_wait"] < 1
    assert all((tmp_path / f"gpu_dry_profile{end}").stat().st_size for end in (".txt", ".png"))

def test_a_part_that_takes_too_long_is_noted_and_the_others_kept(tmp_path):
    earlier = {"steps": {"status": "done", "results": {"ours": {"seconds": 1}}}}
    (tmp_path / "gpu_dry.json").write_text(json.dumps({"parts": earlier}))
    sys.path.insert(0, str(SCRIPT.parent))
    gpu = load_script()
    args = type(
        "Args", (), {"dry": True, "out": tmp_path, "parts": ["profile"], "workers": 1, "only": None}
    )
    report = gpu.Report(args)
    report.machine({"stem": "gpu_dry", "card": None})
    gpu.run_part("profile", 0.5, report)
    found = json.loads((tmp_path / "gpu_dry.json").read_text())
    assert found["parts"]["profile"]["status"] == "timed out"
    assert found["parts"]["steps"] == earlier["steps"]

FAKE = """
import json, pathlib, sys, time
folder = pathlib.Path("runs")/sys.argv[sys.argv.index("--name") + 1]
folder.mkdir(parents=True, exist_ok=True)
first = 3 if "--resume" in sys.argv else 0
lines = (folder/"metrics.jsonl").read_text().splitlines()[:first] if first else []
(folder/"metrics.jsonl").write_text("".join(line + chr(10) for line in lines))
for step in range(first + 1, 10):
    with open(folder/"metrics.jsonl", "a") as file:
        print(json.dumps({"step": step, "loss": 1/step}), file=file)
    if step == 3: (folder/"checkpoint-3").mkdir()
    time.sleep(.05)
"""

def test_kill_and_resume_compares_every_step(tmp_path, monkeypatch):
    gpu = load_script()
    monkeypatch.setattr(gpu, "command_line", lambda args: [sys.executable, "-c", FAKE])
    found = gpu.kill_and_resume(None, tmp_path, 9, 3)
    assert 3 < found["killed_after_step"] < 9 and found["equal"] and found["last_loss"] == 1 / 9

@pytest.mark.parametrize(
    "name, kind",
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "matrix products"),
        ("flash_fwd_kernel", "attention"),
        ("Memcpy HtoD", "copies"),
        ("vectorized_layer_norm_kernel", "normalization"),
        ("unknown", "elementwise, other"),
    ],
)
def test_kernels_by_name(name, kind):
    assert load_script().kind_of(name) == kind
