"Derived from nbs/07a_dataset.ipynb by `make tests`; edit the notebook, not this file."
import json, os, warnings
from collections.abc import Sequence
from pathlib import Path
import numpy as np, torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN_INDEX, ConfigError, DataError
from vlm_lit.text.messages import image_names
from vlm_lit.text.sentinels import num_tokens_with_images
from vlm_lit.text.encode import bisect_failures, encode_records
from vlm_lit.processor import VLMProcessor
from vlm_lit.data.records import Records
import tempfile
import signal, subprocess, sys, threading, time
from fastcore.test import test_eq, test_close, expect_fail
from hypothesis import given, settings, strategies as st
import pyarrow as pa, pyarrow.parquet as pq
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.core import peek
from vlm_lit.images import read_image, sample_image
from vlm_lit.debug.label_view import LabelStrip
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.data.dataset import BadSamples
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.data.dataset import TooLong
from vlm_lit.data.dataset import truncate_to_complete_turns

def setup_module():
    global SCRIPT, alive, bad_ones, failure, folder, forged, good, ids_of, limited, loader, mixed, plain, rounds, seed, tok, two
    os.environ["VLM_LIT_CACHE"] = tempfile.mkdtemp()
    tok = load_tokenizer("gemma")
    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder / "photo.png")
    sample_image(90, 200).save(folder / "tall.png")
    seed = {
        "id": "seed",
        "image": "photo.png",
        "conversations": [
            {"from": "human", "value": "What is in the photo?\n<image>"},
            {"from": "gpt", "value": "the box chain purse black"},
        ],
    }
    plain = {
        "id": 1,
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
    }
    two = {
        "id": 2,
        "image": ["photo.png", "tall.png"],
        "conversations": [
            {"from": "human", "value": "compare <image> with <image>"},
            {"from": "gpt", "value": "taller"},
        ],
    }
    rounds = {
        "id": "r",
        "image": ["photo.png", "gone.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is it?"},
            {"from": "gpt", "value": "a drawing"},
            {"from": "human", "value": "of what?"},
            {"from": "gpt", "value": "a house"},
            {"from": "human", "value": "<image>\nand this?"},
            {"from": "gpt", "value": "a tree"},
        ],
    }
    def limited(records, **kwargs):
        own = VLMProcessor(tok, image_size_aux=64, image_size=56)  # 16 tokens per image
        return LazySupervisedDataset(records, own, folder, **kwargs)
    (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:900])
    good = [{**seed, "id": n} for n in range(56)]
    forged = [{"from": "human", "value": "q<end_of_turn>"}, {"from": "gpt", "value": "a"}]
    bad_ones = [
        {**seed, "id": "missing", "image": "gone.png"},
        {**seed, "id": "truncated", "image": "cut.png"},
        {"id": "forged", "conversations": forged},
        {"id": "no turns"},
    ]
    mixed = [record for k in range(4) for record in [*good[k * 14 : (k + 1) * 14], bad_ones[k]]]
    def ids_of(samples): return len(samples)
    def failure(batches):
        """The error of a DataLoader; without its frames, so that its workers end at once and not when
    they are collected as garbage."""
        try: list(batches)
        except DataError as e: return str(e.with_traceback(None))
    def loader(skip_bad, file, workers, records=None, **kwargs):
        ds = limited(records or mixed, skip_bad=skip_bad, bad_samples=file, **kwargs)
        return torch.utils.data.DataLoader(ds, batch_size=10, num_workers=workers, collate_fn=ids_of)
    SCRIPT = [
        'import sys, torch',
        'from vlm_lit.data.dataset import LazySupervisedDataset',
        'from vlm_lit.processor import VLMProcessor',
        'from vlm_lit.text.tokenizer import load_tokenizer',
        'def same(samples): return samples',
        'if __name__ == "__main__":',
        '    torch.set_num_threads(1)',
        '    processor = VLMProcessor(load_tokenizer("gemma"), image_size=56, image_size_aux=64)',
        '    ds = LazySupervisedDataset(sys.argv[1], processor, skip_bad=.5, bad_samples=sys.argv[2])',
        (
            '    spawned = torch.utils.data.DataLoader(ds, batch_size=10, num_workers=1, '
        'collate_fn=same, multiprocessing_context="spawn")'
        ),
        '    print(sum(map(len, spawned)), *ds.bad.totals, flush=True)',
        (
            '    loader = torch.utils.data.DataLoader(ds, batch_size=10, num_workers=2, '
        'collate_fn=same, multiprocessing_context="fork")'
        ),
        '    while True:',
        (
            '        for batch in loader: print(len(batch), *[p.pid for p in '
        'torch.multiprocessing.active_children()], flush=True)'
        ),
    ]
    def alive(pid):
        "Whether a process still runs."
        try:
            if not Path("/proc").is_dir(): return os.kill(pid, 0) is None
            return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
        except (OSError, ProcessLookupError): return False

def test_truncation_keeps_complete_turns():
    ids = torch.tensor([2, -200, 5, 6, 7, 8, 9, -200, 10, 11, 12])
    labels = torch.tensor([-100, -100, -100, 6, -100, 8, 9, -100, -100, 11, 12])
    stop = dict(at="keep = int(fits[-1])", watch="sizes ends is_last.int() fits.flatten()")
    with Breakpoint(truncate_to_complete_turns, **stop) as bp:
        truncate_to_complete_turns(ids, labels, num_image_tokens=4, max_length=16)
    bp.expect({"fits.flatten()": [3, 6]}, ends=[1, 5, 6, 7, 8, 9, 10, 14, 15, 16, 17])
    bp.expect_return({"len(result[0])": 7})

def test_an_image_counted_as_one_id_passes_the_limit():
    count_as_one = lambda sizes: torch.ones_like(sizes)
    stop = dict(at="ends = sizes", watch="sizes", set={"sizes": count_as_one})
    ids = torch.tensor([2, -200, 5, 6, 7, 8, 9, -200, 10, 11, 12])
    labels = torch.tensor([-100, -100, -100, 6, -100, 8, 9, -100, -100, 11, 12])
    with Breakpoint(truncate_to_complete_turns, **stop) as bp:
        truncate_to_complete_turns(ids, labels, num_image_tokens=4, max_length=16)
    bp.expect_changed({"len(result[0])": (7, 11)})

def test_the_sixth_bad_sample_of_500_is_one_too_many():
    bad = BadSamples(Path(tempfile.mkdtemp()) / "bad_samples.jsonl", allowed=0.01, n=500)
    rows = [{"index": k, "id": k, "reason": "broken"} for k in range(6)]
    watch = ["n_seen", "n_bad", "self.allowed * max(n_seen, self.at_least)"]
    with Breakpoint(BadSamples.count, at="if new and n_bad > self.allowed", watch=watch) as bp:
        bad.count(100, rows[:5])
        with expect_fail(DataError, contains="6 of 132 records are bad"):
            bad.count(32, rows[5:])
    bp.expect_each({"n_seen": [100, 132], "n_bad": [5, 6]})

def test_large_image_comes_first():
    stop = dict(at="data = self.texts([i])[0]", watch="image_aux[0] data image", tokenizer=tok)
    with Breakpoint(LazySupervisedDataset.__getitem__, **stop) as bp:
        LazySupervisedDataset([seed], VLMProcessor(tok), folder)[0]
    bp.expect({"tuple(image_aux[0].shape)": (3, 768, 768)})
    bp.expect_return({"tuple(image.shape)": (3, 336, 336), "len(input_ids)": 25})

def test_a_stop_in_two_workers():
    import warnings

    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    small = VLMProcessor(tok, image_size=28, image_size_aux=32)
    ds = LazySupervisedDataset([{**seed, "id": k} for k in range(4)], small, folder)
    stop = dict(at="image = images.small", watch="i names data['input_ids'][:5]", tokenizer=tok)
    with Breakpoint(LazySupervisedDataset.__getitem__, **stop) as bp:
        loader = torch.utils.data.DataLoader(ds, batch_size=2, num_workers=2, collate_fn=len)
        test_eq(list(loader), [2, 2])
    test_eq([hit.process for hit in bp.hits], ["worker 0"] * 2 + ["worker 1"] * 2)
    bp.expect_each(i=[0, 1, 2, 3], names=[["photo.png"]] * 4)

def test_a_missing_image_is_refused_with_its_record():
    gone = {**seed, "id": "a", "image": "gone.png"}
    with Breakpoint(DataError.at, at="return self", watch="record self.record") as bp:
        try: LazySupervisedDataset([gone], VLMProcessor(tok), folder)[0]
        except DataError as error: print(str(error)[:34])
    bp.expect({"self.record": "a"}, record="a")

def test_an_image_of_a_truncated_turn_is_not_opened():
    length = int(limited([rounds]).lengths[0])
    truncated = limited([rounds], max_length=length - 1, overlength="truncate")
    with Breakpoint(LazySupervisedDataset.pixels, at="if self.blank_images", watch="name") as bp:
        item = truncated[0]
    print(length, "->", num_tokens_with_images(item["input_ids"], 16), "positions")
    bp.expect(name="photo.png", hits=1)

def test_bad_samples_are_noted_left_out_and_bounded():
    import warnings

    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    noted = [(14, "missing"), (29, "truncated"), (44, "forged"), (59, "no turns")]
    said = "records are bad, more than the share of 0.05 that may be skipped; see bad_samples.jsonl"
    for workers in (0, 2):
        file = Path(tempfile.mkdtemp()) / "bad_samples.jsonl"
        batches = loader(0.1, file, workers)
        test_eq(list(batches), [10, 9, 9, 10, 9, 9])
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = sorted(rows, key=lambda row: row["index"])
        test_eq([(row["index"], row["id"]) for row in rows], noted)
        test_eq(batches.dataset.bad.totals, (60, 4))
        assert said in failure(loader(0.05, file, workers))
    for row in rows:
        print(row["id"], "|", row["reason"].replace(str(folder), "images")[:80])
    # inspecting raises
    with expect_fail(DataError, contains="record 'missing': no image"):
        batches.dataset[14]

def test_blind_dataset_shows_black_pictures():
    own = VLMProcessor(tok, image_size=32, image_size_aux=64)
    blind = LazySupervisedDataset([seed], own, folder, blank_images=True)[0]
    assert len(blind["image_aux"].unique()) == 3 and blind["input_ids"].shape == (25,)

def test_folder_and_template_are_checked_at_once():
    with expect_fail(ConfigError, contains="no image folder"):
        LazySupervisedDataset([seed], VLMProcessor(tok), folder / "nowhere")
    with expect_fail(ConfigError, contains="; give VLMProcessor(tokenizer)"):
        LazySupervisedDataset([seed], tok, folder)
    with expect_fail(ConfigError, contains="unknown template 'gema'"):
        LazySupervisedDataset([seed], VLMProcessor(tok, template="gema"), folder)
    (folder / "data.json").write_text(json.dumps([seed]))
    beside = LazySupervisedDataset(
        folder / "data.json", VLMProcessor(tok)
    )  # images beside the data file
    test_eq(beside.texts([0])[0]["input_ids"].shape, (25,))

def test_limits_that_cannot_be_are_refused():
    for wrong, message in [
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"overlength": "shorten"}, "overlength must be one of"),
        ({"skip_bad": 0.1}, "skip_bad needs bad_samples"),
    ]:
        with expect_fail(ConfigError, contains=message): limited([rounds], **wrong)

def test_lengths_and_memory_know_the_bad_samples():
    file = Path(tempfile.mkdtemp()) / "bad_samples.jsonl"
    ds = limited([*bad_ones, rounds, seed], skip_bad=0.9, bad_samples=file)
    length = int(limited([rounds]).lengths[0])
    test_eq(ds.lengths.tolist(), [40, 40, 0, 0, length, 40])  # the images are not opened for it
    limits = dict(max_length=50, skip_bad=0.9, bad_samples=file)
    for overlength, wanted in [("error", length), ("truncate", 50), ("skip", 0)]:
        ds = limited([*bad_ones, rounds, seed], overlength=overlength, **limits)
        test_eq(ds.lengths.tolist(), [40, 40, 0, 0, wanted, 40])
    lazy = ds.__getitems__(range(6))
    kept = limited([*bad_ones, rounds, seed], overlength="skip", **limits).cache_in_memory()
    kept = kept.__getitems__(range(6))
    test_eq((len(lazy), len(kept)), (1, 1))
    tensors = lazy[0].keys() - {"index", "image_keys"}
    assert all(torch.equal(lazy[0][key], kept[0][key]) for key in tensors)
    with expect_fail(DataError, contains="no image 'gone.png'"):
        limited([seed, bad_ones[0]]).cache_in_memory()

def test_skipping_has_limits_of_its_own():
    file = Path(tempfile.mkdtemp()) / "bad_samples.jsonl"
    ds = limited([*bad_ones[:2], *good], skip_bad=0.5, bad_samples=file)
    test_eq(ds.__getitems__([0, 1]), [])  # a batch may be empty
    test_eq((ds.bad.totals, len(file.read_text().splitlines())), ((2, 2), 2))
    with expect_fail(DataError, contains="2 of 2 records are bad, more than the share of 0.01"):
        limited([*bad_ones[:2], *good], skip_bad=0.01, bad_samples=file).__getitems__([0, 1])
    long = [rounds, *good[:30]]
    with expect_fail(TooLong):
        list(loader(0.5, file, 0, long, max_length=45))  # an error is not skipped
    ds = limited([rounds, plain], max_length=20, overlength="truncate", skip_bad=0.6, bad_samples=file)
    # not even the first answer fits
    test_eq((len(ds.__getitems__([0, 1])), ds.bad.totals), (1, (2, 1)))
    test_eq(list(loader(0.5, file, 0, long, max_length=45, overlength="skip")), [9, 10, 10, 1])
    assert "max_length is 45" in file.read_text().splitlines()[-1]

def test_skipped_samples_are_named_once_and_left_out_without_a_file_too():
    import warnings as module

    file = Path(tempfile.mkdtemp()) / "bad_samples.jsonl"
    limits = dict(max_length=50, overlength="skip")
    for run in range(2):  # the second goes on with the first
        ds = limited([*bad_ones[:1], rounds, seed], skip_bad=0.9, bad_samples=file, **limits)
        for epoch in range(3): test_eq(len(ds.__getitems__([0, 1, 2])), 1)
        test_eq(len(file.read_text().splitlines()), 2)
        test_eq(ds.bad.totals, (9, 3))  # of the file that is missing, each time; not of the long one
    file.write_text("[1]\n{\n" + file.read_text())
    test_eq(len(limited([rounds], skip_bad=0.9, bad_samples=file, **limits).bad.earlier), 2)
    plainly = limited([rounds, seed], **limits)
    with module.catch_warnings(record=True) as said:
        module.simplefilter("always")
        test_eq([own["index"] for own in plainly.__getitems__([0, 1])], [1])
    assert "left out: record" in str(said[0].message) and "max_length is 50" in str(said[0].message)
    with expect_fail(TooLong): plainly[0]  # one that is asked for is not skipped
    kept = limited([rounds, seed], **limits).cache_in_memory()
    with module.catch_warnings(record=True):
        test_eq(len(kept.__getitems__([0, 1])), 1)
    with expect_fail(DataError, contains="no image 'gone.png'"):
        limited([bad_ones[0], seed], **limits).cache_in_memory()

def test_caching_in_memory_tokenizes_each_record_once():
    ds = limited([seed, *({**seed, "id": f"again-{k}"} for k in range(2))])
    calls, usual = [], ds.encode

    def counted(records):
        calls.extend(record["id"] for record in records)
        return usual(records)

    ds.encode = counted
    ds.cache_in_memory()
    test_eq(sorted(map(str, calls)), sorted(str(ds.name(i)) for i in range(3)))

def test_truncation_ends_after_answers_and_never_inside_an_image():
    ids = torch.tensor([2, -200, 5, 6, 7, 8, 9, -200, 10, 11, 12])
    labels = torch.tensor([-100, -100, -100, 6, -100, 8, 9, -100, -100, 11, 12])
    kept = {limit: len(truncate_to_complete_turns(ids, labels, 4, limit)[0]) for limit in range(7, 19)}
    test_eq(num_tokens_with_images(ids, 4), 17)
    test_eq(kept, {7: 4, 8: 4, 9: 4, **{limit: 7 for limit in range(10, 17)}, 17: 11, 18: 11})
    for limit in range(7, 19):
        cut, cut_labels = truncate_to_complete_turns(ids, labels, 4, limit)
        assert num_tokens_with_images(cut, 4) <= limit and cut_labels[-1] != IGNORE_INDEX
        assert torch.equal(cut, ids[: len(cut)]) and torch.equal(cut_labels, labels[: len(cut)])
    message = (
        "its first question and answer do not fit: 7 tokens with an image of 4 tokens, max_length is 6"
    )
    with expect_fail(TooLong, contains=message):
        truncate_to_complete_turns(ids, labels, 4, 6)
    with expect_fail(TooLong):
        truncate_to_complete_turns(ids, torch.full_like(ids, IGNORE_INDEX), 4, 9)

def test_the_share_of_bad_samples_is_bounded():
    place = Path(tempfile.mkdtemp()) / "bad_samples.jsonl"
    bad = BadSamples(place, 0.01, 500)
    # 5 of the first 500 are allowed
    bad.count(100, [{"index": n, "id": n, "reason": "broken"} for n in range(5)])
    message = (
        "6 of 132 records are bad, more than the share of 0.01 that may be skipped; see "
    "bad_samples.jsonl. The last: gone"
    )
    with expect_fail(DataError, contains=message):
        bad.count(32, [{"index": 7, "id": "x", "reason": "gone"}])
    test_eq(bad.totals, (132, 6))
    test_eq(len(place.read_text().splitlines()), 6)
    for wrong in (0, 1, -1):
        with expect_fail(ConfigError, contains="must lie between 0 and 1"):
            BadSamples(place, wrong, 9)
    with expect_fail(ConfigError, contains="no folder"):
        BadSamples(place.parent / "gone" / "x.jsonl", 0.1, 9)

def test_item_of_the_seed():
    item = LazySupervisedDataset([seed], VLMProcessor(tok), folder)[0]
    shapes = {"input_ids": (25,), "labels": (25,), "image": (3, 336, 336), "image_aux": (3, 768, 768)}
    test_eq({k: tuple(v.shape) for k, v in item.items()}, shapes)
    ids = [2, 106, 1645, 108, -200, 108, 1841, 603, 575, 573, 2686, 235336, 107, 108, 106, 2516, 108]
    answer = [1175, 3741, 9488, 45189, 2656, 107, 108, 1]
    test_eq(item["input_ids"].tolist(), ids + answer)
    test_eq(item["labels"].tolist(), [-100] * 17 + answer)

def test_each_path_makes_the_same_square():
    sample_image(500, 375).save(folder / "large.jpg", quality=90)
    kept = (folder / "large.jpg").read_bytes()
    names, turns = [{**seed, "image": "large.jpg"}], seed["conversations"]
    inside = [{"id": "in", "image": {"bytes": kept, "path": None}, "conversations": turns}]
    pq.write_table(pa.Table.from_pylist(inside), folder / "inside.parquet")
    squares = []
    for settings_ in ({}, {"resize": "torch"}, {"resize": "torch", "jpeg_draft": True}):
        own = VLMProcessor(tok, image_size=28, image_size_aux=56, **settings_)
        want = own.image_processor.square(
            read_image(folder / "large.jpg", least=own.image_processor.least)
        )
        data = LazySupervisedDataset(names, own, folder, uint8=True)
        table = LazySupervisedDataset(folder / "inside.parquet", own, folder, uint8=True)
        called = own("what?", "large.jpg", image_folder=folder, as_bytes=True)
        found = [data[0]["image_aux"], data.__getitems__([0])[0]["image_aux"], table[0]["image_aux"]]
        found += [data.cache_in_memory()[0]["image_aux"], called["pixel_values_aux"][0]]
        for own_pixels in found: test_eq(own_pixels, want)
        squares.append(want)
    assert not torch.equal(squares[0], squares[1]) and not torch.equal(squares[1], squares[2])

def test_links_out_of_the_folder_need_an_argument():
    home, elsewhere = (Path(tempfile.mkdtemp()) for _ in range(2))
    sample_image(40, 30).save(elsewhere / "b.png")
    (home / "coco").symlink_to(elsewhere)
    own, linked = VLMProcessor(tok, image_size=28, image_size_aux=56), {**seed, "image": "coco/b.png"}
    with expect_fail(DataError, contains="record 'seed': image path 'coco/b.png' is a link"):
        LazySupervisedDataset([linked], own, home)[0]
    item = LazySupervisedDataset([linked], own, home, follow_links=True)[0]
    test_eq(tuple(item["image"].shape), (3, 28, 28))

def test_text_only_and_several_images():
    own = VLMProcessor(tok, image_size=32, image_size_aux=64)
    ds = LazySupervisedDataset([plain, two], own, folder)
    test_eq(sorted(ds[0]), ["input_ids", "labels"])
    test_eq(tuple(ds[1]["image"].shape), (2, 3, 32, 32))
    test_eq(tuple(ds[1]["image_aux"].shape), (2, 3, 64, 64))
    test_eq((ds[1]["input_ids"] == -200).sum().item(), 2)
    assert not torch.equal(ds[1]["image"][0], ds[1]["image"][1])

def test_broken_records_say_which_and_why():
    def turns(*texts):
        return [{"from": ("human", "gpt")[n % 2], "value": t} for n, t in enumerate(texts)]

    broken = [
        {"id": "a", "image": "gone.png", "conversations": turns("<image>\nq", "a")},
        {"id": "b", "image": "photo.png", "conversations": turns("no tag", "a")},
        {"id": "c", "image": "photo.png", "conversations": turns("<image> <image>", "a")},
        {"id": "d", "conversations": turns("<image>\nq", "a")},
        {"id": "e", "image": "../photo.png", "conversations": turns("<image>\nq", "a")},
        {"id": "f", "conversations": turns("q<end_of_turn>", "a")},
        {"id": "g", "conversations": [{"from": "human", "value": "q"}] * 2},
    ]
    ds = LazySupervisedDataset(broken, VLMProcessor(tok, image_size=32, image_size_aux=64), folder)
    messages = []
    for i in range(len(ds)):
        try: ds[i]
        except DataError as e:
            messages.append(str(e).replace(str(folder), "images"))
    named = [m.split(":")[0].split(",")[0] for m in messages]
    test_eq(named, [f"record '{name}'" for name in "abcdefg"])
    reasons = [
        "no image 'gone.png'",
        "0 <image> tag(s) for 1 image(s)",
        "2 <image> tag(s) for 1 image(s)",
        "turn 0: <image> tag in a record with 0 images",
        "leaves the image folder",
        "turn 0: the text spells the control token '<end_of_turn>'",
        "turn 1: two turns of 'human' in a row",
    ]
    for message, reason in zip(messages, reasons): assert reason in message

def test_cached_items_equal_lazy_ones():
    def small():
        own = VLMProcessor(tok, image_size=32, image_size_aux=64)
        return LazySupervisedDataset([plain, two, {**two, "id": 3}], own, folder)

    lazy, loaded = small(), small().cache_in_memory()
    for i in range(3):
        test_eq(sorted(lazy[i]), sorted(loaded[i]))
        assert all(torch.equal(lazy[i][k], loaded[i][k]) for k in lazy[i])
    assert loaded[1]["image"] is loaded[2]["image"]  # one picture, two records

def test_a_limit_is_kept_before_images_are_opened():
    whole = limited([rounds])
    length = int(whole.lengths[0])
    cut = limited([rounds], max_length=length - 1, overlength="truncate")
    with Breakpoint(LazySupervisedDataset.pixels, at="if self.blank_images", watch="name") as bp:
        item = cut[0]
    opened = [hit["name"] for hit in bp.hits]
    test_eq((opened, tuple(item["image"].shape)), (["photo.png"], (3, 56, 56)))
    test_eq(cut.lengths.tolist(), [length - 1])
    supervised = "".join(LabelStrip(item["input_ids"], item["labels"], tok).supervised)
    test_eq(supervised, "a drawing<end_of_turn>\n<eos>a house<end_of_turn>\n<eos>")
    message = f"record 'r': {length} tokens with images of 16 tokens each, max_length is {length - 1}"
    for how in ("error", "skip"):
        with Breakpoint(LazySupervisedDataset.pixels, at="if self.blank_images") as bp:
            with expect_fail(TooLong, contains=message):
                limited([rounds], max_length=length - 1, overlength=how)[0]
        test_eq(len(bp.hits), 0)
    with expect_fail(DataError, contains="no image 'gone.png'"):
        limited([rounds], max_length=length)[0]
    with expect_fail(TooLong, contains="record 'r': its first question and answer do not fit"):
        limited([rounds], max_length=20, overlength="truncate")[0]

def test_hd_crops_come_out_of_the_dataset():
    small = dict(image_size_aux=96, image_size=42)
    several = ({}, dict(image_grid=2), dict(image_grid=2, image_global=True))
    processors = [VLMProcessor(tok, **small, **more) for more in several]
    flat, hd, both = [LazySupervisedDataset([seed, two], own, folder) for own in processors]
    shapes = [tuple(item["image"].shape) for item in (flat[0], hd[0], both[1])]
    print(*shapes, both.num_image_tokens)
    with expect_fail(ConfigError, contains="max_length needs num_image_tokens"):
        LazySupervisedDataset([seed], VLMProcessor(tok, image_size=30), folder, max_length=99)
    with expect_fail(ConfigError, contains="image_tags must be one of"):
        LazySupervisedDataset([seed], VLMProcessor(tok), folder, image_tags="foo")
    test_eq(shapes, [(3, 42, 42), (4, 3, 42, 42), (2, 5, 3, 42, 42)])
    test_eq(tuple(both[0]["image"].shape), (5, 3, 42, 42))
    test_eq((flat.num_image_tokens, both.num_image_tokens), (9, 45))

def test_counts_of_a_large_file_are_kept():
    def texts(n):
        return [{**plain, "id": k} for k in range(n)] + [{**seed, "id": "image"}]

    large = Path(tempfile.mkdtemp()) / "large.jsonl"
    large.write_text("\n".join(json.dumps(record) for record in texts(12000)))
    assert large.stat().st_size > 1 << 20  # it needs a store

    def lengths(template="gemma", size=32):
        processor = VLMProcessor(tok, template=template, image_size=size, num_image_tokens=size)
        with Breakpoint(LazySupervisedDataset.count_tokens, at="texts = ") as bp:
            found = LazySupervisedDataset(large, processor, folder).lengths
        return found[-3:].tolist(), len(bp.hits) > 0

    first, again, wider, other = lengths(), lengths(), lengths(size=64), lengths("v0")
    print(first, again, wider, other)
    test_eq((first[1], again, wider[1], other[1]), (True, (first[0], False), False, True))
    small = LazySupervisedDataset(texts(2), VLMProcessor(tok, num_image_tokens=32), folder)
    test_eq(small.lengths.tolist(), first[0])  # a list is counted each time
    test_eq(wider[0], [*first[0][:2], first[0][2] + 32])
    from vlm_lit.files import cache_folder

    def one_bit(data):
        return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]

    for damage in (lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"x", one_bit):
        for path in (cache_folder() / "tokens").glob("*/records.arrow"):
            path.with_suffix(".new").write_bytes(damage(path.read_bytes()))
            path.with_suffix(".new").replace(path)  # the old one may still be mapped
        test_eq(lengths(), (first[0], True))  # damaged counts are made again

def test_bytes_become_the_float_picture():
    a, b = limited([seed, two]), limited([seed, two], uint8=True)
    peek(**b[0])
    for i in range(2):
        pixels = b[i]["image_aux"]
        test_eq((sorted(b[i]), pixels.dtype), (["image_aux", "input_ids", "labels"], torch.uint8))
        floats = b.processor.image_processor.normalize_square(pixels)
        assert torch.equal(floats, a[i]["image_aux"])

def test_an_interrupt_ends_a_run_with_workers():
    (folder / "mixed.json").write_text(json.dumps(mixed))
    (folder / "script.py").write_text("\n".join(SCRIPT))
    # tests in the background ignore it, and children inherit that
    run = subprocess.Popen(
        [sys.executable, folder / "script.py", folder / "mixed.json", folder / "skipped.jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
    )
    # should it hang after all, the test fails and does not wait
    watch = threading.Timer(300, lambda: os.killpg(run.pid, signal.SIGKILL))
    watch.start()
    try:
        sent = run.stdout.readline().split()
        n, *workers = map(int, run.stdout.readline().split() or [0])
        os.killpg(run.pid, signal.SIGINT)  # what a terminal sends to all processes of a command
        out, err = run.communicate(timeout=60)
    finally:
        watch.cancel()
        if run.poll() is None: os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode not in (0, None), err
    assert "KeyboardInterrupt" in err, err
    assert len(workers) == 2 and sent == ["56", "60", "4"], err
    for _ in range(50):
        if any(map(alive, workers)): time.sleep(0.1)
    assert not any(map(alive, workers))
