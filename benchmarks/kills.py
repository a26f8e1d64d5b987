"""Runs that are killed, stopped, out of disk or refused; resumed, they equal an undisturbed run.

    python benchmarks/kills.py            all cases, some minutes  ->  benchmarks/results/kills.json
    python benchmarks/kills.py --quick    three kills, nothing is written
    python benchmarks/kills.py --only disk    repeats a group, keeps the others of the file

kills      20 runs ended by SIGKILL: 8 after a random time, 12 inside saving (before, between and
           after writing, renaming and removing files), then resumed
workers    4 more, resumed with another number of loader workers
processes  2 more, resumed with two processes (torchrun, gloo)
signals    SIGTERM and SIGINT to the console script: exit codes 0 and 130, then resumed
disk       no space left at chosen writes, a small file system that fills up, a folder that may not
           be written: one line, and the last good checkpoint serves to resume
refused    a resume with another seed, data, batch or stage; a second run into a used folder

Equal means: the bytes of every file of model/, the loss of each step, validation, best step and
the names of all files of the run; with two processes losses within 1e-6. All runs go through the
command line's `main`. Python is started once, and forked per run; in the child an audit hook sees
each file of the run being made, renamed or removed, and kills its own process there.
"""

import argparse, errno, gc, hashlib, json, os, platform, random, re, shutil, signal
import subprocess, sys, tempfile, threading, time, traceback
from importlib.metadata import version
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "GOMP_SPINCOUNT": "2000",
    "TRANSFORMERS_VERBOSITY": "error",
}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

# data and recipes

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
ANSWERS = ["a box", "a chain", "a purse"]

def write_tokenizer(folder):
    "A byte-level tokenizer with Gemma's control tokens."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        ["user\nmodel\nWhat is it?", *ANSWERS],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=CONTROL,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", CONTROL.index("<bos>"))]
    )
    names = {f"{token[1:-1]}_token": token for token in CONTROL[:4]}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)

def write_data(folder):
    "Images, a tokenizer, and records with one image, with two, and without."
    from vlm_lit.images import sample_image

    (folder / "images").mkdir(parents=True)
    for k in range(6):
        sample_image(40 + k, 40).rotate(30 * k).save(folder / "images" / f"{k}.png")

    def record(name, images, question, answer):
        turns = [
            {"from": "human", "value": "<image>" * len(images) + "\n" * bool(images) + question},
            {"from": "gpt", "value": answer},
        ]
        return {"id": name, **({"image": images} if images else {}), "conversations": turns}

    one = [record(f"one-{k}", [f"{k % 6}.png"], "What is it?", ANSWERS[k % 3]) for k in range(16)]
    two = [
        record(f"two-{k}", [f"{k}.png", "0.png"], "The same?", "no" if k else "yes")
        for k in range(4)
    ]
    text = [record(f"text-{k}", [], "Hello", "Hi there") for k in range(4)]
    val = [record(f"val-{k}", [f"{k}.png"], "What is it?", ANSWERS[(k + 1) % 3]) for k in range(4)]
    for name, records in {"train": one + two + text, "more": two + one[:5], "val": val}.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    write_tokenizer(folder / "tokenizer")

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
}
VARIANTS = {  # name: (training, data and other sections)
    "shuffled": ({"trainable_modules": ["all"], **BEST}, {}),
    "packed": (
        {
            "batching": "packed",
            "max_packed_length": 96,
            "trainable_modules": ["all"],
            "per_device_train_batch_size": 2,
        },
        {},
    ),
    "by_image": (
        {
            "batching": "by_image",
            "global_batch_size": 4,
            "hflip_prob": 0.5,
            "per_device_train_batch_size": 2,
            "eval_strategy": "steps",
            "eval_steps": 10,
            "on_bad_loss": "skip",
            "spike_factor": 1.0015,
        },
        {"mixed": True},
    ),
    "lora": ({"batching": "grouped", **BEST}, {"lora": {"r": 4, "alpha": 8.0, "dropout": 0.1}}),
}

def write_recipe(place, variant, steps):
    "A recipe with a model of a few layers."
    import yaml

    training, more = VARIANTS[variant]
    text = {
        "model_type": "gemma",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    source = lambda name, **kw: {
        "path": str(place / f"data/{name}.json"),
        "image_folder": str(place / "data/images"),
        **kw,
    }
    train = (
        [source("train", weight=2.0), source("more", weight=1.0)]
        if more.get("mixed")
        else [source("train")]
    )
    usual = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 4,
        "save_steps": 3,
        "save_total_limit": 2,
        "trainable_modules": ["projector", "mining"],
        "seed": 3,
        "use_cpu": True,
    }
    recipe = {
        "model": {
            "preset": "tiny",
            "tokenizer": str(place / "data/tokenizer"),
            "language_model": {"config": text},
            "vision_tower": {"config": vision},
        },
        "data": {
            "train": train,
            "eval": [source("val")],
            "max_length": 96,
            "eval_samples": 1,
            "check_samples": 8,
        },
        "training": {**usual, **training},
        "lora": more.get("lora"),
    }
    (place / f"{variant}.yaml").write_text(yaml.safe_dump(recipe))
    return place / f"{variant}.yaml"

# runs

class Files:
    "An audit hook: what happens to the files of a run, numbered; something may be done at one."

    KINDS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}

    def __init__(self, folder, at=None, act=None):
        self.folder = str(folder)
        self.at = at
        self.act = act
        self.seen = []
        self.removing = ""

    def __call__(self, event, args):
        if event not in self.KINDS: return
        path = args[1] if event == "os.rename" else args[0]
        if not isinstance(path, (str, os.PathLike)): return
        path = os.fspath(path)
        if event == "shutil.rmtree": self.removing = path
        elif event in ("os.remove", "os.rmdir") and not os.path.isabs(path):
            path = os.path.join(self.removing, path)
        if not isinstance(path, str) or not path.startswith(self.folder + os.sep):
            return
        if event == "open" and not (
            set(str(args[1])) & set("wax+") or args[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            return
        self.seen.append(f"{event.split('.')[-1]} {os.path.relpath(path, self.folder)}")
        if self.at is None or not self.at(len(self.seen) - 1, self.seen[-1]):
            return
        self.act(self.seen[-1])

def kill_self(delay=0.0):
    "SIGKILL to this process, at once or while it goes on."
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    if delay: threading.Timer(delay, die).start()
    else: die()

def no_space(text):
    "What a full disk raises."
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), text.split()[-1])

def obey_permissions():
    "Let permissions bind this process, root's too (Linux: without CAP_DAC_OVERRIDE)."
    if os.getuid(): return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets): raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~0b110
    if libc.capset(header, sets): raise OSError(ctypes.get_errno(), "capset")

class Run:
    "A command of `vlm-lit` in a forked process."

    def __init__(self, words, log, hook=None, events=None, bound=False):
        self.log, self.code = Path(log), None
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                self._redirect()
                if bound: obey_permissions()
                if hook is not None: sys.addaudithook(hook)
                code = self._main(list(map(str, words)))
                if events is not None:
                    Path(events).write_text(json.dumps(hook.seen))
            except BaseException: traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)

    def _redirect(self):
        "A process group and output of its own."
        os.setpgid(0, 0)
        out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for number in (1, 2): os.dup2(out, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def _main(self, words):
        "What the console script does; its exit code."
        from vlm_lit.cli import main

        sys.argv = ["vlm-lit", *words]
        try: main()
        except SystemExit as e: return e.code or 0
        return 0

    def wait(self):
        "The exit code, or the number of the signal, negative."
        while self.code is None: self._reap(0)
        return self.code

    def _reap(self, flags):
        "Take the exit code if there is one."
        if self.code is not None: return
        pid, status, used = os.wait4(self.pid, flags)
        if not pid: return
        self.code, self.seconds = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime

    def is_alive(self):
        self._reap(os.WNOHANG)
        return self.code is None

    def lines(self): return self.log.read_text(errors="replace").splitlines()

def state_of(folder):
    "Everything about a run that must not depend on what happened to it."
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    bad = folder / "bad_steps.jsonl"
    kept = ("steps", "best_step", "samples", "supervised_tokens", "validation")
    return {
        "losses": [loss for row in rows for loss in row.get("losses", [])],
        "evaluations": [[row["step"], row["eval_loss"]] for row in rows if "eval_loss" in row],
        "bad steps": bad.read_text().splitlines() if bad.exists() else [],
        "result": {key: result[key] for key in kept},
        "model": digests(folder / "model", skip=("README.md",)),  # it has the run's minutes
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*")),
    }

def digests(folder, skip=()):
    "Name -> SHA-256 of every file below a folder."
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in skip
    }

def newest(folder):
    "Step of the newest checkpoint; 0: there is none."
    return max((int(p.name[11:]) for p in folder.glob("checkpoint-*")), default=0)

def differing(whole, other):
    "What differs between two states, in a line each."
    found = []
    for key, wanted in whole.items():
        if (got := other[key]) == wanted: continue
        if isinstance(wanted, dict):
            own = [name for name in {**wanted, **got} if wanted.get(name) != got.get(name)]
            text = ", ".join(f"{n}: {got.get(n)!r:.60}, not {wanted.get(n)!r:.60}" for n in own[:4])
        else:
            more, less = ([x for x in a if x not in b] for a, b in ((got, wanted), (wanted, got)))
            text = f"{len(got)}, not {len(wanted)}; too many {more[:3]}, missing {less[:3]}"
        found.append(f"{key} differ ({text})")
    return found

# cases

class Cases:
    "The place of all runs, undisturbed runs by variant, and results as they come."

    def __init__(self, place, steps, seed):
        self.place = place
        self.steps = steps
        self.rng = random.Random(seed)
        self.number = 0
        self.results = []
        self.whole = {}
        self._wait_for(lambda: write_data(place / "data"))

    def _wait_for(self, job):
        "Do a job in a forked process, so that this one starts no thread."
        pid = os.fork()
        if not pid:
            try: job()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            raise SystemExit("the data could not be written")

    def add(self, group, text, failed=(), **facts):
        "Note the result of a case and print its line."
        row = {"group": group, "case": text, "ok": not failed, **facts}
        if failed: row["failed"] = list(failed)
        self.results.append(row)
        told = f"; {'; '.join(failed)}" if failed else ""
        print(f"{'ok    ' if row['ok'] else 'FAILED'} {group:<9} {text}{told}", flush=True)

    def new(self):
        "Number and folder of a new run."
        self.number += 1
        return self.place / "runs" / f"r{self.number}"

    def words(self, variant, folder, *more):
        "Command of a new run."
        return [
            "train",
            self.place / f"{variant}.yaml",
            "--name",
            folder.name,
            "--runs",
            folder.parent,
            *more,
        ]

    def start(self, variant, folder, *more, **kw):
        return Run(self.words(variant, folder, *more), self.place / f"{folder.name}.log", **kw)

    def resume(self, folder, *more, **kw):
        log = self.place / f"{folder.name}-resumed.log"
        return Run(["train", folder / "recipe.yaml", "--resume", *more], log, **kw)

    def undisturbed(self, variant):
        "State, events and seconds of a whole run; run once."
        if variant not in self.whole:
            write_recipe(self.place, variant, self.steps)
            folder, events = self.new(), self.place / f"{variant}-events.json"
            run = self.start(variant, folder, hook=Files(folder), events=events)
            self.until_steps(run, folder)
            began = time.monotonic()
            if run.wait():
                raise SystemExit("\n".join(["an undisturbed run failed:", *run.lines()]))
            seconds = time.monotonic() - began
            self.whole[variant] = state_of(folder), json.loads(events.read_text()), seconds, folder
            losses = self.whole[variant][0]["losses"]
            assert len(losses) == self.steps, losses
            print(
                f"       {variant}: {self.steps} steps, {seconds:.1f} s, loss {losses[0]:.3f} "
                f"to {losses[-1]:.3f}",
                flush=True,
            )
        return self.whole[variant]

    def until_steps(self, run, folder):
        "Wait until steps are taken."
        while not (folder / "metrics.jsonl").exists() and run.is_alive():
            time.sleep(0.004)

    def compare(self, variant, folder, run):
        "Wait for a resumed run; what is not as it should be."
        code = run.wait()
        if code:
            return [f"resuming ended with {code}: {(run.lines() or [''])[-1][:300]}"]
        found = differing(self.undisturbed(variant)[0], state_of(folder))
        if not found: shutil.rmtree(folder)
        return found

    # SIGKILL

    def kill_after(self, variant):
        "A run killed after a random time: its folder and where it was."
        while True:
            folder, seconds = self.new(), self.undisturbed(variant)[2]
            run, delay = self.start(variant, folder), self.rng.uniform(0, seconds)
            self.until_steps(run, folder)
            time.sleep(delay)
            if run.is_alive(): os.kill(run.pid, signal.SIGKILL)
            run.wait()
            if not (folder / "result.json").exists():
                break  # else it was finished before the kill
            shutil.rmtree(folder)
        where = (
            "saving"
            if (folder / ".saving").exists()
            else "finishing"
            if newest(folder) == self.steps
            else "training"
        )
        return folder, f"after {delay:.2f} s, {where}"

    def kill_at(self, variant, pattern):
        "A run killed at what happens to a file: its folder and where it was."
        events = self.undisturbed(variant)[1]
        chosen = self.rng.choice([k for k, text in enumerate(events) if re.match(pattern, text)])
        delay = self.rng.choice([0, 0, self.rng.uniform(0, 0.005)])
        folder = self.new()
        hook = Files(folder, lambda n, text: n == chosen, lambda text: kill_self(delay))
        code = self.start(variant, folder, hook=hook).wait()
        assert code == -signal.SIGKILL, code
        when = f"{delay * 1000:.1f} ms after" if delay else "before"
        return folder, f"{when} {events[chosen]!r}"

    def killed(self, group, variant, how, *more, resume=None):
        "Kill a run, resume it, compare."
        if how == "random": folder, where = self.kill_after(variant)
        else: folder, where = self.kill_at(variant, MOMENTS[how])
        step = newest(folder)
        failed = self.compare(variant, folder, self.resume(folder, *more))
        self.add(
            group,
            f"{variant}, killed {where}, resumed from step {step}"
            + "".join(f" {word}" for word in more),
            failed,
            variant=variant,
            moment=how,
            resumed_from=step,
        )

MOMENTS = {  # pattern of the events of `Files`
    "writing": r"mkdir \.saving|(open|rename) \.saving/checkpoint-\d+/",
    "before the rename": r"rename checkpoint-\d+$",
    "after the rename": r"(rmtree|rmdir) \.saving$",
    "removing": r"(rmtree|remove|rmdir) checkpoint-|rename \.saving/checkpoint-\d+$"
    r"|remove \.saving/[^/]+$",
    "model": r"(rmtree|mkdir|open|rename) \.?model|(open|rename) (result|mm_proj)",
}
INSIDE = [
    "writing",
    "before the rename",
    "removing",
    "after the rename",
    "model",
    "writing",
    "removing",
    "before the rename",
    "writing",
    "after the rename",
    "removing",
    "model",
]

def group_kills(cases):
    "20 kills, 12 of them inside saving."
    names = list(VARIANTS)
    for k in range(8): cases.killed("kills", names[k % 4], "random")
    for k, how in enumerate(INSIDE):
        cases.killed("kills", names[(k + k // 4) % 4], how)

def group_workers(cases):
    "Resumed with another number of loader workers."
    for variant, how, n in [
        ("shuffled", "random", 1),
        ("packed", "writing", 2),
        ("by_image", "random", 2),
        ("lora", "before the rename", 1),
    ]:
        cases.killed("workers", variant, how, "--training.dataloader_num_workers", n)

# two processes, signals

def torchrun(words, log):
    "The command line under torchrun, with two processes."
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return process(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *rendezvous,
            "--nproc_per_node",
            "2",
            "-m",
            "vlm_lit",
            *words,
        ],
        log,
    )

def process(words, log):
    "A process with a group and output of its own."
    with open(log, "w") as out:
        return subprocess.Popen(
            list(map(str, words)),
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

def largest_difference(a, b):
    "Of the weights of two model folders."
    import numpy as np
    from safetensors.numpy import load_file

    one, two = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert one.keys() == two.keys()
    return max(float(np.abs(one[name] - two[name]).max()) for name in one)

def group_processes(cases):
    "Resumed with two processes, inside an epoch that is not the first."
    for variant, size, pattern in [
        ("shuffled", 2, "rename checkpoint-18$"),
        ("by_image", 1, "rename checkpoint-21$"),
    ]:
        folder, where = cases.kill_at(variant, pattern)
        step, log = newest(folder), cases.place / f"{folder.name}-two.log"
        code = torchrun(
            [
                "train",
                folder / "recipe.yaml",
                "--resume",
                "--training.per_device_train_batch_size",
                size,
            ],
            log,
        ).wait()
        text, facts = f"{variant}, killed {where}, resumed from step {step} by two processes", {}
        failed = (
            [f"ended with {code}: {last_line(log)}"]
            if code
            else nearly(cases, variant, folder, facts)
        )
        cases.add("processes", text, failed, variant=variant, resumed_from=step, **facts)

def nearly(cases, variant, folder, facts):
    "What is wrong with a run that two processes took part in; how far apart it is becomes a fact."
    whole, _, _, usual = cases.undisturbed(variant)
    losses = state_of(folder)["losses"]
    apart = max((abs(a - b) for a, b in zip(whole["losses"], losses)), default=1)
    facts |= {
        "losses_apart": apart,
        "weights_apart": largest_difference(usual / "model", folder / "model"),
    }
    failed = [f"{len(losses)} losses"] if len(losses) != cases.steps else []
    return failed if apart <= 1e-6 else [*failed, f"losses {apart:.1e} apart"]

def last_line(log):
    "The last line that says something."
    lines = [line for line in Path(log).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(nothing)"

def console_script(words, log):
    "The console script."
    script = Path(sys.executable).parent / "vlm-lit"
    found = [script] if script.is_file() else [sys.executable, "-m", "vlm_lit"]
    return process([*found, *words], log)

WORKER = ["--training.dataloader_num_workers", 1]
SIGNALS = [  # variant, signal, exit code, whether the whole group gets it, overrides
    ("shuffled", signal.SIGTERM, 0, False, []),
    ("packed", signal.SIGINT, 130, False, []),
    ("lora", signal.SIGTERM, 0, True, WORKER),
    ("packed", signal.SIGINT, 130, True, WORKER),
]

def stop(cases, run, folder, number, whom):
    "Send a signal some time after the second checkpoint; the exit code."
    while run.poll() is None and newest(folder) < 6: time.sleep(0.01)
    time.sleep(cases.rng.uniform(0, 0.5))
    whom(number)
    try: return run.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        return "none in a minute"

def group_signals(cases):
    "Signals to the console script, alone or with its loader worker, and to one of two processes."
    for variant, number, code, group, more in SIGNALS:
        cases.undisturbed(variant)
        folder = cases.new()
        log = cases.place / f"{folder.name}.log"
        run = console_script(cases.words(variant, folder, *more), log)
        whom = (lambda n: os.killpg(run.pid, n)) if group else run.send_signal
        found, step = stop(cases, run, folder, number, whom), newest(folder)
        failed = [] if found == code else [f"exit code {found}: {last_line(log)}"]
        if (folder / "result.json").exists():
            failed.append("the run was not stopped")
        else: failed += cases.compare(variant, folder, cases.resume(folder))
        text = f"{variant}, {number.name}{' to the group' if group else ''}: exit code {found}"
        cases.add(
            "signals",
            " ".join([f"{text}, resumed from step {step}", *map(str, more)]),
            failed,
            variant=variant,
            code=found,
            to_group=group,
        )
    one_of_two(cases)

def one_of_two(cases):
    "SIGTERM to the second of two processes: both stop after the same step."
    variant, facts = "shuffled", {}
    cases.undisturbed(variant)
    folder = cases.new()
    log = cases.place / f"{folder.name}.log"
    words = ["--training.per_device_train_batch_size", 2, "--training.global_batch_size", 4]
    run = torchrun(cases.words(variant, folder, *words), log)
    whom = lambda number: os.kill(ranks_of(run.pid)[1], number)
    found, step = stop(cases, run, folder, signal.SIGTERM, whom), newest(folder)
    failed = [] if found == 0 else [f"exit code {found}: {last_line(log)}"]
    code = cases.resume(folder).wait()
    failed += [f"resuming ended with {code}"] if code else nearly(cases, variant, folder, facts)
    cases.add(
        "signals",
        f"{variant}, SIGTERM to one of two processes: exit code {found}, resumed from step {step}",
        failed,
        variant=variant,
        code=found,
        **facts,
    )

def ranks_of(pid):
    "Processes that torchrun has started, in order."
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))

# disk

ONE_LINE = re.compile(r"error: .+")

def complaint(run, words):
    "What is wrong with how a run has ended: one line that says why, and exit code 2."
    lines = [line for line in run.lines() if line.strip()]
    found = [line for line in lines if ONE_LINE.match(line)]
    failed = [] if run.code == 2 else [f"exit code {run.code}"]
    if any(line.startswith("Traceback") for line in lines):
        failed.append("a traceback")
    if len(found) != 1 or lines[-1] != found[0]:
        failed.append("not one line at the end")
    elif not all(word.lower() in found[0].lower() for word in words):
        failed.append(f"does not say why: {found[0]}")
    return failed

PLACES = {  # what is written -> pattern of the events of `Files`
    "a checkpoint's folder": r"mkdir \.saving/checkpoint-9$",
    "a checkpoint's configuration": r"open \.saving/checkpoint-9/config.json",
    "a checkpoint's state": r"open \.saving/checkpoint-9/trainer_state.json",
    "its rename": r"rename checkpoint-9$",
    "metrics.jsonl": r"open metrics.jsonl$",
    "the model": r"open \.model/config.json",
    "result.json": r"open result.json",
}

def group_disk(cases):
    "No space, at chosen writes and in a small file system; folders that may not be written."
    for k, (name, pattern) in enumerate(PLACES.items()):
        variant = list(VARIANTS)[k % 4]
        events, folder = cases.undisturbed(variant)[1], cases.new()
        found = [n for n, text in enumerate(events) if re.match(pattern, text)]
        start = found[min(6, len(found) - 1)] if name == "metrics.jsonl" else found[0]
        hook = Files(folder, lambda n, text: n >= start and not text.startswith("r"), no_space)
        if name == "its rename": hook.at = lambda n, text: n == start
        run = cases.start(variant, folder, hook=hook)
        run.wait()
        failed, step = complaint(run, ["No space left"]), newest(folder)
        failed += cases.compare(variant, folder, cases.resume(folder))
        cases.add(
            "disk",
            f"{variant}, no space for {name}, resumed from step {step}",
            failed,
            variant=variant,
            place=name,
        )
    for share in (2.6, 2.75, 3.5): small_disk(cases, share)
    for how in (no_folder, unwritable_folder, locked_folder): how(cases)

def small_disk(cases, share):
    "A file system for so many checkpoints, that fills up; with more room the run goes on."
    variant, text = "by_image", "by_image, a file system of {} KiB"
    _, _, _, usual = cases.undisturbed(variant)
    one = sum(p.stat().st_size for p in (usual / f"checkpoint-{cases.steps}").iterdir())
    place, size = cases.place / "small", int(share * one) // 1024 + 24
    place.mkdir(exist_ok=True)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place],
        capture_output=True,
        text=True,
    )
    if mount.returncode:
        reason = mount.stderr.strip().splitlines()[-1].replace(str(place), "the folder")
        return cases.add("disk", "a small file system: skipped, " + reason, skipped=reason)
    try:
        folder = place / cases.new().name
        run = cases.start(variant, folder)
        run.wait()
        failed, step = complaint(run, ["No space left"]), newest(folder)
        if not 3 <= step <= cases.steps:
            failed.append(f"no good checkpoint was left ({step})")
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
        failed += cases.compare(variant, folder, cases.resume(folder))
        cases.add(
            "disk",
            f"{text.format(size)}, resumed from step {step}",
            failed,
            variant=variant,
            place="small file system",
        )
    finally: subprocess.run(["umount", place], check=True)

def no_folder(cases):
    "The folder of the run cannot be made."
    (cases.place / "a file").write_text("")
    folder = cases.place / "a file" / "run"
    write_recipe(cases.place, "shuffled", cases.steps)
    run = Run(cases.words("shuffled", folder), cases.place / "no-folder.log")
    run.wait()
    cases.add(
        "disk",
        "a folder that cannot be made",
        complaint(run, ["Not a directory"]),
        place="no folder",
    )

def unwritable_folder(cases):
    "The folder is there and may not be written."
    folder = cases.new()
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    run = cases.start("shuffled", folder, bound=True)
    run.wait()
    failed = complaint(run, ["Permission denied"])
    if not folder.is_dir() or any(folder.iterdir()):
        failed.append("the folder was changed")
    cases.add("disk", "a folder that may not be written", failed, place="unwritable folder")

def locked_folder(cases):
    "The folder may not be written any more, from some step on."
    folder = cases.new()
    cases.undisturbed("packed")
    run = cases.start("packed", folder, bound=True)
    while newest(folder) < 6 and run.is_alive(): time.sleep(0.004)
    folder.chmod(0o555)
    run.wait()
    failed, step = complaint(run, ["Permission denied"]), newest(folder)
    folder.chmod(0o755)
    failed += cases.compare("packed", folder, cases.resume(folder))
    cases.add(
        "disk",
        f"packed, a folder locked while training, resumed from step {step}",
        failed,
        variant="packed",
        place="locked folder",
    )

# refused

OTHERS = {  # what differs -> overrides, both values as a message names them
    "seed": (["--training.seed", 4], ("seed is 3", "4")),
    "records": (["--data.train.0.path", "{place}/data/val.json"], ("train.json", "val.json")),
    "length": (["--data.max_length", 90], ("max_length is 96", "90")),
    "batch": (["--training.per_device_train_batch_size", 2], ("batch_size is 4", "2")),
    "batching": (["--training.batching", "grouped"], ("shuffled", "grouped")),
    "stage": (["--training.trainable_modules", "[projector]"], ("'all'", "'projector'")),
    "model": (["--model.template", "vicuna"], ("absent", "vicuna")),
    "rate": (["--training.learning_rate", 1e-4], ("0.003", "0.0001")),
    "steps": (["--training.max_steps", 50], ("max_steps is", "50")),
}

def refused(cases, text, folder, words, named):
    "A command that must end with one line and change no byte."
    before = digests(folder)
    run = Run(words, cases.place / "refused.log")
    run.wait()
    failed = complaint(run, [str(value) for value in named])
    if digests(folder) != before: failed.append("the folder was changed")
    cases.add("refused", text, failed)

def group_refused(cases):
    "Other settings, other data, a folder in use."
    variant, folder = "shuffled", cases.new()
    events = cases.undisturbed(variant)[1]
    at = events.index("rename checkpoint-9")
    hook = Files(folder, lambda n, text: n == at, lambda text: kill_self())
    cases.start(variant, folder, hook=hook).wait()
    for name, (more, named) in OTHERS.items():
        more = [str(word).format(place=cases.place) for word in more]
        words = cases.words(variant, folder, "--resume", *more)
        refused(cases, f"resuming with another {name}", folder, words, named)
    words = ["train", folder / "recipe.yaml", "--resume", "--training.seed", 5]
    refused(cases, "resuming the run's own recipe with another seed", folder, words, ["3", "5"])
    refused(
        cases,
        "a second run into an unfinished run's folder",
        folder,
        cases.words(variant, folder),
        ["already holds a run", "--resume"],
    )
    changed_data(cases, variant, folder)
    failed = cases.compare(variant, folder, cases.resume(folder))
    cases.add("refused", "after all that the run resumes", failed)
    whole = cases.undisturbed(variant)[3]
    refused(
        cases,
        "a second run into a finished run's folder",
        whole,
        cases.words(variant, whole),
        ["holds a finished run"],
    )
    refused(
        cases,
        "resuming a finished run",
        whole,
        ["train", whole / "recipe.yaml", "--resume"],
        ["is finished"],
    )
    other = cases.new()
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    refused(
        cases,
        "a run into a folder of something else",
        other,
        cases.words(variant, other),
        ["holds no run"],
    )

def changed_data(cases, variant, folder):
    "The same path, other records."
    path = cases.place / "data/train.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before)[2:]))
    copy = cases.new()
    shutil.copytree(folder, copy)
    try:
        refused(
            cases,
            "resuming with other records under the same path",
            copy,
            ["train", copy / "recipe.yaml", "--resume"],
            ["24", "22"],
        )
    finally: path.write_text(before)

# all of it

GROUPS = {
    "processes": group_processes,
    "signals": group_signals,
    "disk": group_disk,
    "refused": group_refused,
    "kills": group_kills,
    "workers": group_workers,
}

def quick(cases):
    "Three kills, two of them inside saving."
    for how in ("random", "before the rename", "removing"):
        cases.killed("kills", "shuffled", how)

def summary(cases, earlier=()):
    "Counts and versions; groups that were not repeated are an earlier run's."
    repeated = {row["group"] for row in cases.results}
    rows = [row for row in earlier if row["group"] not in repeated] + cases.results
    groups = {name: [row for row in rows if row["group"] == name] for name in GROUPS}
    counts = {
        name: {"cases": len(rows), "ok": sum(row["ok"] for row in rows)}
        for name, rows in groups.items()
        if rows
    }
    packages = ("vlm_lit", "torch", "transformers", "accelerate", "tokenizers", "safetensors")
    return {
        "counts": counts,
        "steps": cases.steps,
        "versions": {
            "python": platform.python_version(),
            "system": platform.system(),
            **{name: version(name) for name in packages},
        },
        "cases": [row for own in groups.values() for row in own],
    }

def warm():
    "Import and compute once what every run needs."
    import io, matplotlib.pyplot, peft, torch, vlm_lit.cli  # noqa: E401, F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from vlm_lit.reports import plot_curves
    from vlm_lit.training import run

    torch.set_num_threads(1)
    get_checkpoint_conversion_mapping("gemma")
    plot_curves([{"step": 1, "loss": 1.0}]).savefig(io.BytesIO())
    run.known_answers = lambda processor: []  # four seconds per run, and no part of this
    gc.freeze()  # what is here stays; no child looks at it

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three kills, nothing is written")
    parser.add_argument("--only", nargs="*", choices=GROUPS, help="groups to repeat")
    parser.add_argument("--steps", type=int, help="of a run; default 40, quick: 9")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", action="store_true", help="keep the folder of the runs")
    args = parser.parse_args()
    warm()
    place = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        cases = Cases(place, args.steps or (9 if args.quick else 40), args.seed)
        if args.quick: quick(cases)
        else:
            for name in args.only or GROUPS: GROUPS[name](cases)
    finally:
        if args.keep: print(place)
        else: shutil.rmtree(place, ignore_errors=True)
    path = ROOT / "benchmarks/results/kills.json"
    keeps = args.only and path.exists()
    earlier = json.loads(path.read_text())["cases"] if keeps else []
    found = summary(cases, earlier)
    print(json.dumps(found["counts"]))
    if not args.quick and cases.steps == 40:
        path.write_text(json.dumps(found, indent=1).replace(str(place), "PLACE") + "\n")
    return int(not all(row["ok"] for row in cases.results))

if __name__ == "__main__": sys.exit(main())
