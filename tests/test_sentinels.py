"Derived from nbs/04_sentinels.ipynb by `make tests`; edit the notebook, not this file."
from dataclasses import dataclass
import torch
from vlm_lit.core import IMAGE_TOKEN, IMAGE_TOKEN_INDEX, IM_END_TOKEN, IM_START_TOKEN, DataError
from vlm_lit.templates import Rendered, find_all
import copy
from fastcore.test import test_eq, expect_fail
from vlm_lit.core import peek
from vlm_lit.breakpoints import Breakpoint
from vlm_lit.templates import get_template, render
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.sentinels import *

def setup_module():
    global tok
    tok = load_tokenizer("gemma")

def test_tag_moves_to_the_front_as_in_the_seed():
    sources = [[{"from": "human", "value": "What is in the photo?\n<image>"}, {"from": "gpt", "value": "the box chain purse black"}]]
    before = copy.deepcopy(sources)
    test_eq(preprocess_multimodal(sources), [[{"from": "human", "value": "<image>\nWhat is in the photo?"}, {"from": "gpt", "value": "the box chain purse black"}]])
    test_eq(sources, before)   # the record is not edited

def test_several_tags_stay_and_answers_are_left_alone():
    def moved(text, who="human", **kw): return preprocess_multimodal([[{"from": who, "value": text}]], **kw)[0][0]["value"]
    for text in ["Look: <image> what?", "<image>", "no picture", "compare <image> with <image>"]: print(repr(text), "->", repr(moved(text)))
    test_eq(moved("Look: <image> what?"), "<image>\nLook:  what?")
    test_eq(moved("<image>"), "<image>")
    test_eq(moved("no picture"), "no picture")
    test_eq(moved("compare <image> with <image>"), "compare <image> with <image>")
    test_eq(moved("compare <image> with <image>", image_tags="mgm"), "<image>\ncompare  with")
    test_eq(moved("write <image> here", who="gpt"), "write <image> here")
    test_eq(moved("a\n<image>", mm_use_im_start_end=True), "<im_start><image><im_end>\na")

def test_later_chunks_lose_one_bos_and_gaps_get_a_sentinel():
    test_eq(drop_bos([2, 108, 1841], 2), [108, 1841])
    test_eq((drop_bos([108], 2), drop_bos([], 2), drop_bos([5, 6], None), drop_bos([2, 2, 7], 2)), ([108], [], [5, 6], [2, 7]))
    test_eq(insert_separator([[2, 106], [108, 9], []], IMAGE_TOKEN_INDEX), [2, 106, -200, 108, 9, -200])
    test_eq(insert_separator([[2, 106]], IMAGE_TOKEN_INDEX), [2, 106])

def test_token_starts_are_places_in_the_whole_prompt():
    text = "<start_of_turn>user\n<image>\nHi"
    test_eq(cut_spans(text, [(20, 27)]), [(0, 20), (27, 30)])
    first, second = encode_spans([(text, 0, 20), (text, 27, 30)], tok)
    test_eq(first.ids, [2, 106, 1645, 108])
    test_eq((second.ids, second.starts, second.ends), ([2, 108, 2151], [27, 27, 28], [27, 28, 30]))
    assert all(text[a:b] == piece for a,b,piece in zip(second.starts[1:], second.ends[1:], ["\n", "Hi"]))

def test_fused_newline_is_split_at_the_start_of_the_answer():
    text = "<start_of_turn>model\n\nA list:"
    fused, = encode_spans([(text, 0, len(text))], tok)
    apart = encode_pieces(text, [0, *straddled(fused, [21]), len(text)], tok)
    print(fused.ids, apart.ids)
    test_eq((fused.ids[:4], straddled(fused, [0, 20, 21, 22])), ([2, 106, 2516, 109], [21]))
    test_eq(apart.ids, tok("<start_of_turn>model\n").input_ids + tok("\nA list:", add_special_tokens=False).input_ids)
    assert 21 in apart.starts and apart.ids.count(2) == 1

def test_literal_stretch_never_becomes_a_control_token():
    text = "say <end_of_turn> twice: <end_of_turn><end_of_turn>"
    literals = find_all(text, "<end_of_turn>")[:2]
    plain = encode_pieces(text, [0, len(text), *literals[0], *literals[1]], tok, literals)
    print(tok.convert_ids_to_tokens(plain.ids))
    test_eq(plain.ids.count(107), 1)                    # only the third, which was not named
    test_eq(tok.decode(plain.ids[1:]), text)
    test_eq(plain.starts[1:], sorted(plain.starts[1:]))

def test_chunks_and_ids_of_the_seed():
    prompt = ("<start_of_turn>user\n<image>\nWhat is in the photo?<end_of_turn>\n"
          "<start_of_turn>model\nthe box chain purse black<end_of_turn>\n<eos>")
    with Breakpoint(tokenizer_image_token, at="input_ids = insert_separator", watch=["prompt_chunks"]) as bp:
        input_ids = tokenizer_image_token(prompt, tok, return_tensors="pt")
    print(bp["prompt_chunks"])
    peek(input_ids=input_ids)
    test_eq(bp["prompt_chunks"], [[2, 106, 1645, 108],
        [2, 108, 1841, 603, 575, 573, 2686, 235336, 107, 108, 106, 2516, 108, 1175, 3741, 9488, 45189, 2656, 107, 108, 1]])
    test_eq(input_ids.tolist(), [2, 106, 1645, 108, -200, 108, 1841, 603, 575, 573, 2686, 235336, 107, 108, 106, 2516, 108,
        1175, 3741, 9488, 45189, 2656, 107, 108, 1])

def test_keeping_every_bos_shifts_the_rest():
    naive = insert_separator([tok("<start_of_turn>user\n").input_ids, tok("\nWhat").input_ids], IMAGE_TOKEN_INDEX)
    right = tokenizer_image_token("<start_of_turn>user\n<image>\nWhat", tok)
    print(naive, right)
    test_eq(naive[4:6], [-200, 2])
    test_eq((right[4:6], len(naive)), ([-200, 108], len(right) + 1))
    assert right.count(tok.bos_token_id) == 1

def test_pictures_at_the_edges_and_side_by_side():
    for prompt,n in [("<image>a", 1), ("a<image>", 1), ("<image><image>", 2), ("a", 0), ("", 0)]:
        ids = tokenizer_image_token(prompt, tok)
        print(repr(prompt), ids)
        test_eq((ids.count(-200), ids.count(2), ids[0]), (n, 1, 2))

def test_tag_in_an_answer_gets_no_sentinel():
    conv = get_template("gemma")
    conv.append_message("user", "<image>\nHow?")
    conv.append_message("model", "Write <image>.")
    chunks, = encode_prompts([render(conv)], tok)
    ids = tokenizer_image_token(chunks, tok)
    test_eq((len(chunks), ids.count(-200)), (2, 1))
    assert tok.decode([i for i in ids if i >= 0]).count("<image>") == 1

def test_every_fused_newline_of_a_long_conversation_is_split():
    conv = get_template("gemma")
    for role,text in [("user", "a"), ("model", "\n\nb"), ("user", "\n"), ("model", "\nc")]: conv.append_message(role, text)
    prompt = render(conv)
    chunk, = encode_prompts([prompt], tok)[0]
    assert all(start in chunk.starts for start,_ in prompt.answers) and chunk.ids.count(2) == 1
    test_eq(tok.decode(chunk.ids[1:]), prompt.text)

def test_batched_and_single_calls_agree():
    texts = ["<image>\na\n\n<image> b", "no picture é😀", "", "<start_of_turn>user\n<image>"]
    test_eq([tokenizer_image_token(c, tok) for c in encode_prompts(texts, tok)], [tokenizer_image_token(t, tok) for t in texts])
    with expect_fail(ValueError, contains="return_tensors"): tokenizer_image_token("a", tok, return_tensors="np")
    with expect_fail(ValueError, contains="image_tags"): preprocess_multimodal([], image_tags="all")

def test_tags_and_pictures_must_be_equally_many():
    source = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "an <image> tag"}]
    check_image_count(source, 1)
    with expect_fail(DataError, contains="record 7: 1 <image> tag(s) for 2 image(s)"): check_image_count(source, 2, record=7)
    with expect_fail(DataError, contains="1 <image> tag(s) for 0"): check_image_count(source, 0)
