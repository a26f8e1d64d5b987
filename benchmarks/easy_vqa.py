"""Train a preset on easy-vqa and keep its result, and the blind baseline's, in the project.

    python benchmarks/easy_vqa.py                    the run of `make pretrain`  -> benchmarks/results/easy_vqa_tiny*.{json,png}
    python benchmarks/easy_vqa.py --preset smol      with pretrained parts       -> benchmarks/results/easy_vqa_smol*, smol_mm_projector.bin
    python benchmarks/easy_vqa.py --preset gemma3-270m --steps 200,120,0,0 --test-questions 200     a short run of stage 1
    python benchmarks/easy_vqa.py --blind            the same on black pictures  -> vlm_lit/assets/easy_vqa_blind.json
    python benchmarks/easy_vqa.py --keep FOLDER      an existing run instead of training one

Other flags go to `vlm-lit pretrain`, such as --steps 200,0,0.
"""
import argparse, shutil, subprocess, sys, tempfile
from pathlib import Path
from vlm_lit.cli import blind_table
from vlm_lit.weights import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS, ASSETS = ROOT/"benchmarks/results", ROOT/"vlm_lit/assets"

def run(*flags):
    "A whole run in a temporary folder; the caller takes what it needs."
    runs = Path(tempfile.mkdtemp())
    subprocess.run([Path(sys.executable).with_name("vlm-lit"), "pretrain", "--runs", runs, "--name", "run", *flags], check=True)
    return runs/"run"

def keep(folder, preset):
    "The result and pictures of a run, and what its first stage has learned, for README and notebooks."
    RESULTS.mkdir(exist_ok=True)
    shutil.copy(folder/"result.json", RESULTS/f"easy_vqa_{preset}.json")
    for name in ("curves", "samples"): shutil.copy(folder/f"{name}.png", RESULTS/f"easy_vqa_{preset}_{name}.png")
    if preset == "smol": shutil.copy(folder/"mm_projector.bin", RESULTS/"smol_mm_projector.bin")       # alignment.ipynb asks it

def keep_blind(folder, preset):
    "Accuracy of the run on black pictures, with the command that measured it."
    result = read_json(folder/"result.json")
    command = "python benchmarks/easy_vqa.py --blind" + ("" if preset == "tiny" else f" --preset {preset}")
    kept = {"command": command, **{k: result[k] for k in ("config", "test", "stages", "machine", "versions")}}
    write_json(ASSETS/("easy_vqa_blind.json" if preset == "tiny" else f"easy_vqa_blind_{preset}.json"), kept)
    path = RESULTS/f"easy_vqa_{preset}.json"
    if path.exists(): write_json(path, with_blind(read_json(path)))

def with_blind(result):
    "A kept result with the row *blind* of its recipe, which may have been measured after it."
    table = blind_table(result["config"])
    result["baseline_tables"]["blind"], result["baselines"]["blind"] = table, table and table["accuracy"]
    return result

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="which preset")
    parser.add_argument("--blind", action="store_true", help="black pictures")
    parser.add_argument("--keep", type=Path, help="keep an existing run's folder instead of training")
    args, flags = parser.parse_known_args()
    folder = args.keep or run("--preset", args.preset, *(["--blind"] if args.blind else []), *flags)
    (keep_blind if args.blind else keep)(folder, args.preset)

if __name__ == "__main__": main()
