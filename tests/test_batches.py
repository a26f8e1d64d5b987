"Derived from nbs/08_batches.ipynb by `make tests`; edit the notebook, not this file."
from dataclasses import dataclass
import numpy as np, torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN_INDEX, ConfigError, DataError
from pathlib import Path
import tempfile
from collections import Counter
from fastcore.test import test_eq, expect_fail
from vlm_lit.core import peek
from vlm_lit.dataset import LazySupervisedDataset
from vlm_lit.images import sample_image
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.batches import *

def setup_module():
    global collate, ds, folder, record, records, tok
    tok = load_tokenizer("gemma")
    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder/"a.png")
    sample_image(90, 200).save(folder/"b.png")
    def record(name, image, *texts): return {"id": name, **({"image": image} if image else {}), "conversations": [{"from": ("human", "gpt")[n % 2], "value": t} for n,t in enumerate(texts)]}
    records = [record(0, "a.png", "What is it?\n<image>", "a box"), record(1, None, "hi", "hello there"),
               record(2, ["b.png", "a.png"], "<image> or <image>?", "the second"), record(3, "a.png", "<image>\nwhat colour?", "black")]
    ds = LazySupervisedDataset(records, tok, image_folder=folder, image_size_aux=64, image_size=32).preload()
    collate = DataCollatorForSupervisedDataset(tok.pad_token_id)

def test_batch_is_padded_and_pictures_are_kept_once():
    batch = collate([ds[i] for i in range(4)])
    lengths = [len(ds[i]["input_ids"]) for i in range(4)]
    test_eq(batch["attention_mask"].sum(1).tolist(), lengths)
    test_eq(batch["image_index"].tolist(), [0, 1, 2, 0])       # sample 0, the two of sample 2, sample 3 shows what sample 0 showed
    test_eq(tuple(batch["images"].shape), (3, 3, 32, 32))
    for i,n in enumerate(lengths):
        assert torch.equal(batch["input_ids"][i, :n], ds[i]["input_ids"]) and torch.equal(batch["labels"][i, :n], ds[i]["labels"])
        assert (batch["input_ids"][i, n:] == tok.pad_token_id).all() and (batch["labels"][i, n:] == IGNORE_INDEX).all()
    for n,(i,k) in enumerate([(0, None), (2, 0), (2, 1), (3, None)]):
        image = ds[i]["image"] if k is None else ds[i]["image"][k]
        assert torch.equal(batch["images"][batch["image_index"][n]], image)

def test_batch_without_pictures_has_no_image_keys():
    test_eq(sorted(collate([ds[1], ds[1]])), ["attention_mask", "input_ids", "labels"])
    assert "image_index" not in collate([ds[2]])

def test_mask_from_lengths_keeps_real_eos():
    pads_with_eos = DataCollatorForSupervisedDataset(pad_token_id=tok.eos_token_id)
    batch = pads_with_eos([ds[0], ds[1]])
    naive = batch["input_ids"] != tok.eos_token_id
    print("real tokens hidden by the naive mask:", int((batch["attention_mask"] & ~naive).sum()))
    test_eq(int((batch["attention_mask"] & ~naive).sum()), 2)     # one <eos> in each sample

def test_sentinel_without_picture_is_refused():
    lost = {k: v for k,v in ds[0].items() if not k.startswith("image")}
    with expect_fail(DataError, contains="sample 0 of the batch has 1 image sentinel(s) in input_ids for 0 image(s)"): collate([lost])
    spare = {**ds[1], "image": ds[0]["image"], "image_aux": ds[0]["image_aux"]}     # one picture too many: the totals agree, the samples do not
    with expect_fail(DataError, contains="sample 0"): collate([lost, spare])

def test_every_record_once_an_epoch_and_groups_share_a_key():
    keys = list("aaaaabbbcc")
    sampler = StepBatchSampler(keys, groups_per_batch=2, group_size=2, seed=0, stop=6)
    test_eq(sampler.steps_per_epoch, 3)
    for epoch in (0, 1): test_eq(sorted(i for step in range(3*epoch, 3*epoch+3) for i in sampler.batch(step)), list(range(10)))
    assert all(len({keys[i] for i in group}) == 1 and len(group) <= 2 for group in epoch_groups(keys, 2, 0, 0))
    assert epoch_groups(keys, 2, 0, 0) != epoch_groups(keys, 2, 0, 1)      # another epoch, another order

def test_sampler_can_start_anywhere():
    whole = list(StepBatchSampler(range(23), 5, seed=7, stop=12))
    late = list(StepBatchSampler(range(23), 5, seed=7, start=4, stop=12))
    test_eq(late, whole[4:])
    test_eq(Counter(i for batch in whole[:5] for i in batch), Counter(range(23)))
    assert whole != list(StepBatchSampler(range(23), 5, seed=8, stop=12))
    with expect_fail(ConfigError, contains="no records"): StepBatchSampler([], 5)
    with expect_fail(ConfigError, contains="at least 1"): StepBatchSampler([1], 0)
