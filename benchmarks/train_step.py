"""Time one training step of stage 1 (projector and mining learn, all else is frozen) and its
memory, against two peers.

    python benchmarks/train_step.py            -> benchmarks/results/train_step_cpu.json or
                                               train_step_<gpu>.json, and .png
    python benchmarks/train_step.py --check    losses and gradients against the peers', nothing
                                               timed or written

reference      what MGM's stage 1 does, by its description: all layers of CLIP; every ConvNeXt stage
               up-sampled to the first one's size; normalization and projection at each of these
               positions; a loop over samples that splices with `torch.cat` and pads; an attention
               mask; logits of all positions in float32, shifted, -100 left out.
vlm_lit        this project, the same weights and batch.
llava          transformers' `LlavaForConditionalGeneration` with the same CLIP, projector and
               language model.
vlm_lit (low)  this project without the high-resolution tower: llava's work.

Losses and gradients must agree, or nothing is timed. Each variant runs in a process of its own. A
step is forward, backward, clipping, AdamW and zeroing; frozen weights have the type of `--dtype`,
AdamW keeps float32 copies of what it moves. Sizes: `mgm-2b` is MGM-2B's with random weights.
`narrow` has an eighth of every width and of the vocabulary and two thirds of the picture's side, so
that the parts of a step keep their shares of the arithmetic; `small` has a third of narrow's
layers, too, so that head and mining weigh about three times as much as at full size: no ratio of
one size is another's, and the result says what arithmetic alone would give (`arithmetic_ratio`).
`tiny` is for `--check`.
"""

import argparse, contextlib, gc, json, math, os, platform, re, resource, statistics, subprocess
import sys, time
from importlib.metadata import version
from pathlib import Path
import torch
import torch.nn.functional as F
from transformers import CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration
from vlm_lit.data.collator import DataCollatorForSupervisedDataset
from vlm_lit.padding import supervised_positions
from vlm_lit.text.sentinels import num_tokens_with_images
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from vlm_lit.models.vlm import VLM
from vlm_lit.models.config import VLMConfig
from vlm_lit.models.splice import expand_sentinels
from vlm_lit.models.speed import compile_layers, enable_mlp_checkpointing
from vlm_lit.training.flops import flops_table, peak_flops, training_flops
from vlm_lit.models.mining import PatchInfoMining
from vlm_lit.models.towers import stage_maps

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {
    "mgm-2b": dict(
        layers=18,
        hidden=2048,
        heads=8,
        head_dim=256,
        ffn=16384,
        vocab=256_000,
        clip=1024,
        clip_layers=24,
        clip_heads=16,
        side=336,
        convnext=(192, 384, 768, 1536),
        depths=(3, 3, 27, 3),
        side_aux=768,
        text=64,
        supervised=20,
        micro_batch=8,
        steps=10,
    ),
    "small": dict(
        layers=6,
        hidden=256,
        heads=8,
        head_dim=32,
        ffn=2048,
        vocab=32_000,
        clip=128,
        clip_layers=8,
        clip_heads=2,
        side=224,
        convnext=(24, 48, 96, 192),
        depths=(1, 1, 9, 1),
        side_aux=512,
        text=40,
        supervised=20,
        micro_batch=4,
        steps=5,
    ),
    "narrow": dict(
        layers=18,
        hidden=256,
        heads=8,
        head_dim=32,
        ffn=2048,
        vocab=32_000,
        clip=128,
        clip_layers=24,
        clip_heads=2,
        side=224,
        convnext=(24, 48, 96, 192),
        depths=(3, 3, 27, 3),
        side_aux=512,
        text=40,
        supervised=20,
        micro_batch=4,
        steps=5,
    ),
    "tiny": dict(
        layers=2,
        hidden=64,
        heads=4,
        head_dim=16,
        ffn=256,
        vocab=1000,
        clip=48,
        clip_layers=3,
        clip_heads=2,
        side=56,
        convnext=(8, 16, 24, 32),
        depths=(1, 1, 2, 1),
        side_aux=128,
        text=24,
        supervised=10,
        micro_batch=3,
        steps=2,
    ),
}
# of the loss, and of each part's gradient: |difference|/|gradient|
TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (1e-2, 5e-2)}
STAGE_1 = {"projector", "mining"}
NAMES = {
    "reference": "reference",
    "vlm_lit": "vlm_lit",
    "llava": "llava",
    "vlm_lit_low": "vlm_lit (low)",
}

def make_config(size, high):
    "The configuration of a size, with or without the high-resolution tower."
    s = SIZES[size]
    text = dict(
        model_type="gemma",
        vocab_size=s["vocab"],
        hidden_size=s["hidden"],
        intermediate_size=s["ffn"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=1,
        head_dim=s["head_dim"],
        max_position_embeddings=8192,
    )
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=s["clip"],
        intermediate_size=4 * s["clip"],
        num_hidden_layers=s["clip_layers"],
        num_attention_heads=s["clip_heads"],
        image_size=s["side"],
        patch_size=14,
    )
    aux = (
        dict(
            model_type="convnext",
            hidden_sizes=list(s["convnext"]),
            depths=list(s["depths"]),
            layer_scale_init_value=0.1,
        )
        if high
        else None
    )
    return VLMConfig(text, vision, aux, image_size=s["side"], image_size_aux=s["side_aux"])

@contextlib.contextmanager
def default_dtype(dtype):
    "New floating-point tensors have this type."
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try: yield
    finally: torch.set_default_dtype(before)

def trained(model):
    "Names and weights that stage 1 moves."
    return {
        name: p
        for name, p in model.named_parameters()
        if name.startswith(("image_encoder.mm_projector", "image_encoder.mining"))
    }

def make_model(args, high):
    """A `VLM` with random weights, the same for every process, made where it will run; stage 1's
    weights learn."""
    torch.manual_seed(0)
    with torch.device(args.device), default_dtype(getattr(torch, args.dtype)):
        model = VLM(make_config(args.size, high)).to(getattr(torch, args.dtype))
        model.requires_grad_(False)
        # attention with contrast, and a normalization that matters
        for name, p in trained(model).items():
            if p.dim() > 1: p.normal_(std=p.shape[1] ** -0.5)
            else: p.normal_(mean=float("weight" in name), std=0.2)
            p.requires_grad_()
    for part in (model.language_model, model.image_encoder.vision_tower):
        part.set_attn_implementation(args.attn)
    if args.checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()

def make_batch(args, high, micro_batch):
    """A collated batch of random samples, their texts of unequal length, on the device; the same
    for every process."""
    s = SIZES[args.size]
    rng = torch.Generator().manual_seed(0)
    samples = []
    for n in range(micro_batch):
        length, supervised = s["text"] - n % 4, s["supervised"] + n % 3 - 1
        ids = torch.randint(10, s["vocab"] - 1, (length,), generator=rng)
        labels = ids.clone()
        ids[4], labels[: length - supervised] = IMAGE_TOKEN_INDEX, IGNORE_INDEX
        picture = {"image": torch.randn(3, s["side"], s["side"], generator=rng)}
        if high:
            picture["image_aux"] = torch.randn(3, s["side_aux"], s["side_aux"], generator=rng)
        samples.append({"input_ids": ids, "labels": labels, **picture})
    batch = DataCollatorForSupervisedDataset(pad_token_id=0)(samples)
    dtype = getattr(torch, args.dtype)
    for key, v in batch.items():
        batch[key] = v.to(args.device, dtype if v.is_floating_point() else v.dtype)
    return batch

# the peers

def whole_clip(model):
    "CLIP with the layers that this project leaves out, the others shared with the model."
    tower = model.image_encoder.vision_tower
    with torch.device(model.device), default_dtype(model.dtype):
        whole = CLIPVisionModel(tower.config).to(model.dtype).requires_grad_(False).eval()
    whole.set_attn_implementation(tower.config._attn_implementation)
    whole.embeddings, whole.pre_layrnorm = tower.embeddings, tower.pre_layrnorm
    for n, layer in enumerate(tower.encoder.layers):
        whole.encoder.layers[n] = layer
    return whole

def reference_mining(mining, low, maps):
    """Every stage up-sampled, every position normalized and projected, each query attends to its
    window."""
    grid, base = math.isqrt(low.shape[1]), maps[0].shape[-1]
    whole = torch.cat(
        [maps[0]]
        + [
            F.interpolate(m, size=(base, base), mode="bilinear", align_corners=False)
            for m in maps[1:]
        ],
        1,
    )
    n = len(whole)
    channels = whole.shape[1]
    width = base // grid
    windows = (
        whole.reshape(n, channels, grid, width, grid, width)
        .permute(0, 2, 4, 3, 5, 1)
        .reshape(n, grid * grid, width * width, channels)
    )
    query = mining.vlm_uni_query_projector(low)[:, :, None]
    key = mining.vlm_uni_aux_projector(windows)
    value = mining.vlm_uni_val_projector(windows)
    share = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return low + (share @ value)[:, :, 0]

def reference_splice(embed, batch, rows):
    """Sample after sample: pieces of text and picture one behind the other, then padding to the
    longest."""
    samples, n = [], 0
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
        ids, labels = ids[mask], labels[mask]
        embeds, kept = [], []
        begin = 0
        for place in (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist():
            embeds += [embed(ids[begin:place]), rows[n]]
            kept += [labels[begin:place], labels.new_full((len(rows[n]),), IGNORE_INDEX)]
            begin, n = place + 1, n + 1
        own = torch.cat([*embeds, embed(ids[begin:])])
        samples.append((own, torch.cat([*kept, labels[begin:]])))
    longest = max(len(labels) for _, labels in samples)
    short = [longest - len(labels) for _, labels in samples]
    embeds = torch.stack(
        [torch.cat([e, e.new_zeros(k, e.shape[1])]) for (e, _), k in zip(samples, short)]
    )
    labels = torch.stack(
        [torch.cat([l, l.new_full((k,), IGNORE_INDEX)]) for (_, l), k in zip(samples, short)]
    )
    places = torch.arange(longest, device=embeds.device)
    return embeds, labels, torch.stack([places < longest - k for k in short])

class Reference:
    "Loss of a batch by the reference algorithm."

    def __init__(self, model):
        self.model, self.clip = model, whole_clip(model)
        model.image_encoder.vision_tower = None

    def __call__(self, batch, mark=lambda name: None):
        encoder, lm = self.model.image_encoder, self.model.language_model
        with torch.no_grad():
            low = self.clip(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][
                :, 1:
            ]
            mark("low tower")
            maps = stage_maps(encoder.vision_tower_aux, batch["pixel_values_aux"])
            mark("high tower")
        features = reference_mining(encoder.mining, low, maps)
        del maps
        mark("mining")
        rows = encoder.mm_projector(features)
        mark("projector")
        embeds, labels, mask = reference_splice(lm.get_input_embeddings(), batch, rows)
        logits = lm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits.float()
        return F.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]),
            labels[:, 1:].reshape(-1),
            ignore_index=IGNORE_INDEX,
        )

class Llava:
    "Loss of a batch by transformers' model, whose inputs its processor would have expanded."

    def __init__(self, model):
        cfg, self.owner = model.config, model
        with torch.device("meta"):
            self.model = LlavaForConditionalGeneration(
                LlavaConfig(
                    vision_config=cfg.vision_config,
                    text_config=cfg.text_config,
                    image_token_index=cfg.vocab_size - 1,
                    image_seq_length=cfg.num_image_tokens,
                )
            )
        inner, projector = self.model.model, model.image_encoder.mm_projector
        inner.language_model = model.language_model.model
        self.model.lm_head = model.language_model.lm_head
        inner.vision_tower = whole_clip(model)
        inner.multi_modal_projector.linear_1 = projector[0]
        inner.multi_modal_projector.linear_2 = projector[2]
        self.model.train()
        inner.vision_tower.eval()
        model.image_encoder.vision_tower = None

    def expand(self, batch):
        """Placeholders in the number of patches for each sentinel; what the processor and its
        collator make of the samples."""
        token = self.model.config.image_token_id
        patches = self.owner.config.num_image_tokens
        rows = []
        for ids, labels, mask in zip(
            batch["input_ids"].cpu(), batch["labels"].cpu(), batch["attention_mask"].cpu()
        ):
            times = torch.where(ids[mask] == IMAGE_TOKEN_INDEX, patches, 1)
            rows.append(
                {
                    "input_ids": ids[mask]
                    .masked_fill(ids[mask] == IMAGE_TOKEN_INDEX, token)
                    .repeat_interleave(times),
                    "labels": labels[mask].repeat_interleave(times),
                }
            )
        pad = lambda key, value: torch.nn.utils.rnn.pad_sequence(
            [r[key] for r in rows], batch_first=True, padding_value=value
        )
        lengths = torch.tensor([len(r["labels"]) for r in rows])
        out = {
            "input_ids": pad("input_ids", 0),
            "labels": pad("labels", IGNORE_INDEX),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        }
        return {key: v.to(batch["pixel_values"].device) for key, v in out.items()} | {
            "pixel_values": batch["pixel_values"]
        }

    def __call__(self, batch, mark=None):
        return self.model(**batch, use_cache=False).loss

class Ours:
    "Loss of a batch by this project."

    def __init__(self, model): self.model = model

    def expand(self, batch):
        "Placeholders, and where supervised tokens are predicted; what the collator makes."
        config = self.model.config
        text = [batch[key] for key in ("input_ids", "attention_mask")]
        images = config.num_image_tokens, config.image_token_id
        rows = expand_sentinels(*text, *images, labels=batch["labels"])
        places = supervised_positions(rows["labels"])
        return {**batch, **rows, "supervised_positions": places}

    def __call__(self, batch, mark=None): return self.model(**batch).loss

MAKERS = {"reference": Reference, "vlm_lit": Ours, "llava": Llava, "vlm_lit_low": Ours}

def has_high(name): return name in ("reference", "vlm_lit")

def make_variant(name, args):
    "The loss function of a variant, its weights that learn, and its model."
    # as `VLMTrainingArguments` does
    torch.backends.cuda.matmul.allow_tf32 = args.dtype == "bfloat16"
    model = make_model(args, has_high(name))
    weights = list(trained(model).values())
    if name.startswith("vlm_lit"):
        enable_mlp_checkpointing(model.language_model, args.recompute, args.recompute_layers)
    if args.compile and name.startswith("vlm_lit"):
        compile_parts(model, args.memory_budget, args.backend)
    return MAKERS[name](model), weights, model

def batch_for(loss, args, high, micro_batch):
    "The batch as the variant takes it."
    batch = make_batch(args, high, micro_batch)
    return batch if isinstance(loss, Reference) else loss.expand(batch)

def compile_parts(model, memory_budget, backend="inductor"):
    "`compile_layers` for shapes that do not change."
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = memory_budget
    return compile_layers(model, dynamic=False, backend=backend)

# equality

def loss_and_gradients(loss, batch, weights):
    "The loss, and the gradient of every weight that learns."
    value = loss(batch)
    value.backward()
    grads = {name: p.grad.float().clone() for name, p in weights.items()}
    for p in weights.values(): p.grad = None
    return float(value.detach()), grads

def compare(args, peer, ours, micro_batch):
    "How far loss and gradients of a peer are from ours on the same weights and batch."
    model = make_model(args, has_high(ours))
    weights, batch = trained(model), make_batch(args, has_high(ours), micro_batch)
    compiled = compile_parts(model, args.memory_budget, args.backend) if args.compile else []
    ours = Ours(model)
    own_loss, own = loss_and_gradients(ours, ours.expand(batch), weights)
    for part in compiled: del part.forward  # peers run as they are
    other = MAKERS[peer](model)
    their_loss, theirs = loss_and_gradients(
        other, other.expand(batch) if peer == "llava" else batch, weights
    )
    # by part: a bias of all keys alike has a gradient of zero, of which nothing but noise is left
    parts = {}
    for name, g in theirs.items():
        # bfloat16 sums over all positions are the reference's own noise
        if g.dim() > 1 or args.dtype == "float32":
            parts.setdefault(name.rsplit(".", 2)[0], []).append(name)
    norm = lambda tensors: float(torch.stack([t.norm() for t in tensors]).norm())
    apart = {
        part: norm([own[n] - theirs[n] for n in names]) / norm([theirs[n] for n in names])
        for part, names in parts.items()
    }
    found = {
        "loss": their_loss,
        "ours": own_loss,
        "loss_apart": abs(their_loss - own_loss) / abs(their_loss),
        "gradient_apart": max(apart.values()),
        "gradients_apart": apart,
        "tolerance": TOLERANCE[args.dtype],
        "dtype": args.dtype,
        "size": args.size,
    }
    return {
        **found,
        "equal": found["loss_apart"] <= TOLERANCE[args.dtype][0]
        and found["gradient_apart"] <= TOLERANCE[args.dtype][1],
    }

def check(args, peers, micro_batch):
    "Equality with every peer."
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = args.dtype == "bfloat16"
    pairs = {"reference": "vlm_lit", "llava": "vlm_lit_low"}
    out = {}
    for peer in peers:
        out[peer] = compare(args, peer, pairs[peer], micro_batch)
        release()
    return out

# one step

class MasterAdamW:
    """AdamW on float32 copies of weights of another type; on the weights themselves if they are
    float32."""

    def __init__(self, weights):
        self.weights = weights
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in weights]
        self.adamw = torch.optim.AdamW(self.masters, lr=1e-4, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self):
        for p, m in zip(self.weights, self.masters):
            m.grad = p.grad.to(m.dtype)
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adamw.step()
        for p, m in zip(self.weights, self.masters):
            p.grad = m.grad = None
            if p is not m: p.copy_(m)

def train_step(loss, batch, optimizer, mark=lambda name: None):
    "Forward, backward, clipping, optimizer, zeroing."
    value = loss(batch, mark)
    mark("head and loss")
    value.backward()
    mark("mining and projector, backward")
    optimizer.step()
    mark("optimizer")
    return value.detach()

def synchronise(device):
    if device == "cuda": torch.cuda.synchronize()

def release():
    "Give back what nobody holds."
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache()

class Marks:
    "Seconds between calls, each added to the part that ends there."

    def __init__(self, device):
        self.device = device
        self.seconds = {}
        self.last = None

    def __call__(self, name):
        synchronise(self.device)
        now = time.perf_counter()
        if name and self.last:
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

def watch(model, mark):
    "Marks where a part begins: hooks before the parts, outside anything compiled."
    encoder, lm = model.image_encoder, model.language_model
    before = lambda module, name: module.register_forward_pre_hook(lambda m, a: mark(name))

    def decoder_begins(module, args, kwargs):
        mark("splice and embedding")
        if kwargs["inputs_embeds"].requires_grad:
            kwargs["inputs_embeds"].register_hook(lambda g: mark("decoder, backward"))

    def head_begins(module, args):
        mark("decoder")
        if args[0].requires_grad:
            args[0].register_hook(lambda g: mark("head and loss, backward"))

    hooks = [
        lm.get_decoder().register_forward_pre_hook(decoder_begins, with_kwargs=True),
        lm.get_output_embeddings().register_forward_pre_hook(head_begins),
    ]
    if encoder.vision_tower is None:
        return hooks  # the reference marks its own
    hooks += [
        before(
            encoder.vision_tower, "splice and embedding" if encoder.mining is None else "high tower"
        ),
        encoder.mm_projector.register_forward_hook(lambda m, a, o: mark("projector")),
    ]
    if encoder.mining is None:
        return hooks + [before(encoder.mm_projector, "low tower")]
    return hooks + [
        before(encoder.vision_tower_aux.embeddings, "splice and embedding"),
        before(encoder.mining, "low tower"),
        before(encoder.mm_projector, "mining"),
    ]

# what a process measures

def measure_time(name, args):
    "Seconds of a step, supervised tokens, on a GPU memory, and seconds of its parts."
    loss, weights, model = make_variant(name, args)
    optimizer = MasterAdamW(weights)
    batch = batch_for(loss, args, has_high(name), args.micro_batch)
    seconds = []
    parts = []
    for _ in range(3 if args.device == "cuda" else 1):
        train_step(loss, batch, optimizer)
    if args.device == "cuda": torch.cuda.reset_peak_memory_stats()
    for _ in range(args.steps):
        synchronise(args.device)
        began = time.perf_counter()
        train_step(loss, batch, optimizer)
        synchronise(args.device)
        seconds.append(time.perf_counter() - began)
    memory = {"peak_bytes": torch.cuda.max_memory_allocated()} if args.device == "cuda" else {}
    mark = Marks(args.device)
    if name != "llava": watch(model, mark)
    for _ in range(max(args.steps // 2, 2) if name != "llava" else 0):
        mark.seconds, _ = {}, mark(None)
        train_step(loss, batch, optimizer, mark)
        parts.append(mark.seconds)
    middle = statistics.median(seconds)
    work = batch_flops(args, has_high(name))
    return {
        "seconds": middle,
        "samples_per_second": args.micro_batch / middle,
        "supervised_tokens_per_second": supervised(batch) / middle,
        "tflops_per_second": work / middle / 1e12,
        "mfu": work / middle / peak(args) if peak(args) else None,
        "fastest": min(seconds),
        "slowest": max(seconds),
        **memory,
        "parts": {part: statistics.median(p[part] for p in parts) for part in parts[0]}
        if parts
        else {},
    }

def resident(key="VmRSS"):
    """Bytes of this process in memory now, or at most (`VmHWM`). Where there is no /proc: at most
    since it began."""
    if not Path("/proc/self/status").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )
    return int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def peak_of(call, device):
    "Most bytes held while a call runs: (in all, above what was held before)."
    release()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_allocated() - before
    # forgets the highest mark
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    call()
    return resident("VmHWM"), resident("VmHWM") - before

def measure_memory(name, args):
    """Peak of a step; with `target` (bytes above the start on a CPU, in all on a GPU) also the
    largest micro-batch that stays below."""
    loss, weights, model = make_variant(name, args)
    optimizer, tried = MasterAdamW(weights), {}
    train_step(loss, batch_for(loss, args, has_high(name), 1), optimizer)

    def peak(n):
        batch = batch_for(loss, args, has_high(name), n)
        tried[n] = peak_of(lambda: train_step(loss, batch, optimizer), args.device)
        return tried[n][0 if args.device == "cuda" else 1]

    at_base = peak(args.micro_batch)
    own = sum(
        p.numel() * p.element_size()
        for p in {
            id(p): p
            for m in (model, getattr(loss, "clip", None), getattr(loss, "model", None))
            if m is not None
            for p in m.parameters()
        }.values()
    )
    out = {
        "peak_bytes": tried[args.micro_batch][0],
        "peak_above_start_bytes": tried[args.micro_batch][1],
        "weights_bytes": own,
    }
    return {
        **out,
        **(largest_batch(peak, args.micro_batch, at_base, args.target) if args.target else {}),
        "tried": {n: list(p) for n, p in tried.items()},
    }

def largest_batch(peak, base, at_base, target):
    """The largest micro-batch whose peak is not above the target: a straight line through two
    measurements, then steps down until one holds."""
    if at_base > target: return {"largest_micro_batch": 0}
    slope = max(peak(2 * base) - at_base, 1) / base
    n = max(int(base + (target - at_base) / slope), base)
    while n > base and peak(n) > target: n = min(int(n * 0.97), n - 1)
    return {"largest_micro_batch": n}

def measure_mining(name, args):
    "Mining alone, forward and backward: seconds, and most bytes above the start."
    s, dtype = SIZES[args.mining_size], getattr(torch, args.dtype)
    torch.manual_seed(0)
    grid = s["side"] // 14
    base = s["side_aux"] // 4
    n = args.mining_images
    with torch.device(args.device), default_dtype(dtype):
        mining = PatchInfoMining(s["clip"], sum(s["convnext"]))
        maps = [torch.randn(n, c, base >> k, base >> k) for k, c in enumerate(s["convnext"])]
        low = torch.randn(n, grid * grid, s["clip"])
    function = (
        (lambda: mining(low, maps))
        if name == "fast"
        else (lambda: reference_mining(mining, low, maps))
    )

    def run():
        mining.zero_grad(set_to_none=True)
        function().float().pow(2).mean().backward()

    seconds = []
    if args.mining_repeats > 1: run()
    peak = peak_of(run, args.device)[1]
    for _ in range(args.mining_repeats):
        synchronise(args.device)
        began = time.perf_counter()
        run()
        synchronise(args.device)
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds), "peak_above_start_bytes": peak}

MODES = {
    "time": measure_time,
    "memory": measure_memory,
    "mining": measure_mining,
    "check": lambda name, args: check(args, [name], args.micro_batch)[name],
}

def child(mode, name, args, **changes):
    "Run a measurement in a process of its own; its result."
    settings = {**vars(args), **changes}
    big = (
        {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}
        if settings["device"] == "cpu" and (mode == "memory" or settings.get("honest_rss"))
        else {}
    )
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps([mode, name, settings])],
        capture_output=True,
        text=True,
        env={**os.environ, **big},
    )
    if done.returncode:
        raise SystemExit(f"{mode} of {name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])

def serve(text):
    "What a child process does."
    mode, name, settings = json.loads(text)
    args = argparse.Namespace(**settings)
    torch.set_num_threads(args.threads)
    try: print(json.dumps(MODES[mode](name, args)))
    except torch.cuda.OutOfMemoryError:
        print(json.dumps({"out_of_memory": True}))

# useful work

def flops(args, reference=False):
    """Floating-point operations of a sample by part, as `vlm_lit.training.flops` counts them: 2 x m
    x n x k forwards; as much backwards through what is frozen (only the gradient of its input) and
    twice as much through what trains; nothing backwards through the towers; causal pairs of
    attention; the head for supervised tokens; no recomputation, no padding. Of the reference: what
    it does."""
    s, cfg = SIZES[args.size], make_config(args.size, True)
    length = cfg.num_image_tokens + s["text"] - 1
    if reference: cfg.select_layer = -1  # all layers of CLIP
    table = flops_table(cfg, STAGE_1, [length], 1, length if reference else s["supervised"])
    parts = {part: forward + backward for part, (forward, backward) in table.items()}
    positions = cfg.grid_aux**2 - cfg.num_image_tokens  # that mining need not project
    if reference:
        parts["mining"] += 3 * 2 * 2 * positions * cfg.vision_size * cfg.vision_size_aux
    return {**parts, "all": sum(parts.values())}

def batch_flops(args, high):
    "Of the batch that is timed, the same for every variant that sees the same images."
    cfg = make_config(args.size, high)
    batch = make_batch(
        argparse.Namespace(**{**vars(args), "device": "cpu"}), high, args.micro_batch
    )
    lengths = [
        num_tokens_with_images(ids[mask], cfg.num_image_tokens)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]
    return training_flops(cfg, STAGE_1, lengths, args.micro_batch, supervised(batch))

def supervised(batch):
    "Tokens that the loss is computed on."
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())

def peak(args):
    "FLOPs per second of the card; None if unknown."
    if args.peak_tflops: return 1e12 * args.peak_tflops
    return (
        peak_flops(torch.cuda.get_device_name(), getattr(torch, args.dtype))
        if args.device == "cuda"
        else None
    )

# all together

def measure(args):
    "Equality first, then every variant."
    peers = args.peers.split(",")
    result = {
        "check": {
            peer: child("check", peer, args, micro_batch=min(args.micro_batch, 2)) for peer in peers
        }
    }
    if args.device == "cuda":
        result["check_float32"] = {
            peer: child("check", peer, args, micro_batch=2, size="small", dtype="float32")
            for peer in peers
        }
    wrong = {k: v for checks in result.values() for k, v in checks.items() if not v.get("equal")}
    if wrong:
        raise SystemExit(
            f"losses or gradients differ, nothing is timed: {json.dumps(wrong, indent=1)}"
        )
    pairs = [
        pair for pair in (("reference", "vlm_lit"), ("llava", "vlm_lit_low")) if pair[0] in peers
    ]
    runs = {}
    for pair in pairs:
        for name in pair:
            runs[name] = {
                **child("time", name, args),
                **({} if args.device == "cuda" else child("memory", name, args)),
            }
    if any("out_of_memory" in run for run in runs.values()): return None
    key = "peak_bytes" if args.device == "cuda" else "peak_above_start_bytes"
    for peer, own in pairs:
        runs[own] |= {
            k: v
            for k, v in child("memory", own, args, target=runs[peer][key]).items()
            if k in ("largest_micro_batch", "tried", "peak_above_start_bytes", "weights_bytes")
        }
    ratios = {
        peer: {
            "samples_per_second": runs[own]["samples_per_second"]
            / runs[peer]["samples_per_second"],
            "peak_memory": runs[own][key] / runs[peer][key],
            "micro_batch_in_same_memory": runs[own]["largest_micro_batch"] / args.micro_batch,
        }
        for peer, own in pairs
    }
    result |= {
        "runs": runs,
        "ratios": ratios,
        "mining": {size: mining_alone(args, size) for size in dict.fromkeys([args.size, "mgm-2b"])},
        "flops_a_sample": flops(args),
        "reference_flops_a_sample": flops(args, True),
    }
    result["arithmetic_ratio"] = (
        result["reference_flops_a_sample"]["all"] / result["flops_a_sample"]["all"]
    )
    return result

def mining_alone(args, size):
    "Both ways at a size, and their ratios."
    images = args.micro_batch if size == args.size else 1
    both = {
        name: child(
            "mining",
            name,
            args,
            mining_size=size,
            mining_images=images,
            mining_repeats=1 if args.device == "cpu" and size == "mgm-2b" else 5,
            honest_rss=True,
        )
        for name in ("straightforward", "fast")
    }
    ratio = lambda key: both["straightforward"][key] / both["fast"][key]
    return {
        **both,
        "images": images,
        "times_faster": ratio("seconds"),
        "times_smaller": ratio("peak_above_start_bytes"),
    }

def table(result):
    "The result as lines of text."
    lines = [
        f"{'variant':14}{'samples/s':>10}{'superv./s':>11}"
        f"{'peak MB':>9}{'above start':>12}{'largest batch':>14}"
    ]
    for name, r in result["runs"].items():
        above, largest = r.get("peak_above_start_bytes", 0), r.get("largest_micro_batch", "")
        lines.append(
            f"{NAMES[name]:14}{r['samples_per_second']:10.2f}"
            f"{r['supervised_tokens_per_second']:11.1f}{r['peak_bytes'] / 1e6:9.0f}"
            f"{above / 1e6:12.0f}{largest:>14}"
        )
    for peer, r in result["ratios"].items():
        lines.append(
            f"against {peer}: {r['samples_per_second']:.2f}x samples/s, {r['peak_memory']:.2f} of "
            f"its memory, {r['micro_batch_in_same_memory']:.2f}x micro-batch in the same memory"
        )
    lines.append(
        f"arithmetic alone would give {result['arithmetic_ratio']:.2f}x the samples/s of the "
        "reference"
    )
    for size, r in result["mining"].items():
        lines.append(
            f"mining alone, {size}, {r['images']} image(s): {r['times_faster']:.1f}x faster, "
            f"{r['times_smaller']:.1f}x smaller"
        )
    if result["runs"].get("vlm_lit", {}).get("mfu"):
        lines.append(f"MFU of vlm_lit: {result['runs']['vlm_lit']['mfu']:.1%}")
    for part in dict.fromkeys(p for r in result["runs"].values() for p in r["parts"]):
        line = f"{part:32}"
        for r in result["runs"].values():
            if not r["parts"]: continue
            line += f"{r['parts'][part] * 1e3:12.1f} ms" if part in r["parts"] else " " * 15
        lines.append(line)
    return "\n".join(lines)

def plot(result, path):
    "Where the time goes: a stacked bar for each variant whose parts were measured."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {name: r["parts"] for name, r in result["runs"].items() if r["parts"]}
    fig, ax = plt.subplots(figsize=(7, 1 + 0.6 * len(runs)), layout="constrained")
    colors = plt.get_cmap("tab20").colors
    for n, part in enumerate(dict.fromkeys(p for parts in runs.values() for p in parts)):
        left = []
        for parts in runs.values():
            before = list(parts).index(part) if part in parts else 0
            left.append(sum(list(parts.values())[:before]))
        ax.barh(
            [NAMES[name] for name in runs],
            [parts.get(part, 0) / result["micro_batch"] for parts in runs.values()],
            left=[x / result["micro_batch"] for x in left],
            label=part,
            color=colors[n],
        )
    ax.invert_yaxis()
    ax.set_xlabel("seconds a sample")
    fig.legend(loc="outside lower center", ncols=3, fontsize="x-small", frameon=False)
    fig.savefig(path, dpi=120)

def parse(argv=None):
    "Options, with defaults for the machine."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size",
        choices=list(SIZES),
        help="default: mgm-2b on a GPU, small on a CPU; tiny with --check",
    )
    parser.add_argument("--micro-batch", type=int, help="samples in a step")
    parser.add_argument("--steps", type=int, help="steps that are timed; the median counts")
    parser.add_argument(
        "--attn",
        choices=("sdpa", "eager", "flash_attention_2"),
        default="sdpa",
        help="attention of every variant",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="torch.compile for this project's layers",
    )
    parser.add_argument(
        "--backend",
        default="inductor",
        help="of torch.compile; 'eager' compiles nothing and needs no compiler",
    )
    parser.add_argument(
        "--memory-budget",
        type=float,
        default=1.0,
        help=(
            "with --compile: share of a layer's activations to keep, the cheapest of the rest is "
            "recomputed"
        ),
    )
    parser.add_argument(
        "--recompute",
        choices=("none", "gates", "mlp"),
        default="gates",
        help=(
            "what this project's decoder computes again for the gradient "
            "(enable_mlp_checkpointing); its time is in the result"
        ),
    )
    parser.add_argument(
        "--recompute-layers", type=int, help="so many of the first layers recompute; default: all"
    )
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute decoder layers for the gradient, in every variant",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU")
    parser.add_argument(
        "--peers", default="reference,llava", help="which of reference,llava to compare with"
    )
    parser.add_argument("--peak-tflops", type=float, help="the card's dense bf16 peak")
    parser.add_argument("--out", type=Path, help="JSON file; the plot goes beside it")
    parser.add_argument("--note", help="a sentence about this measurement, for the result")
    parser.add_argument(
        "--check",
        action="store_true",
        help="only compare losses and gradients; exit status 1 if they differ",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() and not args.check else "cpu"
    args.size = args.size or (
        "tiny" if args.check else "mgm-2b" if args.device == "cuda" else "small"
    )
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.micro_batch = args.micro_batch or SIZES[args.size]["micro_batch"]
    args.steps = args.steps or SIZES[args.size]["steps"]
    args.target = None
    return args

def machine(args):
    "What it ran on."
    card = (
        {
            "gpu": torch.cuda.get_device_name(),
            "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        }
        if args.device == "cuda"
        else {}
    )
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": args.threads,
        "python": platform.python_version(),
        **card,
    }

def main():
    args = parse()
    if args.child: return serve(args.child)
    torch.set_num_threads(args.threads)
    if args.check:
        found = check(args, args.peers.split(","), args.micro_batch)
        print(json.dumps(found, indent=1))
        sys.exit(0 if all(f["equal"] for f in found.values()) else 1)
    out, note = args.out, args.note
    del args.out, args.note, args.check
    while (result := measure(args)) is None:
        args.micro_batch //= 2  # a peer did not fit
    settings = {
        key: getattr(args, key)
        for key in (
            "size",
            "micro_batch",
            "steps",
            "attn",
            "compile",
            "memory_budget",
            "recompute",
            "recompute_layers",
            "checkpointing",
            "dtype",
        )
    }
    result = {
        "command": " ".join(["python", "benchmarks/train_step.py", *sys.argv[1:]]),
        **({"note": note} if note else {}),
        **settings,
        "shapes": SIZES[args.size],
        **result,
        "flops_formula": " ".join(flops.__doc__.split()),
        "machine": machine(args),
        "versions": {k: version(k) for k in ("torch", "transformers", "numpy")},
    }
    print(table(result))
    if args.size == "tiny" and not out: return
    name = (
        re.sub(r"\W+", "_", torch.cuda.get_device_name().lower())
        if args.device == "cuda"
        else "cpu"
    )
    out = out or RESULTS / f"train_step_{name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, out.with_suffix(".png"))

if __name__ == "__main__": main()
