"Derived from nbs/05a_encode.ipynb by `make tests`; edit the notebook, not this file."
from collections.abc import Callable
import torch
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import IMAGE_TOKEN, DataError
from vlm_lit.text.messages import image_names
from vlm_lit.debug.label_view import Segment
from vlm_lit.text.sentinels import check_image_count, preprocess_multimodal
from vlm_lit.text.labels import check_turns, generation_ids, preprocess
import sys
from fastcore.test import test_eq, expect_fail
from vlm_lit.core import IGNORE_INDEX, peek
from vlm_lit.text.messages import read_record
from small_parts import golden_tokenizer, three_tokenizers
from vlm_lit.text.encode import bisect_failures
from vlm_lit.text.encode import encode_records
from vlm_lit.text.encode import pad_id
from vlm_lit.text.encode import prompt_ids
from vlm_lit.text.encode import stop_ids
from vlm_lit.text.encode import truncate_at_eos

def setup_module():
    global asked_ids, llama, qwen, tok
    sys.path[:0] = ["../tests", "tests"]
    tok, llama, qwen = three_tokenizers()
    def asked_ids(question, tokenizer=tok, template="gemma"):
        "Prompt of a question about one image."
        turns = [{"from": "human", "value": question}]
        return prompt_ids(read_record({"image": "x", "conversations": turns}), tokenizer, template)

def test_one_bad_record_does_not_affect_the_others():
    def record(n, text):
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]
        return read_record({"id": n, "conversations": turns})

    records = [record(n, "q<eos>" if n in (2, 5) else f"is {n} a number?") for n in range(7)]
    found = bisect_failures(records, lambda some: encode_records(some, tok))
    print([str(own) if isinstance(own, DataError) else len(own["input_ids"]) for own in found])
    test_eq([n for n, own in enumerate(found) if isinstance(own, DataError)], [2, 5])
    alone = encode_records([records[3]], tok)[0]
    assert all((found[3][key] == alone[key]).all() for key in ("input_ids", "labels", "segments"))
    test_eq(bisect_failures([], None), [])

def test_question_is_a_prefix_of_its_training_sample():
    question = "<image>\nwhat is it?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "blue"}]
    for tokenizer, template in [
        (tok, "gemma"),
        (llama, "v1"),
        (llama, "llama_2"),
        (llama, "plain"),
        (qwen, "hf"),
        (qwen, "chatml_direct"),
    ]:
        asked = asked_ids(question, tokenizer, template).tolist()
        sample = preprocess([turns], tokenizer, template)
        ids, labels = sample["input_ids"][0].tolist(), sample["labels"][0].tolist()
        n_prompt, n_supervised = len(asked), sum(i != IGNORE_INDEX for i in labels)
        test_eq(ids[:n_prompt], asked)
        # the next id is supervised
        want = [IGNORE_INDEX] * n_prompt + ids[n_prompt : n_prompt + n_supervised]
        test_eq(labels, want + [IGNORE_INDEX] * (len(ids) - len(want)))
        assert n_supervised
    with expect_fail(DataError, contains="spells the control token"):
        asked_ids("<image> x<end_of_turn>")
    with expect_fail(DataError, contains="2 <image> tag(s) for 1 image(s)"):
        asked_ids("<image> or <image>?")

def test_stop_tokens_come_from_template_and_tokenizer():
    print(
        stop_ids(tok),
        stop_ids(tok, "plain"),
        qwen.convert_ids_to_tokens(stop_ids(qwen, "hf")),
        llama.convert_ids_to_tokens(stop_ids(llama, "v1")),
    )
    test_eq((stop_ids(tok), stop_ids(tok, "plain")), ([1, 107], [1, 108]))
    test_eq((stop_ids(qwen, "hf"), stop_ids(llama, "v1")), ([qwen.eos_token_id], [llama.eos_token_id]))
    test_eq(truncate_at_eos(torch.tensor([7, 8, 107, 0, 0]), [1, 107]), [7, 8])
    test_eq(truncate_at_eos([7, 8], [1, 107]), [7, 8])
    unended = golden_tokenizer("llama3_bos", "<|begin_of_text|>", None, None)
    test_eq(unended.convert_ids_to_tokens(stop_ids(unended, "llama_3")), ["<|eot_id|>"])
    test_eq((pad_id(unended), pad_id(tok), pad_id(qwen)), (0, 0, qwen.pad_token_id))
