"Derived from nbs/03b_chat_template.ipynb by `make tests`; edit the notebook, not this file."
from functools import lru_cache
from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import ConfigError, DataError
from vlm_lit.debug.label_view import Segment
from vlm_lit.text.templates import Rendered, user_parts
from fastcore.test import expect_fail, test_eq
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.text.chat_templates import render_hf

def setup_module():
    global STYLES, speaks, tok, turns
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
