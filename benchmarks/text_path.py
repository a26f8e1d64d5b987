"""Time the text path, from turns to ids and labels, against the reference. One thread, fresh text in every round.

    python benchmarks/text_path.py            -> benchmarks/results/text_path.json
    python benchmarks/text_path.py --quick    a few samples, nothing written

Reference: what MGM's data set does, one sample after the other: render, cut at the image, and tokenize the prompt, every
round and every instruction, each chunk by a call of its own; labels by counting. Its ids and labels must be ours.
Raw: one batched call of the Rust tokenizer on the same chunks, with offsets; nothing else. No path can beat it by much.
"""
import argparse, gc, json, os, platform, re, statistics, time
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
from importlib.metadata import version
from pathlib import Path
import numpy as np, torch
from vlm_lit.labels import check_policy, control_pattern, make_prompt, preprocess
from vlm_lit.sentinels import chunks_of, encode_prompts, preprocess_multimodal
from vlm_lit.tokenizer import load_tokenizer

RESULT = Path(__file__).resolve().parent/"results/text_path.json"
QUESTIONS = ["Describe the image concisely.", "Provide a brief description of the given image.", "What is in the photo?", "Summarize the visual content of the image.",
             "Give a short and clear explanation of the subsequent image.", "Write a terse but informative summary of the picture."]
BATCH = 256   # sources in one call of `preprocess`; as many as a worker prepares ahead

class Writer:
    "Sentences of ordinary words, common ones more often; seeded, never the same twice."
    def __init__(self, tokenizer, seed):
        words = sorted(t[1:] for t in tokenizer.get_vocab() if re.fullmatch("▁[a-z]{2,12}", t))
        self.rng = np.random.default_rng(seed)
        self.words = self.rng.permutation(words)[:20_000]

    def words_of(self, least, most):
        "So many words, a full stop behind."
        ranks = np.minimum(self.rng.zipf(1.3, self.rng.integers(least, most + 1)) - 1, len(self.words) - 1)
        return " ".join(self.words[ranks]).capitalize() + "."

    def pretrain(self):
        "A short question, a caption of 10 to 20 words."
        return [{"from": "human", "value": f"{self.rng.choice(QUESTIONS)}\n<image>"}, {"from": "gpt", "value": self.words_of(10, 20)}]

    def instruct(self):
        "Three to five rounds about a picture."
        turns = [{"from": ("human", "gpt")[k % 2], "value": self.words_of(*((6, 14), (8, 40))[k % 2])} for k in range(2*self.rng.integers(3, 6))]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        return turns

class Reference:
    "The counting way for Gemma's template, and how often it calls the tokenizer."
    def __init__(self, tokenizer): self.tokenizer, self.calls = tokenizer, 0

    def ids(self, prompt):
        "Ids of a prompt: each chunk by its own call."
        chunks = [self.tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
        self.calls += len(chunks)
        return chunks[0] + [i for chunk in chunks[1:] for i in [-200, *chunk[1:]]]

    def __call__(self, source):
        "Ids and labels of a conversation."
        texts = [(f"<image>\n{turn['value'].replace('<image>', '').strip()}".strip() if "<image>" in turn["value"] else turn["value"]) for turn in source]
        rounds = ["".join(f"<start_of_turn>{who}\n{text}<end_of_turn>\n" for who,text in zip(("user", "model"), texts[k:k+2])) for k in range(0, len(texts), 2)]
        input_ids = torch.tensor(self.ids("".join(text + "<eos>" for text in rounds)))
        labels, at = input_ids.clone(), 1
        labels[:1] = -100
        for text in rounds:
            instruction = text.partition("<start_of_turn>model\n")
            length, hidden = len(self.ids(text)), len(self.ids(instruction[0] + instruction[1])) - 1
            labels[at:at+hidden] = -100
            at += length           # the round's own BOS stands for the <eos> that was split off
        labels[at:] = -100
        return input_ids, labels

def clock(f, *args):
    "Processor seconds of a call, and its result; time that other programs took does not count."
    gc.collect()
    gc.disable()          # as timeit does: whether a collection falls into one call or the next is chance
    began = time.process_time()
    out = f(*args)
    seconds = time.process_time() - began
    gc.enable()
    return seconds, out

def in_batches(f, items):
    "The function on `BATCH` items at a time."
    return [f(items[k:k+BATCH]) for k in range(0, len(items), BATCH)]

def stages(sources, tokenizer):
    "Seconds of each stage of `preprocess`, run one after the other on the same sources."
    backend, pattern = tokenizer.backend_tokenizer, control_pattern(tokenizer, "gemma")
    seconds = dict.fromkeys(("move tags", "render", "look for control tokens", "tokenize (Rust)", "segments", "labels and tensors"), 0.0)
    for k in range(0, len(sources), BATCH):
        own = sources[k:k+BATCH]
        t, moved = clock(preprocess_multimodal, own)
        seconds["move tags"] += t
        t, prompts = clock(lambda: [make_prompt(source, tokenizer, "gemma") for source in moved])
        seconds["render"] += t
        seconds["look for control tokens"] += clock(lambda: [check_policy(source, "refuse", pattern) for source in moved])[0]
        rust = clock(backend.encode_batch_fast, sorted({chunk for prompt in prompts for chunk in chunks_of(prompt)}))[0]
        seconds["tokenize (Rust)"] += rust
        seconds["segments"] += clock(encode_prompts, prompts, tokenizer)[0] - rust
        seconds["labels and tensors"] += clock(preprocess, moved, tokenizer)[0]
    seconds["labels and tensors"] = max(seconds["labels and tensors"] - sum(v for key,v in seconds.items() if key not in ("move tags", "labels and tensors")), 0.0)
    return {key: value/len(sources) for key,value in seconds.items()}

def measure_kind(kind, tokenizer, n, rounds):
    "Medians over rounds of fresh text, of samples of one kind."
    reference, backend, found = Reference(tokenizer), tokenizer.backend_tokenizer, []
    for seed in range(rounds):
        writer = Writer(tokenizer, seed)
        sources = [getattr(writer, kind)() for _ in range(n)]
        slow, theirs = clock(lambda: [reference(source) for source in sources])
        fast, ours = clock(in_batches, lambda own: preprocess(preprocess_multimodal(own), tokenizer), sources)
        ids, labels = [[row for out in ours for row in out[key]] for key in ("input_ids", "labels")]
        assert all(torch.equal(a, x) and torch.equal(b, y) for (a,b),x,y in zip(theirs, ids, labels, strict=True)), "the reference gives other ids or labels"
        single = clock(lambda: [preprocess(preprocess_multimodal([source]), tokenizer) for source in sources[:n//4]])[0]*4
        chunks = [chunk for source in preprocess_multimodal(sources) for chunk in chunks_of(make_prompt(source, tokenizer, "gemma"))]
        backend.no_padding()
        raw = clock(in_batches, backend.encode_batch, chunks)[0]
        raw_fast = clock(in_batches, backend.encode_batch_fast, chunks)[0]
        found.append({"reference": slow/n, "ours": fast/n, "ours_one_by_one": single/n, "raw": raw/n, "raw_without_offsets": raw_fast/n, "tokens": sum(map(len, ids))/n, "stages": stages(sources, tokenizer)})
    middle = lambda values: statistics.median(values)
    out = {f"{key}_us": round(1e6*middle([f[key] for f in found]), 1) for key in ("reference", "ours", "ours_one_by_one", "raw", "raw_without_offsets")}
    ratio = {f"ratio_{key}": round(middle([f["reference"]/f[key] for f in found]), 2) for key in ("ours", "ours_one_by_one", "raw", "raw_without_offsets")}
    return {"samples": n*rounds, "tokens_a_sample": round(middle([f["tokens"] for f in found]), 1), "reference_calls_a_sample": round(reference.calls/(n*rounds), 2), **ratio, **out,
            "stages_us": {key: round(1e6*middle([f["stages"][key] for f in found]), 1) for key in found[0]["stages"]}}

def measure(quick=False):
    "Both kinds of samples."
    torch.set_num_threads(1)
    tokenizer = load_tokenizer("gemma")
    preprocess([Writer(tokenizer, 99).pretrain()], tokenizer)        # the table of widths is made once
    n, rounds = (60, 1) if quick else (2000, 5)
    return {"pretrain": measure_kind("pretrain", tokenizer, n, rounds), "instruct": measure_kind("instruct", tokenizer, n//2, rounds)}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few samples, nothing written")
    args = parser.parse_args()
    result = measure(args.quick)
    for kind,row in result.items():
        print(f"{kind}: {row['reference_calls_a_sample']} calls a sample in the reference; ratios {({k[6:]: v for k,v in row.items() if k.startswith('ratio')})}")
        print("  " + ", ".join(f"{k} {v} us" for k,v in row["stages_us"].items()))
    if args.quick: return
    machine = {"system": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count(), "threads": 1, "python": platform.python_version()}
    RESULT.write_text(json.dumps({"command": "python benchmarks/text_path.py", **result, "machine": machine, "versions": {k: version(k) for k in ("torch", "transformers", "tokenizers", "numpy")}}, indent=1) + "\n")

if __name__ == "__main__": main()
