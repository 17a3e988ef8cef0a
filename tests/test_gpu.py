"""What only a GPU can show: real sizes, bfloat16, dispatch, CUDA graphs, the native CUDA module."""

import importlib

import pytest
import torch
from torch.nn.functional import linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: run `make gpu` where there is one"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def full_precision():
    """torch's own float32 products, the yardstick here, must not be TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def draw(*size, seed=0, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def packed(share, dtype, outputs=1000, inputs=2064, k=150, r=63):
    """A layer of trained-like scale: weight, factor, labels, bias."""
    stacked, other = ((k + r, inputs), (outputs, r)) if share == "output" else ((outputs, k + r), (r, inputs))
    channels = outputs if share == "output" else inputs
    labels = torch.randint(0, k, (channels,), generator=torch.Generator().manual_seed(1)).short().cuda()
    weight = draw(*stacked, seed=2, dtype=dtype) / inputs**0.5
    return weight, draw(*other, seed=3, dtype=dtype), labels, draw(outputs, seed=4, dtype=dtype)


def dense(weight, factor, labels, share):
    """The matrix the layer stands for, in float64."""
    weight, factor = weight.double(), factor.double()
    if share == "output":
        k = weight.shape[0] - factor.shape[1]
        return weight[:k][labels.long()] + factor @ weight[k:]
    k = weight.shape[1] - factor.shape[0]
    return weight[:, :k][:, labels.long()] + weight[:, k:] @ factor


def relative_error(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 1000])
def test_shared_linear_is_as_precise_as_a_dense_layer_of_its_dtype(tokens, share, dtype):
    from pycompress.ops import shared_linear

    weight, factor, labels, bias = packed(share, dtype)
    x = draw(tokens, weight.shape[1] if share == "output" else factor.shape[1], seed=5, dtype=dtype)
    restored = dense(weight, factor, labels, share)
    exact = linear(x.double(), restored, bias.double())
    y = shared_linear(x, weight, factor, labels, bias=bias, share=share)
    by_torch = relative_error(linear(x, restored.to(dtype), bias), exact)
    assert relative_error(y, exact) <= 2 * by_torch + (2e-6 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_shared_linear_gives_the_same_bits_twice_and_from_a_cuda_graph(tokens, share):
    from pycompress.ops import shared_linear

    weight, factor, labels, bias = packed(share, torch.bfloat16)
    x = draw(tokens, (weight if share == "output" else factor).shape[1], dtype=torch.bfloat16)
    eager = shared_linear(x, weight, factor, labels, bias=bias, share=share)
    assert torch.equal(eager, shared_linear(x, weight, factor, labels, bias=bias, share=share))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = shared_linear(x, weight, factor, labels, bias=bias, share=share)
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(eager, captured)


@pytest.mark.parametrize("share", ["output", "input"])
def test_shared_linear_trains_on_the_gpu_as_the_dense_formula_does(share):
    from pycompress.ops import shared_linear

    weight, factor, labels, bias = packed(share, torch.float32, 63, 100, 9, 5)
    x = draw(7, 100, seed=6)
    leaves = [t.double().requires_grad_() for t in (x, weight, factor, bias)]
    exact = linear(leaves[0], dense(leaves[1], leaves[2], labels, share), leaves[3]).square().sum()
    expected = torch.autograd.grad(exact, leaves)
    given = [t.clone().requires_grad_() for t in (x, weight, factor, bias)]
    loss = shared_linear(*given[:3], labels, bias=given[3], share=share).square().sum()
    for got, want in zip(torch.autograd.grad(loss, given), expected, strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("share", [False, True])
def test_shared_linear_passes_opcheck_on_the_gpu(share):
    import pycompress.ops  # noqa: F401

    layer = packed("input" if share else "output", torch.float32, 63, 100, 9, 5)
    *factors, labels, bias = (t.requires_grad_() if t.is_floating_point() else t for t in (draw(7, 100), *layer))
    torch.library.opcheck(torch.ops.pycompress.shared_linear.default, (*factors, labels, None, bias, share))


def test_the_kernels_in_use_are_triton():
    from pycompress.ops.shared_linear import kernel_in_use

    assert kernel_in_use(draw(1)) == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_the_native_cuda_kernel_agrees_with_float64(tokens, share, dtype):
    from pycompress import _ext
    from pycompress.ops.shared_linear import shared_linear_cuda_native

    if not isinstance(_ext.build_info()["cuda"], list):
        pytest.skip(f"no CUDA kernel was built: {_ext.build_info()['cuda']}")
    weight, factor, labels, bias = packed(share, dtype)
    x = draw(tokens, (weight if share == "output" else factor).shape[1], dtype=dtype)
    y = shared_linear_cuda_native(x, weight, factor, labels, bias, share == "input")
    exact = linear(x.double(), dense(weight, factor, labels, share), bias.double())
    assert relative_error(y, exact) < (1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_gram_of_a_large_matrix_is_symmetric_and_precise(dtype):
    from pycompress.ops import gram

    x = draw(1000, 2049 if dtype == torch.float32 else 2048, dtype=dtype)
    got = gram(x)
    assert torch.equal(got, got.mT)
    assert relative_error(got, x.double() @ x.double().mT) <= (1e-14 if dtype == torch.float64 else 2e-6)


def clouds(batch, n, d, groups):
    """Points around centres, and one point of each."""
    centres = 3 * draw(batch, groups, d, seed=7)
    member = torch.randint(0, groups, (batch, n), generator=torch.Generator().manual_seed(8)).cuda()
    first = torch.stack([(member == group).int().argmax(1) for group in range(groups)], dim=1)
    return centres.gather(1, member[..., None].expand(-1, -1, d)) + 2 * draw(batch, n, d, seed=9), first


@pytest.mark.parametrize("form", ["lloyd", "lloyd_points"])
def test_lloyd_at_real_size_finds_the_labels_of_float64(form):
    ops = importlib.import_module("pycompress.ops.lloyd")
    x, seeds = clouds(2, 3000, 64, 100)
    data = x if form == "lloyd_points" else (x.double() @ x.double().mT).float()
    labels, inertia = getattr(ops, form)(data, seeds, 15)
    again, _ = getattr(ops, form)(data, seeds, 15)
    assert torch.equal(labels, again)
    for b in range(2):
        points = x[b].double()
        centroids = points[seeds[b]]
        for _ in range(16):
            expected = torch.cdist(points, centroids).argmin(1)
            member = torch.nn.functional.one_hot(expected, 100).double()
            assert bool(member.any(0).all()), "the draw is meant to leave no cluster empty"
            centroids = (member.T @ points) / member.sum(0)[:, None]
        assert (labels[b] != expected).sum() <= 3  # points that rounding may put on either side of a border
        least = (points - centroids[expected]).square().sum()
        assert inertia[b].item() == pytest.approx(least.item(), rel=1e-4)


def test_kmeans_on_the_gpu_is_as_good_as_on_the_cpu():
    from pycompress.ops.lloyd import kmeans

    x = draw(1500, 256)
    inertia = [float(kmeans(points, clusters=64, seed=3)[1]) for points in (x, x.cpu())]
    assert inertia[0] == pytest.approx(inertia[1], rel=5e-3)


@pytest.mark.parametrize("clusters", [0, 200])
def test_lowrank_error_is_within_a_thousandth_of_the_exact_tail(clusters):
    from pycompress.ops.lowrank import lowrank

    x = draw(2000, 900) * torch.arange(1, 901, device="cuda") ** -0.5
    labels = (
        torch.randint(0, clusters, (2000,), generator=torch.Generator().manual_seed(2)).cuda() if clusters else None
    )
    u, _ = lowrank(x @ x.mT, 64, labels, clusters)
    residual = x.double()
    if labels is not None:
        member = torch.nn.functional.one_hot(labels, clusters).double()
        residual = residual - member @ ((member / member.sum(0)).T @ residual)
    tail = torch.linalg.svdvals(residual)[64:].square().sum()
    left = (residual - u.double() @ (u.double().mT @ residual)).square().sum()
    assert left <= 1.001 * tail
