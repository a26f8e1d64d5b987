"""Does mining help? The small preset with and without its second tower, several seeds, equal steps, on pictures held out.

    python benchmarks/mining_ablation.py                      -> benchmarks/results/mining_ablation.json
    python benchmarks/mining_ablation.py --steps 20 --seeds 1    a trial; written only with --out

400 training pictures are kept out of training and asked about afterwards, the same for all runs; the test split is not touched.
Each run is a process of its own and does both stages, captions and questions, with `--steps` steps each.
"""
import argparse, json, random, statistics, subprocess, sys, tempfile
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0] or ".").resolve() == HERE: del sys.path[0]      # or easy_vqa.py beside this file would stand for the package of that name

RESULT = HERE/"results/mining_ablation.json"
ARMS = {"without mining": {"vision_aux_config": None}, "with mining": {}}
STEPS, SEEDS, HELD_OUT = 300, 3, 400

def held_out_pictures():
    "Paths of the training pictures that no run is trained on."
    from vlm_lit.dataset import easy_vqa_records
    pictures = sorted({r["image"] for r in easy_vqa_records("train", 2)})
    return set(random.Random(0).sample(pictures, HELD_OUT))

def dataset(stage, config, tokenizer, pictures, inside):
    "Training records of a stage about these pictures, or about all others."
    from vlm_lit.dataset import LazySupervisedDataset, easy_vqa_folder, easy_vqa_records
    records = [r for r in easy_vqa_records("train", stage) if (r["image"] in pictures) == inside]
    return LazySupervisedDataset(records, tokenizer, easy_vqa_folder(), image_size_aux=config.image_size_aux, image_size=config.image_size, mean=config.image_mean, std=config.image_std).preload()

def one_run(arm, seed, steps):
    "Train one model and ask about the pictures it has not seen."
    from vlm_lit.cli import from_scratch, machine_facts
    from vlm_lit.evaluation import evaluate
    from vlm_lit.model import VLMConfig
    from vlm_lit.tokenizer import load_tokenizer
    from vlm_lit.training import FINETUNE, PRETRAIN, train
    from vlm_lit.weights import load_preset, make_model, preset_config
    tokenizer, pictures = load_tokenizer("gemma"), held_out_pictures()
    config = VLMConfig.from_dict({**preset_config("tiny", **from_scratch(tokenizer, load_preset("tiny"))).to_dict(), **ARMS[arm]})
    model, seconds = make_model(config, seed), 0
    with tempfile.TemporaryDirectory() as folder:
        for n,stage in enumerate((PRETRAIN, FINETUNE), 1):
            stage = replace(stage, seed=seed, steps=steps, save_every=steps)
            seconds += train(model, dataset(n, config, tokenizer, pictures, inside=False), stage, folder, calibrate=n == 1)["seconds"]
    table, _ = evaluate(model, dataset(2, config, tokenizer, pictures, inside=True))
    machine, versions = machine_facts()
    return {"arm": arm, "seed": seed, "steps": steps, **table, "weights": sum(p.numel() for p in model.parameters()), "train_seconds": round(seconds, 1), "machine": machine, "versions": versions}

def summary(runs):
    "Mean and range of every arm."
    own = {arm: [run["accuracy"] for run in runs if run["arm"] == arm] for arm in ARMS}
    return {arm: {"mean": round(statistics.mean(a), 4), "lowest": round(min(a), 4), "highest": round(max(a), 4), "seeds": len(a)} for arm,a in own.items()}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each of the two stages")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each arm")
    parser.add_argument("--out", type=Path, help="where to write; the default run has its place")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print(json.dumps(one_run(args.one[0], int(args.one[1]), args.steps)))
    runs = []
    for seed in range(args.seeds):
        for arm in ARMS:
            done = subprocess.run([sys.executable, __file__, "--one", arm, str(seed), "--steps", str(args.steps)], check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"seed {seed}, {arm}: {runs[-1]['accuracy']:.2%} of {runs[-1]['n']} questions, {runs[-1]['train_seconds']:.0f} s", file=sys.stderr, flush=True)
    shared = {key: runs[0][key] for key in ("machine", "versions")}
    out = {"command": " ".join(["python benchmarks/mining_ablation.py", *sys.argv[1:]]), "steps": args.steps, "held_out_pictures": HELD_OUT, "summary": summary(runs), **shared,
           "runs": [{k: v for k,v in run.items() if k not in shared} for run in runs]}
    print(json.dumps(out["summary"], indent=1))
    target = args.out or (RESULT if (args.steps, args.seeds) == (STEPS, SEEDS) else None)
    if target: target.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")

if __name__ == "__main__": main()
