"""Damage data files of every kind, and the store that the cache keeps, and read them: does
anything but a `DataError` come out?

    python benchmarks/record_fuzz.py            25,000 tries per file
                                                -> benchmarks/results/record_fuzz.json
    python benchmarks/record_fuzz.py --n 500    fewer, nothing written

A try damages the bytes as `image_fuzz.py` does, in half of the tries only one of them; then
`Records` opens the file, and every record and every image inside the data is read. A damaged store
must give the records that were there before the damage. Each file has a process of its own, so a
library that ends the process is seen as well. A seed makes the same tries again.
"""

import argparse, collections, gzip, io, json, multiprocessing, os, platform, random, shutil, sys
import tarfile, tempfile, time, warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
from image_fuzz import damaged, hush
from vlm_lit.core import DataError
from vlm_lit.data import records as module
from vlm_lit.data.records import Records
from vlm_lit.images import sample_image
from vlm_lit.text.messages import image_names

RESULT = Path(__file__).resolve().parent / "results/record_fuzz.json"
TURNS = [
    {"from": "human", "value": "What is it?\n<image>"},
    {"from": "gpt", "value": "Café, 日本."},
]
LLAVA = [{"id": f"row {k}", "image": f"{k}.png", "conversations": TURNS} for k in range(4)]

def png() -> bytes:
    "A small image as a file."
    sample_image(16, 12).save(out := io.BytesIO(), "PNG")
    return out.getvalue()

def asked(image) -> list[dict]:
    "Rows of a table with images inside."
    return [{"image": image, "question": f"What is {k}?", "answer": "Café."} for k in range(4)]

def parquet(rows: list[dict], **options) -> bytes:
    "A table as a file."
    pq.write_table(pa.Table.from_pylist(rows), out := io.BytesIO(), **options)
    return out.getvalue()

def shard() -> bytes:
    "A webdataset shard."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for k in range(3):
            files = {"png": png(), "json": json.dumps({"question": "q", "answer": "a"}).encode()}
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{k:03}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()

def text(rows: list[dict], **options) -> bytes:
    "JSON in UTF-8."
    return json.dumps(rows, ensure_ascii=False, **options).encode()

def lines(rows: list[dict]) -> bytes:
    "JSONL."
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()

def files() -> dict[str, bytes]:
    "Name -> content of a whole file."
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    struct = asked({"bytes": png(), "path": "a.png"})
    table = b"question,answer,image\n" + b"".join(
        f'"What, {k}?","Café",{k}.png\n'.encode() for k in range(4)
    )
    return {
        "flat.json": text(LLAVA),
        "pretty.json": text(LLAVA, indent=2),
        "messages.json": text([{"id": k, "messages": messages} for k in range(4)]),
        "lines.jsonl": lines(LLAVA),
        "packed.jsonl.gz": gzip.compress(lines(LLAVA), mtime=0),
        "table.csv": table,
        "llava.parquet": parquet(LLAVA),
        "snappy.parquet": parquet(struct, compression="snappy", use_dictionary=False),
        "zstd.parquet": parquet(struct, compression="zstd"),
        "binary.parquet": parquet(asked(png()), compression="none"),
        "shard.tar": shard(),
    }

def read_all(path: Path) -> list:
    "Every record and the bytes of every image inside it; an error in its place."
    records = Records(path)
    found = []
    for k in range(len(records)):
        try: record = records[k]
        except DataError as e:
            found.append(e.kind)
            continue
        inside = [n for n in image_names(record) if records.is_embedded(n)]
        found.append((record, [records.embedded(name) for name in inside]))
        for name in inside:
            try: records.open_image(name)
            except DataError: pass
    return found

def attempt(path: Path) -> str:
    "What comes of it: read, refused, or the error that passed through."
    try: found = read_all(path)
    except DataError: return "refused"
    except Exception as e: return f"{type(e).__module__}.{type(e).__name__}"
    return "read in part" if any(isinstance(own, str) for own in found) else "read"

def attempt_store(path: Path, store: Path, whole: list) -> str:
    "Whether the records are those from before the damage."
    try: return "made again" if read_all(path) == whole else "OTHER RECORDS"
    except Exception as e: return f"{type(e).__module__}.{type(e).__name__}"

def run_one(name: str, data: bytes, n: int, seed: int, has_store: bool) -> dict:
    "All tries of a file: how many of each outcome, and the longest in seconds."
    warnings.simplefilter("ignore")
    rng, found, longest = random.Random(f"{seed} {name}"), collections.Counter(), 0.0
    with tempfile.TemporaryDirectory() as place:
        os.environ["VLM_LIT_CACHE"] = cache = os.path.join(place, "cache")
        path = Path(place) / name
        path.write_bytes(data)
        if has_store: module.SMALL = 0
        whole = read_all(path)
        for k in range(n):
            if has_store:
                store = next(Path(cache).glob("records/*/*/records.arrow"))
                parts = [store, store.with_name("meta.json")]
                victim = rng.choices(parts, (8, 2))[0]
                changed = damaged(victim.read_bytes(), rng, rng.choice((1, 8)))
                victim.unlink()  # what is mapped stays what it was
                victim.write_bytes(changed)
            else:
                path.unlink()
                path.write_bytes(damaged(data, rng, rng.choice((1, 8))))
            began = time.process_time()
            found[attempt_store(path, store, whole) if has_store else attempt(path)] += 1
            longest = max(longest, time.process_time() - began)
            if not has_store: shutil.rmtree(cache, ignore_errors=True)
    return {"tries": n, **found, "longest_seconds": round(longest, 3)}

def run_all(n: int, seed: int, workers: int) -> dict[str, dict]:
    "Every file in a process of its own."
    rows, fork = {}, multiprocessing.get_context("fork")
    made = [(name, data, n, seed, False) for name, data in files().items()]
    made += [("the store of lines.jsonl", lines(LLAVA), n, seed, True)]
    pools = {}
    while made or pools:
        while made and len(pools) < workers:
            own = made.pop(0)
            pool = ProcessPoolExecutor(1, fork, hush)
            pools[own[0]] = pool, pool.submit(run_one, *own)
        name, (pool, future) = next(iter(pools.items()))
        try: rows[name] = future.result()
        except BrokenProcessPool: rows[name] = {"ended the process": 1}
        pool.shutdown()
        del pools[name]
        print(f"{name:26}", *(f"{key} {value:,}" for key, value in rows[name].items()), flush=True)
    return rows

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=25_000, help="tries per file")
    parser.add_argument("--workers", type=int, default=2, help="files at the same time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = run_all(args.n, args.seed, args.workers)
    usual = {"tries", "read", "read in part", "refused", "made again", "longest_seconds"}
    bad = {name: row for name, row in rows.items() if row.keys() - usual}
    tries = sum(row.get("tries", 0) for row in rows.values())
    print(f"{len(rows)} files, {tries:,} tries, {bad or 0} bad")
    if args.n >= 25_000:
        names = ("pyarrow", "datasets")
        result = {
            "command": "python benchmarks/record_fuzz.py",
            "seed": args.seed,
            "files": rows,
            "bad": len(bad),
            "versions": {"python": platform.python_version()} | {k: version(k) for k in names},
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(bad))

if __name__ == "__main__": main()
