"Derived from nbs/12_generation.ipynb by `make tests`; edit the notebook, not this file."
import warnings
import torch
from PIL import Image
from vlm_lit.core import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from vlm_lit.templates import Segment
from vlm_lit.sentinels import move_tag
from vlm_lit.labels import generation_ids, preprocess
from vlm_lit.images import prepare_image
from vlm_lit.batches import DataCollatorForSupervisedDataset
from vlm_lit.model import VLM
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.core import IGNORE_INDEX, DataError, peek
from vlm_lit.images import sample_image
from vlm_lit.labels import preprocess
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.weights import make_model, tiny_config
from vlm_lit.generation import *

def setup_module():
    global model, tok, used, words
    tok = load_tokenizer("gemma")
    words = "what color is the shape? a blue rectangle circle yes no"
    used = sorted({0, 1, 2, 3, 106, 107, 108, 1645, 2516, *tok(words).input_ids, *tok("\nwhat").input_ids})
    model = make_model(tiny_config(tuple(used), (.5,)*3, (.2,)*3), seed=0).eval()

def test_question_is_a_prefix_of_its_training_sample():
    asked = question_ids("what color is the shape?", tok).tolist()
    told = preprocess([[{"from": "human", "value": "<image>\nwhat color is the shape?"}, {"from": "gpt", "value": "blue"}]], tok)
    print(tok.decode(asked[:4]), "|", tok.decode(asked[5:]))
    test_eq(told["input_ids"][0][:len(asked)].tolist(), asked)
    test_eq(told["labels"][0][len(asked)].item(), tok("blue", add_special_tokens=False).input_ids[0])
    test_eq(question_ids("<image>\nwhat color is the shape?", tok).tolist(), asked)
    with expect_fail(DataError, contains="spells the control token"): question_ids("x<end_of_turn>", tok)

def test_rows_move_to_the_right_end():
    rows = torch.tensor([[[1.], [2.], [0.]], [[3.], [4.], [5.]]])
    moved, mask = pad_left(rows, torch.tensor([[1, 1, 0], [1, 1, 1]]).bool())
    print(moved[..., 0].tolist(), mask.int().tolist())
    test_eq(moved[..., 0].tolist(), [[0, 1, 2], [3, 4, 5]])
    test_eq(mask.int().tolist(), [[0, 1, 1], [1, 1, 1]])

def test_stop_tokens_come_from_template_and_tokenizer():
    print(stop_ids(tok), stop_ids(tok, "plain"))
    test_eq((stop_ids(tok), stop_ids(tok, "plain")), ([1, 107], [1, 108]))

def test_batched_generation_equals_a_plain_greedy_loop():
    questions = ["what color is the shape?", "is the shape a blue circle?", "what?"]
    samples = [question_sample(sample_image(), q, tok, model.cfg) for q in questions]
    together = generate_ids(model, samples, tok, max_new_tokens=5)
    stops = set(stop_ids(tok))
    for sample,answer in zip(samples, together):
        embeds, _ = model.prepare(sample["input_ids"][None], images=sample["image"][None], images_aux=sample["image_aux"][None])
        written = []
        with torch.no_grad():
            while len(written) < 5:
                row = model.language_model(inputs_embeds=embeds).logits[0, -1].argmax()
                i = model.id_table.to_ids(row).item()
                if i in stops: break
                written.append(i)
                embeds = torch.cat([embeds, model.embed(torch.tensor([[i]]))], 1)
        test_eq(answer, written)
    print([len(a) for a in together], "ids written, as by the loop")

def test_answer_warns_of_words_the_model_cannot_read():
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = answer(model, sample_image(), "what color is the zebra?", tok, max_new_tokens=3)
    print(str(caught[-1].message))
    assert isinstance(text, str) and "zebra" in str(caught[-1].message)

def test_padding_on_the_right_changes_answers():
    batch = DataCollatorForSupervisedDataset(tok.pad_token_id)(samples := [question_sample(sample_image(), q, tok, model.cfg) for q in ["what?", "is the shape a blue circle?"]])
    embeds, plan = model.prepare(**{k: v for k,v in batch.items() if k != "labels"})
    with torch.no_grad():
        right = model.language_model(inputs_embeds=embeds).logits[:, -1]
        left_embeds, mask = pad_left(embeds, plan.filled)
        left = model.language_model(inputs_embeds=left_embeds, attention_mask=mask.long(), position_ids=(mask.long().cumsum(1) - 1).clamp(min=0)).logits[:, -1]
        alone = model.language_model(inputs_embeds=embeds[:1, :int(plan.filled[0].sum())]).logits[:, -1]
    print("short question, padded left, as if alone:", torch.allclose(left[0], alone[0], atol=1e-4), " padded right:", torch.allclose(right[0], alone[0], atol=1e-4))
    assert torch.allclose(left[0], alone[0], atol=1e-4) and not torch.allclose(right[0], alone[0], atol=1e-4)
