"Derived from nbs/08_batches.ipynb by `make tests`; edit the notebook, not this file."
import bisect, zlib
from dataclasses import dataclass
import numpy as np, torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, ConfigError, DataError
import json, tempfile
from pathlib import Path
from collections import Counter
import matplotlib.pyplot as plt
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.core import peek
from vlm_lit.dataset import LazySupervisedDataset
from vlm_lit.images import finish_images, grid_crops, make_square, rows_per_image, sample_image, to_bytes
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.batches import *

def setup_module():
    global collate, ds, folder, mixed_lengths, record, records, tok
    tok = load_tokenizer("gemma")
    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder/"a.png")
    sample_image(90, 200).save(folder/"b.png")
    def record(name, image, *texts): return {"id": name, **({"image": image} if image else {}), "conversations": [{"from": ("human", "gpt")[n % 2], "value": t} for n,t in enumerate(texts)]}
    records = [record(0, "a.png", "What is it?\n<image>", "a box"), record(1, None, "hi", "hello there"),
               record(2, ["b.png", "a.png"], "<image> or <image>?", "the second"), record(3, "a.png", "<image>\nwhat colour?", "black")]
    ds = LazySupervisedDataset(records, tok, image_folder=folder, image_size_aux=64, image_size=32).cache_in_memory()
    collate = DataCollatorForSupervisedDataset(tok.pad_token_id)
    def mixed_lengths(n=6000):
        "Expanded lengths as in a mixture: captions, dialogues about pictures, text."
        rng = np.random.default_rng(0)
        kind = rng.choice(3, n, p=[.5, .3, .2])
        text = np.where(kind == 0, rng.integers(25, 60, n), rng.lognormal(5.3, .6, n).clip(30, 1200)).astype(int)
        return text + np.where(kind == 2, 0, 576), kind != 2

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

def test_waste_of_two_batches():
    test_eq(padding_waste([[4, 4], [4, 4]]), 0.0)
    test_eq(padding_waste([[1, 4], [3]]), 1 - 8/11)      # 3 of 8 + 3 positions are padding
    test_eq(padding_waste([]), 0.0)

def test_every_record_once_over_all_ranks():
    lengths, has_image = mixed_lengths(1000)
    for world in (1, 2, 3):
        ranks = [GroupedBatchSampler(lengths, has_image, 8, world_size=world, rank=r, megabatch=5) for r in range(world)]
        for epoch in (0, 1):
            passes = [list(r) for r in ranks]
            assert len({len(p) for p in passes}) == 1 and all(len(b) == 8 for p in passes for b in p)
            seen = Counter(i for p in passes for b in p for i in b)
            test_eq(set(seen), set(range(1000)))
            for r in ranks: r.set_epoch(epoch)
            test_eq(sum(seen.values()) - 1000, ranks[0].extra)                      # repeated, and counted
            assert 0 <= ranks[0].extra < 8*world and max(seen.values()) <= 2
            mixed = sum(len({bool(has_image[i]) for i in b}) > 1 for p in passes for b in p)
            assert mixed <= 2*world                                                 # the leftovers' steps at most
            for step in zip(*passes):                                               # ranks work equally long at each step: neighbours in length
                sums, all_of_step = [lengths[b].sum() for b in step], lengths[[i for b in step for i in b]]
                assert max(sums) - min(sums) <= all_of_step.max() - all_of_step.min()
            for r in ranks: r.set_epoch(epoch + 1)
    dropping = GroupedBatchSampler(lengths, has_image, 7, remainder="drop")
    seen = Counter(i for b in dropping for i in b)
    dropping.set_epoch(0)
    test_eq((max(seen.values()), len(seen) - 1000), (1, dropping.extra))
    assert dropping.extra < 0
    assert GroupedBatchSampler(lengths[:800], has_image[:800], 8).extra == 0

def test_place_is_saved_and_found():
    lengths, has_image = mixed_lengths(300)
    make = lambda **kw: GroupedBatchSampler(lengths, has_image, 8, **{"seed": 5, "world_size": 2, **kw})
    whole = make()
    first, second = list(whole), list(whole)
    assert first != second and sorted(i for b in first for i in b) != sorted(i for b in second for i in b)     # reshuffled, and this rank's share changes
    stopped = make()
    ahead = iter(stopped)
    for _ in range(6): next(ahead)                             # workers fetched six batches, training did three
    state = json.loads(json.dumps(stopped.state_dict(step=3)))
    late = make()
    late.load_state_dict(state)
    test_eq(list(late), first[3:])
    test_eq(list(late), second)
    test_eq((late.epoch, late.step), (2, 0))
    with expect_fail(ConfigError, contains="seed differ"): make(seed=6).load_state_dict(state)
    other = GroupedBatchSampler(lengths + 1, has_image, 8, seed=5, world_size=2)
    with expect_fail(ConfigError, contains="checksum differ"): other.load_state_dict(state)

def test_wrong_sampler_settings_are_refused():
    with expect_fail(ConfigError, contains="no records"): GroupedBatchSampler([], [], 2)
    with expect_fail(ConfigError, contains="rank"): GroupedBatchSampler([1], [True], 2, rank=1)
    with expect_fail(ConfigError, contains="'pad' or 'drop'"): GroupedBatchSampler([1], [True], 2, remainder="short")
    with expect_fail(ConfigError, contains="must be as many"): GroupedBatchSampler([1, 2], [True], 2)
    with expect_fail(DataError, contains="record 1"): GroupedBatchSampler([1, 0], [True, True], 2)
    test_eq(list(GroupedBatchSampler([5], [True], 3)), [[0, 0, 0]])      # fewer records than a batch
    test_eq(list(GroupedBatchSampler([5], [True], 3, remainder="drop")), [])

def test_packed_rows_come_out_as_planned():
    lengths, has_image = mixed_lengths(1000)
    for world in (1, 2):
        ranks = [PackedBatchSampler(lengths, 2048, 4, window=200, world_size=world, rank=r) for r in range(world)]
        passes = [list(r) for r in ranks]
        assert len({len(p) for p in passes}) == 1
        for batch in (b for p in passes for b in p):
            rows = pack_rows(lengths[batch], 2048)                   # what the collator will do with these records
            assert len(rows) == 4 and all(lengths[batch][row].sum() <= 2048 for row in rows)
        seen = Counter(i for p in passes for b in p for i in b)
        test_eq(set(seen), set(range(1000)))
        for r in ranks: r.set_epoch(0)
        test_eq(sum(seen.values()) - 1000, ranks[0].extra)
    stopped, late = PackedBatchSampler(lengths, 2048, 4, window=200), PackedBatchSampler(lengths, 2048, 4, window=200)
    whole = list(stopped)
    late.load_state_dict({**late.state_dict(), "step": 7})
    test_eq(list(late), whole[7:])
    with expect_fail(DataError, contains="record 'photo-2': the sample takes 3000 positions"): PackedBatchSampler([5, 9, 3000], 2048, 4, names=["photo-0", "photo-1", "photo-2"])
    with expect_fail(ConfigError, contains="kind"): late.load_state_dict(GroupedBatchSampler(lengths, has_image, 4).state_dict())

def test_grouping_and_packing_waste_less():
    lengths, has_image = mixed_lengths()
    shuffled = padding_waste([lengths[b] for b in StepBatchSampler(range(len(lengths)), 16, stop=len(lengths)//16)])
    grouped = padding_waste([lengths[b] for b in GroupedBatchSampler(lengths, has_image, 16)])
    packed = padding_waste([[lengths[b][row].sum() for row in pack_rows(lengths[b], 2048)] for b in PackedBatchSampler(lengths, 2048, 8)])
    assert grouped < shuffled/5 and packed < shuffled/5
    assert grouped < .1 and packed < .1

def test_plan_takes_four_bytes_a_record():
    n = 200_000
    sampler = GroupedBatchSampler(np.random.default_rng(0).integers(600, 700, n), np.ones(n, bool), 32)
    records, ends, _ = sampler.epoch_plan
    print(f"{(records.nbytes + ends.nbytes)/n:.2f} bytes a record")
    assert records.nbytes + ends.nbytes < 4.5*n
