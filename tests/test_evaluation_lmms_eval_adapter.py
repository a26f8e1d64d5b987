"Derived from nbs/13b_lmms_eval.ipynb by `make tests`; edit the notebook, not this file."
import os, warnings
import torch
from itertools import groupby
from vlm_lit.core import IMAGE_TOKEN, ConfigError
from vlm_lit.evaluation.generation import answer_batch
from vlm_lit.padding import supervised_positions
from vlm_lit.weights.pretrained import open_model
import sys, tempfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch
from fastcore.test import test_eq, expect_fail
from PIL import ImageFile
from vlm_lit.core import IGNORE_INDEX, DataError
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import sample_image
from vlm_lit.weights.saving import save_model
from small_parts import hushed, needs, tiny_model, workshop
from vlm_lit.evaluation.lmms_eval_adapter import VLMLit
from vlm_lit.evaluation.lmms_eval_adapter import cut_at
from vlm_lit.evaluation.lmms_eval_adapter import generation_settings
from vlm_lit.evaluation.lmms_eval_adapter import manifest

def setup_module():
    global CHOICES, CHOOSE, DOCS, FOLDER, GENERATE, PHOTOS, TASK, by_hand, model, opened, p, processor, request, run_task, tok, write_task
    sys.path[:0] = ["../tests", "tests"]
    FOLDER = Path(tempfile.mkdtemp())
    with workshop(), hushed():
        model, processor = tiny_model()
        for p in model.language_model.parameters():
            p.data *= 3  # answers that differ with the image
        save_model(model, FOLDER)
        processor.save_pretrained(FOLDER)
    processor.control_tokens, tok = "escape", processor.tokenizer
    PHOTOS = [sample_image(64, 48), sample_image(40, 70)]
    DOCS = [
        {"q": "what color is the shape?", "a": "blue", "images": PHOTOS[:1]},
        {"q": "blue?", "a": "a blue circle", "images": PHOTOS[1:]},
        {"q": "what is the color of the circle?", "a": "a", "images": []},
        {"q": "<image> or <image>?", "a": "blue", "images": PHOTOS},
    ]
    def request(*args, n=0):
        "A request of lmms-eval: `args` is text, settings or answer, images, number, task, split."
        return SimpleNamespace(args=(*args, lambda doc: doc["images"], n, "four", "test"))
    def opened(**settings):
        "The adapter, with the four questions as its task."
        adapter = VLMLit(FOLDER, device="cpu", **settings)
        adapter.task_dict = {"four": {"test": DOCS}}
        return adapter
    def by_hand(question, answer, images):
        "Log-likelihood of an answer and its stop token, and whether each is the likeliest."
        prompt, total, is_greedy = processor(question, images or None), 0.0, True
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        labels = processor([turns], [images or None])["labels"][0]
        for token in labels[labels != IGNORE_INDEX].tolist():
            with torch.no_grad(): logits = model(**prompt).logits[0, -1].double()
            total += float(logits.log_softmax(-1)[token])
            is_greedy = is_greedy and int(logits.argmax()) == token
            prompt["input_ids"] = torch.cat([prompt["input_ids"], torch.tensor([[token]])], 1)
            prompt["attention_mask"] = torch.ones_like(prompt["input_ids"]).bool()
        return total, is_greedy
    TASK = '''
task: four_questions
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/test.parquet}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.visual
doc_to_text: "{{{{q}}}}"
doc_to_target: "a"
{more}
'''
    GENERATE = '''
generation_kwargs: {max_new_tokens: 8, temperature: 0, until: ["never"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
'''
    CHOICES = ["blue", "a blue circle", "a"]
    CHOOSE = f'''
doc_to_choice: {CHOICES}
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
'''
    def write_task(folder, kind, more):
        "The four questions as a task of lmms-eval."
        from datasets import Dataset, Features, Image, Sequence, Value

        kinds = dict(q=Value("string"), a=Value("string"), images=Sequence(Image()))
        Dataset.from_list(DOCS, Features(kinds)).to_parquet(f"{folder}/test.parquet")
        Path(folder, "four.yaml").write_text(TASK.format(folder=folder, kind=kind, more=more))
        Path(folder, "utils.py").write_text("def visual(doc): return doc['images']")
    def run_task(kind, more):
        "What lmms-eval makes of the four questions: its scores, and the model's replies."
        from lmms_eval import evaluator
        from lmms_eval.models import MODEL_REGISTRY_V2
        from lmms_eval.tasks import TaskManager

        MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
        with tempfile.TemporaryDirectory() as folder:
            write_task(folder, kind, more)
            out = evaluator.simple_evaluate(
                model="vlm_lit",
                model_args=f"pretrained={FOLDER}",
                tasks=["four_questions"],
                task_manager=TaskManager(include_path=folder, include_defaults=False),
                batch_size=3,
                device="cpu",
                log_samples=True,
                bootstrap_iters=0,
                cli_args=Namespace(process_with_media=False, output_path=None),
            )
        samples = sorted(out["samples"]["four_questions"], key=lambda sample: sample["doc_id"])
        return out["results"]["four_questions"], [sample["filtered_resps"] for sample in samples]

def test_a_request_becomes_a_prompt():
    needs("lmms_eval")
    ids, limit = "samples[0]['input_ids']", {"max_new_tokens": 2}
    with Breakpoint(
        answer_batch, at="ids = generate_ids", watch=["questions", ids], tokenizer=tok
    ) as bp:
        opened().generate_until([request("<image>\n<image>blue?", limit, n=1)])
    text = "<bos><start_of_turn>user\n<image>\nblue?<end_of_turn>\n<start_of_turn>model\n"
    before, after = (tok(part, add_special_tokens=False).input_ids for part in text.split("<image>"))
    bp.expect({"questions": ["blue?"], ids: [*before, -200, *after]})

def test_a_tag_without_an_image_is_refused():
    needs("lmms_eval")
    sent, change = "<image>\n<image>blue?", {"text": "<image>\n<image>blue?"}
    with Breakpoint(VLMLit._question, at="return text", watch="text len(images)", set=change) as bp:
        with expect_fail(DataError, contains="2 <image> tag(s) for 1 image(s)"):
            opened().generate_until([request(sent, {}, n=1)])
    bp.expect_changed({"result[0]": ("blue?", sent)})

def test_without_stop_tokens_a_beginning_always_wins():
    needs("lmms_eval")
    stops = torch.tensor(tok.convert_tokens_to_ids(["<end_of_turn>", "Ċ", "<eos>"]))

    def without_stops(inputs):
        "The inputs without labels of stop tokens."
        labels = inputs["labels"]
        return {**inputs, "labels": labels.masked_fill(torch.isin(labels, stops), IGNORE_INDEX)}

    change = {"inputs": without_stops}
    with Breakpoint(VLMLit._score, at="out, places", watch="inputs['labels']", set=change) as bp:
        options = [request("blue?", answer, n=1) for answer in ("what", "what shape")]
        opened(batch_size=2).log_likelihoods(options)
    bp.expect_changed({"result[0][0] > result[1][0]": (False, True)})

def test_a_task_of_lmms_eval_from_end_to_end():
    needs("lmms_eval")
    # importing lmms-eval makes PIL take broken images; other tests want them refused
    own = patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    with hushed(), own: scores, replies = run_task("generate_until", GENERATE)
    print(f"exact match of {len(replies)} answers: {scores['exact_match,none']:.2f}")
    questions, images = [d["q"] for d in DOCS], [d["images"] for d in DOCS]
    wanted = [*answer_batch(model, processor, questions, images, max_new_tokens=8)]
    test_eq([reply for [reply] in replies], wanted)
    with hushed(): scores, replies = run_task("multiple_choice", CHOOSE)
    right = []
    for reply, doc in zip(replies, DOCS):
        wanted = [by_hand(doc["q"], answer, doc["images"])[0] for answer in CHOICES]
        assert max(abs(loss + value) for (loss, _), value in zip(reply, wanted)) < 2e-3
        right.append(CHOICES[wanted.index(max(wanted))] == doc["a"])
    test_eq(scores["acc,none"], sum(right) / 4)
    assert 0 < sum(right) < 4, right  # or the score would say little

def test_answers_are_those_of_answer_batch():
    needs("lmms_eval")
    adapter, limit = opened(batch_size=3), {"max_new_tokens": 8}
    wanted = [
        *answer_batch(model, processor, [d["q"] for d in DOCS], [d["images"] for d in DOCS], **limit)
    ]
    ask = lambda **settings: adapter.generate_until(
        [request(doc["q"], {**limit, **settings}, n=n) for n, doc in enumerate(DOCS)]
    )
    test_eq(ask(), wanted)
    test_eq(len({*wanted}), 4)
    test_eq(ask(temperature=0, top_p=0.9, do_sample=False), wanted)
    stop = wanted[0][3]
    test_eq(ask(until=[stop, "never"]), [text.split(stop)[0] for text in wanted])
    test_eq(ask(until=stop)[0], wanted[0][:3])
    beams = answer_batch(model, processor, DOCS[0]["q"], [DOCS[0]["images"]], num_beams=3, **limit)
    test_eq(ask(num_beams=3)[0], next(beams))
    assert ask(temperature=3.0) != wanted
    tagged = adapter.generate_until([request("<image>\n<image>blue?", limit, n=1)])
    test_eq(tagged, wanted[1:2])  # two tags for one image: it comes first
    mixed = [request(DOCS[n]["q"], {"max_new_tokens": 8 - n}, n=n) for n in (0, 1, 0)]
    shorter = next(answer_batch(model, processor, "blue?", [PHOTOS[1:]], max_new_tokens=7))
    test_eq(adapter.generate_until(mixed), [wanted[0], shorter, wanted[0]])

def test_settings_of_tasks():
    test_eq(generation_settings({}), ({"do_sample": False}, []))
    settings = {"temperature": 0.7, "top_p": None, "until": ["\n\n", ""]}
    test_eq(generation_settings(settings), ({"temperature": 0.7, "do_sample": True}, ["\n\n"]))
    test_eq(generation_settings({"do_sample": False, "temperature": 1.0})[0], {"do_sample": False})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        test_eq(generation_settings({"max_frames_num": 8, "num_beams": 2})[0]["num_beams"], 2)
    assert "not used: max_frames_num" in str(seen[0].message)
    test_eq(
        [cut_at("a b c", stops) for stops in ([], ["c", "b"], ["x"], ["a"])],
        ["a b c", "a ", "a b c", ""],
    )

def test_log_likelihoods_by_hand():
    needs("lmms_eval")
    for size in (1, 4):
        adapter = opened(batch_size=size)
        asked = [request(doc["q"], doc["a"], n=n) for n, doc in enumerate(DOCS)]
        found = adapter.log_likelihoods(asked)
        wanted = [by_hand(doc["q"], doc["a"], doc["images"]) for doc in DOCS]
        for (got, is_greedy), (want, own) in zip(found, wanted):
            assert abs(got - want) < 1e-3 * abs(want), (got, want)
            test_eq(is_greedy, own)
        [other] = adapter.log_likelihoods([request("blue?", lambda doc: " " + doc["a"], n=1)])
        assert abs(other[0] - found[1][0]) < 1e-3  # as a function, and with a delimiter
    test_eq([out.text for out in adapter.loglikelihood(asked)], [(-v, own) for v, own in found])

def test_greedy_is_what_the_model_would_write():
    needs("lmms_eval")
    inputs = processor("blue?", PHOTOS[1:])
    n, ids = inputs["input_ids"].shape[1], model.generate(**inputs, max_new_tokens=6, do_sample=False)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < n, IGNORE_INDEX)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    test_eq([is_greedy for _, is_greedy in opened()._score(whole)], [True])
    labels[0, -2] += 1
    test_eq([is_greedy for _, is_greedy in opened()._score(whole)], [False])

def test_what_the_adapter_refuses():
    needs("lmms_eval")
    adapter = opened()
    with expect_fail(ConfigError, contains="task four asks in several rounds"):
        adapter.generate_until_multi_round([request("q", {}, "round")])
    with expect_fail(ConfigError, contains="vlm_lit has no 'conv_template'"):
        VLMLit(FOLDER, device="cpu", conv_template="vicuna_v1")
    with expect_fail(ConfigError, contains="no model 'gone'"):
        VLMLit("gone", device="cpu")
    with patch.dict(VLMLit.__init__.__globals__, {"lmms": object}):
        with expect_fail(ConfigError, contains="pip install lmms-eval"):
            VLMLit(FOLDER)
