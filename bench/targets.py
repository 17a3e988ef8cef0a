"""What is compared with what, and the ratio that was asked for: the one place where targets stand.

A missed target stays here, and docs/performance.md shows it as missed.
"""

from __future__ import annotations

from dataclasses import dataclass

# Not a contestant: the time that the machine's read rate or product peak allows.
LIMIT = "the limit"


@dataclass(frozen=True)
class Comparison:
    """The time of `peer` over that of ours.

    `ours` is a regular expression for "group: contestant", as the results name them, `peer` the other contestant of
    that group, or LIMIT: then the comparison is the share of the machine's limit. `asked` is the least ratio, one for
    all or by keep; by keep it is also drawn, and empty it is drawn without a target.
    """

    work: str
    device: str
    ours: str
    peer: str
    asked: float | dict[str, float]


def keeps(half: float, fifth: float, tenth: float) -> dict[str, float]:
    return {"0.5": half, "0.2": fifth, "0.1": tenth}


SHARED = r"bf16, {} tokens?, 4096x11008, keep [\d.]+, share (output|input): pycompress"
CODED = r"bf16, 1 token, 4096x11008: (pycompress|int4, whole matrix)"
SUBNET = r"bf16, {} tokens?, 4096x11008, {}: pycompress"
SPARSE = r"bf16, {} tokens?, 4096x11008, {}: pycompress"
DECODE = r"decode of \d+ tokens, Llama of 1.1B in bf16: keep [\d.]+"
ZEROS = r"{} of \d+ tokens, Llama of 1.1B in bf16: {}"
PRUNED = r"{} of \d+ tokens, Llama of 1.1B in bf16: pruned, keep [\d.]+{}"
KMEANS = r"k-means, 4096 points of 4096, k=512: pycompress"
LLOYD = r"\d+ Lloyd iterations, 4096 points of 4096, k=512: pycompress"
LOWRANK = r"rank 128 of 4096x11008.*: pycompress"
ON_GPU = r"shared_linear, {} tokens, keep [\d.]+, share (output|input): pycompress"
SPARSE_ON_GPU = r"sparse24_linear, {} tokens.*: pycompress"
LLOYD_ON_GPU = r"lloyd, 4096x4096, 512 clusters, .*: pycompress on Gram"
LOWRANK_ON_GPU = r"lowrank, rank 128 of 4096x11008.*: pycompress"

COMPARISONS = (
    Comparison("shared_linear, 1 token", "cpu", SHARED.format(1), "dense F.linear", keeps(4, 10, 16)),
    Comparison("shared_linear, 1 token", "cpu", SHARED.format(1), "dense by our kernel", keeps(1.8, 4, 7)),
    Comparison("shared_linear, 1 token", "cpu", SHARED.format(1), LIMIT, 0.8),
    Comparison("shared_linear, 128 tokens", "cpu", SHARED.format(128), "dense F.linear", keeps(1.7, 4, 7)),
    Comparison("shared_linear, 128 tokens", "cpu", SHARED.format(128), "dense by our kernel", {}),
    Comparison("shared_linear in int4, 1 token", "cpu", CODED, "bitsandbytes NF4", 1),
    Comparison("subnet_linear, all, 1 token", "cpu", SUBNET.format(1, "all"), "dense F.linear", 2),
    Comparison("subnet_linear, all, 1 token", "cpu", SUBNET.format(1, "all"), LIMIT, 0.8),
    Comparison("subnet_linear, all, 128 tokens", "cpu", SUBNET.format(128, "all"), "dense F.linear", 1),
    Comparison("subnet_linear, half", "cpu", SUBNET.format(r"\d+", "half .*"), "all by our kernel", 1.8),
    Comparison("2:4, 1 token", "cpu", SPARSE.format(1, "2:4"), "dense, our kernel", 1.5),
    Comparison("2:4, 1 token", "cpu", SPARSE.format(1, "2:4"), "dense F.linear", 3),
    *(
        Comparison("2:4, 128 tokens", "cpu", SPARSE.format(128, "2:4"), peer, 1)
        for peer in ("dense, our kernel", "dense F.linear")
    ),
    Comparison("bitmap, 1 token", "cpu", SPARSE.format(1, "70% zeros"), "dense, our kernel", 1),
    Comparison("bitmap, 1 token", "cpu", SPARSE.format(1, "80% zeros"), "dense, our kernel", 2.5),
    *(
        Comparison(f"{phase}, dense", "cpu", ZEROS.format(phase, "dense, our kernel"), "dense F.linear", {})
        for phase in ("decode", "prefill")
    ),
    Comparison("decode", "cpu", DECODE, "dense, our kernel", keeps(1.8, 3.5, 5)),
    Comparison("decode", "cpu", DECODE, "dense F.linear", {}),
    Comparison("compiled decode", "cpu", f"compiled {DECODE}", "dense, our kernel", {"0.1": 5}),
    *(
        Comparison(f"{phase}, pruned", "cpu", PRUNED.format(phase, kernel), peer, {"0.8": 1.15, "0.5": 1.7, "0.3": 2.6})
        for phase in ("decode", "prefill")
        for kernel, peer in (
            (", our kernel", "dense, our kernel"),
            ("", "dense F.linear"),
            (", our kernel", "dense F.linear"),
        )
    ),
    *(
        Comparison("decode, 2:4", "cpu", ZEROS.format("decode", "2:4"), peer, 1.35)
        for peer in ("dense, our kernel", "dense F.linear")
    ),
    Comparison("decode, 80% zeros", "cpu", ZEROS.format("decode", "80% zeros"), "dense, our kernel", {}),
    # At most 1.15 times the forward of the subnet that a candidate of the search stands for.
    Comparison("candidate", "cpu", r"candidate of .* masks: pycompress", "built subnet", 1 / 1.15),
    Comparison("Gram and k-means, k=512", "cpu", KMEANS, "scikit-learn", 30),
    Comparison("Gram and k-means, k=512", "cpu", KMEANS, "faiss", 5),
    Comparison("Lloyd, an iteration, k=512", "cpu", LLOYD, "pycompress on points", 6),
    Comparison("rank 128 of 4096x11008", "cpu", LOWRANK, "torch svd_lowrank", 1.5),
    Comparison("rank 128 of 4096x11008", "cpu", LOWRANK, "torch svd", 20),
    Comparison("shared_linear, 1 token", "gpu", ON_GPU.format(1), "cuBLAS dense bf16", keeps(1.9, 3.8, 6)),
    Comparison("shared_linear, 16 tokens", "gpu", ON_GPU.format(16), "cuBLAS dense bf16", keeps(1.8, 3.5, 5.5)),
    Comparison("shared_linear, 256 tokens", "gpu", ON_GPU.format(256), "cuBLAS dense bf16", keeps(1.8, 4.2, 6.5)),
    Comparison("shared_linear, 2048 tokens", "gpu", ON_GPU.format(2048), "cuBLAS dense bf16", keeps(1.9, 4.6, 8.5)),
    Comparison("2:4, 1 token", "gpu", SPARSE_ON_GPU.format(1), "cuBLAS dense bf16", 1.6),
    Comparison("2:4, 2048 tokens", "gpu", SPARSE_ON_GPU.format(2048), "cuBLAS dense bf16", 1.15),
    Comparison("Lloyd, k=512", "gpu", LLOYD_ON_GPU, "torch operations", 3),
    Comparison("rank 128 of 4096x11008", "gpu", LOWRANK_ON_GPU, "torch svd_lowrank", 5),
)
