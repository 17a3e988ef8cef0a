"""The maths of one matrix against float64 numpy and scipy."""

import numpy as np
import pytest
import torch

from pycompress.formats.packed import pack_shared
from pycompress.methods import Statistics
from pycompress.methods._channels import Channels, Sharing, stored_bytes
from pycompress.methods.swsc import SWSC, FormChoice, build, candidates, check, choose, compress, curve, refine


def problem(n, k, tokens=400, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((n, k)) @ np.diag(rng.random(k))
    x = rng.standard_normal((tokens, k)) @ rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k))
    gram = x.T @ x / tokens
    return torch.tensor(weight, dtype=torch.float32), torch.tensor(gram, dtype=torch.float32)


def output_error(weight, gram, approximation):
    difference = weight.double() - approximation.double()
    return float(
        (difference @ gram.double() * difference).sum() / (weight.double() @ gram.double() * weight.double()).sum()
    )


def damped(gram, damping):
    return gram / gram.diagonal().mean() + damping * torch.eye(len(gram))


@pytest.mark.parametrize(("n", "k"), [(96, 40), (40, 96), (63, 63)])
def test_correction_is_the_truncated_svd_of_the_whitened_matrix(n, k):
    weight, gram = problem(n, k)
    metric = damped(gram, 1e-3).double().numpy()
    root = np.linalg.cholesky(metric)
    scale = np.linalg.svd(weight.double().numpy() @ root, compute_uv=False)
    channels = Channels(weight, gram)
    u, v = channels.correction(weight, 12)
    exact = (scale[12:] ** 2).sum() / (scale**2).sum()
    assert output_error(weight, torch.tensor(metric), u @ v) == pytest.approx(exact, rel=1e-3)
    assert float(channels.tail(Sharing("output"))[12]) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("share", ["output", "input"])
def test_centroids_solve_the_least_squares_problem_of_their_labels(share):
    weight, gram = problem(48, 60)
    channels = Channels(weight, gram)
    sharing = channels.cluster(share, 7, seed=0)
    root = np.linalg.cholesky(damped(gram, 1e-3).double().numpy())
    member = np.eye(7)[sharing.labels.numpy()]
    target = weight.double().numpy() @ root
    if share == "output":
        solved = np.linalg.lstsq(member, target, rcond=None)[0] @ np.linalg.inv(root)
    else:
        solved = np.linalg.lstsq((member.T @ root).T, target.T, rcond=None)[0]
    np.testing.assert_allclose(channels.centroids(sharing).numpy(), solved, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("share", ["output", "input"])
def test_tail_is_the_error_of_the_matrix_that_is_built(share):
    weight, gram = problem(72, 56)
    channels = Channels(weight, gram)
    sharing = channels.cluster(share, 9, seed=0)
    tail = channels.tail(sharing)
    centroids = channels.centroids(sharing)
    for rank in (0, 5, 20):
        u, v = channels.correction(weight - channels.restore(sharing, centroids), rank)
        packed = pack_shared(share, centroids, u, v, sharing.labels, torch.float32)
        error = output_error(weight, damped(gram, 1e-3), packed.unpack())
        assert float(tail[rank]) == pytest.approx(error, rel=1e-2)
        assert channels.error(packed.unpack()) == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("clusters", [0, 6])
def test_stored_bytes_are_those_of_the_packed_tensors(share, clusters, pivot):
    weight, gram = problem(50, 70)
    channels = Channels(weight, gram)
    sharing = channels.cluster(share, clusters, seed=0)
    for rank in (1, 13):
        u, v = channels.correction(channels.residual(sharing), rank)
        packed = pack_shared(share, channels.centroids(sharing), u, v, sharing.labels, torch.bfloat16, pivot)
        assert int(stored_bytes(sharing, torch.tensor(rank), (50, 70), 2, pivot)) == packed.nbytes


@pytest.mark.parametrize("keep", [0.1, 0.4, 0.8])
def test_the_choice_is_the_best_of_its_candidates_and_fits(keep):
    weight, gram = problem(64, 96)
    config = SWSC(keep, weighting="inputs", allocation="uniform")
    packed = compress(weight, Statistics(gram, 400), config, None)
    assert packed.nbytes <= keep * weight.numel() * 4
    chosen = output_error(weight, damped(gram, 1e-3), packed.unpack())
    fitting = 0
    for share, clusters in (("output", 0), ("output", 8), ("input", 12)):
        config = SWSC(keep, weighting="inputs", share=share, clusters=clusters, allocation="uniform")
        try:
            other = compress(weight, Statistics(gram, 400), config, None)
        except ValueError:
            continue  # these clusters alone exceed the budget
        fitting += 1
        assert chosen <= output_error(weight, damped(gram, 1e-3), other.unpack()) * 1.001
    assert fitting


def test_curve_ends_at_the_dense_matrix():
    weight, gram = problem(40, 30)
    found = curve(weight, Statistics(gram, 400), SWSC(0.5))
    assert int(found.nbytes[-1]) == weight.numel() * 4
    assert float(found.error[-1]) == 0
    assert found.energy == pytest.approx(float((weight @ gram * weight).sum()), rel=1e-2)


def test_a_full_budget_leaves_the_matrix_dense():
    weight, gram = problem(40, 30)
    assert compress(weight, Statistics(gram, 400), SWSC(1.0), None) is None


def test_published_method_is_kmeans_then_svd_of_the_residual():
    """Against scikit-learn's K-means and numpy's SVD: the same objective to 1%."""
    from sklearn.cluster import KMeans

    weight = problem(200, 40)[0]
    packed = compress(weight, None, SWSC(weighting="none", share="output", clusters=20, rank=6, pivot=False), None)
    points = weight.double().numpy()
    found = KMeans(20, n_init=5, random_state=0).fit(points)
    scale = np.linalg.svd(points - found.cluster_centers_[found.labels_], compute_uv=False)
    ours = float((weight - packed.unpack()).double().square().sum())
    assert ours <= (scale[6:] ** 2).sum() * 1.02
    assert (packed.clusters, packed.rank, packed.channels) == (20, 6, None)


@pytest.mark.parametrize(
    "gram",
    [
        torch.zeros(30, 30),
        torch.diag(torch.cat([torch.zeros(10), torch.ones(20)])),
        torch.ones(30, 30),
    ],
    ids=["no input seen", "ten dead channels", "one token"],
)
@pytest.mark.parametrize("share", ["output", "input", "auto"])
def test_singular_grams_are_damped_not_an_exception(gram, share):
    weight = problem(40, 30)[0]
    packed = compress(
        weight, Statistics(gram, 400), SWSC(0.5, share=share, clusters=None if share == "auto" else 4), None
    )
    assert bool(torch.isfinite(packed.unpack()).all())


def test_a_dead_channel_costs_the_live_ones_nothing():
    weight, gram = problem(40, 30)
    gram[3], gram[:, 3] = 0, 0
    weight[:, 3] = 100.0
    packed = compress(weight, Statistics(gram, 400), SWSC(0.6, share="output", clusters=0), None)
    without = weight.clone()
    without[:, 3] = 0
    reference = compress(without, Statistics(gram, 400), SWSC(0.6, share="output", clusters=0), None)
    assert output_error(weight, gram, packed.unpack()) <= output_error(without, gram, reference.unpack()) * 1.5 + 1e-6


def test_more_clusters_than_channels_are_refused():
    with pytest.raises(ValueError, match="clusters must be at most the number of channels"):
        check((40, 30), torch.float32, SWSC(share="output", clusters=41, rank=1))


def test_equal_runs_give_equal_bits():
    weight, gram = problem(64, 96)
    first, second = (compress(weight, Statistics(gram, 400), SWSC(0.4), None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors().values(), second.tensors().values(), strict=True))


def test_choose_and_build_agree_on_the_error():
    weight, gram = problem(64, 96)
    channels = Channels(weight, gram)
    choice = choose(channels, weight, SWSC(0.5), int(0.5 * weight.numel() * 4), candidates((64, 96), SWSC(0.5)))
    packed = build(channels, choice, torch.float32, SWSC(0.5))
    assert channels.error(packed.unpack()) == pytest.approx(choice.error, rel=2e-2)


@pytest.mark.parametrize("share", ["output", "input"])
def test_refinement_lowers_the_error_where_clusters_and_rank_overlap(share):
    """Clusters planted on top of a strong low-rank part: alternation finds what one pass of each does not."""
    rng = np.random.default_rng(0)
    n, k, r, clusters = 96, 64, 4, 6
    strong = 30 * rng.standard_normal((n, r)) @ rng.standard_normal((r, k)) / r
    labels = rng.integers(clusters, size=n if share == "output" else k)
    centroids = rng.standard_normal((clusters, k if share == "output" else n))
    planted = centroids[labels] if share == "output" else centroids[labels].T
    weight = torch.tensor(strong + planted + 0.05 * rng.standard_normal((n, k)), dtype=torch.float32)
    channels = Channels(weight)
    sharing = channels.cluster(share, clusters, seed=0)
    first = FormChoice(sharing, r, float(channels.tail(sharing)[r]))
    refined = refine(channels, first, seed=0)
    built = channels.error(build(channels, refined, torch.float32, SWSC()).unpack())
    assert built == pytest.approx(refined.error, rel=1e-2)
    assert refined.error < 0.5 * first.error


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("keep", [0.12, 0.3])
def test_codes_fit_the_budget_and_are_counted_as_stored(kind, share, keep):
    weight, gram = problem(96, 128)
    config = SWSC(keep, weighting="inputs", share=share, allocation="uniform", storage=kind)
    packed = compress(weight.bfloat16(), Statistics(gram, 400), config, None)
    assert packed.storage in config.kinds
    assert packed.nbytes <= keep * weight.numel() * 2
    held = stored_bytes(Sharing(share, packed.clusters), torch.tensor(packed.rank), (96, 128), 2, True, packed.storage)
    assert packed.nbytes == int(held) == sum(t.nbytes for t in packed.tensors().values())


def test_more_numbers_in_fewer_bits_beat_fewer_in_more():
    """At an eighth of the bytes int8 has twice the rank of bfloat16, and this spectrum falls slowly."""
    weight, gram = problem(128, 128)
    errors = {}
    for kind in (None, "int8"):
        config = SWSC(0.25, weighting="inputs", share="output", clusters=0, allocation="uniform", storage=kind)
        packed = compress(weight.bfloat16(), Statistics(gram, 400), config, None)
        errors[kind] = output_error(weight, damped(gram, 1e-3), packed.unpack())
    assert errors["int8"] < 0.6 * errors[None]


def test_codes_at_full_rank_are_the_rounded_matrix():
    """Past the bytes of full rank the error is that of rounding alone, and below that of rounding to nearest."""
    weight, gram = problem(64, 128, seed=3)
    config = SWSC(0.35, weighting="inputs", share="output", clusters=0, allocation="uniform", storage="int4")
    packed = compress(weight.bfloat16(), Statistics(gram, 400), config, None)
    assert packed.rank == 64
    groups = weight.bfloat16().float().view(64, 2, 64)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    nearest = ((groups / scale).round() * scale).view(64, 128)
    assert output_error(weight, gram, packed.unpack()) < 0.7 * output_error(weight, gram, nearest)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (SWSC(storage="bf16"), (64, 64), "is for bfloat16 weights, got torch.float32"),
        (SWSC(storage="int4"), (64, 48), "needs inputs in multiples of 32, got 48"),
    ],
)
def test_a_storage_that_does_not_fit_is_refused(config, shape, message):
    with pytest.raises(ValueError, match=message):
        check(shape, torch.float32, config)
