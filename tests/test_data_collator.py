"Derived from nbs/08_batches.ipynb by `make tests`; edit the notebook, not this file."
import bisect, re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
import numpy as np, torch
from numpy.typing import ArrayLike
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, ConfigError, DataError
from vlm_lit.padding import count_images, expand_image_tokens, pad_samples, stack_images, supervised_positions
import json, os, signal, tempfile
from pathlib import Path
from collections import Counter
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.core import peek
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.padding import flat_images
from vlm_lit.text.sentinels import num_tokens_with_images
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.processor import VLMProcessor
from vlm_lit.images import finish_images, grid_crops, resize_to_square, count_image_tokens, sample_image
from vlm_lit.images import to_bytes
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.data.collator import DataCollatorForSupervisedDataset
from vlm_lit.data.collator import check_sample
from vlm_lit.data.collator import concatenate_samples
from vlm_lit.data.collator import name_dead_worker
from vlm_lit.data.collator import pack_sequences

def setup_module():
    global ANSWER_WORDS, CAPTION, caption_record, captions, collate, ds, folder, kinds_of, padding_of, processor, record, records, three_ways, tok
    tok = load_tokenizer("gemma")
    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder / "a.png")
    sample_image(90, 200).save(folder / "b.png")
    def record(name, image, *texts):
        turns = [{"from": ("human", "gpt")[n % 2], "value": t} for n, t in enumerate(texts)]
        return {"id": name, **({"image": image} if image else {}), "conversations": turns}
    records = [
        record(0, "a.png", "What is it?\n<image>", "a box"),
        record(1, None, "hi", "hello there"),
        record(2, ["b.png", "a.png"], "<image> or <image>?", "the second"),
        record(3, "a.png", "<image>\nwhat color?", "black"),
    ]
    processor = VLMProcessor(tok, image_size=32, image_size_aux=64)
    ds = LazySupervisedDataset(records, processor, folder).cache_in_memory()
    ds = [{k: v for k, v in s.items() if k != "index"} for s in ds.__getitems__(range(4))]
    collate = DataCollatorForSupervisedDataset(tok.pad_token_id)
    CAPTION = "a black box stands on green grass under a blue sky and an orange sun shines on it " * 3
    ANSWER_WORDS = [5, 40, 1, 12, 30, 2, 48, 8]
    def caption_record(k, n_words):
        "A record with an image if `k` is even, and an answer of so many words."
        answer = " ".join(CAPTION.split()[:n_words])
        return record(k, None if k % 2 else "a.png", "Describe." if k % 2 else "<image>\nWhat?", answer)
    captions = [caption_record(k, n) for k, n in enumerate(ANSWER_WORDS)]
    captions = LazySupervisedDataset(captions, processor, folder).__getitems__(range(8))
    captions = [{k: v for k, v in s.items() if k != "index"} for s in captions]
    def kinds_of(batch, token=255999):
        "0 padding, 1 text, 2 image token, 3 supervised, for each position of a batch."
        kinds = batch["attention_mask"].long()
        kinds[batch["input_ids"] == token] = 2
        kinds[batch["labels"] != IGNORE_INDEX] = 3
        return kinds.numpy()
    def three_ways():
        "The samples padded as they come, padded by length, and packed: batches of kinds."
        images = dict(num_image_tokens=16, image_token_id=255999)
        pad = DataCollatorForSupervisedDataset(tok.pad_token_id, **images)
        pack = DataCollatorForSupervisedDataset(tok.pad_token_id, max_length=84, **images)
        lengths = [num_tokens_with_images(s["input_ids"], 16) for s in captions]
        ordered = [captions[i] for i in np.argsort(lengths)]
        ways = {"padded": [captions[:4], captions[4:]], "by length": [ordered[:4], ordered[4:]]}
        found = {name: [kinds_of(pad(half)) for half in halves] for name, halves in ways.items()}
        return {**found, "packed": [kinds_of(pack(captions))]}
    def padding_of(batches):
        "The share of all positions that is padding."
        return sum((b == 0).sum() for b in batches) / sum(b.size for b in batches)

def test_each_sample_goes_into_the_fullest_row_with_room():
    lengths = [5, 9, 3, 7, 2, 4, 8, 1]
    with Breakpoint(
        pack_sequences, at="at = bisect", watch="lengths[i] room rows", when="i == 2"
    ) as bp:
        rows = pack_sequences(lengths, 10)
    for row in rows:
        print("".join(str(lengths[i]) * lengths[i] for i in row).ljust(10, "."))
    print(sum(lengths), "positions in", 10 * len(rows), "packed, in", 8 * max(lengths), "padded")
    bp.expect({"lengths[i]": 3}, room=[(1, 0), (1, 3), (2, 1), (3, 2)], rows=[[1], [6], [3], [0, 5]])

def test_equal_images_are_stacked_once():
    watch = ["[key.split('/')[-1] for key in keys]", "order", "kept"]
    with Breakpoint(stack_images, at="out = {key: torch.stack", watch=watch) as bp:
        batch = collate([ds[i] for i in range(4)])
    peek(**batch)
    bp.expect({"len(keys)": 4}, order=[0, 1, 0, 0], kept=[0, 1])
    bp.expect_return({"tuple(pixel_values.shape)": (2, 3, 32, 32), "image_index": [0, 1, 0, 0]})

def test_images_in_another_order_keep_every_shape():
    reversed_ = lambda kept: kept[::-1]
    stop = dict(at="out = {key: torch.stack", watch="kept", set={"kept": reversed_})
    with Breakpoint(stack_images, **stop) as bp:
        batch = collate([ds[i] for i in range(4)])
    test_eq(
        (tuple(batch["pixel_values"].shape), batch["image_index"].tolist()),
        ((2, 3, 32, 32), [0, 1, 0, 0]),
    )
    first, second = ds[0]["image"].mean().item(), ds[2]["image"][0].mean().item()
    bp.expect_changed(
        {"pixel_values.mean((1, 2, 3))": ([first, second], [second, first])}, tolerance=1e-6
    )

def test_each_rectangle_has_its_own_filling():
    watch = ["key", "value", "tuple(rows.shape)", "rows[1, -6:].tolist()"]
    with Breakpoint(pad_samples, at="out[key] = rows", watch=watch) as bp:
        collate([ds[i] for i in range(4)])
    bp.expect_each({"value": [0, -100, False], "tuple(rows.shape)": [(4, 20)] * 3})

def test_labels_padded_with_an_id_are_supervised():
    pad_with_id = lambda filling: {**filling, "labels": filling["input_ids"]}
    stop = dict(at="own = [{**s", watch="filling", set={"filling": pad_with_id})
    with Breakpoint(pad_samples, **stop) as bp:
        collate([ds[i] for i in range(4)])
    bp.expect_changed({"(labels != -100).sum(1)": ([5, 5, 5, 4], [5, 10, 6, 6])})

def test_a_sentinel_becomes_placeholders_with_ignored_labels():
    images = dict(num_image_tokens=16, image_token_id=255999)
    expands = DataCollatorForSupervisedDataset(tok.pad_token_id, **images, supervised_only=True)
    watch = "ids times"
    with Breakpoint(expand_image_tokens, at="return {**sample, **", watch=watch, tokenizer=tok) as bp:
        batch = expands([ds[0]])
    n_ids = len(ds[0]["input_ids"])
    bp.expect({"times.sum()": n_ids + 15, "(ids == -200).sum()": 1})
    supervised = int((ds[0]["labels"] != IGNORE_INDEX).sum())
    bp.expect_return({"(labels != -100).sum()": supervised, "(input_ids == 255999).sum()": 16})

def test_samples_are_packed_whole_with_their_numbers():
    images = dict(num_image_tokens=count_image_tokens(32, 8), image_token_id=255999)
    packs = DataCollatorForSupervisedDataset(tok.pad_token_id, max_length=84, **images)
    watch = ["lengths", "packs", "[row['sample_ids'].unique().tolist() for row in rows]"]
    stop = dict(at="shown = [samples[i]", watch=watch)
    with Breakpoint(DataCollatorForSupervisedDataset.__call__, **stop) as bp:
        packs([ds[i] for i in range(4)])
    bp.expect(lengths=[35, 15, 49, 33], packs=[[2, 0], [3, 1]])
    bp.expect_return({"tuple(input_ids.shape)": (2, 84), "sample_ids.amax(1)": [2, 2]})

def test_a_mask_by_comparison_hides_real_eos():
    def by_comparison(own):
        "The mask that compares ids with the pad id, here EOS."
        return [{**s, "attention_mask": s["input_ids"] != tok.eos_token_id} for s in own]

    pads_with_eos = DataCollatorForSupervisedDataset(pad_token_id=tok.eos_token_id)
    stop = dict(at="missing = width", watch="pad_token_id", set={"own": by_comparison})
    with Breakpoint(pad_samples, **stop) as bp: pads_with_eos([ds[0], ds[1]])
    bp.expect_changed({"attention_mask.sum(1)": ([20, 15], [19, 14])})

def test_a_tag_without_its_image_is_refused():
    lost = {k: v for k, v in ds[0].items() if not k.startswith("image")}
    spare = {**ds[1], "image": ds[0]["image"], "image_aux": ds[0]["image_aux"]}
    watch = "n n_sentinels n_images"
    with Breakpoint(check_sample, at="if n_sentinels != n_images:", watch=watch) as bp:
        try: collate([ds[0], {**lost, "id": "cat-17"}, spare])
        except DataError as error: print(str(error)[:100])
    bp.expect_each(n=[0, 1], n_sentinels=[1, 1], n_images=[1, 0])

def test_a_killed_worker_is_one_line():
    class Killing(torch.utils.data.Dataset):
        "Its second item kills whoever reads it."

        def __len__(self): return 4

        def __getitem__(self, i):
            if i == 1: os.kill(os.getpid(), signal.SIGKILL)
            return i

    message = (
        "a loader worker was killed by signal Killed, most often for lack of memory; lower --workers"
    )
    with Breakpoint(name_dead_worker, at="if not found", watch=["found[1]"]) as bp:
        with expect_fail(ConfigError, contains=message), name_dead_worker("--workers"):
            list(torch.utils.data.DataLoader(Killing(), num_workers=1))
    bp.expect({"found[1]": "signal: Killed"})
    with expect_fail(RuntimeError, contains="another"), name_dead_worker("--workers"):
        raise RuntimeError("another")

def test_batch_without_pictures_has_no_image_keys():
    test_eq(sorted(collate([ds[1], ds[1]])), ["attention_mask", "input_ids", "labels"])
    assert "image_index" not in collate([ds[2]])

def test_first_token_of_a_packed_sample_is_not_a_target():
    plain = {"input_ids": torch.tensor([2, 7, 8]), "labels": torch.tensor([2, 7, 8])}
    row = concatenate_samples([plain, plain])
    test_eq(row["labels"].tolist(), [-100, 7, 8, -100, 7, 8])
    test_eq(row["sample_ids"].tolist(), [1, 1, 1, 2, 2, 2])
    test_eq(plain["labels"].tolist(), [2, 7, 8])  # the sample itself is not touched

def test_packing_keeps_all_and_overfills_none():
    lengths = [5, 9, 3, 7, 2, 4, 8, 1]
    test_eq(len(pack_sequences(lengths, 10)), 4)
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths, most = rng.integers(1, 60, rng.integers(1, 80)), int(rng.integers(60, 200))
        rows = pack_sequences(lengths, most)
        test_eq(sorted(i for row in rows for i in row), list(range(len(lengths))))
        assert all(0 < lengths[row].sum() <= most for row in rows)
        # two half-empty rows would have been one
        assert sum(lengths[row].sum() <= most / 2 for row in rows) <= 1
        # the samples of some rows, packed again, make as many rows
        some = sorted(rng.choice(len(rows), (len(rows) + 1) // 2, replace=False))
        again = pack_sequences(lengths[[i for r in some for i in rows[r]]], most)
        test_eq(sorted(len(row) for row in again), sorted(len(rows[r]) for r in some))
    test_eq(num_tokens_with_images(torch.tensor([2, -200, 5, -200]), 576), 2 + 2 * 576)
    message = "record 'long': the sample takes 11 positions, more than max_length 10"
    with expect_fail(DataError, contains=message):
        pack_sequences([3, 11], 10, ["short", "long"])
    with expect_fail(DataError, contains="record 1: "): pack_sequences([3, 11], 10)

def test_batch_is_padded_and_pictures_are_kept_once():
    batch = collate([ds[i] for i in range(4)])
    lengths = [len(ds[i]["input_ids"]) for i in range(4)]
    test_eq(batch["attention_mask"].sum(1).tolist(), lengths)
    # sample 0, the two of sample 2, of which the second is that of sample 0, as is sample 3's
    test_eq(batch["image_index"].tolist(), [0, 1, 0, 0])
    test_eq(tuple(batch["pixel_values"].shape), (2, 3, 32, 32))
    for i, n in enumerate(lengths):
        assert torch.equal(batch["input_ids"][i, :n], ds[i]["input_ids"])
        assert torch.equal(batch["labels"][i, :n], ds[i]["labels"])
        assert (batch["input_ids"][i, n:] == tok.pad_token_id).all()
        assert (batch["labels"][i, n:] == IGNORE_INDEX).all()
    for n, (i, k) in enumerate([(0, None), (2, 0), (2, 1), (3, None)]):
        image = ds[i]["image"] if k is None else ds[i]["image"][k]
        assert torch.equal(batch["pixel_values"][batch["image_index"][n]], image)

def test_collator_expands_every_sentinel():
    expands = DataCollatorForSupervisedDataset(
        tok.pad_token_id, num_image_tokens=16, image_token_id=255999, supervised_only=True
    )
    batch = expands([ds[i] for i in range(4)])
    print("longest sample", max(len(s["input_ids"]) for s in ds), "-> ids", *batch["input_ids"].shape)
    test_eq(batch["input_ids"].shape[1], len(ds[2]["input_ids"]) + 2 * 15)
    test_eq((batch["input_ids"] == 255999).sum(1).tolist(), [16, 0, 32, 16])
    lengths = [num_tokens_with_images(s["input_ids"], 16) for s in ds]
    test_eq(batch["attention_mask"].sum(1).tolist(), lengths)
    for row, sample in zip(batch["labels"], ds):
        own = sample["labels"][sample["labels"] != IGNORE_INDEX]
        assert torch.equal(row[row != IGNORE_INDEX], own)
    targets = batch["labels"].flatten()[batch["supervised_positions"] + 1]
    assert torch.equal(targets, batch["labels"][batch["labels"] != IGNORE_INDEX])
    assert (collate([ds[0]])["input_ids"] == -200).sum() == 1  # not told, it leaves the sentinel
    left = DataCollatorForSupervisedDataset(0, padding_side="left")([ds[1], ds[2]])
    assert left["attention_mask"][:, -1].all() and not left["attention_mask"][0, 0]
    with expect_fail(ConfigError, contains="pad_token_id: expected a number, got a str"):
        DataCollatorForSupervisedDataset("tokenizer")
    with expect_fail(ConfigError, contains="packing (max_length) counts a sentinel"):
        DataCollatorForSupervisedDataset(0, max_length=84)
    with expect_fail(ConfigError, contains="supervised_only counts a sentinel"):
        DataCollatorForSupervisedDataset(0, supervised_only=True)
    with expect_fail(ConfigError, contains="leave it out with padding_side 'left'"):
        images = dict(num_image_tokens=16, image_token_id=255999)
        DataCollatorForSupervisedDataset(0, **images, supervised_only=True, padding_side="left")
    with expect_fail(ConfigError, contains="given together, or neither"):
        DataCollatorForSupervisedDataset(0, num_image_tokens=16)
    forged = {**ds[1], "input_ids": torch.full_like(ds[1]["input_ids"], 255999), "id": "cat-17"}
    with expect_fail(DataError, contains="record 'cat-17': the text holds token 255999"):
        expands([forged])

def test_bytes_and_crops_are_stacked():
    text = {"input_ids": torch.tensor([2, -200, 5]), "labels": torch.tensor([-100, -100, 5])}
    pair = {
        "input_ids": torch.tensor([2, -200, -200, 5]),
        "labels": torch.tensor([-100, -100, -100, 5]),
    }
    picture = [to_bytes(resize_to_square(sample_image(40 + n, 30), 64)) for n in range(3)]
    one = {**text, "image_aux": picture[0], "image_keys": ["a"]}
    as_bytes = collate([one, {**pair, "image_aux": torch.stack(picture[1:])}])
    peek(**as_bytes)
    test_eq(sorted(as_bytes), ["attention_mask", "input_ids", "labels", "pixel_values_aux"])
    assert torch.equal(as_bytes["pixel_values_aux"], torch.stack(picture))
    assert as_bytes["pixel_values_aux"].dtype == torch.uint8
    done = finish_images(torch.stack(picture), 32, image_grid=2, image_global=True)
    first = {**text, "image": done["pixel_values"][0], "image_aux": done["pixel_values_aux"][0]}
    others = {**pair, "image": done["pixel_values"][1:], "image_aux": done["pixel_values_aux"][1:]}
    crops = collate([first, others])
    test_eq(tuple(crops["pixel_values"].shape), (3, 5, 3, 32, 32))
    test_eq(tuple(crops["pixel_values_aux"].shape), (3, 3, 64, 64))
    assert torch.equal(crops["pixel_values"], done["pixel_values"])
    # bytes too are kept once
    test_eq(collate([one, one])["image_index"].tolist(), [0, 0])
    listed = collate([one, {**pair, "image_aux": [picture[1], picture[0]], "image_keys": ["b", "a"]}])
    test_eq(tuple(listed["pixel_values_aux"].shape), (2, 3, 64, 64))
    test_eq(listed["image_index"].tolist(), [0, 1, 0])  # an image is known by its key
    with expect_fail(DataError, contains="of one kind and size"):
        collate([one, {**text, "image_aux": done["pixel_values_aux"][0]}])
    with expect_fail(DataError, contains="of one kind and size"):
        collate([one, {**text, "image": done["pixel_values"][0], "image_aux": picture[1]}])
    with expect_fail(DataError, contains="need `image` too"):
        collate([{**text, "image_aux": done["pixel_values_aux"][0]}])

def test_padding_shrinks_by_length_and_by_packing():
    ratios = [float(padding_of(batches)) for batches in three_ways().values()]
    assert ratios[0] > ratios[1] > ratios[2], ratios

def test_packed_batch_holds_every_sample_whole():
    images = dict(num_image_tokens=count_image_tokens(32, 8), image_token_id=255999)
    packs = DataCollatorForSupervisedDataset(tok.pad_token_id, max_length=84, **images)
    batch = packs([ds[i] for i in range(4)])
    lengths = [num_tokens_with_images(ds[i]["input_ids"], 16) for i in range(4)]
    test_eq(len(batch["input_ids"]), len(pack_sequences(lengths, 84)))
    test_eq(batch["attention_mask"], batch["sample_ids"] > 0)
    found = []
    for row, numbers in zip(batch["input_ids"], batch["sample_ids"]):
        for n in range(1, int(numbers.max()) + 1):
            found.append(row[numbers == n].tolist())
    expanded = [s["input_ids"].tolist() for s in packs.expand(ds)]
    test_eq(sorted(found), sorted(expanded))
    # which sample stands where
    order = [expanded.index(ids) for ids in found]
    pictures = [image for i in order for image in flat_images([ds[i]], "image")]
    for n, k in enumerate(batch["image_index"].tolist()):
        assert torch.equal(batch["pixel_values"][k], pictures[n])
    assert ((batch["labels"] == batch["input_ids"]) | (batch["labels"] == IGNORE_INDEX)).all()
    n_supervised = [int((ds[i]["labels"][1:] != IGNORE_INDEX).sum()) for i in range(4)]
    test_eq(int((batch["labels"] != IGNORE_INDEX).sum()), sum(n_supervised))
    width = batch["input_ids"].shape[1]
    assert max(lengths) < width <= 84  # of a row, not of a sample
    with expect_fail(DataError, contains="record 0: the sample takes"):
        DataCollatorForSupervisedDataset(0, 30, **images)([ds[2]])
    with expect_fail(DataError, contains="record 'long': the sample takes"):
        DataCollatorForSupervisedDataset(0, 30, **images)([{**ds[2], "id": "long"}])

def test_sentinel_without_image_is_refused_with_its_record():
    lost = {k: v for k, v in ds[0].items() if not k.startswith("image")}
    message = "of the batch has 1 image sentinel(s) in input_ids for 0 image(s)"
    with expect_fail(DataError, contains=f"sample 0 {message}"): collate([lost])
    # one image too many: the totals agree, the samples do not
    spare = {**ds[1], "image": ds[0]["image"], "image_aux": ds[0]["image_aux"]}
    with expect_fail(DataError, contains="sample 0"): collate([lost, spare])
    with expect_fail(DataError, contains=f"record 'cat-17': sample 1 {message}"):
        collate([ds[0], {**lost, "id": "cat-17"}])
    # a name does not travel to the device
    test_eq(sorted(collate([{**ds[0], "id": "cat-17"}])), sorted(collate([ds[0]])))

def test_mask_from_lengths_keeps_real_eos():
    batch = DataCollatorForSupervisedDataset(pad_token_id=tok.eos_token_id)([ds[0], ds[1]])
    naive = batch["input_ids"] != tok.eos_token_id
    test_eq(int((batch["attention_mask"] & ~naive).sum()), 2)  # one <eos> in each sample

def test_info_counts_samples_in_the_order_of_their_supervised_tokens():
    samples = [{**ds[i], "index": i, "source_index": i % 2} for i in range(4)]
    for max_length in (None, 84):
        own = DataCollatorForSupervisedDataset(tok.pad_token_id, max_length, 16, 255999)
        batch = own(samples)
        info = batch["info"]
        targets = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
        labels = [samples[i]["labels"][1:] for i in info.indices]
        expected = [own[own != -100] for own in labels]
        assert torch.equal(targets, torch.cat(expected))
        assert info.n_supervised == [len(e) for e in expected]
        assert sorted(info.indices) == [0, 1, 2, 3] and info.sources == [i % 2 for i in info.indices]
        assert 16 * sum(info.n_images) == int((batch["input_ids"] == 255999).sum())
        test_eq(sum(info.lengths), int(batch["attention_mask"].sum()))

def test_batch_of_skipped_samples_has_nothing_supervised():
    batch = DataCollatorForSupervisedDataset(tok.pad_token_id, None, 16, 255999)([])
    assert batch["input_ids"].shape == (1, 1)
    assert (batch["labels"] == -100).all()
    assert "info" not in batch
