"Derived from nbs/13_evaluation.ipynb by `make tests`; edit the notebook, not this file."
import hashlib
from collections import Counter
from pathlib import Path
import torch
from rich.progress import track
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from vlm_lit.core import ConfigError, DataError, printable, progress_console
from vlm_lit.files import write_rows
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.text.encode import bisect_failures
from vlm_lit.data.records import Records
from vlm_lit.text.messages import image_names
from vlm_lit.processor import VLMProcessor
from vlm_lit.evaluation.generation import check_prompt, generate_ids
from vlm_lit.evaluation.metrics import load_metrics, majority_baseline, score_answers
from vlm_lit.evaluation.metrics import question_only_baseline
from vlm_lit.evaluation.metrics import anls, contains, exact
import json
import lzma, tempfile
from types import SimpleNamespace
from fastcore.test import test_eq, test_close, expect_fail
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers import trainers
from transformers import PreTrainedTokenizerFast
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.evaluation.scoring import _answer_batch, _prompts, _training_pairs, _turns
from vlm_lit.evaluation.metrics import score_answers
from vlm_lit.models.vlm import VLM
from vlm_lit.models.config import VLMConfig
from vlm_lit.evaluation.scoring import batch_by_image
from vlm_lit.evaluation.scoring import evaluate
from vlm_lit.evaluation.scoring import fixed_sample
from vlm_lit.evaluation.scoring import format_table
from vlm_lit.evaluation.scoring import predict

def setup_module():
    global MINE, Oracle, dot_records, draw_dots, folder, golden, golden_tokenizer, processor, processor_of, record, records, small_model, small_tokenizer, texts, tok
    golden = next(p for p in (Path("../tests/golden"), Path("tests/golden")) if p.is_dir())
    folder = Path(tempfile.mkdtemp())
    def draw_dots(n, dark):
        "An image of a few dots on a dark or a light ground."
        image = Image.new("RGB", (64, 64), "#203040" if dark else "#e0e8f0")
        for k in range(n):
            x, y = 6 + 18 * k, 20 + 8 * (k % 2)
            ImageDraw.Draw(image).ellipse((x, y, x + 10, y + 10), fill="orange")
        image.save(folder / f"{n}{'dark' if dark else 'light'}.png")
    def record(name, image, *texts, **more):
        "A conversation about an image, in LLaVA's form."
        turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
        return {"id": name, **({"image": image} if image else {}), "conversations": turns, **more}
    def dot_records():
        """Questions about 6 images: two conversations of one turn, one of three turns; and one about
    two images."""
        records = []
        for n in (1, 2, 3):
            for dark in (True, False):
                draw_dots(n, dark)
                image = f"{n}{'dark' if dark else 'light'}.png"
                ground = "yes" if dark else "no"
                talk = "<image>\nplease count the dots", f"{n} dots", "is it dark?", ground
                records += [
                    record(f"count-{image}", image, "<image>\nhow many dots?", f"{n}", type="count"),
                    record(f"dark-{image}", image, "is it dark?\n<image>", ground, type="yes_no"),
                    record(f"talk-{image}", image, *talk, "thank you", "you are welcome"),
                ]
        talk = "<image>\nis it dark?", "yes", "<image>\nand this one?", "no"
        two = record("two", ["1dark.png", "3light.png"], *talk, type="yes_no")
        return [*records, two, record("text", None, "what is two times three?", "six")]
    def small_tokenizer(texts):
        "A tokenizer of a few hundred entries, with Gemma's control tokens."
        backend = Tokenizer(models.BPE())
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
        lines = pre_tokenizers.Split("\n", "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([lines, bytes_])
        backend.decoder = decoders.ByteLevel()
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        alphabet = bytes_.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 2)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<pad>",
            eos_token="<eos>",
            bos_token="<bos>",
            unk_token="<unk>",
            additional_special_tokens=special[4:],
        )
    def golden_tokenizer(name, bos, eos, unk):
        "A tokenizer cut down for tests."
        packed = (golden / f"{name}.tokenizer.json.xz").read_bytes()
        backend = Tokenizer.from_str(lzma.decompress(packed).decode())
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token=unk, pad_token=unk
        )
    def small_model(vocab_size):
        "A small model with random weights for images of 64 pixels."
        text = dict(
            model_type="gemma",
            vocab_size=vocab_size,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=32,
            initializer_range=0.4,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        vision = dict(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        aux = dict(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2)
        torch.manual_seed(0)
        config = VLMConfig(text, vision, aux, image_size=32, image_size_aux=64, select_layer=-1)
        return VLM(config).eval()
    def processor_of(tokenizer, template="gemma"):
        "A processor for that model."
        return VLMProcessor(
            tokenizer,
            template=template,
            image_size=32,
            image_size_aux=64,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
    MINE = "def score(prediction, answer, record):\n    return abs(len(prediction) - len(answer))\n"
    (folder / "my.py").write_text(MINE)
    records = dot_records()
    texts = [turn["value"] for r in records for turn in r["conversations"]]
    tok = small_tokenizer([*texts, "user\nmodel\n"])
    processor = processor_of(tok)
    class Oracle(torch.nn.Module):
        "Returns the true answers of a dataset; counts the images it gets."

        device = torch.device("cpu")
        config = SimpleNamespace(num_image_tokens=1, image_token_id=-1)  # a placeholder per image

        def __init__(self, dataset):
            super().__init__()
            self.shown, self.answers = 0, {}
            for n in range(len(dataset)):
                sample = dataset[n]
                for prompt in _prompts(sample):
                    rest = sample["labels"][len(prompt["input_ids"]) :]
                    gaps = (rest == IGNORE_INDEX).nonzero()
                    images = prompt.get("image_aux", torch.zeros(0, 3, 1, 1))
                    key = self.key(prompt["input_ids"], images if images.dim() > 3 else images[None])
                    self.answers[key] = rest[: int(gaps[0]) if len(gaps) else None]

        def key(self, ids, images):
            return tuple(ids.masked_fill(ids < 0, -1).tolist()), tuple(
                image.float().std().item() for image in images
            )

        def generate(
            self,
            input_ids,
            attention_mask,
            pixel_values_aux=torch.zeros(0, 3, 1, 1),
            image_index=None,
            pad_token_id=None,
            **settings,
        ):
            self.shown += len(pixel_values_aux)
            images = pixel_values_aux if image_index is None else pixel_values_aux[image_index]
            own = torch.split(images, (input_ids < 0).sum(1).tolist())
            prompts = zip(input_ids, attention_mask.bool(), own)
            rows = [self.answers[self.key(ids[mask], part)] for ids, mask, part in prompts]
            settings = dict(batch_first=True, padding_value=pad_token_id)
            return torch.cat([input_ids, torch.nn.utils.rnn.pad_sequence(rows, **settings)], 1)

def test_a_prompt_ends_where_its_answer_begins():
    ds = LazySupervisedDataset(records, processor, folder, uint8=True)
    after = "sample['input_ids'][end:][:4]"
    with Breakpoint(_prompts, at="prompts.append", watch=["end", after], tokenizer=tok) as bp:
        _prompts(ds[2])
    bp.expect_each({"end": [15, 32, 46], f"{after}[0].item()": [22, 285, 278]})

def test_an_end_one_token_later_leaves_the_answer_in_the_prompt():
    ds, change = LazySupervisedDataset(records, processor, folder, uint8=True), {"end": lambda n: n + 1}
    with Breakpoint(_prompts, at="prompts.append", watch="end", set=change, tokenizer=tok) as bp:
        _prompts(ds[0])
    bp.expect_changed(
        {"len(result[0]['input_ids'])": (15, 16), "result[0]['input_ids'][15:]": ([], [22])}
    )

def test_three_turns_of_a_record_are_one_batch():
    ds, model = LazySupervisedDataset(records, processor, folder, uint8=True), small_model(len(tok))
    turns, lengths = "[row['turn'] for row in rows]", "[len(prompt['input_ids']) for prompt in own]"
    with Breakpoint(_answer_batch, at="answers = generate_ids", watch=[turns, lengths]) as bp:
        rows, skipped = predict(model, ds, indices=[2], max_new_tokens=4)
    bp.expect({turns: [0, 2, 4], lengths: [15, 32, 46]}, hits=1)

def test_baselines_are_computed_from_the_training_records():
    train, test = records[:12], records[12:]  # images of one and two dots; of three dots
    model, more = small_model(len(tok)), dict(image_folder=folder, train_data=train, max_new_tokens=4)
    with Breakpoint(question_only_baseline, at="return [best.get", watch="best other") as bp:
        result = evaluate(model, processor, test, **more)
    print(format_table(result))
    answers = {"how many dots?": "1", "please count the dots": "1 dots", "thank you": "you are welcome"}
    bp.expect(best={**answers, "is it dark?": "no"}, other="no")

def test_a_baseline_of_the_evaluated_records_is_too_high():
    train, test = records[:12], records[12:]
    model, leak = small_model(len(tok)), {"train": _training_pairs(test, True, [])}
    with Breakpoint(evaluate, at='known = {"majority"', watch="len(train)", set=leak) as bp:
        more = dict(image_folder=folder, train_data=train, max_new_tokens=4)
        evaluate(model, processor, test, **more)
    score = "baselines['question_only']['exact']"
    bp.expect_changed({f"{score}['all']": (5 / 13, 11 / 13), f"{score}['count']": (0, 1)})

def test_prompts_end_where_their_answers_begin():
    llama = golden_tokenizer("sentencepiece_like", "<s>", "</s>", "<unk>")
    qwen = golden_tokenizer("chatml_no_bos", None, "<|im_end|>", "<|endoftext|>")
    qwen.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = [r for r in records if r["id"] in ("talk-2dark.png", "two")]
    for tokenizer, template, end in [
        (tok, "gemma", "<start_of_turn>model\n"),
        (llama, "v1", "ASSISTANT:"),
        (qwen, "hf", "<|im_start|>assistant\n"),
    ]:
        ds = LazySupervisedDataset(talk, processor_of(tokenizer, template), folder, uint8=True)
        for n, r in enumerate(talk):
            ids, turns = ds[n]["input_ids"], _turns(r)
            prompts = _prompts(ds[n])
            test_eq(len(prompts), len(turns))
            for prompt, (_, question, answer) in zip(prompts, turns):
                begun = prompt["input_ids"]
                text = tokenizer.decode([i for i in begun.tolist() if i >= 0])
                rest = tokenizer.decode([i for i in ids[len(begun) :].tolist() if i >= 0])
                assert text.endswith(end) and question in text, text
                assert rest.strip().startswith(answer), rest
                assert torch.equal(begun, ids[: len(begun)])
        print(f"{template:6}", [tuple(p["image_aux"].shape) for p in prompts])
        # the second image only in the second turn
        test_eq([tuple(p["image_aux"].shape) for p in prompts], [(1, 3, 64, 64), (2, 3, 64, 64)])
    for bad in (record(1, None, "q", "a", "q"), record(1, None, "q"), {"id": 1, "conversations": []}):
        with expect_fail(DataError, contains="record 1, turn"): _turns(bad)

def test_records_that_cannot_be_used_are_named():
    bad = [
        record("gone", "gone.png", "<image>\nq", "a"),
        record("open", None, "q", "a", "and now?"),
        record("forged", None, "q<end_of_turn>", "a"),
        {"id": "empty"},
        record("taken", None, "q", "a", type="all"),
        *records[:3],
    ]
    ds = LazySupervisedDataset(bad, processor, folder, uint8=True)
    rows, skipped = predict(small_model(len(tok)), ds, strict=False, max_new_tokens=2)
    for row in skipped:
        print(row["id"], "|", row["reason"][:90].replace(str(folder), "images"))
    test_eq([row["id"] for row in skipped], ["open", "empty", "taken", "gone", "forged"])
    test_eq(len(rows), 5)
    messages = [
        "no image 'gone.png'",
        "record 'open', turn 2: a question without an answer",
        "the text spells the control token",
        "record 'empty': no form fits",
        "the type 'all' is taken",
    ]
    for n, message in enumerate(messages):
        with expect_fail(DataError, contains=message):
            predict(small_model(len(tok)), ds, indices=[n])
    own = VLMProcessor(tok, image_size=32, image_size_aux=64, num_image_tokens=16)
    limits = dict(max_length=40, overlength="truncate", uint8=True)
    short = LazySupervisedDataset(records[:3], own, folder, **limits)
    _, skipped = predict(small_model(len(tok)), short, strict=False, max_new_tokens=2)
    left = "record 'talk-1dark.png': 1 of 3 answers are left after truncation"
    test_eq([row["reason"] for row in skipped], [f"{left}; evaluate without max_length"])

def test_data_in_any_form_gives_the_same_result():
    (folder / "data.json").write_text(json.dumps(records))
    model = small_model(len(tok))
    found = [
        evaluate(model, processor, data, max_new_tokens=3, **more)
        for data, more in [
            (records, dict(image_folder=folder)),
            (folder / "data.json", {}),
            (str(folder / "data.json"), dict(image_folder=folder, batch_size=5)),
            (LazySupervisedDataset(records, processor, folder, uint8=True), {}),
        ]
    ]
    assert all(other == found[0] for other in found[1:])
    rows, chosen = found[0]["predictions"], fixed_sample(len(records), 5)
    part = evaluate(model, processor, folder / "data.json", indices=chosen, max_new_tokens=3)
    test_eq(part["predictions"], [row for row in rows if row["index"] in chosen])
    black = evaluate(model, processor, folder / "data.json", blank_images=True, max_new_tokens=3)
    same = [
        len({row["prediction"] for row in own if row["question"] == "how many dots?"})
        for own in (black["predictions"], rows)
    ]
    print("different answers to one question, black images and real ones:", same)
    assert same[0] == 1

def test_evaluations_that_cannot_be_are_refused():
    ds = LazySupervisedDataset(records[:2], processor, folder, uint8=True)
    for message, more in [
        ("follow_links and blank_images belong to the dataset", dict(blank_images=True)),
        ("image_folder, follow_links and blank_images", dict(image_folder=folder)),
        ("no folder for", dict(out=folder / "gone" / "x.jsonl")),
        ("unknown metric 'bleu'", dict(metrics="bleu")),
    ]:
        with expect_fail(ConfigError, contains=message):
            evaluate(None, processor, ds, **more)
    with expect_fail(DataError, contains="holds no answered question"):
        evaluate(None, processor, ds, train_data=[])
    model, lenient = small_model(len(tok)), dict(image_folder=folder, strict=False)
    with expect_fail(DataError, contains="no question can be asked; record 'open'"):
        evaluate(model, processor, [record("open", None, "q")], **lenient)
    bad = [record("open", None, "q"), *records[:2]]
    result = evaluate(model, processor, bad, train_data=bad, max_new_tokens=2, **lenient)
    table = format_table({**result, "n_by_type": {"count": 1, "yes_no": 1}})
    print(*(line[:100] for line in table.splitlines()), sep="\n")
    left_out = [(row["id"], row.get("data")) for row in result["skipped"]]
    test_eq(left_out, [("open", "train"), ("open", None)])
    odd = [{**records[0], "type": "\x1b[31m"}]
    odd = evaluate(model, processor, odd, image_folder=folder, max_new_tokens=2)
    assert "\x1b" not in format_table(odd) and "\\x1b[31m" in format_table(odd)

def test_questions_about_an_image_meet_in_a_batch():
    test_eq(batch_by_image(["a", "b", "a", "c", "b", "a"], 4), [[0, 2, 5], [1, 4, 3]])
    test_eq(batch_by_image(["a"] * 5, 2), [[0, 1], [2, 3], [4]])
    test_eq(batch_by_image([(), (), ()], 2), [[0, 1], [2]])  # no image: nothing shared
    test_eq(batch_by_image([], 2), [])
    with expect_fail(ConfigError, contains="batch_size must be at least 1"):
        batch_by_image(["a"], 0)

def test_sample_is_fixed_and_nested():
    chosen = fixed_sample(9673, 1200)
    test_eq(chosen[:6], [15, 36, 44, 46, 74, 76])  # results of earlier runs rest on it
    assert len(set(chosen)) == 1200 and chosen == sorted(chosen)
    assert set(fixed_sample(9673, 400)) < set(chosen) != set(fixed_sample(9673, 1200, seed=1))
    assert fixed_sample(50) == list(range(50)) == fixed_sample(50, 99)
    test_close(2 * (0.9 * 0.1 / 1200) ** 0.5, 0.017, eps=0.001)  # "about two points"
    with expect_fail(ConfigError, contains="sample must be at least 1"):
        fixed_sample(9, 0)

def test_oracle_is_always_right():
    llama = golden_tokenizer("sentencepiece_like", "<s>", "</s>", "<unk>")
    for tokenizer, template in [(tok, "gemma"), (llama, "v1")]:
        for cached in (False, True):
            ds = LazySupervisedDataset(records, processor_of(tokenizer, template), folder, uint8=True)
            if cached: ds.cache_in_memory()
            for batch_size, indices in [(7, None), (64, None), (3, [19, 18, 2, 0])]:
                oracle = Oracle(ds)
                rows, skipped = predict(oracle, ds, batch_size, indices=indices)
                assert all(row["prediction"] == row["answer"] for row in rows) and not skipped
            names = ["text", "two", "two", *["talk-1dark.png"] * 3, "count-1dark.png"]
            test_eq([row["id"] for row in rows], names)
        oracle = Oracle(ds)
        rows, _ = predict(oracle, ds, batch_size=64)
        # the images of the record "two" are among them
        test_eq((len(rows), oracle.shown), (6 * 5 + 3, 6))

def test_predictions_do_not_depend_on_their_own_answers():
    def answered(text):
        "The predictions for records whose answers are all the same."

        def turn(t):
            return {**t, "value": text if t["from"] == "gpt" else t["value"]}

        def turns(r): return [turn(t) for t in r["conversations"]]

        changed = [{**r, "conversations": turns(r)} for r in records]
        changed = LazySupervisedDataset(changed, processor, folder, uint8=True)
        return predict(model, changed, max_new_tokens=4)[0]

    model = small_model(len(tok)).train()
    one, other = answered("yes"), answered("three dots")
    first = [[row["prediction"] for row in rows if not row["turn"]] for rows in (one, other)]
    later = [[row["prediction"] for row in rows if row["turn"]] for rows in (one, other)]
    assert first[0] == first[1] and later[0] != later[1] and len(set(first[0])) > 1 and model.training

def test_scores_by_type_and_baselines():
    ds = LazySupervisedDataset(records, processor, folder, uint8=True)
    metrics = ("exact", f"{folder}/my.py:score")
    result = evaluate(
        Oracle(ds), None, ds, metrics=metrics, train_data=ds, out=folder / "predictions.jsonl"
    )
    groups = ("all", "count", "yes_no")
    test_eq(
        result["metrics"], {"exact": dict.fromkeys(groups, 1.0), "score": dict.fromkeys(groups, 0.0)}
    )
    test_eq((result["n"], result["n_by_type"], result["skipped"]), (33, {"count": 6, "yes_no": 8}, []))
    majority, blind = [result["baselines"][name]["exact"] for name in ("majority", "question_only")]
    test_eq((blind, majority["yes_no"]), ({"all": 19 / 33, "count": 2 / 6, "yes_no": 5 / 8}, 0.5))
    written = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    test_eq((written, json.loads(json.dumps(result))), (result["predictions"], result))
    test_eq(
        written[0],
        {
            "id": "count-1dark.png",
            "index": 0,
            "image": "1dark.png",
            "type": "count",
            "turn": 0,
            "question": "how many dots?",
            "answer": "1",
            "prediction": "1",
            "scores": {"exact": 1.0, "score": 0.0},
        },
    )
    hinted = LazySupervisedDataset([{**records[0], "hint": "dots"}], processor, folder, uint8=True)
    result = evaluate(Oracle(hinted), None, hinted)
    test_eq(result["ignored"], {"hint": 1})
    test_eq(format_table(result).splitlines()[-1], "'hint' holds text in 1 records and is not read")
