"Derived from nbs/12b_metrics.ipynb by `make tests`; edit the notebook, not this file."
import importlib.util, math, re, unicodedata
from collections import Counter
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from vlm_lit.core import ConfigError
import tempfile
from fastcore.test import expect_fail, test_eq
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.evaluation.metrics import _edit_distance
from vlm_lit.evaluation.metrics import anls
from vlm_lit.evaluation.metrics import contains
from vlm_lit.evaluation.metrics import exact
from vlm_lit.evaluation.metrics import load_metric
from vlm_lit.evaluation.metrics import load_metrics
from vlm_lit.evaluation.metrics import majority_baseline
from vlm_lit.evaluation.metrics import question_only_baseline
from vlm_lit.evaluation.metrics import score_answers

def setup_module():
    global ASKED, MINE, TRAIN, folder
    folder = Path(tempfile.mkdtemp())
    MINE = "def score(prediction, answer, record):\n    return abs(len(prediction) - len(answer))\n"
    (folder / "my.py").write_text(MINE)
    TRAIN = [("how many dots?", "1"), ("how many dots?", "3"), ("How many dots?", "3")]
    TRAIN += [("is it dark?", "yes"), ("is it dark?", "no"), ("is it old?", "no")]
    ASKED = ["how many dots?", "is it dark?", "is it new?"]

def test_a_spelling_mistake_costs_its_share():
    with Breakpoint(anls, at="return 1 - distance", watch="a b distance") as bp:
        anls("recieve", "receive")
        anls("nothing", "no")
    bp.expect_each(distance=[2 / 7, 5 / 7], tolerance=1e-9)
    bp.expect_return(result=1 - 2 / 7, tolerance=1e-9)

def test_the_question_alone_suggests_its_answer():
    at = "return [best.get(normalize_answer"
    with Breakpoint(question_only_baseline, at=at, watch="best other", set={"best": {}}) as bp:
        question_only_baseline(TRAIN, ASKED)
    bp.expect(best={"how many dots?": "3", "is it dark?": "no", "is it old?": "no"}, other="3")
    bp.expect_changed(result=(["3", "no", "3"], ["3", "3", "3"]))

def test_metrics_at_their_edges():
    pairs = [(" A  blue\ncircle. ", "a blue circle"), ("cafe\u0301", "caf\u00e9"), ("", ""), ("a", "")]
    test_eq([exact(*pair) for pair in pairs], [1.0, 1.0, 1.0, 0.0])
    pairs = [("когда", "да"), ("да, конечно", "да"), ("这是一只猫", "猫"), ("café", "caf")]
    test_eq([contains(*pair) for pair in pairs], [0.0, 1.0, 1.0, 0.0])
    pairs = [("it costs $5", "$5"), ("", ""), ("a", ""), ("", "a")]
    test_eq([contains(*pair) for pair in pairs], [1.0, 1.0, 0.0, 0.0])
    pairs = [("", ""), ("a", ""), ("ab", "ax"), ("abc", "abx")]  # 0.5 is not below 0.5
    test_eq([anls(*pair) for pair in pairs], [1.0, 0.0, 0.0, 1 - 1 / 3])
    pairs = [("kitten", "sitting"), ("", "abc"), ("flaw", "lawn")]
    test_eq([_edit_distance(*pair) for pair in pairs], [3, 3, 2])

def test_metrics_by_name():
    from unittest.mock import patch

    (folder / "broken.py").write_text("import nothing_like_this\n")
    mine = load_metric(f"{folder}/my.py:score")
    print(mine("seven", "six", {"id": 1}), load_metric("anls") is anls, load_metric(mine) is mine)
    test_eq((mine("seven", "six", {}), load_metric("exact")("a", "a")), (2, 1.0))
    with patch("sys.dont_write_bytecode", False):
        load_metric(f"{folder}/my.py:score")
    assert not (folder / "__pycache__").exists()  # the folder is the user's
    for name, message in [
        ("accuracy", "unknown metric 'accuracy'; choose one of exact, contains, anls"),
        (f"{folder}/gone.py:score", "no file"),
        (f"{folder}/my.py:scores", "no function 'scores' in my.py"),
        (f"{folder}/my.py:__name__", "no function"),
        (f"{folder}/broken.py:score", "cannot be loaded (ModuleNotFoundError"),
    ]:
        with expect_fail(ConfigError, contains=message): load_metric(name)
    for metric, message in [
        (lambda p, a, r: r["gone"], "record 7: no score (KeyError"),
        (lambda p, a, r: float("nan"), "record 7: the score is nan"),
        (lambda p, a, r: None, "record 7: no score (TypeError"),
    ]:
        with expect_fail(ConfigError, contains=message):
            score_answers(metric, "a", "b", {"id": 7})

def test_metrics_of_single_answers():
    pairs = [("No.", "no"), ("I see no dots.", "no"), ("nothing", "no"), ("recieve", "receive")]
    pairs += [("12.5", "12")]
    test_eq([exact(*pair) for pair in pairs], [1.0, 0.0, 0.0, 0.0, 0.0])
    test_eq([contains(*pair) for pair in pairs], [1.0, 1.0, 0.0, 0.0, 1.0])
    # the period counts
    test_eq([round(anls(*pair), 3) for pair in pairs], [0.667, 0.0, 0.0, 0.714, 0.0])

def test_baselines_of_a_few_questions():
    test_eq(majority_baseline(TRAIN, ASKED), ["3"] * 3)  # "3" and "no" twice each
    test_eq(question_only_baseline(TRAIN, ASKED), ["3", "no", "3"])  # a tie, a new question

def test_metrics_of_one_name_are_kept_apart():
    from functools import partial

    for name in "ab":
        (folder / f"{name}.py").write_text(f"def score(p, a, r): return {ord(name)}\n")
    both = load_metrics([f"{folder}/a.py:score", f"{folder}/b.py:score", "exact"])
    test_eq(list(both), [f"{folder}/a.py:score", f"{folder}/b.py:score", "exact"])
    test_eq([score_answers(m, "x", "x", {"id": 1}) for m in both.values()], [97.0, 98.0, 1.0])
    test_eq(list(load_metrics([f"{folder}/a.py:score"])), ["score"])

    class Scorer:
        def __call__(self, prediction, answer, record): return record["gone"]

    half = partial(partial(exact), record=None)
    for metric, name in [
        (Scorer(), "Scorer"),
        (half, "exact"),
        (lambda p, a, r: r["gone"], "<lambda>"),
    ]:
        test_eq(list(load_metrics([metric])), [name])
    with expect_fail(ConfigError, contains="metric 'Scorer', record 7: no score (KeyError"):
        score_answers(Scorer(), "a", "b", {"id": 7})
    for twice in (["exact", "exact"], ["exact", half], [f"{folder}/a.py:score"] * 2, [Scorer()] * 2):
        with expect_fail(ConfigError, contains="is given twice"):
            load_metrics(twice)

def test_spellings_of_an_answer_are_one_answer():
    from hypothesis import given, settings, strategies as st

    spellings = {"yes": ["yes", "Yes.", " YES", "yes ."], "no": ["no", "No.", "NO "], "a b": ["A  b"]}
    answers = st.sampled_from([(key, text) for key, own in spellings.items() for text in own])

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(["q?", "Q?", "w"]), answers), min_size=1))
    def counted(data):
        train = [(question, text) for question, (_, text) in data]
        for make in (majority_baseline, question_only_baseline):
            [found] = make(train, ["q?"])
            own = [key for question, (key, _) in data if make is majority_baseline or question != "w"]
            own = own or [key for _, (key, _) in data]
            best = max(map(own.count, own))
            assert sum(exact(found, key) for key in own) == best
            assert found in [text.strip() for _, text in train]

    counted()
