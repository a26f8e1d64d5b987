"""One small trained model, the same questions through every door.

    python examples/easy_vqa/prepare.py --out data/easy_vqa
    python benchmarks/doors.py --data data/easy_vqa [--model RUN] [--llama-cpp PYTHON]
    -> benchmarks/results/doors.json

A model of LLaVA's shape (SigLIP tower and a Llama of about a million weights, images of 64 pixels)
is trained on easy-VQA in two short stages, unless `--model` names one. Then it is asked the same
questions of the test split, greedily: by this package, by transformers' generate and pipeline from
the folders that `vlm-lit export` writes (in processes that cannot import this package), by
lmms-eval's adapter, and by llama.cpp (`PYTHON` of an environment with llama-cpp-python, see
`llama_cpp.py`). Compared are answers, word for word.
"""

import argparse, importlib, json, os, platform, subprocess, sys, tempfile, time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

RESULT = Path(__file__).parent / "results/doors.json"
MAX_NEW_TOKENS = 8
TEXT = dict(model_type="llama", hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
TEXT |= dict(num_key_value_heads=2, head_dim=32, intermediate_size=256)
TEXT |= dict(initializer_range=128**-0.5, max_position_embeddings=2048)
TOWER = dict(model_type="siglip_vision_model", hidden_size=128, intermediate_size=256)
TOWER |= dict(num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8)
TRAINING = dict(
    trainable_modules=["all"],
    global_batch_size=32,
    per_device_train_batch_size=32,
    learning_rate=1e-3,
    adam_beta1=0.9,
    adam_beta2=0.98,
    weight_decay=0.05,
    max_grad_norm=1.0,
    lr_scheduler_type="warmup_stable_decay",
    warmup_steps=18,
    hflip_prob=0.5,
    seed=0,
)

# the model

def make_tokenizer(data, folder):
    "A byte-level BPE with Gemma's control tokens, which llama.cpp knows as GPT-2's kind."
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from small_parts import small_tokenizer

    texts = [(data / f"{name}.jsonl").read_text() for name in ("captions", "train")]
    small_tokenizer(texts, 400).save_pretrained(folder)

def recipe(data, file, steps, model, **training):
    "A recipe of one stage."
    decay = {"num_decay_steps": steps * 3 // 10, "decay_type": "linear"}
    source = {"path": str(data / file), "image_folder": str(data)}
    own = dict(max_steps=steps, save_steps=steps, logging_steps=20, lr_scheduler_kwargs=decay)
    settings = dict(max_length=192, overlength="error", train=[source])
    return {"model": model, "data": settings, "training": {**TRAINING, **own, **training}}

def train_model(data, folder, steps):
    "Both stages; the folder of the second run."
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(data, folder / "tokenizer")
    facts = json.loads((data / "facts.json").read_text())
    colors = {key: facts[key] for key in ("image_mean", "image_std")}
    parts = dict(language_model={"config": TEXT}, vision_tower={"config": TOWER})
    parts |= dict(vision_tower_aux=None, aux_stages=None, select_layer=-1)
    sizes = dict(image_size=64, image_size_aux=64, tokenizer=str(folder / "tokenizer"))
    first = recipe(data, "captions.jsonl", steps, dict(preset="tiny", **parts, **sizes, **colors))
    first["training"]["match_embedding_scale"] = True
    by_image = dict(batching="by_image", samples_per_image=4)
    second = {"from": "runs/doors-1"}
    second = recipe(data, "train.jsonl", steps, second, **by_image)
    for n, own in enumerate((first, second), 1):
        path = folder / f"stage-{n}.yaml"
        path.write_text(yaml.safe_dump(own))
        command = [sys.executable, "-m", "vlm_lit", "train", path, "--name", f"doors-{n}"]
        subprocess.run(command, check=True)
    return Path("runs/doors-2")

# doors; each answers a list of {"image": path, "question": text}

def messages(row):
    "A question in chat form."
    parts = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["question"]}]
    return [{"role": "user", "content": parts}]

def opened(rows):
    "The same with images that are open, of the size that the model reads."
    from PIL import Image

    return [{**row, "image": Image.open(row["image"]).convert("RGB")} for row in rows]

def by_vlm_lit(folder, rows):
    "This package, in batches."
    from vlm_lit.evaluation.generation import answer_batch
    from vlm_lit.weights.pretrained import open_model

    questions, images = [r["question"] for r in rows], [r["image"] for r in rows]
    return list(answer_batch(*open_model(folder, "cpu"), questions, images, 16, MAX_NEW_TOKENS))

def by_chat(folder, rows):
    "This package, turn by turn, streamed."
    from vlm_lit.evaluation.generation import Chat
    from vlm_lit.weights.pretrained import open_model

    chat, answers = Chat(*open_model(folder, "cpu"), MAX_NEW_TOKENS), []
    for row in rows:
        chat.clear()
        answers.append("".join(chat.stream(row["question"], row["image"])))
    return answers

def by_generate(folder, rows, **code):
    "transformers: auto classes, chat template, generate, the idiom of its documentation."
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, **code).eval()
    processor, answers = AutoProcessor.from_pretrained(folder, **code), []
    form = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    for row in opened(rows):
        inputs = processor.apply_chat_template(messages(row), **form)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(new, skip_special_tokens=True)
    return answers

def by_pipeline(folder, rows, **code):
    "transformers: pipeline('image-text-to-text')."
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=folder, **code)
    settings = dict(max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    talks = [messages(row) for row in opened(rows)]
    found = [pipe(text=talk, return_full_text=False, generate_kwargs=settings) for talk in talks]
    return [own[0]["generated_text"] for own in found]

def by_own_code(folder, rows):
    "transformers with the code that the folder carries."
    return by_generate(folder, rows, trust_remote_code=True)

def by_own_pipeline(folder, rows):
    "transformers' pipeline with the code that the folder carries."
    return by_pipeline(folder, rows, trust_remote_code=True)

def by_lmms_eval(folder, rows):
    "lmms-eval's adapter, as its evaluator calls it."
    from lmms_eval.api.instance import Instance
    from vlm_lit.evaluation.lmms_eval_adapter import VLMLit

    docs = opened(rows)
    lm = VLMLit(pretrained=str(folder), device="cpu", batch_size=16)
    lm.task_dict = {"task": {"test": docs}}
    settings, visual = {"max_new_tokens": MAX_NEW_TOKENS, "until": []}, lambda doc: [doc["image"]]
    meta = lambda n: {"task": "task", "doc_id": n, "repeats": 1}
    asked = [(d["question"], settings, visual, n, "task", "test") for n, d in enumerate(docs)]
    kind = dict(request_type="generate_until", idx=0)
    rows = [Instance(arguments=a, metadata=meta(n), **kind) for n, a in enumerate(asked)]
    return lm.generate_until(rows)

# name -> (which export it opens, whether the package is hidden, function)
DOORS = {
    "vlm_lit, batches": ("run", False, by_vlm_lit),
    "vlm_lit, Chat": ("run", False, by_chat),
    "transformers, --to hf": ("hf", False, by_generate),
    "lmms-eval": ("hf", False, by_lmms_eval),
    "transformers, --to hf, code in the folder": ("hf", True, by_own_code),
    "pipeline, --to hf, code in the folder": ("hf", True, by_own_pipeline),
    "transformers, --to llava-hf": ("llava-hf", True, by_generate),
    "pipeline, --to llava-hf": ("llava-hf", True, by_pipeline),
    "vlm_lit, from --to llava-hf": ("llava-hf", False, by_vlm_lit),
}

def answer_in_child(name, folder, questions):
    "The answers of a door, in a process of its own."
    command = [sys.executable, __file__, "--door", name, "--folder", folder]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as modules:
        environment["HF_MODULES_CACHE"] = modules
        done = subprocess.run(
            [*command, "--questions-file", questions],
            capture_output=True,
            text=True,
            env=environment,
        )
    if done.returncode: return None, done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1]), None

def answer_as_child(args):
    "What that process does."
    export, hidden, function = DOORS[args.door]
    if hidden: sys.modules["vlm_lit"] = None
    else:
        importlib.import_module("vlm_lit.evaluation.generation")  # registers the auto classes
    answers = function(args.folder, json.loads(Path(args.questions_file).read_text()))
    print(json.dumps([answer.strip() for answer in answers]))

def by_llama_cpp(python, run, folder, rows):
    "llama.cpp, on the prompts that this package makes."
    from vlm_lit.images import open_image
    from vlm_lit.text.labels import generation_prompt
    from vlm_lit.weights.pretrained import open_model

    model, processor = open_model(run, "cpu")
    side, asked = model.config.image_size, []
    stops = processor.generation_settings()["eos_token_id"]
    for row in rows:
        turn = [{"from": "human", "value": f"<image>\n{row['question']}"}]
        prompt = generation_prompt(turn, processor.tokenizer, processor.template).text
        path = Path(row["image"])
        image = open_image(path.name, path.parent)
        assert image.size == (side, side), image.size
        own = dict(prompt=prompt, pixels=list(image.tobytes()), size=image.size, stops=stops)
        asked.append({**own, "add_special": True, "max_new_tokens": MAX_NEW_TOKENS})
    (folder / "questions.json").write_text(json.dumps(asked))
    script = Path(__file__).with_name("llama_cpp.py")
    command = [python, "-P", script, "--outside", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: return None, done.stderr.strip().splitlines()[-1]
    found = json.loads(done.stdout.splitlines()[-1])
    ids = [answer["answer"] for answer in found["answers"]]
    return processor.answers(ids), None

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/easy_vqa"))
    parser.add_argument("--model", type=Path, help="a trained run of that shape; none: train one")
    parser.add_argument("--steps", type=int, default=600, help="of each stage")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--llama-cpp", help="Python of an environment with llama-cpp-python")
    parser.add_argument("--door", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--questions-file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.door: return answer_as_child(args)
    run = args.model or train_model(args.data, Path("data/doors"), args.steps)
    lines = (args.data / "test.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[:: max(len(lines) // args.questions, 1)]]
    records = records[: args.questions]
    value = lambda record, n: record["conversations"][n]["value"]
    rows = [
        {
            "image": str((args.data / record["image"]).resolve()),
            "question": value(record, 0).replace("<image>", "").strip(),
        }
        for record in records
    ]
    wanted, found = [value(record, 1) for record in records], {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "rows.json").write_text(json.dumps(rows))
        for to in ("hf", "llava-hf", "gguf"):
            command = [sys.executable, "-m", "vlm_lit", "export", run, "--to", to]
            subprocess.run([*command, "--out", folder / to], check=True, capture_output=True)
        for name, (export, _, _) in DOORS.items():
            if name == "lmms-eval" and find_spec("lmms_eval") is None: continue
            place = run if export == "run" else folder / export
            began = time.perf_counter()
            found[name] = answer_in_child(name, place, folder / "rows.json")
            print(f"{name:44} {time.perf_counter() - began:5.0f} s", found[name][1] or "")
        if args.llama_cpp:
            found["llama.cpp"] = by_llama_cpp(args.llama_cpp, run, folder / "gguf", rows)
    first = found["vlm_lit, batches"][0]
    table = {}
    for name, (answers, error) in found.items():
        own = {"error": error}
        if answers is not None:
            own = {
                "right": sum(a == w for a, w in zip(answers, wanted)),
                "equal": sum(a == b for a, b in zip(answers, first)),
            }
        table[name] = own
        print(f"{name:44}", own)
    packages = ("torch", "transformers", "gguf", "lmms_eval")
    versions = {n: version(n) for n in packages if find_spec(n) is not None}
    machine = {"python": platform.python_version(), **versions}
    result = {"questions": len(rows), "doors": table, "machine": machine}
    is_whole = len(rows) == 100 and "llama.cpp" in found and "lmms-eval" in found
    if is_whole: RESULT.write_text(json.dumps(result, indent=1) + "\n")
    else:
        print("not kept: that takes 100 questions, lmms-eval and --llama-cpp")

if __name__ == "__main__": main()
