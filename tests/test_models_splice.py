"Derived from nbs/09a_splice.ipynb by `make tests`; edit the notebook, not this file."
import torch
from dataclasses import dataclass
from vlm_lit.core import IGNORE_INDEX, IMAGE_TOKEN_INDEX, ConfigError, DataError
from fastcore.test import test_eq, expect_fail
from transformers.utils.logging import disable_progress_bar
from vlm_lit.models.splice import check_pictures
from vlm_lit.models.splice import merge_image_features
from vlm_lit.models.splice import merge_labels
from vlm_lit.models.splice import merge_sample_ids
from vlm_lit.models.splice import plan_merge
from vlm_lit.models.splice import restart_positions

def setup_module():

    torch.set_printoptions(precision=3, sci_mode=False)
    disable_progress_bar()

def test_pictures_land_in_their_own_gaps():
    ids = torch.tensor([[2, -200, 5, -200], [2, 7, -200, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    plan = plan_merge(ids, mask, num_image_tokens=3)
    text = ids.clamp(min=0)[..., None].float()
    pictures = torch.tensor([[100.0, 101, 102], [200, 201, 202], [300, 301, 302]])[..., None]
    spliced = merge_image_features(plan, text, pictures)[..., 0].int().tolist()
    print(*spliced, sep="\n")
    test_eq(spliced, [[2, 100, 101, 102, 5, 200, 201, 202], [2, 7, 300, 301, 302, 0, 0, 0]])
    labels = torch.tensor([[-100, -100, 5, -100], [-100, 7, -100, -100]])
    spliced = merge_labels(plan, labels).tolist()
    test_eq(spliced, [[-100] * 4 + [5] + [-100] * 3, [-100, 7] + [-100] * 6])
    test_eq(plan.filled.int().tolist(), [[1] * 8, [1] * 5 + [0] * 3])

def test_splice_equals_a_loop_over_samples():
    torch.manual_seed(0)
    for _ in range(30):
        batch, length = int(torch.randint(1, 5, ())), int(torch.randint(1, 9, ()))
        ids = torch.randint(1, 9, (batch, length))
        ids[torch.rand(batch, length) < 0.25] = -200
        lengths = torch.randint(1, length + 1, (batch,))
        mask = torch.arange(length) < lengths[:, None]
        ids[~mask] = 0
        text, pictures = torch.randn(batch, length, 4), torch.randn(int((ids == -200).sum()), 3, 4)
        plan, queue = plan_merge(ids, mask, 3), iter(pictures)
        out = merge_image_features(plan, text, pictures)
        for b in range(batch):
            rows = []
            for t in range(int(lengths[b])):
                rows.append(next(queue) if ids[b, t] == -200 else text[b, t : t + 1])
            rows = torch.cat(rows)
            assert torch.equal(out[b, : len(rows)], rows)
            assert plan.filled[b].sum() == len(rows)
            assert (out[b, len(rows) :] == 0).all()

def test_splice_compiles_without_a_break():
    def compiled_part(input_ids, attention_mask, text, features):
        plan = plan_merge(input_ids, attention_mask, features.shape[1], merged_seq_len=12)
        return merge_image_features(plan, text, features), merge_labels(plan, input_ids)

    ids = torch.tensor([[2, -200, 5, -200, 9, 8], [2, 7, -200, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    text, features = torch.randn(2, 6, 4), torch.randn(3, 4, 4)
    fast = torch.compile(compiled_part, fullgraph=True, backend="eager")
    own = compiled_part(ids, mask, text, features)
    for got, want in zip(fast(ids, mask, text, features), own, strict=True):
        assert torch.equal(got, want)
    test_eq(plan_merge(ids, mask, 4).filled.shape, (2, 12))  # counted: the same 12

def test_numbers_of_tags_and_pictures_are_compared():
    check_pictures(torch.tensor([[2, -200, 5]]), 1)
    with expect_fail(DataError, contains="1 image sentinel(s) in input_ids for 2 image(s)"):
        check_pictures(torch.tensor([[2, -200, 5]]), 2)

def test_positions_restart_with_each_sample():
    ids = torch.tensor([[5, 6, -200, 7, 8, 9, 5, 0, 0]])
    own = torch.tensor([[1, 1, 2, 2, 3, 3, 3, 0, 0]])
    plan = plan_merge(ids, own > 0, 3)
    print(merge_sample_ids(plan, own).tolist())
    print(restart_positions(merge_sample_ids(plan, own)).tolist())
    test_eq(merge_sample_ids(plan, own)[0].tolist(), [1, 1, 2, 2, 2, 2, 3, 3, 3])
    test_eq(restart_positions(merge_sample_ids(plan, own))[0].tolist(), [0, 1, 0, 1, 2, 3, 0, 1, 2])
    # the second row is padded only by the splice
    wide = plan_merge(torch.tensor([[-200, 7], [5, 6]]), torch.ones(2, 2).bool(), 3)
    spliced = merge_sample_ids(wide, torch.tensor([[1, 1], [1, 2]]))
    test_eq(spliced.tolist(), [[1, 1, 1, 1], [1, 2, 0, 0]])
    # a sample of one token, too
    positions = restart_positions(torch.tensor([[1, 2, 2, 0, 0], [1, 1, 1, 1, 1]]))
    test_eq(positions.tolist(), [[0, 0, 1, 0, 1], [0, 1, 2, 3, 4]])
