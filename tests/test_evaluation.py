"Derived from nbs/13_evaluation.ipynb by `make tests`; edit the notebook, not this file."
import hashlib, re
from collections import Counter
import torch
from rich.progress import track
from vlm_lit.core import IGNORE_INDEX, ConfigError, DataError, progress_console
from vlm_lit.dataset import COLORS, SHAPES, image_names
from vlm_lit.generation import generate_ids
from vlm_lit.model import VLM
import json, lzma
from pathlib import Path
from fastcore.test import test_eq, test_close, expect_fail
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import IMAGE_TOKEN_INDEX
from vlm_lit.dataset import LazySupervisedDataset, easy_vqa_folder, easy_vqa_questions, easy_vqa_records
from vlm_lit.model import VLMConfig
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.evaluation import *

def setup_module():
    global Oracle, golden, golden_tokenizer, llama, questions_of, qwen, results, small_model, tok
    results = next(p for p in (Path("../benchmarks/results"), Path("benchmarks/results")) if p.is_dir())
    golden = next(p for p in (Path("../tests/golden"), Path("tests/golden")) if p.is_dir())
    def golden_tokenizer(name, bos, eos, unk):
        "A tokenizer cut down for tests."
        backend = Tokenizer.from_str(lzma.decompress((golden/f"{name}.tokenizer.json.xz").read_bytes()).decode())
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token=unk, pad_token=unk)
    def small_model(rows, family="gemma", used_ids=None):
        "A small model with random weights for pictures of 64 pixels."
        text = dict(model_type=family, vocab_size=len(used_ids) if used_ids else rows, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=32,
                    initializer_range=.4, pad_token_id=None, bos_token_id=None, eos_token_id=None)
        vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
        aux = dict(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2)
        torch.manual_seed(0)
        return VLM(VLMConfig(text, vision, aux, image_size=32, image_size_aux=64, select_layer=-1, used_ids=used_ids, vocab_size=rows)).eval()
    def questions_of(records, tokenizer, template="gemma", **changes):
        "Records of easy-VQA as a dataset."
        return LazySupervisedDataset(records, tokenizer, image_folder=easy_vqa_folder(), template=template, image_size_aux=64, image_size=32, **changes)
    tok = load_tokenizer("gemma")
    llama = golden_tokenizer("sentencepiece_like", "<s>", "</s>", "<unk>")
    qwen = golden_tokenizer("chatml_no_bos", None, "<|im_end|>", "<|endoftext|>")
    qwen.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    class Oracle(torch.nn.Module):
        "Knows the answers of a dataset; counts the pictures it is shown."
        device = torch.device("cpu")
        def __init__(self, dataset):
            super().__init__()
            self.shown, self.answers = 0, {}
            for n in range(len(dataset)):
                sample = dataset[n]
                asked = len(cut_before_answer(sample)["input_ids"])
                self.answers[self.key(sample["input_ids"][:asked], sample["image_aux"])] = sample["labels"][asked:][sample["labels"][asked:] != IGNORE_INDEX]

        def key(self, ids, picture): return tuple(ids.tolist()), picture.float().sum().item(), picture.float().std().item()

        def generate(self, input_ids, attention_mask, images_aux, image_index=None, images=None, eos_token_id=None, pad_token_id=None, max_new_tokens=None, do_sample=None):
            self.shown += len(images_aux)
            pictures = images_aux if image_index is None else images_aux[image_index]
            rows = [self.answers[self.key(ids[mask], picture)] for ids,mask,picture in zip(input_ids, attention_mask, pictures)]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)

def test_table_counts_by_kind():
    test_eq(accuracy_table(["Blue", "circle", "yes", "yes"], ["blue", "triangle", "yes", "no"]), {"accuracy": .5, "color": 1., "shape": 0., "yes_no": .5, "n": 4})
    test_eq([normalised(t) for t in (" A blue  circle. ", "no")], ["a blue circle", "no"])
    with expect_fail(ConfigError, contains="1 predictions for 2 questions"): accuracy_table(["a"], ["a", "b"])

def test_majority_answer_is_right_for_a_third():
    train_answers, test_answers = [[a for _,a,_ in easy_vqa_questions(split)] for split in ("train", "test")]
    table = accuracy_table([majority_answer(train_answers)]*len(test_answers), test_answers)
    test_eq((round(table["accuracy"], 3), table["color"], table["shape"], table["n"]), (0.373, 0., 0., 9673))
    test_eq(majority_answer(["b", "a", "b", "a", "c"]), "a")

def test_a_question_tells_much_of_its_answer():
    test_eq(question_prior([("a?", "yes"), ("a?", "no"), ("a?", "no"), ("b?", "yes")]), {"a?": "no", "b?": "yes"})
    prior = question_prior([(q, a) for q,a,_ in easy_vqa_questions("train")])
    table = accuracy_table([prior[q] for q,_,_ in easy_vqa_questions("test")], [a for _,a,_ in easy_vqa_questions("test")])
    assert table["yes_no"] > .8 and table["color"] < .2 and table["shape"] < .4 and .6 < table["accuracy"] < .7

def test_questions_about_a_picture_meet_in_a_batch():
    test_eq(picture_batches(["a", "b", "a", "c", "b", "a"], 4), [[0, 2, 5], [1, 4, 3]])
    test_eq(picture_batches(["a"]*5, 2), [[0, 1], [2, 3], [4]])
    test_eq(picture_batches([(), (), ()], 2), [[0, 1], [2]])                                  # no picture: nothing shared
    test_eq(picture_batches([], 2), [])
    records = easy_vqa_records("test", 2)
    batches = picture_batches([record["image"] for record in records], 256)
    test_eq(sorted(n for batch in batches for n in batch), list(range(9673)))
    test_eq(sum(len({records[n]["image"] for n in batch}) for batch in batches), len({record["image"] for record in records}))      # each picture in one batch only
    assert max(map(len, batches)) <= 256 and len(batches) < 9673/256*1.1
    with expect_fail(ConfigError, contains="batch_size must be at least 1"): picture_batches(["a"], 0)

def test_question_ends_where_the_answer_begins():
    records = easy_vqa_records("test", 2)[:2]
    for tokenizer,template,end in [(tok, "gemma", "<start_of_turn>model\n"), (llama, "v1", "ASSISTANT:"), (qwen, "hf", "<|im_start|>assistant\n")]:
        ds = questions_of(records, tokenizer, template)
        cut = cut_before_answer(ds[0])
        text = tokenizer.decode([i for i in cut["input_ids"].tolist() if i != IMAGE_TOKEN_INDEX])
        print(repr(text[-60:]), "->", repr(ds.records[0]["conversations"][1]["value"]))
        assert text.endswith(end)
        talk = {**records[0], "conversations": [*records[0]["conversations"], {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]}
        whole = questions_of([talk], tokenizer, template)[0]
        last = cut_before_answer(whole)["input_ids"]
        assert len(last) > len(ds[0]["input_ids"]) and tokenizer.decode(whole["input_ids"][len(last):]).strip().startswith("yes")
    with expect_fail(DataError, contains="without an answer"): cut_before_answer({"input_ids": torch.tensor([2, 5]), "labels": torch.tensor([-100, -100])})

def test_sample_is_fixed_nested_and_fair():
    chosen = fixed_sample(9673, 1200)
    test_eq(chosen[:6], [15, 36, 44, 46, 74, 76])                                             # as shown above; all results with sample=1200 rest on it
    assert len(set(chosen)) == 1200 and chosen == sorted(chosen) and set(fixed_sample(9673, 400)) < set(chosen)
    assert fixed_sample(9673, 1200, seed=1) != chosen and fixed_sample(50) == list(range(50)) == fixed_sample(50, 99)
    yes_no = [a in ("yes", "no") for _,a,_ in easy_vqa_questions("test")]
    assert abs(sum(yes_no[n] for n in chosen)/1200 - sum(yes_no)/9673) < .04                 # of each kind its share
    test_close(2*(.9*.1/1200)**.5, .017, eps=.001)                                           # "about two points"
    with expect_fail(ConfigError, contains="sample must be at least 1"): fixed_sample(9, 0)

def test_oracle_is_always_right():
    records = easy_vqa_records("test", 2)[:60]
    mixed = [records[7*n % 60] for n in range(50)]             # neighbours show different pictures
    n_pictures = len({record["image"] for record in mixed})
    for tokenizer,template in [(tok, "gemma"), (llama, "v1"), (qwen, "hf")]:
        for ds in (questions_of(mixed, tokenizer, template, uint8=True), questions_of(mixed, tokenizer, template).preload()):
            oracle = Oracle(ds)
            table, predictions = evaluate(oracle, ds, batch_size=17, show=False)
            test_eq((table["accuracy"], table["n"], oracle.shown), (1., 50, n_pictures))
            table, predictions = evaluate(oracle, ds, sample=20, seed=5, batch_size=7, show=False)
            test_eq((table["accuracy"], len(predictions)), (1., 20))
            wanted = [mixed[i]["conversations"][1]["value"] for i in fixed_sample(50, 20, 5)]
            test_eq([normalised(p) for p in predictions], wanted)
    print(n_pictures, "pictures shown for 50 questions")

def test_untrained_models_are_wrong():
    records = easy_vqa_records("test", 2)[:40]
    compact = questions_of(records, tok).preload()
    used = sorted({0, 1, 2, 3, 107} | {i for n in range(40) for i in compact[n]["input_ids"].tolist() if i >= 0})
    for model,ds in [(small_model(256000, used_ids=used), compact), (small_model(32000, "llama"), questions_of(records, llama, "v1", uint8=True))]:
        model.train()
        table, predictions = evaluate(model, ds, show=False)
        test_eq((table["n"], len(predictions)), (40, 40))
        assert table["accuracy"] < .6 and model.training              # it has learned nothing; and is left as it was

def test_predictions_do_not_depend_on_the_expected_answers():
    records = easy_vqa_records("test", 2)[:12]
    other = [{**r, "conversations": [r["conversations"][0], {"from": "gpt", "value": "yellow"}]} for r in records]
    model = small_model(32000, "llama")
    predictions = [predict(model, questions_of(r, llama, "v1", uint8=True), show=False) for r in (records, other)]
    print("same predictions:", predictions[0] == predictions[1])
    test_eq(*predictions)
    assert len(set(predictions[0])) > 1

def test_table_shows_what_there_is():
    some = {"test": {"accuracy": .5, "other": .5, "n": 1200}, "baseline_tables": {"majority": {"accuracy": .25, "yes_no": 1., "n": 8}, "blind": None}}
    print(format_table(some))
    test_eq(table_rows(some), [("% of test questions", "all", "yes/no", "other", "n"), ("this model", "50.00", "-", "50.00", "1200"), ("baseline: majority", "25.00", "100.00", "-", "8")])
    test_eq(len(table_rows({"test": None})), 1)

def test_kept_run_is_better_than_its_baselines():
    kept = json.loads((results/"easy_vqa_tiny.json").read_text())
    assert kept["test"]["n"] == 9673 and kept["test"]["accuracy"] >= .99 and min(kept["test"][k] for k in ("color", "shape", "yes_no")) > .985
    assert kept["baselines"]["untrained"] < kept["baselines"]["majority"] < kept["baselines"]["blind"] < .7
    assert kept["train_seconds"] < 420
    questions = {split: easy_vqa_questions(split) for split in ("train", "test")}
    test_eq(len({q for q,_,_ in questions["train"]}), 107)                               # "about a hundred different questions"
    assert {q for q,_,_ in questions["test"]} <= {q for q,_,_ in questions["train"]}       # "all of which occur in training"
    assert .7 < sum(a in ("yes", "no") for _,a,_ in questions["test"])/9673 < .75           # "almost three quarters"
    red = [a for q,a,_ in questions["train"] if q == "is there not a red shape?"]
    assert red.count("yes")/len(red) > .8                                                 # "mostly answered yes"
