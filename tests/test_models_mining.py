"Derived from nbs/08e_mining.ipynb by `make tests`; edit the notebook, not this file."
from contextlib import nullcontext
from functools import lru_cache
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from vlm_lit.core import ConfigError
import copy, weakref
import numpy as np
import matplotlib.pyplot as plt
from PIL import Image
from fastcore.test import test_eq, test_close, expect_fail
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils.logging import disable_progress_bar
from vlm_lit.debug.breakpoints import Breakpoint
from vlm_lit.core import peek
from vlm_lit.images import grid_crops, resize_to_square, sample_image, to_bytes
from vlm_lit.models.mining import MiningLayers
from vlm_lit.models.mining import PatchInfoMining
from vlm_lit.models.mining import axis_weights
from vlm_lit.models.mining import cells_under
from vlm_lit.models.mining import from_one_grid
from vlm_lit.models.mining import stage_average
from vlm_lit.models.mining import stage_statistics
from vlm_lit.models.mining import to_one_grid
from vlm_lit.models.mining import window_scores
from vlm_lit.models.mining import window_values
from vlm_lit.models.mining import window_weights

def setup_module():
    global CASES, LiveBytes, WIDTHS, brightness_maps, cost, example, fast, mining_in_loops, mining_in_windows, relative, results, teach, to_windows, upsampled, wishes
    torch.set_printoptions(precision=3, sci_mode=False)
    disable_progress_bar()
    def upsampled(maps):
        "All maps at the size of the first, channels joined."
        size = maps[0].shape[-2:]
        return torch.cat([F.interpolate(m, size, mode="bilinear") for m in maps], 1)
    def mining_in_loops(layers, low, maps):
        "q + softmax(q kᵀ / sqrt(d)) v, one query at a time."
        joined = upsampled(maps)
        grid = round(low.shape[1] ** 0.5)
        out, w = [], joined.shape[-1] // grid
        for n in range(len(low)):
            for p in range(grid * grid):
                row, col = divmod(p, grid)
                window = joined[n, :, row * w : row * w + w, col * w : col * w + w].flatten(1).T
                q = layers.vlm_uni_query_projector(low[n, p])
                k = layers.vlm_uni_aux_projector(window)
                v = layers.vlm_uni_val_projector(window)
                out.append(low[n, p] + (q @ k.T / len(q) ** 0.5).softmax(-1) @ v)
        return torch.stack(out).reshape(low.shape)
    def example(grid=4, channels=(8, 12), sides=(16, 8), width=16, n=2, seed=0, layers=MiningLayers):
        "Layers with random weights that matter, and random features."
        torch.manual_seed(seed)
        layers = layers(width, sum(channels))
        for p in layers.parameters(): p.data += 0.3 * torch.randn_like(p)
        low = torch.randn(n, grid * grid, width)
        return layers, low, [torch.randn(n, c, side, side) for c, side in zip(channels, sides)]
    def to_windows(joined, grid):
        "(n, channels, side, side) -> (n, grid*grid, window*window, channels)"
        n, channels, side, _ = joined.shape
        cut = joined.reshape(n, channels, grid, side // grid, grid, side // grid)
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, grid * grid, -1, channels)
    def mining_in_windows(layers, low, maps, pool=1):
        "MGM's formulation; `pool` averages the joined map, for images read as a whole."
        windows = to_windows(F.avg_pool2d(upsampled(maps), pool), round(low.shape[1] ** 0.5))
        q = layers.vlm_uni_query_projector(low)
        k = layers.vlm_uni_aux_projector(windows)
        v = layers.vlm_uni_val_projector(windows)
        attention = (torch.einsum("npd,npwd->npw", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        return low + torch.einsum("npw,npwd->npd", attention, v)
    class LiveBytes(TorchDispatchMode):
        "The most bytes that tensors made inside took at one moment."

        def __init__(self):
            super().__init__()
            self.now = 0
            self.peak = 0
            self.known = weakref.WeakKeyDictionary()

        def add(self, bytes):
            self.now += bytes
            self.peak = max(self.peak, self.now)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, torch.Tensor):  # was there before
                    self.known.setdefault(t.untyped_storage(), True)
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if not isinstance(t, torch.Tensor) or t.untyped_storage() in self.known:
                    continue
                storage = t.untyped_storage()
                self.known[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
            return out
    WIDTHS = dict(channels=(192, 384, 768, 1536), width=1024)
    def cost(run, side, device="meta", widths=WIDTHS, backward=True, frozen=False):
        """Peak of live bytes and number of multiplications in matrix products, for one image in
    float32."""
        channels, width = widths["channels"], widths["width"]
        with torch.device(device):
            mining = PatchInfoMining(width, sum(channels))
            low = torch.randn(1, (side // 8) ** 2, width)
            maps = [torch.randn(1, c, side // 2**n, side // 2**n) for n, c in enumerate(channels)]
        if not frozen:
            low, maps = low.requires_grad_(), [m.requires_grad_() for m in maps]
        counter = FlopCounterMode(display=False)
        with LiveBytes() as live, counter as flops, torch.set_grad_enabled(backward):
            out = run(mining, low, maps, 1)
            if backward: out.sum().backward()
        return live.peak, flops.get_total_flops() // 2
    fast = lambda mining, *args: mining(*args)
    def brightness_maps(image):
        """(n, side, side) of -1 to 1 -> two stages of four channels: value, -value, 1, -1."""
        fine = torch.stack([image, -image, torch.ones_like(image), -torch.ones_like(image)], 1)
        return [fine, F.avg_pool2d(fine, 2)]
    def wishes(sign):
        "(n, num_queries) of +1 and -1 -> queries of eight numbers."
        return torch.stack([sign, -sign, torch.ones_like(sign), -torch.ones_like(sign)] * 2, -1)
    def teach(steps=150):
        """Mining that finds the brightest or the darkest value, from random clouds; and the loss of
    every step."""
        torch.manual_seed(0)
        mining = PatchInfoMining(8, 8)
        optimizer, losses = torch.optim.Adam(mining.parameters(), 1e-2), []
        for _ in range(steps):
            clouds = F.interpolate(torch.rand(8, 1, 8, 8) * 2 - 1, size=24, mode="bilinear")[:, 0]
            sign, windows = torch.rand(8, 9).round() * 2 - 1, to_windows(clouds[:, None], 3)[..., 0]
            low = wishes(sign)
            found = (mining(low, brightness_maps(clouds)) - low)[..., 0]
            wanted = (windows * sign[..., None]).amax(-1) * sign
            loss = (found - wanted).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return mining.requires_grad_(False), losses
    CASES = {
        "plain": dict(),
        "odd sides": dict(grid=3, sides=(15, 7)),
        "last stage alone": dict(channels=(12,), sides=(16,)),
        "four stages": dict(grid=3, channels=(4, 6, 8, 10), sides=(24, 12, 6, 3)),
        "windows smaller than a cell": dict(grid=8, channels=(4, 6, 8), sides=(16, 8, 2)),
        "one query": dict(grid=1, sides=(5, 3)),
        "whole image": dict(grid=2, sides=(16, 8), pool=2),
    }
    def relative(got, want, size=None):
        "Norm of the difference over the norm of `size`, or of what is wanted."
        size = want if size is None else size
        return float((got - want).detach().float().norm() / size.detach().float().norm())
    def results(run, mining, low, maps, pool):
        "Output and all gradients of one version."
        mining, low = copy.deepcopy(mining), low.clone().requires_grad_()
        maps = [m.clone().requires_grad_() for m in maps]
        out = run(mining, low, maps, pool)
        torch.manual_seed(1)
        (out * torch.randn(out.shape)).sum().backward()
        grads = {
            "low": low.grad,
            **{f"map {n}": m.grad for n, m in enumerate(maps)},
            **{name: p.grad for name, p in mining.named_parameters()},
        }
        return out.detach(), grads

def test_one_query_attends_to_its_window():
    layers, low, maps = example(width=6)
    watch = ["row", "col", "q", "k", "v", "(q @ k.T / len(q) ** 0.5).softmax(-1)"]
    with Breakpoint(mining_in_loops, at="out.append", watch=watch, when="n == 0 and p == 5") as bp:
        mining_in_loops(layers, low, maps)
    attention = "(q @ k.T / len(q) ** 0.5).softmax(-1)"
    bp.expect({"k.shape": (16, 6), f"round({attention}.sum().item(), 4)": 1.0}, row=1, col=1)

def test_windows_lie_under_their_queries():
    numbered = torch.arange(16.0).reshape(1, 1, 4, 4)
    with Breakpoint(
        to_windows, at="return cut.permute", watch=["joined[0, 0].int()", "cut.shape"]
    ) as bp:
        to_windows(numbered, 2)
    windows = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    bp.expect_return({"result[0, :, :, 0].int().tolist()": windows})

def test_strips_instead_of_windows():
    strips = {"cut": lambda cut: cut.transpose(3, 4)}
    with Breakpoint(to_windows, at="return cut.permute", watch="cut.shape", set=strips) as bp:
        wrong = to_windows(torch.arange(16.0).reshape(1, 1, 4, 4), 2)
    assert torch.equal(wrong.flatten(), torch.arange(16.0))  # as `reshape` gives it
    bp.expect_changed({"result[0, 0, :, 0].int().tolist()": ([0, 1, 4, 5], [0, 1, 2, 3])})

def test_queries_keys_and_values_of_all_windows():
    layers, low, maps = example(width=6)
    watch = ["q", "k", "v", "torch.einsum('npd,npwd->npw', q, k)"]
    with Breakpoint(mining_in_windows, at="attention =", watch=watch) as bp:
        mining_in_windows(layers, low, maps)
    bp.expect({"q.shape": (2, 16, 6), "k.shape": (2, 16, 16, 6), "v.shape": (2, 16, 16, 6)})

def test_a_window_is_mixed_from_its_cells_and_a_border():
    axis_weights.cache_clear()
    with Breakpoint(axis_weights, at="cells = first", watch="windows.shape first last m") as bp:
        axis_weights(side=6, base=12, grid=3)
    bp.expect(first=[0, 1, 3], last=[2, 4, 5], m=4)
    own = [[0.25, 0.75, 0, 0], [0, 0.75, 0.25, 0], [0, 0.25, 0.75, 0], [0, 0, 0.75, 0.25]]
    cells = [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]
    bp.expect_return({"result[0].tolist()": cells, "result[1][1].tolist()": own})

def test_aligned_corners_move_position_8():
    axis_weights.cache_clear()
    stretched = F.interpolate(torch.eye(24)[None], size=192, mode="linear", align_corners=True)[0].T
    with Breakpoint(axis_weights, at="windows = whole", watch="whole", set={"whole": stretched}) as bp:
        axis_weights(side=24, base=192, grid=24)
    axis_weights.cache_clear()
    place = "(result[1] @ (8 * (result[0] + 0.5))[..., None])[1, 0].item()"  # of position 8
    bp.expect_changed({place: (8.5, 11.7)}, tolerance=0.05)

def test_rows_for_columns_transpose_the_windows():
    swapped = {"both": lambda both: both.transpose(0, 1)}
    with Breakpoint(window_weights, at="products =", watch="both.shape", set=swapped) as bp:
        window_weights(4, 4, 2, 1, "cpu")  # a map of 4 x 4 cells for 2 x 2 queries
    bp.expect_changed({"result[0][1].tolist()": ([2, 3, 6, 7], [8, 9, 12, 13])})

def test_nine_cells_stand_for_sixty_four_positions():
    torch.manual_seed(0)
    features, query = torch.randn(1, 12, 24, 24), torch.randn(1, 576, 12)
    with Breakpoint(stage_statistics, at="score_and_total =", watch="own weights gram linear") as bp:
        stage_statistics(features, query, *window_weights(24, 192, 24, 1, "cpu"))
    bp.expect({"own.shape": (1, 576, 9, 12), "weights.shape": (576, 64, 9)})
    bp.expect({"gram.shape": (1, 576, 9, 9)})
    bp.expect_return({"result.shape": (3, 1, 576, 64)})

def test_enlarged_squares_are_too_large():
    def mean_of_squares(gram):
        squares = gram.diagonal(dim1=-2, dim2=-1)
        return (squares[..., :, None] + squares[..., None, :]) / 2

    features, query = torch.tensor([[-1.0, 1], [-1, 1]])[None, None], torch.zeros(1, 1, 1)
    change = {"gram": mean_of_squares}
    with Breakpoint(stage_statistics, at="score_and_total =", watch="gram", set=change) as bp:
        stage_statistics(features, query, *window_weights(2, 8, 1, 1, "cpu"))
    squares = [1, 1, 0.5625, 0.0625, 0.0625, 0.5625, 1, 1]
    bp.expect_changed({"result[2][0, 0, :8].tolist()": (squares, [1.0] * 8)}, tolerance=1e-5)

def test_the_query_is_folded_into_the_channels():
    layers, low, maps = example(3, sides=(12, 5), width=6)
    places = [window_weights(side, 12, 3, 1, "cpu") for side in (12, 5)]
    query, keys = layers.vlm_uni_query_projector(low), layers.vlm_uni_aux_projector
    with Breakpoint(window_scores, at="mean = total", watch="query weight folded score") as bp:
        window_scores(query, keys, maps, places)
    bp.expect({"query.shape": (2, 9, 6), "weight.shape": (6, 20), "folded.shape": (2, 9, 20)})
    bp.expect({"score.shape": (2, 9, 16)})

def test_one_linear_layer_per_query():
    layers, low, maps = example(3, sides=(12, 5), width=6)
    places = [window_weights(side, 12, 3, 1, "cpu") for side in (12, 5)]
    even, scale = torch.full((2, 9, 16), 1 / 16), torch.ones(2, 9, 16)
    with Breakpoint(window_values, at="return F.linear", watch="share seen weight") as bp:
        window_values(even, 0 * even, scale, layers.vlm_uni_val_projector, maps, places)
    bp.expect({"share.shape": (2, 9, 16), "seen.shape": (2, 9, 20), "weight.shape": (6, 20)})
    bp.expect_return({"result.shape": (2, 9, 6)})

def test_attention_sums_to_one_over_each_window():
    mining, low, maps = example(layers=PatchInfoMining)
    with Breakpoint(PatchInfoMining.look, at="return attention", watch="query score attention") as bp:
        mining(low, maps)
    sums = "attention.sum(-1).round(decimals=4).unique().tolist()"
    bp.expect({"query.shape": (2, 16, 16), "attention.shape": (2, 16, 16), sums: [1.0]})

def test_softmax_over_queries_is_wrong():
    mining, low, maps = example(layers=PatchInfoMining)
    with Breakpoint(PatchInfoMining.look, at="return attention", watch="score") as bp:
        mining(low, maps)
    over_queries = {"attention": (bp["score"] / 16**0.5).softmax(1)}
    with Breakpoint(PatchInfoMining.look, "return attention", "attention", set=over_queries) as wrong:
        mining(low, maps)
    sums = "result[0][0].sum(-1)"  # over the window, for each query of the first image
    expected = {f"{sums}.min().item()": (1.0, 0.14), f"{sums}.max().item()": (1.0, 2.66)}
    wrong.expect_changed(expected, tolerance=0.01)

def test_mining_adds_to_the_query():
    mining, low, maps = example(layers=PatchInfoMining, n=1)
    change = {"found": lambda found: found.new_zeros(found.shape)}
    with Breakpoint(PatchInfoMining.forward, at="return (low", watch="low found", set=change) as bp:
        out = mining(low, maps)
    assert torch.equal(out, low)
    bp.expect({"low.shape": (1, 16, 16), "found.shape": (1, 16, 16)})
    bp.expect_changed({"result.norm().item()": (23.9, low.norm().item())}, tolerance=0.1)

def test_mining_equals_windows_and_loops():
    mining, low, maps = example(layers=PatchInfoMining)
    with torch.no_grad():
        out = mining(low, maps)
        windows = mining_in_windows(mining, low, maps)
        loops = mining_in_loops(mining, low, maps)
        errors = [(out - want).norm() / (want - low).norm() for want in (windows, loops)]
        print(
            f"relative to what was found: {errors[0]:.0e} against windows, "
        f"{errors[1]:.0e} against loops"
        )
        assert max(errors) < 1e-5
        test_close(mining.attention(low, maps).sum(-1), torch.ones(2, 16), eps=1e-5)
    assert (out - low).norm() > 0.5 * low.norm()  # it found something
    with expect_fail(ConfigError, contains="17 queries make no square; is a class token among them?"):
        mining(torch.randn(2, 17, 16), maps)
    message = "16 high-resolution features a side cannot be shared by 3 queries a side"
    with expect_fail(ConfigError, contains=message): mining(low[:, :9], maps)

def test_mining_takes_about_a_tenth():
    print(f"{'one image, float32':36}{'peak MB':>24}{'billion multiplications':>28}")
    kinds = {
        "forward": dict(backward=False),
        "and all gradients": {},
        "frozen tower": dict(frozen=True),
    }
    for title, side in (("MGM-2B, 768 pixels", 192), ("MGM-2B-HD, 1536 pixels", 384)):
        for what, changes in kinds.items():
            slow_peak, slow_work = cost(mining_in_windows, side, **changes)
            fast_peak, fast_work = cost(fast, side, **changes)
            peaks = f"{slow_peak / 1e6:7,.0f} -> {fast_peak / 1e6:4,.0f} ({fast_peak / slow_peak:.2f})"
            works = f"{slow_work / 1e9:12,.0f} -> {fast_work / 1e9:4,.1f} ({fast_work / slow_work:.3f})"
            print(f"{title:24}{what:20}{peaks}{works}")
            assert fast_peak < slow_peak / 9 and fast_work < slow_work / 30 and slow_peak > 1e9

def test_attention_of_576_queries():
    mining, losses = teach()
    print(f"loss {sum(losses[:10]) / 10:.2f} in the first ten steps", end=", ")
    print(f"{sum(losses[-10:]) / 10:.3f} in the last ten")
    photo = to_bytes(resize_to_square(sample_image(), 768))
    maps = brightness_maps(F.avg_pool2d(photo.float().mean(0)[None], 4) / 127.5 - 1)
    light, dark = (wishes(torch.full((1, 576), sign)) for sign in (1.0, -1.0))
    with Breakpoint(PatchInfoMining.look, at="return attention", watch="low attention") as bp:
        weights = [mining.attention(query, maps)[0] for query in (light, dark)]
    bp.expect({"low.shape": (1, 576, 8), "[m.shape[-1] for m in maps]": [192, 96]}, hits=2)
    bp.expect(
        {"attention.shape": (1, 576, 64), "attention.sum(-1).allclose(attention.new_ones(1))": True}
    )

def test_queries_see_their_window_and_one_coarse_cell_beyond():
    mining, low, maps = example(channels=(8, 12, 6), sides=(16, 8, 4), layers=PatchInfoMining, n=1)

    def moved(stage, cells):
        "Which queries' outputs change with the first `cells` x `cells` of a stage."
        changed = [m.clone() for m in maps]
        changed[stage][:, :, :cells, :cells] += 3 * torch.randn(1, maps[stage].shape[1], cells, cells)
        difference = (mining(low, changed) - mining(low, maps)).abs().amax(-1)[0]
        return (difference > 0).nonzero().flatten().tolist()

    for stage, cells in enumerate((4, 2, 1)):
        print(f"stage {stage}, {cells} x {cells} cells under query 0: queries", moved(stage, cells))
    test_eq(moved(0, 4), [0])
    # the cell at the border is mixed into the first position of each neighbor
    test_eq(moved(1, 2), [0, 1, 4, 5])
    test_eq(moved(1, 1), [0])  # a cell that does not touch the border is not
    # one cell is the whole window here; it reaches the neighbors, and no further
    test_eq(moved(2, 1), [0, 1, 4, 5])

def test_crop_and_padding_do_not_match():
    columns = np.tile(np.arange(240, dtype=np.uint8), (120, 1))
    image = Image.fromarray(columns).convert("RGB")

    def columns_of(side, aspect):
        pixels = to_bytes(resize_to_square(image, side, aspect))[None, 2:].float()
        return to_windows(pixels, 24)[0].mean((1, 2)).round().int().tolist()  # one per query

    small = columns_of(24, "square")
    for aspect in ("square", "pad"):
        large = columns_of(192, aspect)
        print(f"small square, large {aspect:6} ", small[288], large[288], large[0])
    assert abs(small[288] - columns_of(192, "square")[288]) <= 1 and small[288] - large[288] == 58

def test_crops_are_laid_out_as_the_image():
    numbered = torch.arange(16.0).reshape(1, 1, 4, 4).expand(-1, 3, -1, -1)
    crops = grid_crops(numbered, image_size=2, image_grid=2)[:, :, :1].flatten(2)[..., None]
    with Breakpoint(to_one_grid, at="return crops", watch="crops[0, :, :, 0].int()") as bp:
        to_one_grid(crops, 2, 2)  # a pixel is a patch here
    bp.expect({"crops[0, 1, :, 0].int().tolist()": [2, 3, 6, 7]})
    bp.expect_return({"result.flatten().int().tolist()": list(range(16))})

def test_cutting_before_enlarging_leaves_seams():
    torch.manual_seed(0)
    coarse = torch.randn(1, 3, 6, 6)
    enlarge = lambda m: F.interpolate(m, scale_factor=4, mode="bilinear")
    seam = (enlarge(coarse)[..., :12] - enlarge(coarse[..., :3])).abs().amax((0, 1, 2))
    print("columns of the left half that differ:", (seam > 0.1).nonzero().flatten().tolist())
    assert (seam[:-2] == 0).all() and (seam[-2:] > 0.1).all()

def test_inference_mixed_precision_and_adapters():
    axis_weights.cache_clear()
    with torch.inference_mode(): axis_weights(3, 9, 3)
    assert not axis_weights(3, 9, 3)[1].is_inference()
    (axis_weights(3, 9, 3)[1] * torch.ones(3, requires_grad=True)).sum().backward()
    mining, low, maps = example(layers=PatchInfoMining)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = mining(low, maps)
        seen = mining.attention(low, maps)
    # autocast does not reach inside
    assert torch.equal(out, mining(low, maps)) and torch.equal(seen, mining.attention(low, maps))
    adapted = copy.deepcopy(mining)
    adapted.vlm_uni_val_projector[0] = nn.Identity()  # as an adapter of layer norms would stand there
    with expect_fail(ConfigError, contains="put 'mining' into modules_to_save"):
        adapted(low, maps)
    flat = [torch.ones_like(m) for m in maps]  # no deviation at all: LayerNorm's epsilon, and no NaN
    test_close(mining(low, flat), mining_in_windows(mining, low, flat), eps=1e-3)

def test_loops_follow_the_formula():
    shapes = {name: tuple(p.shape) for name, p in MiningLayers(16, 20).named_parameters()}
    kinds = ("0.weight", "0.bias", "1.weight", "1.bias")
    parts = ("query", "aux", "val")
    test_eq(set(shapes), {f"vlm_uni_{part}_projector.{kind}" for part in parts for kind in kinds})
    layers, low, maps = example()
    values = layers.vlm_uni_val_projector(upsampled(maps)[:, :, :4, :4].flatten(2).transpose(1, 2))
    for p in layers.vlm_uni_aux_projector[1].parameters(): p.data.zero_()
    test_close(mining_in_loops(layers, low, maps)[:, 0], low[:, 0] + values.mean(1), eps=1e-5)
    for p in layers.vlm_uni_val_projector[1].parameters(): p.data.zero_()
    assert torch.equal(mining_in_loops(layers, low, maps), low)

def test_plain_reshape_takes_strips():
    numbered = torch.arange(16.0).reshape(1, 1, 4, 4)
    strip = numbered.reshape(4, 4).int().tolist()[0]
    window = to_windows(numbered, 2)[0, 0, :, 0].int().tolist()
    assert strip != window

def test_windows_lie_under_their_queries_and_equal_loops():
    numbered = torch.arange(16.0).reshape(1, 1, 4, 4)
    windows = to_windows(numbered, 2)[0, :, :, 0].int().tolist()
    test_eq(windows, [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    for grid, sides in ((4, (16, 8)), (3, (15, 7)), (1, (5, 2))):
        layers, low, maps = example(grid, sides=sides)
        test_close(mining_in_windows(layers, low, maps), mining_in_loops(layers, low, maps), eps=1e-5)

def test_joined_map_takes_212_mb():
    channels, side = (192, 384, 768, 1536), 192
    own = sum(c * (side // 2**n) ** 2 for n, c in enumerate(channels))
    joined = sum(channels) * side**2
    test_eq(round(2 * joined / 1e6), 212)
    test_eq(round(2 * own / 1e6), 27)

def test_enlarging_two_cells_to_four():
    cells, weights = axis_weights(side=2, base=4, grid=1)
    test_eq(cells.tolist(), [[0, 1]])
    test_eq(weights[0].tolist(), [[1, 0], [0.75, 0.25], [0.25, 0.75], [1 - 1, 1]])
    enlarged = F.interpolate(torch.tensor([[[10.0, 20]]]), size=4, mode="linear").flatten()
    test_eq((weights[0] @ torch.tensor([10.0, 20])).tolist(), enlarged.tolist())

def test_each_query_has_its_cells_and_a_border():
    cells, weights = axis_weights(side=6, base=12, grid=3)
    test_eq(cells.tolist(), [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]])
    want = [[0.25, 0.75, 0, 0], [0, 0.75, 0.25, 0], [0, 0.25, 0.75, 0], [0, 0, 0.75, 0.25]]
    test_eq(weights[1].tolist(), want)
    # MGM-2B's last stage: one cell under a query, and its two neighbors
    test_eq(axis_weights(side=24, base=192, grid=24)[0].shape[1], 3)
    x = torch.randn(7)
    # odd sizes; windows smaller than a cell; pooled
    sizes = [(7, 7, 7, 1), (7, 15, 5, 1), (3, 24, 12, 1), (7, 28, 7, 2), (1, 6, 2, 1)]
    for side, base, grid, pool in sizes:
        cells, weights = axis_weights(side, base, grid, pool)
        whole = F.interpolate(x[None, None, :side], size=base, mode="linear")[0, 0]
        want = whole.reshape(-1, pool).mean(1).reshape(grid, -1)
        test_close((weights @ x[cells][..., None])[..., 0], want, eps=1e-6)

def test_align_corners_moves_features():
    truth = torch.arange(192) + 0.5  # where each position of the finest map lies
    # where each cell of the last map lies, in the same measure
    ramp = (8 * (torch.arange(24) + 0.5))[None, None]
    error = {}
    for aligned in (False, True):
        enlarged = F.interpolate(ramp, size=192, mode="linear", align_corners=aligned)[0, 0]
        error[aligned] = (enlarged - truth)[8:-8].abs().max().item()
    test_close(error[False], 0, eps=1e-4)
    assert 3 < error[True] < 4

def test_window_weights_make_the_windows():
    torch.manual_seed(0)
    for side, base, grid, pool in ((6, 12, 3, 1), (5, 15, 3, 1), (2, 16, 8, 1), (6, 12, 3, 2)):
        features = torch.randn(2, 4, side, side)
        cells, weights = window_weights(side, base, grid, pool, "cpu")
        whole = F.interpolate(features, size=(base, base), mode="bilinear")
        want = to_windows(F.avg_pool2d(whole, pool), grid)
        test_close(weights @ cells_under(features, cells), want, eps=1e-5)

def test_enlarging_commutes_with_channels():
    torch.manual_seed(0)
    features, layer = torch.randn(1, 12, 6, 6), torch.randn(5, 12)
    enlarge = lambda m: F.interpolate(m, scale_factor=4, mode="bilinear")
    mix = lambda m: torch.einsum("dc,nchw->ndhw", layer, m)
    one, other = mix(enlarge(features)), enlarge(mix(features))
    test_close(one, other, eps=1e-5)

def test_query_can_be_folded_into_features():
    torch.manual_seed(0)
    q = torch.randn(16)
    W = torch.randn(16, 20)
    b = torch.randn(16)
    window = torch.randn(9, 20)
    keys_first, query_first = q @ (window @ W.T + b).T, (q @ W) @ window.T
    test_close(keys_first - query_first, (q @ b).expand(9), eps=1e-4)
    test_close((keys_first / 4).softmax(-1), (query_first / 4).softmax(-1), eps=1e-5)
    # positions for each query at MGM-2B's size, and so many times fewer products with W
    test_eq(192**2 // 24**2, 64)

def test_statistics_are_those_of_the_enlarged_map():
    torch.manual_seed(0)
    features, query = torch.randn(2, 12, 6, 6), torch.randn(2, 9, 12)
    windows = to_windows(F.interpolate(features, size=(12, 12), mode="bilinear"), 3)
    score, total, energy = stage_statistics(features, query, *window_weights(6, 12, 3, 1, "cpu"))
    test_close(score, torch.einsum("npwc,npc->npw", windows, query), eps=1e-4)
    test_close(total, windows.sum(-1), eps=1e-4)
    test_close(energy, windows.square().sum(-1), eps=1e-4)

def test_squares_must_not_be_enlarged():
    pair = torch.tensor([[[-1.0, 1.0]]])
    enlarge = lambda x: F.interpolate(x, size=8, mode="linear").flatten().tolist()
    squares = [round(x * x, 2) for x in enlarge(pair)]
    assert enlarge(pair**2) == [1] * 8 and min(x * x for x in enlarge(pair)) < 0.1

def test_scores_are_query_times_key():
    layers, low, maps = example(3, sides=(12, 5))
    windows = to_windows(upsampled(maps), 3)
    with torch.no_grad():
        query = layers.vlm_uni_query_projector(low)
        places = [window_weights(side, 12, 3, 1, "cpu") for side in (12, 5)]
        score, mean, rstd = window_scores(query, layers.vlm_uni_aux_projector, maps, places)
        keys = layers.vlm_uni_aux_projector(windows)
        test_close(score, torch.einsum("npd,npwd->npw", query, keys), eps=1e-4)
        test_close(mean, windows.mean(-1), eps=1e-5)
        test_close(rstd, (windows.var(-1, correction=0) + 1e-5).rsqrt(), eps=1e-4)

def test_attention_is_handed_down_to_cells():
    cells, weights = axis_weights(side=2, base=4, grid=1)
    test_eq((torch.tensor([0.0, 1, 0, 0]) @ weights[0]).tolist(), [0.75, 0.25])
    torch.manual_seed(0)
    features, share = torch.randn(2, 12, 6, 6), torch.rand(2, 9, 16)
    windows = to_windows(F.interpolate(features, size=(12, 12), mode="bilinear"), 3)
    average = stage_average(features, share, *window_weights(6, 12, 3, 1, "cpu"))
    test_close(average, torch.einsum("npw,npwc->npc", share, windows), eps=1e-4)

def test_outputs_and_gradients_equal_the_straightforward_ones():
    for name, case in CASES.items():
        case, pool = dict(case), case.get("pool", 1)
        case.pop("pool", None)
        mining, low, maps = example(layers=PatchInfoMining, **case)
        (want, want_grads), (got, got_grads) = (
            results(run, mining, low, maps, pool) for run in (mining_in_windows, fast)
        )
        largest = max(want_grads.values(), key=lambda g: g.norm())
        errors = []
        for k, g in want_grads.items():
            size = largest if g.norm() < 1e-4 * largest.norm() else None
            errors.append(relative(got_grads[k], g, size))
        worst = max(errors)
        assert relative(got, want, want - low) < 1e-5
        assert worst < 1e-5
        assert len(got_grads) == 13 + len(maps)

def test_bf16_inputs_lose_nothing():
    sizes = dict(grid=6, channels=(24, 48, 96), sides=(48, 24, 12), width=64)
    mining, low, maps = example(layers=PatchInfoMining, **sizes)
    mining, low = mining.bfloat16(), low.bfloat16()
    maps = [m.bfloat16() for m in maps]
    with torch.no_grad():
        want = mining_in_windows(copy.deepcopy(mining).float(), low.float(), [m.float() for m in maps])
        found = want - low.float()
        before = mining(low.float(), maps)
        after = mining(low, maps)
        plain = mining_in_windows(mining, low, maps)
        test_eq(after.dtype, torch.bfloat16)
        assert relative(before, want, found) < 1e-5
        assert relative(after, want.bfloat16(), found) < 1e-3
        assert relative(plain, want.bfloat16(), found) > 5e-3

def test_layers_in_the_place_of_linear_ones_are_called():
    from peft import LoraConfig, get_peft_model

    mining, low, maps = example(layers=PatchInfoMining)
    plain = mining(low, maps).detach()
    for settings in ({}, {"use_dora": True}):
        names = [name for name, m in mining.named_modules() if isinstance(m, nn.Linear)]
        lora = LoraConfig(r=2, target_modules=names, init_lora_weights=False, **settings)
        adapted = get_peft_model(copy.deepcopy(mining), lora)
        out = adapted(low, maps)
        out.square().sum().backward()
        grads = [p.grad.abs().sum() for n, p in adapted.named_parameters() if "lora_" in n]
        assert len(grads) >= 6 and min(grads) > 0
        merged = adapted.merge_and_unload()
        assert type(merged.vlm_uni_val_projector[1]) is nn.Linear
        assert relative(out, merged(low, maps), out - low) < 1e-5 < relative(out, plain, out - low)

def test_int8_layers_are_called():
    class Int8Linear(nn.Module):
        "A layer that keeps a weight as bytes and a scale."

        def __init__(self, linear):
            super().__init__()
            self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
            self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))
            self.bias = linear.bias

        def forward(self, x):
            return F.linear(x, self.weight.float() * self.scale, self.bias)

    mining, low, maps = example(layers=PatchInfoMining)
    plain, small, rounded = mining(low, maps), copy.deepcopy(mining), copy.deepcopy(mining)
    for name, module in mining.named_children():
        getattr(small, name)[1] = own = Int8Linear(module[1])
        getattr(rounded, name)[1].weight.data = own.weight.float() * own.scale
    assert relative(small(low, maps), rounded(low, maps)) < 1e-6
    assert 1e-4 < relative(small(low, maps), plain) < 0.1

def test_offloaded_layers_are_called():
    from accelerate import cpu_offload

    torch.manual_seed(0)
    mining = PatchInfoMining(16, 20)
    for p in mining.parameters(): torch.nn.init.normal_(p)
    low, maps = torch.randn(2, 16, 16), [torch.randn(2, 8, 32, 32), torch.randn(2, 12, 16, 16)]
    with torch.no_grad():
        want = mining(low, maps)
        cpu_offload(mining, execution_device=torch.device("cpu"))
        assert mining.vlm_uni_val_projector[1].weight.is_meta
        test_close(mining(low, maps), want, eps=1e-4)

def test_counting_without_computing_counts_the_same():
    axis_weights.cache_clear()  # tables are made once and kept; count them in neither or both
    for run in (mining_in_windows, fast):
        cost(run, 32)
        widths = dict(channels=(24, 48, 96, 192), width=128)
        on_cpu, on_meta = (cost(run, 32, device, widths)[0] for device in ("cpu", "meta"))
        assert abs(on_cpu / on_meta - 1) < 0.1, (on_cpu, on_meta)

def test_mining_compiles_without_a_graph_break():
    torch._dynamo.reset()
    mining, low, maps = example(layers=PatchInfoMining, n=4)
    compiled = torch.compile(mining, fullgraph=True, backend="eager")
    for n in (4, 2):
        some = low[:n], [m[:n] for m in maps]
        test_close(compiled(*some), mining(*some), eps=1e-6)
    _, other_low, other_maps = example(2, sides=(12, 6))  # another size is another graph, not an error
    test_close(compiled(other_low, other_maps), mining(other_low, other_maps), eps=1e-6)
    compiled(low, maps).sum().backward()
    got = [p.grad.clone() for p in mining.parameters()]
    mining.zero_grad()
    mining(low, maps).sum().backward()
    for ours, eager in zip(got, mining.parameters()):
        test_close(ours, eager.grad, eps=1e-4)

def test_queries_learn_where_to_look():
    mining, losses = teach()
    assert sum(losses[-10:]) < sum(losses[:10]) / 10
    gray = to_bytes(resize_to_square(sample_image(), 192)).float().mean(0)
    photo = F.avg_pool2d(gray[None], 4) / 127.5 - 1
    windows = to_windows(photo[:, None], 6)[..., 0]
    spread = windows.amax(-1) - windows.amin(-1)
    looks = {}
    for wish in (1, -1):
        looks[wish] = mining.attention(wishes(torch.full((1, 36), float(wish))), brightness_maps(photo))
        reached = (looks[wish] * windows).sum(-1)  # mean brightness under the attention
        wanted = windows.amax(-1) if wish == 1 else windows.amin(-1)
        off = (reached - wanted).abs()[spread > 0.5].mean()
        blind = (windows.mean(-1) - wanted).abs()[spread > 0.5].mean()
        name = "light" if wish == 1 else "dark"
        assert off < blind / 2
    light, dark = ((looks[wish] * windows).sum(-1)[spread > 0.5].min() for wish in (1, -1))
    assert light > dark

def test_crops_come_back_from_the_grid():
    numbered = torch.arange(16.0).reshape(1, 1, 4, 4).expand(-1, 3, -1, -1)
    # a pixel is a patch here
    crops = grid_crops(numbered, image_size=2, image_grid=2)[:, :, :1].flatten(2)[..., None]
    patches = crops[0, ..., 0].int().tolist()
    test_eq(patches, [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    test_eq(to_one_grid(crops, 2, 2).flatten().int().tolist(), list(range(16)))
    crops = torch.randn(2, 9, 4, 5)
    test_eq(from_one_grid(to_one_grid(crops, 3, 2), 3, 2), crops)

def test_crops_and_whole_equal_the_straightforward_way():
    mining, crops, maps = example(3, channels=(6, 10), sides=(24, 12), layers=PatchInfoMining, n=8)
    crops, whole = crops.reshape(2, 4, 9, 16), torch.randn(2, 9, 16)
    maps = [m[:2] for m in maps]
    with torch.no_grad():
        joined = upsampled(maps)
        quarters = [joined[:, :, row : row + 12, col : col + 12] for row in (0, 12) for col in (0, 12)]
        want = torch.stack([mining_in_windows(mining, crops[:, n], [quarters[n]]) for n in range(4)], 1)
        got = from_one_grid(mining(to_one_grid(crops, 2, 3), maps), 2, 3)
        assert relative(got, want, want - crops) < 1e-5
        halved = F.interpolate(joined, scale_factor=0.5, mode="bilinear")
        want = mining_in_windows(mining, whole, [halved])
        assert relative(mining(whole, maps, pool=2), want, want - whole) < 1e-5
        # other queries would find other things
        assert relative(mining(crops.flatten(0, 1)[:2], maps, pool=2), want) > 0.1
