"Derived from nbs/03b_chat_template.ipynb by `make tests`; edit the notebook, not this file."
import re
from functools import lru_cache
from os.path import commonprefix
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import IMAGE_TOKEN, ConfigError, DataError
from vlm_lit.core import Segment
from vlm_lit.text.templates import Rendered, user_parts
from fastcore.test import expect_fail, test_eq
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.text.chat_templates import _answer_parts
from vlm_lit.text.chat_templates import _frame_parts
from vlm_lit.text.chat_templates import _move_spaces
from vlm_lit.text.chat_templates import _stop_text
from vlm_lit.text.chat_templates import answer_headers
from vlm_lit.text.chat_templates import render_hf
from vlm_lit.text.chat_templates import stop_text
from vlm_lit.text.chat_templates import template_frame

def setup_module():
    global CHATML, EACH, PARTS, ROUND, STYLES, SYSTEM, in_chat_form, speaks, tok, turns, with_headers, with_parts
    CHATML = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n"
    STYLES = {
        "gemma3": (
            "{{ bos_token }}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
        "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
        ),
        "qwen": CHATML,
        "smollm": f"{{% if messages[0].role != 'system' %}}{{{{ {SYSTEM!r} }}}}{{% endif %}}{CHATML}",
        "llama3": (
            "{% for m in messages %}{% set content = '<|start_header_id|>' + m.role "
        "+ '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' %}"
        "{% if loop.first %}{{ bos_token }}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
        ),
    }
    def speaks(style, tokenizer):
        "The tokenizer with a template of this style."
        tokenizer.chat_template = STYLES[style]
        return tokenizer
    tok = load_tokenizer("gemma")
    turns = [("user", "<image>\nWhat is it? "), ("assistant", " a falcon\n")]
    EACH = (
        "{%- for m in messages %}{{ '<start_of_turn>' + m.role + '\n' }}"
    "{%- if m.content is string and STRING %}{{ m.content }}{% else %}"
    "{%- for p in m.content %}PART{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
    )
    PARTS = {
        "tag": ("true", "{{ '<image>' if p.type == 'image' else p.text }}"),
        "newline": ("true", "{{ '<image>\n' if p.type == 'image' else p.text + ' ' }}"),
        "trimmed": ("true", "{{ '<image>' if p.type == 'image' else ' ' + p.text | trim }}"),
        "framed": ("true", "{{ '<mask><image><mask>' if p.type == 'image' else p.text }}"),
        "parts_only": ("false", "{{ '<image>' if p.type == 'image' else p.text }}"),
        "token": ("true", "{{ '[<unused0>]' if p.type == 'image' else p.text }}"),
    }
    def with_parts(style):
        "The tokenizer with a template that takes parts; a new one each time."
        tokenizer, (string, part) = load_tokenizer("gemma"), PARTS[style]
        tokenizer.chat_template = EACH.replace("STRING", string).replace("PART", part)
        if style == "token": tokenizer.image_token = "<unused0>"
        return tokenizer
    def in_chat_form(turns):
        "Messages as `apply_chat_template` takes them."
        part = lambda p: {"type": "image"} if p == "<image>" else {"type": "text", "text": p}
        content = lambda own: own if isinstance(own, str) else [part(p) for p in own]
        return [{"role": role, "content": content(own)} for role, own in turns]
    ROUND = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}BEFORE{{ m.content }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}GIVEN{% endif %}"
    )
    def with_headers(before, given, base=ROUND):
        "The tokenizer with a template that writes one text before answers and gives another one."
        tok.chat_template = base.replace("BEFORE", before).replace("GIVEN", given)
        return tok

def test_spans_are_found_by_stand_ins():
    with Breakpoint(template_frame, at="pieces.append", watch=["text[at:begin]", "strip(' x ')"]) as bp:
        pieces, strips = template_frame(turns, speaks("gemma3", tok))
    test_eq(pieces[2], "<end_of_turn>\n")
    before = ["<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"]
    bp.expect_each({"text[at:begin]": before, "strip(' x ')": ["x", "x"]})

def test_stop_text_ends_with_the_first_control_token():
    own = speaks("gemma3", load_tokenizer("gemma"))
    with Breakpoint(_stop_text, at="return tail", watch="tail found") as bp:
        stop_text(own)
    bp.expect(tail="<end_of_turn>\n", found=[13]).expect_return(result="<end_of_turn>")

def test_hf_template_gives_text_and_parts():
    watch = ["has_bos", "[s.name for t, s in parts if t]", "[t for t, _ in parts if t]"]
    with Breakpoint(render_hf, at="return Rendered", watch=watch) as bp:
        prompt = render_hf(turns, speaks("gemma3", tok))
    messages = [{"role": role, "content": text} for role, text in turns]
    test_eq("<bos>" + prompt.text, tok.apply_chat_template(messages, tokenize=False))
    test_eq([prompt.text[a:b] for a, b in prompt.answers], ["a falcon<end_of_turn>"])
    assert prompt.text.startswith(render_hf(turns[:1], tok, add_generation_prompt=True).text)
    # an empty answer supervises nothing, not even its end
    test_eq(render_hf([turns[0], ("assistant", "")], tok).answers, [])
    names = ["HEADER", "IMAGE", "USER", "HEADER", "ANSWER", "STOP", "HEADER"]
    bp.expect({watch[1]: names}, has_bos=True)

def test_without_the_strip_parts_do_not_add_up():
    as_they_are = {"strips": [str, str]}
    with Breakpoint(render_hf, at="slots = [", watch="pieces", set=as_they_are) as bp:
        with expect_fail(DataError): render_hf(turns, speaks("gemma3", tok))
    is_refused = lambda found: "changes the text of this conversation" in repr(found)
    bp.expect_changed(result=(render_hf(turns, tok), is_refused))

def test_difference_of_two_renderings_learns_a_newline_too_many():
    speaks("gemma3", tok)
    messages = [{"role": role, "content": text} for role, text in turns]
    shorter = tok.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    longer = tok.apply_chat_template(messages, tokenize=False)
    test_eq(longer[len(shorter) :], "a falcon<end_of_turn>\n")
    change, names = {"stop": "<end_of_turn>\n"}, "message stop piece"
    with Breakpoint(_answer_parts, at="if not is_supervised", watch=names, set=change) as bp:
        prompt = render_hf(turns, tok)
    test_eq([prompt.text[a:b] for a, b in prompt.answers], ["a falcon<end_of_turn>\n"])
    bp.expect_changed({"result[0][1][0]": ("<end_of_turn>", "<end_of_turn>\n")})

def test_a_template_writes_more_than_the_image_token():
    asked = [("user", ["<image>", "What is ", "it?"]), ("assistant", ["a ", "falcon"])]
    watch = ["piece", "_cut_at_images(piece, tokenizer)"]
    with Breakpoint(_frame_parts, at="kinds =", watch=watch, when="'image' in piece") as bp:
        prompt = render_hf(asked, with_parts("framed"))
    test_eq([prompt.text[a:b] for a, b in prompt.images], ["<image>"])
    test_eq([prompt.text[a:b] for a, b in prompt.answers], ["a falcon<end_of_turn>"])
    cut = ["<start_of_turn>user\n<mask>", "<image>", "<mask>"]
    bp.expect({watch[1]: cut, "piece": "".join(cut)})

def test_parts_are_written_by_the_tokenizers_own_template():
    asked = ["<image>", "What is ", "it?\n"]
    conversations = [
        [("user", asked), ("assistant", ["a ", "falcon"]), ("user", ["and "]), ("assistant", ["b"])],
        [("user", ["one", "<image>", "two", "<image>"]), ("assistant", ["a"])],
        [("system", ["Be ", "brief."]), ("user", ["<image>"]), ("assistant", [""])],
    ]
    for style in PARTS:
        own = with_parts(style)
        for turns in conversations:
            prompt = render_hf(turns, own)
            test_eq(prompt.text, own.apply_chat_template(in_chat_form(turns), tokenize=False))
            n_images = sum(content.count("<image>") for _, content in turns)
            token = "<unused0>" if style == "token" else "<image>"
            test_eq([prompt.text[a:b] for a, b in prompt.images], [token] * n_images)
            asked = render_hf(turns[:-1], own, add_generation_prompt=True)
            assert prompt.text.startswith(asked.text)
            assert all(prompt.text[a:b].endswith("<end_of_turn>") for a, b in prompt.answers)
        prompt = render_hf(conversations[0], own)
        answer = prompt.text[slice(*prompt.answers[0])]
        print(f"{style:11}{prompt.text[20:51]!r:37}{answer!r}")

def test_a_space_that_generation_is_not_given_is_of_the_answer():
    llama_2 = with_headers(" ", "")
    with Breakpoint(_move_spaces, at="end = len", watch="pieces[k] given own") as bp:
        prompt = render_hf([("user", "Hi"), ("assistant", "Hello!")], llama_2)
    test_eq([prompt.text[a:b] for a, b in prompt.answers], [" Hello!<eos>"])
    asked = render_hf([("user", "Hi")], llama_2, add_generation_prompt=True).text
    test_eq(prompt.text[: prompt.answers[0][0]], asked)
    bp.expect({"pieces[k]": " [/INST] "}, given=" [/INST]", own=" [/INST] ")

def test_without_the_move_the_space_is_masked():
    with Breakpoint(_move_spaces, at="end = len", set={"given": " [/INST] "}) as bp:
        render_hf([("user", "Hi"), ("assistant", "Hello!")], with_headers(" ", ""))
    bp.expect_changed({"result[0][1]": ((1, " Hello!"), (1, "Hello!"))})

def test_answer_of_the_exercise():
    own = load_tokenizer("gemma")
    own.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    prompt = render_hf([("user", "q"), ("assistant", "a")], speaks("smollm", own))
    assert "helpful AI assistant" in prompt.parts[0][0]
    test_eq(prompt.parts[0][1], Segment.HEADER)
    prompt = render_hf([("system", "s"), ("user", "q"), ("assistant", "a")], own)
    test_eq(prompt.parts[1], ("s", Segment.SYSTEM))

def test_headers_of_generation_and_training_may_differ_in_space_alone():
    ALLOWED = [("", ""), (" ", ""), (" \n", ""), ("A: ", "A:"), ("A:\n", "A:\n"), ("A: ", "A: ")]
    REFUSED = [("", " "), ("A:", "A: "), ("A:", ""), ("", "A:"), ("A: B", "A:"), ("A:", "B:")]
    LAST = "{% if loop.last %}<think>{% endif %}"
    REFUSED += [(LAST, ""), ("<think></think>", "<think>"), ("{% if loop.index > 2 %}x{% endif %}", "")]
    talk = [("user", "q"), ("assistant", " a\n"), ("user", ""), ("assistant", "b")]
    for before, given in ALLOWED:
        own = with_headers(before, given)
        prompt = render_hf(talk, own)
        test_eq(prompt.text, own.apply_chat_template(in_chat_form(talk), tokenize=False))
        for end, (begin, _) in zip((1, 3), prompt.answers, strict=True):
            asked = render_hf(talk[:end], own, add_generation_prompt=True)
            test_eq(prompt.text[:begin], asked.text)
        gap = before.removeprefix(given)
        test_eq(prompt.text[slice(*prompt.answers[1])], f"{gap}b<eos>")
        # an empty answer is not supervised, nor the space before it
        test_eq(render_hf([talk[0], ("assistant", "")], own).answers, [])
    for before, given in REFUSED:
        own = with_headers(before, given)
        with expect_fail(ConfigError, contains="the tokenizer's chat template gives generation"):
            render_hf(talk, own)
    # a header that changes with the conversation, after two rounds that were alike
    late = with_headers("{% if loop.index > 4 %}x{% endif %}", "")
    with expect_fail(ConfigError, contains="in other conversations"):
        render_hf([*talk, ("user", "q"), ("assistant", "c")], late)
    # a template of one round is checked for one
    once = "{% if messages | length > 2 %}{{ raise_exception('one round') }}{% endif %}"
    own = with_headers(" ", "", once + ROUND)
    test_eq(len(answer_headers(own, own.chat_template)), 1)
    with expect_fail(DataError, contains="one round"): render_hf(talk, own)

def test_hf_template_that_cannot_be_followed_is_refused():
    each = "{{% for m in messages %}}{{{{ {} }}}}{{% endfor %}}".format
    replaced = each("m.content | replace('\ue000', '-') + '<eos>'")
    refused = [
        (None, "this tokenizer has none"),
        (each("m.content }}{{ m.content"), "writes a message 2 times"),
        (each("m.content + '\n'"), "writes no control token"),
        (replaced, "writes a message 0 times"),
    ]
    for template, message in refused:
        tok.chat_template = template
        with expect_fail(ConfigError, contains=message):
            render_hf([("user", "q"), ("assistant", "a")], tok)
    tok.chat_template = (
        "{% for m in messages %}{{ m.content | replace('cat', 'dog') + '<eos>' }}{% endfor %}"
    )
    with expect_fail(DataError, contains="changes the text"):
        render_hf([("user", "q"), ("assistant", "a cat")], tok)
    for broken, message in [
        (each("m.content + 1"), "fails (TypeError"),
        ("{% for %}", "is not valid Jinja"),
    ]:
        tok.chat_template = broken
        with expect_fail(ConfigError, contains=message):
            render_hf([("user", "q"), ("assistant", "a")], tok)
    tok.chat_template = "{{ raise_exception('roles must alternate') }}"
    with expect_fail(DataError, contains="roles must alternate"):
        render_hf([("user", "q")], tok)

def test_texts_stay_texts_and_parts_are_joined_for_templates_of_texts():
    turns = [("user", "<image>\nWhat is it?"), ("assistant", "a falcon")]
    for style in PARTS:
        own = with_parts(style)
        prompt = render_hf(turns, own)
        assert "user\n<image>\nWhat is it?" in prompt.text or style == "trimmed"
        test_eq(len(prompt.images), 1)
        if style != "parts_only":
            test_eq(prompt.text, own.apply_chat_template(in_chat_form(turns), tokenize=False))
    parts = [("user", ["<image>", "What is it?"]), ("assistant", ["a ", "falcon"])]
    joined = [(role, "".join(own)) for role, own in parts]
    printed = (
        "{% for m in messages %}{{ m.content ~ '<eos>' }}{% endfor %}"  # writes a list as Python does
    )
    for template in [*STYLES.values(), printed]:
        own = load_tokenizer("gemma")
        own.chat_template = template.replace("<|im_end|>", "<eos>").replace("<|eot_id|>", "<eos>")
        test_eq(render_hf(parts, own), render_hf(joined, own))
    spelled = [("user", ["<image>"]), ("assistant", ["a"])]  # without an image, the tag is text
    prompt = render_hf(spelled, with_parts("token"), has_image=False)
    assert not prompt.images and "<image>" in prompt.text

def test_image_that_a_template_does_not_write_is_refused():
    own = load_tokenizer("gemma")
    part = "{{ ('<image>' if loop.first else '') if p.type == 'image' else p.text }}"
    own.chat_template = EACH.replace("STRING", "true").replace("PART", part)
    turns = [("user", ["<image>", "or ", "<image>", "?"]), ("assistant", "a")]
    with expect_fail(ConfigError, contains="writes 1 image token(s) for 2 image(s)"):
        render_hf(turns, own)
