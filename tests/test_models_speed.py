"Derived from nbs/90_speed.ipynb by `make tests`; edit the notebook, not this file."
import functools
from torch import nn
from vlm_lit.core import ConfigError
from vlm_lit.models.mining import recomputed
from fastcore.test import test_eq, test_close, expect_fail
from transformers.utils.logging import disable_progress_bar
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.models.vlm import VLM
from vlm_lit.models.config import VLMConfig
from vlm_lit.models.speed import compile_layers
from vlm_lit.models.speed import enable_mlp_checkpointing

def setup_module():
    global SMALL_TEXT, SPECIAL_IDS, kept_bytes, small_batch, small_config
    torch.set_printoptions(precision=3, sci_mode=False)
    disable_progress_bar()
    SPECIAL_IDS = dict(pad_token_id=0, bos_token_id=2, eos_token_id=1)
    SMALL_TEXT = dict(model_type="gemma", vocab_size=300, hidden_size=16, intermediate_size=32)
    SMALL_TEXT |= dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    SMALL_TEXT |= dict(initializer_range=0.25, **SPECIAL_IDS)
    def small_config(**changes):
        "A model of a few thousand weights, for examples."
        text = dict(SMALL_TEXT)
        vision = dict(image_size=changes.get("image_size", 32), patch_size=8, hidden_size=16)
        vision |= dict(intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        vision_aux = dict(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2)
        parts = dict(text_config=text, vision_config=vision, vision_aux_config=vision_aux)
        sizes = dict(image_size=32, image_size_aux=64, select_layer=-1)
        return VLMConfig(**{**parts, **sizes, **changes})
    def small_batch():
        "Two samples: an image and an answer of two tokens; text only, shorter, padded."
        torch.manual_seed(0)
        labels = [[-100, -100, -100, -100, 20, 21, 1], [-100, -100, 31, 1, -100, -100, -100]]
        return dict(
            input_ids=torch.tensor([[2, 106, -200, 108, 20, 21, 1], [2, 30, 31, 1, 0, 0, 0]]),
            labels=torch.tensor(labels),
            attention_mask=torch.tensor([[1] * 7, [1] * 4 + [0] * 3]).bool(),
            pixel_values=torch.randn(1, 3, 32, 32),
            pixel_values_aux=torch.randn(1, 3, 64, 64),
        )
    def kept_bytes(model, batch):
        "Loss, and bytes that autograd keeps between forward and backward, each memory once."
        kept = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(**batch).loss
        loss.backward()
        return loss.detach(), sum(kept.values())

def test_mlps_made_again_give_the_same_gradients_and_keep_less():
    gradients, sizes = {}, {}
    for what in ("none", "gates", "mlp"):
        torch.manual_seed(0)
        model = VLM(small_config(text_config={**SMALL_TEXT, "intermediate_size": 512})).train()
        model.language_model.requires_grad_(False)
        test_eq(enable_mlp_checkpointing(model.language_model, what), 2)
        loss, sizes[what] = kept_bytes(model, small_batch())
        gradients[what] = [loss, *(p.grad for p in model.image_encoder.parameters())]
    for what in ("gates", "mlp"):
        for got, want in zip(gradients[what], gradients["none"], strict=True):
            test_close(got, want, eps=1e-6)
    assert sizes["mlp"] < sizes["gates"] < sizes["none"]
    test_eq(enable_mlp_checkpointing(model.language_model, "mlp", n_layers=1), 1)
    changed = lambda: ["forward" in m.mlp.__dict__ for m in model.language_model.model.layers]
    test_eq(changed(), [True, False])
    # and back
    test_eq(enable_mlp_checkpointing(model.language_model, "none"), 2)
    test_eq(changed(), [False, False])
    sizes = dict(n_layer=1, n_embd=16, n_head=2, vocab_size=20, bos_token_id=0, eos_token_id=0)
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))
    with expect_fail(ConfigError, contains="a gpt2 has no gated MLP"):
        enable_mlp_checkpointing(gpt2)
    with expect_fail(ConfigError, contains="what must be"):
        enable_mlp_checkpointing(model.language_model, "all")

def test_gates_keep_two_tensors_per_mlp():
    torch.manual_seed(0)
    model = VLM(small_config()).train()
    enable_mlp_checkpointing(model.language_model, "gates")
    is_gate, shapes = "len(tensors) == 2", "[tuple(t.shape) for t in tensors]"
    with Breakpoint(recomputed, at="return checkpoint", watch=[shapes], when=is_gate) as bp:
        model(**small_batch()).loss.backward()
    bp.expect({shapes: [(2, 22, 32)] * 2}, hits=2)

def test_parts_that_are_compiled():
    model = VLM(small_config()).train()
    watch = "[type(part).__name__ for part in parts]"
    with Breakpoint(compile_layers, at="for part in parts: part.forward", watch=[watch]) as bp:
        compile_layers(model, backend="eager")
    names = ["GemmaDecoderLayer", "CLIPEncoderLayer", "ConvNextStage"]
    bp.expect({watch: [name for name in names for _ in range(2)]})

def test_compiled_layers_give_the_same_loss_and_gradients():
    def loss_and_gradients(model, batch):
        "Loss, and gradients of what trains."
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batch = VLM(small_config()).train(), small_batch()
    names = list(model.state_dict())
    plain = loss_and_gradients(model, batch)
    calls = []

    def counting(graph, inputs):
        "A backend of torch.compile that runs the graph as it is, and counts its calls."

        def run(*args):
            calls.append(1)
            return graph(*args)

        return run

    parts = compile_layers(model, backend=counting)
    compiled = loss_and_gradients(model, batch)
    for got, want in zip(compiled, plain, strict=True):
        test_close(got, want, eps=1e-5)
    n_calls = len(calls)
    assert n_calls >= len(parts), (n_calls, len(parts))  # every part ran its graph
    test_eq(list(model.state_dict()), names)
    with torch.no_grad(): model.eval()(**batch)
    test_eq(len(calls), n_calls)  # not outside training
    for part in parts: del part.forward
    model.train()(**batch)
    test_eq(len(calls), n_calls)
