"""Train the default run from nothing and keep its result, and the blind baseline's, in the project.

    python benchmarks/easy_vqa.py            the run of `make pretrain`  -> benchmarks/results/easy_vqa_tiny*.{json,png}
    python benchmarks/easy_vqa.py --blind    the same on black pictures  -> vlm_lit/assets/easy_vqa_blind.json
"""
import argparse, json, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, BLIND = ROOT/"benchmarks/results", ROOT/"vlm_lit/assets/easy_vqa_blind.json"

def run(*flags):
    "A whole run in a temporary folder; the caller takes what it needs."
    runs = Path(tempfile.mkdtemp())
    subprocess.run([Path(sys.executable).with_name("vlm-lit"), "pretrain", "--runs", runs, "--name", "run", *flags], check=True)
    return runs/"run"

def keep(folder):
    "The result and pictures of a run, for README and notebooks."
    RESULTS.mkdir(exist_ok=True)
    shutil.copy(folder/"result.json", RESULTS/"easy_vqa_tiny.json")
    for name in ("curves", "samples"): shutil.copy(folder/f"{name}.png", RESULTS/f"easy_vqa_tiny_{name}.png")

def keep_blind(folder):
    "Accuracy of the run on black pictures, with the command that measured it."
    result = json.loads((folder/"result.json").read_text())
    kept = {"command": "python benchmarks/easy_vqa.py --blind", **{k: result[k] for k in ("config", "test", "machine", "versions")}}
    BLIND.write_text(json.dumps(kept, indent=1) + "\n")

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blind", action="store_true", help="black pictures")
    parser.add_argument("--keep", type=Path, help="keep an existing run's folder instead of training")
    args = parser.parse_args()
    folder = args.keep or run(*(["--blind"] if args.blind else []))
    (keep_blind if args.blind else keep)(folder)

if __name__ == "__main__": main()
