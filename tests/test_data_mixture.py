"Derived from nbs/08c_mixture.ipynb by `make tests`; edit the notebook, not this file."
import zlib
from collections.abc import Sequence
from functools import cached_property
import numpy as np, torch
from torch.utils.data import Dataset
from vlm_lit.text.messages import image_names
from vlm_lit.data.samplers import mixture_draws
import tempfile
from pathlib import Path
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.processor import VLMProcessor
from vlm_lit.images import sample_image
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.data.mixture import Mixture

def setup_module():
    global captions, folder, make, mixture, processor, questions, tok, turns
    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder / "a.png")
    sample_image(120, 90).save(folder / "b.png")
    def turns(question, answer, tag="<image>\n"):
        return [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
    captions = [{"id": "c0", "image": "a.png", "conversations": turns("Describe it.", "a box")}]
    questions = [
        {"id": "q0", "image": "b.png", "conversations": turns("What is it?", "a chain")},
        {"id": "q1", "image": "b.png", "conversations": turns("Which color?", "black")},
        {"id": "q2", "conversations": turns("Hello", "Hi", tag="")},
    ]
    tok = load_tokenizer("gemma")
    processor = VLMProcessor(tok, image_size=56, image_size_aux=112)
    make = lambda data: LazySupervisedDataset(data, processor, folder, uint8=True)
    mixture = Mixture([make(captions), make(questions)], ["captions", "questions"], weight=[1, 3])

def test_a_batch_is_fetched_source_by_source():
    with Breakpoint(Mixture.__getitems__, at="if own:", watch="pairs k own") as bp:
        samples = mixture.__getitems__([(0, 0), (0, 3), (0, 1)])
    for sample in samples:
        print(sample["id"], sample["index"], sample["source_index"])
    print("lengths", mixture.lengths.tolist(), "draws per epoch", mixture.draws.counts)
    assert [s["id"] for s in samples] == ["captions: c0", "questions: q2", "questions: q0"]
    bp.expect_each(k=[0, 1], own=[[0], [2, 0]])

def test_flips_are_drawn_from_seed_epoch_and_name():
    flipping = Mixture([make(questions)], hflip_prob=0.5)
    watch = ["epoch", "names", "flips"]
    with Breakpoint(Mixture._flipped, at="pairs = zip", watch=watch) as bp:
        for epoch in range(5): flipping[(epoch, 0)]
    bp.expect_each(flips=[[True], [False], [False], [True], [False]], names=[["b.png"]] * 5)

def test_a_resumed_run_that_counts_from_zero_flips_otherwise():
    def flipped_in(epoch):
        with Breakpoint(Mixture._flipped, at="pairs = zip", watch="epoch flips") as bp:
            Mixture([make(questions)], hflip_prob=0.5)[(epoch, 0)]
        return bp

    diff = flipped_in(1).diff(flipped_in(0), titles=("the first run", "resumed, counted from 0"))
    diff.expect({"epoch": (1, 0), "flips[0]": (False, True)})

def test_flips_follow_seed_epoch_and_image():
    for p, want in [(0.0, 0), (1.0, 200), (0.5, None)]:
        flipping = Mixture([make(questions)], hflip_prob=p)
        plain = make(questions)[0]["image_aux"]
        first, second = ([flipping[(e, i)]["image_aux"] for e in range(20)] for i in (0, 1))
        n = sum(torch.equal(image, plain.flip(-1)) for image in first)
        assert all(map(torch.equal, first, second))
        least, most = {0.0: (0, 0), 1.0: (20, 20), 0.5: (4, 16)}[p]
        assert least <= n <= most

def test_questions_about_one_image_share_its_memory():
    two = Mixture([make(questions)], hflip_prob=1.0).__getitems__([(0, 0), (0, 1)])
    assert two[0]["image_aux"].data_ptr() == two[1]["image_aux"].data_ptr()

def test_records_are_found_in_their_source():
    assert [mixture.place(i) for i in range(4)] == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert mixture.name(2) == "questions: q1" and mixture.record(2)["id"] == "q1"
    capped = Mixture([make(captions), make(questions)], weight=[1, 1], max_samples=[1, 2], seed=3)
    assert len(capped.kept) == 3
    assert set(capped.draws.order(3, 0)) <= set(capped.kept)
    assert mixture.kept.tolist() == [0, 1, 2, 3]
    assert mixture.keys[1] == mixture.keys[2] != mixture.keys[0]
    assert mixture.has_image.tolist() == [True] * 3 + [False]
    assert Mixture([make(captions)]).name(0) == "c0"
