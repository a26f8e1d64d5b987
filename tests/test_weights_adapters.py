"Derived from nbs/11_adapters.ipynb by `make tests`; edit the notebook, not this file."
import dataclasses, difflib, re
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from vlm_lit.core import ConfigError
from vlm_lit.files import write_file
from vlm_lit.models.vlm import VLM
from vlm_lit.weights.language_models import LOAD_ERRORS, raise_misfit, read_state, reading
import sys, torch, warnings
import peft
from fastcore.test import expect_fail, test_close, test_eq
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import sample_image
from small_parts import logits, shake, tiny_model, workshop
from vlm_lit.weights.adapters import _inject
from vlm_lit.weights.adapters import _lora_targets
from vlm_lit.weights.adapters import add_lora
from vlm_lit.weights.adapters import has_lora
from vlm_lit.weights.adapters import load_lora
from vlm_lit.weights.adapters import merge_lora
from vlm_lit.weights.adapters import save_lora

def setup_module():

    sys.path[:0] = ["../tests", "tests"]

def test_only_adapters_train_in_the_language_model():
    own = "[n for n, p in model.language_model.named_parameters() if p.requires_grad]"
    with workshop():
        model, _ = tiny_model()
        watch = [f"len({own})", f"{own}[:2]", "{p.dtype for p in model.parameters()}"]
        with Breakpoint(_inject, at="return model.train", watch=watch) as bp:
            add_lora(model, {"r": 4})
    assert model.image_encoder.mm_projector[0].weight.requires_grad  # trains as it is
    bp.expect({f"len({own})": 2 * 28, f"all('.lora_' in n for n in {own})": True})

def test_adapters_in_the_whole_model_would_be_in_the_tower():
    with workshop(): model, _ = tiny_model()
    with Breakpoint(_lora_targets, at="return list(wanted or kinds)", watch="kinds len(linear)") as bp:
        names = _lora_targets(model.language_model, None)
    inside = [n for n, m in model.image_encoder.named_modules() if n.split(".")[-1] in names]
    print(len(inside), "in the tower:", *sorted({name.split(".")[-1] for name in inside}))
    test_eq(len(inside), 2 * 3)
    bp.expect(kinds="down_proj gate_proj k_proj o_proj q_proj up_proj v_proj".split())
    bp.expect({"len(linear)": 28})

def test_a_misspelt_target_is_an_error():
    targets = ["q_proj", "v_porj"]
    with workshop():
        model, _ = tiny_model()
        with Breakpoint(_lora_targets, at="raise ConfigError(", watch="target kinds") as bp:
            with expect_fail(ConfigError, contains="did you mean 'v_proj'"):
                add_lora(model, {"target_modules": targets})
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets), model.language_model)
    adapters = [n for n, _ in model.named_parameters() if ".lora_A." in n]
    print(len(adapters), "adapters of peft:", *{name.split(".")[-4] for name in adapters})
    test_eq({name.split(".")[-4] for name in adapters}, {"q_proj"})
    bp.expect(target="v_porj")

def test_merging_changes_weights_and_no_logit():
    norm = "layer.get_base_layer().weight.norm()"
    with workshop():
        model, processor = tiny_model()
        add_lora(model, {"r": 4, "target_modules": ["q_proj"]})
        shake(model, "language_model.model.layers")
        before = logits(model, processor)
        with Breakpoint(merge_lora, at="layer.merge()", watch=["name", norm]) as bp:
            merge_lora(model)
        change = float((logits(model, processor) - before).abs().max())
    print(f"largest change of a logit: {change:.0e}")
    assert change < 1e-4
    bp.expect({"name": "model.layers.0.self_attn.q_proj"}, hits=4)
    bp.expect_after({norm: lambda after: abs(after - bp[norm]) > 1e-3})

def test_merged_adapters_give_equal_logits():
    with workshop():
        model, processor = tiny_model()
        plain, names = logits(model, processor), [n for n, _ in model.named_parameters()]
        add_lora(model.train(), {"r": 4, "alpha": 8, "dropout": 0.5}).eval()
        test_close(logits(model, processor), plain, eps=1e-6)  # adapters begin at zero
        lora = {n for n, p in model.named_parameters() if ".lora_" in n}
        test_eq(len(lora), 2 * 4 * 7)
        assert all(n.startswith("language_model.model.layers") for n in lora)
        parameters = model.language_model.named_parameters("language_model")
        test_eq({n for n, p in parameters if p.requires_grad}, lora)
        assert model.image_encoder.mm_projector[0].weight.requires_grad  # trains as it is
        parameters = list(model.language_model.named_parameters())
        frozen = {n: p.clone() for n, p in parameters if not p.requires_grad}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
        turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "blue"}]
        inputs = processor(turns, sample_image(64, 64))
        for _ in range(2):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        # the base has not moved
        assert all(torch.equal(p, frozen[n]) for n, p in parameters if n in frozen)
        adapted = logits(model, processor)
        assert (adapted - plain).abs().max() > 1e-3
        with expect_fail(ConfigError, contains="has adapters already"):
            add_lora(model, {})
        merge_lora(model)
        test_close(logits(model, processor), adapted, eps=1e-5)
        test_eq([n for n, _ in model.named_parameters()], names)  # a plain model again
        assert not has_lora(model)

def test_adapters_are_peft_files():
    with workshop() as folder:
        from peft import PeftModel

        model, processor = tiny_model()
        bare = tiny_model()[0].language_model
        add_lora(model, {"r": 4, "alpha": 8, "target_modules": ["q_proj", "mlp.up_proj"]})
        layers = "language_model.model.layers"
        shake(model, f"{layers}.0.self_attn.q_proj.lora_", f"{layers}.3.mlp.up_proj.lora_")
        save_lora(model, folder)
        print(sorted(p.name for p in folder.iterdir() if p.is_file()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers 5.23, for peft
            theirs, ids = PeftModel.from_pretrained(bare, str(folder)).eval(), torch.tensor([[2, 8, 9]])
        with torch.no_grad():
            want = model.language_model(input_ids=ids).logits
            test_close(theirs(input_ids=ids).logits, want, eps=1e-6)
        again = load_lora(tiny_model()[0], folder)
        test_close(logits(again, processor), logits(model, processor), eps=1e-6)
        trained = [n for n, p in again.language_model.named_parameters() if p.requires_grad]
        assert trained and all(".lora_" in n for n in trained)
        half = tiny_model(dtype=torch.bfloat16)[0]
        load_lora(half, folder)
        test_eq({p.dtype for n, p in half.named_parameters() if ".lora_" in n}, {torch.float32})
        turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "blue"}]
        inputs = processor(turns, sample_image(64, 64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half(**inputs).loss.backward()
        other = add_lora(tiny_model()[0], {"r": 4, "target_modules": ["q_proj"]})
        message = "adapter_model.safetensors does not fit the model: unexpected 8"
        with expect_fail(ConfigError, contains=message): load_lora(other, folder)
        with expect_fail(ConfigError, contains="no adapter in 'tokenizer'"):
            load_lora(other, "tokenizer")

def test_lora_targets_that_fit_nothing_are_refused():
    with workshop():
        model, _ = tiny_model()
        misspelled = (
            "target_modules 'v_porj' fits no linear layer of the language model; did you mean 'v_proj'"
        )
        for lora, words in [
            ({"target_modules": ["q_proj", "v_porj"]}, misspelled),
            ({"target_modules": "fc1"}, "there are: down_proj, gate_proj"),
            ({"target_modules": ["lm_head"]}, "'lm_head' fits no linear layer"),
            ({"rank": 8}, "lora: unknown key 'rank'"),
            ({"r": 0}, "lora: "),
            ({"bias": "all"}, "bias must be 'none'"),
            ({"target_modules": r".*\.fc\d"}, "fits no linear layer"),
            ({"target_modules": "("}, "fits no linear layer"),
        ]:
            with expect_fail(ConfigError, contains=words): add_lora(model, lora)
        assert not has_lora(model)
        add_lora(model, {"target_modules": r".*layers\.[01]\..*_proj"})  # a pattern: two of four layers
        test_eq(sum(".lora_A." in n for n, _ in model.named_parameters()), 2 * 7)
