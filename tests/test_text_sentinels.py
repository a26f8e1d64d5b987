"Derived from nbs/04_sentinels.ipynb by `make tests`; edit the notebook, not this file."
import re, weakref
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
import numpy as np, torch
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import IMAGE_TOKEN, IMAGE_TOKEN_INDEX, IM_END_TOKEN, IM_START_TOKEN, ConfigError
from vlm_lit.core import DataError
from vlm_lit.text.messages import turn_parts
from vlm_lit.text.templates import Rendered
from vlm_lit.core import Segment
from vlm_lit.text.tokenizer import control_tokens
import copy, json, lzma
from itertools import groupby
from pathlib import Path
from tokenizers import AddedToken, Tokenizer
from fastcore.test import test_eq, expect_fail
from vlm_lit.core import peek
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.text.templates import get_template, render, user_parts
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.text.sentinels import added_space
from vlm_lit.text.sentinels import check_image_count
from vlm_lit.text.sentinels import drop_bos
from vlm_lit.text.sentinels import encode_prompts
from vlm_lit.text.sentinels import insert_separator
from vlm_lit.text.sentinels import make_traits
from vlm_lit.text.sentinels import num_tokens_with_images
from vlm_lit.text.sentinels import place_parts
from vlm_lit.text.sentinels import preprocess_multimodal
from vlm_lit.text.sentinels import tokenizer_image_token
from vlm_lit.text.sentinels import tokenizer_traits

def setup_module():
    global GOLDEN, ROLES, families, family, tok
    tok = load_tokenizer("gemma")
    GOLDEN = next(
        folder for folder in map(Path, ("tests/golden", "../tests/golden")) if folder.is_dir()
    )
    ROLES = {
        "sentencepiece_like": ("<s>", "</s>", "<unk>"),
        "llama3_bos": ("<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>"),
        "chatml_no_bos": (None, "<|im_end|>", "<|endoftext|>"),
    }
    def family(name, folder=GOLDEN):
        bos, eos, unk = ROLES[name]
        packed = (folder / f"{name}.tokenizer.json.xz").read_bytes()
        backend = Tokenizer.from_str(lzma.decompress(packed).decode())
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token=unk, pad_token=unk
        )
    families = {name: family(name) for name in ROLES}

def test_tag_moves_to_the_front_as_in_the_seed():
    human = {"from": "human", "value": "What is in the photo?\n<image>"}
    gpt = {"from": "gpt", "value": "the box chain purse black"}
    sources = [[human, gpt]]
    before = copy.deepcopy(sources)
    expected = [[{"from": "human", "value": "<image>\nWhat is in the photo?"}, gpt]]
    test_eq(preprocess_multimodal(sources), expected)
    test_eq(sources, before)  # the record is not edited

def test_several_tags_stay_and_answers_are_left_alone():
    def moved(text, who="human", **kw):
        return preprocess_multimodal([[{"from": who, "value": text}]], **kw)[0][0]["value"]

    for text in ["Look: <image> what?", "<image>", "no picture", "compare <image> with <image>"]:
        print(repr(text), "->", repr(moved(text)))
    test_eq(moved("Look: <image> what?"), "<image>\nLook:  what?")
    test_eq(moved("<image>"), "<image>")
    test_eq(moved("no picture"), "no picture")
    test_eq(moved("compare <image> with <image>"), "compare <image> with <image>")
    test_eq(moved("compare <image> with <image>", image_tags="mgm"), "<image>\ncompare  with")
    test_eq(moved("write <image> here", who="gpt"), "write <image> here")
    test_eq(moved("a\n<image>", mm_use_im_start_end=True), "<im_start><image><im_end>\na")
    test_eq(moved("a\n<image>", mmtag=True), "<Image><image></Image>\na")

def test_turns_in_parts_are_kept_for_the_tokenizers_own_template():
    given = {"from": "human", "value": "What?<image>", "parts": ["What?", "<image>"]}
    named, own = (preprocess_multimodal([[given]], keep_parts=keep)[0][0] for keep in (False, True))
    test_eq((named["value"], own), ("<image>\nWhat?", given))
    rewritten = {**given, "value": "What? <image>"}  # its parts no longer make up the text
    test_eq(preprocess_multimodal([[rewritten]], keep_parts=True)[0][0]["value"], "<image>\nWhat?")
    (turn,) = preprocess_multimodal([[given]], "mgm", keep_parts=True)[0]
    test_eq(turn["value"], "<image>\nWhat?")

def test_every_reference_row_of_preprocess_multimodal():
    lines = lzma.open(GOLDEN / "preprocess_multimodal.jsonl.xz", "rt", encoding="utf-8")
    rows = [json.loads(line) for line in lines]
    wrong = []
    for row in rows:
        for name in ("plain", "plain_imse", "mmtag", "mmtag_imse"):
            options = dict(mm_use_im_start_end="imse" in name, mmtag="mmtag" in name)
            (got,) = preprocess_multimodal([row["conversations"]], "mgm", **options)
            if [turn["value"] for turn in got] != row[name]:
                wrong.append((row["id"], name))
    print(len(rows), "conversations,", len(wrong), "differ")
    test_eq((len(rows), wrong), (180, []))

def test_later_chunks_lose_one_bos_and_gaps_get_a_sentinel():
    test_eq(drop_bos([2, 108, 1841], 2), [108, 1841])
    test_eq((drop_bos([108], 2), drop_bos([], 2)), ([108], []))
    test_eq((drop_bos([5, 6], None), drop_bos([2, 2, 7], 2)), ([5, 6], [2, 7]))
    test_eq(insert_separator([[2, 106], [108, 9], []], IMAGE_TOKEN_INDEX), [2, 106, -200, 108, 9, -200])
    test_eq(insert_separator([[2, 106]], IMAGE_TOKEN_INDEX), [2, 106])

def test_families_write_different_things_unasked():
    for name, other in families.items():
        traits = tokenizer_traits(other)
        tokens = other.convert_ids_to_tokens(other("Hi there").input_ids)
        print(f"{name:19}", tokens, traits.space, traits.n_bos)
    found = [(t.space, t.n_bos) for t in map(tokenizer_traits, (tok, *families.values()))]
    test_eq(found, [("never", 1), ("always", 1), ("never", 1), ("never", 0)])
    assert tokenizer_traits(tok) is tokenizer_traits(tok)
    from tokenizers.processors import TemplateProcessing

    endless = family("sentencepiece_like")
    eos = ("</s>", endless.eos_token_id)
    endless.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[eos]
    )
    with expect_fail(ConfigError, contains="writes ['</s>'] around every text"):
        make_traits(endless)

def test_chunks_and_ids_of_the_seed():
    prompt = (
        "<start_of_turn>user\n<image>\nWhat is in the photo?<end_of_turn>\n"
    "<start_of_turn>model\nthe box chain purse black<end_of_turn>\n<eos>"
    )
    with Breakpoint(
        tokenizer_image_token, at="input_ids = insert_separator", watch=["prompt_chunks"]
    ) as bp:
        input_ids = tokenizer_image_token(prompt, tok, return_tensors="pt")
    print(bp["prompt_chunks"])
    peek(input_ids=input_ids)
    before = [2, 106, 1645, 108]
    question = [108, 1841, 603, 575, 573, 2686, 235336, 107, 108]
    answer = [106, 2516, 108, 1175, 3741, 9488, 45189, 2656, 107, 108, 1]
    test_eq(bp["prompt_chunks"], [before, [2, *question, *answer]])
    test_eq(input_ids.tolist(), [*before, -200, *question, *answer])

def test_keeping_every_bos_shifts_the_rest():
    chunks = [tok("<start_of_turn>user\n").input_ids, tok("\nWhat").input_ids]
    naive = insert_separator(chunks, IMAGE_TOKEN_INDEX)
    right = tokenizer_image_token("<start_of_turn>user\n<image>\nWhat", tok)
    print(naive, right)
    test_eq(naive[4:6], [-200, 2])
    test_eq((right[4:6], len(naive)), ([-200, 108], len(right) + 1))
    assert right.count(tok.bos_token_id) == 1

def test_pictures_at_the_edges_and_side_by_side():
    for prompt, n in [("<image>a", 1), ("a<image>", 1), ("<image><image>", 2), ("a", 0), ("", 0)]:
        ids = tokenizer_image_token(prompt, tok)
        print(repr(prompt), ids)
        test_eq((ids.count(-200), ids.count(2), ids[0]), (n, 1, 2))

def test_fused_newline_is_split_at_the_start_of_the_answer():
    header, answer = "<start_of_turn>model\n", "\nA list:"
    prompt = Rendered(header + answer, ((header, Segment.HEADER), (answer, Segment.ANSWER)))
    with Breakpoint(place_parts, at="return begins", watch=["begins", "edges"]) as bp:
        out = encode_prompts([prompt], tok)
    print([hit["edges"] for hit in bp.hits], out.ids.tolist())
    test_eq(tok(prompt.text).input_ids[:4], [2, 106, 2516, 109])
    test_eq(out.ids.tolist(), tok(header).input_ids + tok(answer, add_special_tokens=False).input_ids)

def test_literal_stretch_never_becomes_a_control_token():
    marks = [(tok, "<end_of_turn>"), *((t, t.eos_token) for t in families.values())]
    for t, mark in marks:
        text = f"say {mark} twice: {mark}{mark}"
        spans = [(4, 4 + len(mark)), (12 + len(mark), 12 + 2 * len(mark))]
        ids = encode_prompts([Rendered(text, ((text, Segment.USER),))], t, [spans]).ids.tolist()
        print(t.convert_ids_to_tokens(ids)[:12])
        test_eq(ids.count(t.convert_tokens_to_ids(mark)), 1)  # only the third, which was not named
        test_eq(t.decode(ids[tokenizer_traits(t).n_bos :]), text)

def test_every_token_knows_its_segment():
    conv = get_template("gemma")
    conv.append_message("user", "<image>\nA list?")
    conv.append_message("model", "\n1. é")
    out = encode_prompts([render(conv)], tok)
    text_of = lambda i: tok.decode([i]) if i >= 0 else "<image>"
    tokens = zip(out.ids.tolist(), out.segments.tolist())
    named = [(Segment(s).name, text_of(i)) for i, s in tokens]
    test_eq([text for name, text in named if name == "ANSWER"], ["\n", "1", ".", " é"])
    test_eq([text for name, text in named if name == "STOP"], ["<end_of_turn>", "\n", "<eos>"])
    test_eq([text for name, text in named if name == "USER"], ["\n", "A", " list", "?"])
    test_eq([text for name, text in named if name == "IMAGE"], ["<image>"])
    test_eq(named[0], ("HEADER", "<bos>"))

def test_the_callers_tokenizer_keeps_its_settings():
    mine = family("llama3_bos")
    mine.backend_tokenizer.enable_padding(length=9)
    mine.backend_tokenizer.enable_truncation(max_length=5)
    backend = mine.backend_tokenizer
    backend.encode_special_tokens = True
    before = backend.padding, backend.truncation, backend.encode_special_tokens
    prompt = Rendered("What is it? Tell me!", (("What is it? Tell me!", Segment.USER),))
    test_eq(encode_prompts([prompt], mine).ids.tolist(), family("llama3_bos")(prompt.text).input_ids)
    print(backend.padding["length"], backend.truncation["max_length"], backend.encode_special_tokens)
    test_eq((backend.padding, backend.truncation, backend.encode_special_tokens), before)

def test_masks_agree_with_pieces_encoded_apart():
    nasty = ["plain", " a  b ", "\n\nx\n", "é e\u0301", "日本語😀", "\t\u200d\u00a0", "x" * 300]
    nasty += ["٣+٤", "###", "a</b>", "\r\n", "𝔘𝔫𝔦", "龘▁", "\ufb1d?", "\u1100\u1161\u11a8"]
    nasty += ["cafe\u0301", "▁▂▃"]

    def apart(prompt, t):
        "Ids and supervised positions of a prompt whose parts are encoded one by one."
        traits, before = tokenizer_traits(t), ""
        ids, supervised = [], []
        kind_of = lambda part: part[1] if part[1] >= Segment.IMAGE else Segment.USER
        for kind, own in groupby(prompt.parts, kind_of):
            text = "".join(part for part, _ in own)
            if kind == Segment.IMAGE: own, before = [IMAGE_TOKEN_INDEX], ""
            else:
                lead = traits.lead(before) if before else ""
                encoding = t.backend_tokenizer.encode(lead + text, add_special_tokens=False)
                skip = len(lead) and encoding.char_to_token(1)
                own, before = encoding.ids[skip:], before + text
            ids, supervised = ids + own, supervised + [kind >= Segment.ANSWER] * len(own)
        return [*traits.bos, *ids], [False] * traits.n_bos + supervised

    for name, t in {"gemma": tok, **families}.items():
        prompts = []
        for question in nasty:
            for reply in nasty:
                parts = (
                    ("USER: ", Segment.HEADER),
                    ("<image>", Segment.IMAGE),
                    (question, Segment.USER),
                    (" ASSISTANT:", Segment.HEADER),
                    (f" {reply}", Segment.ANSWER),
                    (t.eos_token, Segment.STOP),
                )
                prompts.append(Rendered("".join(text for text, _ in parts), parts))
        out = encode_prompts(prompts, t)
        ends, differ = out.lengths.cumsum(), []
        for end, length, prompt in zip(ends, out.lengths, prompts):
            ids = out.ids[end - length : end].tolist()
            supervised = (out.segments[end - length : end] >= Segment.ANSWER).tolist()
            if (ids, supervised) != apart(prompt, t): differ.append(prompt.text)
            stop = [i for i, marked in zip(ids, supervised) if marked]
            assert stop[-1] == t.eos_token_id and t.eos_token_id not in stop[:-1]
        print(f"{name:19}{len(prompts)} prompts, {len(differ)} differ")
        test_eq(differ, [])

def test_stop_text_that_fuses_with_an_answer_is_supervised():
    llama = family("llama3_bos")
    llama.add_tokens([AddedToken(".\n", normalized=False)])
    parts = (("<image>", Segment.IMAGE), ("a box.", Segment.ANSWER), ("\n", Segment.STOP))
    out = encode_prompts([Rendered("<image>a box.\n", parts)], llama)
    tokens = zip(out.ids.tolist(), out.segments)
    found = [(llama.decode([i]), Segment(s).name) for i, s in tokens if i >= 0]
    print(found)
    test_eq(found[-1], (".\n", "ANSWER"))

def test_tag_in_an_answer_gets_no_sentinel():
    conv = get_template("gemma")
    conv.append_message("user", "<image>\nHow?")
    conv.append_message("model", "Write <image>.")
    ids = encode_prompts([render(conv)], tok).ids.tolist()
    test_eq(ids.count(-200), 1)
    assert tok.decode([i for i in ids if i >= 0]).count("<image>") == 1

def test_tags_and_pictures_must_be_equally_many():
    source = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "an <image> tag"},
    ]
    check_image_count(source, 1)
    with expect_fail(DataError, contains="record 7: 1 <image> tag(s) for 2 image(s)"):
        check_image_count(source, 2, record=7)
    with expect_fail(DataError, contains="1 <image> tag(s) for 0"):
        check_image_count(source, 0)

def test_an_image_counts_as_all_its_tokens():
    ids = torch.tensor([2, IMAGE_TOKEN_INDEX, 108, IMAGE_TOKEN_INDEX, 5])
    print(len(ids), "->", num_tokens_with_images(ids, 576))
    assert num_tokens_with_images(ids, 576) == 3 + 2 * 576
    assert num_tokens_with_images(ids, 1) == 5

def test_empty_prompts_and_batches_are_no_trouble():
    for t in (tok, *families.values()):
        empty, some = Rendered("", ()), Rendered("a", (("a", Segment.ANSWER),))
        out = encode_prompts([empty, some, empty], t)
        n_bos = tokenizer_traits(t).n_bos
        test_eq(out.lengths.tolist(), [n_bos, n_bos + 1, n_bos])
        test_eq(out.segments.tolist().count(Segment.ANSWER), 1)
    test_eq(encode_prompts([], tok).ids.tolist(), [])
    with expect_fail(ConfigError, contains="return_tensors"):
        tokenizer_image_token("a", tok, return_tensors="np")
    with expect_fail(ConfigError, contains="image_tags"):
        preprocess_multimodal([], image_tags="all")

def test_spaces_are_added_first_or_always_or_never():
    from types import SimpleNamespace

    backend = lambda normalizer, pre: SimpleNamespace(normalizer=normalizer, pre_tokenizer=pre)
    cases = [
        ('Prepend(prepend="▁")', None, "always"),
        (None, 'Metaspace(replacement="▁", prepend_scheme=first, split=False)', "first"),
        (None, 'Metaspace(prepend_scheme="always")', "always"),
        (None, 'Metaspace(prepend_scheme="never")', "never"),
        (None, None, "never"),
    ]
    for normalizer, pre, expected in cases:
        test_eq(added_space(backend(normalizer, pre)), expected)

def test_one_prompt_alone_gives_the_ids_of_the_batch():
    texts = ["plain", " a  b ", "\n\nx\n", "é e\u0301", "日本語😀", "龘▁", "<image>", ""]
    texts = [f"{a}<image>{b}" for a in texts for b in texts] + texts
    for t in (tok, *families.values()):
        prompts = [Rendered(text, tuple(user_parts(text))) for text in texts]
        out = encode_prompts(prompts, t)
        ends = out.lengths.cumsum()
        batch = [out.ids[end - n : end].tolist() for end, n in zip(ends, out.lengths)]
        test_eq([tokenizer_image_token(text, t) for text in texts], batch)
