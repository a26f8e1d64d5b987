"Derived from nbs/08a_samplers.ipynb by `make tests`; edit the notebook, not this file."
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import Sampler
from vlm_lit.core import ConfigError, DataError
from vlm_lit.data.collator import pack_sequences
from collections import Counter
import matplotlib.pyplot as plt
from fastcore.test import test_eq
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.data.samplers import Draws
from vlm_lit.data.samplers import GlobalBatchSampler
from vlm_lit.data.samplers import _grouped
from vlm_lit.data.samplers import mixture_draws
from vlm_lit.data.samplers import padding_ratio

def test_the_second_epoch_takes_the_other_half():
    half = mixture_draws([8], repeat=[0.5])
    watch = ["epoch", "rounds", "start", "count"]
    with Breakpoint(Draws._source, at="return chosen", watch=watch) as bp:
        both = [half.order(seed=0, epoch=epoch).tolist() for epoch in (0, 1)]
    test_eq(sorted(both[0] + both[1]), list(range(8)))
    bp.expect_each(start=[0, 4], rounds=[[both[0] + both[1]]] * 2)

def test_grouped_steps_hold_one_modality():
    lengths = np.array([50, 9, 52, 7, 90, 8, 61, 30, 55, 6, 58, 70])
    has_image = lengths >= 50
    stop = dict(at="rest = rng.permutation", watch="steps rest lengths[steps[0]] lengths[steps[1]]")
    with Breakpoint(_grouped, **stop) as bp:
        records, ends = _grouped(np.arange(12), np.random.default_rng(0), lengths, has_image, size=4)
    test_eq(sorted(records.tolist()), list(range(12)))
    bp.expect({"lengths[steps[0]]": [[90, 70, 52, 50]], "lengths[steps[1]]": [[30, 8, 7, 6]]})
    bp.expect({"sum(map(len, rest))": 4})

def test_a_global_batch_is_dealt_out_to_its_shares():
    one = GlobalBatchSampler(mixture_draws([12]), size=4, seed=1)
    two = GlobalBatchSampler(mixture_draws([12]), size=4, shares=2, seed=1)
    with Breakpoint(
        GlobalBatchSampler.micro_batches, at="dealt = ", watch="step units self.shares"
    ) as bp:
        for step in range(3):
            print(one.micro_batches(step), "=", two.micro_batches(step))
    bp.expect({"self.shares": 1}, units=[[7], [11], [1], [4]])
    bp.expect({"self.shares": 2}, hit=1, units=[[7], [11], [1], [4]])
    bp.expect_return({"result[0]": [(0, 7), (0, 1)]}, hit=1)

def test_a_shuffle_that_depends_on_the_rank_repeats_and_misses_records():
    settings = dict(size=4, shares=2, seed=1)
    stop = dict(at="order = self.draws", watch="epoch", set={"rng": np.random.default_rng([1, 0, 7])})
    with Breakpoint(GlobalBatchSampler._units, **stop) as bp:
        other = GlobalBatchSampler(mixture_draws([12]), **settings)
    own = GlobalBatchSampler(mixture_draws([12]), **settings)
    shares = [
        [i for _, i in plan.micro_batches(step)[rank]]
        for step in range(3)
        for rank, plan in enumerate((own, other))
    ]
    seen = Counter(sum(shares, []))
    print("never seen:", sorted(set(range(12)) - set(seen)), end="; ")
    print("seen twice:", sorted(i for i, times in seen.items() if times > 1))
    assert len(seen) < 12 and max(seen.values()) == 2
    bp.expect_changed({"result[0][:4]": ([7, 11, 1, 4], [3, 1, 11, 4])})

def test_epochs_walk_through_a_source_without_restarting():
    half = mixture_draws([8, 6], repeat=[0.5, 1.5])
    two = np.concatenate([half.order(3, 0), half.order(3, 1)])
    assert sorted(two[two < 8]) == list(range(8))
    assert np.bincount(two[two >= 8] - 8).tolist() == [3] * 6
    assert (half.order(3, 1) == half.order(3, 1)).all()

def test_a_cap_is_a_fixed_sample():
    capped = mixture_draws([50], max_samples=[10])
    first, second = (set(capped.order(0, e).tolist()) for e in (0, 1))
    assert first == second and len(first) == 10 and first != set(range(10))

def test_wrong_mixtures_are_refused():
    import pytest

    for kwargs in (
        dict(sizes=[]),
        dict(sizes=[0]),
        dict(sizes=[3, 3], weight=[1, None]),
        dict(sizes=[3], weight=[-1]),
        dict(sizes=[3], weight=[1], repeat=[2]),
        dict(sizes=[3], repeat=[0]),
        dict(sizes=[3], max_samples=[-1]),
        dict(sizes=[3], weight=[0]),
        dict(sizes=[3, 3], weight=[1, float("nan")]),
        dict(sizes=[3], weight=[float("inf")]),
        dict(sizes=[3], repeat=[float("nan")]),
        dict(sizes=[3], repeat=[float("inf")]),
    ):
        with pytest.raises(ConfigError): mixture_draws(**kwargs)

def test_any_layout_sees_the_same_global_batches():
    rng = np.random.default_rng(0)
    n = 103
    facts = dict(
        lengths=rng.integers(5, 40, n),
        has_image=rng.random(n) < 0.6,
        keys=rng.integers(0, 30, n).tolist(),
        max_length=64,
        samples_per_image=3,
    )
    draws = mixture_draws([80, 23], repeat=[1, 2.5])
    for batching in ("shuffled", "grouped", "packed", "by_image"):
        plans = [
            GlobalBatchSampler(draws, 12, shares, batching, seed=5, epochs=3, **facts)
            for shares in (1, 2, 3, 4, 12)
        ]
        for step in range(2 * plans[0].steps + 1):
            want = sorted(i for unit in plans[0].global_batch(step) for i in unit)
            for plan in plans:
                assert sorted(i for share in plan.micro_batches(step) for _, i in share) == want
                assert len(plan) == plans[0].steps * plan.shares

def test_every_record_is_seen_in_an_epoch():
    n = 103
    facts = dict(
        lengths=np.random.default_rng(0).integers(5, 40, n),
        has_image=np.arange(n) % 3 > 0,
        keys=[i // 3 for i in range(n)],
        max_length=64,
    )
    for batching in ("shuffled", "grouped", "packed", "by_image"):
        plan = GlobalBatchSampler(mixture_draws([n]), 8, 4, batching, seed=2, epochs=2, **facts)
        plan.set_epoch(0)
        seen = [i for batch in plan for _, i in batch]
        assert set(seen) == set(range(n))
        assert len(seen) - n <= 8 * (facts["max_length"] // 5 if batching == "packed" else 4)
        plan.set_epoch(1)
        assert [i for batch in plan for _, i in batch] != seen

def test_no_epoch_of_a_run_loses_a_record():
    from hypothesis import given, settings, strategies as st

    runs = dict(
        n=st.integers(1, 60),
        size=st.sampled_from([1, 2, 4, 6]),
        seed=st.integers(0, 99),
        kind=st.sampled_from(["shuffled", "grouped", "packed", "by_image"]),
        length=st.integers(1, 7),
        is_by_steps=st.booleans(),
    )

    @settings(max_examples=150, derandomize=True, deadline=None)
    @given(**runs)
    def seen_in_each_epoch(n, size, seed, kind, length, is_by_steps):
        rng = np.random.default_rng([seed, n])
        facts = dict(lengths=rng.integers(1, 1 + length * 3, n), max_length=length * 3)
        facts |= dict(has_image=rng.random(n) < 0.5, keys=rng.integers(0, 9, n).tolist())
        facts |= dict(samples_per_image=2, epochs=5)
        if is_by_steps: facts["max_steps"] = 5 * n
        draws = mixture_draws([n, 3], repeat=[1, 1.5])
        facts["lengths"] = np.append(facts["lengths"], [1, 2, 3])
        facts["has_image"] = np.append(facts["has_image"], [True, False, True])
        facts["keys"] += [0, 1, 2]
        plan = GlobalBatchSampler(draws, size, 1, kind, seed, **facts)
        for epoch in range(-(-facts["max_steps"] // plan.steps) if is_by_steps else 5):
            plan.set_epoch(epoch)
            seen = Counter(i for batch in plan for _, i in batch)
            wanted = Counter(draws.order(seed, epoch).tolist())
            assert not wanted - seen, (epoch, wanted - seen)

    seen_in_each_epoch()

def test_an_epoch_beyond_the_run_is_not_cut_off():
    import pytest

    rng = np.random.default_rng(0)
    facts = dict(lengths=rng.integers(1, 9, 400), max_length=9)
    draws = mixture_draws([400], repeat=[0.5])  # another half has another number of sequences
    plans = {n: GlobalBatchSampler(draws, 1, 1, "packed", **facts, epochs=n) for n in (1, 9)}
    units = [len(plans[9]._units(epoch)[1]) for epoch in range(9)]
    assert plans[9].steps == max(units) > plans[1].steps == units[0]
    larger = next(epoch for epoch, own in enumerate(units) if own > units[0])
    with pytest.raises(ConfigError, match="give the sampler the run's epochs"):
        plans[1].global_batch(larger * plans[1].steps)
    few = GlobalBatchSampler(draws, 1, 1, "packed", drop_last=True, **facts, epochs=9)
    assert few.steps == min(units)

def test_grouped_steps_have_one_modality_and_little_padding():
    rng = np.random.default_rng(3)
    n = 1000
    lengths, has_image = rng.integers(20, 600, n), rng.random(n) < 0.5
    facts = dict(lengths=lengths, has_image=has_image)
    plan = GlobalBatchSampler(mixture_draws([n]), 16, 2, "grouped", **facts)
    steps = [[i for unit in plan.global_batch(s) for i in unit] for s in range(plan.steps)]
    mixed = sum(len(set(has_image[step])) > 1 for step in steps)
    padding = 1 - lengths[np.concatenate(steps)].sum() / sum(16 * lengths[step].max() for step in steps)
    assert mixed <= 2 and padding < 0.05, (mixed, padding)

def test_padding_of_two_batches():
    assert padding_ratio([[4, 4], [4, 4]]) == 0 and padding_ratio([]) == 0
    assert abs(padding_ratio([[1, 4], [3]]) - (1 - 8 / 11)) < 1e-9  # 3 of 8 + 3 positions

def test_packing_pads_least():
    rng = np.random.default_rng(0)
    n = 2000
    lengths = np.minimum((40 * rng.lognormal(0, 1, n) + 606).astype(int), 2048)
    plan = GlobalBatchSampler(mixture_draws([n]), 16, 1, "packed", lengths=lengths, max_length=2048)
    units = [lengths[u].sum() for s in range(plan.steps) for u in plan.global_batch(s)]
    assert max(units) <= 2048 and np.mean(units) > 0.9 * 2048

def test_impossible_batches_are_refused():
    import pytest

    with pytest.raises(ConfigError, match="shared out"):
        GlobalBatchSampler(mixture_draws([10]), 4, 3)
    with pytest.raises(ConfigError, match="fewer than one step"):
        GlobalBatchSampler(mixture_draws([3]), 4, drop_last=True)
    facts = dict(lengths=[5, 90, 7], max_length=64, names=["a", "b", "c"].__getitem__)
    with pytest.raises(DataError, match="record 'b': 90 tokens"):
        GlobalBatchSampler(mixture_draws([3]), 1, batching="packed", **facts)

def test_half_a_million_records_are_planned_in_seconds():
    import time

    n = 500_000
    began = time.process_time()
    lengths = np.random.default_rng(0).integers(600, 900, n)
    facts = dict(lengths=lengths, has_image=np.ones(n, bool))
    plan = GlobalBatchSampler(mixture_draws([n]), 128, 8, "grouped", **facts)
    assert len(plan.micro_batches(plan.steps - 1)) == 8 and time.process_time() - began < 20
