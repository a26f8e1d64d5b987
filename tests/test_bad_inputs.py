"""Sixty bad inputs and more for each command that reads something: one or two lines and exit code
1 or 2, no traceback, nothing written. A table: what a command line names, and what may be wrong
with it.

The commands run in this process. `test_cli.py` holds what they do with good input.
"""

import gzip, json, os, shlex, shutil, tarfile, zipfile
from pathlib import Path
from stat import S_ISDIR

import pytest
from typer.testing import CliRunner

from small_parts import talk, tiny_model, workshop
from vlm_lit.cli import app
from vlm_lit.images import sample_image
from vlm_lit.weights.saving import save_model

# text of files that ought to hold records
BROKEN_RECORDS = {
    "empty.json": "",
    "spaces.json": " \n\n ",
    "half.json": '[{"id": 1, "conversations": [{"from": "human"',
    "open.json": '[{"id": 1, "conversations": []}',
    "number.json": "3",
    "text.json": '"records"',
    "null.json": "null",
    "object.json": "{}",
    "empty_list.json": "[]",
    "numbers.json": "[1, 2, 3]",
    "lists.json": "[[]]",
    "nothing.json": "[{}]",
    "nan.json": "[NaN]",
    "deep.json": "[" * 100_000,
    "comma.json": '[{"id": 1,}]',
    "quotes.json": "[{'id': 1}]",
    "python.json": "[None]",
    "lines.jsonl": '{"id": 1}\n{"id": \n',
    "yaml.json": "- id: 1\n  conversations: []\n",
    "prose.json": "These are my records.\n",
    "no_turns.json": [{"id": 1, "conversations": []}],
    "turns_text.json": [{"id": 1, "conversations": "hello"}],
    "turns_number.json": [{"id": 1, "conversations": [7]}],
    "role.json": [{"id": 1, "conversations": [{"from": "bot", "value": "q"}]}],
    "value.json": [{"id": 1, "conversations": [{"from": "human", "value": 7}]}],
    "twice.json": [{"id": 1, "conversations": talk("q")[:1] * 2}],
    "question.json": [{"id": 1, "conversations": talk("q")[:1]}],
    "control.json": [{"id": "\x1b[2J\u202e\n", "conversations": talk("q<eos>\x1b]0;x\x07")}],
    "image_gone.json": [{"id": 1, "image": "gone.png", "conversations": talk("<image>\nq")}],
    "image_folder.json": [{"id": 1, "image": "images", "conversations": talk("<image>\nq")}],
    "image_text.json": [{"id": 1, "image": "notes.png", "conversations": talk("<image>\nq")}],
    "image_half.json": [{"id": 1, "image": "half.png", "conversations": talk("<image>\nq")}],
    "image_out.json": [{"id": 1, "image": "../../x.png", "conversations": talk("<image>\nq")}],
    "image_root.json": [{"id": 1, "image": "/etc/passwd", "conversations": talk("<image>\nq")}],
    "image_nul.json": [{"id": 1, "image": "a\0b", "conversations": talk("<image>\nq")}],
    "image_long.json": [{"id": 1, "image": "x" * 5000, "conversations": talk("<image>\nq")}],
    "image_number.json": [{"id": 1, "image": 7, "conversations": talk("<image>\nq")}],
    "image_url.json": [{"id": 1, "image": "http://x/y.png", "conversations": talk("<image>\nq")}],
    "tags.json": [{"id": 1, "image": "photo.png", "conversations": talk("<image> <image>")}],
    "no_tag.json": [{"id": 1, "image": "photo.png", "conversations": talk("q")}],
    "id_list.json": [{"id": [1], "conversations": talk("q")}],
}
# bytes of files that are something else
OTHER_FILES = {
    "latin1.json": '[{"id": "é"}]'.encode("latin-1"),
    "utf16.json": '[{"id": 1}]'.encode("utf-16"),
    "bytes.json": bytes(range(256)) * 20,
    "zeros.json": bytes(5000),
    "pdf.json": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n",
    "elf.json": b"\x7fELF\x02\x01\x01" + bytes(100),
    "sqlite.db": b"SQLite format 3\0" + bytes(100),
    "parquet.parquet": b"PAR1" + bytes(50),
    "empty.parquet": b"",
    "half.arrow": b"ARROW1\0\0",
    "model.safetensors": b"\x08\0\0\0\0\0\0\0{}      ",
    "weights.bin": b"\x80\x02}q\x00.",
}
IMAGES = ["images_gone.png", "empty_folder", "no_images", "notes.png", "half.png", "empty.png"]
IMAGES += ["train.json", "pdf.json", "bytes.json", "photo.zip", "x" * 5000, "''"]
MODELS = [
    "gone",
    "mode",
    "tiny",
    "smol",
    "smoll",
    "half",
    "train.json",
    "empty_folder",
    "no_images",
]
MODELS += ["m_empty", "m_json", "m_list", "m_bert", "m_unknown", "m_weightless", "m_cut"]
MODELS += ["m_processor", "m_tokenizer", "m_adapter", "m_other", "owner/name", "./gone", "~/gone"]
MODELS += ["x" * 5000, "''", "m_base", "m_config_folder", "m_noise"]
NUMBERS = ["0", "-1", "1.5", "two", "nan", "''", "1e3", "0x10", "٣x"]
RECIPES = {
    "r_empty.yaml": "",
    "r_list.yaml": "- 1\n",
    "r_text.yaml": "hello\n",
    "r_tab.yaml": "model:\n\tpreset: tiny\n",
    "r_open.yaml": "model: {preset: tiny\n",
    "r_twice.yaml": "model: {preset: tiny}\nmodel: {preset: smol}\n",
    "r_alias.yaml": "model: *gone\n",
    "r_tag.yaml": "model: !!python/object/apply:os.system [ls]\n",
    "r_control.yaml": "model: \x07\n",
    "r_section.yaml": "modle: {preset: tiny}\ndata: {train: [{path: train.json}]}\n",
    "r_no_data.yaml": "model: {preset: tiny, tokenizer: tokenizer}\n",
    "r_no_train.yaml": "model: {preset: tiny, tokenizer: tokenizer}\ndata: {train: []}\n",
    "r_no_path.yaml": "model: {preset: tiny, tokenizer: tokenizer}\ndata: {train: [{}]}\n",
    "r_no_model.yaml": "data: {train: [{path: train.json}]}\n",
    "r_numbers.yaml": "model: 1\ndata: 2\ntraining: 3\n",
}
SETTINGS = [
    "data.max_length 0",
    "data.max_length nan",
    "data.max_length many",
    "data.overlength no",
]
SETTINGS += ["data.control_tokens no", "data.eval_samples -1", "data.train.5.path x", "data.x 1"]
SETTINGS += [
    "model.preset smoll",
    "model.tokenizer gone/name",
    "model.image_size many",
    "model.x 1",
]
SETTINGS += ["training.max_stps 1", "training.max_steps many", "training.global_batch_size 7"]
SETTINGS += ["training.learning_rate fast", "training.hflip_prob 2", "training.batching no"]
SETTINGS += [
    "training.trainable_modules []",
    "lora.r 0",
    "lora.alpha nan",
    "lora.x 1",
    "nothing.x 1",
]
SETTINGS += ["training.trainable_modules [x]", "data.image_tags no", "data.bad_samples.x 1"]

FILES = ["gone.json", "no_images", "empty_folder", "loop.json", "x" * 5000, "''", "/dev/null"]
FILES += ["owner/name", *BROKEN_RECORDS, *OTHER_FILES, "x.tar", "x.zip", "x.csv.gz", "photo.png"]
OUTS = ["--out train.json", "--out gone/x", "--out photo.png/x"]
HTMLS = ["--html gone/x.html", "--html images", "--html photo.png/x.html"]
COMMON = ["--nosuch", "--nosuch 1", "-z"]
IMAGE_FOLDERS = [f"--image-folder {name}" for name in ("gone", "train.json", "''")]

def values(flag, found): return [f"{flag} {value}" for value in found]

PREPARE = values("--preset", ["smoll", "gone", "half", "m_json", "''", "train.json"])
PREPARE += values("--template", ["gema", "''", "hf"])
TOKENIZERS = values("--tokenizer", ["./gone", "owner/name", "train.json", "empty_folder", "''"])
PREPARE += values("--control-tokens", ["maybe", "''"])
USE = values("--max-new-tokens", NUMBERS)
BATCH = values("--batch-size", NUMBERS)
METRICS = ["bleu", "''", "exact,", "a.py:x", "notes.py:x", "broken.py:x", "exact,exact"]

def lines(start, *endings, end=""):
    "Command lines with one beginning."
    return [f"{start} {ending}{end}" for found in endings for ending in found]

# these are a warning, or need an image to be opened
ANSWERED = [name for name in FILES if name != "question.json"]
AUDITED = [name for name in ANSWERED if name not in ("image_text.json", "image_half.json")]
NOT_RUNS = [name for name in MODELS if name != "half"]
SMALL = " --tokenizer tokenizer"  # Gemma's takes a second to load
TABLE = {
    "walk": [
        *lines("walk", ANSWERED, end=SMALL),
        *lines("walk train.json", TOKENIZERS, COMMON),
        *lines("walk train.json", PREPARE, HTMLS, IMAGE_FOLDERS, end=SMALL),
        *lines("walk train.json", values("--index", ["-1", "9", *NUMBERS[2:]]), end=SMALL),
        *lines("walk train.json", values("--aspect", ["wide", "''"]), ["train.json"], end=SMALL),
    ],
    "audit": [
        *lines("audit", AUDITED, end=f"{SMALL} --workers 0"),
        *lines("audit --decode-images", ["image_text.json", "image_half.json"], end=SMALL),
        *lines("audit train.json", ["--no-images --decode-images", "--no-images --image-folder ."]),
        *lines("audit train.json", TOKENIZERS, COMMON),
        *lines("audit train.json", PREPARE, HTMLS, IMAGE_FOLDERS, BATCH, end=SMALL),
        *lines("audit train.json", values("--max-length", NUMBERS), end=SMALL),
        *lines("audit train.json", values("--workers", NUMBERS[1:]), end=SMALL),
        *lines(
            "audit train.json", values("--examples", NUMBERS[1:]), ["--image-tags no"], end=SMALL
        ),
        "audit",
    ],
    "generate": [
        *lines("generate", MODELS, end=" photo.png -q hi"),
        *lines("generate model", IMAGES, end=" -q hi"),
        *lines("generate model photo.png -q hi", USE, BATCH, OUTS, COMMON),
        *lines("generate model photo.png -q", ["''", "<eos>", "<image><image>", "x<bos>"]),
        *lines("generate model", ["photo.png", "-q hi", "photo.png notes.png gone.png -q hi"]),
        *lines("generate model -q hi --out new.jsonl", ["half.png", "gone.png", "x" * 5000]),
        *lines("generate model photo.png -q hi --control-tokens", ["no", "''"]),
        "generate",
    ],
    "chat": [
        *lines("chat", MODELS),
        *lines("chat", MODELS, end=" photo.png"),
        *lines("chat model", IMAGES, USE, COMMON, ["--control-tokens no"]),
        "chat",
    ],
    "eval": [
        *lines("eval", MODELS, end=" --data val.json"),
        *lines("eval model --data", FILES),
        *lines("eval model --data val.json --train", FILES[:20]),
        *lines("eval model --data val.json", USE, BATCH, OUTS, IMAGE_FOLDERS, COMMON),
        *lines("eval model --data val.json", values("--sample", NUMBERS)),
        *lines("eval model --data val.json", values("--metric", METRICS)),
        "eval model",
        "eval",
    ],
    "export": [
        *lines("export", MODELS, end=" --out new"),
        *lines("export", MODELS[:12], end=" --out new --to mgm"),
        *lines("export", MODELS[:12], end=" --out new --to gguf"),
        *lines("export model --out new --to", ["onnx", "''", "HF", "gguf", "llava-hf"]),
        *lines("export model --out new --dtype", ["int3", "''", "FLOAT32", "float64"]),
        *lines("export model --out new --push", ["a/b/c", "''", "me/mine", "../x", "-x/y"]),
        *lines(
            "export model", COMMON, ["--out images", "--private", "--out model", "--out r.yaml"]
        ),
        "export",
    ],
    "train": [
        *lines("train", RECIPES, FILES[:8], ["photo.png", "bytes.json", ""]),
        *lines("train r.yaml", [f"--{setting}" for setting in SETTINGS]),
        *lines(
            f"train --preset tiny --model.{SMALL[3:]} --data", FILES, end=" --training.use_cpu true"
        ),
        *lines(
            "train r.yaml", COMMON, IMAGE_FOLDERS, ["--resume", "--data x.json", "--training.seed"]
        ),
        *lines("train --preset", [n for n in MODELS if n != "smol"], end=" --data train.json"),
        *lines("train", ["--preset tiny", "--data train.json", "r.yaml --resume --name gone"]),
    ],
    "replay": [
        *lines("replay", NOT_RUNS, FILES[:25], ["r.yaml"], end=" --step 1"),
        *lines("replay half --step", NUMBERS, ["99", "99999999999999999999"]),
        *lines("replay half --step 1", HTMLS, COMMON, ["--at nothing", "--watch 1+"]),
        *lines("replay", ["half", ""]),
    ],
    "losses": [
        *lines("losses", MODELS, end=" val.json"),
        *lines("losses model", FILES),
        *lines("losses model val.json", HTMLS, COMMON, IMAGE_FOLDERS, values("--worst", NUMBERS)),
        *lines("losses", ["model", ""]),
    ],
    "doctor": lines("doctor", ["x", "--nosuch", "-z", "--html x", "train.json", "''"]),
    "": ["nosuch", "--nosuch", "wlak", "''", "train.json", "-z"],
}

def write(name, content):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes): path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))

def write_files():
    "What the command lines name."
    for name, content in {**BROKEN_RECORDS, **OTHER_FILES, **RECIPES}.items():
        write(name, content)
    good = [{"id": 0, "image": "photo.png", "conversations": talk("<image>\nWhat is it?")}]
    write("train.json", good)
    write("val.json", good)
    write(
        "r.yaml",
        "model: {preset: tiny, tokenizer: tokenizer}\ndata: {train: [{path: train.json}]}\n",
    )
    write("runs/half/recipe.yaml", Path("r.yaml").read_text())
    for name in ("notes.png", "notes.py", "no_images/notes.txt"):
        write(name, "notes")
    write("broken.py", "import nothing_like_this\n")
    write("empty.png", b"")
    Path("empty_folder").mkdir()
    Path("images").mkdir()
    sample_image(64, 48).save("photo.png")
    sample_image(64, 48).save("images/photo.png")
    write("half.png", Path("photo.png").read_bytes()[:300])
    with tarfile.open("x.tar", "w") as file: file.add("notes.png")
    for name in ("x.zip", "photo.zip"):
        with zipfile.ZipFile(name, "w") as file: file.write("photo.png")
    write("x.csv.gz", gzip.compress(b"a,b\n1,2\n"))
    Path("loop.json").symlink_to("loop.json")

def write_models():
    "A model, and folders that are none."
    model, processor = tiny_model()
    save_model(model, "model")
    processor.save_pretrained("model")
    broken = {
        "m_json": ("config.json", "{"),
        "m_list": ("config.json", "[]"),
        "m_bert": ("config.json", '{"model_type": "bert"}'),
        "m_unknown": ("config.json", '{"model_type": "nosuch"}'),
        "m_processor": ("processor_config.json", "{"),
        "m_tokenizer": ("tokenizer.json", "{"),
        "m_noise": ("model.safetensors", os.urandom(2000)),
    }
    for name, (file, content) in broken.items():
        shutil.copytree("model", name)
        write(f"{name}/{file}", content)
    for name, file in [
        ("m_empty", "config.json"),
        ("m_weightless", "model.safetensors"),
        ("m_other", "processor_config.json"),
    ]:
        shutil.copytree("model", name)
        Path(name, file).unlink()
    shutil.copytree("model", "m_cut")
    write("m_cut/model.safetensors", Path("model/model.safetensors").read_bytes()[:-100])
    write(
        "m_adapter/adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "model"}
    )
    write("m_adapter/adapter_model.safetensors", b"")
    write("m_base/base.json", "{}")
    Path("m_config_folder/config.json").mkdir(parents=True)

@pytest.fixture(scope="module")
def place():
    with workshop() as folder:
        write_files()
        write_models()
        yield folder

def everything():
    "Files with size and time; a symbolic link by itself."
    found = {str(path): path.lstat() for path in Path().rglob("*")}
    return {
        name: not S_ISDIR(s.st_mode) and (s.st_size, s.st_mtime_ns) for name, s in found.items()
    }

def refused(line):
    "What a command line prints, and what is wrong with that; empty if nothing is."
    runner, settings = CliRunner(), dict(env={"COLUMNS": "100"}, prog_name="vlm-lit")
    out = runner.invoke(app, shlex.split(line), "hi\n", **settings)
    said = [row for row in out.stderr.splitlines() if not row.startswith("Usage")]
    obeyed = [c for c in out.output if not c.isprintable() and c != "\n"]
    wrong = ""
    if out.exception and not isinstance(out.exception, SystemExit):
        wrong = f"{type(out.exception).__name__}: {str(out.exception)[:300]}"
    elif out.exit_code not in (1, 2): wrong = f"exit code {out.exit_code}"
    elif out.exit_code == 2 and not 1 <= len(said) <= 2:
        wrong = f"{len(said)} lines"
    elif obeyed or "Traceback" in out.output:
        wrong = f"prints {obeyed or 'a traceback'}"
    return out, wrong

@pytest.mark.parametrize("command", TABLE)
def test_bad_inputs_are_refused_in_a_line(place, command):
    before, faults = everything(), {}
    for line in TABLE[command]:
        out, wrong = refused(line)
        after = everything()
        if after != before:
            wrong += f", wrote {sorted(dict(after.items() ^ before.items()))[:5]}"
        if wrong: faults[line[:100]] = f"{wrong}: {out.output[-300:]!r}"
        before = after
    assert not faults, "\n".join(f"{line!r}: {found}" for line, found in faults.items())

def test_the_table_is_long_enough():
    short = {name: len(lines) for name, lines in TABLE.items() if len(set(lines)) < 60}
    assert set(short) <= {"doctor", ""}, short
