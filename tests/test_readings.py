"The answers of docs/readings/questions.json are what the code gives."

import json
from pathlib import Path
import pytest
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.images import sample_image
from vlm_lit.processor import VLMProcessor
from vlm_lit.text.sentinels import preprocess_multimodal, tokenizer_image_token
from vlm_lit.text.tokenizer import load_tokenizer, prepare_tokenizer

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = json.loads((ROOT / "docs/readings/questions.json").read_text(encoding="utf-8"))
SEED = json.loads((ROOT / "tests/worked_example.json").read_text(encoding="utf-8"))

@pytest.fixture
def names(tmp_path):
    tok = load_tokenizer("gemma")

    def item(question=None, answer=None, size=(500, 375)):
        sample_image(*size).save(tmp_path / "photo.png")
        human, gpt = (dict(turn) for turn in SEED["record"]["conversations"])
        human["value"] = question or human["value"]
        gpt["value"] = answer or gpt["value"]
        record = {"id": "seed", "image": "photo.png", "conversations": [human, gpt]}
        return LazySupervisedDataset([record], VLMProcessor(tok), tmp_path)[0]

    def error(**changes):
        try: return str(item(**changes))
        except Exception as e: return type(e).__name__

    def left_in():
        first, second = (tok(text).input_ids for text in SEED["prompt"].split("<image>"))
        return [*first, -200, *second]

    return {
        **{"tok": tok, "item": item, "error": error, "left_in": left_in},
        "preprocess_multimodal": preprocess_multimodal,
        "prepare_tokenizer": prepare_tokenizer,
        "tokenizer_image_token": lambda prompt, tok: [
            int(i) for i in tokenizer_image_token(prompt, tok)
        ],
    }

@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: f"question_{q['n']}")
def test_the_answer_is_what_the_code_gives(question, names):
    assert eval(question["code"], names) == question["answer"]
