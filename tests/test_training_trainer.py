"Derived from nbs/17_trainer.ipynb by `make tests`; edit the notebook, not this file."
import math, multiprocessing, re, shutil, signal
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint, sort_checkpoints
from vlm_lit.core import ConfigError, nearest
from vlm_lit.data.collator import DataCollatorForSupervisedDataset, name_dead_worker
from vlm_lit.debug.snapshots import same_randomness
from vlm_lit.files import apply_umask, check_checksum, read_json, to_disk, write_checksums
from vlm_lit.files import write_error, write_file
from vlm_lit.data.mixture import Mixture
from vlm_lit.data.records import one_thread
from vlm_lit.data.samplers import GlobalBatchSampler
from vlm_lit.text.encode import pad_id
from vlm_lit.models.speed import compile_layers
from vlm_lit.models.splice import check_packing
from vlm_lit.models.vlm import check_head
from vlm_lit.weights.language_models import reading
from vlm_lit.weights.presets import seeded
from vlm_lit.weights.pretrained import load_trainable, save_trainable, write_base
from vlm_lit.training.arguments import PARTS, VLMTrainingArguments, check_module_names
from vlm_lit.training.meter import Meter
from vlm_lit.training.flops import peak_flops, trainable_parts, training_flops
import io, json, os, subprocess, sys, tempfile, warnings
import matplotlib.pyplot as plt
import pytest
import torch.nn.functional as F
from IPython.display import Image as Shown
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from vlm_lit.core import IGNORE_INDEX
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.images import sample_image
from vlm_lit.models.config import VLMConfig
from vlm_lit.models.vlm import VLM
from vlm_lit.processor import VLMProcessor
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.weights.adapters import add_lora, has_lora
from vlm_lit.weights.presets import make_model
from vlm_lit.training.trainer import VLMTrainer
from vlm_lit.training.trainer import _worker_context
from vlm_lit.training.trainer import cast_for_training
from vlm_lit.training.trainer import check_optimizer_state
from vlm_lit.training.trainer import read_trainer_state
from vlm_lit.training.trainer import reinit_modules
from vlm_lit.training.trainer import set_trainable_modules

def setup_module():
    global arguments, by_hand, by_trainer, config, dataset, drawn, fitted_model, folder, gradient_norms, long_answer, make_data, new_model, processor, records, run_two_processes, small_config, small_tokenizer, text_only, tok, turns, uneven
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    def drawn(fig):
        "A figure as an image, whatever the backend."
        file = io.BytesIO()
        fig.savefig(file, format="png", dpi=100, facecolor="white", bbox_inches="tight")
        plt.close(fig)
        return Shown(data=file.getvalue())
    def small_tokenizer(folder):
        "A byte-level tokenizer with Gemma's control tokens."
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        tok = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
        from tokenizers.trainers import BpeTrainer

        lines = pre_tokenizers.Split(Regex("\n"), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.pre_tokenizer = pre_tokenizers.Sequence([lines, as_bytes])
        tok.decoder = decoders.ByteLevel()
        text = ["user\nmodel\nWhat is it?\na box\nblack chain purse\nDescribe it."]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options = dict(special_tokens=special, show_progress=False, initial_alphabet=alphabet)
        tok.train_from_iterator(text, BpeTrainer(vocab_size=300, **options))
        tok.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
        )
        names = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")
        return PreTrainedTokenizerFast(tokenizer_object=tok, **names)
    def small_config(tokenizer):
        "Two towers, mining, projector and decoder, 20,000 weights in all."
        common = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        text = dict(model_type="gemma", vocab_size=len(tokenizer), **common)
        text |= dict(num_key_value_heads=1, head_dim=16)
        vision = dict(model_type="clip_vision_model", image_size=16, patch_size=8, **common)
        aux = dict(model_type="convnext", num_stages=2, hidden_sizes=[8, 16], depths=[1, 1])
        aux["patch_size"] = 2
        sizes = dict(image_size=16, image_size_aux=32, select_layer=-1)
        return VLMConfig(text, vision, aux, **sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    def make_data(folder, n=48):
        "Records with one image, with two, and without."
        for k in range(6):
            sample_image(40 + k, 40).rotate(30 * k).save(folder / f"{k}.png")
        words = ["a box", "a black box", "a chain", "a purse", "a black chain"]

        def record(k):
            "Two records of four show one image, one shows two, one none."
            questions = ["<image>\nDescribe it.", "<image><image>\nWhat is it?", "What is it?"]
            kind = 0 if k % 4 < 2 else k % 4 - 1
            human = {"from": "human", "value": questions[kind]}
            turns = [human, {"from": "gpt", "value": words[k % 5]}]
            images = [f"{k % 6}.png", [f"{k % 6}.png", "0.png"]]
            shown = {"image": images[kind]} if kind < 2 else {}
            return {"id": f"r{k}", **shown, "conversations": turns}

        return [record(k) for k in range(n)]
    folder = Path(tempfile.mkdtemp())
    tok = small_tokenizer(folder)
    config = small_config(tok)
    processor = VLMProcessor.for_model(config, tok, "gemma")
    records = make_data(folder)
    dataset = LazySupervisedDataset(records, processor, folder, uint8=True)
    def new_model(seed=0): return make_model(config, seed)
    def gradient_norms(names):
        "Norm of the gradient of each part that trains, for one batch of a new model."
        model = new_model().train()
        set_trainable_modules(model, names)
        collate = DataCollatorForSupervisedDataset.for_model(config, pad_id(tok))
        batch = collate([dataset[i] for i in range(16)])
        batch.pop("info", None)
        model(**batch).loss.backward()
        norms = {}
        for part in (part for part in PARTS if part != "all"):
            own = [p for name, p in model.named_parameters() if name.startswith(PARTS[part])]
            found = [p.grad.norm() for p in own if p.grad is not None]
            if found: norms[part] = torch.stack(found).norm().item()
        return norms
    def arguments(**changes):
        "Eight steps of 16 samples."
        settings = dict(
            max_steps=8,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            warmup_steps=2,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": 2},
            save_steps=3,
            logging_steps=1,
            save_total_limit=None,
            seed=0,
            use_cpu=True,
            disable_tqdm=True,
            log_level="error",
        )
        return VLMTrainingArguments(tempfile.mkdtemp(), **{**settings, **changes})
    def by_hand(model, args, betas=(0.9, 0.999), clip=1.0):
        "A training loop in twelve lines."
        trainer = VLMTrainer(model, args, dataset, processor=processor)
        data, collate, sampler = trainer.train_mixture, trainer.data_collator, trainer.make_sampler()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, args.learning_rate, betas, weight_decay=0, fused=True)
        schedule, losses = trainer.create_scheduler(args.max_steps, optimizer), []
        for step in range(args.max_steps):
            batch = collate(data.__getitems__(sampler.micro_batches(step)[0]))
            batch.pop("info")
            loss = model.train()(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses
    def by_trainer(model, args, data=dataset, **kwargs):
        "The losses of a `VLMTrainer`, and the trainer."
        trainer = VLMTrainer(model, args, data, processor=processor)
        trainer.train(**kwargs)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer
    def fitted_model():
        "The small model after 40 steps of training on short answers."
        schedule = dict(learning_rate=3e-3, lr_scheduler_kwargs={"num_decay_steps": 10})
        run = dict(trainable_modules=["all"], max_steps=40, save_strategy="no")
        return by_trainer(new_model(), arguments(**schedule, **run))[1].model
    text_only = [record for record in records if "image" not in record]
    long_answer = {"from": "gpt", "value": "a chain, a purse, a chain and a black purse"}
    turns = [text_only[0]["conversations"][0], long_answer]
    uneven = [{"id": "long", "conversations": turns}, *text_only, *text_only[:3]]
    uneven = LazySupervisedDataset(uneven, processor, folder, uint8=True)
    def run_two_processes(resume, **changes):
        """The losses of two processes under torchrun: of a whole run, and of one resumed from a
    checkpoint."""
        import inspect, textwrap

        functions = (small_tokenizer, small_config, make_data, arguments)
        parts = [textwrap.dedent(inspect.getsource(function)) for function in functions]
        imports = [
            "import gc, json, sys, tempfile",
            "from pathlib import Path",
            "import torch",
            "from tokenizers import Regex, Tokenizer, decoders, models, normalizers",
            "from tokenizers import pre_tokenizers, processors",
            "from transformers import PreTrainedTokenizerFast",
            "from vlm_lit.processor import VLMProcessor",
            "from vlm_lit.images import sample_image",
            "from vlm_lit.models.config import VLMConfig",
            "from vlm_lit.weights.presets import make_model",
            "from vlm_lit import LazySupervisedDataset, VLMTrainer, VLMTrainingArguments",
            "torch.set_num_threads(1)",
        ]
        body = f"""
folder = Path(tempfile.mkdtemp())
tok = small_tokenizer(folder)
config = small_config(tok)
processor = VLMProcessor.for_model(config, tok, "gemma")
dataset = LazySupervisedDataset(make_data(folder), processor, folder, uint8=True)
for resume in (None, {str(resume)!r}):
    args = arguments(save_strategy="no", **{changes!r})
    assert args.world_size == 2
    trainer = VLMTrainer(make_model(config, 0), args, dataset, processor=processor)
    trainer.train(resume_from_checkpoint=resume)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if trainer.is_world_process_zero(): print("LOSSES", json.dumps(losses))
# its threads may abort the interpreter's exit; first what holds them
del trainer
gc.collect()
torch.distributed.destroy_process_group()
"""
        script = Path(tempfile.mkdtemp()) / "two.py"
        script.write_text("\n".join([*imports, *parts, body]))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", script]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [line for line in done.stdout.splitlines() if "LOSSES" in line]
        return [json.loads(line.split("LOSSES", 1)[1]) for line in lines]

def test_a_tower_that_is_not_frozen_trains():
    with Breakpoint(
        set_trainable_modules,
        at="chosen = set(_named",
        watch="names len(own)",
        set={"names": lambda names: [*names, "vision_tower"]},
    ) as bp:
        set_trainable_modules(new_model(), ["projector", "mining"])
    bp.expect({"names": ["projector", "mining"], "len(own)": 99})
    bp.expect_changed({"len(result)": (16, 53)})

def test_stop_in_transformers_training_step():
    watch = ["inputs['input_ids'].shape", "num_items_in_batch", "loss"]
    with Breakpoint(Trainer.training_step, at="loss = self.compute_loss", watch=watch) as bp:
        losses, _ = by_trainer(new_model(), arguments(max_steps=1))
    bp.expect({"tuple(inputs['input_ids'].shape)": (16, 29), "num_items_in_batch": 94}, hits=1)
    bp.expect_after(loss=losses[0], tolerance=1e-6)

def test_stop_at_the_division_by_the_global_number():
    watch = ["len(targets)", "targets[:10]", "losses", "n_items", "losses.sum()", "loss"]
    with Breakpoint(VLM.add_loss, at="loss = losses.sum()", watch=watch, tokenizer=tok) as bp:
        losses, _ = by_trainer(new_model(), arguments(max_steps=1))
    bp.expect({"len(targets)": 94, "n_items": 94, "losses.sum() / 94": losses[0]}, tolerance=1e-6)

def test_rates_and_decay_by_group():
    rates = dict(projector_lr=1e-3, language_model_lr=1e-5, learning_rate=1e-4)
    args = arguments(trainable_modules=["all"], weight_decay=0.1, **rates)
    trainer = VLMTrainer(new_model(), args, dataset, processor=processor)
    groups = "[(own['lr'], own['weight_decay'], len(own['params'])) for own in parameters]"
    with Breakpoint(VLMTrainer.create_optimizer, at="self.optimizer = kind", watch=groups) as bp:
        trainer.create_optimizer()
    language, towers, projector = [(1e-5, 15, 5), (1e-4, 25, 38), (1e-3, 5, 11)]
    bp.expect(
        {
            f"sorted({groups})": [
                (rate, decay, n)
                for rate, *counts in (language, towers, projector)
                for decay, n in zip((0.0, 0.1), counts[::-1])
            ]
        }
    )

def test_averages_of_micro_batches_are_another_loss():
    watch = ["inputs['info'].n_supervised", "num_items_in_batch"]
    four_by_four = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    model = fitted_model()
    with Breakpoint(
        Trainer.training_step,
        at="loss = self.compute_loss",
        watch=watch,
        set={"num_items_in_batch": None},  # transformers then divides each mean by four
    ) as bp:
        by_trainer(model, arguments(**four_by_four, max_steps=1), uneven)
    outcomes = [[float(outcome.value) for outcome in hit.outcomes] for hit in bp.hits]
    by_token, by_micro_batch = map(sum, zip(*outcomes))
    print(f"loss of the step: {by_token:.3f} per token, {by_micro_batch:.3f} as a mean of four means")
    assert by_token > by_micro_batch + 0.1
    long = [22 in hit[watch[0]] for hit in bp.hits].index(True)
    bp.expect_changed({"result": tuple(outcomes[long])}, hit=long)
    bp.expect({f"sum({watch[0]})": 41, "num_items_in_batch": 107}, hit=long, hits=4)

def test_stop_at_a_complete_checkpoint():
    files = "sorted(path.name for path in final.iterdir())"
    watch = [files, "final.name", "staged.exists()"]
    with Breakpoint(VLMTrainer._publish, at="self._retire(final.parent", watch=watch) as bp:
        _, demo = by_trainer(new_model(), arguments(max_steps=3))
    states = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    bp.expect(
        {
            "staged.exists()": False,
            "final.name": "checkpoint-3",
            files: lambda found: {"trainable.safetensors", "mm_projector.bin", *states} <= set(found),
        }
    )

def test_checkpoint_that_cannot_be_written_is_said():
    trainer = VLMTrainer(new_model(), arguments(max_steps=6, save_total_limit=1), dataset)
    usual = trainer._save

    def full(output_dir=None, state_dict=None):
        usual(output_dir, state_dict)
        if output_dir.endswith("6"): raise OSError(28, "No space left on device")

    trainer._save = full
    message = "No space left on device.*last good one is .*checkpoint-3"
    watch = ["name", "reason", "before[:21]", "staging.exists()"]
    with pytest.raises(ConfigError, match=message):
        with Breakpoint(VLMTrainer._save_checkpoint, at="raise ConfigError", watch=watch) as bp:
            trainer.train()
    assert sorted(p.name for p in Path(trainer.args.output_dir).iterdir()) == ["checkpoint-3"]
    bp.expect({"before[:21]": "The last good one is ", "staging.exists()": False})
    bp.expect(name="checkpoint-6", reason="No space left on device")

def test_data_order_of_a_resumed_run():
    args = arguments(save_steps=2)
    VLMTrainer(new_model(), args, dataset, processor=processor).train()
    watch = ["self.state.global_step", "inputs['info'].indices"]
    stops = []
    for skip in (False, True):
        again = VLMTrainer(new_model(), arguments(ignore_data_skip=skip), dataset)
        with Breakpoint(VLMTrainer.compute_loss, at="info = inputs.pop", watch=watch) as bp:
            again.train(resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-2"))
        stops.append(bp)
    first = VLMTrainer(new_model(), args, dataset).make_sampler()
    order = [[n for _, n in first.micro_batches(step)[0]] for step in (0, 2)]
    stops[0].expect({"inputs['info'].indices": order[1]})
    stops[1].expect({"inputs['info'].indices": order[0]})
    diff = stops[0].diff(stops[1], titles=("resumed", "starting over"))
    diff.expect({"inputs['info'].indices[0]": (order[1][0], order[0][0])})

def test_stop_in_the_evaluation_loop():
    four = LazySupervisedDataset(records[:4], processor, folder, uint8=True)
    trainer = VLMTrainer(new_model(), arguments(), dataset, processor=processor)
    watch = ["own.sum()", "len(own)", "sums[0]"]
    with Breakpoint(VLMTrainer.evaluation_loop, at="sums[:, source] +=", watch=watch) as bp:
        loss = trainer.evaluate(four)["eval_loss"]
    bp.expect_each({"len(own)": [5, 7, 5, 5]})
    total = sum(hit["own.sum()"].item() for hit in bp.hits)
    bp.expect_return({"result.metrics['eval_loss']": total / 22}, tolerance=1e-6)

def test_trainable_modules_by_part_and_by_prefix():
    model = new_model()
    assert trainable_parts(model) == {p for p in PARTS if p != "all"}
    set_trainable_modules(model, ["vision_tower"])
    assert trainable_parts(model) == {"vision_tower"}
    set_trainable_modules(model, ["language_model.model.layers.1", "mining"])
    assert trainable_parts(model) == {"language_model", "mining"}
    assert not model.language_model.model.layers[0].mlp.up_proj.weight.requires_grad
    with pytest.raises(ConfigError, match="did you mean 'projector'"):
        set_trainable_modules(model, ["projektor"])
    with pytest.raises(ConfigError, match="reinit_modules: nothing .* did you mean 'projector'"):
        reinit_modules(model, ["projektor"], seed=0)
    for wrong, message in [(["mining", ""], "an empty name"), ("mining", "a list of names, got 'mini")]:
        with pytest.raises(ConfigError, match=f"trainable_modules .* {message}"):
            set_trainable_modules(model, wrong)
        with pytest.raises(ConfigError, match=f"reinit_modules .* {message}"):
            reinit_modules(model, wrong, seed=0)

def test_what_trains_is_float32_and_what_is_frozen_may_be_bfloat16():
    model = new_model().to(torch.bfloat16)
    set_trainable_modules(model, ["projector", "mining"])
    cast_for_training(model, torch.bfloat16)
    kinds = {name: weight.dtype for name, weight in model.named_parameters()}
    trained = {n for n in kinds if "mm_projector" in n or ".mining." in n}
    assert trained == {n for n, dtype in kinds.items() if dtype == torch.float32}

def test_reinit_gives_new_weights_that_a_seed_decides():
    model, other = new_model(), new_model()
    before = model.image_encoder.mm_projector[0].weight.clone()
    reinit_modules(model, ["projector"], 3)
    reinit_modules(other, ["projector"], 3)
    after = model.image_encoder.mm_projector[0].weight
    assert not torch.equal(before, after)
    assert torch.equal(after, other.image_encoder.mm_projector[0].weight)

def test_loader_workers_never_get_a_signal():
    class Masked(torch.utils.data.Dataset):
        "Which signals the process that reads it holds."

        def __len__(self): return 1

        def __getitem__(self, i):
            return sorted(int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, set()))

    from vlm_lit.training.trainer import _worker_context

    own = Masked()[0]
    settings = dict(num_workers=1, collate_fn=list, multiprocessing_context=_worker_context())
    ((held,),) = DataLoader(Masked(), **settings)
    print("held by the worker:", [signal.Signals(s).name for s in held], "by this process:", own)
    assert held == sorted({*own, signal.SIGINT, signal.SIGTERM}) and Masked()[0] == own

def test_peft_model_keeps_its_base_frozen():
    import peft

    lora = dict(r=2, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(new_model(), peft.LoraConfig(**lora))
    names = set_trainable_modules(wrapped, ["projector"])
    assert any("lora_A" in n for n in names) and all("lora_" in n or "mm_projector" in n for n in names)
    with pytest.raises(ConfigError, match="lora trains adapters of a frozen language model"):
        set_trainable_modules(wrapped, ["projector", "language_model"])
    args = arguments(max_steps=3, trainable_modules=["projector"])
    trainer = VLMTrainer(wrapped, args, dataset, processor=processor)
    trainer.train()
    again = peft.get_peft_model(new_model(), peft.LoraConfig(**lora))
    other = VLMTrainer(again, args, dataset, processor=processor)
    other._load_from_checkpoint(Path(args.output_dir) / "checkpoint-3")
    for (name, a), b in zip(wrapped.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b[1]), name
    base = dict(new_model().named_parameters())
    table = wrapped.get_base_model().language_model.model.embed_tokens.weight
    assert torch.equal(table, base["language_model.model.embed_tokens.weight"])

def test_trainer_equals_the_loop_by_hand():
    settings = dict(adam_beta1=0.8, adam_beta2=0.95, max_grad_norm=0.05)
    other = by_hand(new_model(), arguments(), (0.8, 0.95), 0.05)
    assert other == by_trainer(new_model(), arguments(**settings))[0]
    plain = by_trainer(new_model(), arguments())[0]
    assert by_hand(new_model(), arguments()) == plain and other != plain

def test_rates_and_decay_by_part():
    rates = dict(projector_lr=1e-3, language_model_lr=1e-5, learning_rate=1e-4)
    args = arguments(trainable_modules=["all"], weight_decay=0.1, **rates)
    trainer = VLMTrainer(new_model(), args, dataset, processor=processor)
    groups = trainer.create_optimizer().param_groups
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, p in trainer.model.named_parameters():
        want = 1e-4
        if name.startswith("language_model"): want = 1e-5
        elif "mm_projector" in name or ".mining." in name: want = 1e-3
        assert rate[id(p)] == want, name
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    biases = [p for name, p in trainer.model.named_parameters() if name.endswith("bias")]
    assert not any(id(p) in decayed for p in biases)

def test_accumulation_agrees_in_every_way_of_batching():
    for batching, more in [
        ("shuffled", {}),
        ("grouped", {}),
        ("packed", {"max_packed_length": 90}),
        ("by_image", {"samples_per_image": 2}),
    ]:
        settings = dict(batching=batching, max_steps=4, hflip_prob=0.5, **more)
        eight = dict(settings, per_device_train_batch_size=8)
        two_by_four = dict(settings, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        whole, _ = by_trainer(new_model(), arguments(**eight))
        parts, _ = by_trainer(new_model(), arguments(**two_by_four))
        assert max(abs(x - y) for x, y in zip(whole, parts)) < 2e-6, batching
        workers, _ = by_trainer(new_model(), arguments(**eight, dataloader_num_workers=2))
        assert whole == workers, batching

def test_resumed_run_is_equal_to_the_bit():
    from transformers import TrainerCallback

    class StopAfter(TrainerCallback):
        def __init__(self, step): self.step = step

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step: control.should_training_stop = True

    def stopped_and_resumed(make, **settings):
        "A run without a stop, and one that stopped at step 5 and was resumed from step 3."
        whole = by_trainer(make(), arguments(**settings))[1]
        args = arguments(**settings)
        stop = [StopAfter(5)]
        VLMTrainer(make(), args, dataset, processor=processor, callbacks=stop).train()
        torch.manual_seed(123)
        resumed = VLMTrainer(make(), args, dataset, processor=processor)
        resumed.train(resume_from_checkpoint=True)
        return whole, resumed

    def losses_of(trainer):
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    def with_dropout():
        torch.manual_seed(0)
        return add_lora(new_model(), {"r": 2, "alpha": 4, "dropout": 0.5})

    settings = dict(batching="packed", max_packed_length=90, trainable_modules=["all"])
    whole, resumed = stopped_and_resumed(new_model, **settings)
    random = stopped_and_resumed(with_dropout, trainable_modules=["projector"])
    for first, second in [(whole, resumed), random]:
        assert losses_of(second) == losses_of(first)
        for (name, a), b in zip(first.model.named_parameters(), second.model.parameters()):
            assert torch.equal(a, b), name
    four_by_four = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    other_args = arguments(**settings, **four_by_four, dataloader_num_workers=2)
    other = VLMTrainer(new_model(), other_args, dataset, processor=processor)
    other.train(resume_from_checkpoint=str(Path(resumed.args.output_dir) / "checkpoint-3"))
    assert max(abs(x - y) for x, y in zip(losses_of(other), losses_of(whole))) < 2e-6

def test_a_model_that_mixes_packed_samples_is_refused_before_step_1():
    common = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    text = dict(model_type="opt", vocab_size=len(tok), ffn_dim=64, word_embed_proj_dim=32, **common)
    mixing = VLMConfig(**{**config.to_dict(), "text_config": text, "image_token_id": None})
    packed = arguments(batching="packed", max_packed_length=90)
    with pytest.raises(ConfigError, match="see each other in a opt"):
        VLMTrainer(make_model(mixing, 0), packed, dataset, processor=processor)
    VLMTrainer(new_model(), packed, dataset, processor=processor)

def test_states_that_do_not_fit_are_refused():
    _, trained = by_trainer(new_model(), arguments(max_steps=3))
    checkpoint = Path(trained.args.output_dir) / "checkpoint-3"
    path, groups = checkpoint / "optimizer.pt", trained.optimizer.param_groups
    check_optimizer_state(path, groups)

    def moments(name, value):
        return lambda state: state["state"][0].update({name: value})

    for change, words in [
        (moments("exp_avg", torch.zeros(3)), "exp_avg of weight 0 has another shape"),
        (moments("exp_avg_sq", None), "exp_avg_sq of weight 0 has another shape"),
        (lambda state: state["state"].clear(), "holds no moments"),
        (lambda state: state["param_groups"][0].update(lr="x"), "lr cannot be 'x'"),
        (lambda state: state["param_groups"].clear(), "other groups of parameters"),
        (lambda state: state.pop("state"), "holds no state of an optimizer"),
    ]:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, checkpoint / "other.pt")
        with pytest.raises(ConfigError, match=words):
            check_optimizer_state(checkpoint / "other.pt", groups)
    state = checkpoint / "trainer_state.json"
    text = state.read_text()
    assert read_trainer_state(checkpoint)["global_step"] == 3
    changes = [("global_step", 2), ("global_step", -1), ("max_steps", "x"), ("log_history", [1])]
    changes += [("new", 1), ("epoch", None), ("stateful_callbacks", []), ("best_metric", "x")]
    for key, value in changes:
        state.write_text(json.dumps({**json.loads(text), key: value}))
        with pytest.raises(ConfigError, match=f"trainer_state.json.*{key}.*remove that folder"):
            read_trainer_state(checkpoint)
    for broken in ("", "[]", text[:40]):
        state.write_text(broken)
        with pytest.raises(ConfigError, match="cannot resume from .*trainer_state.json"):
            read_trainer_state(checkpoint)

def test_a_worker_that_is_killed_is_one_line():
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        "Kills a loader worker in the second step."

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step != 1: return
            import psutil

            children = psutil.Process().children()
            for child in children: child.kill()
            for child in children: child.wait(9)

    args = arguments(dataloader_num_workers=1)
    trainer = VLMTrainer(new_model(), args, dataset, processor=processor, callbacks=[Kill()])
    with pytest.raises(ConfigError, match="worker .*; lower training.dataloader_num_workers"):
        trainer.train()

def test_two_processes_agree_and_resume_what_one_began():
    whole, one = by_trainer(new_model(), arguments())
    checkpoint = Path(one.args.output_dir) / "checkpoint-3"
    two, resumed = run_two_processes(checkpoint, per_device_train_batch_size=8)
    agree = [max(abs(a - b) for a, b in zip(whole, own)) < 1e-6 for own in (two, resumed)]
    print("largest difference, two processes:          ", agree[0])
    print("the same, resumed from one process's step 3:", agree[1])
    assert agree == [True, True] and len(two) == len(resumed) == 8

def test_evaluation_weighs_by_tokens():
    second = LazySupervisedDataset(records[:5], processor, folder, uint8=True)
    two = Mixture([dataset, second], ["a", "b"])
    args = arguments(per_device_eval_batch_size=7)
    trainer = VLMTrainer(new_model(), args, dataset, two, processor=processor)
    metrics = trainer.evaluate()
    model, losses = trainer.model.eval(), []
    with torch.no_grad():
        for i in range(len(two)):
            batch = trainer.data_collator([two[(0, i)]])
            batch.pop("info", None)
            losses.append(model(**batch).token_losses)
    assert abs(metrics["eval_loss"] - torch.cat(losses).mean().item()) < 1e-5
    assert abs(metrics["eval_loss/b"] - torch.cat(losses[-5:]).mean().item()) < 1e-5

def test_smoothed_losses_and_metrics_of_all_logits():
    def by_formula(model, batch, epsilon):
        "Label smoothing over supervised tokens, written out."
        with torch.no_grad(): logits = model.eval()(**batch).logits[:, :-1]
        labels, log_p = batch["labels"][:, 1:], logits.log_softmax(-1)
        own = labels != IGNORE_INDEX
        nll = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0][own].mean()
        return ((1 - epsilon) * nll - epsilon * log_p.mean(-1)[own].mean()).item()

    def own_loss(outputs, labels, num_items_in_batch):
        "Twice the usual loss."
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return 2 * F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    def token_accuracy(found):
        "How many supervised tokens have the highest logit, of how many."
        labels = found.label_ids[:, 1:]
        right = found.predictions[:, :-1].argmax(-1) == labels
        return {"right": int(right.sum()), "tokens": int((labels != IGNORE_INDEX).sum())}

    plain, first = by_trainer(new_model(), arguments(max_steps=2))
    batch = first.data_collator(first.train_mixture.__getitems__(first.sampler.micro_batches(0)[0]))
    batch = {k: v for k, v in batch.items() if k not in ("info", "supervised_positions")}
    smoothed, _ = by_trainer(new_model(), arguments(max_steps=2, label_smoothing_factor=0.1))
    assert abs(smoothed[0] - by_formula(new_model(), batch, 0.1)) < 1e-5
    assert abs(plain[0] - by_formula(new_model(), batch, 0.0)) < 1e-5 and smoothed[0] != plain[0]
    four_by_four = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    parts, _ = by_trainer(
        new_model(), arguments(max_steps=2, label_smoothing_factor=0.1, **four_by_four)
    )
    assert max(abs(a - b) for a, b in zip(smoothed, parts)) < 1e-5
    for layout in ({}, four_by_four):
        trainer = VLMTrainer(
            new_model(), arguments(max_steps=1, **layout), dataset, compute_loss_func=own_loss
        )
        trainer.train()
        assert abs(trainer.state.log_history[0]["loss"] - 2 * plain[0]) < 1e-5
    args = arguments(per_device_eval_batch_size=7)
    trainer = VLMTrainer(new_model(), args, dataset, dataset, compute_metrics=token_accuracy)
    metrics = trainer.evaluate()
    usual = VLMTrainer(new_model(), args, dataset, dataset).evaluate()
    print({key: metrics[key] for key in ("eval_right", "eval_tokens")})
    assert metrics["eval_tokens"] == sum(int((s["labels"][1:] != -100).sum()) for s in dataset)
    with torch.no_grad():
        everything = trainer.data_collator([dataset[i] for i in range(len(dataset))])
        logits = trainer.model.eval()(**everything).logits[:, :-1]
    own = everything["labels"][:, 1:]
    assert metrics["eval_right"] == int((logits.argmax(-1) == own).sum())
    assert abs(metrics["eval_loss"] - usual["eval_loss"]) < 0.05  # a mean of batches, not of tokens

def test_losses_by_source_add_up():
    second = LazySupervisedDataset(records[:9], processor, folder, uint8=True)
    two = Mixture([dataset, second], ["a", "b"], weight=[1, 1])
    _, trainer = by_trainer(new_model(), arguments(max_steps=3), two)
    for row in trainer.state.log_history:
        if "loss" not in row: continue
        n = row["supervised_tokens/a"] + row["supervised_tokens/b"]
        mean = sum(row[f"loss/{k}"] * row[f"supervised_tokens/{k}"] for k in "ab") / n
        assert abs(mean - row["loss"]) < 1e-5 and row["draws/a"] + row["draws/b"] == 16
        assert 0 <= row["data_wait"] <= 1 and row["samples_per_second"] > 0

def test_a_step_of_skipped_samples_moves_nothing():
    turns = records[0]["conversations"]
    gone = []
    for record in records:
        if not isinstance(record.get("image"), str):
            record = {"id": record["id"], "conversations": turns}
        gone.append({**record, "image": "gone.png"})
    bad = LazySupervisedDataset(
        gone, processor, folder, skip_bad=0.999, bad_samples=folder / "bad.jsonl", uint8=True
    )
    model = new_model()
    before = model.image_encoder.mm_projector[0].weight.clone()
    losses, _ = by_trainer(model, arguments(max_steps=1, weight_decay=0.0), bad)
    assert losses == [0.0] and torch.equal(before, model.image_encoder.mm_projector[0].weight)

def test_activation_checkpointing_changes_no_loss():
    settings = dict(max_steps=2, trainable_modules=["all"])
    plain, _ = by_trainer(new_model(), arguments(**settings))
    saving, _ = by_trainer(new_model(), arguments(**settings, gradient_checkpointing=True))
    assert max(abs(a - b) for a, b in zip(plain, saving)) < 1e-6

def test_compiled_layers_change_no_loss_and_no_name():
    settings = dict(max_steps=2, trainable_modules=["all"])
    plain, _ = by_trainer(new_model(), arguments(**settings))
    names = list(new_model().state_dict())
    settings |= dict(torch_compile=True, torch_compile_backend="eager")
    compiled, trainer = by_trainer(new_model(), arguments(**settings))
    print(plain, compiled)
    assert max(abs(a - b) for a, b in zip(plain, compiled, strict=True)) < 1e-5
    assert list(trainer.model.state_dict()) == names and trainer.model is trainer.model_wrapped
    assert "forward" in vars(trainer.model.language_model.model.layers[0])  # not transformers' own
    assert (trainer.args.torch_compile, trainer.args.torch_compile_backend) == (True, "eager")

def test_trackers_get_the_numbers():
    pytest.importorskip("tensorboard")
    args = arguments(max_steps=2, report_to="tensorboard")
    os.environ["TENSORBOARD_LOGGING_DIR"] = args.output_dir + "/tb"
    by_trainer(new_model(), args)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = next(str(p.parent) for p in Path(args.output_dir).rglob("events*"))
    scalars = set(EventAccumulator(written).Reload().Tags()["scalars"])
    assert {"train/loss", "train/data_wait", "train/samples_per_second"} <= scalars
