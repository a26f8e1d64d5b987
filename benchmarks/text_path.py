"""Time the text path, from turns to ids and labels, against the reference. One thread, fresh text
for every path and round, and tokenizers whose memory of recent texts is full, as it is for all but
the first minute of an epoch.

    python benchmarks/text_path.py            -> benchmarks/results/text_path.json
    python benchmarks/text_path.py --quick    a few samples, nothing written

Reference: what MGM's data set does, one sample after the other: render, cut at the image, and
tokenize the prompt, every round and every instruction, each chunk by a call of its own; labels by
counting. Its ids and labels must be ours.
Raw: one batched call of the Rust tokenizer on the same chunks, with offsets; nothing else. No path
can beat it by much.
"""

import argparse, copy, gc, json, os, platform, re, statistics, time

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
from importlib.metadata import version
from pathlib import Path
import numpy as np, torch
from vlm_lit.text.labels import check_control_tokens, control_pattern, make_prompt, preprocess
from vlm_lit.text.sentinels import chunk_pieces, encode_pieces, encode_prompts
from vlm_lit.text.sentinels import preprocess_multimodal
from vlm_lit.text.templates import conv_templates
from vlm_lit.text.tokenizer import load_tokenizer

RESULT = Path(__file__).resolve().parent / "results/text_path.json"
QUESTIONS = [
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "What is in the photo?",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Write a terse but informative summary of the picture.",
]
BATCH = 256  # sources in one call of `preprocess`; as many as a worker prepares ahead

class Writer:
    "Sentences whose words are as frequent as in English; seeded, no two alike."

    def __init__(self, tokenizer, seed):
        vocab = tokenizer.get_vocab()  # a byte-pair vocabulary is in order of frequency
        self.words = np.array(
            [t[1:] for t in sorted(vocab, key=vocab.get) if re.fullmatch("▁[a-z]{1,14}", t)][
                :20_000
            ]
        )
        share = 1 / (np.arange(len(self.words)) + 2.7)  # Zipf's law with Mandelbrot's constant
        self.rng, self.sums = np.random.default_rng(seed), (share / share.sum()).cumsum()

    def words_of(self, least, most):
        "So many words, a full stop behind."
        drawn = self.sums.searchsorted(self.rng.random(self.rng.integers(least, most + 1))).clip(
            max=len(self.words) - 1
        )
        return " ".join(self.words[drawn]).capitalize() + "."

    def pretrain(self):
        "A short question, a caption of 10 to 20 words."
        return [
            {"from": "human", "value": f"{self.rng.choice(QUESTIONS)}\n<image>"},
            {"from": "gpt", "value": self.words_of(10, 20)},
        ]

    def instruct(self):
        "Three to five rounds about a picture."
        turns = [
            {"from": ("human", "gpt")[k % 2], "value": self.words_of(*((6, 12), (8, 24))[k % 2])}
            for k in range(2 * self.rng.integers(3, 6))
        ]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        return turns

class Reference:
    """The counting way for Gemma's template, step by step as MGM's data set takes them, and how
    often it calls the tokenizer."""

    def __init__(self, tokenizer): self.tokenizer, self.calls = tokenizer, 0

    def ids(self, prompt, as_tensor=False):
        "Ids of a prompt: each chunk by its own call."
        chunks = [self.tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
        self.calls += len(chunks)
        ids = chunks[0] + [i for chunk in chunks[1:] for i in [-200, *chunk[1:]]]
        return torch.tensor(ids, dtype=torch.long) if as_tensor else ids

    def move_tags(self, source):
        "Turns with the tag in front, edited in place."
        for turn in source:
            if "<image>" not in turn["value"]: continue
            turn["value"] = f"<image>\n{turn['value'].replace('<image>', '').strip()}".strip()
        return source

    def prompt(self, source):
        "The prompt, from a conversation object that is filled turn by turn."
        conv = conv_templates["gemma"].copy()
        roles = {"human": conv.roles[0], "gpt": conv.roles[1]}
        for n, turn in enumerate(source):
            assert roles[turn["from"]] == conv.roles[n % 2]
            conv.append_message(roles[turn["from"]], turn["value"])
        text, seps = conv.system + conv.sep, (conv.sep, conv.sep2)
        for n, (role, message) in enumerate(conv.messages):
            text += f"<start_of_turn>{role}\n{message}<end_of_turn>\n{seps[n % 2]}"
        return text

    def __call__(self, source):
        "Ids and labels of a conversation."
        text = self.prompt(self.move_tags(copy.deepcopy(source)))
        input_ids = torch.stack([self.ids(text, as_tensor=True)], dim=0)
        targets = input_ids.clone()
        for target in targets:
            total, at = int(target.ne(self.tokenizer.pad_token_id).sum()), 1
            target[:at] = -100
            for part in text.split("<eos>"):
                if part == "": break
                pieces = part.split("<start_of_turn>model\n")
                if len(pieces) != 2: break
                length = len(self.ids(part))
                hidden = len(self.ids(pieces[0] + "<start_of_turn>model\n")) - 1
                target[at : at + hidden] = -100
                at += length  # the round's own BOS stands for the <eos> that was split off
            target[at:] = -100
            if at != total: target[:] = -100
        return input_ids[0], targets[0]

def clock(f, *args):
    "Processor seconds of a call, and its result; time that other programs took does not count."
    gc.collect()
    gc.disable()  # as timeit does: whether a collection falls into one call or the next is chance
    began = time.process_time()
    out = f(*args)
    seconds = time.process_time() - began
    gc.enable()
    return seconds, out

def in_batches(f, items):
    "The function on `BATCH` items at a time."
    return [f(items[k : k + BATCH]) for k in range(0, len(items), BATCH)]

def stages(fresh, tokenizer):
    "Seconds of each stage of `preprocess`, one after the other on fresh text."
    pattern, sources = control_pattern(tokenizer, "gemma"), fresh()
    names = (
        "move tags",
        "render",
        "look for control tokens",
        "tokenize (Rust)",
        "segments",
        "labels and tensors",
    )
    seconds = dict.fromkeys(names, 0.0)
    for k in range(0, len(sources), BATCH):
        own = sources[k : k + BATCH]
        t, moved = clock(preprocess_multimodal, own)
        seconds["move tags"] += t
        render = lambda: [make_prompt(source, tokenizer, "gemma") for source in moved]
        check = lambda: [check_control_tokens(source, "refuse", pattern) for source in moved]
        t, prompts = clock(render)
        seconds["render"] += t
        seconds["look for control tokens"] += clock(check)[0]
        pieces = [piece for n, prompt in enumerate(prompts) for piece in chunk_pieces(prompt, n)]
        seconds["tokenize (Rust)"] += clock(encode_pieces, pieces, tokenizer)[0]
        # from here on the tokenizer knows the text
        again = clock(encode_pieces, pieces, tokenizer)[0]
        all_ = clock(encode_prompts, prompts, tokenizer)[0]
        seconds["segments"] += max(all_ - again, 0.0)
        whole = clock(preprocess, moved, tokenizer)[0]
        rest = clock(lambda: (render(), check()))[0]
        seconds["labels and tensors"] += max(whole - rest - all_, 0.0)
    return {key: value / len(sources) for key, value in seconds.items()}

def settle(tokenizer, kind, n):
    """Fill the tokenizer's memory of 10,000 texts, as the first minute of an epoch does; what comes
    later is not remembered."""
    writer = Writer(tokenizer, 10_000)
    texts = [
        turn["value"] for _ in range(12_000 if n > 100 else 10) for turn in getattr(writer, kind)()
    ]
    for k in range(0, len(texts), BATCH):
        tokenizer.backend_tokenizer.encode_batch_fast(texts[k : k + BATCH])

def measure_kind(kind, tokenizer, n, rounds):
    "Medians over rounds; each path reads text that the tokenizer has not seen."
    # a tokenizer remembers texts; each path has its own memory
    own = load_tokenizer("gemma")
    plain = load_tokenizer("gemma")
    offsets = load_tokenizer("gemma")
    reference, found = Reference(own), []
    for t in (tokenizer, own, plain, offsets): settle(t, kind, n)
    for seed in range(rounds):
        writer = Writer(tokenizer, seed)
        fresh = lambda n=n: [getattr(writer, kind)() for _ in range(n)]
        sources = fresh()
        slow, theirs = clock(lambda: [reference(source) for source in sources])
        check = in_batches(lambda own: preprocess(preprocess_multimodal(own), tokenizer), sources)
        ids, labels = [
            [row for out in check for row in out[key]] for key in ("input_ids", "labels")
        ]
        assert all(
            torch.equal(a, x) and torch.equal(b, y)
            for (a, b), x, y in zip(theirs, ids, labels, strict=True)
        ), "the reference gives other ids or labels"
        sources = fresh()
        fast, _ = clock(
            in_batches, lambda own: preprocess(preprocess_multimodal(own), tokenizer), sources
        )
        sources = fresh(n // 4)
        single, _ = clock(
            lambda: [preprocess(preprocess_multimodal([source]), tokenizer) for source in sources]
        )
        texts = [
            [
                piece.text
                for source in preprocess_multimodal(fresh())
                for piece in chunk_pieces(make_prompt(source, tokenizer, "gemma"), 0)
            ]
            for _ in range(2)
        ]
        raw = clock(in_batches, offsets.backend_tokenizer.encode_batch, texts[0])[0]
        raw_fast = clock(in_batches, plain.backend_tokenizer.encode_batch_fast, texts[1])[0]
        found.append(
            {
                "reference": slow / n,
                "ours": fast / n,
                "ours_one_by_one": single / (n // 4),
                "raw": raw / n,
                "raw_without_offsets": raw_fast / n,
                "tokens": sum(map(len, ids)) / n,
                "stages": stages(fresh, tokenizer),
            }
        )
    middle = lambda values: statistics.median(values)
    out = {
        f"{key}_us": round(1e6 * middle([f[key] for f in found]), 1)
        for key in ("reference", "ours", "ours_one_by_one", "raw", "raw_without_offsets")
    }
    ratio = {
        f"ratio_{key}": round(middle([f["reference"] / f[key] for f in found]), 2)
        for key in ("ours", "ours_one_by_one", "raw", "raw_without_offsets")
    }
    return {
        "samples": n * rounds,
        "tokens_a_sample": round(middle([f["tokens"] for f in found]), 1),
        "reference_calls_a_sample": round(reference.calls / (n * rounds), 2),
        **ratio,
        **out,
        "stages_us": {
            key: round(1e6 * middle([f["stages"][key] for f in found]), 1)
            for key in found[0]["stages"]
        },
    }

def measure(quick=False):
    "Both kinds of samples."
    torch.set_num_threads(1)
    tokenizer = load_tokenizer("gemma")
    preprocess([Writer(tokenizer, 99).pretrain()], tokenizer)  # the traits are looked up once
    n, rounds = (60, 1) if quick else (2000, 5)
    return {
        "pretrain": measure_kind("pretrain", tokenizer, n, rounds),
        "instruct": measure_kind("instruct", tokenizer, n // 2, rounds),
    }

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few samples, nothing written")
    args = parser.parse_args()
    result = measure(args.quick)
    for kind, row in result.items():
        print(
            f"{kind}: {row['reference_calls_a_sample']} calls a sample in the reference; ratios "
            f"{ ({k[6:]: v for k, v in row.items() if k.startswith('ratio')}) }"
        )
        print("  " + ", ".join(f"{k} {v} us" for k, v in row["stages_us"].items()))
    if args.quick: return
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": 1,
        "python": platform.python_version(),
    }
    RESULT.write_text(
        json.dumps(
            {
                "command": "python benchmarks/text_path.py",
                **result,
                "machine": machine,
                "versions": {
                    k: version(k) for k in ("torch", "transformers", "tokenizers", "numpy")
                },
            },
            indent=1,
        )
        + "\n"
    )

if __name__ == "__main__": main()
