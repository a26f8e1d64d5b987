"Derived from nbs/index.ipynb by `make tests`; edit the notebook, not this file."
import json, tempfile
from pathlib import Path
from fastcore.test import test_eq

def setup_module():
    global results
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
