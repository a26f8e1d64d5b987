"Derived from nbs/18_doctor.ipynb by `make tests`; edit the notebook, not this file."
import os, platform, shutil, warnings
from collections import Counter
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
import numpy as np, torch
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, ConfigError, DataError
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.text.templates import caption_form, get_template, is_caption_template, turn_frame
from vlm_lit.text.chat_templates import stop_text
from vlm_lit.text.sentinels import preprocess_multimodal, tokenizer_traits
from vlm_lit.text.labels import generation_ids, make_prompt, preprocess
from vlm_lit.debug.values import visible
from vlm_lit.data.dataset import TooLong
from vlm_lit.text.encode import bisect_failures, encode_records
from vlm_lit.text.sentinels import num_tokens_with_images
from vlm_lit.data.findings import ERRORS
import json, tempfile, textwrap
from pathlib import Path
import pytest
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.text import labels
from vlm_lit.data.mixture import Mixture
from vlm_lit.processor import VLMProcessor
from vlm_lit.images import sample_image
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.training.doctor import _KNOWN
from vlm_lit.training.doctor import _mask_problems
from vlm_lit.training.doctor import _problems_of
from vlm_lit.training.doctor import _sample
from vlm_lit.training.doctor import check_samples
from vlm_lit.training.doctor import environment_info
from vlm_lit.training.doctor import format_check
from vlm_lit.training.doctor import known_answers

def setup_module():
    global folder, make_records, processor, records, tok
    tok = load_tokenizer("gemma")
    def make_records(folder, n=40):
        "Records with one image, with two, and without; every tenth image is missing."
        for k in range(4): sample_image(60 + 10 * k, 50).save(folder / f"{k}.png")
        tags = ["<image>\n", "<image><image>\n", ""]

        def record(k):
            kind = 0 if k % 4 < 2 else k % 4 - 1
            one = f"{k % 4}.png" if k % 20 else "gone.png"
            shown = [{"image": one}, {"image": ["0.png", "1.png"]}, {}][kind]
            human = {"from": "human", "value": tags[kind] + "What is it?"}
            gpt = {"from": "gpt", "value": "a box " * (k % 7 + 1)}
            return {"id": f"r{k}", **shown, "conversations": [human, gpt]}

        return [record(k) for k in range(n)]
    folder = Path(tempfile.mkdtemp())
    processor = VLMProcessor(tok, template="gemma", image_size=28, image_size_aux=28)
    records = make_records(folder)

def test_stop_at_a_mask_without_eos():
    marks = {"marks": lambda marks: [*marks[:-1], -100]}
    with Breakpoint(_mask_problems, at="runs = _runs", watch="answers stop", set=marks) as bp:
        _problems_of(_KNOWN["one round"], VLMProcessor(tok, template="gemma"))
    answer = "the box chain purse black"
    wrong = f"{answer + '<end_of_turn>' + chr(10)!r} is supervised, expected "
    bp.expect(answers=[answer], stop="<end_of_turn>\n<eos>", hits=1)
    bp.expect_changed(result=([], [wrong + repr(answer + "<end_of_turn>\n<eos>")]))

def test_stop_at_a_mask_that_begins_early():
    early = {"runs": lambda runs: [(first - 1, end) for first, end in runs]}
    with Breakpoint(_problems_of, at="if not runs", watch="len(ids) len(given) runs", set=early) as bp:
        _problems_of(_KNOWN["one round"], VLMProcessor(tok, template="gemma"))
    law = "the ids before a generated answer differ at position 16: expected the end, got 108"
    bp.expect({"len(ids)": 25, "len(given)": 17, "runs": [(17, 25)]})
    bp.expect_changed(result=([], [law]))

def test_known_answers_are_right_for_every_template_the_tokenizer_serves():
    from vlm_lit.text.templates import conv_templates
    from vlm_lit.text.labels import check_tokenizer

    assert known_answers() == []
    tested = []
    for template in conv_templates:
        try: check_tokenizer(tok, template)
        except ConfigError: continue
        assert known_answers(VLMProcessor(tok, template=template)) == [], template
        tested.append(template)
    assert {"gemma", "plain", "default"} <= set(tested)

def test_known_answers_follow_a_chat_template():
    before = tok.chat_template
    template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    )
    wrong = template.replace("<start_of_turn>assistant", "<start_of_turn>model")
    try:
        assert known_answers(VLMProcessor(tok, template="hf", chat_template=template)) == []
        with pytest.raises(ConfigError, match="gives generation 'model"):
            VLMProcessor(tok, template="hf", chat_template=wrong)
    finally: tok.chat_template = before

def test_stop_at_a_failed_check():
    parts = (records, records[1:9])
    sources = [LazySupervisedDataset(own, processor, folder, uint8=True) for own in parts]
    mixture = Mixture(sources, ["captions", "dialogues"])
    with Breakpoint(check_samples, at="errors.append", watch="k i text.kind len(own)") as bp:
        found = check_samples(mixture, 32, max_fraction=0.1, name="train")
    assert found["counts"] == {"image_missing": 2} and found["checked"] == 32
    bp.expect_each({"i": [0, 20], "text.kind": ["image_missing"] * 2})

def test_known_answers_see_every_kind_of_wrong_mask():
    right, plain = labels.mask_prompt, VLMProcessor(tok, template="gemma")

    def found_with(change):
        labels.mask_prompt = lambda ids, segments: change(right(ids, segments), ids)
        try: return known_answers(plain)
        finally: labels.mask_prompt = right

    def early(marks, ids):
        moved, first = marks.copy(), np.flatnonzero((marks[1:] != -100) & (marks[:-1] == -100))
        moved[first] = ids[first]
        return moved

    for change in (
        early,
        lambda marks, ids: np.where(ids == 1, -100, marks),
        lambda marks, ids: np.where(ids == -200, ids, marks),
        lambda marks, ids: ids,
        lambda marks, ids: np.full_like(marks, -100),
        lambda marks, ids: np.roll(marks, 1),
    ):
        found = found_with(change)
        assert len(found) >= 4 and all("\n" not in line for line in found), change
        assert any("known answer" in line for line in found)
    assert found_with(lambda marks, ids: marks) == []

def test_known_answers_see_a_second_bos():
    from vlm_lit.training import doctor

    encode = doctor.encode_records

    def twice(*args):
        out = encode(*args)
        for own in out:
            for key, more in [("input_ids", 2), ("labels", -100), ("segments", 1)]:
                own[key] = torch.cat([own[key][:5], torch.tensor([more]), own[key][5:]])
        return out

    doctor.encode_records = twice
    try: found = doctor.known_answers(VLMProcessor(tok, template="gemma"))
    finally: doctor.encode_records = encode
    assert any("2 BOS tokens, expected 1" in line for line in found)

def test_every_source_is_sampled_alike():
    parts = (records, records[1:9])
    mixture = Mixture([LazySupervisedDataset(own, processor, folder, uint8=True) for own in parts])
    from vlm_lit.training.doctor import _sample

    chosen = _sample(mixture, 20, 0)
    assert sum(i >= 40 for i in chosen) == 8 and len(chosen) == len(set(chosen)) == 20
    assert chosen == _sample(mixture, 20, 0) != _sample(mixture, 20, 1)
    assert _sample(mixture, 1000, 0) == list(range(48)) and len(_sample(mixture, 3, 0)) == 3

def test_check_counts_what_is_there_and_names_what_is_wrong():
    data = Mixture([LazySupervisedDataset(records, processor, folder, uint8=True)])
    found = check_samples(data, 40, 0.05, name="train")
    counts = [found[key] for key in ("records", "one_image", "several_images", "text_only")]
    assert counts == [40, 20, 10, 10]
    assert found["counts"] == {"image_missing": 2} and found["checked"] == 40
    assert found["images"] == 18 + 2 * 10
    texts = [text for i, text in enumerate(data.datasets[0].texts(range(40))) if i % 20]
    lengths = [num_tokens_with_images(text["input_ids"], 4) for text in texts]
    assert (found["tokens"]["min"], found["tokens"]["max"]) == (min(lengths), max(lengths))
    supervised = sum(int((text["labels"] != -100).sum()) for text in texts)
    assert found["supervised_tokens"] == supervised
    json.dumps(found)
    text = format_check(found)
    counts = "40 records: 20 with one image, 10 with several, 10 text only"
    assert text.startswith(f"train: {counts}; 40 looked at, 38 images")
    assert "2 problems" in text and "record 'r0'" in text
    with pytest.raises(DataError, match=r"record 'r0'.*2 of 40 .*image_missing 2") as caught:
        check_samples(data, 40)
    assert caught.value.kind == "image_missing"
    assert check_samples(data, 40, strict=False)["counts"] == {"image_missing": 2}
    blank = Mixture([LazySupervisedDataset(records, processor, folder, blank_images=True, uint8=True)])
    assert check_samples(blank, 40)["images"] == 0
    hints = [{**record, "hint": "look left"} for record in records[1:4]]
    found = check_samples(
        Mixture([LazySupervisedDataset(hints, processor, folder, uint8=True)]), 9, 0.9
    )
    assert found["ignored"] == {"hint": 3}
    assert "  'hint' holds text in 3 and is not read" in format_check(found).splitlines()

def test_check_names_kinds_as_the_audit_does():
    from vlm_lit.data.audit import audit
    from vlm_lit.data.findings import AuditSettings

    human, gpt = records[1]["conversations"]
    bad = [
        {**records[1], "id": "tags", "image": ["0.png", "1.png"]},
        {**records[1], "id": "roles", "conversations": [gpt]},
        {**records[1], "id": "control", "conversations": [human, {**gpt, "value": "<eos>"}]},
        {**records[1], "id": "open", "conversations": [human]},
        {**records[1], "id": "gone", "image": "gone.png"},
        {"id": "none"},
    ]
    found = check_samples(
        Mixture([LazySupervisedDataset(bad, processor, folder, uint8=True)]), 10, strict=False
    )
    want = ["tags", "roles", "control_tokens", "nothing_supervised", "image_missing"]
    assert [row["kind"] for row in found["problems"]][:5] == want
    assert len(found["problems"]) == 6

def test_overlength_is_an_error_where_the_settings_say_so():
    short = Mixture([LazySupervisedDataset(records, processor, folder, max_length=24, uint8=True)])
    with pytest.raises(DataError, match="overlength is 'error'.*over_length") as caught:
        check_samples(short, 40, 0.9)
    limits = dict(max_length=24, uint8=True)
    skip = Mixture([LazySupervisedDataset(records, processor, folder, overlength="skip", **limits)])
    texts = short.datasets[0].tokenize(range(40))
    lengths = [num_tokens_with_images(text["input_ids"], 4) for text in texts]
    found = check_samples(skip, 40, 0.1)
    assert found["skipped"] == sum(n > 24 for n in lengths) > 1
    assert set(found["counts"]) <= {"image_missing"}
    assert f"{found['skipped']} too long, skipped" in format_check(found)
    cut = LazySupervisedDataset(records, processor, folder, overlength="truncate", **limits)
    truncate = Mixture([cut])
    assert check_samples(truncate, 40, 0.9)["tokens"]["max"] <= 24

def test_environment_names_versions_and_no_place():
    import getpass, importlib.metadata, platform

    info = environment_info(folder)
    assert info["torch"] == importlib.metadata.version("torch")
    assert info["python"] == platform.python_version()
    assert all(isinstance(value, str) and value for value in info.values())
    text = json.dumps(info)
    assert str(folder) not in text and str(Path.home()) not in text and "GiB free" in info["disk"]
