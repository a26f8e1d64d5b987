"Derived from nbs/10_weights.ipynb by `make tests`; edit the notebook, not this file."
import json
from dataclasses import asdict
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from safetensors import SafetensorError
from torch import nn
from vlm_lit.core import ConfigError
from vlm_lit.dataset import LazySupervisedDataset
from vlm_lit.model import VLM, VLMConfig
import tempfile
from fastcore.test import test_eq, test_close, expect_fail
from vlm_lit.core import peek
from vlm_lit.dataset import easy_vqa_folder, easy_vqa_records
from vlm_lit.tokenizer import load_tokenizer
from vlm_lit.weights import *

def setup_module():
    global easy, tok
    tok = load_tokenizer("gemma")
    def easy(records): return LazySupervisedDataset(records, tok, image_folder=easy_vqa_folder(), image_size_aux=64, image_size=32)

def test_ids_in_use_are_those_of_the_data():
    few = easy(easy_vqa_records("train", 1)[:3])
    used = ids_in_use(few)
    assert -200 not in used and {0, 1, 2, 3, 106, 107, 108} <= set(used)
    test_eq(set(used) - {0, 3}, {i for k in range(3) for i in few[k]["input_ids"].tolist() if i >= 0})

def test_statistics_of_two_known_pictures():
    black, white = torch.zeros(3, 2, 2, dtype=torch.uint8), torch.full((3, 2, 2), 255, dtype=torch.uint8)
    mean, std = channel_statistics([black, white])
    test_eq(mean, (.5, .5, .5))
    test_close(torch.tensor(std), torch.full((3,), (8*.25/7)**.5), eps=1e-4)

def test_tiny_is_small_and_starts_the_same_for_a_seed():
    cfg = tiny_config(used_ids=(0, 1, 2, 3, 106, 107, 108, 1841), image_mean=(.5, .5, .5), image_std=(.2, .2, .2))
    test_eq((cfg.num_patches, cfg.image_size, cfg.image_size_aux), (16, 32, 64))
    a, b, c = make_model(cfg, seed=0), make_model(cfg, seed=0), make_model(cfg, seed=1)
    same = lambda x, y: all(torch.equal(p, q) for p,q in zip(x.parameters(), y.parameters(), strict=True))
    assert same(a, b) and not same(a, c)
    assert 900_000 < sum(p.numel() for p in a.parameters()) < 1_300_000
    with expect_fail(ConfigError, contains="unknown preset 'huge'; there are: tiny"): preset_config("huge")

def test_model_comes_back_from_disk_bit_for_bit():
    cfg = tiny_config(used_ids=(0, 1, 2, 3, 106, 107, 108, 1841), image_mean=(.5, .5, .5), image_std=(.2, .2, .2))
    model = make_model(cfg, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, folder)
        print(sorted(p.name for p in Path(folder).iterdir()))
        again = load_model(folder)
    test_eq(again.cfg, model.cfg)
    assert all(torch.equal(p, q) for p,q in zip(model.parameters(), again.parameters(), strict=True))
    assert again.language_model.get_output_embeddings().weight is again.language_model.get_input_embeddings().weight   # still tied

def test_half_a_file_is_refused():
    cfg = tiny_config(used_ids=(0, 1, 2, 3, 106, 107, 108, 1841), image_mean=(.5, .5, .5), image_std=(.2, .2, .2))
    model = make_model(cfg, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/"half.safetensors"
        weights = weights_of(model)
        save_file({n: weights[n] for n in list(weights)[::2]}, path)
        with expect_fail(ConfigError, contains="half.safetensors does not fit the model: missing"): load_weights(model, path)
        path.write_bytes(b"not weights")
        with expect_fail(ConfigError, contains="cannot read weights"): load_weights(model, path)
        with expect_fail(ConfigError, contains="config.json is missing"): load_model(folder)
        for text,words in [("{", "cannot read"), ('{"a": 1}', "is not a model's configuration")]:
            (Path(folder)/"config.json").write_text(text)
            with expect_fail(ConfigError, contains=words): load_model(folder)
