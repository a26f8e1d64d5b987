"Derived from nbs/13_evaluation.ipynb by `make tests`; edit the notebook, not this file."
import re
from collections import Counter
import torch
from rich.console import Console
from rich.progress import track
from vlm_lit.core import IGNORE_INDEX, ConfigError, DataError
from vlm_lit.dataset import COLORS, SHAPES
from vlm_lit.generation import generate_ids
from vlm_lit.model import VLM
import json
from pathlib import Path
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.dataset import LazySupervisedDataset, easy_vqa_folder, easy_vqa_questions, easy_vqa_records
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.weights import ids_in_use, make_model, tiny_config
from vlm_lit.evaluation import *

def setup_module():
    global results
    results = next(p for p in (Path("../benchmarks/results"), Path("benchmarks/results")) if p.is_dir())

def test_table_counts_by_kind():
    test_eq(accuracy_table(["Blue", "circle", "yes", "yes"], ["blue", "triangle", "yes", "no"]), {"accuracy": .5, "color": 1., "shape": 0., "yes_no": .5, "n": 4})
    test_eq([normalised(t) for t in (" A blue  circle. ", "no")], ["a blue circle", "no"])
    with expect_fail(ConfigError, contains="1 predictions for 2 questions"): accuracy_table(["a"], ["a", "b"])

def test_majority_answer_is_right_for_a_third():
    train_answers, test_answers = [[a for _,a,_ in easy_vqa_questions(split)] for split in ("train", "test")]
    table = accuracy_table([majority_answer(train_answers)]*len(test_answers), test_answers)
    test_eq((round(table["accuracy"], 3), table["color"], table["shape"], table["n"]), (0.373, 0., 0., 9673))
    test_eq(majority_answer(["b", "a", "b", "a", "c"]), "a")

def test_question_ends_where_the_answer_begins():
    tok = load_tokenizer("gemma")
    ds = LazySupervisedDataset(easy_vqa_records("test", 2)[:40], tok, image_folder=easy_vqa_folder(), image_size_aux=64, image_size=32).preload()
    cut = cut_before_answer(ds[0])
    print(repr(tok.decode(cut["input_ids"][5:])), "->", repr(ds.records[0]["conversations"][1]["value"]))
    assert tok.decode(cut["input_ids"][5:]).endswith("<start_of_turn>model\n")
    model = make_model(tiny_config(ids_in_use(ds), (.5,)*3, (.2,)*3), seed=0).eval()
    table, predictions = evaluate(model, ds, show=False)
    test_eq((table["n"], len(predictions)), (40, 40))
    assert table["accuracy"] < .6              # it has learned nothing

def test_predictions_do_not_depend_on_the_expected_answers():
    tok = load_tokenizer("gemma")
    records = easy_vqa_records("test", 2)[:12]
    other = [{**r, "conversations": [r["conversations"][0], {"from": "gpt", "value": "yellow"}]} for r in records]
    sets = [LazySupervisedDataset(r, tok, image_folder=easy_vqa_folder(), image_size_aux=64, image_size=32) for r in (records, other)]
    model = make_model(tiny_config(ids_in_use(*sets), (.5,)*3, (.2,)*3), seed=0).eval()
    predictions = [predict(model, ds, show=False) for ds in sets]
    print("same predictions:", predictions[0] == predictions[1])
    test_eq(*predictions)

def test_kept_run_is_better_than_its_baselines():
    kept = json.loads((results/"easy_vqa_tiny.json").read_text())
    assert kept["test"]["n"] == 9673 and kept["test"]["accuracy"] >= .99 and min(kept["test"][k] for k in ("color", "shape", "yes_no")) > .985
    assert kept["baselines"]["untrained"] < kept["baselines"]["majority"] < kept["baselines"]["blind"] < .7
    assert kept["train_seconds"] < 360
    questions = {split: easy_vqa_questions(split) for split in ("train", "test")}
    test_eq(len({q for q,_,_ in questions["train"]}), 107)                               # "about a hundred different questions"
    assert {q for q,_,_ in questions["test"]} <= {q for q,_,_ in questions["train"]}       # "all of which occur in training"
    assert .7 < sum(a in ("yes", "no") for _,a,_ in questions["test"])/9673 < .75           # "almost three quarters"
    red = [a for q,a,_ in questions["train"] if q == "is there not a red shape?"]
    assert red.count("yes")/len(red) > .8                                                 # "mostly answered yes"
