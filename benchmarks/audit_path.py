"""Time `vlm-lit audit`: the text of a data set of LLaVA's pretraining size, and images opened.

python benchmarks/audit_path.py            558,000 records, 3,000 images
                                           -> benchmarks/results/audit_path.json
python benchmarks/audit_path.py --quick    5,000 records, 200 images, nothing written

The text is that of the whole command, start and tokenizer included, with images left out.
`cpu_seconds` are those of all its processes: on a busy machine they say more than the clock.
The peer is MGM's sequence of tokenizer calls of `text_path.py` on the same records: ids and labels
and nothing else, in processor seconds, measured in the same run; `ratio` is how many times as many
processor seconds the peer would need.
Of the images, `busy` is the share of the workers' time in which they ran, by the clock, and
`busy_or_ready` counts the time in which they were ready and other programs had the cores, too.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from record_path import write_data

RESULT = Path(__file__).resolve().parent / "results/audit_path.json"

def children_cpu():
    "Processor seconds of all processes that this one has started and waited for."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

def measure_text(n=558_000, workers=2):
    "Seconds of the whole command, start and tokenizer included."
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.json"
        write_data(data, n)
        began, used = time.time(), children_cpu()
        words = [Path(sys.executable).with_name("vlm-lit"), "audit", data, "--no-images"]
        words += ["--workers", str(workers), "--json"]
        env = {**os.environ, "VLM_LIT_CACHE": f"{folder}/cache"}
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=env)
        seconds, used = time.time() - began, children_cpu() - used
    report = json.loads(done.stdout)
    return {
        "records": report["records"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used, 1),
        "records_per_second": round(n / seconds),
        "workers": workers,
        "verdict": report["verdict"],
        "exit_code": done.returncode,
    }

def measure_peer(n):
    "Processor seconds of MGM's tokenizer calls for so many records, from the last of 15,000."
    from text_path import Reference, clock
    from vlm_lit.text.tokenizer import load_tokenizer

    reference = Reference(load_tokenizer("gemma"))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.json"
        write_data(data, 15_000)
        sources = [record["conversations"] for record in json.loads(data.read_text())]
    for source in sources[:12_000]:
        reference(source)  # its memory of texts is full
    seconds, _ = clock(lambda: [reference(source) for source in sources[12_000:]])
    return n * seconds / 3000

def write_images(folder, n):
    "JPEG files of 640 x 480 pixels, as rich as photographs, and a record for each."
    rng, records = np.random.default_rng(0), []
    for k in range(n):
        noise = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
        image = noise.resize((640, 480), Image.Resampling.BICUBIC)
        image.filter(ImageFilter.GaussianBlur(2)).save(folder / f"{k}.jpg", quality=90)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}]
        turns.append({"from": "gpt", "value": f"picture number {k}"})
        records.append({"id": k, "image": f"{k}.jpg", "conversations": turns})
    return records

class Watch(threading.Thread):
    "What the kernel says of each worker: nanoseconds on a core, and ready without one."

    def __init__(self):
        super().__init__(daemon=True)
        self.seen, self.done = {}, False

    def run(self):
        while not self.done:
            for child in multiprocessing.active_children():
                try:
                    fields = Path(f"/proc/{child.pid}/schedstat").read_text().split()
                except OSError: continue
                self.seen[child.pid] = int(fields[0]) / 1e9, int(fields[1]) / 1e9
            time.sleep(0.02)

def measure_images(n=3000, workers=2):
    "Seconds in which all images are opened, looked at and hashed, and how busy workers were."
    from vlm_lit.data.audit import AuditChunks, as_dataset, count_all
    from vlm_lit.data.findings import AuditSettings
    from vlm_lit.text.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as name:
        records = write_images(Path(name), n)
        settings = AuditSettings(image_folder=Path(name), images="all")
        chunks = AuditChunks(as_dataset(records, load_tokenizer("gemma"), settings), settings)
        watch, began = Watch(), time.time()
        watch.start()
        tally = count_all(chunks, workers)
        seconds, watch.done = time.time() - began, True
    ran, ready = (sum(times) for times in zip(*watch.seen.values()))
    return {
        "images": tally.n_opened,
        "seconds": round(seconds, 2),
        "workers": workers,
        "worker_cpu_seconds": round(ran, 2),
        "milliseconds_per_image": round(1000 * ran / n, 2),
        "busy": round(ran / (workers * seconds), 3),
        "busy_or_ready": round((ran + ready) / (workers * seconds), 3),
    }

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="little, nothing written")
    args = parser.parse_args()
    result = measure_text(5000 if args.quick else 558_000)
    peer = measure_peer(result["records"])
    result |= {"peer_cpu_seconds": round(peer, 1), "ratio": round(peer / result["cpu_seconds"], 2)}
    result["opened"] = measure_images(200 if args.quick else 3000)
    print(json.dumps(result, indent=1))
    if args.quick: return
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    versions = {k: version(k) for k in ("torch", "transformers", "tokenizers", "numpy", "pillow")}
    result = {"command": "python benchmarks/audit_path.py", **result}
    result |= {"machine": machine, "versions": versions}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")

if __name__ == "__main__": main()
