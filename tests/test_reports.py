"Derived from nbs/15_reports.ipynb by `make tests`; edit the notebook, not this file."
import base64, copy, html, io
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
import torch
from matplotlib.figure import Figure
from PIL import Image
from vlm_lit.core import describe
from vlm_lit.breakpoints import Breakpoint
from vlm_lit.tokenizer import adds_bos, prepare_tokenizer, special_tokens
from vlm_lit.templates import render
from vlm_lit.sentinels import join_chunks, preprocess_multimodal
from vlm_lit.labels import LabelStrip, fill_template, preprocess
from vlm_lit.images import open_image
from vlm_lit.dataset import LazySupervisedDataset, image_names
import tempfile
from fastcore.test import test_eq, expect_fail
import matplotlib.pyplot as plt
from vlm_lit.core import DataError
from vlm_lit.dataset import easy_vqa_folder, easy_vqa_records
from vlm_lit.images import sample_image
from vlm_lit.audit import AuditSettings, audit
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.reports import *

def setup_module():
    global asked, audited, doubtful, ds, folder, report, seed, tok
    tok = load_tokenizer("gemma")
    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder/"photo.png")
    seed = {"id": "seed", "image": "photo.png", "conversations": [{"from": "human", "value": "What is in the photo?\n<image>"}, {"from": "gpt", "value": "the box chain purse black"}]}
    ds = LazySupervisedDataset([seed], tok, image_folder=folder)
    audited = Path(tempfile.mkdtemp())
    sample_image(64, 48).save(audited/"a.png")
    def asked(n, question, answer="a box", **more): return {"id": n, **more, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    doubtful = [asked(k, "<image>\nWhat is it?", "a box, " * (k % 5 + 1), image="a.png") for k in range(18)] + [asked("<script>alert(1)</script>", "x<eos>"), asked(19, "<image>\nq", image="gone.png")]
    report = audit(doubtful, load_tokenizer("gemma"), AuditSettings(image_folder=audited, batch_size=4))

def test_walk_passes_every_stop_once_and_changes_nothing():
    seen, item = walk_record(ds, 0)
    test_eq([len(bp.hits) for _,bp in seen], [1]*len(WALK))
    by_title = {stop.title: bp for stop,bp in seen}
    test_eq(by_title["join_chunks: what was tokenized, each side by itself"]["prompt_chunks"][0], [2, 106, 1645, 108])
    test_eq(by_title["preprocess: the empty conversation"]["conv"].messages, [])
    test_eq(len(by_title["preprocess: the conversation with its messages"]["conv"].messages), 2)
    plain = ds[0]
    assert all(torch.equal(plain[k], item[k]) for k in plain)     # stopped or not, the same item
    text_only = LazySupervisedDataset([{"id": 1, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}], tok, image_folder=folder)
    assert all(len(bp.hits) == 1 for _,bp in walk_record(text_only, 0)[0])

def test_walk_text_holds_the_values_of_the_seed():
    text = "\n".join(walk_lines(ds, 0))
    for words in ["pad: ('<pad>', 0)", "prepare_tokenizer('gemma'): nothing", "(3, 768, 768)", "'What is in the photo?\\n<image>'", "'<image>\\nWhat is in the photo?'",
                  "messages=[], offset=0, sep_style=<SeparatorStyle.GEMMA: 7>", "{'human': 'user', 'gpt': 'model'}", "[[2, 106, 1645, 108], [2, 108, 1841,",
                  "len(input_ids) = 25", "(3, 336, 336)", "8 of 25 tokens learned"]: assert words in text, words

def test_walk_of_a_broken_record_raises_its_error():
    import sys
    broken = LazySupervisedDataset([{**seed, "image": "gone.png"}], tok, image_folder=folder)
    before = sys.gettrace()
    with expect_fail(DataError, contains="record 'seed': no image 'gone.png'"): walk_record(broken, 0)
    assert sys.gettrace() is before

def test_curves_have_a_line_for_each_stage():
    rows = [{"stage": s, "step": 10*n, "loss": 2./n, "learning_rate": 1e-3} for s in ("captions", "questions") for n in range(1, 8)]
    figure = plot_curves(rows)
    test_eq([t.get_text() for t in figure.axes[0].get_legend().get_texts()], ["captions", "questions"])
    test_eq(len(figure.axes[0].lines), 4)
    test_eq(running_mean([1., 3., 5.], 2), [1., 2., 4.])

def test_wrong_answers_come_first_up_to_half():
    test_eq(pick_samples([True]*20, 4), [0, 5, 10, 15])
    test_eq(pick_samples([False, True, False, True, True, True], 4), [0, 2, 1, 4])
    test_eq(len(pick_samples([False]*3 + [True]*1, 8)), 4)
    test_eq(pick_samples([False]*10, 4), [0, 2, 5, 7])

def test_audit_page_escapes_what_the_data_says():
    page = audit_page(report, "<Audit>")
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<title>&lt;Audit&gt;</title>" in page
    assert "NOT OK" in page and "image_missing" in page and "data:image/png;base64," in page
    assert page.count("<tr") == page.count("</tr>") == 1 + 2 + 1 + 7 + len(report["settings"])
    lines = audit_lines(report)
    assert lines[0] == report["verdict"] and any("control_tokens" in line for line in lines) and any("turn 0" in line for line in lines)
    assert not any("\x1b" in line for line in audit_lines({**report, "verdict": "\x1b[31m"}))
    assert "No findings." in audit_page(audit(doubtful[:3], load_tokenizer("gemma"), AuditSettings(image_folder=audited)))
