"Reference values recorded from MGM (shared/golden): every `gemma` and `plain` row of labels.jsonl.xz."
import json, lzma, warnings
from pathlib import Path
import pytest
from vlm_lit.core import IGNORE_INDEX
from vlm_lit.labels import preprocess
from vlm_lit.sentinels import preprocess_multimodal
from vlm_lit.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FULL = ROOT.parent/"shared/golden/labels.jsonl.xz"   # every row, where the reference values lie beside the checkout
OWN = ROOT/"tests/golden_labels.jsonl.xz"            # the rows of these two templates, kept in the project

def rows(path):
    "The reference rows of the templates that exist so far."
    with lzma.open(path, "rt", encoding="utf-8") as file: cases = [json.loads(line) for line in file]
    return [case for case in cases if case["template"] in ("gemma", "plain")]

@pytest.fixture(scope="module")
def tok(): return load_tokenizer("gemma")

def expected(row, tok):
    "Ids and labels that are right for a row; a fused newline is two newlines, the answer's one learned."
    if row["verdict"] != "fused": return row["input_ids"], row["labels"]
    ids, labels = [], []
    for id,label in zip(row["input_ids"], row["mgm_labels"]):
        text = tok.decode([id]) if id >= 0 else ""
        fused = ids[-2:] == [106, 2516] and label == IGNORE_INDEX and set(text) == {"\n"} and len(text) > 1
        parts = [108, *tok(text[1:], add_special_tokens=False).input_ids] if fused else [id]
        ids += parts
        labels += [IGNORE_INDEX, *parts[1:]] if fused else [label]
    return ids, labels

@pytest.mark.parametrize("path", [OWN, pytest.param(FULL, marks=pytest.mark.skipif(not FULL.exists(), reason="no shared/golden beside the checkout"))], ids=["own", "full"])
def test_every_reference_row_of_gemma_and_plain(path, tok):
    cases = rows(path)
    assert len(cases) == 237
    wrong = []
    for row in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # some rows begin with a greeting of the model, which is dropped aloud
            out = preprocess(preprocess_multimodal([row["conversations"]], image_tags="mgm"), tok, row["template"], row["has_image"], control_tokens="allow")
        got = out["input_ids"][0].tolist(), out["labels"][0].tolist()
        if got != expected(row, tok): wrong.append((row["id"], row["verdict"], got, expected(row, tok)))
    assert not wrong, f"{len(wrong)} rows differ, first: {wrong[0]}"
