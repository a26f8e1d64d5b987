"Derived from nbs/03_templates.ipynb by `make tests`; edit the notebook, not this file."
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from vlm_lit.core import IMAGE_TOKEN, ConfigError, DataError
from vlm_lit.core import Segment
import json, lzma
from pathlib import Path
from fastcore.test import test_eq, expect_fail
from vlm_lit.text.templates import caption_form
from vlm_lit.text.templates import conv_templates
from vlm_lit.text.templates import get_template
from vlm_lit.text.templates import render
from vlm_lit.text.templates import set_system
from vlm_lit.text.templates import turn_frame

def setup_module():
    global GOLDEN, filled, golden
    def filled(*texts, template="gemma"):
        conv = get_template(template)
        for n, text in enumerate(texts):
            conv.append_message(conv.roles[n % 2], text)
        return conv
    GOLDEN = next(
        folder for folder in map(Path, ("tests/golden", "../tests/golden")) if folder.is_dir()
    )
    def golden(name):
        lines = lzma.open(GOLDEN / f"{name}.jsonl.xz", "rt", encoding="utf-8")
        return [json.loads(line) for line in lines]

def test_llama_3_keeps_the_slip_and_has_a_corrected_twin():
    test_eq(len(conv_templates), 21)
    roles = [conv_templates[name].roles[1] for name in ("llama_3", "llama_3_assistant")]
    test_eq(roles[0], "<|start_header_id|>system<|end_header_id|>\n\n")
    test_eq(roles[1], "<|start_header_id|>assistant<|end_header_id|>\n\n")
    # default=v0=llava_v0, v1=vicuna_v1, chatml_direct=mistral_direct, plain=v0_plain
    test_eq(len({repr(conv) for conv in conv_templates.values()}), 16)

def test_empty_conversation_reads_as_in_the_seed():
    conv = get_template("gemma")
    print(conv)
    test_eq(
        repr(conv),
        (
            "Conversation(system='', roles=('user', 'model'), messages=[], offset=0, "
        "sep_style=<SeparatorStyle.GEMMA: 7>, sep='', sep2='<eos>', version='gemma', "
        "skip_next=False)"
        ),
    )

def test_template_table_is_not_changed_by_filling_a_copy():
    conv = get_template("gemma")
    conv.append_message("user", "hello")
    twin = conv.copy()
    twin.messages[0][1] = "changed"
    test_eq(conv.messages, [["user", "hello"]])
    test_eq(conv_templates["gemma"].messages, [])

def test_unknown_template_lists_the_names():
    message = "unknown template 'gema'; there are: chatml_direct, default, gemma, "
    with expect_fail(ConfigError, contains=message): get_template("gema")

def test_only_the_model_turn_ends_in_eos():
    conv = get_template("gemma")
    test_eq(turn_frame(conv, 0, "user"), ("<start_of_turn>user\n", "", "<end_of_turn>\n"))
    test_eq(turn_frame(conv, 1, "model"), ("<start_of_turn>model\n", "", "<end_of_turn>\n<eos>"))
    test_eq(turn_frame(get_template("v1"), 1, "ASSISTANT"), ("ASSISTANT:", " ", "</s>"))
    test_eq(
        [turn_frame(get_template("llama_2"), n, "") for n in (0, 1, 2)],
        [("", "[INST] ", " [/INST]"), ("", " ", " </s>"), ("", "<s>[INST] ", " [/INST]")],
    )

def test_prompt_of_the_seed():
    conv = get_template("gemma")
    conv.append_message("user", "<image>\nWhat is in the photo?")
    conv.append_message("model", "the box chain purse black")
    prompt = render(conv)
    test_eq(
        prompt.text,
        (
            "<start_of_turn>user\n<image>\nWhat is in the photo?<end_of_turn>\n<start_of_turn>model\n"
        "the box chain purse black<end_of_turn>\n<eos>"
        ),
    )
    test_eq(
        [prompt.text[a:b] for a, b in prompt.answers], ["the box chain purse black<end_of_turn>\n<eos>"]
    )
    test_eq(prompt.images, [(20, 27)])
    test_eq(
        [segment.name for _, segment in prompt.parts],
        ["HEADER", "IMAGE", "USER", "HEADER", "ANSWER", "STOP"],
    )

def test_generation_prompt_is_a_prefix_of_the_training_prompt():
    asked = render(filled("Hi"), add_generation_prompt=True)
    told = render(filled("Hi", "Hello!", "Bye", "See you"))
    print(repr(asked.text))
    assert told.text.startswith(asked.text) and told.answers[0][0] == len(asked.text)
    assert told.text.startswith(render(filled("Hi", "Hello!", "Bye"), add_generation_prompt=True).text)
    test_eq(
        [told.text[a:b] for a, b in told.answers],
        ["Hello!<end_of_turn>\n<eos>", "See you<end_of_turn>\n<eos>"],
    )

def test_empty_answer_stays_open_and_last_question_is_closed():
    conv = get_template("gemma")
    for role, text in [("user", "q"), ("model", "")]:
        conv.append_message(role, text)
    test_eq(render(conv).text, "<start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n")
    test_eq(render(conv).answers, [])
    conv = get_template("gemma")
    for role, text in [("user", "q"), ("model", "a"), ("user", "and?")]:
        conv.append_message(role, text)
    assert render(conv).text.endswith("<start_of_turn>user\nand?<end_of_turn>\n")
    assert len(render(conv).answers) == 1

def test_image_tag_in_an_answer_is_not_an_image():
    conv = get_template("gemma")
    conv.append_message("user", "<image>\nHow do I show a picture?")
    conv.append_message("model", "Write <image> where it belongs.")
    prompt = render(conv)
    print(prompt.text.count("<image>"), "tags written,", len(prompt.images), "picture")
    test_eq((prompt.text.count("<image>"), len(prompt.images)), (2, 1))

def test_every_reference_prompt_of_all_twenty_templates():
    rows = golden("prompts")
    names = {row["template"] for row in rows}

    def prompt_of(row):
        conv = get_template(row["template"])
        for role, text in row["turns"]:
            conv.append_message(conv.roles[role == "assistant"], text)
        return conv.get_prompt()

    wrong = [row["id"] for row in rows if prompt_of(row) != row["prompt"]]
    print(len(rows), "prompts,", len(names), "templates,", len(wrong), "differ")
    test_eq((len(rows), len(names), wrong), (474, 20, []))
    test_eq(names | {"llama_3_assistant"}, set(conv_templates))

def test_supervised_part_of_four_templates():
    def bracketed(prompt):
        ((a, b),) = prompt.answers
        return f"{prompt.text[:a][-34:]}[{prompt.text[a:b]}]".replace("\n", "⏎")

    shown = {
        name: bracketed(render(filled("Hi", "Hello!", template=name)))
        for name in ("v0", "v1", "llama_2", "mpt")
    }
    for name, text in shown.items(): print(f"{name:8}…{text}")
    test_eq(
        [text[text.index("[") :] for text in (shown["v0"], shown["v1"], shown["mpt"])],
        ["[ Hello!###]", "[ Hello!</s>]", "[Hello!<|im_end|>]"],
    )
    test_eq(shown["llama_2"].rpartition("/INST]")[2], "[ Hello! </s>]")

def test_plain_template_is_a_tag_and_a_caption():
    conv = caption_form(get_template("plain"))
    conv.append_message("", "<image>")
    conv.append_message("", "a falcon in profile")
    prompt = render(conv)
    print(repr(prompt.text), [prompt.text[a:b] for a, b in prompt.answers])
    test_eq(prompt.text, "<image>a falcon in profile\n")
    test_eq(prompt.text[slice(*prompt.answers[0])], "a falcon in profile\n")

def test_system_turn_replaces_the_templates_text():
    for name in ("v1", "llama_2", "mpt"):
        conv = filled("Hi", template=name)
        set_system(conv, "Be brief.")
        print(f"{name:9}{render(conv).text!r}")
        assert "Be brief." in render(conv).text and get_template(name).system not in render(conv).text
    test_eq(render(conv).parts[0], ("<|im_start|>system\nBe brief.<|im_end|>", Segment.SYSTEM))
    with expect_fail(DataError, contains="'gemma' has no place for a system turn"):
        set_system(get_template("gemma"), "Be brief.")

def test_answers_are_noted_not_searched():
    conv = get_template("gemma")
    conv.append_message("user", "What does <start_of_turn>model\n mean?")
    conv.append_message("model", "It opens my turn.")
    prompt = render(conv)
    searched = len(prompt.text.split("<start_of_turn>model\n")) - 1
    print(searched, "found by searching,", len(prompt.answers), "noted")
    test_eq((searched, len(prompt.answers)), (2, 1))
