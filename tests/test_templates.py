"Derived from nbs/03_templates.ipynb by `make tests`; edit the notebook, not this file."
from dataclasses import dataclass, field, replace
from enum import Enum
from vlm_lit.core import IMAGE_TOKEN, ConfigError
from fastcore.test import test_eq, expect_fail
from vlm_lit.templates import *

def test_empty_conversation_reads_as_in_the_seed():
    conv = get_template("gemma")
    print(conv)
    test_eq(repr(conv), "Conversation(system='', roles=('user', 'model'), messages=[], offset=0, sep_style=<SeparatorStyle.GEMMA: 7>, sep='', sep2='<eos>', version='gemma', skip_next=False)")

def test_template_table_is_not_changed_by_filling_a_copy():
    conv = get_template("gemma")
    conv.append_message("user", "hello")
    twin = conv.copy()
    twin.messages[0][1] = "changed"
    test_eq(conv.messages, [["user", "hello"]])
    test_eq(conv_templates["gemma"].messages, [])

def test_unknown_template_lists_the_names():
    with expect_fail(ConfigError, contains="unknown template 'gema'; there are: gemma, plain"): get_template("gema")

def test_only_the_model_turn_ends_in_eos():
    test_eq(gemma_turn(get_template("gemma"), "user"), ("<start_of_turn>user\n", "<end_of_turn>\n"))
    test_eq(gemma_turn(get_template("gemma"), "model"), ("<start_of_turn>model\n", "<end_of_turn>\n<eos>"))
    test_eq(plain_turn(get_template("plain"), 1), ("", "\n"))

def test_prompt_of_the_seed():
    conv = get_template("gemma")
    conv.append_message("user", "<image>\nWhat is in the photo?")
    conv.append_message("model", "the box chain purse black")
    prompt = render(conv)
    test_eq(prompt.text, "<start_of_turn>user\n<image>\nWhat is in the photo?<end_of_turn>\n<start_of_turn>model\nthe box chain purse black<end_of_turn>\n<eos>")
    test_eq([prompt.text[a:b] for a,b in prompt.answers], ["the box chain purse black<end_of_turn>\n<eos>"])
    test_eq(prompt.images, ((20, 27),))

def test_generation_prompt_is_a_prefix_of_the_training_prompt():
    def filled(*texts, template="gemma"):
        conv = get_template(template)
        for n,text in enumerate(texts): conv.append_message(conv.roles[n % 2], text)
        return conv
    asked = render(filled("Hi"), add_generation_prompt=True)
    told = render(filled("Hi", "Hello!", "Bye", "See you"))
    print(repr(asked.text))
    assert told.text.startswith(asked.text) and told.answers[0][0] == len(asked.text)
    assert told.text.startswith(render(filled("Hi", "Hello!", "Bye"), add_generation_prompt=True).text)
    test_eq([told.text[a:b] for a,b in told.answers], ["Hello!<end_of_turn>\n<eos>", "See you<end_of_turn>\n<eos>"])

def test_empty_answer_stays_open_and_last_question_is_closed():
    conv = get_template("gemma")
    for role,text in [("user", "q"), ("model", "")]: conv.append_message(role, text)
    test_eq(render(conv).text, "<start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n")
    test_eq(render(conv).answers, ())
    conv = get_template("gemma")
    for role,text in [("user", "q"), ("model", "a"), ("user", "and?")]: conv.append_message(role, text)
    assert render(conv).text.endswith("<start_of_turn>user\nand?<end_of_turn>\n") and len(render(conv).answers) == 1

def test_image_tag_in_an_answer_is_not_an_image():
    conv = get_template("gemma")
    conv.append_message("user", "<image>\nHow do I show a picture?")
    conv.append_message("model", "Write <image> where it belongs.")
    prompt = render(conv)
    print(prompt.text.count("<image>"), "tags written,", len(prompt.images), "picture")
    test_eq((prompt.text.count("<image>"), len(prompt.images)), (2, 1))

def test_plain_template_is_a_tag_and_a_caption():
    conv = get_template("plain")
    conv.append_message("", "<image>")
    conv.append_message("", "a falcon in profile")
    prompt = render(conv)
    print(repr(prompt.text), [prompt.text[a:b] for a,b in prompt.answers])
    test_eq(prompt.text, "<image>a falcon in profile\n")
    test_eq(prompt.text[slice(*prompt.answers[0])], "a falcon in profile\n")

def test_answers_are_noted_not_searched():
    conv = get_template("gemma")
    conv.append_message("user", "What does <start_of_turn>model\n mean?")
    conv.append_message("model", "It opens my turn.")
    prompt = render(conv)
    searched = len(prompt.text.split("<start_of_turn>model\n")) - 1
    print(searched, "found by searching,", len(prompt.answers), "noted")
    test_eq((searched, len(prompt.answers)), (2, 1))
