"""Write easy-VQA as LLaVA files, with a tokenizer of its own. Made from easy_vqa.ipynb.

python examples/easy_vqa/prepare.py --out data/easy_vqa
"""

import argparse, importlib.util, json, re, shutil, sys, tempfile
from pathlib import Path
from PIL import Image, ImageStat
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import IMAGE_TOKEN, ConfigError
from vlm_lit.text.labels import check_tokenizer
from vlm_lit.text.tokenizer import load_tokenizer

COLORS = "black blue brown gray green red teal yellow".split()
SHAPES = "circle rectangle triangle".split()

def package_folder() -> Path:
    "Where the package easy-vqa keeps its data. Raises `ConfigError` if it is not installed."
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None:
        raise ConfigError("the package easy-vqa is not installed: pip install easy-vqa")
    return Path(spec.origin).parent / "data"

def questions(
    split: str,  # "train" or "test"
) -> list[tuple[str, str, int]]:  # Question, answer, number of the image
    "easy-VQA's questions, in the package's order."
    text = (package_folder() / split / "questions.json").read_text(encoding="utf-8")
    return [tuple(row) for row in json.loads(text)]

def is_negated(question: str) -> bool:
    "Whether a question says *not* or *no*, so that its answer is turned around."
    return bool({"not", "no"} & set(re.findall(r"\w+", question.lower())))

def told_by(
    question: str,  # About one image
    answer: str,  # "yes", "no", a color or a shape
) -> set[str]:  # Colors and shapes that the image must have
    "What a question and its answer tell about an image."
    named = set(re.findall(r"\w+", question.lower())) & {*COLORS, *SHAPES}
    if answer not in ("yes", "no"):
        return named | {answer}  # "what is the blue shape?" tells blue
    return named if (answer == "yes") != is_negated(question) else set()

def caption(
    pairs: list[tuple[str, str]],  # Questions and answers about one image
) -> str | None:  # "a blue rectangle"; None if color or shape is not told
    "A caption made of what the answers tell."
    told = set().union(*(told_by(*pair) for pair in pairs))
    color, shape = [sorted(told & set(words)) for words in (COLORS, SHAPES)]
    return f"a {color[0]} {shape[0]}" if len(color) == len(shape) == 1 else None

def record(
    name: str,  # The record's id
    image: str,  # Path below the folder of the data
    question: str,  # Without a tag
    answer: str,
    **more,  # Such as `type`
) -> dict:
    "One question about one image, as LLaVA writes it."
    turns = [("human", f"{question}\n{IMAGE_TOKEN}"), ("gpt", answer)]
    turns = [{"from": role, "value": value} for role, value in turns]
    return {"id": name, "image": image, "conversations": turns, **more}

def question_records(split: str) -> list[dict]:
    "A record per question, with its `type`: color, shape or yes_no."
    words = {"color": COLORS, "shape": SHAPES, "yes_no": ("yes", "no")}
    kinds = {answer: kind for kind, own in words.items() for answer in own}
    return [
        record(f"{split}-{i}-{n}", f"images/{split}/{i}.png", q, a, type=kinds[a])
        for n, (q, a, i) in enumerate(questions(split))
    ]

def caption_records(split: str = "train") -> list[dict]:
    "A record per image whose color and shape are told."
    by_image = {}
    for q, a, i in questions(split): by_image.setdefault(i, []).append((q, a))
    found = {i: caption(pairs) for i, pairs in by_image.items()}
    return [
        record(f"{split}-{i}", f"images/{split}/{i}.png", "What is in the photo?", text)
        for i, text in found.items()
        if text
    ]

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]

def message_texts(records: list[dict]) -> list[str]:
    "The different texts of records, without tags, and the roles of the template."
    turns = [turn for r in records for turn in r["conversations"]]
    found = {turn["value"].replace(IMAGE_TOKEN, "") for turn in turns}
    return [*sorted(found), "user\n", "model\n"]

def train_tokenizer(
    texts: list[str],  # Each a message of the data
) -> PreTrainedTokenizerFast:
    "A byte-level tokenizer in which every word of the texts is one token."
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=CONTROL,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)  # merges end where every word is one token
    bos = [("<bos>", CONTROL.index("<bos>"))]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=bos)
    names = {f"{token[1:-1]}_token": token for token in CONTROL[:4]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)

def check(
    tokenizer,  # From `train_tokenizer`
    texts: list[str],  # What it was trained on
) -> None:
    "Raise `ConfigError` unless the tokenizer serves the template and gives every text back."
    check_tokenizer(tokenizer, "gemma")
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        words = re.findall(r" ?\w+|[^\w\n]|\n", text)
        if tokenizer.decode(ids) != text or len(ids) != len(words):
            tokens = tokenizer.convert_ids_to_tokens(ids)
            raise ConfigError(f"the tokenizer does not fit {text!r}: {tokens}")

def channel_statistics(
    paths: list[Path],  # Of RGB images of one size
) -> dict[str, list[float]]:  # `image_mean` and `image_std`, 0 to 1
    "Mean and standard deviation of each channel over all pixels."
    stats = [ImageStat.Stat(Image.open(path).convert("RGB")) for path in paths]
    n = sum(stat.count[0] for stat in stats)
    mean = [sum(stat.sum[c] for stat in stats) / n for c in range(3)]
    std = [(sum(stat.sum2[c] for stat in stats) / n - mean[c] ** 2) ** 0.5 for c in range(3)]
    mean, std = [[round(value / 255, 4) for value in values] for values in (mean, std)]
    return {"image_mean": mean, "image_std": std}

def write_folder(
    folder: Path,  # An empty one
) -> dict:  # What is in it
    "Images, records and tokenizer."
    for split in ("train", "test"):
        shutil.copytree(package_folder() / split / "images", folder / "images" / split)
    files = {
        "captions": caption_records(),
        "train": question_records("train"),
        "test": question_records("test"),
    }
    for name, records in files.items():
        lines = "".join(json.dumps(r) + "\n" for r in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    texts = message_texts([*files["captions"], *files["train"]])
    train_tokenizer(texts).save_pretrained(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    check(tokenizer, texts)
    facts = {
        **{f"{name}.jsonl": len(records) for name, records in files.items()},
        "images": len(list(folder.glob("images/*/*.png"))),
        "tokenizer": len(tokenizer),
        **channel_statistics(sorted(folder.glob("images/train/*.png"))),
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return facts

def prepare(
    out: str | Path,  # The folder to be
) -> dict:  # `facts.json` of the folder
    "Write the folder completely or not at all; one that is there is left as it is."
    out = Path(out)
    if (out / "facts.json").is_file():
        return json.loads((out / "facts.json").read_text(encoding="utf-8"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{str(out)!r} is no folder of this script; choose another --out")
    package_folder()
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as part:
            facts = write_folder(Path(part) / "new")
            if out.exists(): out.rmdir()
            (Path(part) / "new").rename(out)
    except OSError as e:
        raise ConfigError(f"cannot write {str(out)!r} ({e.strerror or e})") from e
    return facts

def main() -> None:
    "The command."
    parser = argparse.ArgumentParser(description="easy-VQA as LLaVA files, with a tokenizer")
    parser.add_argument("--out", default="data/easy_vqa", help="the folder to be")
    out = parser.parse_args().out
    try: facts = prepare(out)
    except ConfigError as e: sys.exit(f"prepare.py: {e}")
    for name, value in facts.items(): print(f"{out}  {name}: {value}")

if __name__ == "__main__": main()
