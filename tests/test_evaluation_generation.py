"Derived from nbs/12_generation.ipynb by `make tests`; edit the notebook, not this file."
from pathlib import Path
from queue import Queue
from threading import Thread
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.generation import BaseStreamer
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from vlm_lit.core import DataError
from vlm_lit.text.encode import truncate_at_eos, pad_id, stop_ids
from vlm_lit.image_processor import VLMImageProcessor
from vlm_lit.processor import VLMProcessor, as_list, insert_image_tokens
from vlm_lit.data.collator import DataCollatorForSupervisedDataset
from vlm_lit.models.vlm import VLM
from vlm_lit.models.config import VLMConfig
import sys
import json, tempfile
from fastcore.test import test_eq, expect_fail
from transformers import AutoModelForCausalLM, AutoProcessor, TextStreamer
from transformers.utils.logging import disable_progress_bar
from vlm_lit.core import IGNORE_INDEX, DataError
from vlm_lit.images import sample_image
from vlm_lit.models.vlm import VLM, pad_left
import torch
from vlm_lit.data.dataset import LazySupervisedDataset
from small_parts import three_tokenizers
from vlm_lit.evaluation.generation import Chat
from vlm_lit.evaluation.generation import answer_batch

def setup_module():
    global PICTURES, QUESTIONS, llama, model, other, photo, plain_greedy, processor, qwen, small_model, tok
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
    PICTURES = [photo, [photo, other], None, other]
    def plain_greedy(model, inputs, n, stops):
        "The most likely id, n times or up to a stop, the whole row computed anew each time."
        embeds, _ = model.prepare(**inputs)
        written = []
        while len(written) < n and not (written and written[-1] in stops):
            with torch.no_grad():
                logits = model.language_model(inputs_embeds=embeds, use_cache=False).logits
            written.append(logits[0, -1].argmax().item())
            embeds = torch.cat([embeds, model.embed(torch.tensor([written[-1:]]))], 1)
        return written

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
        own = VLMProcessor(
            tokenizer, template=template, image_size=32, image_size_aux=64, aspect=aspect
        )
        ds = LazySupervisedDataset([record], own, folder, uint8=True)
        got = own(question, [folder / "a.png", folder / "b.png", folder / "a.png"])
        test_eq(got["input_ids"][0], ds[0]["input_ids"])
        test_eq(got["labels"][0], ds[0]["labels"])
        test_eq(got["images_aux"][got["image_index"]], ds[0]["image_aux"])
        asked = own(question[:3], [photo, other, photo])
        n = asked["input_ids"].shape[1]
        test_eq(asked["input_ids"][0].tolist(), ds[0]["input_ids"][:n].tolist())
        assert "labels" not in asked and ds[0]["labels"][n] != IGNORE_INDEX
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
        print(sorted(p.name for p in folder.iterdir()))
        assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}

        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        again = AutoProcessor.from_pretrained(folder)
        inputs = again(["what is it?", "and that?"], [photo, other], return_tensors="pt")
        texts = again.batch_decode(loaded.generate(**inputs, max_new_tokens=20))

        test_eq((type(loaded).__name__, type(again).__name__), ("VLM", "VLMProcessor"))
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
    together = model.generate(**processor(QUESTIONS, PICTURES), max_new_tokens=6)
    # all of other lengths
    assert len({len(processor(q, p)["input_ids"][0]) for q, p in zip(QUESTIONS, PICTURES)}) == 4
    for question, picture, ids in zip(QUESTIONS, PICTURES, together.tolist()):
        inputs = processor(question, picture)
        written = plain_greedy(model, inputs, 6, stops)
        test_eq(truncate_at_eos(ids, stops), truncate_at_eos(written, stops))
        alone = model.generate(**inputs, max_new_tokens=6)[0]
        test_eq(truncate_at_eos(alone, stops), truncate_at_eos(written, stops))
    assert len({tuple(ids) for ids in together.tolist()}) == 4

def test_cache_changes_nothing():
    inputs = processor(QUESTIONS, PICTURES)
    test_eq(
        model.generate(**inputs, max_new_tokens=6, use_cache=True).tolist(),
        model.generate(**inputs, max_new_tokens=6, use_cache=False).tolist(),
    )

def test_beams_find_likelier_answers():
    def log_likelihood(inputs, ids):
        "Of the ids behind the prompt, row by row."
        embeds, plan = model.prepare(**inputs)
        both = torch.cat([embeds, model.embed(ids)], 1)
        with torch.no_grad():
            logits = model.language_model(inputs_embeds=both, use_cache=False).logits
        logits = logits[:, embeds.shape[1] - 1 : -1]
        return logits.log_softmax(-1).gather(2, ids[..., None])[..., 0].sum(1)

    gains = []
    for question, picture in zip(QUESTIONS, PICTURES):
        inputs = processor(question, picture)
        greedy, beams = [
            model.generate(**inputs, max_new_tokens=5, num_beams=n, eos_token_id=None) for n in (1, 4)
        ]
        test_eq((greedy.shape, beams.shape), ((1, 5), (1, 5)))
        gains.append(float(log_likelihood(inputs, beams) - log_likelihood(inputs, greedy)))
    print("gain in log-likelihood:", [round(gain, 2) for gain in gains])
    assert min(gains) > -1e-4 and max(gains) > 0.01

def test_sampling_repeats_with_its_seed():
    inputs = processor(QUESTIONS, PICTURES)

    def drawn(seed):
        "Answers drawn with a seed."
        torch.manual_seed(seed)
        return model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=1.5).tolist()

    test_eq(drawn(1), drawn(1))
    assert drawn(1) != drawn(2)

def test_streamer_writes_what_is_returned():
    from contextlib import redirect_stdout
    from io import StringIO

    inputs, heard = processor("what is it?", photo), StringIO()
    streamer = TextStreamer(tok, skip_special_tokens=True)
    with redirect_stdout(heard):
        ids = model.generate(**inputs, max_new_tokens=8, streamer=streamer)
    print(repr(heard.getvalue().strip()))
    test_eq(heard.getvalue().strip(), tok.decode(ids[0], skip_special_tokens=True).strip())
    assert len(heard.getvalue()) > 3

def test_answers_come_in_order_and_in_batches():
    folder = Path(tempfile.mkdtemp())
    photo.save(folder / "a.png")
    other.save(folder / "b.png")
    paths = [folder / "a.png", folder / "b.png", folder / "a.png"]
    answers = answer_batch(model, processor, "what is it?", paths, batch_size=2, max_new_tokens=5)
    together = list(answers)
    print(together)
    alone = [model.generate(**processor("what is it?", p), max_new_tokens=5)[0] for p in paths]
    want = [processor.decode(ids) for ids in alone]
    test_eq(together, want)
    written = model.generate(**processor(QUESTIONS, PICTURES), max_new_tokens=6)
    answers = answer_batch(model, processor, QUESTIONS, PICTURES, max_new_tokens=6)
    test_eq(list(answers), processor.batch_decode(written))
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
    ids = model.generate(**processor(talk, [photo, other]), max_new_tokens=5)[0]
    test_eq(second, processor.decode(ids))
    before = list(chat.turns)
    with expect_fail(DataError, contains="spells the control token"):
        chat("x<eos>")
    test_eq(chat.turns, before)
    chat.clear()
    test_eq((chat.turns, chat("what is it?", photo)), ([], first))

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

def test_padding_on_the_right_changes_answers():
    embeds, plan = model.prepare(**processor(["what?", "which of them is the blue one?"], photo))
    with torch.no_grad():
        right = model.language_model(inputs_embeds=embeds).logits[:, -1]
        left_embeds, mask = pad_left(embeds, plan.filled)
        places = (mask.long().cumsum(1) - 1).clamp(min=0)
        left = model.language_model(
            inputs_embeds=left_embeds, attention_mask=mask.long(), position_ids=places
        ).logits[:, -1]
        short = embeds[:1, : int(plan.filled[0].sum())]
        alone = model.language_model(inputs_embeds=short).logits[:, -1]
    same = [torch.allclose(padded[0], alone[0], atol=1e-4) for padded in (left, right)]
    print("short question, padded left, as if alone:", same[0], " padded right:", same[1])
    test_eq(same, [True, False])
