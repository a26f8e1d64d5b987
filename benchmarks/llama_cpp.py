"""Ask a model through llama.cpp and through this package, and compare.

    python benchmarks/llama_cpp.py --venv FOLDER   -> benchmarks/results/llama_cpp.json

A small model of LLaVA's shape is trained to name the color of an image, exported with
`export_gguf`, and asked about images that it has not seen: here, and in a process of its own with
the package llama-cpp-python (`FOLDER`, a virtual environment, is made and filled if it is not
there; the package is built from source, which takes about 20 minutes on one core). Compared are the
ids of prompts, image features, logits at the end of the prompt, and greedy answers, for each kind
of language model and for images of the tower's own size and of others.

With CLIP the features differ: llama.cpp up to 0.3.36's puts the class token after the patches and
still takes the positions and rows of one that comes first
(https://github.com/ggml-org/llama.cpp/issues/25814). `class_token_last` is the difference from the
same model computed in that order, which shows that the file is right.
"""

import argparse, json, platform, subprocess, sys, tempfile
from importlib.metadata import version
from pathlib import Path

RESULT = Path(__file__).parent / "results/llama_cpp.json"
COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "black": (20,) * 3}
CASES = ("llama-siglip", "mistral-siglip", "qwen2-siglip", "gemma-siglip", "llama-clip")
SIDE = 28

def outside(folder):
    "In llama-cpp-python's process: answers to the questions of a folder, as JSON."
    import ctypes, llama_cpp
    import llama_cpp.mtmd_cpp as mtmd
    from llama_cpp import Llama

    folder = Path(folder)
    options = dict(n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True)
    llama = Llama(str(folder / "model.gguf"), **options)
    params = mtmd.mtmd_context_params_default()
    params.use_gpu, params.print_timings, params.n_threads = False, False, 1
    params.warmup = False
    context = mtmd.mtmd_init_from_file(str(folder / "mmproj.gguf").encode(), llama.model, params)
    marker, answers = mtmd.mtmd_default_marker().decode(), []
    n_vocab = llama.n_vocab()
    for row in json.loads((folder / "questions.json").read_text()):
        pixels = bytes(row["pixels"])
        width, height = row["size"]
        buffer = (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels)
        bitmap = mtmd.mtmd_bitmap_init(width, height, buffer)
        text = mtmd.mtmd_input_text()
        prompt = row["prompt"].replace("<image>", marker).encode()
        text.text, text.text_len = prompt, len(prompt)
        text.add_special, text.parse_special = row["add_special"], True
        chunks = mtmd.mtmd_input_chunks_init()
        images = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        code = mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), images, 1)
        assert code == 0, code
        llama.reset()
        llama._ctx.kv_cache_clear()
        ids, features, past = [], None, 0
        for n in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, n)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t()
                own = mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                ids += [own[k] for k in range(count.value)]
                continue
            ids.append(-200)
            assert mtmd.mtmd_encode_chunk(context, chunk) == 0
            size = mtmd.mtmd_input_chunk_get_n_tokens(chunk) * llama.n_embd()
            found = mtmd.mtmd_get_output_embd(context)
            features = [found[k] for k in range(size)]
        position = llama_cpp.llama_pos(0)
        code = mtmd.mtmd_helper_eval_chunks(
            context, llama._ctx.ctx, chunks, 0, 0, 128, True, ctypes.byref(position)
        )
        assert code == 0, code
        past, said, first = position.value, [], None
        while len(said) < row["max_new_tokens"]:
            logits = llama_cpp.llama_get_logits_ith(llama._ctx.ctx, -1)
            scores = [logits[k] for k in range(n_vocab)]
            first = first or scores
            token = max(range(n_vocab), key=scores.__getitem__)
            if token in row["stops"]: break
            said.append(token)
            batch = llama_cpp.llama_batch_get_one((llama_cpp.llama_token * 1)(token), 1)
            assert llama_cpp.llama_decode(llama._ctx.ctx, batch) == 0
        mtmd.mtmd_input_chunks_free(chunks)
        answers.append(
            {"ids": ids, "features": features, "logits": first, "answer": said, "past": past}
        )
    print(json.dumps({"version": llama_cpp.__version__, "answers": answers}))

def drawn(color, width, height, rng):
    "An image of one color, with a white square somewhere."
    from PIL import Image, ImageDraw

    image, side = Image.new("RGB", (width, height), COLORS[color]), 8
    x, y = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    ImageDraw.Draw(image).rectangle([x, y, x + side - 1, y + side - 1], fill="white")
    return image

def trained(kind, tower, tokenizer, steps, seed=0):
    "A small model that names the color of an image, and its processor."
    import numpy as np, torch
    from transformers import AutoConfig
    from vlm_lit.models.config import VLMConfig
    from vlm_lit.models.vlm import match_embedding_scale
    from vlm_lit.processor import VLMProcessor
    from vlm_lit.weights.presets import make_model

    size = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2)
    roles = {f"{r}_token_id": getattr(tokenizer, f"{r}_token_id") for r in ("bos", "eos", "pad")}
    rows = max(tokenizer.get_vocab().values()) + 1
    text = AutoConfig.for_model(
        kind, **size, **roles, num_hidden_layers=2, num_key_value_heads=1, head_dim=32,
        max_position_embeddings=128, vocab_size=rows,
    )  # fmt: skip
    vision = dict(
        model_type=f"{tower}_vision_model",
        **size,
        num_hidden_layers=3,
        image_size=SIDE,
        patch_size=7,
    )
    config = VLMConfig(text, vision, image_size=SIDE, select_layer=-2)
    model = make_model(config, seed)
    processor = VLMProcessor.for_model(config, tokenizer, "gemma", aspect="pad")
    processor.set_generation_config(model)
    rng, losses = np.random.default_rng(seed), []
    probe = drawn("red", SIDE, SIDE, rng)
    match_embedding_scale(model, processor.image_processor(probe)["pixel_values"])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        talks, images = [], []
        for _ in range(16):
            color = str(rng.choice(list(COLORS)))
            talks.append(
                [
                    {"from": "human", "value": "what color is the image?"},
                    {"from": "gpt", "value": color},
                ]
            )
            images.append([drawn(color, SIDE, SIDE, rng)])
        loss = model(**processor(talks, images)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), processor, sum(losses[-10:]) / 10

TEXTS = (
    "what is in the image?", "a  blue   circle\n\nand 12345 more, isn't it?", " lead", "x.y_z--",
    "Ünïcödé 日本 😀 tab\there", "USER: hi ASSISTANT:", "CamelCase don't I'LL 3.14",
)  # fmt: skip
TOKENIZE = """
import json, sys, llama_cpp
llama = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
ids = [llama.tokenize(t.encode(), add_bos=False, special=True) for t in json.loads(sys.argv[2])]
print(json.dumps(ids))
"""

def compare_tokenizers(python):
    "How many of some texts llama.cpp splits into the same ids, for each kind of tokenizer."
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig
    from vlm_lit.models.config import VLMConfig
    from vlm_lit.models.vlm import VLM
    from vlm_lit.processor import VLMProcessor
    from vlm_lit.weights.gguf_export import gguf_vocabulary, write_text_gguf

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from small_parts import TINY_TEXT, TINY_VISION, small_tokenizer, three_tokenizers

    out = {}
    families = *three_tokenizers(), small_tokenizer()
    for tokenizer, template in zip(families, ("gemma", "v1", "hf", "gemma")):
        rows = max(tokenizer.get_vocab().values()) + 1
        text = LlamaConfig(**{**TINY_TEXT, "vocab_size": rows})
        torch.manual_seed(0)
        model = VLM(VLMConfig(text, CLIPVisionConfig(**TINY_VISION), image_size=28))
        processor = VLMProcessor.for_model(model.config, tokenizer, template)
        with tempfile.TemporaryDirectory() as folder:
            write_text_gguf(model, processor, f"{folder}/model.gguf")
            command = [python, "-P", "-c", TOKENIZE, f"{folder}/model.gguf", json.dumps(TEXTS)]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode: raise SystemExit(done.stderr[-3000:])
        theirs = json.loads(done.stdout.splitlines()[-1])
        mine = [tokenizer(t, add_special_tokens=False).input_ids for t in TEXTS]
        found = gguf_vocabulary(tokenizer, rows)
        name = f"{found['model']} {found['pre']} {rows}"
        out[name] = {"texts": len(TEXTS), "equal_ids": sum(a == b for a, b in zip(mine, theirs))}
    return out

def class_token_last(encoder, pixels):
    "Features of a CLIP tower as llama.cpp computes them."
    import torch

    tower = encoder.vision_tower
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    token = tower.embeddings.class_embedding.expand(1, 1, -1)
    x = torch.cat([patches, token], 1) + tower.embeddings.position_embedding.weight[None]
    x = tower.pre_layrnorm(x)
    for layer in tower.encoder.layers: x = layer(x, attention_mask=None)
    return encoder.mm_projector(x[:, 1:])[0]

def compare(case, python, steps, n=32):
    "One kind of language model and of tower, asked on both sides."
    import numpy as np, torch
    from vlm_lit.text.labels import generation_prompt
    from vlm_lit.weights.gguf_export import export_gguf

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from small_parts import small_tokenizer

    tokenizer, (kind, tower) = small_tokenizer(), case.split("-")
    model, processor, loss = trained(kind, tower, tokenizer, steps)
    rng, rows, mine = np.random.default_rng(1), [], []
    question = [{"from": "human", "value": "<image>\nwhat color is the image?"}]
    prompt = generation_prompt(question, tokenizer, "gemma").text
    stops = processor.generation_settings()["eos_token_id"]
    for k in range(n):
        color = str(rng.choice(list(COLORS)))
        size = (SIDE, SIDE) if k < n // 2 else (48, 36)
        image = drawn(color, *size, rng)
        rows.append(dict(
            prompt=prompt, pixels=list(image.tobytes()), size=size, stops=stops,
            add_special=True, max_new_tokens=12,
        ))  # fmt: skip
        x = processor("what color is the image?", image)
        pixels = processor.image_processor(image)["pixel_values"]
        with torch.no_grad():
            logits = model(**x).logits[0, -1]
            features = model.encode_images(pixels)
            answer = model.generate(**x, max_new_tokens=12, do_sample=False)[0].tolist()
            last = class_token_last(model.image_encoder, pixels) if tower == "clip" else None
        answer = [i for i in answer[x["input_ids"].shape[1] :] if i not in stops]
        prompt_ids = processor.samples("what color is the image?", image)[0]["input_ids"].tolist()
        mine.append(
            {
                "ids": prompt_ids,
                "logits": logits,
                "features": features[0],
                "last": last,
                "answer": answer,
                "text": color,
            }
        )
    with tempfile.TemporaryDirectory() as folder:
        export_gguf(model, processor, folder)
        (Path(folder) / "questions.json").write_text(json.dumps(rows))
        done = subprocess.run(
            [python, "-P", __file__, "--outside", folder], capture_output=True, text=True
        )
    if done.returncode: raise SystemExit(done.stderr[-3000:])
    theirs = json.loads(done.stdout.splitlines()[-1])
    out = {"loss": round(loss, 4), "llama_cpp_python": theirs["version"]}
    for name, part in (("own_size", slice(0, n // 2)), ("resized", slice(n // 2, n))):
        pairs = list(zip(mine[part], theirs["answers"][part]))
        scale = 1 if kind != "gemma" else model.config.text_config.hidden_size**0.5

        def largest(key):
            found = [
                (a[key].flatten() - torch.tensor(b["features"]) * scale).abs().max()
                / a["features"].abs().max()
                for a, b in pairs
            ]
            return round(float(max(found)), 6)

        logit = [(a["logits"] - torch.tensor(b["logits"])).abs().max() for a, b in pairs]
        out[name] = {
            "questions": len(pairs),
            "equal_ids": sum(a["ids"] == b["ids"] for a, b in pairs),
            "features_relative": largest("features"),
            "logits_absolute": round(float(max(logit)), 5),
            "equal_answers": sum(a["answer"] == b["answer"] for a, b in pairs),
            "right_answers": sum(
                tokenizer.decode(a["answer"]).strip() == a["text"] for a in mine[part]
            ),
        }
        if tower == "clip": out[name]["class_token_last"] = largest("last")
    return out

def environment(folder):
    "The Python of a virtual environment with llama-cpp-python; made if it is not there."
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    known = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True)
    if known.returncode:
        install = [python, "-m", "pip", "install", "-q", "llama-cpp-python>=0.3.36"]
        subprocess.run(install, check=True)
    return str(python)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", type=Path, default=Path(".venv-llama-cpp"))
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--outside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.outside: outside(args.outside)
    else:
        import torch

        torch.set_num_threads(1)
        python, result = environment(args.venv), {}
        for case in args.cases:
            result[case] = compare(case, python, args.steps)
            print(case, json.dumps(result[case]))
        result["tokenizers"] = compare_tokenizers(python)
        print("tokenizers", json.dumps(result["tokenizers"]))
        result["machine"] = {"python": platform.python_version()}
        result["machine"] |= {n: version(n) for n in ("torch", "transformers", "gguf")}
        if tuple(args.cases) == CASES:
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
