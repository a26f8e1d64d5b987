"Derived from nbs/05a_encode.ipynb by `make tests`; edit the notebook, not this file."
from collections.abc import Callable
import torch
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import IMAGE_TOKEN, DataError
from vlm_lit.text.messages import image_names
from vlm_lit.core import Segment
from vlm_lit.text.sentinels import check_image_count, preprocess_multimodal
from vlm_lit.text.labels import check_turns, generation_ids, preprocess
import sys
from fastcore.test import test_eq, expect_fail
from tokenizers import normalizers, pre_tokenizers
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN_INDEX, ConfigError, peek
from vlm_lit.text.jinja import to_jinja
from vlm_lit.text.messages import read_record
from vlm_lit.text.templates import conv_templates
from small_parts import golden_tokenizer, three_tokenizers
from vlm_lit.text.encode import bisect_failures
from vlm_lit.text.encode import encode_records
from vlm_lit.text.encode import pad_id
from vlm_lit.text.encode import prompt_ids
from vlm_lit.text.encode import stop_ids
from vlm_lit.text.encode import truncate_at_eos

def setup_module():
    global IMAGE, OWN_TEMPLATE, asked_ids, chat_ids, image_chat, llama, questions, qwen, record, record_of, records, tok, tokenizers_with_image
    sys.path[:0] = ["../tests", "tests"]
    tok, llama, qwen = three_tokenizers()
    def record(n, text):
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]
        return read_record({"id": n, "conversations": turns})
    records = [record(n, "q<eos>" if n in (2, 5) else f"is {n} a number?") for n in range(7)]
    def asked_ids(question, tokenizer=tok, template="gemma"):
        "Prompt of a question about one image."
        turns = [{"from": "human", "value": question}]
        return prompt_ids(read_record({"image": "x", "conversations": turns}), tokenizer, template)
    OWN_TEMPLATE = (
        "{{ bos_token }}{%- for m in messages %}{{ 'USER:\n' if m.role == 'user' else 'MODEL:\n' }}"
    "{%- if m.content is string %}{{ m.content }}{% else %}{%- for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else p.text }}{%- endfor %}{% endif %}{{ eos_token }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ 'MODEL:\n' }}{% endif %}"
    )
    def tokenizers_with_image(template, n=4):
        "The first `n` of four families, each with `<image>` in its vocabulary and a chat template."
        first = three_tokenizers()[1]  # one that puts a space before the first word only
        first.backend_tokenizer.normalizer = normalizers.Sequence([])
        metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        first.backend_tokenizer.pre_tokenizer = metaspace
        for tokenizer in [*three_tokenizers(), first][:n]:
            tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
            tokenizer.chat_template = template
            yield tokenizer
    def chat_ids(messages, tokenizer, **settings):
        "Ids of the tokenizer's own call, with our id for an image."
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **settings)
        image = tokenizer.convert_tokens_to_ids("<image>")
        return [IMAGE_TOKEN_INDEX if i == image else i for i in ids]
    def image_chat(*content, answer="a falcon"):
        "Messages with a question of parts; a text stands for a text part."
        parts = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
        question = {"role": "user", "content": parts}
        return [question, {"role": "assistant", "content": answer}]
    def record_of(messages):
        "A record with as many images as it shows."
        parts = [p for m in messages for p in m["content"] if isinstance(m["content"], list)]
        n_images = sum(part["type"] == "image" for part in parts)
        return read_record({"messages": messages, "images": ["x.png"] * n_images})
    IMAGE = {"type": "image"}
    questions = [
        (IMAGE, "What is it?"),
        ("What is ", IMAGE, "?"),
        (IMAGE, IMAGE, " Which?\n"),
        (IMAGE,),
    ]

def test_one_bad_record_does_not_affect_the_others():
    encode = lambda some: encode_records(some, tok)
    watch = "[own['id'] for own in items]"
    with Breakpoint(bisect_failures, at="if len(items) == 1", watch=watch) as bp:
        found = bisect_failures(records, encode)
    for own in (found[2], found[3]):
        print(str(own)[:80] if isinstance(own, DataError) else own.keys())
    test_eq([n for n, own in enumerate(found) if isinstance(own, DataError)], [2, 5])
    failed = [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2], [1, 2], [2], [3, 4, 5, 6], [5, 6], [5]]
    bp.expect_each({watch: failed})

def test_a_prompt_is_the_beginning_of_its_sample():
    question = "<image>\nwhat color is the shape?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "blue"}]
    with Breakpoint(generation_ids, at="return torch", watch="encoded.ids", tokenizer=tok) as bp:
        asked = asked_ids(question)
    sample = preprocess([turns], tok)["input_ids"][0]
    test_eq(sample[: len(asked)].tolist(), asked.tolist())
    bp.expect({"len(encoded.ids)": 17, "tokenizer.decode(encoded.ids[-2:])": "model\n"})

def test_a_chat_template_gives_its_own_ids():
    tokenizer = next(tokenizers_with_image(OWN_TEMPLATE))
    messages = image_chat("What is ", IMAGE, "?")
    own = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    with Breakpoint(preprocess, at='return {"input_ids"', watch="input_ids[0]") as bp:
        encode_records([record_of(messages)], tokenizer, "hf")
    ids = bp["input_ids[0]"].tolist()
    different = [(a, b) for a, b in zip(own, ids, strict=True) if a != b]
    test_eq(different, [(tokenizer.convert_tokens_to_ids("<image>"), IMAGE_TOKEN_INDEX)])
    bp.expect({"len(input_ids[0])": len(own)})

def test_the_stop_ids_of_gemma():
    with Breakpoint(stop_ids, at="return sorted", watch="stop eos") as bp:
        stop_ids(tok)
    bp.expect(stop=[107, 108, 1], eos=[1]).expect_return(result=[1, 107])

def test_stopping_at_eos_alone_keeps_the_end_of_the_turn():
    with Breakpoint(stop_ids, at="eos = []", set={"stop": [1]}) as bp:
        stop_ids(tok)
    bp.expect_changed(result=([1, 107], [1]))
    answer = tok("blue<end_of_turn>\n<eos>", add_special_tokens=False).input_ids
    print([tok.decode(truncate_at_eos(answer, stops)) for stops in ([1, 107], [1])])

def test_a_record_alone_has_the_ids_that_it_has_among_others():
    found = bisect_failures(records, lambda some: encode_records(some, tok))
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

def test_own_template_gives_the_ids_of_apply_chat_template():
    for tokenizer in tokenizers_with_image(OWN_TEMPLATE):
        for question in questions:
            messages = image_chat(*question)
            (sample,) = encode_records([record_of(messages)], tokenizer, "hf")
            test_eq(sample["input_ids"].tolist(), chat_ids(messages, tokenizer))
            asked = prompt_ids(record_of(messages[:1]), tokenizer, "hf").tolist()
            test_eq(asked, chat_ids(messages[:1], tokenizer, add_generation_prompt=True))
            test_eq(sample["input_ids"][: len(asked)].tolist(), asked)
        text = "<image>\nWhat is it?"  # a record of LLaVA's form: tag, newline, question
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "a falcon"}]
        record = read_record({"image": "x.png", "conversations": turns})
        want = chat_ids(image_chat(text, answer="a falcon"), tokenizer)
        test_eq(encode_records([record], tokenizer, "hf")[0]["input_ids"].tolist(), want)

def test_image_token_of_the_vocabulary_in_an_answer_is_text():
    for tokenizer in tokenizers_with_image(OWN_TEMPLATE):
        messages = image_chat(IMAGE, "How?", answer="Write a tag.")
        record = record_of(messages)
        record["conversations"][1] = {"from": "gpt", "value": "Write <image>."}
        for template in ("hf", "v0"):
            with expect_fail(DataError, contains="<image> in an answer"):
                encode_records([record], tokenizer, template)
            (own,) = encode_records([record], tokenizer, template, "escape")
            ids = own["input_ids"].tolist()
            image = tokenizer.convert_tokens_to_ids("<image>")
            test_eq((ids.count(IMAGE_TOKEN_INDEX), ids.count(image)), (1, 0))

def test_named_templates_place_images_as_llava_does():
    messages = image_chat("What is it?", IMAGE)
    for template in ("gemma", "v1"):
        tokenizer = tok if template == "gemma" else llama
        (own,) = encode_records([record_of(messages)], tokenizer, template)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}]
        turns.append({"from": "gpt", "value": "a falcon"})
        (want,) = encode_records(
            [read_record({"image": "x", "conversations": turns})], tokenizer, template
        )
        test_eq(own["input_ids"].tolist(), want["input_ids"].tolist())
    moved = read_record({"image": "x", "conversations": [{"from": "human", "value": "What?\n<image>"}]})
    front = read_record({"image": "x", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]})
    test_eq(prompt_ids(moved, qwen, "hf").tolist(), prompt_ids(front, qwen, "hf").tolist())

def test_jinja_of_a_named_template_gives_the_ids_of_the_data_path():
    n_same = 0
    for tokenizer in tokenizers_with_image(None, 3):
        for template in conv_templates:
            tokenizer.chat_template = to_jinja(template, bos=True)
            for question in [*questions, ("What now?",), ("{{ x }} ", IMAGE, "\u00a0é\n")]:
                messages = image_chat(*question)
                try:
                    (sample,) = encode_records([record_of(messages)], tokenizer, template)
                except (ConfigError, DataError):
                    continue  # a marker is missing, or an image
                test_eq(chat_ids(messages, tokenizer), sample["input_ids"].tolist())
                asked = prompt_ids(record_of(messages[:1]), tokenizer, template).tolist()
                test_eq(chat_ids(messages[:1], tokenizer, add_generation_prompt=True), asked)
                n_same += 1
    assert n_same > 100

def test_stop_tokens_come_from_template_and_tokenizer():
    test_eq((stop_ids(tok), stop_ids(tok, "plain")), ([1, 107], [1, 108]))
    test_eq((stop_ids(qwen, "hf"), stop_ids(llama, "v1")), ([qwen.eos_token_id], [llama.eos_token_id]))
    test_eq(truncate_at_eos(torch.tensor([7, 8, 107, 0, 0]), [1, 107]), [7, 8])
    test_eq(truncate_at_eos([7, 8], [1, 107]), [7, 8])
    unended = golden_tokenizer("llama3_bos", "<|begin_of_text|>", None, None)
    test_eq(unended.convert_ids_to_tokens(stop_ids(unended, "llama_3")), ["<|eot_id|>"])
    test_eq((pad_id(unended), pad_id(tok), pad_id(qwen)), (0, 0, qwen.pad_token_id))
