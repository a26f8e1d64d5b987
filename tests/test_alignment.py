"Derived from nbs/alignment.ipynb by `make tests`; edit the notebook, not this file."
import io, json, random, runpy, textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from fastcore.test import test_eq
from IPython.display import Image as Shown
from transformers.utils.logging import disable_progress_bar
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.evaluation.scoring import evaluate
from vlm_lit.evaluation.scoring import format_table
from vlm_lit.evaluation.metrics import exact, question_only_baseline
from vlm_lit.images import finish_images, open_image
from vlm_lit.models.vlm import VLM, match_embedding_scale, rms
from vlm_lit.training.trainer import reinit_modules, set_trainable_modules
from vlm_lit.weights.interchange import load_projector
from vlm_lit.weights.language_models import quiet
from vlm_lit.weights.pretrained import resolve_model

def setup_module():
    global answers_to, asked, drawn, easy, embed, encoder, folder, ids, model, nearest_words, new_projector, processor, results, root, shown, tokenizer
    disable_progress_bar()
    root = next(p for p in (Path(".."), Path(".")) if (p / "examples/easy_vqa").is_dir())
    easy = SimpleNamespace(**runpy.run_path(str(root / "examples/easy_vqa/prepare.py")))
    folder, results = easy.package_folder(), root / "benchmarks/results"
    with quiet(): model, processor = resolve_model({"preset": "smol"})
    tokenizer, encoder = processor.tokenizer, model.image_encoder
    ids = lambda text: torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    embed = model.get_input_embeddings()
    def drawn(fig):
        "A figure as an image, whatever the backend."
        file = io.BytesIO()
        fig.savefig(file, format="png", dpi=100, facecolor="white", bbox_inches="tight")
        plt.close(fig)
        return Shown(data=file.getvalue())
    asked = ["what shape is present?", "what color is the shape?", "is there a circle?"]
    shown = [f"test/images/{n}.png" for n in (0, 5, 9)]
    def new_projector():
        "Projector and mining as at the start of stage 1."
        reinit_modules(model, ["projector", "mining"], seed=0)
        images = [open_image(name, folder) for name in shown]
        pixels = torch.stack([processor.image_processor.square(image) for image in images])
        match_embedding_scale(model, None, pixels)
    def answers_to(names, max_new_tokens=8):
        "The model's answers to three questions about each image."
        images = [folder / name for name in names for _ in asked]
        inputs = processor(asked * len(names), images=images, return_tensors="pt")
        written = model.eval().generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return [" ".join(text.split()) for text in processor.answers(written, inputs)]
    def nearest_words(tokens):
        "For each image token the id of the nearest text embedding."
        distances = torch.cdist(tokens.flatten(0, 1), embed.weight)
        nearest = distances.argmin(1)
        return nearest.view(len(tokens), -1)

def test_frozen_language_model_answers_through_the_kept_projector():
    frozen = {name: w.clone() for name, w in model.language_model.named_parameters()}
    load_projector(model, results / "smol_mm_projector.safetensors")
    answers = answers_to(shown[:2], 4)
    print(answers)
    test_eq([answers[0], answers[3]], ["triangle", "circle"])
    assert all(torch.equal(w, frozen[name]) for name, w in model.language_model.named_parameters())
