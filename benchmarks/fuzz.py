"""Invented conversations through the text path, held against an oracle of other code.

    python benchmarks/fuzz.py --n 1000000 --workers 2 --seed 0   -> benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --n 2000 --quick                   nothing written
    python benchmarks/fuzz.py --batch 417 --seed 0                one batch again, with violations

Each batch has one template, one tokenizer and one policy for control tokens; all named templates
and chat templates take their turns with all tokenizers that they fit. The oracle writes each turn
by itself (MGM's `get_prompt` by hand, and each chat template in Python), and makes ids and labels
either from pieces that end at images and at answers, or, where a tokenizer adds spaces, from the
offsets of whole chunks; a conversation that neither can decide counts as not judged. Laws:

ids         ids are the oracle's
labels      supervised are the oracle's answers and stops, and nothing else
read_back   supervised ids read as the answers with their stop texts
round_trip  all ids read as the prompt
sentinels   as many -200 as images
prefix      what generation is given before an answer begins what training sees; then supervision
control     no control token but the template's own; a spelled one is refused, or escaped
greeting    a first turn of the model changes nothing
"""

import argparse, json, os, platform, random, re, sys, time, unicodedata, warnings

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from tokenizers.decoders import ByteLevel
from vlm_lit.core import ConfigError, DataError
from vlm_lit.text.labels import check_tokenizer, generation_ids, preprocess
from vlm_lit.text.sentinels import preprocess_multimodal
from vlm_lit.text.templates import conv_templates
from vlm_lit.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT.parent / "tests")]
from small_parts import golden_tokenizer, rare_tokenizers, small_tokenizer

RESULT = ROOT / "results/fuzz.json"
BATCH, IMAGE, TAG = 100, -200, "<image>"
LAWS = ["ids", "labels", "read_back", "round_trip", "sentinels", "prefix", "control", "greeting"]
PIECES = ["the box", "\n", "\n\n", " ", "  ", "é", "e\u0301", "日本", "😀", "\t", "<b>", "1234"]
PIECES += ["model", "user", "<", "|>", "a", "\u00a0", "[x]", "##", "\r\n", "𝔘", "x" * 9, "USER"]
PIECES += ["assistant", "\ufb1d", "\u1100\u1161\u11a8", "▁", "龘", ".", ".\n", "</", "s>", "Hi "]
PIECES += ["\u0301", "\u200d", "\u202e", "٣", "test, say it twice", "{{ x }}", "\u3000", "\\n"]

# ---- the oracle: templates

def named_frames(name):
    "What MGM's `get_prompt` writes, as (system, user, model): functions of texts to parts."
    conv = conv_templates[name]
    style, sep, end = conv.sep_style.name, conv.sep, conv.sep2 or conv.sep
    opening = {
        "MPT": "<|im_start|>system\n",
        "LLAMA_3": "<|start_header_id|>system<|end_header_id|>",
    }
    opening["LLAMA_3"] += "\n\n"
    human, gpt = conv.roles

    def system(text):
        if style in ("LLAMA_2", "PLAIN", "GEMMA"): return []
        whole = conv.system if text is None else opening.get(style, "") + text
        return [(whole + sep, "frame")] if whole else []

    def user(text, n, own_system):
        if style == "PLAIN": return [(text, "user")]
        if not text:
            return [
                (
                    {
                        "SINGLE": f"{human}:",
                        "TWO": f"{human}:",
                        "LLAMA_2": "",
                        "GEMMA": "<start_of_turn>user\n",
                    }.get(style, human),
                    "frame",
                )
            ]
        if style in ("SINGLE", "TWO"): frame = f"{human}: ", sep
        elif style == "GEMMA":
            frame = "<start_of_turn>user\n", "<end_of_turn>\n"
        elif style == "LLAMA_2":
            inner = conv.system if own_system is None else own_system
            inner = f"<<SYS>>\n{inner}\n<</SYS>>\n\n" if inner and n == 0 else ""
            frame = f"{'<s>' if n else ''}[INST] {inner}", " [/INST]"
        else: frame = human, sep
        return [(frame[0], "frame"), (text, "user"), (frame[1], "frame")]

    def model(text):
        header = {"SINGLE": f"{gpt}:", "TWO": f"{gpt}:", "GEMMA": "<start_of_turn>model\n"}
        header = header.get(style, "" if style in ("LLAMA_2", "PLAIN") else gpt)
        space = " " if style in ("SINGLE", "TWO", "LLAMA_2") else ""
        stop = {"GEMMA": "<end_of_turn>\n<eos>", "LLAMA_2": " </s>"}.get(style, end)
        return header, space, stop, "", style == "PLAIN"

    return system, user, model

def chat_frames(
    user_text, header, space, stop, after, strip, default_system=None, system_text=None
):
    "A chat template in Python."

    def system(text):
        text = default_system if text is None else text
        return [] if text is None else [(system_text.format(strip(text)), "frame")]

    before, behind = user_text.split("{}")
    user = lambda text, n, own: [(before, "frame"), (strip(text), "user"), (behind, "frame")]
    return system, user, lambda text: (header, space, stop, after, False)

CHATML = "<|im_start|>{0}\n{1}<|im_end|>\n"
HF = {  # (tokenizer, Jinja, the same in Python, whether it takes a system turn)
    "gemma3": (
        "gemma",
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == "
        "'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        chat_frames(
            "<start_of_turn>user\n{}<end_of_turn>\n",
            "<start_of_turn>model\n",
            "",
            "<end_of_turn>",
            "\n",
            str.strip,
            None,
            "<start_of_turn>system\n{}<end_of_turn>\n",
        ),
    ),
    "qwen": (
        "chatml_no_bos",
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        chat_frames(
            CHATML.format("user", "{}"),
            "<|im_start|>assistant\n",
            "",
            "<|im_end|>",
            "\n",
            str,
            None,
            CHATML.format("system", "{}"),
        ),
    ),
    "smollm": (
        "chatml_no_bos",
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
        "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
        "'<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        chat_frames(
            CHATML.format("user", "{}"),
            "<|im_start|>assistant\n",
            "",
            "<|im_end|>",
            "\n",
            str,
            "Be kind.",
            CHATML.format("system", "{}"),
        ),
    ),
    "llama3": (
        "llama3_bos",
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
        "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        chat_frames(
            "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "",
            "<|eot_id|>",
            "",
            str.strip,
            None,
            "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        ),
    ),
    "inst_space": (  # Llama 2's way: a space that generation is not given
        "gemma",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ ' ' + m.content + ' <eos>' }}{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% endif %}{% endfor %}",
        chat_frames("[INST] {} [/INST]", "", " ", " <eos>", "", str, None, "[INST] {} [/INST]"),
    ),
}

def markers(template, conv):
    "What a message must not spell, besides the tokenizer's control tokens."
    if template == "hf":
        return ["[INST]", "[/INST]"] if conv == "inst_space" else []
    style, own = conv_templates[conv].sep_style.name, conv_templates[conv]
    found = {
        "LLAMA_2": ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>"],
        "GEMMA": ["<start_of_turn>", "<end_of_turn>", "<eos>"],
        "PLAIN": [],
    }.get(style, [*own.roles, own.sep, own.sep2 or ""])
    colon = ":" if style in ("SINGLE", "TWO") else ""
    found = [m + colon if m in own.roles else m for m in found]
    return [m.strip() for m in found if m.strip()]

def oracle_parts(turns, frames, has_image):
    "The prompt as (text, kind), kinds frame, user, image, answer, stop; neighbors not joined."
    system, user, model = frames
    own = turns[0]["value"] if turns[0]["from"] == "system" else None
    turns = turns[own is not None :]
    if turns[0]["from"] == "gpt": turns = turns[1:]
    parts = list(system(own))
    for n, turn in enumerate(turns):
        if n % 2 == 0:
            for text, kind in user(turn["value"], n, own):
                texts = text.split(TAG) if kind == "user" and has_image else [text]
                for k, piece in enumerate(texts):
                    parts += [(TAG, "image")] * (k > 0) + [(piece, kind)]
            continue
        parts += model_parts(turn["value"], model)
    return [part for part in parts if part[0]]

def model_parts(text, model):
    "An answer and its frame; an empty one is not supervised."
    header, space, stop, after, always = model(text)
    if model.__name__ == "<lambda>":  # a chat template closes an empty answer
        text = text.strip() if after_strips(model) else text
        if not text: return [(header + space + stop + after, "frame")]
    elif not text and not always: return [(header, "frame")]
    return [(header, "frame"), (space + text, "answer"), (stop, "stop"), (after, "frame")]

STRIPPING = {id(HF[name][2][2]) for name in ("gemma3", "llama3")}

def after_strips(model): return id(model) in STRIPPING

# ---- the oracle: ids and labels

class Reader:
    "A tokenizer with what the oracle knows of it."

    def __init__(self, name, tokenizer):
        self.name, self.tokenizer = name, tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.bos = self.backend.encode("").ids
        self.adds_space = self.backend.encode("a").tokens[-1] != "a"
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.control = sorted(special | set(tokenizer.all_special_tokens))
        ids = tokenizer.convert_tokens_to_ids(self.control)
        self.control_ids = set(ids) - {tokenizer.unk_token_id}
        self.is_bytes = "ByteLevel" in repr(self.backend.pre_tokenizer)
        self.is_lossy = name in ("fused_bpe", "unigram", "words")

    def encode(self, text):
        return self.backend.encode(text, add_special_tokens=False)

    def spell(self, ids):
        "The text of ids; None if some are unknown."
        out, run = [], []
        for i in [*ids, None]:
            if i is not None and i != IMAGE:
                run.append(i)
                continue
            text = self._text(run)
            if text is None: return None
            out += [text] + [TAG] * (i is not None)
            run = []
        return "".join(out)

    def _text(self, ids):
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        if self.is_lossy and self.tokenizer.unk_token_id in ids: return None
        if self.is_bytes: return ByteLevel().decode(tokens)
        out = b""
        for token in tokens:
            byte = re.fullmatch("<0x(..)>", token)
            out += bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
        return out.decode(errors="replace")

    def same(self, a, b):
        "Whether two texts are equal, as far as this vocabulary can tell."
        plain = lambda t: unicodedata.normalize("NFC", t).replace("▁", " ")
        if self.adds_space or self.name == "words":
            plain = lambda t: re.sub("[ ▁]", "", unicodedata.normalize("NFC", t))
            if self.name == "words": plain = lambda t: re.sub(r"\s", "", t)
        return plain(a) == plain(b)

def oracle_ids(parts, reader):
    "Ids and labels; None where the oracle cannot decide."
    ids, labels = list(reader.bos), [-100] * len(reader.bos)
    chunks = [[]]
    for text, kind in parts:
        if kind == "image": chunks.append([])
        else: chunks[-1].append((text, kind in ("answer", "stop")))
    for k, chunk in enumerate(chunks):
        if k:
            ids.append(IMAGE)
            labels.append(-100)
        own = by_offsets(chunk, reader) if reader.adds_space else by_pieces(chunk, reader)
        if own is None: return None
        ids += own[0]
        labels += own[1]
    return ids, labels

def by_pieces(chunk, reader):
    "Each stretch that is supervised, or not, by a call of its own."
    ids, labels, n = [], [], 0
    while n < len(chunk):
        end = n
        while end < len(chunk) and chunk[end][1] == chunk[n][1]: end += 1
        own = reader.encode("".join(text for text, _ in chunk[n:end])).ids
        ids += own
        labels += own if chunk[n][1] else [-100] * len(own)
        n = end
    return ids, labels

def by_offsets(chunk, reader):
    "The whole chunk in one call; undecided if a token lies across an edge of an answer."
    text, spans, at = "".join(text for text, _ in chunk), [], 0
    for own, is_answer in chunk:
        if is_answer: spans.append((at, at + len(own)))
        at += len(own)
    out, edges = reader.encode(text), {e for span in spans for e in span}
    edges -= {a for a, _ in spans} & {b for _, b in spans}
    if any(x < e < y for x, y in out.offsets for e in edges): return None
    inside = [y > x and any(a <= x < b for a, b in spans) for x, y in out.offsets]
    return out.ids, [i if own else -100 for i, own in zip(out.ids, inside)]

# ---- conversations

def moved(text):
    "A single tag at the front of its turn."
    if text.count(TAG) != 1: return text
    return f"{TAG}\n{text.replace(TAG, '').strip()}".strip()

def conversation(rng, forgeries, allows_system, is_caption):
    "Turns of LLaVA's form, as invented; and what is in them."
    text = lambda: "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 5)))
    if is_caption:
        question = f"{TAG}\n{text()}" if rng.random() < 0.8 else text() + 2 * TAG
        return [{"from": "human", "value": question}, {"from": "gpt", "value": text()}]
    turns = [{"from": who, "value": text()} for who in ["human", "gpt"] * rng.randint(1, 3)]
    for turn in turns:
        if rng.random() < 0.03: turn["value"] = ""
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        turn = turns[2 * rng.randrange(len(turns) // 2)]
        own = turn["value"]
        turn["value"] = rng.choice([f"{TAG}\n{own}", f"{own}\n{TAG}", f"{own}{TAG}{text()}"])
    if forgeries and rng.random() < 0.1:
        turn, forged = rng.choice(turns), rng.choice(forgeries)
        turn["value"] += rng.choice(["", " ", "x"]) + forged + rng.choice(["", "y", "\n"])
    if rng.random() < 0.08: turns.insert(0, {"from": "gpt", "value": text()})
    if allows_system and rng.random() < 0.1:
        turns.insert(0, {"from": "system", "value": text()})
    return turns

# ---- one batch

class Batch:
    "Conversations of one template, tokenizer and policy, and the laws that they break."

    def __init__(self, number, seed, pairs, readers):
        self.rng = random.Random(f"{seed} {number}")
        self.template, self.style, name = pairs[number % len(pairs)]
        self.reader, self.number = readers[name], number
        self.tokenizer = self.reader.tokenizer
        self.policy = self.rng.choice(["refuse", "escape"])
        if self.template == "hf":
            self.tokenizer.chat_template, self.frames = HF[self.style][1:]
            self.conv = "hf"
        else: self.frames, self.conv = named_frames(self.style), self.style
        self.found, self.counts = [], Counter()
        self.spelled = sorted({*self.reader.control, *markers(self.template, self.style)})
        self.pattern = re.compile("|".join(map(re.escape, sorted(self.spelled, key=len)[::-1])))

    def law(self, name, holds, n, what=""):
        "Count a law, and keep what breaks it."
        self.counts[name] += 1
        if holds: return
        where = f"--seed S --batch {self.number}, conversation {n}"
        pair = f"{self.style} with {self.reader.name}, {self.policy}"
        self.found.append(f"{name}: {pair}, {where}: {what}"[:600])

    def run(self, n):
        "Make and judge `n` conversations."
        is_caption = "plain" in self.style
        allows = self.style not in ("gemma", "inst_space") and not is_caption
        made = [conversation(self.rng, self.spelled, allows, is_caption) for _ in range(n)]
        pictured = [any(TAG in t["value"] for t in turns) for turns in made]
        mmtag = "mmtag" in self.style
        sources = preprocess_multimodal(made, mmtag=mmtag)
        taken = []
        for k, (turns, source, own) in enumerate(zip(made, sources, pictured)):
            # moving a tag can join what stood around it
            forged = [bool(self.pattern.search(t["value"])) for t in self.tagged(turns, own)]
            in_system = turns[0]["from"] == "system" and forged[0]
            if any(forged) and (self.policy == "refuse" or in_system):
                self.refuses(k, source, own)
            else: taken.append((k, turns, source, own, any(forged)))
        try:
            out = self.encode([row[2] for row in taken], [row[3] for row in taken])
        except DataError as e:
            return self.law("control", False, -1, f"harmless, and refused: {e}")
        for row, ids, labels in zip(taken, *out):
            self.judge(*row, ids.tolist(), labels.tolist())

    def encode(self, sources, pictured):
        out = preprocess(sources, self.tokenizer, self.conv, pictured, self.policy)
        return out["input_ids"], out["labels"]

    def refuses(self, k, source, own):
        "A message that spells a control token is refused."
        try: self.encode([source], [own])
        except DataError as e:
            return self.law("control", e.kind == "control_tokens", k, str(e))
        self.law("control", False, k, f"a control token passed in {source}")

    def tagged(self, turns, own):
        "The turns as the oracle expects them after the tags are moved."
        frame = f"<Image>{TAG}</Image>" if "mmtag" in self.style else TAG
        put = lambda text: moved(text).replace(TAG, frame) if own else text
        return [t if t["from"] != "human" else {**t, "value": put(t["value"])} for t in turns]

    def written(self, turns, own):
        "The turns as the oracle expects them in the prompt."
        turns = self.tagged(turns, own)
        if "plain" in self.style:
            turns[0] = {**turns[0], "value": TAG * turns[0]["value"].count(TAG)}
        return turns

    def judge(self, k, turns, source, own, forged, ids, labels):
        "All laws of one conversation."
        reader, parts = self.reader, oracle_parts(self.written(turns, own), self.frames, own)
        n_images = sum(t["value"].count(TAG) for t in turns if t["from"] == "human")
        self.law("sentinels", ids.count(IMAGE) == n_images, k, f"{n_images} images")
        supervised = [i for i in labels if i != -100]
        pairs = all(label in (-100, i) for i, label in zip(ids, labels))
        self.law("labels", pairs and IMAGE not in supervised, k, "a label is not its id")
        answers = "".join(text for text, kind in parts if kind in ("answer", "stop"))
        text = reader.spell(supervised)
        if text is not None:
            self.law("read_back", reader.same(text, answers), k, f"{text!r}")
        whole, text = "".join(t for t, _ in parts), reader.spell(ids[len(reader.bos) :])
        if text is not None:
            self.law("round_trip", reader.same(text, whole), k, f"{text!r}")
        expected = None if forged else oracle_ids(parts, reader)
        if expected is not None:
            self.counts["judged"] += 1
            self.law("ids", ids == expected[0], k, f"{ids} not {expected[0]}")
            self.law("labels", labels == expected[1], k, f"{labels} not {expected[1]}")
        self.own_control(k, parts, ids)
        self.prefix(k, source, own, ids, labels)
        first = int(turns[0]["from"] == "system")
        if turns[first]["from"] == "gpt":
            without = self.encode([source[:first] + source[first + 1 :]], [own])
            same = [row[0].tolist() for row in without] == [ids, labels]
            self.law("greeting", same, k, "ids or labels differ with a greeting")

    def own_control(self, k, parts, ids):
        "As many control tokens as the template writes."
        frame = [t for t, kind in parts if kind in ("frame", "stop")]
        wanted = sum(i in self.reader.control_ids for t in frame for i in self.reader.encode(t).ids)
        wanted += len(self.reader.bos)
        got = sum(i in self.reader.control_ids for i in ids)
        self.law("control", got == wanted, k, f"{got} control tokens, not {wanted}")

    def prefix(self, k, source, own, ids, labels):
        "The prompt before a random answer begins the sample, and supervision begins after it."
        ends = [n for n, t in enumerate(source) if t["from"] == "gpt" and n and t["value"].strip()]
        ends = [n for n in ends if source[n - 1]["from"] == "human"]
        if not ends: return
        end = self.rng.choice(ends)
        has_image = own and any(TAG in t["value"] for t in source[:end])
        asked = generation_ids(source[:end], self.tokenizer, self.conv, has_image, self.policy)
        asked, n = asked.tolist(), len(asked)
        # Llama 2 writes nothing for an empty question: there two answers meet
        before = labels[n - 1] == -100 or not source[end - 1]["value"]
        holds = ids[:n] == asked and before and labels[n : n + 1] == ids[n : n + 1]
        self.law("prefix", holds and labels[n] != -100, k, f"{asked[-8:]}, {ids[n - 8 : n + 3]}")

# ---- all of them

READERS, PAIRS = {}, []

def start():
    "Tokenizers, and the pairs that fit."
    warnings.simplefilter("ignore")
    roles = {
        "sentencepiece_like": ("<s>", "</s>", "<unk>"),
        "llama3_bos": ("<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>"),
        "chatml_no_bos": (None, "<|im_end|>", "<|endoftext|>"),
    }
    made = {"gemma": load_tokenizer("gemma"), "small": small_tokenizer(), **rare_tokenizers()}
    made |= {name: golden_tokenizer(name, *own) for name, own in roles.items()}
    READERS.update({name: Reader(name, tokenizer) for name, tokenizer in made.items()})
    for template in conv_templates:
        for name, tokenizer in made.items():
            try: check_tokenizer(tokenizer, template)
            except ConfigError: continue
            PAIRS.append(("named", template, name))
    PAIRS.extend(("hf", style, own[0]) for style, own in HF.items())

def work(numbers, seed, n):
    "Some batches: violations, counts of laws, counts of pairs, processor seconds."
    found, counts, pairs, began = [], Counter(), Counter(), time.process_time()
    for number in numbers:
        batch = Batch(number, seed, PAIRS, READERS)
        try: batch.run(n)
        except Exception as e:  # a crash is a violation, too
            batch.law("crash", False, -1, f"{type(e).__name__}: {e}")
        found += batch.found
        counts += batch.counts
        pairs[f"{batch.style} {batch.reader.name}"] += n
    return found, counts, pairs, time.process_time() - began

def fuzz(n, workers, seed, seconds=None):
    "Judge about `n` conversations, or as many as the time allows."
    began, groups, took = time.time(), [], 0.0
    numbers = range(-(-n // BATCH))
    groups = [numbers[k : k + 8] for k in range(0, len(numbers), 8)]
    found, counts, pairs = [], Counter(), Counter()
    with ProcessPoolExecutor(workers, initializer=start) as pool:
        left, running = iter(groups), []
        while True:
            late = seconds is not None and time.time() - began > seconds
            while not late and len(running) < 2 * workers and (group := next(left, None)):
                running.append(pool.submit(work, group, seed, BATCH))
            if not running: break
            own = running.pop(0).result()
            for line in own[0]:
                print("VIOLATION", line.replace("--seed S", f"--seed {seed}"), flush=True)
            found += own[0]
            counts += own[1]
            pairs += own[2]
            took += own[3]
    return found, counts, pairs, took

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=20_000, help="conversations")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="start no new batch after so many seconds")
    parser.add_argument("--batch", type=int, help="one batch alone")
    parser.add_argument("--quick", action="store_true", help="nothing written")
    args = parser.parse_args()
    if args.batch is not None:
        start()
        print(*work([args.batch], args.seed, BATCH)[0], sep="\n")
        return
    found, counts, pairs, took = fuzz(args.n, args.workers, args.seed, args.seconds)
    n = sum(pairs.values())
    print(
        f"{n:,} conversations, {len(pairs)} pairs of template and tokenizer, "
        f"{took:.0f} seconds of processors"
    )
    print(f"{counts['judged']:,} with ids and labels built twice; laws checked: {dict(counts)}")
    print(f"{len(found)} violations")
    if not args.quick: write(args, n, len(found), counts, pairs, took)
    sys.exit(bool(found))

def write(args, n, n_found, counts, pairs, took):
    "The result file."
    command = f"python benchmarks/fuzz.py --n {args.n} --workers {args.workers} --seed {args.seed}"
    if args.seconds: command += f" --seconds {args.seconds:g}"
    result = {
        "command": command,
        "conversations": n,
        "violations": n_found,
        "pairs": len(pairs),
        "built_twice": counts["judged"],
        "laws": {name: counts[name] for name in LAWS},
        "conversations_per_processor_second": round(n / took),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": {k: version(k) for k in ("torch", "transformers", "tokenizers")},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")

if __name__ == "__main__": main()
