"""What only a GPU can show: real sizes, bfloat16, dispatch, CUDA graphs, the native CUDA module."""

import importlib

import pytest
import torch
from torch.nn.functional import linear

from pycompress.formats.codes import RANGE, dequantize, pack, scales_shape
from pycompress.formats.zeros import pack24, pack_bitmap, unpack24

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


SIZES = {"float": (1000, 2064, 150, 63), "int8": (1000, 2064, 150, 63), "int4": (1000, 2080, 160, 64)}


def packed(share, dtype, sizes=SIZES["float"], pivoted=False, index=torch.int16, storage="float"):
    """A layer of trained-like scale: weight, factor, labels, channels, bias and the scales."""
    outputs, inputs, k, r = sizes
    count = outputs if share == "output" else inputs
    stored = count - r if pivoted else count
    stacked, other = ((k + r, inputs), (stored, r)) if share == "output" else ((outputs, k + r), (r, stored))
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, k, (count,), generator=generator).to("cuda", index)
    channels = torch.randperm(count, generator=generator).to("cuda", index) if pivoted else None
    bias = draw(outputs, seed=4, dtype=dtype)
    if storage != "float":
        (weight, scales), (factor, others) = coded(stacked, storage, dtype, inputs**-0.5), coded(other, storage, dtype)
        return weight, factor, labels, channels, bias, scales, others
    weight = draw(*stacked, seed=2, dtype=dtype) / inputs**0.5
    return weight, draw(*other, seed=3, dtype=dtype), labels, channels, bias, None, None


def coded(shape, storage, dtype, scale=1.0):
    """Random codes of a matrix, and their scales."""
    low, high = RANGE[storage]
    generator = torch.Generator().manual_seed(sum(shape))
    codes = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)
    scales = scale * (0.5 + torch.rand(scales_shape(*shape, storage), generator=generator)) / high
    return pack(codes, storage).cuda(), scales.to("cuda", dtype)


def dense(layer, share):
    """The matrix the layer stands for, in float64."""
    weight, factor, labels, channels, _, weight_scales, factor_scales = layer
    along = 0 if share == "output" else 1
    if weight_scales is not None:
        weight, factor = dequantize(weight, weight_scales), dequantize(factor, factor_scales)
    rank = factor.shape[1 - along]
    weight, factor = weight.double(), factor.double()
    if channels is not None:
        identity = torch.eye(rank, dtype=torch.float64, device="cuda")
        factor = torch.cat([identity, factor], dim=along).index_select(along, channels.long().argsort())
    k = weight.shape[along] - rank
    if share == "output":
        return weight[:k][labels.long()] + factor @ weight[k:]
    return weight[:, :k][:, labels.long()] + weight[:, k:] @ factor


def relative_error(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


FORMS = pytest.mark.parametrize(("pivoted", "index"), [(False, torch.int16), (True, torch.int16), (True, torch.int32)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@FORMS
@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 1000])
def test_shared_linear_is_as_precise_as_a_dense_layer_of_its_dtype(tokens, share, pivoted, index, dtype):
    from pycompress.ops import shared_linear

    layer = packed(share, dtype, pivoted=pivoted, index=index)
    x = draw(tokens, 2064, seed=5, dtype=dtype)
    restored = dense(layer, share)
    exact = linear(x.double(), restored, layer[4].double())
    y = shared_linear(x, *layer, share=share)
    by_torch = relative_error(linear(x, restored.to(dtype), layer[4]), exact)
    assert relative_error(y, exact) <= 2 * by_torch + (2e-6 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("tokens", [1, 17, 1000])
def test_shared_linear_of_codes_is_as_precise_as_a_dense_layer(tokens, share, pivoted, storage, dtype):
    from pycompress.ops import shared_linear

    layer = packed(share, dtype, SIZES[storage], pivoted, storage=storage)
    x = draw(tokens, SIZES[storage][1], seed=5, dtype=dtype)
    restored = dense(layer, share)
    exact = linear(x.double(), restored, layer[4].double())
    by_torch = relative_error(linear(x, restored.to(dtype), layer[4]), exact)
    y = shared_linear(x, *layer, share=share)
    # The numbers themselves are rounded to the dtype before they are multiplied.
    assert relative_error(y, exact) <= 2 * by_torch + (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 4)


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("tokens", [1, 16, 300])
def test_shared_linear_gives_the_same_bits_twice_and_from_a_cuda_graph(tokens, share, pivoted):
    from pycompress.ops import shared_linear

    layer = packed(share, torch.bfloat16, pivoted=pivoted)
    x = draw(tokens, 2064, dtype=torch.bfloat16)
    eager = shared_linear(x, *layer, share=share)
    assert torch.equal(eager, shared_linear(x, *layer, share=share))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = shared_linear(x, *layer, share=share)
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(eager, captured)


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("share", ["output", "input"])
def test_shared_linear_trains_on_the_gpu_as_the_dense_formula_does(share, pivoted):
    from pycompress.ops import shared_linear

    weight, factor, labels, channels, bias, *scales = packed(share, torch.float32, (63, 100, 9, 5), pivoted)
    x = draw(7, 100, seed=6)
    leaves = [t.double().requires_grad_() for t in (x, weight, factor, bias)]
    exact = linear(leaves[0], dense((*leaves[1:3], labels, channels, None, *scales), share), leaves[3]).square().sum()
    expected = torch.autograd.grad(exact, leaves)
    given = [t.clone().requires_grad_() for t in (x, weight, factor, bias)]
    loss = shared_linear(*given[:3], labels, channels, given[3], share=share).square().sum()
    for got, want in zip(torch.autograd.grad(loss, given), expected, strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("tokens", [3, 100])
def test_shared_linear_follows_autocast_as_a_dense_layer_does(tokens, share):
    from pycompress.ops import shared_linear

    layer = packed(share, torch.float32, pivoted=True)
    weight, x = dense(layer, share).float(), draw(tokens, 2064, seed=5)
    ours, torchs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, expected = shared_linear(ours, *layer, share=share), linear(torchs, weight, layer[4])
    assert y.dtype == expected.dtype == torch.bfloat16
    grads = [torch.autograd.grad(out.square().sum(), leaf)[0] for out, leaf in ((y, ours), (expected, torchs))]
    assert relative_error(y, expected.double()) < 0.02
    assert relative_error(grads[0], grads[1].double()) < 0.02


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_shared_linear_passes_opcheck_on_the_gpu(share, pivoted):
    import pycompress.ops  # noqa: F401

    layer = packed("input" if share else "output", torch.float32, (63, 100, 9, 5), pivoted)
    given = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in (draw(7, 100), *layer)]
    torch.library.opcheck(torch.ops.pycompress.shared_linear.default, (*given, share))


def test_the_kernels_in_use_are_triton():
    from pycompress.ops.shared_linear import kernel_in_use

    assert kernel_in_use(draw(1)) == "triton"


@pytest.mark.parametrize("storage", ["float", "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_layers_that_start_early_wait_for_what_they_read(tokens, storage):
    """A chain of layers, each launched while the one before it runs: the same bits as with a pause after each."""
    from pycompress.kernels.shared_linear import shared_linear_cuda

    sizes = {"float": (2080, 2080, 150, 63)}.get(storage, (2080, 2080, 160, 64))
    forms = [("output", False), ("input", False), ("output", True), ("input", True)]
    layers = [(packed(s, torch.bfloat16, sizes, p, torch.int16, storage), s == "input") for s, p in forms]

    def chain(pause):
        x = start
        for layer, share_input in 3 * layers:
            x = shared_linear_cuda(x, *layer, share_input)
            if pause:
                torch.cuda.synchronize()
        return x

    start = draw(tokens, 2080, dtype=torch.bfloat16) * 1e-3
    expected = chain(True)
    assert torch.equal(chain(False), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(False)
    for _ in range(3):
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, expected)


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
        residual = residual - member @ ((member / member.sum(0).clamp(min=1)).T @ residual)
    tail = torch.linalg.svdvals(residual)[64:].square().sum()
    left = (residual - u.double() @ (u.double().mT @ residual)).square().sum()
    assert left <= 1.001 * tail


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 64, 65, 1000])
def test_subnet_linear_is_as_precise_as_torch_on_the_part_in_use(tokens, transposed, dtype):
    from pycompress.ops import subnet_linear

    weight, bias = draw(1000, 2064, dtype=dtype) / 2064**0.5, draw(1000, seed=1, dtype=dtype)
    weight = weight.T.contiguous().T if transposed else weight
    some_rows, some_columns = torch.randperm(1000, device="cuda")[:501], torch.randperm(2064, device="cuda")[:1023]
    for rows, columns in ((None, None), (some_rows, None), (None, some_columns), (some_rows, some_columns)):
        small, its_bias = (weight, bias) if rows is None else (weight[rows], bias[rows])
        small = small if columns is None else small[:, columns]
        x = draw(tokens, small.shape[1], seed=2, dtype=dtype)
        y = subnet_linear(x, weight, bias, rows, columns)
        exact = linear(x.double(), small.double(), its_bias.double())
        by_torch = relative_error(linear(x, small, its_bias), exact)
        assert relative_error(y, exact) <= 2 * by_torch + (2e-6 if dtype == torch.float32 else 0)
        assert torch.equal(y, subnet_linear(x, weight, bias, rows, columns))


def test_subnet_linear_passes_opcheck_and_a_cuda_graph_on_the_gpu():
    from pycompress.ops import subnet_linear

    rows, columns = torch.randperm(63, device="cuda")[:31], torch.randperm(100, device="cuda")[:50]
    given = [t.requires_grad_() for t in (draw(7, 50), draw(63, 100), draw(63))]
    torch.library.opcheck(torch.ops.pycompress.subnet_linear.default, (*given, rows, columns))
    for tokens in (1, 7, 100):
        x, weight, bias = draw(tokens, 50), draw(63, 100), draw(63)
        eager = subnet_linear(x, weight, bias, rows, columns)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = subnet_linear(x, weight, bias, rows, columns)
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(eager, captured)


def two_of_four(n, k, dtype):
    ranks = draw(n, k // 4, 4, seed=n).argsort(-1)
    return draw(n, k, dtype=dtype) * (ranks < 2).view(n, k) / k**0.5


@pytest.fixture
def native24():
    from pycompress.ops._library import native_cuda_built
    from pycompress.ops.sparse24_linear import sparse24_linear_cuda_native

    if not native_cuda_built("sparse24_linear"):
        pytest.skip("the CUDA kernels were not built")
    return sparse24_linear_cuda_native


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(4096, 1024), (1000, 2064), (63, 1000), (5, 8), (40, 11016)])
def test_native_cuda_kernel_of_2_to_4_is_as_precise_as_torch(native24, n, k, dtype):
    dense, bias = two_of_four(n, k, dtype), draw(n, seed=1, dtype=dtype)
    packed = pack24(dense)
    for tokens in (1, 2, 8, 9, 16):
        x = draw(tokens, k, seed=2, dtype=dtype)
        y = native24(x, *packed, bias)
        exact = linear(x.double(), dense.double(), bias.double())
        by_torch = relative_error(linear(x, dense, bias), exact)
        assert relative_error(y, exact) <= 2 * by_torch + (2e-6 if dtype == torch.float32 else 0)
        assert torch.equal(y, native24(x, *packed, bias))


def test_native_cuda_kernel_of_2_to_4_reads_numbers_anywhere(native24):
    """Tensors that start on no 16 bytes, with NaN around them."""
    for dtype in DTYPES:
        dense = two_of_four(33, 104, dtype)
        packed, views = pack24(dense), []
        for t, poison in zip(packed, (torch.nan, 255), strict=True):
            whole = torch.full((t.numel() + 65,), poison, dtype=t.dtype, device="cuda")
            views.append(whole[1 : 1 + t.numel()].view(t.shape).copy_(t))
        x = torch.full((1 + 3 * 104 + 9,), torch.nan, device="cuda").to(dtype)[1 : 1 + 3 * 104].view(3, 104)
        x.copy_(draw(3, 104))
        exact = linear(x.double(), dense.double())
        assert relative_error(native24(x, *views, None), exact) <= 2 * relative_error(linear(x, dense), exact) + 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 1000])
def test_sparse_layers_are_as_precise_as_torch(tokens, dtype):
    from pycompress.ops import bitmap_linear, sparse24_linear

    x, bias = draw(2, tokens, 2080, seed=2, dtype=dtype), draw(992, seed=1, dtype=dtype)
    dense = two_of_four(992, 2080, dtype)
    for y in (sparse24_linear(x, *pack24(dense), bias), bitmap_linear(x, *pack_bitmap(dense), bias)):
        exact = linear(x.double(), dense.double(), bias.double())
        by_torch = relative_error(linear(x, dense, bias), exact)
        assert relative_error(y, exact) <= 2 * by_torch + (2e-6 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("tokens", [1, 100])
def test_2_to_4_follows_its_values_and_passes_a_cuda_graph(tokens):
    from pycompress.ops import sparse24_linear

    values, positions = pack24(two_of_four(96, 128, torch.bfloat16))
    x = draw(tokens, 128, dtype=torch.bfloat16)
    for _ in range(2):
        eager = sparse24_linear(x, values, positions)
        torch.testing.assert_close(eager, linear(x, unpack24(values, positions)), rtol=0.02, atol=0.02)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = sparse24_linear(x, values, positions)
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(eager, captured)
        values.mul_(2)  # what was made of the old values must not be used


def test_sparse_layers_pass_opcheck_on_the_gpu():
    dense = two_of_four(7, 16, torch.float32)
    for op, packed in (("sparse24_linear", pack24(dense)), ("bitmap_linear", pack_bitmap(dense))):
        values, *places = packed
        given = (draw(2, 3, 16).requires_grad_(), values.requires_grad_(), *places, draw(7).requires_grad_())
        torch.library.opcheck(getattr(torch.ops.pycompress, op).default, given)


def test_every_layer_compiles_whole_on_the_gpu():
    from pycompress.ops import bitmap_linear, shared_linear, sparse24_linear, subnet_linear

    sparse = two_of_four(96, 128, torch.bfloat16)
    layers = [
        *(
            (shared_linear, packed(share, torch.bfloat16, (96, 128, 32, 64), True), share)
            for share in ("output", "input")
        ),
        (sparse24_linear, pack24(sparse), None),
        (bitmap_linear, pack_bitmap(sparse), None),
        (subnet_linear, (sparse, None, torch.arange(50, device="cuda"), None), None),
    ]
    for op, given, share in layers:
        named = {} if share is None else {"share": share}

        def apply(x, op=op, given=given, named=named):
            return op(x * 2, *given, **named) + 1

        torch._dynamo.reset()
        with torch.no_grad():
            for tokens in (1, 100):
                x = draw(tokens, 128, dtype=torch.bfloat16)
                torch.testing.assert_close(torch.compile(apply, fullgraph=True)(x), apply(x))
