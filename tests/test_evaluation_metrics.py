"Derived from nbs/12b_metrics.ipynb by `make tests`; edit the notebook, not this file."
import importlib.util, math, re, unicodedata
from collections import Counter
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
    (folder / "broken.py").write_text("import nothing_like_this\n")
    mine = load_metric(f"{folder}/my.py:score")
    print(mine("seven", "six", {"id": 1}), load_metric("anls") is anls, load_metric(mine) is mine)
    test_eq((mine("seven", "six", {}), load_metric("exact")("a", "a")), (2, 1.0))
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
