"""Times the kernels on a GPU beside cuBLAS and torch; `python bench/gpu_benchmarks.py <file>` writes a JSON list.

Weights rotate through sets that together exceed the second-level cache, and short calls are timed inside CUDA graphs.
Each figure stands beside the error of what was timed, against float64.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, one_hot

from pycompress import _ext
from pycompress.ops import gram, lowrank, shared_linear
from pycompress.ops.lloyd import kmeans_plus_plus, lloyd, lloyd_points
from pycompress.ops.shared_linear import shared_linear_cuda_native

N, K, RANK = 4096, 11008, 64
KEEPS = (0.5, 0.2, 0.1)
TOKENS = (1, 16, 256, 2048)
Call = Callable[[], Any]
Figure = dict[str, Any]


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device="cuda", dtype=torch.float32).to(dtype)


def sets_needed(nbytes: int) -> int:
    """Copies that together are three times the second-level cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, 3 * cache // nbytes + 1))


def in_a_graph(calls: list[Call], replays: int = 20) -> float:
    """Median microseconds a call, all of them captured one after the other."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_us(graph.replay, replays) / len(calls)


def median_us(call: Call, rounds: int = 5) -> float:
    """Median microseconds of one call by CUDA events, after two to warm up."""
    times = []
    for round_ in range(rounds + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        if round_ >= 2:
            times.append(1e3 * start.elapsed_time(stop))
    return statistics.median(times)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def figure(op: str, group: str, who: str, us: float, **facts: Any) -> Figure:
    entry = {"op": op, "group": group, "who": who, "us": round(us, 3), **facts}
    print(json.dumps(entry), flush=True)
    return entry


# Shared linear ---------------------------------------------------------------------------------------------------


def clusters_for(keep: float, share: str) -> int:
    """Clusters that with a pivoted correction of rank RANK take `keep` of the dense bytes."""
    length = K if share == "output" else N
    return int((keep * N * K - RANK * (N + K - RANK)) // length)


def layer(keep: float, share: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, bf16 = clusters_for(keep, share), torch.bfloat16
    count = N if share == "output" else K
    indices = torch.randint(0, k, (count,), device="cuda").short(), torch.randperm(count, device="cuda").short()
    if share == "output":
        return random(k + RANK, K, dtype=bf16) / K**0.5, random(N - RANK, RANK, dtype=bf16), *indices
    return random(N, k + RANK, dtype=bf16) / K**0.5, random(RANK, K - RANK, dtype=bf16), *indices


def whole(factor: Tensor, channels: Tensor, share: str) -> Tensor:
    """The factor with its pivots' identity written out."""
    identity = torch.eye(RANK, dtype=factor.dtype, device="cuda")
    along = 0 if share == "output" else 1
    return torch.cat([identity, factor], dim=along).index_select(along, channels.long().argsort())


def restored(weight: Tensor, factor: Tensor, labels: Tensor, channels: Tensor, share: str) -> Tensor:
    weight, factor = weight.double(), whole(factor.double(), channels, share)
    if share == "output":
        return weight[:-RANK][labels.long()] + factor @ weight[-RANK:]
    return weight[:, :-RANK][:, labels.long()] + weight[:, -RANK:] @ factor


def plain(x: Tensor, weight: Tensor, factor: Tensor, labels: Tensor, share: str) -> Tensor:
    """The formula in torch operations, on the whole factor."""
    if share == "output":
        stacked = linear(x, weight)
        return linear(stacked[:, -RANK:], factor) + stacked.index_select(1, labels.int())
    sums = torch.zeros((len(x), weight.shape[1] - RANK), device="cuda").index_add_(1, labels.int(), x.float())
    return linear(torch.cat([sums.to(x.dtype), linear(x, factor)], dim=1), weight)


def shared_linear_figures() -> Iterator[Figure]:
    bf16 = torch.bfloat16
    dense = [random(N, K, dtype=bf16) for _ in range(sets_needed(2 * N * K))]
    inputs = {tokens: random(tokens, K, dtype=bf16) for tokens in TOKENS}
    cublas = {}
    for tokens, x in inputs.items():
        cublas[tokens] = in_a_graph([lambda w=w, x=x: linear(x, w) for w in dense])
        yield figure("shared_linear", f"{tokens} tokens", "cuBLAS dense bf16", cublas[tokens], bytes=2 * N * K)
    del dense
    for share in ("output", "input"):
        for keep in KEEPS:
            first = layer(keep, share)
            nbytes = sum(t.nbytes for t in first)
            layers = [first, *(layer(keep, share) for _ in range(sets_needed(nbytes) - 1))]
            wholes = [(weight, whole(factor, channels, share), labels) for weight, factor, labels, channels in layers]
            exact = restored(*first, share)
            for tokens, x in inputs.items():
                runs = {"pycompress": (lambda x, *w: shared_linear(x, *w, share=share), layers)}  # noqa: B023
                runs["torch operations"] = (lambda x, *w: plain(x, *w, share), wholes)  # noqa: B023
                if tokens <= 16 and isinstance(_ext.build_info()["cuda"], list):
                    native = lambda x, *w: shared_linear_cuda_native(x, *w, None, share == "input")  # noqa: B023, E731
                    runs["native CUDA"] = (native, layers)
                for who, (call, stored) in runs.items():
                    error = relative_error(call(x, *stored[0]), linear(x.double(), exact))
                    us = in_a_graph([lambda w=w, x=x, call=call: call(x, *w) for w in stored])
                    facts = {"keep": keep, "share": share, "bytes": nbytes, "error": error}
                    facts["speedup_over_cublas"] = round(cublas[tokens] / us, 3)
                    yield figure("shared_linear", f"{tokens} tokens", who, us, **facts)


# Gram, K-means, low rank -----------------------------------------------------------------------------------------


def gram_figures() -> Iterator[Figure]:
    for dtype in (torch.bfloat16, torch.float32):
        x = random(N, K, dtype=dtype)
        exact = x.double() @ x.double().T
        runs: dict[str, Call] = {"pycompress": lambda x=x: gram(x), "torch mm": lambda x=x: x @ x.T}
        for who, call in runs.items():
            error = relative_error(call(), exact)
            yield figure("gram", f"{N}x{K} {dtype}", who, median_us(call), error=error, flops=2 * N * N * K)


def lloyd_in_torch(x: Tensor, seeds: Tensor, iterations: int) -> Tensor:
    """Lloyd by products, in float32: distances, argmin, membership times points."""
    centroids, k = x[seeds], len(seeds)
    for step in range(iterations + 1):
        labels = (centroids.square().sum(1) - 2 * x @ centroids.T).argmin(1)
        if step < iterations:
            member = one_hot(labels, k).to(x.dtype)
            centroids = (member.T @ x) / member.sum(0)[:, None].clamp(min=1)
    return labels


def inertia_of(x: Tensor, labels: Tensor, k: int) -> float:
    member = one_hot(labels, k).double()
    means = (member.T @ x.double()) / member.sum(0)[:, None].clamp(min=1)
    return float((x.double() - means[labels]).square().sum())


def lloyd_figures() -> Iterator[Figure]:
    k, iterations = 512, 10
    for n, d in ((4096, 4096), (11008, 4096), (65536, 128)):
        x = random(n, d)
        seeds = torch.randperm(n, device="cuda")[:k]
        group = f"{n}x{d}, {k} clusters, {iterations} iterations"
        runs: dict[str, Callable[[], Tensor]] = {"torch operations": lambda: lloyd_in_torch(x, seeds, iterations)}  # noqa: B023
        runs["pycompress on points"] = lambda: lloyd_points(x[None], seeds[None], iterations)[0][0]  # noqa: B023
        if n <= 11008:
            g = gram(x)[None]
            runs["pycompress on Gram"] = lambda: lloyd(g, seeds[None], iterations)[0][0]  # noqa: B023
            uniforms = torch.rand(1, k, 8, device="cuda")
            us = median_us(lambda: kmeans_plus_plus(g, uniforms), 3)  # noqa: B023
            yield figure("lloyd", f"seeding, {n} points, {k} clusters, 8 trials", "pycompress", us)
        for who, call in runs.items():
            yield figure("lloyd", group, who, median_us(call, 3), inertia=inertia_of(x, call(), k))


def lowrank_figures() -> Iterator[Figure]:
    rank, clusters = 128, 512
    w = random(N, N) * torch.arange(1, N + 1, device="cuda") ** -0.5
    g = gram(w)
    labels = torch.randint(0, clusters, (N,), device="cuda")
    exact = float(torch.linalg.svdvals(w)[rank:].double().square().sum())
    runs: dict[str, Call] = {
        "pycompress": lambda: lowrank(g, rank)[0],
        "pycompress, centred": lambda: lowrank(g, rank, labels, clusters)[0],
        "torch svd_lowrank": lambda: torch.svd_lowrank(w, q=rank + 8, niter=4)[0][:, :rank],
        "torch eigh": lambda: torch.linalg.eigh(g)[1][:, -rank:],
    }
    for who, call in runs.items():
        u = call().double()
        error = float((w.double() - u @ (u.T @ w.double())).square().sum())
        facts = {} if "centred" in who else {"error_over_svd_tail": error / exact}
        yield figure("lowrank", f"rank {rank} of {N}x{N}", who, median_us(call, 3), **facts)


def main() -> None:
    torch.manual_seed(0)
    target = Path(sys.argv[1])
    figures: list[Figure] = []
    for part in (shared_linear_figures, gram_figures, lloyd_figures, lowrank_figures):
        for entry in part():
            figures.append(entry)
            # What was measured stays measured, whatever happens to the rest.
            target.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
