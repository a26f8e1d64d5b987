"Derived from nbs/10f_llava_hf.ipynb by `make tests`; edit the notebook, not this file."
import copy
from pathlib import Path
import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
from transformers import CLIPImageProcessorPil, GenerationConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration, LlavaImageProcessorPil, LlavaProcessor
from vlm_lit.core import IMAGE_TOKEN, ConfigError
from vlm_lit.files import read_json
from vlm_lit.models.config import VLMConfig
from vlm_lit.models.towers import VIT_MODEL_TYPES, tower_depth
from vlm_lit.models.vlm import VLM
from vlm_lit.processor import VLMProcessor
from vlm_lit.text.chat_templates import stop_text, template_frame
from vlm_lit.text.encode import pad_id
from vlm_lit.text.labels import check_tokenizer, generation_prompt
from vlm_lit.text.templates import conv_templates
from vlm_lit.weights.build import combined_model
from vlm_lit.weights.language_models import print_status, quiet, raise_misfit, reading
from vlm_lit.weights.language_models import check_finite, mismatched_names
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from fastcore.test import test_eq, expect_fail
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, GemmaConfig, LlamaConfig
from transformers import MistralConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.llama.modeling_llama import LlamaModel
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import sample_image
from vlm_lit.weights.presets import make_model
from small_parts import TINY_TEXT, TINY_VISION, hushed, same, shake, small_tokenizer
from small_parts import three_tokenizers
from vlm_lit.weights.llava_hf import check_plain_llava
from vlm_lit.weights.llava_hf import export_llava_hf
from vlm_lit.weights.llava_hf import image_tokenizer
from vlm_lit.weights.llava_hf import llava_image_processor
from vlm_lit.weights.llava_hf import load_llava_hf
from vlm_lit.weights.llava_hf import read_llava_hf_processor
from vlm_lit.weights.llava_hf import with_image_parts

def setup_module():
    global CHATML, CLIP, KINDS, LLAVA_15, OUTSIDE, SIGLIP, TEMPLATE, answers_outside, compare, image, new_name, old_name, opened, pixel_difference, published, their_inputs, tiny
    sys.path[:0] = ["../tests", "tests"]
    TEMPLATE = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    )
    KINDS = {"llama": LlamaConfig, "gemma": GemmaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}
    CLIP = CLIPVisionConfig(**TINY_VISION)
    SIGLIP = SiglipVisionConfig(**TINY_VISION)
    def tiny(kind="llama", vision=CLIP, template="hf", seed=0, **settings):
        "A model from scratch with one tower, and its processor."
        tokenizer = small_tokenizer()
        tokenizer.chat_template = TEMPLATE
        ids = dict(bos_token_id=2, eos_token_id=1, pad_token_id=0)
        text = KINDS[kind](**{**TINY_TEXT, "vocab_size": len(tokenizer)}, **ids)
        aspect = settings.pop("aspect", "square")
        config = VLMConfig(text, vision, **{"image_size": 28, "select_layer": -2, **settings})
        model = make_model(config, seed).eval()
        for p in model.language_model.parameters():
            p.data *= 4  # answers that differ from each other
        processor = VLMProcessor.for_model(config, tokenizer, template, aspect=aspect)
        processor.set_generation_config(model)
        return model, processor
    def pixel_difference(image, **settings):
        _, processor = tiny(**settings)
        with hushed(): theirs = llava_image_processor(processor)
        a = processor.image_processor(image)["pixel_values"]
        b = theirs(image, return_tensors="pt")["pixel_values"]
        return float((a - b).abs().max())
    def their_inputs(processor, image, question, device="cpu"):
        "Inputs of transformers' processor for one question about one image."
        parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    def opened(folder, **kwargs):
        "transformers' model and processor of a folder; what did not fit."
        with hushed():
            model, info = AutoModelForImageTextToText.from_pretrained(
                folder, output_loading_info=True, **kwargs
            )
            return model.eval(), AutoProcessor.from_pretrained(folder), info
    def compare(model, processor, folder, size=(64, 48), question="what color is the shape?"):
        "Ids, pixels, logits and answers of both sides; each the largest difference or equality."
        theirs, their_processor, info = opened(folder)
        image = sample_image(*size)
        mine, x = processor(question, image), their_inputs(their_processor, image, question)
        small = processor.image_processor(image)["pixel_values"]
        is_image = mine["input_ids"] == model.config.image_token_id
        ids = mine["input_ids"].masked_fill(is_image, theirs.config.image_token_id)
        ours = model(**mine).logits
        other = theirs(**{**x, "pixel_values": small}).logits[..., : ours.shape[-1]]
        settings = dict(max_new_tokens=8, do_sample=False)
        answer = model.generate(**mine, **settings)[0].tolist()
        own = theirs.generate(**{**x, "pixel_values": small}, **settings)[0].tolist()
        return {
            "fits": not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")),
            "ids": torch.equal(ids, x["input_ids"]),
            "pixels": float((small - x["pixel_values"]).abs().max()),
            "logits": (ours - other).abs().max().item(),
            "answers": answer[-8:] == own[-len(answer[-8:]) :],
        }
    OUTSIDE = '''
import json, sys
sys.modules["vlm_lit"] = None
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, limit = sys.argv[1], dict(max_new_tokens=8, do_sample=False)
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
image = {"type": "image", "image": Image.open(folder + "/photo.png")}
parts = [image, {"type": "text", "text": "what color is the shape?"}]
messages = [{"role": "user", "content": parts}]
options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
inputs = processor.apply_chat_template(messages, **options)
new = model.generate(**inputs, **limit)[0, inputs["input_ids"].shape[1]:]
answer = processor.decode(new, skip_special_tokens=True)
pipe = pipeline("image-text-to-text", model=folder)
said = pipe(text=messages, return_full_text=False, **limit)[0]["generated_text"]
print(json.dumps([type(model).__name__, type(processor).__name__, answer, said]))
'''
    def answers_outside(folder):
        "What a process without this package gets."
        sample_image(64, 48).save(Path(folder) / "photo.png")
        command = [sys.executable, "-c", OUTSIDE, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])
    LLAVA_15 = (
        "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    CHATML = (
        "{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
    )
    def published(folder, kind="llama", layers=3, layer=-2, rename=None, template=LLAVA_15):
        "A folder as LLaVA is published, with random weights; transformers' own model."
        tokenizer = small_tokenizer()
        tokenizer.add_tokens(["<image>", "</s>"], special_tokens=True)
        tokenizer.eos_token = "</s>"
        rows = len(tokenizer) + 11  # published tables are padded
        text = KINDS[kind](**{**TINY_TEXT, "vocab_size": rows})
        vision = CLIPVisionConfig(**{**TINY_VISION, "num_hidden_layers": layers})
        image_id = tokenizer.convert_tokens_to_ids("<image>")
        config = LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=image_id,
            image_seq_length=4,
            vision_feature_layer=layer,
        )
        torch.manual_seed(1)
        model = LlavaForConditionalGeneration(config).eval()
        for p in model.parameters(): p.data += 0.1 * torch.randn_like(p)
        size = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        processor = LlavaProcessor(
            CLIPImageProcessorPil(**size),
            tokenizer,
            patch_size=14,
            chat_template=template,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        with quiet():
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        state = {rename(n) if rename else n: t for n, t in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})
        return model, processor
    image = sample_image(64, 48)
    def old_name(name):
        "As transformers 4.45 wrote them."
        return name.replace("vision_tower.", "vision_tower.vision_model.")
    def new_name(name):
        "As transformers 4.52 and 5 name them inside."
        name = name.replace("language_model.lm_head.", "lm_head.")
        name = name.replace("language_model.model.", "model.language_model.")
        return re.sub(r"^(vision_tower|multi_modal)", r"model.\1", name)

def test_image_gets_the_next_free_id():
    _, processor = tiny()
    print(processor.tokenizer.tokenize("<image>"))
    at = "if tokenizer.encode(IMAGE_TOKEN"
    with Breakpoint(image_tokenizer, at=at, watch="image_id len(known)") as bp:
        image_tokenizer(processor)
    bp.expect({"len(known)": 296}, image_id=296)
    bp.expect_return({"result[0].tokenize('a <image>')[-1]": "<image>"})

def test_the_language_model_gets_equal_embeddings():
    question, image = "what color is the shape?", sample_image(64, 48)
    model, processor = tiny()
    at = dict(at="hidden_states = inputs_embeds", watch="inputs_embeds")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export_llava_hf(model, processor, folder)
        theirs, their_processor, _ = opened(folder)
    with Breakpoint(LlamaModel.forward, **at) as ours:
        model(**processor(question, image))
    inputs = their_inputs(their_processor, image, question)
    with Breakpoint(LlamaModel.forward, **at) as other: theirs(**inputs)
    theirs.config.vision_feature_layer = -2
    with Breakpoint(LlamaModel.forward, **at) as wrong: theirs(**inputs)
    assert ours["inputs_embeds"].shape == wrong["inputs_embeds"].shape
    assert not torch.equal(ours["inputs_embeds"], wrong["inputs_embeds"])
    ours.expect(inputs_embeds=other["inputs_embeds"], hits=1)

def test_another_rescaling_of_pixels_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        with hushed(): published(folder)
        files = [p for p in Path(folder).glob("*.json") if "rescale_factor" in p.read_text()]
        for path in files:
            path.write_text(path.read_text().replace("0.00392156862745098", "0.00784313725490196"))
        with expect_fail(ConfigError, contains="rescale_factor is 2.0, not 1.0"):
            load_llava_hf(folder)

def test_chat_templates_take_parts():
    tokenizer = small_tokenizer()
    parts = [{"type": "image"}, {"type": "text", "text": " what is it? "}]
    render = lambda content, template: tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False
    )
    wrapped = with_image_parts(tokenizer, TEMPLATE)
    test_eq(render(parts, wrapped), render("<image>\nwhat is it?", TEMPLATE))
    test_eq(render(" as it is ", wrapped), render(" as it is ", TEMPLATE))
    test_eq(render(parts * 2, wrapped), render("<image> what is it? <image> what is it? ", TEMPLATE))
    test_eq(with_image_parts(tokenizer, wrapped), wrapped)

def test_pixels_agree_where_the_sizes_do():
    for settings in (dict(), dict(aspect="pad")):
        for size in ((64, 48), (51, 97), (28, 28), (20, 33), (500, 375)):
            assert pixel_difference(sample_image(*size), **settings) == 0
    assert pixel_difference(sample_image(64, 48), image_size_aux=56) > 0.05

def test_logits_are_equal_to_the_last_bit():
    cases = [dict(kind=kind) for kind in ("llama", "gemma", "qwen2", "mistral")]
    cases += [dict(select_layer=-1), dict(select_layer=1), dict(vision=SIGLIP), dict(aspect="pad")]
    cases += [dict(vision=SIGLIP, select_layer=-1)]
    for case in cases:
        model, processor = tiny(**case)
        with tempfile.TemporaryDirectory() as folder:
            export_llava_hf(model, processor, folder, max_shard_size="60KB")
            assert len(list(Path(folder).glob("*.safetensors"))) > 1
            test_eq(AutoProcessor.from_pretrained(folder).tokenizer.padding_side, "left")
            found = compare(model, processor, folder)
            test_eq(
                {k: v for k, v in found.items() if k != "pixels"},
                {"fits": True, "ids": True, "logits": 0.0, "answers": True},
            )
            assert found["pixels"] < 1e-6

def test_ids_are_those_of_training():
    question = "what color is <image> the shape? <image> a blue circle"
    for has_token in (False, True):
        model, processor = tiny()
        if has_token:
            processor.tokenizer.add_tokens([AddedToken("<image>", special=True)], True)
        images = [sample_image(64, 48), sample_image(40, 40)]
        mine = processor(question, images)["input_ids"][0].tolist()
        tokenizer, image_id = image_tokenizer(processor)
        test_eq(tokenizer.convert_tokens_to_ids("<image>"), image_id)
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        theirs = tokenizer(text, add_special_tokens=False).input_ids
        n, own = model.config.num_image_tokens, processor.image_token_id
        want = [i for token in theirs for i in ([own] * n if token == image_id else [token])]
        test_eq(mine, want)

def test_folder_opens_without_this_package():
    model, processor = tiny(seed=3)
    with tempfile.TemporaryDirectory() as folder:
        export_llava_hf(model, processor, folder)
        *classes, answer, said = answers_outside(folder)
    test_eq(classes, ["LlavaForConditionalGeneration", "LlavaProcessor"])
    inputs = processor("what color is the shape?", sample_image(64, 48))
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, -8:].tolist()
    wanted = processor.tokenizer.decode(ids, skip_special_tokens=True)
    test_eq((answer, said), (wanted, wanted))

def test_published_folders_give_the_same_logits():
    cases = [dict(), dict(rename=old_name), dict(rename=new_name), dict(kind="mistral")]
    cases += [dict(layers=24), dict(layers=24, layer=23), dict(layers=4, layer=-1), dict(kind="gemma")]
    for case in cases:
        with tempfile.TemporaryDirectory() as folder, hushed():
            theirs, their_processor = published(folder, **case)
            model, processor = load_llava_hf(folder), read_llava_hf_processor(folder)
        test_eq(processor.template, "v1")
        depth = {24: 23, 4: 4}.get(case.get("layers"), 2)
        test_eq(len(model.image_encoder.vision_tower.encoder.layers), depth)
        mine = processor("what color is the shape?", image)
        pixels = their_processor.image_processor(image, return_tensors="pt")["pixel_values"]
        mine["pixel_values"] = pixels
        with torch.no_grad():
            wanted = theirs(input_ids=mine["input_ids"], pixel_values=pixels).logits
            test_eq((model(**mine).logits - wanted).abs().max().item(), 0.0)

def test_chat_templates_of_published_folders():
    for template, name in [(LLAVA_15, "v1"), (CHATML, "hf"), (TEMPLATE, "hf")]:
        with tempfile.TemporaryDirectory() as folder, hushed():
            _, theirs = published(folder, template=template)
            processor = read_llava_hf_processor(folder)
            test_eq(read_llava_hf_processor(folder, "gemma").template, "gemma")
        test_eq(processor.template, name)
        mine = processor("what color is the shape?", image)["input_ids"][0].tolist()
        if template is CHATML:
            x = their_inputs(theirs, image, "what color is the shape?")["input_ids"][0].tolist()
            image_id = theirs.image_token_id
            own = processor.image_token_id
            test_eq([i for i in mine if i != own], [i for i in x if i != image_id])
    with tempfile.TemporaryDirectory() as folder:
        with hushed():
            published(folder, template="{% for m in messages %}{{ m.role }}{% endfor %}")
        with expect_fail(ConfigError, contains="has no chat template that can be used for labels"):
            read_llava_hf_processor(folder)

def test_folders_that_do_not_fit_are_refused():
    def edited(folder, file, **changes):
        path = Path(folder) / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    for changes, words in [
        (dict(vision_feature_layer=[-2, -1]), "features of several layers side by side"),
        (dict(vision_feature_select_strategy="full"), "vision_feature_select_strategy must be"),
        (dict(projector_hidden_act="relu"), "projector_hidden_act must be 'gelu', got 'relu'"),
        (dict(multimodal_projector_bias=False), "multimodal_projector_bias must be True"),
        (dict(vision_config={"model_type": "pixtral"}), "no vision tower of type 'pixtral'"),
        (dict(model_type="llava_llama"), "give a folder of transformers' LLaVA"),
    ]:
        with tempfile.TemporaryDirectory() as folder:
            with hushed(): published(folder)
            edited(folder, "config.json", **changes)
            with expect_fail(ConfigError, contains=words): load_llava_hf(folder)
    for name, words in [("gone", "missing 1"), ("more", "unexpected 1"), ("shape", "wrong shape 1")]:
        with tempfile.TemporaryDirectory() as folder:
            with hushed(): published(folder)
            path = Path(folder) / "model.safetensors"
            state = load_file(path)
            key = "multi_modal_projector.linear_1.bias"
            if name == "gone": del state[key]
            else:
                state[key if name == "shape" else "image_newline"] = torch.ones(3)
            save_file(state, path, metadata={"format": "pt"})
            with expect_fail(ConfigError, contains=words): load_llava_hf(folder)
    with tempfile.TemporaryDirectory() as folder:
        with hushed(): published(folder)
        own = json.loads((Path(folder) / "processor_config.json").read_text())["image_processor"]
        edited(folder, "processor_config.json", image_processor={**own, "do_center_crop": False})
        with expect_fail(ConfigError, contains="do_center_crop is False, not True"):
            read_llava_hf_processor(folder)

def test_what_does_not_fit_is_named():
    from transformers import ConvNextConfig, Gemma2Config

    aux = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4)
    capped = Gemma2Config(**{**TINY_TEXT, "vocab_size": 300}, final_logit_softcapping=0.5)
    KINDS.update(gemma2=lambda **kw: capped)
    for settings, words in [
        (dict(vision_aux_config=aux, image_size_aux=64), "no high-resolution tower with mining"),
        (dict(image_grid=2), "no images in crops (image_grid 2)"),
        (dict(vision=aux, select_layer=0, image_size=32), "no vision tower of type 'convnext'"),
        (dict(projector_type="linear"), "no projector 'linear'"),
        (dict(projector_type="identity"), "no projector 'identity'"),
        (dict(kind="gemma2"), "no output head of gemma2"),
    ]:
        model = tiny(**settings)[0]
        with expect_fail(ConfigError, contains=f"LLaVA has {words}"):
            check_plain_llava(model, "LLaVA")
    for kind in ("llama", "gemma", "qwen2", "mistral"):
        check_plain_llava(tiny(kind)[0], "LLaVA")
