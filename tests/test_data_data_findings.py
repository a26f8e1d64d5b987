"Derived from nbs/13d_data_findings.ipynb by `make tests`; edit the notebook, not this file."
import bisect, hashlib, re
from collections import Counter
from dataclasses import dataclass
import numpy as np
from vlm_lit.core import IMAGE_TOKEN
from vlm_lit.data.image_findings import ImageFacts, image_kinds
import sys
from fastcore.test import test_eq
from vlm_lit.debug.breakpoints import Breakpoint
from small_parts import talk
from vlm_lit.data.data_findings import IMAGE
from vlm_lit.data.data_findings import NEAR
from vlm_lit.data.data_findings import RECORD
from vlm_lit.data.data_findings import by_source
from vlm_lit.data.data_findings import count_words
from vlm_lit.data.data_findings import data_findings
from vlm_lit.data.data_findings import hash64
from vlm_lit.data.data_findings import image_row
from vlm_lit.data.data_findings import leaks
from vlm_lit.data.data_findings import length_outliers
from vlm_lit.data.data_findings import near_places
from vlm_lit.data.data_findings import question_only
from vlm_lit.data.data_findings import record_row
from vlm_lit.data.data_findings import script_of

def setup_module():
    global facts, kinds_of, tables
    sys.path[:0] = ["../tests", "tests"]
    def facts(k, **more):
        "Facts of the k-th image: its own bytes, and a hash far from others."
        look = int(np.random.default_rng(k).integers(0, 2**63))
        return ImageFacts(**(dict(
            width=64, height=48, mode="RGB", is_turned=False, brightness=120.0, contrast=40.0,
            entropy=4.0, look=look, content=1000 + k,
        ) | more))
    def tables(entries):
        "Rows of records, each question, answer, image name, facts or None, and more keys."
        rows, images = [], []
        for n, (question, answer, name, seen, more) in enumerate(entries):
            record = {"id": n, "conversations": talk(question, answer), **more}
            keys = [name] if name else []
            rows.append(record_row(record, n, keys, 600, False))
            if seen: images.append(image_row(seen, name, n))
        return np.array(rows, RECORD), np.array(images, IMAGE)
    def kinds_of(entries):
        "Kind -> numbers of the records that have it."
        rows, images = tables(entries)
        found = data_findings(rows, images, by_source(rows))
        return {g.kind: g.numbers.tolist() for g in found if len(g.numbers)}

def test_stop_at_texts_that_are_compared():
    texts = ["<image>\nWhat is it?", "what  is it?\n<image>", "What is it ?", "What was it?"]
    with Breakpoint(record_row, at="hashes = ", watch="firsts") as bp:
        rows = [record_row({"id": 1, "conversations": talk(t)}, 0, [], 0, False) for t in texts]
    print([row[1] == rows[0][1] for row in rows])
    bp.expect({"firsts[0]": "what is it?", "firsts[1]": "a box"})
    assert [row[1] == rows[0][1] for row in rows] == [True, True, False, False]

def test_stop_where_near_hashes_are_compared():
    looks = np.array([0, 0b111, 0b1111, 2**64 - 1], np.uint64)
    with Breakpoint(near_places, at="first[some] = ", watch="quarter group.tolist() apart") as bp:
        print(near_places(looks))
    bp.expect({"quarter": 1, "group.tolist()": [0, 1, 2], "apart[0]": [0, 3, 4]}, hit=0)
    assert near_places(looks).tolist() == [0, 0, 1, 3]

def test_equal_hashes_are_not_enough():
    looks = np.array([0, 0b111, 0b1111], np.uint64)
    with Breakpoint(near_places, at="first = ", set={"looks": lambda v: v >> np.uint64(2)}) as bp:
        near_places(looks)
    bp.expect_changed({"result.tolist()": ([0, 0, 1], [0, 0, 0])})

def test_stop_where_a_question_is_answered_without_its_image():
    def rows_of(pairs):
        made = [
            record_row({"id": n, "conversations": talk(q, a)}, n, [f"{n}.png"], 600, False)
            for n, (q, a) in enumerate(pairs)
        ]
        return np.array(made, RECORD)

    pairs = [("color?", "red"), ("color?", "red"), ("shape?", "box"), ("shape?", "box")]
    pairs += [("color?", "red"), ("color?", "blue"), ("size?", "big"), ("age?", "red")]
    with Breakpoint(question_only, at="return len(asked), float", watch="len(names)") as bp:
        print(question_only(rows_of(pairs)))
    right = [True, True, False, True]  # the last question is new, and red is the most frequent answer
    bp.expect({"len(names)": 3, "(guess == asked['answer'])": right})

def test_each_finding_of_many_records_and_what_is_none():
    one = lambda n, **more: (f"question {n}", f"answer {n}", f"{n}.png", facts(n), more)
    clean = [one(n) for n in range(40)]
    test_eq(kinds_of(clean), {})
    long = "a very long answer of eight words indeed"
    table = {
        "duplicate_id": ([one(0, id=7), one(1, id=8), one(2, id=7)], [2]),
        "duplicate_record": ([one(0), one(1), one(0)], [2]),
        "image_duplicate": ([one(0), ("q", "a", "copy.png", facts(0), {})], [1]),
        "image_near_duplicate": (
            [one(0), ("q", "a", "b.png", facts(0, content=5, look=facts(0).look ^ 0b1011), {})],
            [1],
        ),
        "many_answers": ([("q", f"a {n}", "x.png", None, {}) for n in range(10)], [*range(10)]),
        "boilerplate": ([(f"q {n}", long, f"{n}.png", None, {}) for n in range(10)], [*range(10)]),
        "image_not_needed": (
            [(f"q {n % 3}", "yes", f"{n}", None, {}) for n in range(100)],
            [*range(100)],
        ),
    }
    for kind, (entries, numbers) in table.items():
        test_eq(kinds_of(entries), {kind: numbers})
    none = {
        "nine answers": [("q", f"a {n}", "x.png", None, {}) for n in range(9)],
        "short answers": [(f"q {n}", "yes", f"{n}.png", None, {}) for n in range(30)],
        "a few records": [(f"q {n % 3}", "yes", f"{n}", None, {}) for n in range(60)],
        "hashes 4 bits apart": [
            one(0), ("q", "a", "b.png", facts(0, content=5, look=facts(0).look ^ 0b1111), {})
        ],
        "blank images": [
            (f"q {n}", f"a {n}", f"{n}.png", facts(n, look=0, contrast=0.0), {}) for n in range(9)
        ],
        "text twice, two images": [("q", "a", f"{n}.png", facts(n), {}) for n in (1, 2)],
        "one image, many questions": [(f"q {n}", f"a {n}", "x.png", None, {}) for n in range(30)],
    }  # fmt: skip
    for name, entries in none.items():
        test_eq((name, kinds_of(entries)), (name, {}))
    same = [("q", "a", "a.png", facts(1), {}), ("q", "a", "b.png", facts(1), {})]
    test_eq(kinds_of(same), {"duplicate_record": [1], "image_duplicate": [1]})

def test_leaks_by_text_bytes_name_and_look():
    train = [
        ("q", "a", "a.png", facts(1), {}),  # the whole record
        ("new", "a", "b.png", facts(2), {}),  # the same file under another name
        ("new", "a", "c.png", facts(3, content=9, look=facts(3).look ^ 1), {}),  # looks like it
        ("new", "b", "d.png", None, {}),  # the same name, not opened here
        ("text", "only", None, None, {}),
        ("new", "text", None, None, {}),
        ("q", "a", "e.png", facts(4), {}),  # the same text about another image
    ]
    other = [
        ("Q ", "A", "x.png", facts(1), {}),
        ("q2", "a", "y.png", facts(2), {}),
        ("q3", "a", "z.png", facts(3), {}),
        ("q4", "a", "d.png", facts(5), {}),
        ("text", "only", None, None, {}),
    ]
    like = lambda groups: {g.kind: dict(zip(g.numbers.tolist(), g.like.tolist())) for g in groups}
    found = like(leaks(*tables(train), *tables(other)))
    test_eq(found, {"leak": {0: 0, 4: 4}, "leak_image": {1: 1, 2: 2, 3: 3}})
    named = [(q, a, name, None, more) for q, a, name, _, more in other]
    found = like(leaks(*tables(train), *tables(named)))
    test_eq(found, {"leak": {4: 4}, "leak_image": {3: 3}})
    backwards = like(leaks(*tables(train), *tables(other[::-1])))
    test_eq(backwards, {"leak": {0: 4, 4: 0}, "leak_image": {1: 3, 2: 2, 3: 1}})
    nothing = np.zeros(0, RECORD), np.zeros(0, IMAGE)
    assert not any(len(g.numbers) for g in leaks(*tables(train), *nothing))
    assert not any(len(g.numbers) for g in leaks(*nothing, *tables(train)))
    assert not any(len(g.numbers) for g in data_findings(*nothing, {}))

def test_near_places_finds_what_comparing_all_pairs_finds():
    from hypothesis import given, settings, strategies as st

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**64 - 1)), max_size=40))
    def holds(parts):
        base = [0, 0x0123456789ABCDEF, 2**64 - 1, 0xFFFF0000FFFF0000]
        sparse = [base[k] ^ (bits & bits >> 1 & bits >> 2 & bits >> 3) for k, bits in parts]
        looks = np.array(sparse, np.uint64)
        pairs = [[(a ^ b).bit_count() <= NEAR for b in sparse] for a in sparse]
        test_eq(near_places(looks).tolist(), [own.index(True) for own in pairs])

    holds()
    for kept in range(4):  # a bit differs in each of the other quarters
        other = sum(1 << 16 * quarter + 5 for quarter in range(4) if quarter != kept)
        test_eq(
            near_places(np.array([0x0123456789ABCDEF, 0x0123456789ABCDEF ^ other], np.uint64))[1], 0
        )

def test_scripts_and_outliers_and_words():
    pairs = {
        "a": "Latin",
        "ß": "Latin",
        "π": "Greek",
        "ж": "Cyrillic",
        "ש": "Hebrew",
        "न": "Devanagari",
    }
    pairs |= {"ไ": "Thai", "한": "Hangul", "の": "Kana", "\U00020000": "Han", "Ա": "other", "": "none"}
    pairs |= {"abc 日本語文字": "Han", "12": "none", "\ud83d": "none", "é1": "Latin"}
    test_eq({text: script_of(text) for text in pairs}, pairs)
    lengths = np.r_[np.full(99, 600), 0, 761, 760]
    test_eq(length_outliers(lengths).tolist(), [100])
    test_eq(length_outliers(lengths[3:]).tolist(), [])
    test_eq([count_words(t) for t in ("a b c", "", "四个汉字", "один два")], [3, 0, 3, 2])
    assert hash64("\ud83d") != hash64("\ud83e")
