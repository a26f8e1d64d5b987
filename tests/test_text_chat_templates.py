"Derived from nbs/03b_chat_template.ipynb by `make tests`; edit the notebook, not this file."
import re
from functools import lru_cache
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import IMAGE_TOKEN, ConfigError, DataError
from vlm_lit.core import Segment
from vlm_lit.text.templates import Rendered, user_parts
from fastcore.test import expect_fail, test_eq
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.text.chat_templates import render_hf

def setup_module():
    global EACH, PARTS, STYLES, in_chat_form, speaks, tok, turns, with_parts
    STYLES = {
        "gemma3": (
            "{{ bos_token }}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
        "+ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
        ),
        "qwen": (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
        "smollm": (
            "{% if messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
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

def test_hf_template_gives_text_and_parts():
    prompt = render_hf(turns, speaks("gemma3", tok))
    for text, segment in prompt.parts: print(f"{segment.name:7}{text!r}")
    test_eq(
        "<bos>" + prompt.text,
        tok.apply_chat_template([{"role": r, "content": t} for r, t in turns], tokenize=False),
    )
    test_eq([prompt.text[a:b] for a, b in prompt.answers], ["a falcon<end_of_turn>"])
    assert prompt.text.startswith(render_hf(turns[:1], tok, add_generation_prompt=True).text)
    # an empty answer teaches nothing, not even to stop
    test_eq(render_hf([turns[0], ("assistant", "")], tok).answers, [])

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

def test_difference_of_two_renderings_learns_a_newline_too_many():
    speaks("gemma3", tok)
    messages = [{"role": role, "content": text} for role, text in turns]
    shorter = tok.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    longer = tok.apply_chat_template(messages, tokenize=False)
    print(repr(longer[len(shorter) :]))
    test_eq(longer[len(shorter) :], "a falcon<end_of_turn>\n")

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
        print(f"{style:11}{prompt.text[20:64]!r}", [prompt.text[a:b] for a, b in prompt.answers])

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
