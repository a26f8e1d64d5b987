"Derived from nbs/14a_walk.ipynb by `make tests`; edit the notebook, not this file."
import copy
from contextlib import ExitStack
from dataclasses import dataclass
import torch
from vlm_lit.core import describe
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.text.tokenizer import adds_bos, prepare_tokenizer, special_tokens
from vlm_lit.text.chat_templates import render_hf
from vlm_lit.text.templates import render
from vlm_lit.text.sentinels import join_chunks, preprocess_multimodal
from vlm_lit.debug.label_view import LabelStrip
from vlm_lit.text.labels import fill_template, preprocess
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.text.messages import image_names
import sys, tempfile
from pathlib import Path
from fastcore.test import test_eq, expect_fail
from vlm_lit.core import DataError
from vlm_lit.images import sample_image
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.processor import VLMProcessor
from small_parts import three_tokenizers
from vlm_lit.walk import WALK
from vlm_lit.walk import walk_lines
from vlm_lit.walk import walk_record

def setup_module():
    global ds, folder, seed, tok
    sys.path[:0] = ["../tests", "tests"]
    tok = load_tokenizer("gemma")
    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder / "photo.png")
    seed = {
        "id": "seed",
        "image": "photo.png",
        "conversations": [
            {"from": "human", "value": "What is in the photo?\n<image>"},
            {"from": "gpt", "value": "the box chain purse black"},
        ],
    }
    ds = LazySupervisedDataset([seed], VLMProcessor(tok), folder)

def test_walk_passes_every_stop_once_and_changes_nothing():
    seen, item = walk_record(ds, 0)
    test_eq([len(bp.hits) for _, bp in seen], [1] * (len(WALK) - 1))  # all but the one for "hf"
    by_title = {stop.title: bp for stop, bp in seen}
    chunks = by_title["join_chunks: what was tokenized, each side by itself"]["prompt_chunks"]
    test_eq(chunks[0], [2, 106, 1645, 108])
    test_eq(by_title["preprocess: the empty conversation"]["conv"].messages, [])
    test_eq(len(by_title["preprocess: the conversation with its messages"]["conv"].messages), 2)
    plain = ds[0]
    assert all(torch.equal(plain[k], item[k]) for k in plain)  # stopped or not, the same item
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    text_only = LazySupervisedDataset([{"id": 1, "conversations": turns}], VLMProcessor(tok), folder)
    assert all(len(bp.hits) == 1 for _, bp in walk_record(text_only, 0)[0])
    qwen = three_tokenizers()[2]
    own_template = LazySupervisedDataset([seed], VLMProcessor(qwen, template="hf"), folder)
    seen, item = walk_record(own_template, 0)
    test_eq([len(bp.hits) for _, bp in seen], [1] * (len(WALK) - 4))

def test_walk_text_holds_the_values_of_the_seed():
    text = "\n".join(walk_lines(ds, 0))
    for words in [
        "pad: ('<pad>', 0)",
        "prepare_tokenizer('gemma'): nothing",
        "(3, 768, 768)",
        "'What is in the photo?\\n<image>'",
        "'<image>\\nWhat is in the photo?'",
        "messages=[], offset=0, sep_style=<SeparatorStyle.GEMMA: 7>",
        "{'human': 'user', 'gpt': 'model'}",
        "[[2, 106, 1645, 108], [2, 108, 1841,",
        "len(input_ids) = 25",
        "(3, 336, 336)",
        "8 of 25 tokens supervised",
    ]:
        assert words in text, words
    own_template = LazySupervisedDataset(
        [seed], VLMProcessor(three_tokenizers()[2], template="hf"), folder
    )
    text = "\n".join(walk_lines(own_template, 0))
    assert "<|im_start|>user" in text and "render_hf" in text

def test_walk_of_a_broken_record_raises_its_error():
    broken = LazySupervisedDataset([{**seed, "image": "gone.png"}], VLMProcessor(tok), folder)
    before = sys.gettrace()
    with expect_fail(DataError, contains="record 'seed': no image 'gone.png'"):
        walk_record(broken, 0)
    assert sys.gettrace() is before
