"Derived from nbs/08_batches.ipynb by `make tests`; edit the notebook, not this file."
import bisect
from dataclasses import dataclass
import numpy as np, torch
from torch.nn.utils.rnn import pad_sequence
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, ConfigError, DataError
import json, tempfile
from pathlib import Path
from collections import Counter
import matplotlib.pyplot as plt
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.core import peek
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.images import finish_images, grid_crops, make_square, rows_per_image, sample_image, to_bytes
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
    ds = LazySupervisedDataset(records, tok, image_folder=folder, image_size_aux=64, image_size=32).cache_in_memory()
    collate = DataCollatorForSupervisedDataset(tok.pad_token_id)

def test_packing_keeps_all_and_overfills_none():
    lengths = [5, 9, 3, 7, 2, 4, 8, 1]
    test_eq(len(pack_rows(lengths, 10)), 4)
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths, most = rng.integers(1, 60, rng.integers(1, 80)), int(rng.integers(60, 200))
        rows = pack_rows(lengths, most)
        test_eq(sorted(i for row in rows for i in row), list(range(len(lengths))))
        assert all(0 < lengths[row].sum() <= most for row in rows)
        assert sum(lengths[row].sum() <= most/2 for row in rows) <= 1            # two half-empty rows would have been one
        some = sorted(rng.choice(len(rows), (len(rows) + 1)//2, replace=False))  # the samples of some rows, packed again, make as many rows
        again = pack_rows(lengths[[i for r in some for i in rows[r]]], most)
        test_eq(sorted(len(row) for row in again), sorted(len(rows[r]) for r in some))
    test_eq(expanded_length(torch.tensor([2, -200, 5, -200]), 576), 2 + 2*576)
    with expect_fail(DataError, contains="record 'long': the sample takes 11 positions, more than max_length 10"): pack_rows([3, 11], 10, ["short", "long"])
    with expect_fail(DataError, contains="record 1: "): pack_rows([3, 11], 10)

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

def test_collator_counts_what_the_model_would_have_to_wait_for():
    batch = DataCollatorForSupervisedDataset(tok.pad_token_id, image_rows=16)([ds[i] for i in range(4)])
    print("ids", tuple(batch["input_ids"].shape), "-> positions", batch["spliced_len"])
    test_eq((type(batch["spliced_len"]), batch["spliced_len"]), (int, len(ds[2]["input_ids"]) + 2*15))
    test_eq(batch["spliced_len"], max(expanded_length(row[mask], 16) for row,mask in zip(batch["input_ids"], batch["attention_mask"])))
    test_eq(DataCollatorForSupervisedDataset(0, image_rows=16)([ds[1]])["spliced_len"], len(ds[1]["input_ids"]))       # text only: nothing grows
    assert "spliced_len" not in collate([ds[0]])
    with expect_fail(ConfigError, contains="give image_rows"): DataCollatorForSupervisedDataset(0, max_length=84)

def test_bytes_and_crops_are_stacked():
    text = {"input_ids": torch.tensor([2, -200, 5]), "labels": torch.tensor([-100, -100, 5])}
    pair = {"input_ids": torch.tensor([2, -200, -200, 5]), "labels": torch.tensor([-100, -100, -100, 5])}
    picture = [to_bytes(make_square(sample_image(40 + n, 30), 64)) for n in range(3)]
    as_bytes = collate([{**text, "image_aux": picture[0]}, {**pair, "image_aux": torch.stack(picture[1:])}])
    peek(**as_bytes)
    test_eq(sorted(as_bytes), ["attention_mask", "images_aux", "input_ids", "labels"])
    assert torch.equal(as_bytes["images_aux"], torch.stack(picture)) and as_bytes["images_aux"].dtype == torch.uint8
    done = finish_images(torch.stack(picture), 32, image_grid=2, image_global=True)
    crops = collate([{**text, "image": done["images"][0], "image_aux": done["images_aux"][0]}, {**pair, "image": done["images"][1:], "image_aux": done["images_aux"][1:]}])
    test_eq((tuple(crops["images"].shape), tuple(crops["images_aux"].shape)), ((3, 5, 3, 32, 32), (3, 3, 64, 64)))
    assert torch.equal(crops["images"], done["images"])
    test_eq(collate([{**text, "image_aux": picture[0]}]*2)["image_index"].tolist(), [0, 0])      # bytes too are kept once
    listed = collate([{**text, "image_aux": picture[0]}, {**pair, "image_aux": [picture[1], picture[0]]}])
    test_eq((tuple(listed["images_aux"].shape), listed["image_index"].tolist()), ((2, 3, 64, 64), [0, 1, 0]))      # a list keeps each picture's memory
    with expect_fail(DataError, contains="of one kind and size"): collate([{**text, "image_aux": picture[0]}, {**text, "image_aux": done["images_aux"][0]}])
    with expect_fail(DataError, contains="of one kind and size"): collate([{**text, "image_aux": picture[0]}, {**text, "image": done["images"][0], "image_aux": picture[1]}])
    with expect_fail(DataError, contains="need `image` too"): collate([{**text, "image_aux": done["images_aux"][0]}])

def test_packed_batch_holds_every_sample_whole():
    packs = DataCollatorForSupervisedDataset(tok.pad_token_id, max_length=84, image_rows=rows_per_image(32, 8))
    batch = packs([ds[i] for i in range(4)])
    test_eq(len(batch["input_ids"]), len(pack_rows([expanded_length(ds[i]["input_ids"], 16) for i in range(4)], 84)))
    test_eq(batch["attention_mask"], batch["sample_ids"] > 0)
    found = [batch["input_ids"][r][batch["sample_ids"][r] == n].tolist() for r in range(len(batch["input_ids"])) for n in range(1, int(batch["sample_ids"][r].max()) + 1)]
    test_eq(sorted(found), sorted(ds[i]["input_ids"].tolist() for i in range(4)))
    order = [[ds[i]["input_ids"].tolist() for i in range(4)].index(ids) for ids in found]          # which sample stands where
    pictures = [image for i in order for image in flat_images([ds[i]], "image")]
    for n,k in enumerate(batch["image_index"].tolist()): assert torch.equal(batch["images"][k], pictures[n])
    assert ((batch["labels"] == batch["input_ids"]) | (batch["labels"] == IGNORE_INDEX)).all()
    test_eq(int((batch["labels"] != IGNORE_INDEX).sum()), sum(int((ds[i]["labels"][1:] != IGNORE_INDEX).sum()) for i in range(4)))
    test_eq(batch["spliced_len"], max(expanded_length(row[mask], 16) for row,mask in zip(batch["input_ids"], batch["attention_mask"])))
    assert max(expanded_length(ds[i]["input_ids"], 16) for i in range(4)) < batch["spliced_len"] <= 84      # of a row, not of a sample
    with expect_fail(DataError, contains="record 0: the sample takes"): DataCollatorForSupervisedDataset(0, 30, 16)([ds[2]])
    with expect_fail(DataError, contains="record 'long': the sample takes"): DataCollatorForSupervisedDataset(0, 30, 16)([{**ds[2], "id": "long"}])

def test_first_token_of_a_packed_sample_is_not_a_target():
    plain = {"input_ids": torch.tensor([2, 7, 8]), "labels": torch.tensor([2, 7, 8])}
    row = join_samples([plain, plain])
    test_eq((row["labels"].tolist(), row["sample_ids"].tolist()), ([-100, 7, 8, -100, 7, 8], [1, 1, 1, 2, 2, 2]))
    test_eq(plain["labels"].tolist(), [2, 7, 8])               # the sample itself is not touched

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
    with expect_fail(DataError, contains="record 'cat-17': sample 1 of the batch has 1 image sentinel(s) in input_ids for 0 image(s)"): collate([ds[0], {**lost, "id": "cat-17"}])
    test_eq(sorted(collate([{**ds[0], "id": "cat-17"}])), sorted(collate([ds[0]])))          # a name does not travel to the device

def test_info_counts_samples_in_the_order_of_their_supervised_tokens():
    samples = [{**ds[i], "index": i, "source_index": i % 2} for i in range(4)]
    for collate_own in (DataCollatorForSupervisedDataset(tok.pad_token_id, image_rows=16),
                        DataCollatorForSupervisedDataset(tok.pad_token_id, max_length=84, image_rows=16)):
        batch = collate_own(samples)
        info = batch["info"]
        targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
        expected = [s["labels"][1:][s["labels"][1:] != -100] for s in (samples[i] for i in info.indices)]
        assert torch.equal(targets, torch.cat(expected)) and info.n_supervised == [len(e) for e in expected]
        assert sorted(info.indices) == [0, 1, 2, 3] and info.sources == [i % 2 for i in info.indices]
        assert sum(info.n_images) == int((batch["input_ids"] == -200).sum())

def test_batch_of_skipped_samples_has_nothing_supervised():
    batch = DataCollatorForSupervisedDataset(tok.pad_token_id, image_rows=16)([])
    assert batch["input_ids"].shape == (1, 1) and (batch["labels"] == -100).all() and "info" not in batch
