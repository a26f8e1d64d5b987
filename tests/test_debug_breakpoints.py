"Derived from nbs/01_breakpoints.ipynb by `make tests`; edit the notebook, not this file."
import contextlib, dataclasses, inspect, linecache, sys, types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from vlm_lit.core import ConfigError
from vlm_lit.debug.compare import Outcome, outcome_of
from vlm_lit.debug.expectations import FUNCTIONS, Expectations, StopDiff
from vlm_lit.debug.lines import find_stop, name_of, plain_function, source_lines
from vlm_lit.debug.snapshots import LineStop, Note, check_expression, evaluate, failure
from vlm_lit.debug.snapshots import same_randomness, set_local, snapshot
from vlm_lit.debug.stop_display import html_display, text_display
from vlm_lit.debug.workers import Mailbox, process_name, running_children
import contextlib, json, os, random, re, subprocess, sys, tempfile, threading, weakref
import numpy as np, torch
from fastcore.test import test_eq, expect_fail
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN_INDEX, describe, peek
from small_parts import pack
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.debug.breakpoints import Hit
from vlm_lit.debug.breakpoints import short_path

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
    places = [short_path(f.__code__.co_filename, f.__module__) for f in (describe, json.dumps)]
    test_eq(places, ["vlm_lit/core.py", "json/__init__.py"])

def test_breakpoint_copies_the_value_before_the_line_runs():
    input_ids = torch.tensor([2, 106, 1645, 9, 7, 1])
    with Breakpoint(mask_prompt, at="labels[:prompt_len] =", watch="labels prompt_len") as bp:
        labels = mask_prompt(input_ids, prompt_len=4)
    bp.expect(labels=[2, 106, 1645, 9, 7, 1], prompt_len=4)

def test_copies_stay_as_they_were():
    input_ids = torch.tensor([2, 106, 1645, 9, 7, 1])
    with Breakpoint(mask_prompt, at="labels[:prompt_len] =", watch="labels prompt_len") as bp:
        labels = mask_prompt(input_ids, prompt_len=4)
    test_eq(labels.tolist(), [IGNORE_INDEX] * 4 + [7, 1])
    test_eq(bp["labels"].tolist(), [2, 106, 1645, 9, 7, 1])
    test_eq(sorted(bp.hits[0].locals), ["input_ids", "labels", "prompt_len"])
    test_eq([call.name for call in bp.hits[0].calls][-1], "mask_prompt")
    assert bp.hits[0].calls[0].name.startswith("labels = mask_prompt(input_ids")

def test_a_prompt_one_token_short_supervises_one_more():
    with Breakpoint(mask_prompt, at="labels[:prompt_len] =", set={"prompt_len": lambda n: n - 1}) as bp:
        mask_prompt(torch.tensor([2, 106, 1645, 9, 7, 1]), prompt_len=4)
    bp.expect_changed({"(result != -100).sum()": (2, 3)})

def test_each_pass_of_a_loop_is_a_hit():
    with Breakpoint(pack, at="total += x", watch=["x", "total", "total + x"]) as bp:
        pack([3, 1, 4, 1])
    bp.expect_each({"total": [0, 3, 4, 8], "total + x": [3, 4, 8, 9]})

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

def test_nested_breakpoints_both_stop():
    def total_of(xs):
        packed = pack(xs)
        return packed["mean"] * packed["size"]

    with Breakpoint(total_of, at="return packed", watch="packed") as outer:
        with Breakpoint(pack, at="return row", watch="total") as inner:
            total_of([3, 4])
        total_of([5])
    test_eq([hit["total"] for hit in inner.hits], [7])
    test_eq([hit["packed"]["size"] for hit in outer.hits], [2, 1])
    inner.expect(total=7, hits=1)
    outer.expect_each({"packed['size']": [2, 1]})

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

    from vlm_lit.debug.stop_display import why_not

    for bp in [not_run, failed_before, refused, elsewhere]:
        print("-", why_not(bp)[:98])
    reasons = [
        (not_run, "not run yet"),
        (failed_before, "but not this line"),
        (refused, "was about to run 2 times, and `when` did not hold"),
        (elsewhere, "not entered in this thread"),
    ]
    for bp, words in reasons:
        assert words in repr(bp) and words in bp._repr_html_()
        with expect_fail(LookupError, contains=words): bp["row"]

def test_watching_does_not_change_the_run():
    plain, *numbers = sample_seeded()
    with Breakpoint(sample, at="out[i] +=", watch=nasty, when="torch.rand(1) < 2 and left.pop()") as bp:
        watched, *watched_numbers = sample_seeded()
    print(watched)
    assert torch.equal(plain, watched) and numbers == watched_numbers
    test_eq(len(bp.hits), 5)
    test_eq(repr(bp["next(steps)"]), "<TypeError: 'Note' object is not an iterator>")

def test_coverage_misses_no_line_inside_the_block():
    cores = ["ctrace", "pytrace"] + ["sysmon"] * (sys.version_info >= (3, 12))
    missing = {core: missing_lines(core) for core in cores}
    print(missing["ctrace"])
    for core in cores: test_eq(missing[core], {"shop.py": [], "test_shop.py": []})

def test_build_labels_grows_turn_by_turn():
    watch = ["role", "len(input_ids)", "labels"]
    with Breakpoint(build_labels, at="input_ids += ids", watch=watch) as growing:
        with Breakpoint(build_labels, at='"labels": torch', watch="input_ids labels") as done:
            out = build_labels(turns)
    test_eq(done["labels"], out["labels"].tolist())
    assert done["labels"][done["input_ids"].index(IMAGE_TOKEN_INDEX)] == IGNORE_INDEX
    growing.expect_each({"len(input_ids)": [1, 5, 8, 9], "role": ["user", "model"] * 2})

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

def test_set_changes_what_it_should_and_nothing_else():
    def scaled(xs, *more, factor=2, **named):
        parts = [factor * x for x in (*xs, *more, *named.values())]
        return parts

    given = [1, 2]
    with Breakpoint(scaled, at="parts =", set={"factor": 10}) as bp:
        test_eq(scaled(given, 3, factor=3, last=4), [10, 20, 30, 40])
    bp.expect_changed(result=([3, 6, 9, 12], [10, 20, 30, 40]))
    test_eq(bp.settings, [("factor", 3, 10)])

    def emptied(xs):
        xs.clear()
        return xs

    with Breakpoint(scaled, at="parts =", set={"xs": emptied, "more": ()}) as bp:
        test_eq(scaled(given, 3), [])
    test_eq(given, [1, 2])

    def slow_start(n):
        first = n
        second = 1 / first
        return second

    with Breakpoint(slow_start, at="second =", set={"first": 0}) as bp:
        with expect_fail(ZeroDivisionError): slow_start(4)
    bp.expect_changed({"result": (0.25, lambda found: "ZeroDivisionError" in repr(found))})
    with Breakpoint(slow_start, at="second =", set={"first": 1}, when="n == 2") as bp:
        test_eq([slow_start(n) for n in (4, 2)], [0.25, 1.0])
    seen = []
    with Breakpoint(slow_start, at="second =", watch="first") as plain:  # two on one line
        with Breakpoint(slow_start, at="second =", set={"first": 2}) as bp:
            with Breakpoint(slow_start, at="return second", watch="second") as after:
                slow_start(4)
    test_eq((after["second"], bp.hits[0].outcomes[0].value), (0.5, 0.25))

def test_set_is_refused_where_it_cannot_work():
    def counts(n):
        for i in range(n):
            yield i

    def outer(n):
        def inner(k):
            twice = 2 * k
            return twice

        return inner(n)

    with expect_fail(ConfigError, contains="set= names 'lables', which is no variable of mask_prompt"):
        Breakpoint(mask_prompt, at="return labels", set={"lables": 1})
    with expect_fail(ConfigError, contains="counts is a generator"):
        Breakpoint(counts, at="yield i", set={"i": 1})
    with expect_fail(ConfigError, contains="not in a function inside it"):
        Breakpoint(outer, at="return twice", set={"twice": 1})

    def fails(n): raise KeyError("no value")

    with expect_fail(ConfigError, contains="set= at"):
        with Breakpoint(mask_prompt, at="return labels", set={"labels": fails}):
            mask_prompt(torch.tensor([1, 2]), 1)
