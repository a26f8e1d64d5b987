"Derived from nbs/01_breakpoints.ipynb by `make tests`; edit the notebook, not this file."
import dataclasses, html
import re, types
from pathlib import Path
from typing import Any
from vlm_lit.core import ConfigError, describe
from vlm_lit.debug.lines import find_stop, name_of, plain_function, source_lines
from vlm_lit.debug.snapshots import LineStop, Note, check_expression, evaluate, failure
from vlm_lit.debug.snapshots import same_randomness, snapshot
import contextlib, json, os, random, subprocess, sys, tempfile, threading, weakref
import numpy as np, torch
from fastcore.test import test_eq, expect_fail
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN_INDEX, peek
from small_parts import pack
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.debug.breakpoints import Hit
from vlm_lit.debug.breakpoints import place_of
from vlm_lit.debug.breakpoints import why_not

def setup_module():
    global build_labels, mask_prompt, missing_lines, nasty, sample, sample_seeded, turns
    sys.path[:0] = ["../tests", "tests"]
    torch.set_printoptions(precision=3, sci_mode=False)
    def mask_prompt(input_ids, prompt_len):
        "Labels for `input_ids` that hide the prompt."
        labels = input_ids.clone()
        labels[:prompt_len] = IGNORE_INDEX
        return labels
    def sample(n):
        own = np.random.default_rng(1)
        left = [3, 1, 4, 1, 5]
        steps = iter(range(100))
        out = torch.zeros(n)
        for i in range(n):
            noise = torch.rand(2)
            out[i] = noise.sum() + random.random() + np.random.rand() + own.random()
            out[i] += left.pop() + next(steps)
        return out
    def sample_seeded():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return sample(5), torch.rand(1).item(), random.random(), np.random.rand()
    nasty = ["torch.rand(2)", "random.random()", "np.random.rand()", "own.random()"]
    nasty += ["left.clear()", "next(steps)", "out.zero_()", "noise.fill_(9)"]
    nasty += ["(i := 99)", "(random := None)"]
    def missing_lines(core):
        "Lines that coverage misses when a test uses a breakpoint, measured by one of coverage's cores."
        sources = {
            "shop.py": (
                "def price(xs):\n"
            "    total = 0\n"
            "    for x in xs:\n"
            "        total += taxed(x)\n"
            "    return total\n"
            "\n"
            "def taxed(x):\n"
            "    tax = x*2\n"
            "    return x + tax\n"
            ),
            "unmeasured.py": "def greet():\n    word = 'hello'\n    return word\n",
            "test_shop.py": (
                "from vlm_lit.debug.breakpoints import Breakpoint\n"
            "import shop, unmeasured\n"
            "\n"
            "def test_price():\n"
            "    with Breakpoint(shop.price, at='total += ') as bp:\n"
            "        with Breakpoint(shop.taxed, at='tax = ') as inner:\n"
            "            a = shop.price([1, 2])\n"
            "            b = a + 1\n"
            "        c = shop.taxed(b)\n"
            "    d = c + 1\n"
            "    assert (len(bp.hits), len(inner.hits), d) == (2, 2, 31)\n"
            "\n"
            "def test_after():\n"
            "    e = 1\n"
            "    assert shop.price([]) == 0\n"
            "\n"
            "def test_unmeasured():\n"
            "    with Breakpoint(unmeasured.greet, at='return') as bp: unmeasured.greet()\n"
            "    assert bp['word'] == 'hello'\n"
            ),
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
        with tempfile.TemporaryDirectory() as folder:
            for name, text in sources.items(): Path(folder, name).write_text(text)
            root = Path(sys.modules["vlm_lit.core"].__file__).resolve().parents[1]
            path = os.pathsep.join([str(root), folder])
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            command += ["--cov=shop", "--cov=test_shop", "--cov-report=json", "--cov-report="]
            env = {**kept, "COVERAGE_CORE": core, "PYTHONPATH": path}
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            files = json.loads(Path(folder, "coverage.json").read_text())["files"]
        return {name: file["missing_lines"] for name, file in files.items()}
    def build_labels(turns, bos=2):
        "`input_ids` and `labels` of a conversation given as (role, ids) pairs."
        input_ids, labels = [bos], [IGNORE_INDEX]
        for role, ids in turns:
            supervised = role == "model"
            input_ids += ids
            labels += ids if supervised else [IGNORE_INDEX] * len(ids)
        return {
            "input_ids": torch.tensor(input_ids),
            "labels": torch.tensor(labels),
        }
    turns = [
        ("user", [106, IMAGE_TOKEN_INDEX, 108, 1841]),
        ("model", [573, 3741, 107]),
        ("user", [4385]),
        ("model", [7653, 107]),
    ]

def test_hit_is_indexed_by_name_or_expression():
    hit = Hit(
        line=3,
        locals={"n": 2},
        watched={"n + 1": 3, "m": failure(NameError("name 'm' is not defined"))},
    )
    print(hit["n"], hit["n + 1"], hit["m"])
    test_eq([hit["n"], hit["n + 1"], repr(hit["m"])], [2, 3, "<NameError: name 'm' is not defined>"])
    with expect_fail(LookupError, contains="no 'k' here; there are 'n + 1', 'm', 'n'"):
        hit["k"]
    print(place_of(describe), place_of(json.dumps), place_of(mask_prompt))
    test_eq([place_of(describe), place_of(json.dumps)], ["vlm_lit/core.py", "json/__init__.py"])

def test_breakpoint_copies_the_value_before_the_line_runs():
    input_ids = torch.tensor([2, 106, 1645, 9, 7, 1])
    with Breakpoint(mask_prompt, at="labels[:prompt_len] =", watch=["labels", "prompt_len"]) as bp:
        labels = mask_prompt(input_ids, prompt_len=4)
    peek(at_the_stop=bp["labels"], afterwards=labels)
    test_eq(bp["labels"].tolist(), [2, 106, 1645, 9, 7, 1])
    test_eq(labels.tolist(), [IGNORE_INDEX] * 4 + [7, 1])
    test_eq(bp["prompt_len"], 4)
    test_eq(sorted(bp.hits[0].locals), ["input_ids", "labels", "prompt_len"])
    test_eq(bp.hits[0].locals["labels"].tolist(), [2, 106, 1645, 9, 7, 1])

def test_text_face_shows_place_source_and_values():
    with Breakpoint(mask_prompt, at="labels[:prompt_len] =", watch=["labels", "prompt_len"]) as bp:
        mask_prompt(torch.tensor([2, 106, 1645, 9, 7, 1]), 4)
    name, *source, row_labels, row_len = repr(bp).splitlines()
    assert re.fullmatch(r"mask_prompt  [\w<>.]+:\d+, 1 hit", name)
    test_eq([line[:2] for line in source], ["  ", "  ", "->", "  "])
    assert source[2].endswith("labels[:prompt_len] = IGNORE_INDEX")
    test_eq(row_labels.split(), "labels (6,) int64 2 106 1645 9 7 1".split())
    test_eq(row_len.split(), "prompt_len int 4".split())

def test_html_face_escapes_everything():
    def greet(text):
        reply = f"<b>{text}</b>"
        return reply

    with Breakpoint(greet, at="return reply", watch=["text", "reply", "'<i>'"]) as bp:
        greet("<script>alert(1)</script>")
    face = bp._repr_html_()
    assert "<script" not in face and "<i>" not in face and "&lt;script&gt;alert(1)" in face
    assert "reply = f&quot;&lt;b&gt;{text}" in face and "→" in face
    test_eq(face.count("<tr"), 1 + 3)

def test_each_pass_of_a_loop_is_a_hit():
    with Breakpoint(pack, at="total += x", watch=["x", "total", "total + x"]) as bp:
        pack([3, 1, 4, 1])
    print(bp)
    test_eq([hit["total"] for hit in bp.hits], [0, 3, 4, 8])
    test_eq(bp["total"], 0)
    test_eq([hit["total + x"] for hit in bp.hits], [3, 4, 8, 9])

def test_a_condition_chooses_hits():
    with Breakpoint(pack, at="total += x", watch="total", when="x == 1") as bp:
        pack([3, 1, 4, 1])
    over_3 = lambda found: found["total"] > 3
    with Breakpoint(pack, at="total += x", watch="total", when=over_3) as late:
        pack([3, 1, 4, 1])
    print([hit["total"] for hit in bp.hits], [hit["total"] for hit in late.hits])
    test_eq([hit["total"] for hit in bp.hits], [3, 8])
    test_eq([hit["total"] for hit in late.hits], [4, 8])

def test_a_failing_condition_is_reported_after_the_run():
    done = []
    try:
        with Breakpoint(pack, at="total += x", when="y > 1"):
            done.append(pack([3, 1]))
    except ConfigError as e: print(re.sub(r"at .*:\d+", "at <cell>", str(e)))
    test_eq(done[0]["done"], True)
    with expect_fail(ConfigError, contains="raised NameError: name 'y' is not defined"):
        with Breakpoint(pack, at="total += x", when="y > 1"): pack([3, 1])
    with expect_fail(ConfigError, contains="'x ==' is not a Python expression"):
        Breakpoint(pack, at="total += x", when="x ==")
    with expect_fail(ZeroDivisionError):  # the block's own error comes first
        with Breakpoint(pack, at="total += x", when="y > 1"): pack([3, 1]), 1 / 0
    with Breakpoint(pack, at="total += x", watch=["x", "y + 1"]) as bp: pack([3])
    print(bp["y + 1"])
    test_eq(repr(bp["y + 1"]), "<NameError: name 'y' is not defined>")

def test_no_frame_is_kept():
    class Thing: pass

    refs = []

    def make():
        thing = Thing()
        refs.append(weakref.ref(thing))
        return 1

    with expect_fail(ConfigError):
        with Breakpoint(make, at="return 1", when="nothing_of_that_name") as bp:
            make()
    assert refs[0]() is None and not bp.hits

def test_a_condition_sees_copies_and_may_be_a_tensor():
    xs = [3, 1]
    with Breakpoint(pack, at="for x in", when=lambda found: found["xs"].clear() is None) as bp:
        test_eq(pack(xs)["mean"], 2)
    test_eq(xs, [3, 1])
    test_eq(bp["xs"], [3, 1])
    with Breakpoint(pack, at="for x in", when="xs.clear() is None") as bp:
        test_eq(pack(xs)["mean"], 2)
    test_eq(bp["xs"], [3, 1])
    with expect_fail(ConfigError, contains="raised RuntimeError"):
        with Breakpoint(mask_prompt, at="return", when="labels > 0"):
            mask_prompt(torch.tensor([1, 2]), 1)

def test_one_execution_of_a_statement_is_one_hit():
    lock = contextlib.nullcontext()

    # fmt: off
    def rows(batch):
        lengths = [len(ids) for ids in batch]
        longest = max(len(ids) for ids in batch)
        padded = [ids + [0]*(longest - len(ids))
                  for ids in batch
                  if ids]
        with contextlib.suppress(KeyError):
            lengths.append(0)
        with lock:
            lengths.append(1)
        batch.sort(key=len); [lengths.sort(),
            lengths.reverse()]
        while longest > 2:
            longest -= 1
        for ids in batch: lengths.append(len(ids))
        total = (
            longest +
            sum(lengths))
        try:
            raise KeyError
        except KeyError:
            total += 1
        return total
    # fmt: on

    def hits(at):
        with Breakpoint(rows, at=at) as bp: rows([[1, 2, 3], [4], [5, 6, 7, 8]])
        return len(bp.hits)

    once = ["lengths = [", "longest = max", "padded =", "if ids]", "contextlib", "append(0)"]
    test_eq([hits(at) for at in once], [1] * 6)
    loops = ["while", "longest -= 1", "for ids in batch: lengths"]
    after = ["longest +", "except", "total += 1", "return"]
    test_eq([hits(at) for at in loops + after], [3, 2, 1, 1, 1, 1, 1])
    test_eq([hits(at) for at in ["with lock", "append(1)", "batch.sort", "lengths.reverse"]], [1] * 4)
    plus_one = lambda x: x + 1
    with Breakpoint(plus_one, at="lambda x") as bp: plus_one(4)
    test_eq(bp["x"], 4)

def test_a_method_is_stopped_in_its_own_class():
    class Doubles:
        def __init__(self, n):
            self.n = n
            self.asked = []

        def __getitem__(self, i):
            self.asked.append(i)
            value = 2 * i
            return value + self.n

    class Other(Doubles):
        def __getitem__(self, i):
            value = -i
            return value

    numbers = Doubles(100)
    watch = ["i", "value", "self.n", "self.asked"]
    with Breakpoint(Doubles.__getitem__, at="return value", watch=watch) as bp:
        print(numbers[3], Other(0)[4], numbers[5])
    test_eq([(hit["i"], hit["value"]) for hit in bp.hits], [(3, 6), (5, 10)])
    test_eq(bp["self.n"], 100)
    test_eq([hit["self.asked"] for hit in bp.hits], [[3], [3, 5]])
    assert bp["self"] is numbers
    with Breakpoint(numbers.__getitem__, at="return value") as bp: numbers[7]
    test_eq(bp["value"], 14)

def test_recursion_generators_and_nested_functions():
    def depth(n):
        if n == 0: return 0
        below = depth(n - 1)
        return below + 1

    def numbers_up_to(n):
        for i in range(n):
            yield i

        def last():
            end = "end"
            return end

        yield last()

    with Breakpoint(depth, at="return below") as bp: depth(3)
    test_eq([hit["below"] for hit in bp.hits], [0, 1, 2])
    with (
        Breakpoint(numbers_up_to, at="yield i", watch="i") as bp,
        Breakpoint(numbers_up_to, at="return end") as inner,
    ):
        print(list(numbers_up_to(3)))
    test_eq([hit["i"] for hit in bp.hits], [0, 1, 2])
    test_eq(inner["end"], "end")

def test_a_generator_that_outlives_the_block_is_left_alone():
    def count(n):
        for i in range(n):
            yield i

    with Breakpoint(count, at="yield i") as bp:
        g = count(5)
        next(g)
    test_eq(len(bp.hits), 1)
    before = sys.gettrace()
    sys.settrace(lambda frame, event, arg: None)
    try: rest = list(g)
    finally: sys.settrace(before)
    test_eq(rest, [1, 2, 3, 4])
    test_eq(len(bp.hits), 1)

def test_nested_breakpoints_both_stop():
    def total_of(xs):
        packed = pack(xs)
        return packed["mean"] * packed["size"]

    with Breakpoint(total_of, at="return packed", watch="packed") as outer:
        with Breakpoint(pack, at="return row", watch="total") as inner:
            total_of([3, 4])
        total_of([5])
    print(inner, outer, sep="\n\n")
    test_eq([hit["total"] for hit in inner.hits], [7])
    test_eq([hit["packed"]["size"] for hit in outer.hits], [2, 1])

def test_two_breakpoints_on_one_line_and_three_deep():
    with (
        Breakpoint(pack, at="total += x") as a,
        Breakpoint(pack, at="total += x") as b,
        Breakpoint(pack, at="return row") as c,
    ):
        pack([3, 1, 4])
    test_eq([len(bp.hits) for bp in (a, b, c)], [3, 3, 1])
    with Breakpoint(pack, at="return row") as a:
        with expect_fail(ConfigError, contains="in use"):
            with a: pass
    with a: pack([1])
    test_eq(len(a.hits), 1)

def test_an_exception_leaves_hits_and_tracer_as_they_should_be():
    before = sys.gettrace()
    with expect_fail(TypeError, contains="unsupported operand"):
        with Breakpoint(pack, at="total += x", watch=["x", "total"]) as bp:
            pack([3, 1, "4"])
    print(bp)
    test_eq([hit["x"] for hit in bp.hits], [3, 1, "4"])
    assert sys.gettrace() is before

def test_never_reached_says_why():
    not_run = Breakpoint(pack, at="return row")
    with expect_fail(IndexError):
        with Breakpoint(pack, at="return row") as failed_before: pack([])
    with Breakpoint(pack, at="total += x", when="x > 100") as refused: pack([3, 1])
    with Breakpoint(pack, at="return row") as elsewhere:
        worker = threading.Thread(target=pack, args=([1],))
        worker.start()
        worker.join()

    for bp in [not_run, failed_before, refused, elsewhere]: print("-", why_not(bp))
    reasons = [
        (not_run, "not run yet"),
        (failed_before, "but not this line"),
        (refused, "was about to run 2 times, and `when` did not hold"),
        (elsewhere, "not entered in this thread"),
    ]
    for bp, words in reasons:
        assert words in repr(bp) and words in bp._repr_html_()
        with expect_fail(LookupError, contains=words): bp["row"]

def test_a_data_loader_is_seen_only_without_workers():
    class Squares(torch.utils.data.Dataset):
        def __len__(self): return 4

        def __getitem__(self, i):
            value = torch.tensor(i * i)
            return value

    seen = {}
    for num_workers in [0, 1]:
        with Breakpoint(Squares.__getitem__, at="return value") as bp:
            loader = torch.utils.data.DataLoader(Squares(), batch_size=2, num_workers=num_workers)
            loaded = torch.cat(list(loader)).tolist()
        test_eq(loaded, [0, 1, 4, 9])
        seen[num_workers] = len(bp.hits)
    print(seen)
    test_eq(seen, {0: 4, 1: 0})
    assert "DataLoader worker" in repr(bp)

def test_watching_does_not_change_the_run():
    plain, *numbers = sample_seeded()
    with Breakpoint(sample, at="out[i] +=", watch=nasty, when="torch.rand(1) < 2 and left.pop()") as bp:
        watched, *watched_numbers = sample_seeded()
    print(watched)
    print(bp.hits[4]["torch.rand(2)"], bp.hits[4]["next(steps)"])
    assert torch.equal(plain, watched) and numbers == watched_numbers
    test_eq(len(bp.hits), 5)
    test_eq(repr(bp["next(steps)"]), "<TypeError: 'Note' object is not an iterator>")

def test_coverage_misses_no_line_inside_the_block():
    cores = ["ctrace", "pytrace"] + ["sysmon"] * (sys.version_info >= (3, 12))
    missing = {core: missing_lines(core) for core in cores}
    print(missing["ctrace"])
    for core in cores: test_eq(missing[core], {"shop.py": [], "test_shop.py": []})

def test_build_labels_grows_as_its_picture_shows():
    watch = ["role", "len(input_ids)", "labels"]
    with Breakpoint(build_labels, at="input_ids += ids", watch=watch) as growing:
        with Breakpoint(build_labels, at='"labels": torch', watch=["input_ids", "labels"]) as done:
            out = build_labels(turns)
    test_eq([hit["len(input_ids)"] for hit in growing.hits], [1, 5, 8, 9])
    test_eq(growing.hits[1]["labels"], [IGNORE_INDEX] * 5)
    test_eq(growing.hits[2]["labels"], [IGNORE_INDEX] * 5 + [573, 3741, 107])
    test_eq(done["labels"], out["labels"].tolist())
    test_eq([hit["role"] for hit in growing.hits], ["user", "model", "user", "model"])
    assert done["labels"][done["input_ids"].index(IMAGE_TOKEN_INDEX)] == IGNORE_INDEX
