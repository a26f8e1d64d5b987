"""Reference values recorded from MGM, all rows of labels.jsonl.xz: seven templates, four
tokenizers.

They lie in tests/golden, with tokenizers cut down to what the rows need; where the full reference
values lie beside the checkout (../shared/golden, or the folder that VLM_LIT_GOLDEN names), they are
checked with the full tokenizers, too.
"""

import json, lzma, os, warnings
from pathlib import Path
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from vlm_lit.text.labels import make_prompt, preprocess
from vlm_lit.text.sentinels import preprocess_multimodal
from vlm_lit.text.templates import get_template
from vlm_lit.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
OWN = ROOT / "tests/golden"
FULL = Path(os.environ.get("VLM_LIT_GOLDEN", ROOT.parent / "shared/golden"))
FOLDERS = [
    OWN,
    pytest.param(
        FULL,
        marks=pytest.mark.skipif(not FULL.is_dir(), reason="no shared/golden beside the checkout"),
    ),
]
TEMPLATES = {
    "gemma": 170,
    "plain": 67,
    "v1": 170,
    "llama_2": 170,
    "llama_3": 170,
    "mpt": 170,
    "chatml_direct": 170,
}
ROLES = {
    "sentencepiece_like": ("<s>", "</s>", "<unk>"),
    "llama3_bos": ("<|begin_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>"),
    "chatml_no_bos": (None, "<|im_end|>", "<|endoftext|>"),
}

def rows(folder, name):
    "One reference file."
    with lzma.open(folder / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]

@pytest.fixture(scope="module", params=FOLDERS, ids=["own", "full"])
def golden(request):
    "Rows and tokenizers of a folder."
    tokenizers = {"gemma": load_tokenizer("gemma")}
    for name, (bos, eos, unk) in ROLES.items():
        packed = (request.param / f"{name}.tokenizer.json.xz").read_bytes()
        backend = Tokenizer.from_str(lzma.decompress(packed).decode())
        tokenizers[name] = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token=unk, pad_token=unk
        )
    return rows(request.param, "labels"), tokenizers

def expected(row, tokenizer):
    """Ids and labels that are right for a row; where MGM's header and answer share a token, every
    answer is tokenized apart."""
    if row["verdict"] != "fused": return row["input_ids"], row["labels"]
    prompt = make_prompt(
        preprocess_multimodal([row["conversations"]], image_tags="mgm")[0],
        tokenizer,
        row["template"],
        row["has_image"],
    )
    ids = list(tokenizer("").input_ids)
    labels = [IGNORE_INDEX] * len(ids)
    begin = 0
    for stop, go_on in [*prompt.images, (len(prompt.text), None)]:
        inside = {edge for answer in prompt.answers for edge in answer if begin < edge < stop}
        edges = sorted({begin, stop, *inside})
        for a, b in zip(edges, edges[1:]):
            own = tokenizer(prompt.text[a:b], add_special_tokens=False).input_ids
            is_answer = any(x <= a < y for x, y in prompt.answers)
            ids += own
            labels += own if is_answer else [IGNORE_INDEX] * len(own)
        if go_on:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
            begin = go_on
    text = lambda ids: tokenizer.decode([i for i in ids if i >= 0])
    # the same text in more tokens
    assert text(ids) == text(row["input_ids"]) and len(ids) > len(row["input_ids"])
    return ids, labels

@pytest.mark.parametrize("template", TEMPLATES)
def test_every_reference_row(golden, template):
    cases, tokenizers = golden
    cases = [case for case in cases if case["template"] == template]
    assert len(cases) == TEMPLATES[template]
    wrong = []
    for row in cases:
        tok = tokenizers[row["tokenizer"]]
        with warnings.catch_warnings():
            # some rows begin with a greeting of the model, which is dropped aloud
            warnings.simplefilter("ignore")
            out = preprocess(
                preprocess_multimodal([row["conversations"]], image_tags="mgm"),
                tok,
                template,
                row["has_image"],
                control_tokens="allow",
            )
            want = expected(row, tok)
        got = out["input_ids"][0].tolist(), out["labels"][0].tolist()
        if got != tuple(want):
            wrong.append((row["id"], row["verdict"], got, want))
    assert not wrong, f"{len(wrong)} rows differ, first: {wrong[0]}"

@pytest.mark.skipif(not FULL.is_dir(), reason="no shared/golden beside the checkout")
def test_reference_files_are_the_ones_kept_here():
    for name in ("prompts", "preprocess_multimodal", "labels"):
        assert rows(OWN, name) == rows(FULL, name)
    kept = rows(OWN, "versions")
    packed = (FULL / "sentencepiece_like.tokenizer.json.xz").read_bytes()
    full = Tokenizer.from_str(lzma.decompress(packed).decode())
    text = lambda i: "<image>" if i == IMAGE_TOKEN_INDEX else full.id_to_token(i)
    assert [row.pop("tokens") for row in kept] == [
        [text(i) for i in row["mgm_input_ids"]] for row in kept
    ]
    assert kept == rows(FULL, "versions")

def test_every_reference_prompt():
    for row in rows(FULL if FULL.is_dir() else OWN, "prompts"):
        conv = get_template(row["template"])
        for role, text in row["turns"]:
            conv.append_message(conv.roles[role == "assistant"], text)
        assert conv.get_prompt() == row["prompt"], row["id"]

def test_every_reference_row_of_preprocess_multimodal():
    for row in rows(FULL if FULL.is_dir() else OWN, "preprocess_multimodal"):
        for name in ("plain", "plain_imse", "mmtag", "mmtag_imse"):
            (got,) = preprocess_multimodal(
                [row["conversations"]],
                "mgm",
                mm_use_im_start_end=name.endswith("imse"),
                mmtag=name.startswith("mmtag"),
            )
            assert [turn["value"] for turn in got] == row[name], (row["id"], name)
