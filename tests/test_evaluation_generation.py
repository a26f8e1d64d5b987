"Derived from nbs/12_generation.ipynb by `make tests`; edit the notebook, not this file."
import copy, warnings
from pathlib import Path
from queue import Queue
from threading import Thread
from transformers import PreTrainedTokenizerFast
from transformers.generation import BaseStreamer
from vlm_lit.core import IMAGE_TOKEN, DataError
from vlm_lit.text.encode import bisect_failures, truncate_at_eos, pad_id, stop_ids
from vlm_lit.text.sentinels import num_tokens_with_images
from vlm_lit.processor import VLMProcessor, as_list, insert_image_tokens
from vlm_lit.data.collator import DataCollatorForSupervisedDataset
from vlm_lit.models.vlm import VLM
import sys
import json, tempfile
from fastcore.test import test_eq, expect_fail
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers import TextStreamer
from transformers.utils.logging import disable_progress_bar
from vlm_lit.core import IGNORE_INDEX, DataError
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import sample_image
from vlm_lit.models.config import VLMConfig
import torch
from vlm_lit.data.dataset import LazySupervisedDataset
from small_parts import three_tokenizers
from vlm_lit.evaluation.generation import Chat
from vlm_lit.evaluation.generation import answer_batch
from vlm_lit.evaluation.generation import check_prompt
from vlm_lit.evaluation.generation import generate_ids

def setup_module():
    global IMAGES, QUESTIONS, llama, model, new_ids, other, photo, plain_greedy, processor, qwen, small_model, tok
    sys.path[:0] = ["../tests", "tests"]
    disable_progress_bar()
    def small_model(tokenizer, family="llama", seed=0):
        "A small model with random weights, in evaluation mode."
        rows = max(tokenizer.get_vocab().values()) + 1  # a tokenizer that was cut down keeps its ids
        text = dict(
            model_type=family,
            vocab_size=rows,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=32,
            initializer_range=0.4,
            tie_word_embeddings=False,
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
        torch.manual_seed(seed)
        config = VLMConfig(text, vision, aux, image_size=32, image_size_aux=64, select_layer=-1)
        return VLM(config).eval()
    tok, llama, qwen = three_tokenizers()
    photo, other = sample_image(90, 60), sample_image(40, 70)
    model = small_model(tok, "gemma")
    processor = VLMProcessor.for_model(model.config, tok)
    processor.set_generation_config(model)
    QUESTIONS = ["what is it?", "which of them is the blue one, and why?", "hello", "what?"]
    IMAGES = [photo, [photo, other], None, other]
    def new_ids(model, inputs, **kwargs):
        "The ids after the prompt."
        return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]
    def plain_greedy(model, inputs, n, stops):
        "The most likely id, n times or up to a stop, the whole row computed anew each time."
        ids, images = inputs["input_ids"], {k: v for k, v in inputs.items() if "ima" in k or "pix" in k}
        written = []
        while len(written) < n and not (written and written[-1] in stops):
            with torch.no_grad():
                logits = model(input_ids=ids, **images, use_cache=False).logits
            written.append(logits[0, -1].argmax().item())
            ids = torch.cat([ids, torch.tensor([written[-1:]])], 1)
        return written

def test_the_prompt_is_a_prefix_of_the_training_sample():
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a box"}]
    [trained] = processor.samples([turns], [[photo]])
    watch = ["samples[0]['input_ids']", "stops"]
    with Breakpoint(generate_ids, at='settings = {"do_sample"', watch=watch) as bp:
        list(answer_batch(model, processor, ["what is it?"], [photo], max_new_tokens=3))
    n = len(bp[watch[0]])
    assert (trained["labels"][:n] == IGNORE_INDEX).all() and trained["labels"][n] != IGNORE_INDEX
    print(n, "of", len(trained["input_ids"]), "ids are the prompt")
    bp.expect({watch[0]: trained["input_ids"][:n]}, stops=stop_ids(tok))

def test_an_answer_ends_before_its_stop_token():
    samples = processor.samples(["what is it?"], [[photo]])
    third = generate_ids(model, samples, tok, max_new_tokens=6)[0][2]
    at = 'settings = {"do_sample"'
    with Breakpoint(generate_ids, at=at, watch="stops", set={"stops": [third]}) as bp:
        [short] = generate_ids(model, samples, tok, max_new_tokens=6)
    assert third not in short
    bp.expect_changed({"len(result[0])": (6, 2)})

def test_padding_on_the_right_changes_answers():
    questions = ["what?", "which of them is the blue one?"]
    alone = processor(questions[0], photo)
    with torch.no_grad():
        want = model(**alone).logits[0, -1]
        same = {}
        for side in ("left", "right"):
            padded = processor(questions, photo, padding_side=side)
            same[side] = torch.allclose(model(**padded).logits[0, -1], want, atol=1e-4)
    print("short question as if alone, by padding side:", same)
    test_eq(same, {"left": True, "right": False})
    with expect_fail(DataError, contains="prompts are padded on the right"):
        model.generate(**padded)

def test_processor_and_dataset_agree():
    folder = Path(tempfile.mkdtemp())
    photo.save(folder / "a.png")
    other.save(folder / "b.png")
    question = [
        {"from": "human", "value": "What is it?\n<image>"},
        {"from": "gpt", "value": "a box"},
        {"from": "human", "value": "and <image> <image>?"},
        {"from": "gpt", "value": "not"},
    ]
    record = {"id": "r", "image": ["a.png", "b.png", "a.png"], "conversations": question}
    for tokenizer, template, aspect in [
        (tok, "gemma", "pad"),
        (llama, "v1", "square"),
        (llama, "v1_mmtag", "square"),
        (qwen, "hf", "pad"),
    ]:
        sizes = dict(image_size=32, image_size_aux=64, num_image_tokens=3)
        own = VLMProcessor(tokenizer, template=template, aspect=aspect, **sizes)
        ds = LazySupervisedDataset([record], own, folder, uint8=True)
        paths = [folder / "a.png", folder / "b.png", folder / "a.png"]
        got = own(question, paths, as_bytes=True)
        [want] = own.expand([ds[0]])
        test_eq(got["input_ids"][0], want["input_ids"])
        test_eq(got["labels"][0], want["labels"])
        test_eq(got["pixel_values_aux"][got["image_index"]], ds[0]["image_aux"])
        asked = own(question[:3], [photo, other, photo])
        n = asked["input_ids"].shape[1]
        test_eq(asked["input_ids"][0].tolist(), want["input_ids"][:n].tolist())
        assert "labels" not in asked and want["labels"][n] != IGNORE_INDEX
        content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "\nWhat is it?"}]
        inside = own([{"role": "user", "content": content}, *question[1:2]], image_folder=folder)
        outside = own(question[:2], photo)
        test_eq(inside["input_ids"][0].tolist(), outside["input_ids"][0].tolist())

def test_model_and_processor_come_back_from_one_folder():
    for tokenizer, template in [(llama, "v1"), (qwen, "hf")]:
        folder = Path(tempfile.mkdtemp())
        saved = small_model(tokenizer)
        own = VLMProcessor.for_model(saved.config, tokenizer, template, aspect="pad")
        own.set_generation_config(saved)
        saved.save_pretrained(folder)
        own.save_pretrained(folder)
        assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}

        loaded = AutoModelForImageTextToText.from_pretrained(folder).eval()
        again = AutoProcessor.from_pretrained(folder)
        inputs = again(["what is it?", "and that?"], [photo, other], return_tensors="pt")
        texts = again.answers(loaded.generate(**inputs, max_new_tokens=20), inputs)

        test_eq((type(loaded).__name__, type(again).__name__), ("VLM", "VLMProcessor"))
        test_eq(type(AutoImageProcessor.from_pretrained(folder)).__name__, "VLMImageProcessor")
        test_eq(again.template, template)
        test_eq(again.image_processor.to_dict(), own.image_processor.to_dict())
        want = own(["what is it?", "and that?"], [photo, other])
        test_eq({k: v.tolist() for k, v in inputs.items()}, {k: v.tolist() for k, v in want.items()})
        test_eq(
            loaded.generate(**inputs, max_new_tokens=20).tolist(),
            saved.generate(**inputs, max_new_tokens=20).tolist(),
        )
        test_eq((loaded.generation_config.eos_token_id, len(texts)), (stop_ids(tokenizer, template), 2))
        json.loads((folder / "processor_config.json").read_text())

def test_greedy_batch_equals_a_plain_loop_and_each_alone():
    stops = stop_ids(tok)
    together = new_ids(model, processor(QUESTIONS, IMAGES), max_new_tokens=6)
    # all of other lengths
    assert len({len(processor(q, p)["input_ids"][0]) for q, p in zip(QUESTIONS, IMAGES)}) == 4
    for question, image, ids in zip(QUESTIONS, IMAGES, together.tolist()):
        inputs = processor(question, image)
        written = plain_greedy(model, inputs, 6, stops)
        test_eq(truncate_at_eos(ids, stops), truncate_at_eos(written, stops))
        alone = new_ids(model, inputs, max_new_tokens=6)[0]
        test_eq(truncate_at_eos(alone, stops), truncate_at_eos(written, stops))
    assert len({tuple(ids) for ids in together.tolist()}) == 4

def test_cache_changes_nothing():
    inputs = processor(QUESTIONS, IMAGES)
    test_eq(
        model.generate(**inputs, max_new_tokens=6, use_cache=True).tolist(),
        model.generate(**inputs, max_new_tokens=6, use_cache=False).tolist(),
    )

def test_beams_find_likelier_answers():
    def log_likelihood(inputs, ids):
        "Of the ids after the prompt, row by row."
        n, own = (
            inputs["input_ids"].shape[1],
            {k: v for k, v in inputs.items() if k != "attention_mask"},
        )
        own["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
        with torch.no_grad(): logits = model(**own).logits[:, n - 1 : -1]
        return logits.log_softmax(-1).gather(2, ids[..., None])[..., 0].sum(1)

    gains = []
    for question, image in zip(QUESTIONS, IMAGES):
        inputs, five = processor(question, image), dict(max_new_tokens=5, eos_token_id=None)
        greedy, beams = [new_ids(model, inputs, num_beams=n, **five) for n in (1, 4)]
        test_eq((greedy.shape, beams.shape), ((1, 5), (1, 5)))
        gains.append(float(log_likelihood(inputs, beams) - log_likelihood(inputs, greedy)))
    print("gain in log-likelihood:", [round(gain, 2) for gain in gains])
    assert min(gains) > -1e-4 and max(gains) > 0.01

def test_sampling_repeats_with_its_seed():
    inputs = processor(QUESTIONS, IMAGES)

    def drawn(seed):
        "Answers drawn with a seed."
        torch.manual_seed(seed)
        return model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=1.5).tolist()

    test_eq(drawn(1), drawn(1))
    assert drawn(1) != drawn(2)

def test_streamer_writes_what_is_returned():
    from contextlib import redirect_stdout
    from io import StringIO

    inputs, shown = processor("what is it?", photo), StringIO()
    streamer = TextStreamer(tok, skip_prompt=True, skip_special_tokens=True)
    with redirect_stdout(shown):
        ids = new_ids(model, inputs, max_new_tokens=8, streamer=streamer)
    print(repr(shown.getvalue().strip()))
    test_eq(shown.getvalue().strip(), tok.decode(ids[0], skip_special_tokens=True).strip())
    assert len(shown.getvalue()) > 3

def test_answers_come_in_order_and_in_batches():
    folder = Path(tempfile.mkdtemp())
    photo.save(folder / "a.png")
    other.save(folder / "b.png")
    paths = [folder / "a.png", folder / "b.png", folder / "a.png"]
    answers = answer_batch(model, processor, "what is it?", paths, batch_size=2, max_new_tokens=5)
    together = list(answers)
    print(together)
    alone = [processor("what is it?", path) for path in paths]
    want = [processor.answers(model.generate(**x, max_new_tokens=5), x)[0] for x in alone]
    test_eq(together, want)
    written = new_ids(model, processor(QUESTIONS, IMAGES), max_new_tokens=6)
    answers = answer_batch(model, processor, QUESTIONS, IMAGES, max_new_tokens=6)
    test_eq(list(answers), processor.answers(written))
    test_eq(len(list(answer_batch(model, processor, ["hello"], max_new_tokens=1))), 1)
    (folder / "b.png").write_bytes(b"no image")
    answers = answer_batch(model, processor, "what is it?", paths, batch_size=1, max_new_tokens=5)
    test_eq(next(answers), want[0])  # what was before it has been answered
    with expect_fail(DataError, contains="b.png': "): next(answers)
    with expect_fail(DataError, contains="record 2: an image must be"):
        list(answer_batch(model, processor, "?", [photo, photo, 7], 2))
    with expect_fail(DataError, contains="1 questions for 2 entries"):
        list(answer_batch(model, processor, ["?"], [photo] * 2))

def test_chat_remembers():
    chat = Chat(model, processor, max_new_tokens=5)
    first, second = chat("what is it?", photo), chat("and this?", other)
    talk = [
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": first},
        {"from": "human", "value": "<image>\nand this?"},
    ]
    test_eq(chat.turns, [*talk, {"from": "gpt", "value": second}])
    ids = new_ids(model, processor(talk, [photo, other]), max_new_tokens=5)
    test_eq([second], processor.answers(ids))
    before = list(chat.turns)
    with expect_fail(DataError, contains="spells the control token"):
        chat("x<eos>")
    test_eq(chat.turns, before)
    chat.clear()
    test_eq((chat.turns, chat("what is it?", photo)), ([], first))

def test_an_unreadable_image_takes_the_place_of_its_answer():
    folder = Path(tempfile.mkdtemp())
    photo.save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"no image")
    paths = [folder / name for name in ("a.png", "broken.png", "gone.png", "a.png")]
    for batch_size in (1, 2, 4):
        lenient = dict(batch_size=batch_size, max_new_tokens=3, strict=False)
        found = list(answer_batch(model, processor, "what is it?", paths, **lenient))
        test_eq([type(answer) for answer in found], [str, DataError, DataError, str])
        test_eq(found[0], found[3])
        for answer, path in zip(found[1:3], paths[1:3]):
            assert f"record '{path}': " in str(answer)
    with expect_fail(DataError, contains="spells the control token"):
        list(answer_batch(model, processor, "x<eos>", paths, strict=False))
    only_broken = answer_batch(model, processor, "what is it?", paths[1:3], strict=False)
    test_eq([type(answer) for answer in only_broken], [DataError] * 2)

def test_a_prompt_that_fills_the_model_is_refused():
    from unittest.mock import patch

    length = check_prompt(model, processor.samples(["what is it?"], [photo])[0])
    test_eq(length, processor("what is it?", photo)["input_ids"].shape[1])
    for most, is_refused, is_warned in [(length, True, False), (length + 1, False, True)]:
        with patch.object(model.config.text_config, "max_position_embeddings", most):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                try:
                    refused = not list(answer_batch(model, processor, "what is it?", [photo], 1, 2))
                except DataError as e:
                    refused = f"{length} tokens with its images" in str(e)
                try: refused &= not Chat(model, processor, 2)("what is it?", photo)
                except DataError as e: assert "positions; shorten it" in str(e)
            test_eq(refused, is_refused)
            test_eq(any("more than the model's" in str(w.message) for w in seen), is_warned)

def test_a_chat_goes_on_after_any_answer():
    class Says(Chat):
        "A chat whose model gives certain answers; keeps the samples."

        def __init__(self, *answers, **settings):
            super().__init__(model, VLMProcessor.for_model(model.config, tok, **settings))
            self.answers, self.samples = iter(answers), []

        def _generate(self, sample, streamer=None):
            self.samples.append(sample)
            ids = tok(next(self.answers), add_special_tokens=False, split_special_tokens=True).input_ids
            if streamer: streamer.queue.put(ids)
            return ids

    for said in ("", "see <image> there", "<eos>", "a<end_of_turn>", "🐋", " "):
        for ask in (Chat.__call__, lambda *own: "".join(Chat.stream(*own))):
            chat = Says(said, "a box", "fine")
            answers = [ask(chat, "one?", photo), ask(chat, "<image> two?", other), ask(chat, "three?")]
            assert answers[1:] == ["a box", "fine"], answers
            n_images = [int((s["input_ids"] < 0).sum()) for s in chat.samples]
            test_eq(n_images, [1, 2, 2])
            prompt = tok.decode([i for i in chat.samples[2]["input_ids"].tolist() if i >= 0])
            test_eq("one?" in prompt, bool(said.strip()))
            assert "two?" in prompt and answers[0] in prompt
            with expect_fail(DataError, contains="spells the control token '<eos>'"):
                ask(chat, "x<eos>")
            test_eq(len(chat.images), 2)

def test_streamed_answers_are_the_answers():
    from vlm_lit.evaluation import generation

    called, streamed = Chat(model, processor, 8), Chat(model, processor, 8)
    for question, image in [("what is it?", photo), ("really?", None), ("and this?", [other, photo])]:
        test_eq("".join(pieces := list(streamed.stream(question, image))), called(question, image))
        assert len(pieces) > 1
    test_eq((streamed.turns, streamed.images), (called.turns, called.images))
    before = list(streamed.turns)
    with expect_fail(DataError, contains="spells the control token"):
        list(streamed.stream("x<eos>"))
    broken_off = streamed.stream("go on")
    next(broken_off)
    broken_off.close()
    test_eq(streamed.turns, before)
    # transformers' own words
    with expect_fail(ValueError, contains="beam"):
        list(Chat(model, processor, num_beams=2).stream("hello"))
    # a stop token that is text is not shown
    newline = VLMProcessor(tok, template="plain", image_size=32, image_size_aux=64)
    letters = Queue()
    for ids in ([], *[[i] for i in tok("blue 🐋 one\nred").input_ids]):
        letters.put(ids)
    letters.put(None)
    pieces = list(generation._decoded(letters, newline))
    print(pieces)
    test_eq("".join(pieces), "blue 🐋 one")
