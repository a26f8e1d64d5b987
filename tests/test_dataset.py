"Derived from nbs/07_dataset.ipynb by `make tests`; edit the notebook, not this file."
import importlib.util, json, re
from pathlib import Path
import torch
from torch.utils.data import Dataset
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from vlm_lit.core import IMAGE_TOKEN, ConfigError, DataError
from vlm_lit.templates import get_template
from vlm_lit.sentinels import check_image_count, preprocess_multimodal
from vlm_lit.labels import check_tokenizer, check_turns, preprocess
from vlm_lit.images import interpolate_image, make_square, normalise, open_image, to_bytes
import tempfile
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.breakpoints import Breakpoint
from vlm_lit.core import peek
from vlm_lit.images import sample_image
from vlm_lit.labels import LabelStrip
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.dataset import *

def setup_module():
    global folder, plain, seed, tok, two
    tok = load_tokenizer("gemma")
    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder/"photo.png")
    sample_image(90, 200).save(folder/"tall.png")
    seed = {"id": "seed", "image": "photo.png", "conversations": [{"from": "human", "value": "What is in the photo?\n<image>"},
                                                                  {"from": "gpt", "value": "the box chain purse black"}]}
    plain = {"id": 1, "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    two = {"id": 2, "image": ["photo.png", "tall.png"], "conversations": [{"from": "human", "value": "compare <image> with <image>"}, {"from": "gpt", "value": "taller"}]}

def test_records_are_read_from_json_and_jsonl():
    records = [{"id": "a", "image": "x.png", "conversations": []}, {"id": "b", "conversations": []}]
    with tempfile.TemporaryDirectory() as folder:
        array, lines = Path(folder)/"a.json", Path(folder)/"a.jsonl"
        array.write_text(json.dumps(records, indent=2))
        lines.write_text("\n".join(map(json.dumps, records)) + "\n")
        test_eq(read_records(array), records)
        test_eq(read_records(lines), records)
    test_eq([image_names(r) for r in [*records, {"image": ["p", "q"]}]], [["x.png"], [], ["p", "q"]])

def test_unreadable_records_are_refused_with_their_place():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/"bad.jsonl"
        for text,message in [('{"id": 1, "conversations": []}\n{"id": 2,\n', "bad.jsonl, line 2: not JSON"), ("", "no records in bad.jsonl"),
                             ('{"id": 7, "image": "x.png"}', "record 7: no 'conversations'; the record has ['id', 'image']"), ("[3]", "record 0: a record must be"),
                             ('{"id": 7, "image": 3, "conversations": []}', "record 7: 'image' must be")]:
            path.write_text(text)
            with expect_fail(DataError, contains=message): read_records(path)
        path.write_bytes('{"id": "é"}'.encode("latin-1"))
        with expect_fail(DataError, contains="bad.jsonl: not UTF-8"): read_records(path)
        path.write_text(json.dumps({"id": "line\u2028break", "conversations": []}, ensure_ascii=False), encoding="utf-8")
        test_eq(read_records(path)[0]["id"], "line\u2028break")
        with expect_fail(DataError, contains="no data file"): read_records(Path(folder)/"gone.json")

def test_item_of_the_seed():
    item = LazySupervisedDataset([seed], tok, image_folder=folder)[0]
    test_eq({k: tuple(v.shape) for k,v in item.items()}, {"input_ids": (25,), "labels": (25,), "image": (3, 336, 336), "image_aux": (3, 768, 768)})
    test_eq(item["input_ids"].tolist(), [2, 106, 1645, 108, -200, 108, 1841, 603, 575, 573, 2686, 235336, 107, 108, 106, 2516, 108, 1175, 3741, 9488, 45189, 2656, 107, 108, 1])
    test_eq(item["labels"].tolist(), [-100]*17 + [1175, 3741, 9488, 45189, 2656, 107, 108, 1])

def test_large_image_comes_first():
    with Breakpoint(LazySupervisedDataset.__getitem__, at="data = self.texts([i])[0]", watch=["image_aux[0]"]) as bp:
        LazySupervisedDataset([seed], tok, image_folder=folder)[0]
    print(bp)
    test_eq(tuple(bp["image_aux[0]"].shape), (3, 768, 768))
    with expect_fail(LookupError): bp["image"]                      # not there yet

def test_text_only_and_several_images():
    ds = LazySupervisedDataset([plain, two], tok, image_folder=folder, image_size_aux=64, image_size=32)
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
    ds = LazySupervisedDataset(broken, tok, image_folder=folder, image_size_aux=64, image_size=32)
    messages = []
    for i in range(len(ds)):
        try: ds[i]
        except DataError as e: messages.append(str(e).replace(str(folder), "images"))
    print(*messages, sep="\n")
    test_eq([m.split(":")[0].split(",")[0] for m in messages], [f"record '{name}'" for name in "abcdefg"])
    for message,words in zip(messages, ["no image 'gone.png'", "0 <image> tag(s) for 1 image(s)", "2 <image> tag(s) for 1 image(s)", "turn 0: <image> tag in a record with 0 images", "leaves the image folder",
                                        "turn 0: the text spells the control token '<end_of_turn>'", "turn 1: two turns of 'human' in a row"]): assert words in message

def test_preloaded_items_equal_lazy_ones():
    def small(): return LazySupervisedDataset([plain, two, {**two, "id": 3}], tok, image_folder=folder, image_size_aux=64, image_size=32)
    lazy, loaded = small(), small().preload()
    for i in range(3):
        test_eq(sorted(lazy[i]), sorted(loaded[i]))
        assert all(torch.equal(lazy[i][k], loaded[i][k]) for k in lazy[i])
    assert loaded[1]["image"] is loaded[2]["image"]                # one picture, two records

def test_blind_dataset_shows_black_pictures():
    blind = LazySupervisedDataset([seed], tok, image_folder=folder, image_size_aux=64, image_size=32, blank_images=True)[0]
    assert len(blind["image_aux"].unique()) == 3 and blind["input_ids"].shape == (25,)

def test_folder_and_template_are_checked_at_once():
    from vlm_lit.core import ConfigError
    with expect_fail(ConfigError, contains="no image folder"): LazySupervisedDataset([seed], tok, image_folder=folder/"nowhere")
    with expect_fail(ConfigError, contains="unknown template 'gema'"): LazySupervisedDataset([seed], tok, image_folder=folder, template="gema")
    (folder/"data.json").write_text(json.dumps([seed]))
    test_eq(LazySupervisedDataset(folder/"data.json", tok).texts([0])[0]["input_ids"].shape, (25,))   # images beside the data file

def test_captions_hold_what_the_answers_tell_and_no_more():
    test_eq(caption([("what color is the shape?", "blue"), ("is there not a rectangle?", "no"), ("is there a red shape?", "no")]), "a blue rectangle")
    test_eq(caption([("what color is the triangle?", "teal")]), "a teal triangle")
    test_eq(caption([("what color is the shape?", "teal"), ("is there no circle?", "yes")]), None)
    test_eq(told_by("does the image not contain a gray shape?", "yes"), set())

def test_easy_vqa_as_llava_records():
    sizes = {(split, stage): len(easy_vqa_records(split, stage)) for split in ("train", "test") for stage in (1, 2)}
    test_eq((sizes["train", 1], sizes["train", 2], sizes["test", 2]), (3542, 38575, 9673))
    test_eq(easy_vqa_records("train", 1)[0], llava_record("train-0", "train/images/0.png", "What is in the photo?", "a blue rectangle"))
    train, test = [{r["image"] for r in easy_vqa_records(split, 2)} for split in ("train", "test")]
    test_eq((len(train), len(test), len(train & test)), (4000, 1000, 0))

def test_easy_vqa_item():
    item = LazySupervisedDataset(easy_vqa_records("train", 1), tok, image_folder=easy_vqa_folder(), image_size_aux=64, image_size=32)[0]
    test_eq(tok.decode([i for i in item["labels"].tolist() if i >= 0]), "a blue rectangle<end_of_turn>\n<eos>")
    test_eq((tuple(item["image_aux"].shape), tuple(item["image"].shape)), ((3, 64, 64), (3, 32, 32)))
