"""Can a frozen language model compare a question with a picture? SmolLM2, with captions in the place of pictures.

    python benchmarks/frozen_prompt.py     -> benchmarks/results/frozen_prompt.json; twenty minutes on two cores

No picture is involved: the words of the true caption stand where the projector's rows would, so that only the language
model is in question. Beside them stand rows that are trained freely, the most that a projector could add. Questions are of
the training split, yes and no alike, each about a colour or a shape; 200 are held out and asked at the end.
Colours and shapes are few: a held-out question may have been seen with another picture of the same caption.
"""
import argparse, json, random, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
if Path(sys.path[0] or ".").resolve() == HERE: del sys.path[0]      # or easy_vqa.py beside this file would stand for the package of that name

RESULT = HERE/"results/frozen_prompt.json"
EXAMPLES = "a red circle. is there a circle? yes\na blue triangle. is there a red shape? no\na teal triangle. is a triangle present? yes\na green rectangle. does the image contain a circle? no\n"
INSTRUCTION = " Answer yes if the word in the question was named before, and no if not"
# (text before the free rows, text whose embeddings the free rows begin as, text after the caption, text after the question, answers)
PROMPTS = {"turns": ("<|im_start|>user\n", INSTRUCTION, "\n", "<|im_end|>\n<|im_start|>assistant\n", ("yes", "no")),
           "turns, longer": ("<|im_start|>user\n", 3*INSTRUCTION, "\n", "<|im_end|>\n<|im_start|>assistant\n", ("yes", "no")),
           "examples": ("", EXAMPLES, ". ", "", (" yes", " no"))}
TRIALS = [("turns", "positive"), ("turns, longer", "positive"), ("examples", "positive"), ("examples", "all")]
STEPS = 60

def asked(kind, seed=0):
    "Questions (question, answer, caption), yes and no alike; `positive` leaves out those with a negation."
    from vlm_lit.dataset import balance_answers, caption, easy_vqa_questions, easy_vqa_records, positive_questions
    by_picture = {}
    for question,answer,picture in easy_vqa_questions("train"): by_picture.setdefault(f"train/images/{picture}.png", []).append((question, answer))
    out, records = [], balance_answers(easy_vqa_records("train", 2), seed)
    for record in positive_questions(records) if kind == "positive" else records:
        question, answer = record["conversations"][0]["value"].partition("\n")[0], record["conversations"][1]["value"]
        told = caption(by_picture[record["image"]])
        if answer in ("yes", "no") and told: out.append((question, answer, told))
    random.Random(seed).shuffle(out)
    return out

def trial(prompt, kind, steps, batch_size=16, learning_rate=3e-3, held_out=200):
    "Train the free rows; accuracy on held-out questions, and the course of the loss."
    import torch
    import torch.nn.functional as F
    from vlm_lit.weights import load_language_model, load_preset, load_preset_tokenizer
    language, tokenizer = load_language_model(load_preset("smol")["language_model"]).requires_grad_(False), load_preset_tokenizer("smol")
    ids = lambda text: torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)
    embed, (before, begin, between, after, answers) = language.get_input_embeddings(), PROMPTS[prompt]
    free, (yes, no) = torch.nn.Parameter(embed(ids(begin)).clone()), (int(ids(answer)[0]) for answer in answers)
    optimizer, questions, course, start = torch.optim.AdamW([free], lr=learning_rate, betas=(.9, .98), weight_decay=0), asked(kind), [], time.monotonic()

    def logits(own):
        rows = [torch.cat([embed(ids(before)), free, embed(ids(f" {told}{between}{question}{after}"))]) for question,_,told in own]
        longest = max(map(len, rows))
        padded = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        mask = torch.tensor([[0]*(longest - len(row)) + [1]*len(row) for row in rows])
        return language(inputs_embeds=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1).logits[:, -1]

    for step in range(steps):
        own = [questions[held_out + (step*batch_size + k) % (len(questions) - held_out)] for k in range(batch_size)]
        target = torch.tensor([yes if answer == "yes" else no for _,answer,_ in own])
        for group in optimizer.param_groups: group["lr"] = learning_rate*min(1, (step + 1)/10)
        loss = F.cross_entropy(logits(own), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([free], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        course.append(round(loss.item(), 4))
        if (step + 1) % 20 == 0: print(f"{prompt}, {kind}: step {step + 1}/{steps}, loss {sum(course[-20:])/20:.3f}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    with torch.no_grad(): said = torch.cat([logits(questions[k:k + 20])[:, [yes, no]] for k in range(0, held_out, 20)])
    right = (said.argmax(1) == torch.tensor([answer != "yes" for _,answer,_ in questions[:held_out]])).float().mean()
    return {"prompt": prompt, "questions": kind, "free_rows": len(free), "steps": steps, "seen": steps*batch_size, "held_out": held_out, "accuracy": round(float(right), 4), "seconds": round(time.monotonic() - start), "loss": course}

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="of 16 questions, in each trial")
    parser.add_argument("--only", type=int, choices=range(len(TRIALS)), help="one trial by its number, counted from 0; written only with --out")
    parser.add_argument("--out", type=Path, help="where to write; the default run has its place")
    args = parser.parse_args()
    from vlm_lit.cli import machine_facts
    trials = [trial(*own, args.steps) for own in (TRIALS if args.only is None else [TRIALS[args.only]])]
    for own in trials: print(f"{own['prompt']:14} {own['questions']:10} {own['free_rows']:3} free rows  {own['accuracy']:.1%} of {own['held_out']} after {own['seen']:,}")
    target = args.out or (RESULT if args.steps == STEPS and args.only is None else None)
    machine, versions = machine_facts()
    if target: target.write_text(json.dumps({"command": " ".join(["python benchmarks/frozen_prompt.py", *sys.argv[1:]]), "machine": machine, "versions": versions, "trials": trials}, indent=1) + "\n", encoding="utf-8")

if __name__ == "__main__": main()
