"Derived from nbs/04_sentinels.ipynb by `make tests`; edit the notebook, not this file."
import re, weakref
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import NamedTuple
import numpy as np, torch
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import IMAGE_TOKEN, IMAGE_TOKEN_INDEX, IM_END_TOKEN, IM_START_TOKEN, ConfigError
from vlm_lit.core import DataError
from vlm_lit.text.messages import turn_parts
from vlm_lit.text.templates import Rendered
from vlm_lit.core import Segment
from vlm_lit.text.tokenizer import control_tokens
import copy, json, lzma, sys
from itertools import groupby
from types import SimpleNamespace
from fastcore.test import expect_fail, test_eq
from tokenizers import AddedToken, normalizers
from tokenizers.processors import TemplateProcessing
from vlm_lit.core import peek
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.debug.values import token_text
from vlm_lit.text.templates import get_template, render, user_parts
from vlm_lit.text.tokenizer import load_tokenizer
from small_parts import GOLDEN, golden_tokenizer, rare_tokenizers
from vlm_lit.text.sentinels import added_space
from vlm_lit.text.sentinels import check_image_count
from vlm_lit.text.sentinels import chunk_pieces
from vlm_lit.text.sentinels import encode_prompts
from vlm_lit.text.sentinels import insert_separator
from vlm_lit.text.sentinels import make_traits
from vlm_lit.text.sentinels import move_tag
from vlm_lit.text.sentinels import num_tokens_with_images
from vlm_lit.text.sentinels import place_parts
from vlm_lit.text.sentinels import preprocess_multimodal
from vlm_lit.text.sentinels import tokenizer_image_token
from vlm_lit.text.sentinels import tokenizer_traits

def setup_module():
    global ROLES, answer, conv, families, family, fused, header, prompt, seed, tok
    sys.path[:0] = ["../tests", "tests"]
    tok = load_tokenizer("gemma")
    ROLES = {
        "sentencepiece_like": ("<s>", "</s>", "<unk>"),
        "llama3_bos": ("<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>"),
        "chatml_no_bos": (None, "<|im_end|>", "<|endoftext|>"),
    }
    family = lambda name: golden_tokenizer(name, *ROLES[name])
    families = {name: family(name) for name in ROLES}
    prompt = (
        "<start_of_turn>user\n<image>\nWhat is in the photo?<end_of_turn>\n"
    "<start_of_turn>model\nthe box chain purse black<end_of_turn>\n<eos>"
    )
    conv = get_template("gemma")
    conv.append_message("user", "<image>\nWhat is in the photo?")
    conv.append_message("model", "the box chain purse black")
    seed = render(conv)
    header, answer = "<start_of_turn>model\n", "\nA list:"
    fused = Rendered(header + answer, ((header, Segment.HEADER), (answer, Segment.ANSWER)))

def test_tag_moves_to_the_front_as_in_the_seed():
    human = {"from": "human", "value": "What is in the photo?\n<image>"}
    gpt = {"from": "gpt", "value": "the box chain purse black"}
    watch = "sources[0][0]['value'] moved[0][0]['value'] len(moved[0])"
    with Breakpoint(preprocess_multimodal, at="return moved", watch=watch.split()) as bp:
        moved = preprocess_multimodal([[human, gpt]])
    bp.expect(
        {
            "sources[0][0]['value']": "What is in the photo?\n<image>",
            "moved[0][0]['value']": "<image>\nWhat is in the photo?",
        }
    )
    bp.expect_return({"result[0][1]": gpt})

def test_mgms_rule_loses_the_second_of_two_tags():
    human = {"from": "human", "value": "compare <image> with <image>"}
    with Breakpoint(move_tag, at='if IMAGE_TOKEN not in', set={"image_tags": "mgm"}) as bp:
        preprocess_multimodal([[human]])
    bp.expect_changed(
        {"result.count('<image>')": (2, 1)},
        result=("compare <image> with <image>", "<image>\ncompare  with"),
    )

def test_every_reference_row_of_preprocess_multimodal():
    lines = lzma.open(GOLDEN / "preprocess_multimodal.jsonl.xz", "rt", encoding="utf-8")
    rows, same = [json.loads(line) for line in lines], 0
    for row in rows:
        for name in ("plain", "plain_imse", "mmtag", "mmtag_imse"):
            options = dict(mm_use_im_start_end="imse" in name, mmtag="mmtag" in name)
            (got,) = preprocess_multimodal([row["conversations"]], "mgm", **options)
            same += [turn["value"] for turn in got] == row[name]
    print(f"{len(rows)} conversations, {same} of {4 * len(rows)} results are MGM's")
    test_eq((len(rows), same), (180, 720))

def test_families_add_different_things():
    with Breakpoint(make_traits, at="return TokenizerTraits", watch="empty added_space(backend)") as bp:
        for t in (tok, *families.values()): make_traits(t)
    bp.expect_each(
        {
            "len(empty)": [1, 1, 1, 0],
            "added_space(backend)": ["never", "always", "never", "never"],
        }
    )

def test_chunks_and_ids_of_the_seed():
    watch = "prompt_chunks input_ids len(input_ids)"
    with Breakpoint(tokenizer_image_token, at="return input_ids", watch=watch) as bp:
        tokenizer_image_token(prompt, tok)
    before = [2, 106, 1645, 108]
    after = [108, 1841, 603, 575, 573, 2686, 235336, 107, 108]
    after += [106, 2516, 108, 1175, 3741, 9488, 45189, 2656, 107, 108, 1]
    bp.expect({"len(input_ids)": 25}, prompt_chunks=[before, [2, *after]])
    bp.expect(input_ids=[*before, -200, *after])

def test_a_bos_that_is_kept_stands_after_the_image():
    with Breakpoint(
        tokenizer_image_token, at="chunks = [prompt", watch="prompt_chunks", set={"offset": 0}
    ) as bp:
        tokenizer_image_token(prompt, tok)
    bp.expect_changed(
        {"len(result)": (25, 26), "result.count(2)": (1, 2), "result[4:6]": ([-200, 108], [-200, 2])}
    )

def test_mgms_rule_loses_a_token_where_the_template_writes_bos():
    chatml = golden_tokenizer("chatml_no_bos", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    with Breakpoint(
        tokenizer_image_token, at="chunks = [prompt", watch="offset", set={"offset": 1}
    ) as bp:
        tokenizer_image_token("<|im_start|>user\n<image>What is it?", chatml)
    assert bp["prompt_chunks"][0][0] == chatml.bos_token_id
    bp.expect_changed({"len(result)": (8, 7), "result[4]": (3838, 374)})

def test_images_at_the_edges_and_side_by_side():
    for text, n in [("<image>a", 1), ("a<image>", 1), ("<image><image>", 2), ("a", 0), ("", 0)]:
        ids = tokenizer_image_token(text, tok)
        print(f"{text!r:17} {ids}")
        test_eq((ids.count(-200), ids.count(2), ids[0]), (n, 1, 2))

def test_pieces_know_where_the_parts_of_the_prompt_begin():
    with Breakpoint(chunk_pieces, at="return [*pieces", watch="pieces[0].text start parts") as bp:
        chunk_pieces(seed, n=0)
    begins = seed.text.index("\nWhat")
    bp.expect({"pieces[0].text": "<start_of_turn>user\n"}, start=begins)
    bp.expect(parts=[(0, Segment.USER), (22, Segment.HEADER), (57, Segment.ANSWER), (82, Segment.STOP)])

def test_fused_newline_is_split_at_the_start_of_the_answer():
    with Breakpoint(place_parts, at="return begins", watch="encoding.ids edges") as bp:
        out = encode_prompts([fused], tok)
    test_eq(out.ids.tolist(), tok(header).input_ids + tok(answer, add_special_tokens=False).input_ids)
    bp.expect_each(edges=[[21], [], []]).expect({"encoding.ids[:4]": [2, 106, 2516, 109]})

def test_without_the_edge_the_newline_of_the_answer_is_lost():
    with Breakpoint(place_parts, at="return begins", watch="edges", set={"edges": []}) as bp:
        wrong = encode_prompts([fused], tok)
    right = encode_prompts([fused], tok)
    text_of = lambda ids: [token_text(tok, i) for i in ids.tolist()]
    test_eq(text_of(wrong.ids[wrong.segments == Segment.ANSWER]), ["A", "▁list", ":"])
    test_eq(text_of(right.ids[right.segments == Segment.ANSWER]), ["⏎", "A", "▁list", ":"])
    bp.expect_changed({"result[1]": ([21], [])})

def test_every_token_has_its_segment():
    conv = get_template("gemma")
    conv.append_message("user", "<image>\nA list?")
    conv.append_message("model", "\n1. é")
    with Breakpoint(encode_prompts, at="return Encoded", watch="rows[0] kinds[0]") as bp:
        encode_prompts([render(conv)], tok)
    runs = [
        (s.name, [token_text(tok, i) for i, _ in run])
        for s, run in groupby(zip(bp["rows[0]"], bp["kinds[0]"]), lambda pair: pair[1])
    ]
    for name, texts in runs: print(f"{name:7}", *texts)
    test_eq(
        runs[3:],
        [
            ("HEADER", ["<end_of_turn>", "⏎", "<start_of_turn>", "model", "⏎"]),
            ("ANSWER", ["⏎", "1", ".", "▁é"]),
            ("STOP", ["<end_of_turn>", "⏎", "<eos>"]),
        ],
    )
    bp.expect({"len(rows[0])": 21, "rows[0].count(-200)": 1})

def test_a_words_own_space_does_not_change_its_segment():
    parts = (("USER: ", Segment.HEADER), ("What is it?", Segment.USER))
    parts += ((" ASSISTANT: ", Segment.HEADER), ("a box", Segment.ANSWER))
    spaced = Rendered("".join(text for text, _ in parts), parts)
    t = families["sentencepiece_like"]
    with Breakpoint(place_parts, at="return begins", watch="encoding.tokens edges") as bp:
        out = encode_prompts([spaced], t)
    found = list(zip(t.convert_ids_to_tokens(out.ids), map(Segment, out.segments)))
    test_eq([token for token, s in found if s == Segment.USER][0], "▁What")
    test_eq([token for token, s in found if s == Segment.ANSWER], ["a", "▁box"])
    bp.expect_each(edges=[[29], [], []])

def test_stop_text_that_fuses_with_an_answer_is_supervised():
    llama = family("llama3_bos")
    llama.add_tokens([AddedToken(".\n", normalized=False)])
    parts = (("<image>", Segment.IMAGE), ("a box.", Segment.ANSWER), ("\n", Segment.STOP))
    with Breakpoint(
        encode_prompts, at="return Encoded", watch=["rows[0]", "[s.name for s in kinds[0]]"]
    ) as bp:
        encode_prompts([Rendered("<image>a box.\n", parts)], llama)
    test_eq(llama.decode(bp["rows[0]"][-1:]), ".\n")
    bp.expect({"[s.name for s in kinds[0]]": ["HEADER", "IMAGE"] + ["ANSWER"] * 3})

def test_tags_and_images_must_be_equally_many():
    source = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "an <image> tag"},
    ]
    with Breakpoint(check_image_count, at="if n_tags != n_images", watch="n_tags n_images") as bp:
        with expect_fail(DataError, contains="record 7: 1 <image> tag(s) for 2 image(s)"):
            check_image_count(source, 2, record=7)
    bp.expect(n_tags=1, n_images=2)

def test_an_image_counts_as_all_its_tokens():
    ids = torch.tensor([2, IMAGE_TOKEN_INDEX, 108, IMAGE_TOKEN_INDEX, 5])
    with Breakpoint(num_tokens_with_images, at="return len", watch="len(input_ids) n_images") as bp:
        num_tokens_with_images(ids, 576)
    test_eq(num_tokens_with_images(ids, 1), 5)
    bp.expect({"len(input_ids)": 5}, n_images=2).expect_return(result=3 + 2 * 576)

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

def test_several_tags_stay_and_answers_are_left_alone():
    def moved(text, who="human", **kw):
        return preprocess_multimodal([[{"from": who, "value": text}]], **kw)[0][0]["value"]

    test_eq(moved("Look: <image> what?"), "<image>\nLook:  what?")
    test_eq(moved("<image>"), "<image>")
    test_eq(moved("no image"), "no image")
    test_eq(moved("compare <image> with <image>"), "compare <image> with <image>")
    test_eq(moved("compare <image> with <image>", image_tags="mgm"), "<image>\ncompare  with")
    test_eq(moved("write <image> here", who="gpt"), "write <image> here")
    test_eq(moved("a\n<image>", mm_use_im_start_end=True), "<im_start><image><im_end>\na")
    test_eq(moved("a\n<image>", mmtag=True), "<Image><image></Image>\na")

def test_the_record_is_not_edited():
    human = {"from": "human", "value": "What is in the photo?\n<image>"}
    gpt = {"from": "gpt", "value": "the box chain purse black"}
    sources = [[human, gpt]]
    before = copy.deepcopy(sources)
    expected = [[{"from": "human", "value": "<image>\nWhat is in the photo?"}, gpt]]
    test_eq(preprocess_multimodal(sources), expected)
    test_eq(sources, before)  # the record is not edited

def test_turns_in_parts_are_kept_for_the_tokenizers_own_template():
    given = {"from": "human", "value": "What?<image>", "parts": ["What?", "<image>"]}
    named, own = (preprocess_multimodal([[given]], keep_parts=keep)[0][0] for keep in (False, True))
    test_eq((named["value"], own), ("<image>\nWhat?", given))
    rewritten = {**given, "value": "What? <image>"}  # its parts no longer make up the text
    test_eq(preprocess_multimodal([[rewritten]], keep_parts=True)[0][0]["value"], "<image>\nWhat?")
    (turn,) = preprocess_multimodal([[given]], "mgm", keep_parts=True)[0]
    test_eq(turn["value"], "<image>\nWhat?")

def test_traits_are_kept_and_an_end_token_is_refused():
    found = [(t.space, t.n_bos) for t in map(tokenizer_traits, (tok, *families.values()))]
    test_eq(found, [("never", 1), ("always", 1), ("never", 1), ("never", 0)])
    assert tokenizer_traits(tok) is tokenizer_traits(tok)
    endless = family("sentencepiece_like")
    eos = ("</s>", endless.eos_token_id)
    endless.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[eos]
    )
    with expect_fail(ConfigError, contains="writes ['</s>'] around every text"):
        make_traits(endless)

def test_each_two_chunks_get_a_separator():
    test_eq(insert_separator([[2, 106], [108, 9], []], IMAGE_TOKEN_INDEX), [2, 106, -200, 108, 9, -200])
    test_eq(insert_separator([[2, 106]], IMAGE_TOKEN_INDEX), [2, 106])

def test_literal_stretch_never_becomes_a_control_token():
    marks = [(tok, "<end_of_turn>"), *((t, t.eos_token) for t in families.values())]
    for t, mark in marks:
        text = f"say {mark} twice: {mark}{mark}"
        spans = [(4, 4 + len(mark)), (12 + len(mark), 12 + 2 * len(mark))]
        ids = encode_prompts([Rendered(text, ((text, Segment.USER),))], t, [spans]).ids.tolist()
        print(t.convert_ids_to_tokens(ids)[:12])
        test_eq(ids.count(t.convert_tokens_to_ids(mark)), 1)  # only the third, which was not named
        test_eq(t.decode(ids[tokenizer_traits(t).n_bos :]), text)

def test_control_token_that_is_an_ordinary_piece_is_spelled_by_letters():
    for name, rare in rare_tokenizers().items():
        mark, text = rare.eos_token, f"say {rare.eos_token} twice"
        parts = Rendered(text, ((text, Segment.USER),))
        acts, plain = (encode_prompts([parts], rare, own).ids for own in (None, [[(4, 4 + len(mark))]]))
        print(f"{name:20}{rare.convert_ids_to_tokens(plain)}")
        assert rare.eos_token_id in acts and rare.eos_token_id not in plain
    message = "this tokenizer adds a space to texts"
    deaf = rare_tokenizers()["unigram"]
    deaf.backend_tokenizer.normalizer = normalizers.Replace("\0", "")
    with expect_fail(ConfigError, contains=message): make_traits(deaf)

def test_the_callers_tokenizer_keeps_its_settings():
    mine = family("llama3_bos")
    mine.backend_tokenizer.enable_padding(length=9)
    mine.backend_tokenizer.enable_truncation(max_length=5)
    backend = mine.backend_tokenizer
    backend.encode_special_tokens = True
    before = backend.padding, backend.truncation, backend.encode_special_tokens
    prompt = Rendered("What is it? Tell me!", (("What is it? Tell me!", Segment.USER),))
    test_eq(encode_prompts([prompt], mine).ids.tolist(), family("llama3_bos")(prompt.text).input_ids)
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

    for name, t in {"gemma": tok, **families, **rare_tokenizers()}.items():
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

def test_tags_of_user_turns_are_counted_for_any_number_of_images():
    source = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "an <image> tag"},
    ]
    check_image_count(source, 1)
    with expect_fail(DataError, contains="1 <image> tag(s) for 0"):
        check_image_count(source, 0)
    system = {"from": "system", "value": "What is <image>?"}
    check_image_count([system, *source], 1)
    test_eq(preprocess_multimodal([[system]])[0], [system])

def test_tag_in_an_answer_gets_no_sentinel():
    conv = get_template("gemma")
    conv.append_message("user", "<image>\nHow?")
    conv.append_message("model", "Write <image>.")
    ids = encode_prompts([render(conv)], tok).ids.tolist()
    test_eq(ids.count(-200), 1)
    assert tok.decode([i for i in ids if i >= 0]).count("<image>") == 1

def test_answers_of_the_exercises():
    ids = tokenizer_image_token("a<image>b<image>c<image>", tok)
    test_eq((ids.count(2), ids.count(-200)), (1, 3))
    conv = get_template("gemma")
    conv.append_message("user", "What is in the photo?")
    conv.append_message("model", "an <image>")
    tagged = render(conv)
    test_eq(encode_prompts([tagged], tok).ids.tolist().count(-200), 0)
    test_eq(tokenizer_image_token(tagged.text, tok).count(-200), 1)
    with Breakpoint(place_parts, at="return begins", set={"edges": []}) as bp:
        encode_prompts([seed], tok)
    with expect_fail(AssertionError, contains="is the same with the change"):
        bp.expect_changed(result=(0, 0))
