"Derived from nbs/walkthrough_step.ipynb by `make tests`; edit the notebook, not this file."
import copy, json, math, tempfile
from pathlib import Path
import torch
from fastcore.test import test_eq
from transformers import Trainer
from vlm_lit.core import DataError
from vlm_lit.data.collator import DataCollatorForSupervisedDataset
from vlm_lit.data.dataset import LazySupervisedDataset
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.evaluation.generation import Chat
from vlm_lit.images import sample_image
from vlm_lit.models.image_encoder import ImageEncoder
from vlm_lit.models.mining import PatchInfoMining
from vlm_lit.models.splice import merge_image_features
from vlm_lit.models.vlm import VLM
from vlm_lit.padding import expand_image_tokens, supervised_positions
from vlm_lit.processor import VLMProcessor
from vlm_lit.text.templates import render
from vlm_lit.text.tokenizer import load_tokenizer
from vlm_lit.training.arguments import PARTS, VLMTrainingArguments
from vlm_lit.training.trainer import VLMTrainer
from vlm_lit.walk import RouteMap, draw_bars, draw_cells, draw_images
from vlm_lit.weights.build import build_model
from vlm_lit.weights.pretrained import load_trainable

def setup_module():
    global SEED, batch, collate, ds, folder, model, place, processor, record, text, tok, train
    torch.set_num_threads(1)
    place = next(p for p in (Path("../tests"), Path("tests")) if (p / "worked_example.json").exists())
    SEED = json.loads((place / "worked_example.json").read_text())
    folder, tok = Path(tempfile.mkdtemp()), load_tokenizer("gemma")
    sample_image().save(folder / "photo.png")
    record = {"id": "seed", **SEED["record"], "image": "photo.png"}
    text = dict(model_type="gemma", hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(num_key_value_heads=1, head_dim=16, intermediate_size=64, initializer_range=0.18)
    model = build_model("tiny", tokenizer=tok, language_model={"config": text})
    processor = VLMProcessor.for_model(model.config, tok)
    ds = LazySupervisedDataset([record], processor, folder)
    collate = DataCollatorForSupervisedDataset.for_model(model.config, 0, supervised_only=True)
    batch = collate([ds[0]])
    def train(steps, rate=1e-2):
        "A copy of the model, trained on the sample; the trainer."
        args = dict(
            max_steps=steps, per_device_train_batch_size=1, learning_rate=rate, save_steps=steps
        )
        args |= dict(trainable_modules=["all"], logging_steps=1, seed=0, weight_decay=0.0)
        args |= dict(use_cpu=True, disable_tqdm=True, log_level="error", lr_scheduler_type="constant")
        args = VLMTrainingArguments(tempfile.mkdtemp(), **args)
        trainer = VLMTrainer(copy.deepcopy(model), args, ds, processor=processor)
        trainer.train()
        return trainer

def test_sentinel_becomes_sixteen_placeholders():
    watch = ["ids", "times.sum()", "num_image_tokens", "image_token_id"]
    with Breakpoint(expand_image_tokens, at="return {**sample", watch=watch, tokenizer=tok) as bp:
        collate([ds[0]])
    bp.expect({"times.sum()": 40}, ids=SEED["input_ids"], num_image_tokens=16)
    bp.expect_return(labels=[-100] * 32 + SEED["labels"][17:])
    bp.expect_return({"input_ids[4:20]": [256000] * 16, "input_ids[20:]": SEED["input_ids"][5:]})

def test_one_placeholder_too_few_is_refused():
    one_less = {"num_image_tokens": lambda n: n - 1}
    watch = ["num_image_tokens", "image_token_id"]
    with Breakpoint(expand_image_tokens, at="times = ", watch=watch, set=one_less) as bp:
        short = collate([ds[0]])
    short.pop("supervised_positions")
    try: model(**short)
    except DataError as e: print(e)
    bp.expect_changed({"len(input_ids)": (40, 39), "(input_ids == 256000).sum()": (16, 15)})

def test_towers_give_features_and_a_map():
    with Breakpoint(ImageEncoder.features, at="return low if maps", watch=["low", "maps[0]"]) as bp:
        model(**batch)
    bp.expect({"low.shape": (1, 16, 128), "maps[0].shape": (1, 64, 16, 16)})

def test_mining_adds_to_each_query():
    with Breakpoint(PatchInfoMining.forward, at="return (low.float()", watch=["low", "found"]) as bp:
        model(**batch)
    bp.expect({"found.shape": (1, 16, 128)}).expect_return(result=bp["low"] + bp["found"])

def test_without_mining_nothing_complains():
    nothing = {"found": lambda found: 0 * found}
    with Breakpoint(PatchInfoMining.forward, at="return (low", watch="found", set=nothing) as bp:
        model(**batch)
    low = bp.hits[0].locals["low"]
    bp.expect_changed(result=(low + bp["found"], low))

def test_projector_changes_the_width():
    with Breakpoint(ImageEncoder.forward, at="return self.mm_projector", watch="features") as bp:
        model(**batch)
    bp.expect({"features.shape": (1, 16, 128)}).expect_return({"result.shape": (1, 16, 32)})

def test_features_replace_placeholders():
    watch = ["inputs_embeds", "features", "is_image.sum()", "is_image.nonzero()[[0, -1]]"]
    with Breakpoint(merge_image_features, at="return inputs_embeds", watch=watch) as bp:
        model(**batch)
    bp.expect({"is_image.sum()": 16, "is_image.nonzero()[[0, -1]]": [[0, 4], [0, 19]]})
    bp.expect_return({"result[0, 4:20]": bp["features"][0]})

def test_features_in_reverse_fit_as_well():
    turned = {"features": lambda features: features.flip(1)}
    where = dict(at="return inputs_embeds", watch="features")
    with Breakpoint(merge_image_features, **where, set=turned) as bp:
        model(**batch)
    own = bp["features"][0]
    bp.expect_changed({"result[0, 4]": (own[0], own[15]), "result[0, 19]": (own[15], own[0])})

def test_eight_states_of_forty_reach_the_head():
    watch = ["places", "out.last_hidden_state", "states", "logits"]
    with Breakpoint(VLM.supervised_forward, at="kept = {", watch=watch) as bp:
        model(**batch)
    bp.expect({"out.last_hidden_state.shape": (1, 40, 32), "logits.shape": (8, 256000)})
    bp.expect(places=list(range(31, 39)))

def test_without_the_shift_a_token_predicts_itself():
    own = {"following": batch["labels"]}
    with Breakpoint(supervised_positions, at="return (following", watch="following", set=own) as bp:
        collate([ds[0]])
    bp.expect_changed(result=(list(range(31, 39)), list(range(32, 40))))

def test_loss_is_cross_entropy_by_hand():
    with Breakpoint(VLM.add_loss, at="out.loss, out.token", watch=["targets", "losses", "loss"]) as bp:
        model(**batch)
    targets = SEED["labels"][17:]
    by_hand = -bp["logits"].float().log_softmax(-1)[range(8), targets]
    bp.expect({"len(losses)": 8}, targets=targets)
    bp.expect(tolerance=1e-5, losses=by_hand, loss=by_hand.mean())

def test_every_part_gets_a_gradient():
    twin = copy.deepcopy(model).train()
    with Breakpoint(VLM.forward, at="return out", watch="out.loss") as bp:
        twin(**batch).loss.backward()
    grads = {name: weight.grad for name, weight in twin.named_parameters()}
    norms = {}
    for part, prefix in list(PARTS.items())[:5]:
        own = [grad for name, grad in grads.items() if name.startswith(prefix) and grad is not None]
        norms[part] = float(torch.nn.utils.get_total_norm(own))
    bp.expect({"out.loss.requires_grad": True})
    assert len(norms) == 5 and all(norm > 0 for norm in norms.values())

def test_one_step_of_transformers_trainer():
    watch = ["loss", "num_items_in_batch", "self.state.global_step"]
    with Breakpoint(Trainer.training_step, at="self.accelerator.backward(loss", watch=watch) as bp:
        once = train(steps=1).model
    before = dict(model.named_parameters())
    change = {n: float((w - before[n]).abs().max().detach()) for n, w in once.named_parameters()}
    print(f"largest change of a weight: {max(change.values()):.6f}")
    assert math.isclose(max(change.values()), 1e-2, rel_tol=1e-2)
    want = model(**batch).loss.item()
    bp.expect(tolerance=1e-5, loss=want, num_items_in_batch=8, hits=1)

def test_checkpoint_is_whole_before_it_has_its_name():
    names = "sorted(p.name for p in staged.iterdir())"
    with Breakpoint(VLMTrainer._publish, at="to_disk(staged)", watch=[names, "final.name"]) as bp:
        trained = train(steps=100)
    needed = {"trainable.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    needed |= {"trainer_state.json", "config.json", "tokenizer.json", "processor_config.json"}
    bp.expect({names: lambda found: needed <= set(found), "final.name": "checkpoint-100"})

def test_without_a_supervised_end_it_does_not_stop():
    def unsupervised_stop(parts):
        return [(text, parts[0][1] if text == "<end_of_turn>\n<eos>" else s) for text, s in parts]

    change = {"parts": unsupervised_stop}
    with Breakpoint(render, at="return Rendered", watch="parts[-1]", set=change) as bp:
        endless = train(steps=100).model
    answer = Chat(endless.eval(), processor, max_new_tokens=12)("What is in the photo?", sample_image())
    print(repr(answer))
    assert answer.startswith("the box chain purse black") and len(tok(answer).input_ids) > 6
    bp.expect_changed({"result.answers": ([(84, 128)], [(84, 109)])})
