"Derived from nbs/08c_mixture.ipynb by `make tests`; edit the notebook, not this file."
import zlib
from functools import cached_property
import numpy as np, torch
from torch.utils.data import Dataset
from vlm_lit.text.messages import image_names
from vlm_lit.data.samplers import mixture_draws
import tempfile
from pathlib import Path
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.images import sample_image
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.data.mixture import *

def setup_module():
    global captions, folder, make, mixture, questions, tok, turns
    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder/"a.png")
    sample_image(120, 90).save(folder/"b.png")
    turns = lambda question, answer: [{"from": "human", "value": f"<image>\n{question}"},
                                      {"from": "gpt", "value": answer}]
    captions = [{"id": "c0", "image": "a.png", "conversations": turns("Describe it.", "a box")}]
    questions = [{"id": "q0", "image": "b.png", "conversations": turns("What is it?", "a chain")},
                 {"id": "q1", "image": "b.png", "conversations": turns("Which color?", "black")},
                 {"id": "q2", "conversations": [{"from": "human", "value": "Hello"},
                                                {"from": "gpt", "value": "Hi"}]}]
    tok = load_tokenizer("gemma")
    make = lambda data: LazySupervisedDataset(data, tok, folder, image_size=56, image_size_aux=112,
                                              uint8=True)
    mixture = Mixture([make(captions), make(questions)], ["captions", "questions"], weight=[1, 3])

def test_flips_follow_seed_epoch_and_image():
    for p, want in [(0.0, 0), (1.0, 200), (0.5, None)]:
        flipping = Mixture([make(questions)], hflip_prob=p)
        plain = make(questions)[0]["image_aux"]
        n = sum(torch.equal(flipping[(e, 0)]["image_aux"], plain.flip(-1)) for e in range(20))
        same = sum(torch.equal(flipping[(e, 0)]["image_aux"], flipping[(e, 1)]["image_aux"]) for e in range(20))
        assert same == 20 and (n == 0 if p == 0 else n == 20 if p == 1 else 4 <= n <= 16)

def test_questions_about_one_image_share_its_memory():
    two = Mixture([make(questions)], hflip_prob=1.0).__getitems__([(0, 0), (0, 1)])
    assert two[0]["image_aux"].data_ptr() == two[1]["image_aux"].data_ptr()

def test_records_are_found_in_their_source():
    assert [mixture.place(i) for i in range(4)] == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert mixture.name(2) == "questions: q1" and mixture.record(2)["id"] == "q1"
    capped = Mixture([make(captions), make(questions)], weight=[1, 1], max_samples=[1, 2], seed=3)
    assert len(capped.kept) == 3 and set(capped.draws.order(3, 0)) <= set(capped.kept) and mixture.kept.tolist() == [0, 1, 2, 3]
    assert mixture.keys[1] == mixture.keys[2] != mixture.keys[0] and mixture.has_image.tolist() == [True]*3 + [False]
    assert Mixture([make(captions)]).name(0) == "c0"
