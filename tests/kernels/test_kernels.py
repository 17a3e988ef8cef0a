"""The Triton kernels against float64, on whatever runs them: a GPU, or the CPU through Triton's interpreter.

The interpreter is chosen before Triton is imported, so `test_kernels_interpreted.py` runs this file in a process of its
own with TRITON_INTERPRET=1. It is wrong for bfloat16 without saying so; only a GPU tests that.
"""

import os

import numpy as np
import pytest
import torch
from torch.nn.functional import linear, one_hot

from pycompress.formats.codes import GROUP, RANGE, pack, scales_shape

pytest.importorskip("triton", reason="the kernels need Triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="needs an NVIDIA GPU; test_kernels_interpreted.py runs it on the CPU",
    ),
]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory nobody wrote reads as NaN, or as a number no test expects."""
    empty = torch.empty

    def poisoned(*size, **options):
        fresh = empty(*size, **options)
        return fresh.fill_(torch.nan if fresh.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", poisoned)


def draw(*size, seed=0, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def relative_error(got, exact):
    return float((got.double().cpu() - exact.cpu()).norm() / exact.norm().clamp(min=1e-30))


# Shared linear ---------------------------------------------------------------------------------------------------

# N, K, k, r: round, odd, no clusters, no rank, nothing at all.
LAYERS = [(128, 256, 16, 16), (63, 201, 9, 5), (100, 63, 0, 16), (63, 1000, 40, 0), (32, 48, 0, 0)]
# Pivoted: round, odd, no clusters, nothing but pivots, a whole matrix and a permutation.
PIVOTED = [(128, 256, 16, 16), (63, 201, 9, 5), (101, 63, 0, 19), (21, 21, 4, 21), (33, 33, 0, 33)]


def packed(shape, share, dtype, bias, pivoted=False, index=torch.int16):
    """Weight, factor, labels, channels and bias of a random layer."""
    outputs, inputs, k, r = shape
    count = outputs if share == "output" else inputs
    stored = count - r if pivoted else count
    stacked, other = ((k + r, inputs), (stored, r)) if share == "output" else ((outputs, k + r), (r, stored))
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, k, (count,), generator=generator).to(DEVICE, index) if k else None
    channels = torch.randperm(count, generator=generator).to(DEVICE, index) if pivoted else None
    weight, factor = draw(*stacked, seed=2, dtype=dtype), draw(*other, seed=3, dtype=dtype)
    return weight, factor, labels, channels, draw(outputs, seed=4, dtype=dtype) if bias else None, None, None


def stored(layer, storage):
    """The layer with random codes for numbers, and the same layer in float64."""
    coded, exact = list(layer), wide(layer)
    generator, (low, high) = torch.Generator().manual_seed(5), RANGE[storage]
    for at, scales_at in ((0, 5), (1, 6)):
        rows, n = layer[at].shape
        codes = torch.randint(low, high + 1, (rows, n), generator=generator, dtype=torch.int8)
        scales = (0.5 + torch.rand(scales_shape(rows, n, storage), generator=generator)) / high
        coded[at], coded[scales_at] = pack(codes, storage).to(DEVICE), scales.to(layer[at])
        each = coded[scales_at].double().repeat_interleave(n if storage == "int8" else GROUP, dim=1)[:, :n]
        exact[at] = codes.to(DEVICE).double() * each
    return coded, exact


def in_torch(x, weight, factor, labels, channels, bias, weight_scales, factor_scales, share):
    """The layer in plain torch, in the dtype of its inputs, with the pivots' identity written out."""
    along = 0 if share == "output" else 1
    rank = factor.shape[1 - along]
    if channels is not None:
        identity = torch.eye(rank, dtype=factor.dtype, device=factor.device)
        factor = torch.cat([identity, factor], dim=along).index_select(along, channels.long().argsort())
    if share == "output":
        stacked = linear(x, weight)
        y = linear(stacked[..., stacked.shape[-1] - rank :], factor, bias)
        return y if labels is None else y + stacked[..., labels.long()]
    low = linear(x, factor)
    if labels is None:
        return linear(low, weight, bias)
    hot = one_hot(labels.long(), weight.shape[1] - rank).to(x.dtype)
    return linear(torch.cat([x @ hot, low], dim=-1), weight, bias)


def wide(tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("tokens", [1, 33, 65])
def test_shared_linear_errs_at_most_twice_as_much_as_torch(tokens, share, pivoted, dtype):
    from pycompress.kernels.shared_linear import shared_linear_cuda

    for number, shape in enumerate(PIVOTED if pivoted else LAYERS):
        x = draw(shape[1], tokens, dtype=dtype).T if number % 2 else draw(tokens, shape[1], dtype=dtype)
        layer = packed(shape, share, dtype, number != 1, pivoted, torch.int32 if number == 1 else torch.int16)
        y = shared_linear_cuda(x, *layer, share == "input")
        assert y.shape == (tokens, shape[0])
        assert y.dtype == dtype
        exact = in_torch(*wide([x, *layer]), share)
        # Products in three TF32 parts keep 21 of float32's 24 bits.
        floor = 1e-6 if dtype == torch.float32 else 0.1 * torch.finfo(dtype).eps
        assert relative_error(y, exact) <= 2 * relative_error(in_torch(x, *layer, share), exact) + floor, shape


# int4 packs along a side of a multiple of 32 numbers: round, no clusters, a last half group, an odd other side.
CODED = [(64, 192, 32, 64), (63, 160, 0, 96)]
CODED_PIVOTED = {
    "output": [(96, 128, 32, 64), (77, 160, 9, 32), (64, 160, 0, 64)],
    "input": [(63, 192, 64, 32), (40, 257, 63, 33), (77, 96, 0, 96)],
}


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize(("tokens", "dtype"), [(17, torch.float32), *((t, d) for t in (1, 17) for d in HALF)])
def test_shared_linear_of_codes_errs_at_most_twice_as_much_as_torch(tokens, share, pivoted, storage, dtype):
    from pycompress.kernels.shared_linear import shared_linear_cuda

    for shape in CODED_PIVOTED[share] if pivoted else CODED:
        x = draw(tokens, shape[1], dtype=dtype)
        coded, numbers = stored(packed(shape, share, dtype, True, pivoted), storage)
        y = shared_linear_cuda(x, *coded, share == "input")
        assert y.dtype == dtype
        exact = in_torch(x.double(), *numbers, share)
        by_torch = in_torch(x, *(t.to(dtype) if t is not None and t.is_floating_point() else t for t in numbers), share)
        floor = 1e-6 if dtype == torch.float32 else 0.1 * torch.finfo(dtype).eps
        assert relative_error(y, exact) <= 2 * relative_error(by_torch, exact) + floor, shape


@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("share", ["output", "input"])
def test_shared_linear_of_codes_in_float64_is_exact(share, storage):
    from pycompress.kernels.shared_linear import shared_linear_cuda

    coded, numbers = stored(packed(CODED[0], share, torch.float64, True), storage)
    x = draw(3, CODED[0][1], dtype=torch.float64)
    assert relative_error(shared_linear_cuda(x, *coded, share == "input"), in_torch(x, *numbers, share)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=str)
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_codes_are_dequantized_for_many_tokens_as_their_scales_say(storage, dtype):
    from pycompress.kernels.codes import dequantized

    coded, numbers = stored(packed((77, 160, 9, 32), "output", dtype, False), storage)
    for at, scales_at in ((0, 5), (1, 6)):
        matrix = dequantized(coded[at], coded[scales_at])
        assert matrix.dtype == dtype
        assert relative_error(matrix, numbers[at]) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("share", ["output", "input"])
def test_shared_linear_takes_any_leading_shape(share):
    from pycompress.kernels.shared_linear import shared_linear_cuda

    layer = packed(LAYERS[1], share, torch.float32, bias=True, pivoted=True)
    x = draw(2, 3, 201)
    rows = shared_linear_cuda(x.reshape(6, 201), *layer, share == "input")
    assert torch.equal(shared_linear_cuda(x, *layer, share == "input"), rows.view(2, 3, 63))
    assert shared_linear_cuda(x[:0], *layer, share == "input").shape == (0, 3, 63)


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("share", ["output", "input"])
def test_shared_linear_of_float64_is_exact(share, pivoted):
    from pycompress.kernels.shared_linear import shared_linear_cuda

    layer = packed(LAYERS[1], share, torch.float64, True, pivoted)
    x = draw(3, 201, dtype=torch.float64)
    assert relative_error(shared_linear_cuda(x, *layer, share == "input"), in_torch(x, *layer, share)) < 1e-14


# Gram ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("size", [(2, 63, 33), (300, 64), (1, 1, 5)], ids=str)
def test_gram_is_exactly_symmetric_and_as_precise_as_its_accumulator(size, dtype):
    from pycompress.kernels.gram import gram_cuda

    x = draw(*size, dtype=dtype)
    metric = draw(size[-1], size[-1], seed=1)
    metric = metric @ metric.T / size[-1]
    for h in (None, metric):
        gram = gram_cuda(x, h)
        exact = x.double() @ (x.double() if h is None else x.double() @ h.double()).mT
        assert torch.equal(gram, gram.mT)
        assert gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative_error(gram, exact) <= (1e-13 if dtype == torch.float64 else 2e-6)


# K-means ---------------------------------------------------------------------------------------------------------


def seeds_in_numpy(gram, uniforms, weights):
    """Greedy k-means++ of one matrix in float64."""
    n = len(gram)
    norms, closest, seeds = np.diag(gram), np.full(n, np.inf), []
    for step in uniforms:
        mass = weights if not seeds else weights * closest
        cumulative = np.cumsum(mass)
        tried = [int(np.searchsorted(cumulative, u * cumulative[-1], side="right")) for u in step]
        if cumulative[-1] == 0:
            tried = [next(i for i in range(n) if i not in seeds)]
        nearest = [np.minimum(closest, np.maximum(norms + norms[i] - 2 * gram[i], 0)) for i in tried]
        best = int(np.argmin([(weights * d).sum() for d in nearest]))
        closest = nearest[best]
        seeds.append(tried[best])
    return seeds


def blobs(batch, n, d, groups, seed=0):
    """Overlapping clouds: K-means has work to do, and no point is near enough to a border for rounding to decide."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(batch, groups, d, generator=generator)
    member = torch.randint(0, groups, (batch, n), generator=generator)
    points = centres.gather(1, member[..., None].expand(-1, -1, d)) + torch.randn(batch, n, d, generator=generator)
    return points.to(DEVICE)


@pytest.mark.parametrize("trials", [None, 1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_seeds_are_those_of_float64_greedy_kmeans_plus_plus(trials, weighted, monkeypatch):
    from pycompress.kernels import seeding

    monkeypatch.setattr(seeding, "TILE", 64)  # several tiles even at this size
    x = blobs(2, 75, 12, 7)
    gram = x @ x.mT
    generator = torch.Generator().manual_seed(3)
    uniforms = torch.rand((2, 9) if trials is None else (2, 9, trials), generator=generator)
    weights = torch.rand(2, 75, generator=generator) if weighted else torch.ones(2, 75)
    weights[:, ::5] *= 0 if weighted else 1
    got = seeding.kmeans_plus_plus_cuda(gram, uniforms.to(DEVICE), weights.to(DEVICE) if weighted else None)
    draws = uniforms.double().reshape(2, 9, -1).numpy()
    exact = gram.double().cpu().numpy()
    assert got.tolist() == [seeds_in_numpy(exact[b], draws[b], weights[b].double().numpy()) for b in range(2)]


def test_seeds_of_duplicates_are_the_first_points_not_taken():
    from pycompress.kernels.seeding import kmeans_plus_plus_cuda

    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], device=DEVICE).repeat(4, 1)[None]
    seeds = kmeans_plus_plus_cuda(x @ x.mT, torch.full((1, 5), 0.6, device=DEVICE))[0].tolist()
    assert len(set(seeds)) == 5
    assert {seed % 2 for seed in seeds[:2]} == {0, 1}
    assert seeds[2:] == [i for i in range(8) if i not in seeds[:2]][:3]


def lloyd_in_numpy(x, seeds, iterations, weights):
    """Lloyd on points in float64, an empty cluster given the farthest point that its own cluster can spare."""

    def nearest(centroids):
        distance = ((x[:, None] - centroids[None]) ** 2).sum(-1)
        labels, least = distance.argmin(1), distance.min(1)
        counts = np.bincount(labels[weights > 0], minlength=len(seeds))
        for cluster in np.flatnonzero(counts == 0):
            spare = np.where((counts[labels] > 1) & (weights > 0), least, -1)
            far = spare.argmax()
            if spare[far] > 0:
                counts[labels[far]] -= 1
                labels[far], least[far], counts[cluster] = cluster, -1, 1
        return labels

    def means(labels):
        rows = [np.flatnonzero((labels == c) & (weights > 0)) for c in range(len(seeds))]
        return np.stack([np.average(x[r], axis=0, weights=weights[r]) if len(r) else 1e9 + 0 * x[0] for r in rows])

    labels = nearest(x[seeds])
    for _ in range(iterations):
        labels = nearest(means(labels))
    return labels, (weights * ((x - means(labels)[labels]) ** 2).sum(1)).sum()


def check_lloyd(x, seeds, iterations, weights=None):
    from pycompress.kernels.lloyd import lloyd_cuda, lloyd_points_cuda

    exact = x.double() @ x.double().mT
    mass = torch.ones(x.shape[:2]) if weights is None else weights
    given = None if weights is None else weights.to(DEVICE)
    for run, data in ((lloyd_cuda, exact.float()), (lloyd_points_cuda, x)):
        labels, inertia = run(data, seeds.to(DEVICE), iterations, given)
        assert labels.dtype == torch.int64
        assert inertia.dtype == torch.float32
        for b in range(len(x)):
            oracle = x[b].double().cpu().numpy(), seeds[b].numpy(), iterations, mass[b].double().numpy()
            expected, least = lloyd_in_numpy(*oracle)
            assert labels[b].tolist() == expected.tolist(), run.__name__
            assert inertia[b].item() == pytest.approx(least, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("iterations", [0, 1, 12])
def test_lloyd_gives_the_labels_and_inertia_of_float64_lloyd(iterations, monkeypatch):
    from pycompress.kernels import lloyd

    monkeypatch.setattr(lloyd, "PATIENCE", 2)  # it stops before the last iteration
    check_lloyd(blobs(2, 75, 10, 5), torch.stack([torch.arange(0, 55, 11), torch.arange(3, 58, 11)]), iterations)


def test_lloyd_takes_weights_of_points():
    weights = torch.rand(2, 75, generator=torch.Generator().manual_seed(5))
    weights[:, ::9] = 0
    check_lloyd(blobs(2, 75, 10, 5), torch.stack([torch.arange(0, 55, 11), torch.arange(3, 58, 11)]), 6, weights)


def test_lloyd_reseeds_empty_clusters_at_the_farthest_points():
    x = blobs(1, 63, 4, 3)
    x[:, 1] = x[:, 2] = x[:, 0]
    check_lloyd(x, torch.tensor([[0, 1, 2, 9]]), 6)


def test_lloyd_leaves_clusters_empty_when_no_distance_is_left():
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0]], device=DEVICE).repeat(5, 1)[None]
    check_lloyd(x, torch.tensor([[0, 1, 2]]), 5)


def test_lloyd_breaks_ties_towards_the_lowest_label():
    x = torch.tensor([[[-1.0], [1.0], [0.0], [0.0], [-1.0], [1.0], [0.0]]], device=DEVICE)
    check_lloyd(x, torch.tensor([[1, 0]]), 0)


def test_lloyd_on_points_is_not_disturbed_by_a_common_offset():
    from pycompress.kernels.lloyd import lloyd_points_cuda

    x, seeds = blobs(1, 100, 8, 5), torch.tensor([[0, 20, 40, 60, 80]])
    labels, _ = lloyd_points_cuda(x + 300, seeds.to(DEVICE), 6)
    assert (
        labels[0].tolist() == lloyd_in_numpy(x[0].double().cpu().numpy(), seeds[0].numpy(), 6, np.ones(100))[0].tolist()
    )


def test_lloyd_gives_the_same_bits_twice_and_whatever_it_is_batched_with():
    from pycompress.kernels.lloyd import lloyd_cuda

    x = draw(2, 40, 16)
    gram, seeds = x @ x.mT, torch.arange(0, 40, 10, device=DEVICE).repeat(2, 1)
    first, again, alone = lloyd_cuda(gram, seeds, 2), lloyd_cuda(gram, seeds, 2), lloyd_cuda(gram[1:], seeds[1:], 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a[1:], b) for a, b in zip(first, alone, strict=True))


# Low rank --------------------------------------------------------------------------------------------------------


def centred_exactly(x, labels, clusters):
    x = x.double()
    if labels is None:
        return x @ x.mT
    member = one_hot(labels, clusters).double()
    mean = (member / member.sum(1, keepdim=True).clamp(min=1)).mT @ x
    residual = x - member @ mean
    return residual @ residual.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clusters", [0, 7])
@pytest.mark.parametrize("spectrum", ["flat", "steep", "low rank"])
def test_lowrank_captures_the_leading_eigenvalues_of_the_centred_gram(spectrum, clusters, dtype):
    from pycompress.kernels.lowrank import lowrank_cuda

    x, rank = draw(2, 65, 40).double(), 6
    if spectrum == "steep":
        x *= torch.logspace(0, -4, 40, dtype=torch.float64, device=DEVICE)
    elif spectrum == "low rank":
        x = x[..., :5] @ draw(2, 5, 40, seed=1).double()
    labels = torch.randint(0, 6, (2, 65), generator=torch.Generator().manual_seed(2)).to(DEVICE) if clusters else None
    u, values = lowrank_cuda((x @ x.mT).to(dtype), draw(2, 65, 16, seed=3), rank, labels, clusters, 4)
    exact = centred_exactly(x, labels, clusters)
    top = torch.linalg.eigvalsh(exact).flip(-1)[:, :rank]
    captured = (u.double().mT @ exact @ u.double()).diagonal(dim1=1, dim2=2).sum(1)
    total = exact.diagonal(dim1=1, dim2=2).sum(1)
    assert u.dtype == values.dtype == dtype
    assert bool((total - captured <= 1.001 * (total - top.sum(1)) + 1e-6 * total).all())
    torch.testing.assert_close(values.double(), top, rtol=1e-3, atol=float(1e-6 * top.max()))
    identity = torch.eye(rank, dtype=dtype, device=DEVICE).expand(2, -1, -1)
    torch.testing.assert_close(u.mT @ u, identity, rtol=0, atol=2e-6)


def test_lowrank_of_nothing_is_an_orthonormal_basis_without_eigenvalues():
    from pycompress.kernels.lowrank import lowrank_cuda

    u, values = lowrank_cuda(torch.zeros(1, 63, 63, device=DEVICE), draw(1, 63, 12), 4, None, 0, 3)
    assert not values.any()
    torch.testing.assert_close(u.mT @ u, torch.eye(4, device=DEVICE)[None], rtol=0, atol=2e-6)


# Subnet linear ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "prefix"])
@pytest.mark.parametrize("tokens", [1, 33, 65])
def test_subnet_linear_errs_at_most_twice_as_much_as_torch(tokens, layout, dtype):
    from pycompress.kernels.subnet_linear import subnet_linear_cuda

    n, k = 75, 401
    weight, bias = draw(n, k, dtype=dtype) / k**0.5, draw(n, seed=1, dtype=dtype)
    stored = torch.full((n + 3, k + 5), torch.nan, dtype=dtype, device=DEVICE)[:n, :k].copy_(weight)
    stored = {"rows": weight, "columns": weight.T.contiguous().T, "prefix": stored}[layout]
    generator = torch.Generator().manual_seed(2)
    some_rows, some_columns = (torch.randint(0, size, (size // 2,), generator=generator).to(DEVICE) for size in (n, k))
    for rows, columns in ((some_rows, None), (None, some_columns), (some_rows, some_columns)):
        small, its_bias = (weight, bias) if rows is None else (weight[rows], bias[rows])
        small = small if columns is None else small[:, columns]
        x = draw(tokens, small.shape[1], seed=3, dtype=dtype)
        y = subnet_linear_cuda(x, stored, bias, rows, columns)
        exact = linear(x.double(), small.double(), its_bias.double())
        assert y.shape == exact.shape
        assert y.dtype == dtype
        floor = 1e-6 if dtype == torch.float32 else 0.1 * torch.finfo(dtype).eps
        assert relative_error(y, exact) <= 2 * relative_error(linear(x, small, its_bias), exact) + floor


def test_subnet_linear_takes_any_leading_shape_and_empty_choices():
    from pycompress.kernels.subnet_linear import subnet_linear_cuda

    weight, rows, none = draw(63, 100), torch.arange(0, 63, 2, device=DEVICE), torch.arange(0, device=DEVICE)
    x = draw(2, 3, 100)
    flat = subnet_linear_cuda(x.reshape(6, 100), weight, None, rows, None)
    assert torch.equal(subnet_linear_cuda(x, weight, None, rows, None), flat.view(2, 3, 32))
    assert subnet_linear_cuda(x[:0], weight, None, rows, None).shape == (0, 3, 32)
    assert subnet_linear_cuda(x, weight, None, none, None).shape == (2, 3, 0)
    assert torch.equal(subnet_linear_cuda(x[..., :0], weight, draw(63), None, none), draw(63).expand(2, 3, 63))


# Panels ----------------------------------------------------------------------------------------------------------


def panel_of(columns, rows):
    """A panel and an upper factor; what is below the diagonal must not be read."""
    factor = draw(columns, columns, seed=1).triu() / (4 * columns**0.5) + torch.diag(1.5 + draw(columns).abs())
    return draw(columns, rows, seed=2), factor + torch.full((columns, columns), 1e30, device=DEVICE).tril(-1)


@pytest.mark.parametrize(("columns", "rows"), [(128, 40), (1, 3), (50, 17)])
@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-127, 127)])
def test_a_panel_is_rounded_as_the_recursion_in_float64_says(columns, rows, low, high):
    from pycompress.kernels.panel import round_panel_cuda

    values, factor = panel_of(columns, rows)
    reductions, limits = [1.0, 0.9, 0.8], (1e38, 1e-45)
    for scales, dtype in ((None, torch.float16), (None, torch.float32), (0.1 + draw(columns, rows).abs(), None)):
        given = (values, factor, scales, low, high, 32, reductions, dtype or torch.float32, *limits)
        codes, lost, chosen = round_panel_cuda(*given)
        if scales is None:
            assert torch.equal(chosen, chosen.to(dtype).float())
            first = values[:32].double()
            tried = [share * first.abs().amax(0) / high for share in reductions]
            if low != -high:
                largest = first.gather(0, first.abs().argmax(0, keepdim=True))[0]
                tried += [share * largest / low for share in reductions]
            errors = torch.stack([plain_error(first, scale.to(dtype).double(), low, high) for scale in tried])
            assert bool((plain_error(first, chosen[0].double(), low, high) <= errors.amin(0) * (1 + 1e-3)).all())
        steps = (chosen.repeat_interleave(32, 0)[:columns] if scales is None else scales).double()
        rest, upper, wrong = values.double().clone(), factor.double().triu(), 0
        for j in range(columns):
            nearest = (rest[j] / steps[j]).clamp(low, high).round()
            wrong += int((nearest != codes[j]).sum())
            error = (rest[j] - codes[j] * steps[j]) / upper[j, j]
            assert bool(((lost[j] - error).abs() < 1e-3).all())
            rest[j + 1 :] -= upper[j, j + 1 :, None] * error
        assert wrong <= 2e-3 * codes.numel() + 1


def plain_error(values, scales, low, high):
    return (values - (values / scales).clamp(low, high).round() * scales).square().sum(0)


@pytest.mark.parametrize("keep", [None, 2, 3])
def test_a_panel_is_pruned_as_the_recursion_in_float64_says(keep):
    from pycompress.kernels.panel import prune_panel_cuda

    values, factor = panel_of(48, 37)
    given = draw(48, 37, seed=3) < 0.2 if keep is None else None
    kept, lost = prune_panel_cuda(values, factor, given, keep or 0, 4)
    rest, upper = values.double().clone(), factor.double().triu()
    for j in range(48):
        if keep is not None and j % 4 == 0:
            costs = rest[j : j + 4].square() / upper.diagonal()[j : j + 4, None].square()
            mask = torch.zeros_like(costs, dtype=torch.bool).scatter_(0, costs.argsort(0)[: 4 - keep], True)
        gone = given[j] if keep is None else mask[j % 4]
        error = rest[j] * gone / upper[j, j]
        rest[j] = rest[j].masked_fill(gone, 0)
        assert bool(((lost[j] - error).abs() < 1e-4).all())
        rest[j + 1 :] -= upper[j, j + 1 :, None] * error
    assert bool((kept - rest).abs().max() < 1e-4)
    assert bool(((kept == 0) == (rest == 0)).all())
