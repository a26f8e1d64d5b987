"Runs killed at any moment go on as if nothing had been: three of those of the benchmark."

import subprocess, sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks/kills.py"

def test_killed_runs_resume_to_the_bit():
    done = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok", "FAILED"))]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(lines) == 3 and all(line.startswith("ok") for line in lines)
