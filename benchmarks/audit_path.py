"""Time `vlm-lit audit` on a data set of LLaVA's pretraining size. Text only: images are not looked
for.

python benchmarks/audit_path.py            558,000 records -> benchmarks/results/audit_path.json
python benchmarks/audit_path.py --quick    5,000 records, nothing written
"""

import argparse, json, os, platform, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path
from record_path import write_data

RESULT = Path(__file__).resolve().parent / "results/audit_path.json"

def measure(n=558_000, workers=2):
    "Seconds of the whole command, start and tokenizer included."
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.json"
        write_data(data, n)
        began = time.time()
        words = [Path(sys.executable).with_name("vlm-lit"), "audit", data]
        words += ["--workers", str(workers), "--json"]
        env = {**os.environ, "VLM_LIT_CACHE": f"{folder}/cache"}
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=env)
        seconds = time.time() - began
    report = json.loads(done.stdout)
    return {
        "records": report["records"],
        "seconds": round(seconds, 1),
        "records_per_second": round(n / seconds),
        "workers": workers,
        "verdict": report["verdict"],
        "exit_code": done.returncode,
    }

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="5,000 records, nothing written")
    args = parser.parse_args()
    result = measure(5000 if args.quick else 558_000)
    print(result)
    if args.quick: return
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    versions = {k: version(k) for k in ("torch", "transformers", "tokenizers", "numpy")}
    result = {"command": "python benchmarks/audit_path.py", **result}
    result |= {"machine": machine, "versions": versions}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")

if __name__ == "__main__": main()
