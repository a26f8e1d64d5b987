"Derived from nbs/07a_dataset.ipynb by `make tests`; edit the notebook, not this file."
import json, os
from pathlib import Path
import numpy as np, torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info
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
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.core import peek
from vlm_lit.images import sample_image
from vlm_lit.debug.label_view import LabelStrip
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.data.dataset import *

def setup_module():
    global SCRIPT, alive, bad_ones, failure, folder, good, ids_of, limited, loader, mixed, plain, rounds, seed, tok, two
    os.environ["VLM_LIT_CACHE"] = tempfile.mkdtemp()
    tok = load_tokenizer("gemma")
    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder/"photo.png")
    sample_image(90, 200).save(folder/"tall.png")
    seed = {"id": "seed", "image": "photo.png", "conversations": [{"from": "human", "value": "What is in the photo?\n<image>"},
                                                                  {"from": "gpt", "value": "the box chain purse black"}]}
    plain = {"id": 1, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    two = {"id": 2, "image": ["photo.png", "tall.png"], "conversations": [{"from": "human", "value": "compare <image> with <image>"}, {"from": "gpt", "value": "taller"}]}
    rounds = {"id": "r", "image": ["photo.png", "gone.png"], "conversations": [
        {"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a drawing"}, {"from": "human", "value": "of what?"}, {"from": "gpt", "value": "a house"},
        {"from": "human", "value": "<image>\nand this?"}, {"from": "gpt", "value": "a tree"}]}
    def limited(records, **kwargs): return LazySupervisedDataset(records, VLMProcessor(tok, image_size_aux=64, image_size=56), folder, **kwargs)
    (folder/"cut.png").write_bytes((folder/"photo.png").read_bytes()[:900])
    good = [{**seed, "id": n} for n in range(56)]
    bad_ones = [{**seed, "id": "missing", "image": "gone.png"}, {**seed, "id": "truncated", "image": "cut.png"},
                {"id": "forged", "conversations": [{"from": "human", "value": "q<end_of_turn>"}, {"from": "gpt", "value": "a"}]}, {"id": "no turns"}]
    mixed = [record for k in range(4) for record in [*good[k*14:(k + 1)*14], bad_ones[k]]]
    def ids_of(samples): return len(samples)
    def failure(batches):
        "The error of a DataLoader; without its frames, so that its workers end at once and not when they are collected as garbage."
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
        '    spawned = torch.utils.data.DataLoader(ds, batch_size=10, num_workers=1, collate_fn=same, multiprocessing_context="spawn")',
        '    print(sum(map(len, spawned)), *ds.bad.totals, flush=True)',
        '    loader = torch.utils.data.DataLoader(ds, batch_size=10, num_workers=2, collate_fn=same, multiprocessing_context="fork")',
        '    while True:',
        '        for batch in loader: print(len(batch), *[p.pid for p in torch.multiprocessing.active_children()], flush=True)',
    ]
    def alive(pid):
        "Whether a process still runs."
        try: return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else os.kill(pid, 0) is None
        except (OSError, ProcessLookupError): return False

def test_truncation_ends_after_answers_and_never_inside_an_image():
    ids    = torch.tensor([2, -200, 5, 6,    7, 8, 9,     -200, 10, 11, 12])
    labels = torch.tensor([-100, -100, -100, 6, -100, 8, 9, -100, -100, 11, 12])
    kept = {limit: len(truncate_to_complete_turns(ids, labels, 4, limit)[0]) for limit in range(7, 19)}
    print("with images:", num_tokens_with_images(ids, 4), " kept of", len(ids), "ids:", kept)
    test_eq(kept, {7: 4, 8: 4, 9: 4, **{limit: 7 for limit in range(10, 17)}, 17: 11, 18: 11})
    for limit in range(7, 19):
        cut, cut_labels = truncate_to_complete_turns(ids, labels, 4, limit)
        assert num_tokens_with_images(cut, 4) <= limit and cut_labels[-1] != IGNORE_INDEX
        assert torch.equal(cut, ids[:len(cut)]) and torch.equal(cut_labels, labels[:len(cut)])
    message = "its first question and answer do not fit: 7 tokens with an image of 4 tokens, max_length is 6"
    with expect_fail(TooLong, contains=message): truncate_to_complete_turns(ids, labels, 4, 6)
    with expect_fail(TooLong): truncate_to_complete_turns(ids, torch.full_like(ids, IGNORE_INDEX), 4, 9)

def test_the_share_of_bad_samples_is_bounded():
    place = Path(tempfile.mkdtemp())/"bad_samples.jsonl"
    bad = BadSamples(place, .01, 500)
    bad.count(100, [{"index": n, "id": n, "reason": "broken"} for n in range(5)])          # 5 of the first 500 are allowed
    with expect_fail(DataError, contains="6 of 132 records are bad, more than the share of 0.01 that may be skipped; see bad_samples.jsonl. The last: gone"):
        bad.count(32, [{"index": 7, "id": "x", "reason": "gone"}])
    print(place.read_text().splitlines()[-1], bad.totals)
    test_eq(len(place.read_text().splitlines()), 6)
    for wrong in (0, 1, -1): 
        with expect_fail(ConfigError, contains="must lie between 0 and 1"): BadSamples(place, wrong, 9)
    with expect_fail(ConfigError, contains="no folder"): BadSamples(place.parent/"gone"/"x.jsonl", .1, 9)

def test_item_of_the_seed():
    item = LazySupervisedDataset([seed], VLMProcessor(tok), folder)[0]
    test_eq({k: tuple(v.shape) for k,v in item.items()}, {"input_ids": (25,), "labels": (25,), "image": (3, 336, 336), "image_aux": (3, 768, 768)})
    test_eq(item["input_ids"].tolist(), [2, 106, 1645, 108, -200, 108, 1841, 603, 575, 573, 2686, 235336, 107, 108, 106, 2516, 108, 1175, 3741, 9488, 45189, 2656, 107, 108, 1])
    test_eq(item["labels"].tolist(), [-100]*17 + [1175, 3741, 9488, 45189, 2656, 107, 108, 1])

def test_large_image_comes_first():
    with Breakpoint(LazySupervisedDataset.__getitem__, at="data = self.texts([i])[0]", watch=["image_aux[0]"]) as bp:
        LazySupervisedDataset([seed], VLMProcessor(tok), folder)[0]
    print(bp)
    test_eq(tuple(bp["image_aux[0]"].shape), (3, 768, 768))
    with expect_fail(LookupError): bp["image"]                      # not there yet

def test_text_only_and_several_images():
    ds = LazySupervisedDataset([plain, two], VLMProcessor(tok, image_size=32, image_size_aux=64), folder)
    test_eq(sorted(ds[0]), ["input_ids", "labels"])
    test_eq((tuple(ds[1]["image"].shape), tuple(ds[1]["image_aux"].shape)), ((2, 3, 32, 32), (2, 3, 64, 64)))
    test_eq((ds[1]["input_ids"] == -200).sum().item(), 2)
    assert not torch.equal(ds[1]["image"][0], ds[1]["image"][1])

def test_broken_records_say_which_and_why():
    def turns(*texts): return [{"from": ("human", "gpt")[n % 2], "value": t} for n,t in enumerate(texts)]
    broken = [{"id": "a", "image": "gone.png", "conversations": turns("<image>\nq", "a")},
              {"id": "b", "image": "photo.png", "conversations": turns("no tag", "a")},
              {"id": "c", "image": "photo.png", "conversations": turns("<image> <image>", "a")},
              {"id": "d", "conversations": turns("<image>\nq", "a")},
              {"id": "e", "image": "../photo.png", "conversations": turns("<image>\nq", "a")},
              {"id": "f", "conversations": turns("q<end_of_turn>", "a")},
              {"id": "g", "conversations": [{"from": "human", "value": "q"}, {"from": "human", "value": "q"}]}]
    ds = LazySupervisedDataset(broken, VLMProcessor(tok, image_size=32, image_size_aux=64), folder)
    messages = []
    for i in range(len(ds)):
        try: ds[i]
        except DataError as e: messages.append(str(e).replace(str(folder), "images"))
    print(*messages, sep="\n")
    test_eq([m.split(":")[0].split(",")[0] for m in messages], [f"record '{name}'" for name in "abcdefg"])
    for message,words in zip(messages, ["no image 'gone.png'", "0 <image> tag(s) for 1 image(s)", "2 <image> tag(s) for 1 image(s)", "turn 0: <image> tag in a record with 0 images", "leaves the image folder",
                                        "turn 0: the text spells the control token '<end_of_turn>'", "turn 1: two turns of 'human' in a row"]): assert words in message

def test_cached_items_equal_lazy_ones():
    def small(): return LazySupervisedDataset([plain, two, {**two, "id": 3}], VLMProcessor(tok, image_size=32, image_size_aux=64), folder)
    lazy, loaded = small(), small().cache_in_memory()
    for i in range(3):
        test_eq(sorted(lazy[i]), sorted(loaded[i]))
        assert all(torch.equal(lazy[i][k], loaded[i][k]) for k in lazy[i])
    assert loaded[1]["image"] is loaded[2]["image"]                # one picture, two records

def test_blind_dataset_shows_black_pictures():
    blind = LazySupervisedDataset([seed], VLMProcessor(tok, image_size=32, image_size_aux=64), folder, blank_images=True)[0]
    assert len(blind["image_aux"].unique()) == 3 and blind["input_ids"].shape == (25,)

def test_folder_and_template_are_checked_at_once():
    from vlm_lit.core import ConfigError
    with expect_fail(ConfigError, contains="no image folder"): LazySupervisedDataset([seed], VLMProcessor(tok), folder/"nowhere")
    with expect_fail(ConfigError, contains="unknown template 'gema'"): LazySupervisedDataset([seed], VLMProcessor(tok, template="gema"), folder)
    (folder/"data.json").write_text(json.dumps([seed]))
    test_eq(LazySupervisedDataset(folder/"data.json", VLMProcessor(tok)).texts([0])[0]["input_ids"].shape, (25,))   # images beside the data file

def test_a_limit_is_kept_before_images_are_opened():
    whole = limited([rounds])
    length = int(whole.lengths[0])
    cut = limited([rounds], max_length=length - 1, overlength="truncate")
    with Breakpoint(LazySupervisedDataset.pixels, at="if self.blank_images", watch="name") as bp: item = cut[0]
    print(LabelStrip(item["input_ids"], item["labels"], tok))
    print(length, "->", num_tokens_with_images(item["input_ids"], 16), "opened:", [hit["name"] for hit in bp.hits])
    test_eq(([hit["name"] for hit in bp.hits], tuple(item["image"].shape), cut.lengths.tolist()), (["photo.png"], (3, 56, 56), [length - 1]))
    test_eq("".join(LabelStrip(item["input_ids"], item["labels"], tok).learned), "a drawing<end_of_turn>\n<eos>a house<end_of_turn>\n<eos>")
    for how in ("error", "skip"):
        with Breakpoint(LazySupervisedDataset.pixels, at="if self.blank_images") as bp:
            with expect_fail(TooLong, contains=f"record 'r': {length} tokens with images of 16 tokens each, max_length is {length - 1}"): limited([rounds], max_length=length - 1, overlength=how)[0]
        test_eq(len(bp.hits), 0)
    with expect_fail(DataError, contains="no image 'gone.png'"): limited([rounds], max_length=length)[0]
    with expect_fail(TooLong, contains="record 'r': its first question and answer do not fit"): limited([rounds], max_length=20, overlength="truncate")[0]

def test_limits_that_cannot_be_are_refused():
    for wrong,message in [({"max_length": 0}, "max_length must be at least 1"), ({"overlength": "shorten"}, "overlength must be one of"), ({"skip_bad": .1}, "skip_bad needs bad_samples")]:
        with expect_fail(ConfigError, contains=message): limited([rounds], **wrong)

def test_hd_crops_come_out_of_the_dataset():
    small = dict(image_size_aux=96, image_size=42)
    several = ({}, dict(image_grid=2), dict(image_grid=2, image_global=True))
    flat, hd, both = [LazySupervisedDataset([seed, two], VLMProcessor(tok, **small, **more), folder) for more in several]
    print(tuple(flat[0]["image"].shape), tuple(hd[0]["image"].shape), tuple(both[1]["image"].shape), both.num_image_tokens)
    with expect_fail(ConfigError, contains="max_length needs num_image_tokens"): LazySupervisedDataset([seed], VLMProcessor(tok, image_size=30), folder, max_length=99)
    with expect_fail(ConfigError, contains="image_tags must be one of"):
        LazySupervisedDataset([seed], VLMProcessor(tok), folder, image_tags="foo")
    test_eq([tuple(d[0]["image"].shape) for d in (flat, hd, both)], [(3, 42, 42), (4, 3, 42, 42), (5, 3, 42, 42)])
    test_eq((tuple(both[1]["image"].shape), flat.num_image_tokens, both.num_image_tokens), ((2, 5, 3, 42, 42), 9, 45))

def test_bytes_become_the_float_picture():
    a, b = limited([seed, two]), limited([seed, two], uint8=True)
    peek(**b[0])
    for i in range(2):
        test_eq((sorted(b[i]), b[i]["image_aux"].dtype), (["image_aux", "input_ids", "labels"], torch.uint8))
        assert torch.equal(b.processor.image_processor.normalize_square(b[i]["image_aux"]), a[i]["image_aux"])

def test_bad_samples_are_noted_left_out_and_bounded():
    import warnings
    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    for workers in (0, 2):
        file = Path(tempfile.mkdtemp())/"bad_samples.jsonl"
        batches = loader(.1, file, workers)
        test_eq(list(batches), [10, 9, 9, 10, 9, 9])
        rows = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["index"])
        test_eq([(row["index"], row["id"]) for row in rows], [(14, "missing"), (29, "truncated"), (44, "forged"), (59, "no turns")])
        test_eq(batches.dataset.bad.totals, (60, 4))
        assert "records are bad, more than the share of 0.05 that may be skipped; see bad_samples.jsonl" in failure(loader(.05, file, workers))
    for row in rows: print(row["id"], "|", row["reason"].replace(str(folder), "images")[:88])
    with expect_fail(DataError, contains="record 'missing': no image"): batches.dataset[14]      # inspecting raises

def test_lengths_and_memory_know_the_bad_samples():
    file = Path(tempfile.mkdtemp())/"bad_samples.jsonl"
    ds = limited([*bad_ones, rounds, seed], skip_bad=.9, bad_samples=file)
    length = int(limited([rounds]).lengths[0])
    test_eq(ds.lengths.tolist(), [40, 40, 0, 0, length, 40])                    # the images are not opened for it
    for overlength,wanted in [("error", length), ("truncate", 50), ("skip", 0)]:
        ds = limited([*bad_ones, rounds, seed], max_length=50, overlength=overlength, skip_bad=.9, bad_samples=file)
        test_eq(ds.lengths.tolist(), [40, 40, 0, 0, wanted, 40])
    lazy = ds.__getitems__(range(6))
    kept = limited([*bad_ones, rounds, seed], max_length=50, overlength="skip", skip_bad=.9, bad_samples=file).cache_in_memory().__getitems__(range(6))
    test_eq((len(lazy), len(kept)), (1, 1))
    assert all(torch.equal(lazy[0][key], kept[0][key]) for key in lazy[0] if key not in ("index", "image_keys"))
    with expect_fail(DataError, contains="no image 'gone.png'"): limited([seed, bad_ones[0]]).cache_in_memory()

def test_skipping_has_limits_of_its_own():
    file = Path(tempfile.mkdtemp())/"bad_samples.jsonl"
    ds = limited([*bad_ones[:2], *good], skip_bad=.5, bad_samples=file)
    test_eq((ds.__getitems__([0, 1]), ds.bad.totals, len(file.read_text().splitlines())), ([], (2, 2), 2))      # a batch may be empty
    with expect_fail(DataError, contains="2 of 2 records are bad, more than the share of 0.01"): limited([*bad_ones[:2], *good], skip_bad=.01, bad_samples=file).__getitems__([0, 1])
    long = [rounds, *good[:30]]
    with expect_fail(TooLong): list(loader(.5, file, 0, long, max_length=45))                         # an error is not skipped
    ds = limited([rounds, plain], max_length=20, overlength="truncate", skip_bad=.6, bad_samples=file)
    test_eq((len(ds.__getitems__([0, 1])), ds.bad.totals), (1, (2, 1)))                               # not even the first answer fits
    test_eq(list(loader(.5, file, 0, long, max_length=45, overlength="skip")), [9, 10, 10, 1])
    assert "max_length is 45" in file.read_text().splitlines()[-1]

def test_an_interrupt_ends_a_run_with_workers():
    (folder/"mixed.json").write_text(json.dumps(mixed))
    (folder/"script.py").write_text("\n".join(SCRIPT))
    run = subprocess.Popen([sys.executable, folder/"script.py", folder/"mixed.json", folder/"skipped.jsonl"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),      # tests in the background ignore it, and children inherit that
                           env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)})
    watch = threading.Timer(120, lambda: os.killpg(run.pid, signal.SIGKILL))      # should it hang after all, the test fails and does not wait
    watch.start()
    try:
        sent = run.stdout.readline().split()
        n, *workers = map(int, run.stdout.readline().split() or [0])
        os.killpg(run.pid, signal.SIGINT)                             # what a terminal sends to all processes of a command
        out, err = run.communicate(timeout=60)
    finally:
        watch.cancel()
        if run.poll() is None: os.killpg(run.pid, signal.SIGKILL)
    print("spawned: samples, seen, bad", sent, "| batch of", n, "| workers:", len(workers), "| last word:", (err.strip() or "nothing").splitlines()[-1])
    assert run.returncode not in (0, None) and "KeyboardInterrupt" in err and len(workers) == 2 and sent == ["56", "60", "4"], err
    for _ in range(50):
        if any(map(alive, workers)): time.sleep(.1)
    assert not any(map(alive, workers))
