"Derived from nbs/03d_record_forms.ipynb by `make tests`; edit the notebook, not this file."
from collections.abc import Callable, Mapping
from difflib import SequenceMatcher
from typing import Any
from vlm_lit.core import IMAGE_TOKEN, ConfigError, DataError, nearest
from vlm_lit.text.messages import RECORD_KEYS, holds_text
from fastcore.test import expect_fail, test_eq
from hypothesis import given, settings, strategies as st
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.text.messages import read_record
from vlm_lit.text.record_forms import COLUMN_ROLES
from vlm_lit.text.record_forms import CONTENT_KEYS
from vlm_lit.text.record_forms import FORMS
from vlm_lit.text.record_forms import check_columns
from vlm_lit.text.record_forms import find_form
from vlm_lit.text.record_forms import name_columns
from vlm_lit.text.record_forms import pair_turns
from vlm_lit.text.record_forms import parse_columns
from vlm_lit.text.record_forms import to_conversation

def setup_module():
    global A, CAPTION, CHAT, IQ, PAIR, Q, TABLE
    Q = {"from": "human", "value": "What?"}
    IQ = {"from": "human", "value": "<image>\nWhat?"}
    A = {"from": "gpt", "value": "A box."}
    CAPTION = {"from": "human", "value": "<image>"}
    CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A box."}]
    PAIR = {"user": "What?", "assistant": "A box."}
    TABLE = [  # row as its file has it, form, record without its id
        ({"conversations": [Q, A]}, "conversations", {"conversations": [Q, A]}),
        (
            {"conversations": {"from": ["human", "gpt"], "value": ["What?", "A box."]}},
            "conversations",
            {"conversations": [Q, A]},
        ),
        ({"conversations": [], "messages": CHAT}, "messages", {"conversations": [Q, A]}),
        ({"messages": CHAT, "texts": [], "question": ""}, "messages", {"conversations": [Q, A]}),
        (
            {"image": "x", "texts": [PAIR]},
            "texts of user and assistant",
            {"image": "x", "conversations": [IQ, A]},
        ),
        (
            {"images": ["x"], "texts": [PAIR, {**PAIR, "source": "s"}]},
            "texts of user and assistant",
            {"image": "x", "conversations": [IQ, A, Q, A]},
        ),
        ({"texts": PAIR}, "texts of user and assistant", {"conversations": [Q, A]}),
        (
            {"texts": [{**PAIR, "why": "b"}]},
            "texts of user and assistant",
            {"conversations": [Q, A], "ignored": ["texts.why"]},
        ),
        (
            {"image": "x", "question": "What?", "answer": "A box."},
            "question and answer",
            {"image": "x", "conversations": [IQ, A]},
        ),
        (
            {"image": "x", "question": "<image>\nWhat?", "answer": "A box."},
            "question and answer",
            {"image": "x", "conversations": [IQ, A]},
        ),
        (
            {"question": "What?", "answer": "A box.", "hint": "red"},
            "question and answer",
            {"conversations": [Q, A], "ignored": ["hint"]},
        ),
        (
            {"question": "What?", "answer": "A box.", "system": "Be brief."},
            "question and answer",
            {"conversations": [{"from": "system", "value": "Be brief."}, Q, A]},
        ),
        (
            {"images": ["x"], "prompt": "What?", "completion": "A box."},
            "prompt and completion",
            {"image": "x", "conversations": [IQ, A]},
        ),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:]},
            "prompt and completion",
            {"conversations": [Q, A]},
        ),
        (
            {"prompt": CHAT[:1], "completion": "A box."},
            "prompt and completion",
            {"conversations": [Q, A]},
        ),
        (
            {"image": "x", "caption": "A box."},
            "image and caption",
            {"image": "x", "conversations": [CAPTION, A]},
        ),
        (
            {"image": "x", "text": "A box."},
            "image and text",
            {"image": "x", "conversations": [CAPTION, A]},
        ),
        (
            {"images": ["x", "y"], "text": "A box.", "type": "t", "source": "s"},
            "image and text",
            {
                "image": ["x", "y"],
                "conversations": [{"from": "human", "value": "<image>\n<image>"}, A],
                "type": "t",
                "source": "s",
            },
        ),
    ]

def test_tags_stand_before_the_first_question():
    pairs = [("What?", "A box."), ("Where?", "On the table.")]
    watch = ["tags", "[t['value'] for t in turns]"]
    with Breakpoint(pair_turns, at="return turns", watch=watch) as bp:
        pair_turns(pairs, 2)
    values = ["<image>\n<image>\nWhat?", "A box.", "Where?", "On the table."]
    bp.expect({"[t['value'] for t in turns]": values}, tags="<image>\n<image>\n")

def test_the_first_form_is_taken_and_the_rest_named():
    row = {"image": "x.png", "question": "What?", "answer": "A box.", "caption": "A red box."}
    with Breakpoint(to_conversation, at="keys, make = FORMS", watch="form") as bp:
        record = read_record(to_conversation(row))
    bp.expect(form="question and answer")
    for key, value in record.items(): print(f"{key}: {value}")
    test_eq(record["ignored"], ["caption"])

def test_a_displaced_column_is_named():
    row = {"q": "What?", "answer": "Box.", "long_answer": "A red box."}
    at, columns = "named = {", {"question": "q", "answer": "long_answer"}
    with Breakpoint(name_columns, at=at, watch="unused kept") as bp:
        name_columns(row, columns)
    bp.expect(unused=["answer"], kept={})
    wanted = {"question": "What?", "answer": "A red box.", "ignored": ["answer"]}
    bp.expect_return(result=wanted)

def test_a_misspelled_column_would_lose_every_image():
    row = {"question": "What?", "answer": "A box.", "img": "x.png"}
    named = name_columns({**row, "imgg": None}, {"image": "imgg"})  # as if the column were there
    for key, value in read_record(to_conversation(named)).items():
        print(f"{key}: {value}")
    wanted = "no column 'imgg'; there are: 'question', 'answer', 'img'"
    with Breakpoint(name_columns, at="if missing:", watch="missing") as bp:
        with expect_fail(DataError, contains=wanted):
            name_columns(row, {"image": "imgg"})
    bp.expect(missing=["imgg"])

def test_every_form_becomes_its_record():
    for row, form, wanted in TABLE:
        test_eq(find_form(row), form)
        test_eq(read_record(to_conversation(row, 3), 3), {"id": 3, **wanted})
        # the same columns under other names
        roles = {role: f"col {role}" for role in row if role in COLUMN_ROLES}
        renamed = {roles.get(key, key): value for key, value in row.items()}
        test_eq(read_record(to_conversation(name_columns(renamed, roles), 3), 3), {"id": 3, **wanted})
    test_eq({form for _, form, _ in TABLE}, set(FORMS))

def test_what_fits_no_form_says_what_it_has():
    both = {"q": "What?", "a": "A box."}
    wrong = [
        (both, "no form fits the columns 'q', 'a'; the nearest, 'question and answer', also needs"),
        ({"conversation": []}, "'conversation'; the nearest, 'conversations', also needs"),
        (
            {"image": "x", "captions": "A box."},
            "the nearest, 'image and caption', also needs 'caption'",
        ),
        ({"question": "q", "image": "x"}, "the nearest, 'question and answer', also needs 'answer'"),
        ({"question": "q", "answers": ["a"]}, "'question and answer', also needs 'answer': name"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "'prompt and completion', also needs"),
        ({}, "no form fits the columns none"),
        ({"caption": "A box."}, "'caption' without an image"),
        ({"text": "words"}, "'text' without an image"),
        ({"question": "q", "answer": 3}, "'answer' must be a text, got int"),
        ({"prompt": "q", "completion": {"a": 1}}, "'completion' must be a text, got dict"),
        ({"texts": [{"user": "q"}]}, "'texts' must be a list of {'user': text, 'assistant': text}"),
        ({"texts": "words"}, "'texts' must be a list of"),
        ({"texts": [{"user": "q", "assistant": None}]}, "'texts.assistant' must be a text"),
        ({"messages": {"role": ["user"], "content": []}}, "turns of unequal length"),
    ]
    for row, message in wrong:
        with expect_fail(DataError, contains="record 7: "):
            read_record(to_conversation(row, 7), 7)
        with expect_fail(DataError, contains=message):
            read_record(to_conversation(row, 7), 7)

def test_columns_are_checked():
    row = {"conversations": [Q, A], "caption": "c", "q": "What?", "answer": "A box.", "image": "x"}
    wanted = {"id": 1, "image": "x", "conversations": [IQ, A], "ignored": ["caption", "conversations"]}
    test_eq(read_record(to_conversation(name_columns(row, {"question": "q"})), 1), wanted)
    record = read_record(to_conversation(name_columns({**row, "img": "y"}, {"image": "img"})), 1)
    wanted = {"conversations": [Q, A], "ignored": ["answer", "caption", "image", "q"]}
    test_eq(record, {"id": 1, "image": "y", **wanted})
    test_eq(parse_columns("question=q, answer = a b"), {"question": "q", "answer": "a b"})
    test_eq(parse_columns(None), None)
    for text in ("question", "=q", "question=", "", "question=q,"):
        with expect_fail(ConfigError, contains="columns must be ROLE=NAME"):
            parse_columns(text)
    with expect_fail(ConfigError, contains="no role 'qestion'; did you mean 'question'?"):
        parse_columns("qestion=q")
    with expect_fail(ConfigError, contains="a role is there twice"):
        parse_columns("id=a,id=b")
    with expect_fail(ConfigError, contains="id must be the name of a column"):
        check_columns({"id": 3})

def test_no_text_of_a_row_is_lost():
    texts = st.sampled_from(["", "x", "<image>\ny", None])
    keys = st.sampled_from([*CONTENT_KEYS[3:], "image", "hint", "extra", "system"])

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.dictionaries(keys, texts, max_size=6), st.booleans())
    def check(row, is_named):
        columns = {"question": "extra"} if is_named and "extra" in row else {}
        try:
            record = read_record(to_conversation(name_columns(row, columns), 1), 1)
        except DataError: return
        said = "".join(turn["value"] for turn in record["conversations"])
        for key, value in row.items():
            if key == "image" and value: assert record["image"] == value
            elif value:
                assert value in said or key in record["ignored"], (key, record)

    check()
