"""Memory and time of opening a data set of LLaVA's pretraining size: `json.load` against `Records`.

    python benchmarks/record_path.py            558,000 records
                                                -> benchmarks/results/record_path.json
    python benchmarks/record_path.py --quick    20,000 records, nothing is written

Every number comes from a process of its own, in which torch and `datasets` are imported already.
*Owned* are pages that the process has written and shares with no other. RSS counts pages of mapped
files, too, which the operating system shares and takes back as it needs.
A forked worker's growth is what it gains while it reads all records: pages it had shared with its
parent and has copied count.
"""

import argparse, importlib.metadata, json, os, platform, random, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/record_path.json"
WORDS = (
    "a the of in on with and photo person man woman red blue small large old new city street "
    "house beach sky water tree table chair dog cat car vector illustration background white "
    "black portrait day night sunset"
).split()
QUESTIONS = [
    "Render a clear and concise summary of the photo.\n<image>",
    "<image>\nWrite a terse but informative summary of the picture.",
    "What is in the photo?\n<image>",
    "<image>\nGive a brief description of the image.",
]

def write_data(path, n):
    "A file like LLaVA's pretraining set: one list, indented, captions of 8 to 16 words."
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for k in range(n):
            turns = [
                {"from": "human", "value": rng.choice(QUESTIONS)},
                {"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(8, 16)))},
            ]
            record = {
                "id": f"{k:09}",
                "image": f"{k // 1000:05}/{k:09}.jpg",
                "conversations": turns,
            }
            file.write(("[" if not k else ",") + "\n" + json.dumps(record, indent=2))
        file.write("\n]\n")

def memory():
    "RSS, and what this process owns: pages that it has written and shares with nobody; in MiB."
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    fields = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {"rss": fields["Rss"], "owned": fields["Private_Dirty"]}

def grown(before):
    "Growth since `before`, in MiB."
    return {k: round(v - before[k], 1) for k, v in memory().items()}

def seen(records, indices):
    "Read some records; a number that depends on each."
    return sum(len(records[i]["conversations"][1]["value"]) for i in indices)

class Texts:
    "A dataset whose items are small; a worker reports its own growth with the last of its items."

    def __init__(self, records, indices):
        self.records = records
        self.indices = indices
        self.start = None
        self.last = {}

    def __len__(self): return len(self.indices)

    def __getitem__(self, k):
        if self.start is None: self.start = memory()
        size = seen(self.records, [self.indices[k]])
        return (size, grown(self.start)) if k >= len(self) - 2000 and k % 500 < 2 else (size, None)

def same(x): return x

def worker_growth(records, indices, context):
    "The growth of a DataLoader worker that reads the records with these numbers."
    from torch.utils.data import DataLoader
    from vlm_lit.data.records import one_thread

    found = [
        g
        for batch in DataLoader(
            Texts(records, indices),
            batch_size=500,
            num_workers=1,
            collate_fn=same,
            multiprocessing_context=context,
            worker_init_fn=one_thread,
        )
        for _, g in batch
        if g
    ]
    return {k: max(g[k] for g in found) for k in ("rss", "owned")}

def indices_of(n, many):
    "Random record numbers."
    rng = random.Random(1)
    return [rng.randrange(n) for _ in range(many)]

def part(what, path, many):
    "One measurement, in the process that was started for it."
    import datasets, torch
    from vlm_lit.data.records import Records

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    before, began = memory(), time.perf_counter()
    if what == "json.load":
        with open(path, encoding="utf-8") as file: records = json.load(file)
    else: records = Records(path)
    out = {
        "seconds": round(time.perf_counter() - began, 3),
        "open": grown(before),
        "n": len(records),
    }
    if what == "first open":
        out["seen"] = seen(records, range(min(1000, len(records))))
    if what == "read":
        numbers, began = indices_of(len(records), many), time.perf_counter()
        out["seen"] = seen(records, numbers)
        out["microseconds_per_record"] = round((time.perf_counter() - began) / many * 1e6, 1)
        began = time.perf_counter()
        for k in range(0, many, 16): records.read(numbers[k : k + 16])
        out["microseconds_by_sixteen"] = round((time.perf_counter() - began) / many * 1e6, 1)
        out["open_and_reads"] = grown(before)
    # all records
    if what in ("json.load", "workers"):
        out["forked_worker"] = worker_growth(records, range(len(records)), "fork")
    if what == "workers":
        out["spawned_worker"] = worker_growth(records, indices_of(len(records), many), "spawn")
    return out

def run_part(what, path, many, cache):
    "`part` in a fresh process."
    env = {
        **os.environ,
        "VLM_LIT_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    os.sync()  # a page of a file that is not yet on the disk would count as written
    done = subprocess.run(
        [sys.executable, __file__, "--part", what, "--path", str(path), "--many", str(many)],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])

def measure(n=558_000, quick=False) -> dict:
    "All numbers, JSON-able."
    n, many = (20_000, 5000) if quick else (n, 20_000)
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "pretrain.json", Path(folder) / "cache"
        write_data(path, n)
        parts = {
            what: run_part(what, path, many, cache)
            for what in ("json.load", "first open", "second open", "read", "workers")
        }
        size = path.stat().st_size
    reference, ours = parts["json.load"], parts["read"]["open_and_reads"]
    ratios = {
        "memory": round(reference["open"]["owned"] / max(ours["owned"], 0.1), 1),
        "worker memory": round(
            reference["forked_worker"]["owned"]
            / max(parts["workers"]["forked_worker"]["owned"], 0.1),
            1,
        ),
        "second open": round(reference["seconds"] / max(parts["second open"]["seconds"], 0.001), 1),
    }
    return {
        "n": n,
        "file_mib": round(size / 2**20, 1),
        "random_reads": many,
        "unit": "MiB, seconds",
        "reference": reference,
        "records": {k: v for k, v in parts.items() if k != "json.load"},
        "ratios": ratios,
    }

def table(result):
    "The numbers as text."
    r, o = result["reference"], result["records"]
    rows = [
        ("", "json.load", "Records"),
        ("first open, s", r["seconds"], o["first open"]["seconds"]),
        ("second open, s", r["seconds"], o["second open"]["seconds"]),
        ("first open, owned, MiB", r["open"]["owned"], o["first open"]["open"]["owned"]),
        (
            "second open and random reads, owned",
            r["open"]["owned"],
            o["read"]["open_and_reads"]["owned"],
        ),
        ("the same, RSS", r["open"]["rss"], o["read"]["open_and_reads"]["rss"]),
        (
            "forked worker that reads all, owned",
            r["forked_worker"]["owned"],
            o["workers"]["forked_worker"]["owned"],
        ),
        ("spawned worker, random reads, owned", "", o["workers"]["spawned_worker"]["owned"]),
        ("microseconds per record", "", o["read"]["microseconds_per_record"]),
        ("the same, sixteen at a time", "", o["read"]["microseconds_by_sixteen"]),
    ]
    return "\n".join(f"{a:36}{b!s:>12}{c!s:>12}" for a, b, c in rows)

def machine():
    "What the numbers were measured on."
    names = ("vlm_lit", "torch", "numpy")

    def version(name):
        try: return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError: return "not installed"

    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
    }

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="20,000 records, write nothing")
    parser.add_argument("--n", type=int, default=558_000, help="records")
    for name in ("--part", "--path"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--many", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return print(json.dumps(part(args.part, args.path, args.many)))
    result = measure(args.n, args.quick)
    print(table(result))
    if not args.quick:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(
            json.dumps(
                {"command": "python benchmarks/record_path.py", **result, **machine()}, indent=1
            )
            + "\n"
        )

if __name__ == "__main__": main()
