"Derived from nbs/measurements.ipynb by `make tests`; edit the notebook, not this file."
import json, tempfile
from pathlib import Path
from fastcore.test import test_eq

def setup_module():
    global KERNELS, OUTCOMES, results, root
    OUTCOMES = {"tries", "read", "read in part", "refused", "made again", "longest_seconds"}
    KERNELS = "pillow", "torch", "torch_draft"
    root = next(p for p in (Path(".."), Path(".")) if (p / "benchmarks/results").is_dir())
    results = root / "benchmarks/results"

def test_measurements_name_their_machine():
    for file in sorted(results.glob("*.json")):
        found = json.loads(file.read_text())
        text = json.dumps(found)
        assert "torch" in text or "python" in text.lower(), f"{file.name} names no versions"
        if not file.stem.endswith("fuzz"): continue
        assert not found.get("violations") and not found.get("bad"), file.name
        assert all(row.keys() <= OUTCOMES for row in found.get("files", {}).values()), file.name
    print(len(sorted(results.glob("*.json"))), "files of results")
