"""Times the kernels on a GPU beside cuBLAS and torch; `python bench/gpu_benchmarks.py <file>` writes a JSON list.

Weights rotate through sets that together exceed the second-level cache, and short calls are timed inside CUDA graphs,
contestants in turn. Each figure stands beside the error of what was timed, against float64. Every part has a process
and a time limit of its own, so that one which fails leaves the others' figures. Where the folder $GPU_WHEELS holds a
wheel of flash-kmeans, it is timed too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pycompress.kernels.shared_linear import shared_linear_cuda
from torch import Tensor
from torch.nn.functional import linear, one_hot
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from pycompress.formats import codes as storage
from pycompress.formats.zeros import pack24
from pycompress.measure.speed import compare_speed
from pycompress.methods._gptq import InverseHessian, quantize, quantize_sorted
from pycompress.nn.linear import SharedLinear
from pycompress.ops import gram, lowrank, sparse24_linear, truncated_svd
from pycompress.ops.lloyd import kmeans, kmeans_plus_plus, lloyd, lloyd_points

N, K, RANK = 4096, 11008, 64
KEEPS = (0.5, 0.2, 0.1)
TOKENS = (1, 4, 16, 64, 256, 2048)
FEWER = (1, 16, 256)
Call = Callable[[], Any]
Figure = dict[str, Any]


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device="cuda", dtype=torch.float32).to(dtype)


def sets_needed(nbytes: int) -> int:
    """Copies that together are three times the second-level cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(64, 3 * cache // nbytes + 1))


def in_graphs(contestants: Mapping[str, list[Call]], rounds: int = 9) -> dict[str, float]:
    """Median microseconds a call of each contestant, whose calls are captured one after the other, by turns."""
    graphs = {}
    for who, calls in contestants.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Twice: what is derived from a layer once, and early launches, come with later calls.
            for call in 2 * calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graphs[who] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[who]):
            for call in calls:
                call()
    times: dict[str, list[float]] = {who: [] for who in graphs}
    for _ in range(rounds):
        for who, graph in graphs.items():
            times[who].append(median_us(graph.replay, 1) / len(contestants[who]))
    return {who: statistics.median(measured) for who, measured in times.items()}


def median_us(call: Call, rounds: int = 5) -> float:
    """Median microseconds of one call by CUDA events, after one to warm up."""
    times = []
    for round_ in range(rounds + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        if round_ >= 1:
            times.append(1e3 * start.elapsed_time(stop))
    return statistics.median(times)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def figure(op: str, group: str, who: str, us: float, **facts: Any) -> Figure:
    entry = {"op": op, "group": group, "who": who, "us": round(us, 3), **facts}
    print(json.dumps(entry), flush=True)
    return entry


def over_cublas(
    op: str, group: str, runs: Mapping[str, list[Call]], facts: Mapping[str, dict[str, Any]], **common: Any
) -> Iterator[Figure]:
    """A figure of each contestant: `common` facts, its own `facts`, and cuBLAS's time over its time."""
    us = in_graphs(runs)
    for who, each in us.items():
        ratio = round(us["cuBLAS dense bf16"] / each, 3)
        yield figure(op, group, who, each, **common, **facts.get(who, {}), over_cublas=ratio)


# Shared linear ---------------------------------------------------------------------------------------------------


def clusters_for(keep: float, shape: tuple[int, int], share: str) -> int:
    """Clusters that with a pivoted correction of rank RANK take at most `keep` of the dense bytes, in whole blocks."""
    length = shape[1] if share == "output" else shape[0]
    clusters = (keep * shape[0] * shape[1] - RANK * (sum(shape) - RANK)) / length
    return max(int(clusters) // storage.BLOCK, 1) * storage.BLOCK


def layer(keep: float, share: str, kind: str) -> list[Tensor]:
    """Weight, factor, labels, channels and, of codes, the scales of both."""
    k = clusters_for(keep, (N, K), share)
    count = N if share == "output" else K
    indices = torch.randint(0, k, (count,), device="cuda").short(), torch.randperm(count, device="cuda").short()
    shapes = ((k + RANK, K), (N - RANK, RANK)) if share == "output" else ((N, k + RANK), (RANK, K - RANK))
    weight, factor = (numbers(shape, kind, scale) for shape, scale in zip(shapes, (K**-0.5, 1.0), strict=True))
    return [weight[0], factor[0], *indices, *weight[1:], *factor[1:]]


def numbers(shape: tuple[int, int], kind: str, scale: float) -> list[Tensor]:
    """A random matrix in bfloat16, or as codes and their scales."""
    if kind == "float":
        return [scale * random(*shape, dtype=torch.bfloat16)]
    low, high = storage.RANGE[kind]
    codes = torch.randint(low, high + 1, shape, device="cuda", dtype=torch.int8)
    scales = torch.rand(storage.scales_shape(*shape, kind), device="cuda") + 0.5
    return [storage.pack(codes, kind), (scale / high * scales).bfloat16()]


def whole(factor: Tensor, channels: Tensor, share: str) -> Tensor:
    """The factor with its pivots' identity written out."""
    identity = torch.eye(RANK, dtype=factor.dtype, device="cuda")
    along = 0 if share == "output" else 1
    return torch.cat([identity, factor], dim=along).index_select(along, channels.long().argsort())


def restored(stored: list[Tensor], share: str) -> Tensor:
    weight, factor, labels, channels, *scales = stored
    weight, factor = (
        storage.dequantize(t, s).double() for t, s in zip((weight, factor), scales or (None, None), strict=True)
    )
    factor = whole(factor, channels, share)
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


def given(x: Tensor, stored: list[Tensor], share: str) -> tuple[Any, ...]:
    """Arguments of the kernel."""
    return x, *stored[:4], None, *(stored[4:] or (None, None)), share == "input"


def layer_figures(kind: str, keeps: tuple[float, ...], tokens_of: tuple[int, ...]) -> Iterator[Figure]:
    dense = [random(N, K, dtype=torch.bfloat16) for _ in range(sets_needed(2 * N * K))]
    for keep in keeps:
        for share in ("output", "input"):
            first = layer(keep, share, kind)
            nbytes = sum(t.nbytes for t in first)
            layers = [first, *(layer(keep, share, kind) for _ in range(sets_needed(nbytes) - 1))]
            exact = restored(first, share)
            for tokens in tokens_of:
                x = random(tokens, K, dtype=torch.bfloat16)
                runs = {"pycompress": [lambda s=s: shared_linear_cuda(*given(x, s, share)) for s in layers]}  # noqa: B023
                if kind == "float":
                    wholes = [(s[0], whole(s[1], s[3], share), s[2]) for s in layers]
                    runs["torch operations"] = [lambda s=s: plain(x, *s, share) for s in wholes]  # noqa: B023
                expected = linear(x.double(), exact)
                errors = {who: relative_error(calls[0](), expected) for who, calls in runs.items()}
                runs["cuBLAS dense bf16"] = [lambda w=w: linear(x, w) for w in dense]  # noqa: B023
                facts = {who: {"error": error} for who, error in errors.items()}
                group = f"{tokens} tokens" + ("" if kind == "float" else f", {kind}")
                yield from over_cublas("shared_linear", group, runs, facts, keep=keep, share=share, bytes=nbytes)


def shared_linear_figures() -> Iterator[Figure]:
    yield from layer_figures("float", KEEPS, TOKENS)


def codes_figures() -> Iterator[Figure]:
    for kind in ("int8", "int4"):
        yield from layer_figures(kind, KEEPS[::2], FEWER)


def whole_layer(kind: str, share: str) -> list[Tensor]:
    """A whole matrix in codes: weight, an empty factor, no labels, channels, and the scales of both."""
    weight = numbers((N, K), kind, K**-0.5)
    shape = (0, N) if share == "output" else (K, 0)
    factor = torch.empty(storage.stored_shape(*shape, kind), dtype=weight[0].dtype, device="cuda")
    scales = torch.empty(storage.scales_shape(*shape, kind), dtype=torch.bfloat16, device="cuda")
    channels = torch.randperm(N if share == "output" else K, device="cuda").short()
    return [weight[0], factor, channels, weight[1], scales]


def whole_figures() -> Iterator[Figure]:
    dense = [random(N, K, dtype=torch.bfloat16) for _ in range(sets_needed(2 * N * K))]
    for kind in ("int8", "int4"):
        for share in ("output", "input"):
            first = whole_layer(kind, share)
            nbytes = sum(t.nbytes for t in first)
            layers = [first, *(whole_layer(kind, share) for _ in range(sets_needed(nbytes) - 1))]
            weight = storage.dequantize(first[0], first[3]).double()
            exact = weight[first[2].long().argsort()] if share == "output" else weight[:, first[2].long().argsort()]
            for tokens in TOKENS:
                x = random(tokens, K, dtype=torch.bfloat16)

                def call(s: list[Tensor], x: Tensor = x, share: str = share) -> Tensor:
                    return shared_linear_cuda(x, s[0], s[1], None, s[2], None, s[3], s[4], share == "input")

                runs = {"pycompress": [lambda s=s: call(s) for s in layers]}
                error = relative_error(call(first), linear(x.double(), exact))
                runs["cuBLAS dense bf16"] = [lambda w=w: linear(x, w) for w in dense]  # noqa: B023
                facts = {"pycompress": {"error": error, "bytes": nbytes}}
                yield from over_cublas("shared_linear", f"{tokens} tokens, {kind}", runs, facts, keep=1, share=share)


# 2:4 -------------------------------------------------------------------------------------------------------------


def sparse24_figures() -> Iterator[Figure]:
    dense = [random(N, K, dtype=torch.bfloat16) for _ in range(sets_needed(2 * N * K))]
    pruned = [K**-0.5 * weight * two_of_four(weight) for weight in dense]
    layers = [pack24(weight) for weight in pruned]
    layers += [tuple(t.clone() for t in layer) for layer in layers]
    for tokens in TOKENS:
        x = random(tokens, K, dtype=torch.bfloat16)
        runs = {"pycompress": [lambda s=s: sparse24_linear(x, *s) for s in layers]}  # noqa: B023
        runs["cuBLAS dense bf16"] = [lambda w=w: linear(x, w) for w in pruned]  # noqa: B023
        error = relative_error(runs["pycompress"][0](), linear(x.double(), pruned[0].double()))
        for calls in runs.values():
            for call in calls:
                call()
        facts = {"pycompress": {"error": error, "bytes": sum(t.nbytes for t in layers[0])}}
        yield from over_cublas("sparse24_linear", f"{tokens} tokens", runs, facts)


def two_of_four(weight: Tensor) -> Tensor:
    """The two largest of every four, as a mask."""
    ranks = weight.abs().view(len(weight), -1, 4).argsort(-1).argsort(-1)
    return (ranks >= 2).view(weight.shape)


# A whole model ---------------------------------------------------------------------------------------------------


def random_layer(dense: torch.nn.Linear, keep: float) -> SharedLinear:
    shape = (dense.out_features, dense.in_features)
    clusters = clusters_for(keep, shape, "output")
    made = SharedLinear(
        shape, "output", clusters, RANK, True, "float", False, dtype=dense.weight.dtype, device=dense.weight.device
    )
    with torch.no_grad():
        made.weight.normal_(std=shape[1] ** -0.5)
        made.factor.normal_(std=0.1)
    made.labels.copy_(torch.randint(0, clusters, (shape[0],)))
    made.channels.copy_(torch.randperm(shape[0]))
    return made


def coded_layer(dense: torch.nn.Linear, kind: str) -> SharedLinear:
    """A whole matrix of random codes."""
    shape, rank = (dense.out_features, dense.in_features), dense.in_features
    made = SharedLinear(
        shape, "input", 0, rank, True, kind, False, dtype=dense.weight.dtype, device=dense.weight.device
    )
    stored = numbers(shape, kind, shape[1] ** -0.5)
    made.weight.copy_(stored[0])
    made.weight_scales.copy_(stored[1])
    made.channels.copy_(torch.randperm(rank))
    return made


def llama(keep: float | str | None, blocks: int = 32) -> PreTrainedModel:
    """A Llama-2-7B of random weights, its blocks' linears compressed to `keep`, or whole in codes of this kind."""
    config = LlamaConfig(max_position_embeddings=4096, num_hidden_layers=blocks)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if keep is not None:
        for block in model.model.layers:
            for part in (block.self_attn, block.mlp):
                for name, child in list(part.named_children()):
                    if isinstance(child, torch.nn.Linear):
                        made = coded_layer(child, keep) if isinstance(keep, str) else random_layer(child, keep)
                        setattr(part, name, made)
    return model


def model_figures() -> Iterator[Figure]:
    models = {"dense": llama(None), **{f"keep {keep}": llama(keep) for keep in KEEPS}}
    models |= {kind: llama(kind) for kind in ("int8", "int4")}
    for batch, prompt in ((1, 2048), (16, 128)):
        yield from speed_figures("Llama-2-7B shape", models, batch, prompt)


def compiled_figures() -> Iterator[Figure]:
    """Eight blocks, so that compiling ends in time; the head and the embedding are those of all 32."""
    for keep in (0.1, "int4", 0.5):
        name = keep if isinstance(keep, str) else f"keep {keep}"
        models = {"dense": llama(None, 8), name: llama(keep, 8)}
        yield from speed_figures("8 blocks of a Llama-2-7B, compiled", models, 1, 128, compile=True)


def speed_figures(
    op: str, models: dict[str, PreTrainedModel], batch: int, prompt: int, compile: bool = False
) -> Iterator[Figure]:
    speeds = compare_speed(models, batch, prompt, new_tokens=32, repeats=3, compile=compile)
    for who, speed in speeds.items():
        facts = {
            "prefill_tokens_per_s": round(speed.prefill_tokens_per_s, 1),
            "decode_tokens_per_s": round(speed.decode_tokens_per_s, 2),
            "decode_over_dense": round(speed.decode_tokens_per_s / speeds["dense"].decode_tokens_per_s, 3),
            "prefill_over_dense": round(speed.prefill_tokens_per_s / speeds["dense"].prefill_tokens_per_s, 3),
            "cuda_graph": speed.cuda_graph,
        }
        step = 1e6 * batch / speed.decode_tokens_per_s
        yield figure(op, f"batch {batch}, prompt {prompt}, one decode step", who, step, **facts)


def rounding_figures() -> Iterator[Figure]:
    """Rounding by GPTQ, and pruning by SparseGPT, of matrices whose inverse Hessian's factor is there."""
    for shape in ((4096, 4096), (4096, 11008)):
        w = 0.02 * random(*shape)
        factor = torch.eye(shape[1], device="cuda") + 0.01 * random(shape[1], shape[1]).triu()
        inverse = InverseHessian(torch.randperm(shape[1], device="cuda"), factor)
        runs: dict[str, Call] = {
            "int4, in the order of storage": lambda: quantize_sorted(w, "int4", inverse, torch.bfloat16),  # noqa: B023
            "int4": lambda: quantize(w, "int4", inverse, torch.bfloat16),  # noqa: B023
            "int8": lambda: quantize(w, "int8", inverse, torch.bfloat16),  # noqa: B023
            "float32 product of the same size": lambda: w @ factor,  # noqa: B023
        }
        for who, call in runs.items():
            yield figure("rounding", f"{shape[0]}x{shape[1]}", who, median_us(call, 3))


def compression_figures() -> Iterator[Figure]:
    """Clusters and correction of every linear of a Llama-7B shape from given Gram matrices of inputs, by shape."""
    batch, total = 8, 0.0
    for shape, count in (((4096, 4096), 128), ((11008, 4096), 64), ((4096, 11008), 32)):
        w, x = random(batch, *shape), random(shape[1], 2 * shape[1])
        h = x @ x.T
        k = clusters_for(0.2, shape, "output")

        def compress(w: Tensor = w, h: Tensor = h, k: int = k) -> None:
            g = gram(w, h)
            labels, _ = kmeans(gram=g, clusters=k)
            lowrank(g, RANK, labels, k)

        us = median_us(compress, 1)
        total += us * count / batch
        yield figure("compression", f"{batch} matrices {shape[0]}x{shape[1]}, {k} clusters", "pycompress", us)
    yield figure("compression", "all 224 linears of a Llama-7B shape, from batches of 8 a shape", "pycompress", total)


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


def flash_kmeans(folder: str) -> Any:
    """flash-kmeans from a wheel in `folder`, or None, with a line that says so."""
    wheels = sorted(Path(folder).glob("flash_kmeans-*.whl")) if folder else []
    if not wheels:
        print("flash-kmeans is left out: $GPU_WHEELS names no folder with its wheel", flush=True)
        return None
    target = tempfile.mkdtemp()
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(target)
    sys.path.append(target)
    from flash_kmeans import batch_kmeans_Euclid

    return batch_kmeans_Euclid


def lloyd_figures() -> Iterator[Figure]:
    k, iterations = 512, 10
    flash = flash_kmeans(os.environ.get("GPU_WHEELS", ""))
    for n, d in ((4096, 4096), (65536, 128), (11008, 4096)):
        x = random(n, d)
        seeds = torch.randperm(n, device="cuda")[:k]
        group = f"{n}x{d}, {k} clusters, {iterations} iterations"
        runs: dict[str, Callable[[], Tensor]] = {"torch operations": lambda: lloyd_in_torch(x, seeds, iterations)}  # noqa: B023
        runs["pycompress on points"] = lambda: lloyd_points(x[None], seeds[None], iterations)[0][0]  # noqa: B023
        if n <= 11008:
            g = gram(x)[None]
            runs["pycompress on Gram"] = lambda: lloyd(g, seeds[None], iterations)[0][0]  # noqa: B023
            eight = g.expand(8, -1, -1).contiguous() if n == d else None
            uniforms = torch.rand(1, k, 8, device="cuda")
            us = median_us(lambda: kmeans_plus_plus(g, uniforms), 3)  # noqa: B023
            yield figure("lloyd", f"seeding, {n} points, {k} clusters, 8 trials", "pycompress", us)
            if eight is not None:
                us = median_us(lambda: lloyd(eight, seeds.expand(8, -1), iterations), 3) / 8  # noqa: B023
                yield figure("lloyd", group, "pycompress on Gram, each of 8 in a batch", us)
        for dtype in (torch.float32, torch.bfloat16) if flash else ():
            start = x[seeds][None].to(dtype)
            runs[f"flash-kmeans {dtype}"] = lambda start=start: flash(
                x[None].to(start.dtype),  # noqa: B023
                n_clusters=k,
                max_iters=iterations,
                tol=0.0,
                init_centroids=start,
            )[0][0].long()
        for who, call in runs.items():
            try:
                us = median_us(call, 3)
                facts = {"us_an_iteration": round(us / iterations, 3), "inertia": inertia_of(x, call(), k)}
                yield figure("lloyd", group, who, us, **facts)
            except Exception as error:
                if "flash" not in who:
                    raise
                print(f"{who} failed on {group}: {error}", flush=True)
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            us = median_us(lambda: nearest_by_product(x, x[seeds]))  # noqa: B023
            yield figure("lloyd", f"{n}x{d}, {k} clusters, assignment alone", f"torch GEMM + argmin, {precision}", us)
        torch.set_float32_matmul_precision("highest")


def nearest_by_product(x: Tensor, centroids: Tensor) -> Tensor:
    return torch.addmm(centroids.square().sum(1), x, centroids.T, alpha=-2).argmin(1)


def lowrank_figures() -> Iterator[Figure]:
    rank, clusters = 128, 512
    w = random(N, K) * torch.arange(1, K + 1, device="cuda") ** -0.5
    g = gram(w)
    labels = torch.randint(0, clusters, (N,), device="cuda")
    exact = float(torch.linalg.eigvalsh(w.double() @ w.double().T)[:-rank].sum())
    runs: dict[str, Call] = {
        "pycompress": lambda: truncated_svd(w, rank)[0],
        "pycompress from a given Gram": lambda: lowrank(g, rank)[0],
        "pycompress from a given Gram, centred": lambda: lowrank(g, rank, labels, clusters)[0],
        "torch svd_lowrank": lambda: torch.svd_lowrank(w, q=rank + 8, niter=4)[0][:, :rank],
        "torch svd_lowrank, 2 iterations": lambda: torch.svd_lowrank(w, q=rank + 8, niter=2)[0][:, :rank],
        "torch eigh of the Gram": lambda: torch.linalg.eigh(g)[1][:, -rank:],
    }
    for who, call in runs.items():
        u = call().double()
        error = float((w.double() - u @ (u.T @ w.double())).square().sum())
        facts = {} if "centred" in who else {"error_over_exact_tail": error / exact}
        yield figure("lowrank", f"rank {rank} of {N}x{K}", who, median_us(call, 3), **facts)


# Seconds for all parts, and for each: the most important first.
BUDGET = float(os.environ.get("GPU_BUDGET", "150"))
PARTS: dict[str, tuple[Callable[[], Iterator[Figure]], float]] = {
    "shared_linear": (shared_linear_figures, 50),
    "whole": (whole_figures, 20),
    "codes": (codes_figures, 30),
    "model": (model_figures, 60),
    "sparse24": (sparse24_figures, 15),
    "rounding": (rounding_figures, 15),
    "compiled": (compiled_figures, 90),
    "lowrank": (lowrank_figures, 15),
    "compression": (compression_figures, 20),
    "gram": (gram_figures, 10),
    "lloyd": (lloyd_figures, 30),
}


def run_part(name: str, target: Path) -> None:
    torch.manual_seed(0)
    for entry in PARTS[name][0]():
        figures = [*(json.loads(target.read_text()) if target.exists() else []), entry]
        # What was measured stays measured, whatever happens to the rest.
        fresh = target.with_suffix(".new")
        fresh.write_text(json.dumps(figures))
        fresh.replace(target)


def main() -> int:
    target, wanted = Path(sys.argv[1]), sys.argv[2:] or list(PARTS)
    failed, ends = [], time.monotonic() + BUDGET
    # Forked before CUDA is touched, so that each has its own context and none imports torch again.
    fork = multiprocessing.get_context("fork")
    for name in wanted:
        process = fork.Process(target=run_part, args=(name, target))
        process.start()
        limit = max(0.0, min(PARTS[name][1], ends - time.monotonic()))
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            print(f"FAILED {name}: stopped after {limit:.0f} s", flush=True)
        elif process.exitcode:
            print(f"FAILED {name}: exit code {process.exitcode}, see above", flush=True)
        if process.exitcode:
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
