"Derived from nbs/03a_messages.ipynb by `make tests`; edit the notebook, not this file."
import math, re
from vlm_lit.core import IMAGE_TOKEN, DataError
import json, textwrap
from fastcore.test import test_eq, expect_fail
from hypothesis import given, settings, strategies as st
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.text.messages import REFUSED_KEYS
from vlm_lit.text.messages import _is_trained
from vlm_lit.text.messages import _llava_turn
from vlm_lit.text.messages import _part_images
from vlm_lit.text.messages import _read_turn
from vlm_lit.text.messages import ignored_keys
from vlm_lit.text.messages import image_names
from vlm_lit.text.messages import read_record
from vlm_lit.text.messages import turn_parts

def test_a_turn_becomes_a_role_and_pairs():
    content = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "What is this?"}]
    with Breakpoint(_read_turn, at="return ROLES[role], parts", watch="role content parts") as bp:
        _read_turn({"role": "user", "content": content}, record="a", n=0)
        _read_turn({"from": "gpt", "value": "A cat"}, record="a", n=1)
    pairs = [[(None, "x.png"), ("What is this?", None)], [("A cat", None)]]
    bp.expect_each(role=["user", "gpt"], parts=pairs)

def test_a_weight_of_zero_is_kept_as_a_switch():
    answers = [{"weight": 0}, {"train": True}, {"weight": None}]
    with Breakpoint(_is_trained, at="return all(given", watch="given") as bp:
        for answer in answers: _is_trained(answer, "gpt", record="a", n=1)
    bp.expect_each(given=[{"weight": 0}, {"train": True}, {}])
    for hit, wanted in enumerate([False, True, True]):
        bp.expect_return(result=wanted, hit=hit)

def test_a_weight_would_be_lost():
    unwanted = {"role": "assistant", "content": "I guess", "weight": 0}
    at = "for key, value in given.items()"
    with Breakpoint(_is_trained, at=at, watch="given", set={"given": {}}) as bp:
        _is_trained(unwanted, "gpt", record="a", n=1)
    bp.expect_changed(result=(False, True))

def test_keys_that_hold_text_are_named():
    raw = {"id": 1, "score": 3, "hint": ["", {"en": "look left"}], "url": "http://x/y"}
    turns = [{"from": "gpt", "value": "a", "rationale": "because"}]
    with Breakpoint(ignored_keys, at="return sorted(found)", watch="found") as bp:
        ignored_keys(raw, turns)
    bp.expect_return(result=["hint", "turn.rationale"])

def test_three_forms_are_one_record():
    def chat(image):
        content = [image, {"type": "text", "text": "What is this?"}]
        return {"id": "a", "messages": [{"role": "user", "content": content}]}

    llava = [{"from": "human", "value": "<image>What is this?"}]
    forms = [{"id": "a", "image": "x.png", "conversations": llava}]
    forms.append(chat({"type": "image", "image": "x.png"}))
    forms.append(chat({"type": "image_url", "image_url": {"url": "x.png"}}))
    watch = ["paths", "conversations[0]['value']", "'parts' in conversations[0]"]
    with Breakpoint(read_record, at='image = {"image"', watch=watch) as bp:
        for form in forms: read_record(form)
    bp.expect_each({watch[0]: [["x.png"]] * 3, watch[1]: ["<image>What is this?"] * 3})
    bp.expect_each({watch[2]: [False, True, True]})

def test_parts_that_no_longer_make_up_the_text_do_not_count():
    turn = {"from": "human", "value": "<image>q", "parts": ["<image>", "q"]}
    with Breakpoint(turn_parts, at="return parts if parts", watch=["parts", "turn['value']"]) as bp:
        turn_parts(turn)
        turn_parts({**turn, "value": "<image>\nq"})
    bp.expect_return(result=["<image>", "q"], hit=0)
    bp.expect_return(result=None, hit=1)

def test_a_spelled_tag_would_be_one_image_too_many():
    parts = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "Write <image> first"}]
    turns = [_read_turn({"role": "user", "content": parts}, record="a", n=0)]
    with Breakpoint(_part_images, at="for n, text in texts:", watch="texts", set={"texts": []}) as bp:
        _part_images(turns, record="a")
    test_eq(_llava_turn({"content": parts}, *turns[0])["value"].count("<image>"), 2)
    is_refused = lambda found: "the text spells <image>" in repr(found)
    bp.expect_changed(result=(is_refused, ["x.png"]))

def test_answer_of_the_exercise():
    parts = [{"type": "image"}, {"type": "text", "text": " or "}, {"type": "image"}]
    raw = {"messages": [{"role": "user", "content": parts}], "images": ["a.png", "b.png"]}
    record = read_record(raw)
    test_eq(
        (record["image"], record["conversations"][0]["value"]), (raw["images"], "<image> or <image>")
    )
    with expect_fail(DataError, contains="the messages hold 2 image(s), and 'image' names 1"):
        read_record({**raw, "images": ["a.png"]})

def test_records_of_all_forms_become_llava_records():
    llava = {
        "id": "a",
        "image": "x.png",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>What is this?"},
            {"from": "gpt", "value": "A cat"},
        ],
    }
    test_eq(read_record({**llava, "image": ["x.png"]}), llava)
    test_eq(read_record({**llava, "image": ["x.png", "y.png"]})["image"], ["x.png", "y.png"])
    described = {**llava, "type": "color", "source": "web"}
    test_eq(read_record(described), described)
    test_eq(read_record({**llava, "type": None, "score": 3, "license": "MIT"}), llava)

    def chat(part, content=None, key="messages", **extra):
        question = [part, {"type": "text", "text": "What is this?"}] if part else content
        answer = [{"type": "text", "text": "A "}, {"type": "text", "text": "cat"}]
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        return {"id": "a", **extra, key: messages}

    forms = [
        llava,
        chat({"type": "image", "image": "x.png"}),
        chat({"type": "image", "image": None, "path": "x.png"}),
        chat({"type": "image_url", "image_url": {"url": "x.png"}}),
        chat({"type": "image"}, images=["x.png"]),
        chat({"type": "image", "text": None}, key="conversations", image=["x.png"]),
        chat(None, "<image>What is this?", images=["x.png"]),
    ]

    def without_parts(record):
        turns = [{k: turn[k] for k in ("from", "value")} for turn in record["conversations"]]
        return {**record, "conversations": turns}

    for form in forms: test_eq(without_parts(read_record(form)), llava)
    without = {"image": "p.png", "conversations": []}
    test_eq(read_record(without, 7), {"id": 7, **without})
    records = [{"image": image, "conversations": []} for image in ("p", ["p", "q"], None, [])]
    names = [image_names(read_record(record)) for record in records]
    test_eq(names, [["p"], ["p", "q"], [], []])

def test_parts_of_a_message_are_kept():
    content = [IMAGE, TEXT] = [{"type": "image", "image": "x.png"}, {"type": "text", "text": "q"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    record = read_record({"id": 7, "messages": messages})
    first = {"from": "human", "value": "<image>q", "parts": ["<image>", "q"]}
    test_eq(record["conversations"], [first, {"from": "gpt", "value": "a"}])
    test_eq(read_record(record), record)
    test_eq(turn_parts(first), ["<image>", "q"])
    test_eq(turn_parts({**first, "value": "<image>\nq"}), None)
    for parts in (None, [], "<image>q", [3], ["<image>", "?"]):
        turn = {"from": "human", "value": "<image>q", "parts": parts}
        test_eq(
            read_record({"image": "x.png", "conversations": [turn]}, 7)["conversations"][0],
            {"from": "human", "value": "<image>q"},
        )

def test_records_that_cannot_be_read_say_why():
    IMAGE, TEXT = {"type": "image", "image": "x.png"}, {"type": "text", "text": "q"}

    def user(*parts, **extra):
        question, answer = (
            {"role": "user", "content": list(parts)},
            {"role": "assistant", "content": "a"},
        )
        return {"id": 7, **extra, "messages": [question, answer]}

    def turn(role, content, **extra):
        own = {"role": role, "content": content, **extra}
        return {"id": 7, "messages": [{"role": "user", "content": "q"}, own]}

    greeting = [
        {"from": "gpt", "value": "see <image>"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
    ]
    bare = {"id": 7, "conversations": []}
    spelled = {"type": "text", "text": "a <image>"}
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    wrong = {
        "record 0: a record must be a JSON object": [3],
        "record 7: no 'conversations' and no 'messages'; the record has ['id', 'image']": {
            "id": 7,
            "image": "x.png",
        },
        "record 7: a conversation must be a list": {"id": 7, "conversations": "q"},
        "record 7: 'id' must be": {"id": [1], "conversations": []},
        "record 7: 'type' must be a text, got list": {"id": 7, "conversations": [], "type": ["color"]},
        "record 7: 'source' must be a text, got int": {"id": 7, "conversations": [], "source": 3},
        "record 7: 'source' holds half": {"id": 7, "conversations": [], "source": "\ud83d"},
        "record 7: an image must be given as a path": {"id": 7, "image": 3, "conversations": []},
        "record 7: an image must": {"id": 7, "image": ["x", ""], "conversations": []},
        "record 7: an image path holds half": {"id": 7, "image": "\ud83d", "conversations": []},
        "record 7: image 'https://x/y.png' is an address": {**bare, "image": "https://x/y.png"},
        "record 7, turn 0: image 'data:": user(url),
        "record 7: both 'image' and 'images'": {**bare, "image": "x", "images": ["x"]},
        "record 7: some images are named in": user(IMAGE, TEXT, image="y.png"),
        "record 7: some images are named": user(IMAGE, {"type": "image"}, TEXT),
        "record 7: the messages hold 1 image(s), and 'image' names 0": user({"type": "image"}, TEXT),
        "record 7, turn 0: the text spells <image>": user(IMAGE, spelled),
        "record 7, turn 0: a part of a message must be": user({"type": "audio", "audio": "x.wav"}),
        "record 7, turn 0: a turn must be": {"id": 7, "messages": [{"role": "user", "content": None}]},
        "record 7, turn 1: unknown role 'tool'": turn("tool", "x"),
        "record 7, turn 1: the text holds half": turn("assistant", "\ud83d"),
        "record 7, turn 1: 'weight' is '0.5'": turn("assistant", "a", weight=0.5),
        "record 7, turn 1: 'loss' is 'no'": turn("assistant", "a", loss="no"),
        "record 7, turn 1: 'train' and 'weight' disagree": turn(
            "assistant", "a", weight=1, train=False
        ),
        "record 7, turn 1: 'train' in a turn of 'human'": turn("user", "q", train=True),
        "record 7: 'id' must be a text or a finite number": {"id": float("inf"), "messages": []},
        "record 7: the record has 'video'": {**bare, "video": "x.mp4"},
        "record 7: 'system' must be a text": {**bare, "system": ["Be brief."]},
        "record 7: both 'system' and a system turn": {
            "system": "Be brief.",
            **turn("system", "Be long."),
        },
        "record 7, turn 1: the turn has 'thinking'": turn("assistant", "a", thinking="hm"),
        "record 7, turn 1: the turn has 'tool_calls'": turn("assistant", "a", tool_calls=[{"id": 1}]),
        "record 7, turn 1: the turn has 'refusal'": turn("assistant", "a", refusal="no"),
        "record 7, turn 1: an image in a turn of 'gpt'": turn("assistant", [IMAGE]),
    }
    wrong["record 7, turn 0: the turn answers nothing"] = {
        "id": 7,
        "image": "x.png",
        "conversations": greeting,
    }
    for message, record in wrong.items():
        with expect_fail(DataError, contains=message):
            read_record(record, 7 if record != [3] else 0)
    kept = read_record(turn("assistant", "a", weight=1, refusal=None))
    test_eq(kept["conversations"][1]["value"], "a")
    test_eq(len(wrong), 34)

def test_switches_of_turns_in_all_combinations():
    # switches of an answer -> whether it is trained; None: refused
    table = [
        ({}, True),
        ({"weight": None, "train": None}, True),
        ({"weight": 1}, True),
        ({"weight": 0.0}, False),
        ({"loss": False}, False),
        ({"train": False}, False),
        ({"training": 0, "loss": False}, False),
        ({"train": True, "weight": 1.0}, True),
        ({"weight": 0, "loss": True}, None),
        ({"weight": 2}, None),
        ({"weight": -1}, None),
        ({"loss": "false"}, None),
        ({"train": []}, None),
        ({"weight": float("nan")}, None),
    ]
    for switches, wanted in table:
        raw = {"id": 1, "conversations": [{"from": "gpt", "value": "a", **switches}]}
        if wanted is None:
            with expect_fail(DataError, contains="record 1, turn 0: "):
                read_record(raw)
            continue
        record = read_record(raw)
        kept = {"from": "gpt", "value": "a"} | ({} if wanted else {"train": False})
        test_eq(record["conversations"], [kept])
        test_eq(read_record(record), record)
    question = {"from": "human", "value": "q"}  # a user's turn is masked anyway
    for off in ({"train": False}, {"loss": False}, {"weight": 0}, {"weight": 1}, {"loss": True}):
        test_eq(read_record({"conversations": [{**question, **off}]})["conversations"], [question])

def test_content_is_used_refused_or_named():
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(" \nx", max_size=3)
    inner = lambda own: (
        st.lists(own, max_size=3) | st.dictionaries(st.text(max_size=3), own, max_size=3)
    )
    values = st.recursive(leaves, inner, max_leaves=8)
    keys = st.sampled_from(["hint", "options", "text", "system_prompt", "url", "width", "_row", *"ab"])
    turn_keys = st.sampled_from(["thought", "name", "language", "c"])

    def words(value):
        "Texts anywhere in a value."
        if isinstance(value, dict): value = list(value.values())
        if isinstance(value, list):
            return [word for own in value for word in words(own)]
        return [value] if isinstance(value, str) and value.strip() else []

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.dictionaries(keys, values, max_size=4), st.dictionaries(turn_keys, values, max_size=2))
    def check(extra, of_turn):
        turns = [{"from": "human", "value": "q", **of_turn}, {"from": "gpt", "value": "a"}]
        record = read_record({"id": 1, "conversations": turns, **extra})
        found = {**extra, **{f"turn.{key}": value for key, value in of_turn.items()}}
        harmless = ("url", "width", "_row", "turn.name", "turn.language")
        wanted = sorted(k for k, v in found.items() if words(v) and k not in harmless)
        assert record.get("ignored", []) == wanted and read_record(record) == record

    check()
    for key in REFUSED_KEYS:
        for place in ("record", "turn"):
            turn = {"from": "gpt", "value": "a"}
            raw = {"id": 1, "conversations": [turn]}
            own = raw if place == "record" else turn
            for empty in (None, "", [], {}, False):
                own[key] = empty
                test_eq(read_record(raw), {"id": 1, "conversations": [{"from": "gpt", "value": "a"}]})
            for full in ("x", ["x"], {"x": 1}, 1):
                own[key] = full
                with expect_fail(DataError, contains=f"the {place} has '{key}'"):
                    read_record(raw)

def test_a_system_text_beside_the_turns_is_a_turn():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    system = {"role": "system", "content": "Be brief."}
    wanted = read_record({"id": 1, "messages": [system, *turns]})
    test_eq(read_record({"id": 1, "system": "Be brief.", "messages": turns}), wanted)
    for nothing in ("", None, []):
        test_eq(
            read_record({"id": 1, "system": nothing, "messages": turns})["conversations"][0]["from"],
            "human",
        )
    for twins in ({"images": []}, {"images": None}, {"messages": []}, {"messages": None}):
        raw = {"id": 1, "image": "x.png", "conversations": [{"from": "human", "value": "<image>"}]}
        test_eq(read_record({**raw, **twins}), read_record(raw))  # a merged table has empty twins
