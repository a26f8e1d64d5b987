"Derived from nbs/index.ipynb by `make tests`; edit the notebook, not this file."
import json, tempfile
from pathlib import Path
from fastcore.test import test_eq
from transformers.utils.logging import disable_progress_bar

def setup_module():
    global results
    disable_progress_bar()
    results = next(p for p in (Path("../benchmarks/results"), Path("benchmarks/results")) if p.is_dir())

def test_ten_lines_of_the_readme():
    from vlm_lit.breakpoints import Breakpoint
    from vlm_lit.dataset import LazySupervisedDataset
    from vlm_lit.images import sample_image
    from vlm_lit.labels import preprocess
    from vlm_lit.tokenizer import load_tokenizer
    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder/"photo.png")
    record = {"id": "seed", "image": "photo.png", "conversations": [{"from": "human", "value": "What is in the photo?\n<image>"}, {"from": "gpt", "value": "the box chain purse black"}]}
    ds = LazySupervisedDataset([record], load_tokenizer("gemma"), image_folder=folder)
    with Breakpoint(preprocess, at='return {"input_ids"', watch=["labels[0]"]) as bp: item = ds[0]
    test_eq(bp["labels[0]"].tolist(), [-100]*17 + [1175, 3741, 9488, 45189, 2656, 107, 108, 1])

def test_own_data_is_trained_on_in_a_few_lines():
    import json, tempfile
    from dataclasses import replace
    from pathlib import Path
    from rich.console import Console
    from vlm_lit.generation import VLM, VLMProcessor
    from vlm_lit.images import sample_image
    from vlm_lit.training import preset_stages, read_metrics, train
    from vlm_lit.weights import build_model, load_preset, load_preset_tokenizer, save_model

    folder = Path(tempfile.mkdtemp())
    sample_image().save(folder/"photo.png")
    turns = [{"from": "human", "value": "What is in the photo?\n<image>"}, {"from": "gpt", "value": "the box chain purse black"}]
    (folder/"data.json").write_text(json.dumps([{"id": n, "image": "photo.png", "conversations": turns} for n in range(8)]))

    preset = load_preset("smol")
    model = build_model(preset)
    processor = VLMProcessor.for_model(model.config, load_preset_tokenizer(preset), preset["template"])
    dataset = processor.dataset(folder/"data.json", image_folder=folder)
    words, compare, align, tune = preset_stages(preset)
    train(model, dataset, replace(align, steps=3, groups_per_batch=4, log_every=1), folder/"run", calibrate=True, console=Console(quiet=True))
    processor.set_stops(model)
    save_model(model, folder/"run/model"); processor.save_pretrained(folder/"run/model")
    test_eq([row["step"] for row in read_metrics(folder/"run/metrics.jsonl")], [1, 2, 3])
    again = VLMProcessor.from_pretrained(folder/"run/model")
    inputs = again("What is in the photo?", images=folder/"photo.png")
    assert VLM.from_pretrained(folder/"run/model").generate(**inputs, max_new_tokens=2).shape[0] == 1          # "read by the three lines above"
