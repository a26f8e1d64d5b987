"Derived from nbs/03_templates.ipynb by `make tests`; edit the notebook, not this file."
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from vlm_lit.core import IMAGE_TOKEN, ConfigError, DataError
from vlm_lit.core import Segment
import html, json, lzma, sys, textwrap
from pathlib import Path
from fastcore.test import test_eq, expect_fail
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.debug.label_view import COLORS
from vlm_lit.debug.values import ids_text, visible_spaces
from vlm_lit.text.tokenizer import load_tokenizer
from small_parts import GOLDEN
from vlm_lit.text.templates import CURIOUS
from vlm_lit.text.templates import Conversation
from vlm_lit.text.templates import Rendered
from vlm_lit.text.templates import SeparatorStyle
from vlm_lit.text.templates import caption_form
from vlm_lit.text.templates import conv_templates
from vlm_lit.text.templates import frame_texts
from vlm_lit.text.templates import get_template
from vlm_lit.text.templates import llama_2
from vlm_lit.text.templates import message_parts
from vlm_lit.text.templates import render
from vlm_lit.text.templates import set_system
from vlm_lit.text.templates import turn_frame
from vlm_lit.text.templates import user_parts

def setup_module():
    global filled, golden, tok
    sys.path[:0] = ["../tests", "tests"]
    tok = load_tokenizer("gemma")
    def golden(name):
        "Rows recorded from MGM."
        lines = lzma.open(GOLDEN / f"{name}.jsonl.xz", "rt", encoding="utf-8")
        return [json.loads(line) for line in lines]
    def filled(*texts, template="gemma"):
        "A conversation whose turns have these texts, the user's first."
        conv = get_template(template)
        for n, text in enumerate(texts):
            conv.append_message(conv.roles[n % 2], text)
        return conv

def test_empty_conversation_reads_as_in_the_seed():
    with Breakpoint(get_template, at="return conv_templates", watch="name") as bp:
        conv = get_template("gemma")
    test_eq(
        repr(conv),
        "Conversation(system='', roles=('user', 'model'), messages=[], offset=0, "
    "sep_style=<SeparatorStyle.GEMMA: 7>, sep='', sep2='<eos>', version='gemma', "
    "skip_next=False)",
    )
    bp.expect_return(system="", roles=("user", "model"), messages=[], sep="", sep2="<eos>")

def test_template_table_is_not_changed_by_filling_a_copy():
    watch = ["role", "message", "len(self.messages)"]
    with Breakpoint(Conversation.append_message, at="self.messages.append", watch=watch) as bp:
        conv = filled("<image>\nWhat is in the photo?", "the box chain purse black")
    twin = conv.copy()
    twin.messages[0][1] = "changed"
    test_eq(conv.messages[0], ["user", "<image>\nWhat is in the photo?"])
    test_eq(conv_templates["gemma"].messages, [])
    bp.expect_each({"role": ["user", "model"], "len(self.messages)": [0, 1]})

def test_only_the_model_turn_ends_in_eos():
    frame_texts.cache_clear()
    conv = get_template("gemma")
    with Breakpoint(frame_texts, at='return f"<start_of_turn>', watch="role is_model own") as bp:
        frames = [turn_frame(conv, n, conv.roles[n % 2]) for n in (0, 1)]
    test_eq(frames[0], ("<start_of_turn>user\n", "", "<end_of_turn>\n"))
    test_eq(frames[1], ("<start_of_turn>model\n", "", "<end_of_turn>\n<eos>"))
    test_eq(turn_frame(get_template("v1"), 1, "ASSISTANT"), ("ASSISTANT:", " ", "</s>"))
    llama_2 = [turn_frame(get_template("llama_2"), n, "") for n in (0, 1, 2)]
    test_eq(llama_2[:2], [("", "[INST] ", " [/INST]"), ("", " ", " </s>")])
    test_eq(llama_2[2], ("", "<s>[INST] ", " [/INST]"))
    bp.expect_each(role=["user", "model"], own=["", "<eos>"])

def test_prompt_of_the_seed():
    conv = filled("<image>\nWhat is in the photo?", "the box chain purse black")
    watch = ["text", "[s.name for _, s in parts]", "[text for text, _ in parts]"]
    with Breakpoint(render, at="return Rendered", watch=watch) as bp:
        prompt = render(conv)
    test_eq(prompt.images, [(20, 27)])
    answers = [prompt.text[a:b] for a, b in prompt.answers]
    test_eq(answers, ["the box chain purse black<end_of_turn>\n<eos>"])
    user = "<start_of_turn>user\n<image>\nWhat is in the photo?<end_of_turn>\n"
    bp.expect(text=f"{user}<start_of_turn>model\n{answers[0]}")
    bp.expect({watch[1]: ["HEADER", "IMAGE", "USER", "HEADER", "ANSWER", "STOP"]})

def test_parts_grow_turn_by_turn():
    watch = ["n", "role", "message", "len(parts)"]
    conv = filled("<image>\nWhat is in the photo?", "the box chain purse black")
    with Breakpoint(render, at="parts += message_parts", watch=watch) as bp:
        prompt = render(conv)
    test_eq(len(prompt.parts), 6)
    bp.expect_each({"role": ["user", "model"], "len(parts)": [0, 5]})
    bp.expect_after({"len(parts)": 8}, hit=1)

def test_two_templates_at_the_same_stop():
    stops, watch = [], ["[s.name for _, s in parts]", "parts[-1][0]"]
    for name in ("gemma", "v1"):
        with Breakpoint(render, at="return Rendered", watch=watch) as bp:
            render(filled("<image>\nWhat is in the photo?", "the box", template=name))
        stops.append(bp)
    diff = stops[0].diff(stops[1], titles=("gemma", "v1"))
    diff.expect({"[s.name for _, s in parts][0]": ("HEADER", "SYSTEM")})

def test_generation_prompt_is_a_prefix_of_the_training_prompt():
    watch = ["add_generation_prompt", "len(text)", "text[:57]"]
    with Breakpoint(render, at="return Rendered", watch=watch) as bp:
        prefix = render(filled("Hi"), add_generation_prompt=True)
        full = render(filled("Hi", "Hello!", "Bye", "See you"))
        later = render(filled("Hi", "Hello!", "Bye"), add_generation_prompt=True)
    assert full.text.startswith(prefix.text) and full.answers[0][0] == len(prefix.text)
    assert full.text.startswith(later.text) and full.answers[1][0] == len(later.text)
    answers = [full.text[a:b] for a, b in full.answers]
    test_eq(answers, ["Hello!<end_of_turn>\n<eos>", "See you<end_of_turn>\n<eos>"])
    bp.expect_each({"text[:57]": [prefix.text] * 3, "add_generation_prompt": [True, False, True]})

def test_empty_answer_stays_open_and_last_question_is_closed():
    with Breakpoint(message_parts, at="return [(opening", watch="n role message opening") as bp:
        prompt = render(filled("q", ""))
    test_eq(prompt.text, "<start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n")
    test_eq(prompt.answers, [])
    unanswered = render(filled("q", "a", "and?"))
    assert unanswered.text.endswith("<start_of_turn>user\nand?<end_of_turn>\n")
    test_eq(len(unanswered.answers), 1)
    bp.expect(n=1, opening="<start_of_turn>model\n", hits=1)

def test_image_tag_in_an_answer_is_not_an_image():
    conv = filled("<image>\nHow do I show an image?", "Write <image> where it belongs.")
    with Breakpoint(user_parts, at="first, *rest =", watch="message rest") as bp:
        prompt = render(conv)
    test_eq((prompt.text.count("<image>"), len(prompt.images)), (2, 1))
    bp.expect(message="<image>\nHow do I show an image?", hits=1)
    bp.expect_after(rest=["\nHow do I show an image?"])

def test_a_wrong_role_name_changes_one_id():
    at, stop = "opening, glue, closing =", dict(watch="role opening", when="n == 1")
    with Breakpoint(message_parts, at=at, set={"role": "assistant"}, **stop) as bp:
        wrong = tok(render(filled("Hi", "Hello!")).text).input_ids
    right = tok(render(filled("Hi", "Hello!")).text).input_ids
    pairs = [pair for pair in zip(right, wrong, strict=True) if pair[0] != pair[1]]
    print([ids_text(list(pair), tok) for pair in pairs])
    test_eq(pairs, [(2516, 105776)])
    opening = "<start_of_turn>{}\n".format
    bp.expect_changed({"result[0][0]": (opening("model"), opening("assistant"))})

def test_without_stop_text_no_end_is_supervised():
    stop = dict(watch="message closing", when="n == 1")
    with Breakpoint(message_parts, at="if n % 2:", set={"closing": ""}, **stop) as bp:
        wrong = tok(render(filled("Hi", "Hello!")).text).input_ids
    right = tok(render(filled("Hi", "Hello!")).text).input_ids
    test_eq(right, [*wrong, 107, 108, 1])
    bp.expect_changed({"result[-1][0]": ("<end_of_turn>\n<eos>", "")})

def test_a_forgotten_space_changes_the_first_supervised_id():
    stop = dict(watch="opening glue message", when="n == 1")
    with Breakpoint(message_parts, at="if n % 2:", set={"glue": ""}, **stop) as bp:
        wrong = tok(render(filled("Hi", "Hello!", template="v1")).text).input_ids
    right = tok(render(filled("Hi", "Hello!", template="v1")).text).input_ids
    pairs = [pair for pair in zip(right, wrong, strict=True) if pair[0] != pair[1]]
    test_eq(pairs, [(25957, 4521)])
    bp.expect_changed({"result[1][0]": (" Hello!", "Hello!")})

def test_a_system_text_in_the_data_stands_there_twice():
    stops, system = [], CURIOUS.format("user", "user")
    watch = ["text.count('A chat between')", "parts[0][1].name", "parts[2][0][:6]"]
    for message in ("Hi", f"{system} Hi"):
        with Breakpoint(render, at="return Rendered", watch=watch) as bp:
            prompt = render(filled(message, "Hello!", template="v1"))
        stops.append((bp, len(tok(prompt.text).input_ids)))
    (once, few), (twice, many) = stops
    print(f"{few} tokens with the system text once, {many} with it twice")
    test_eq(prompt.parts[2][1], Segment.USER)
    once.diff(twice, titles=("once", "twice")).expect({"text.count('A chat between')": (1, 2)})

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

def test_what_mgm_trains_under_a_name():
    rows = {row["version"]: row for row in golden("versions")}  # the last row of each
    for name, row in rows.items():
        conv, by = row["default_conversation"], row["function"].replace("preprocess (", "(")
        print(f"{name:9} {conv['version']:9} {conv['roles'][0]:6} {by:15} {row['text'][-14:]!r}")
    default_path = {name for name, row in rows.items() if "default path" in row["function"]}
    test_eq(default_path, {"default", "llava_v0", "v0_mmtag", "phi_2", "imgsp_v1"})
    for row in golden("versions"):
        header = f"\n### {row['default_conversation']['roles'][1]}: "
        is_default = row["version"] in default_path
        test_eq(is_default, header in row["text"] and row["text"].endswith(".\n### "))
        test_eq(is_default, row["function"] != "preprocess_v1")
    test_eq([rows[v]["default_conversation"]["version"] for v in ("v0", "v0.5")], ["v1", "v1"])

def test_v0_of_mgm_is_v1_and_its_default_path_is_not_the_template():
    def text_of(row, template):
        texts = [turn["value"] for turn in row["conversations"]]
        return render(filled(*texts, template=template)).text

    same = set()  # (version, whether MGM trained on what `render` writes)
    for row in golden("versions"):
        if row["has_image"]: continue
        name = "v1" if row["version"] in ("v0", "v0.5") else row["version"]
        decoded = row["text"].replace("</s> ", "</s>")  # decoding puts a space after it
        same.add((row["version"], text_of(row, name).endswith(decoded)))
    test_eq({version for version, is_same in same if is_same}, {"v0", "v0.5", "v1", "v1_mmtag"})
    other = {version for version, is_same in same if not is_same}
    test_eq(other, {"default", "llava_v0", "v0_mmtag", "phi_2", "imgsp_v1"})
    print("as rendered here:", *sorted(version for version, is_same in same if is_same))

def test_plain_template_is_a_tag_and_a_caption():
    with Breakpoint(caption_form, at="return replace", watch=["conv.sep", "conv.sep2"]) as bp:
        conv = caption_form(get_template("plain"))
    conv.append_message("", "<image>")
    conv.append_message("", "a falcon in profile")
    prompt = render(conv)
    test_eq(prompt.text, "<image>a falcon in profile\n")
    test_eq(prompt.text[slice(*prompt.answers[0])], "a falcon in profile\n")
    bp.expect({"conv.sep": "\n", "conv.sep2": None}).expect_return(sep="", sep2="\n")

def test_system_turn_replaces_the_templates_text():
    with Breakpoint(set_system, at="conv.system =", watch=["text", "conv.system"]) as bp:
        prompts = {}
        for name in ("mpt", "v1", "llama_2"):
            set_system(conv := filled("Hi", template=name), "Be brief.")
            prompts[name] = render(conv)
    for name, prompt in prompts.items():
        assert "Be brief." in prompt.text and get_template(name).system not in prompt.text
    test_eq(prompts["mpt"].parts[0], ("<|im_start|>system\nBe brief.<|im_end|>", Segment.SYSTEM))
    with expect_fail(DataError, contains="'gemma' has no place for a system turn"):
        set_system(get_template("gemma"), "Be brief.")
    bp.expect_after({"conv.system": "<|im_start|>system\nBe brief."})
    bp.expect_after({"conv.system": "Be brief."}, hit=1)

def test_answers_are_noted_not_searched():
    conv = filled("What does <start_of_turn>model\n mean?", "It opens my turn.")
    prompt = render(conv)
    searched = len(prompt.text.split("<start_of_turn>model\n")) - 1
    with Breakpoint(Rendered.spans, at="return found", watch=["segments", "found"]) as bp:
        ((start, end),) = prompt.answers
    test_eq(prompt.text[start:end], "It opens my turn.<end_of_turn>\n<eos>")
    print(searched, "found by searching,", len(bp["found"]), "recorded")
    test_eq(searched, 2)
    bp.expect({"len(found)": 1})

def test_unknown_template_lists_the_names():
    message = "unknown template 'gema'; there are: chatml_direct, default, gemma, "
    with expect_fail(ConfigError, contains=message): get_template("gema")

def test_llama_3_keeps_the_slip_and_has_a_corrected_twin():
    test_eq(len(conv_templates), 21)
    roles = [conv_templates[name].roles[1] for name in ("llama_3", "llama_3_assistant")]
    test_eq(roles[0], "<|start_header_id|>system<|end_header_id|>\n\n")
    test_eq(roles[1], "<|start_header_id|>assistant<|end_header_id|>\n\n")
    # default=v0=llava_v0, v1=vicuna_v1, chatml_direct=mistral_direct, plain=v0_plain
    test_eq(len({repr(conv) for conv in conv_templates.values()}), 16)

def test_supervised_part_of_four_templates():
    def bracketed(prompt):
        ((a, b),) = prompt.answers
        return f"{prompt.text[:a][-34:]}[{prompt.text[a:b]}]".replace("\n", "⏎")

    shown = {
        name: bracketed(render(filled("Hi", "Hello!", template=name)))
        for name in ("v0", "v1", "llama_2", "mpt")
    }
    test_eq(
        [text[text.index("[") :] for text in (shown["v0"], shown["v1"], shown["mpt"])],
        ["[ Hello!###]", "[ Hello!</s>]", "[Hello!<|im_end|>]"],
    )
    test_eq(shown["llama_2"].rpartition("/INST]")[2], "[ Hello! </s>]")

def test_answers_of_the_exercises():
    test_eq(render(filled("Hi", "Hello!", template="v1")).parts[-2], (" Hello!", Segment.ANSWER))
    prompt = render(filled("Hi", "", "Bye", "See you"))
    test_eq(len(prompt.answers), 1)
    assert "<start_of_turn>model\n<start_of_turn>user\nBye" in prompt.text
    conv = Conversation("", ("Q", "A"), sep_style=SeparatorStyle.TWO, sep="[Q]", sep2="[A]")
    for role, text in (("Q", "Hi"), ("A", "Hello!")):
        conv.append_message(role, text)
    test_eq(conv.get_prompt(), "Q: Hi[Q]A: Hello![A]")
