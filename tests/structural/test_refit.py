"""Refitting readers from the dense inputs' moments, against float64 least squares on inputs caught by a hook."""

import numpy as np
import pytest
import scipy.linalg
import torch

from pycompress.calibration.stream import Stream
from pycompress.checkpoint import Checkpoint
from pycompress.structural.least_squares import DAMPINGS
from pycompress.structural.refit import HELD_OUT, Moments, Readers, refit_linears, refit_reader

PATHS = {"o": "self_attn.o_proj", "down": "mlp.down_proj"}
BATCHES = [{"input_ids": torch.randint(0, 96, (1, length))} for length in (40, 24, 32, 24)]


def stage(folder=None):
    return Checkpoint(folder, {"model": "tiny"}, []).stage([])


def caught(model, block, path):
    """What the linear reads, a float64 tensor a batch."""
    seen = []
    linear = model.model.layers[block].get_submodule(path)
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1).double()))
    with torch.inference_mode():
        for batch in BATCHES:
            model(**batch)
    handle.remove()
    return seen


def stream(model):
    return Stream.open(model, list(model.model.layers), BATCHES)


@pytest.mark.parametrize("order", [[0, 1], [1]])
def test_moments_are_sums_over_the_dense_inputs(tiny_model, order):
    model = tiny_model("LlamaForCausalLM").float()
    readers = Readers(stream(model), PATHS, stage())
    for block in order:
        for role, moments in readers.at(block).items():
            # Three of the four batches begin within the first three quarters of the tokens.
            *fitted, held_out = caught(model, block, PATHS[role])
            x = torch.cat(fitted)
            torch.testing.assert_close(moments.fitted.double(), x.T @ x, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(moments.held_out.double(), held_out.T @ held_out, rtol=1e-4, atol=1e-4)


def test_moments_on_file_are_not_measured_again(tiny_model, tmp_path):
    model = tiny_model("LlamaForCausalLM")
    first = [Readers(stream(model), PATHS, stage(tmp_path)).at(0)]
    again = stream(model)
    again.statistics = None
    second = [Readers(again, PATHS, stage(tmp_path)).at(0)]
    for before, after in zip(first, second, strict=True):
        for role in PATHS:
            assert torch.equal(before[role].fitted, after[role].fitted)
            assert torch.equal(before[role].held_out, after[role].held_out)


def test_one_batch_holds_nothing_out(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    alone = Stream.open(model, list(model.model.layers), BATCHES[:1])
    assert Readers(alone, PATHS, stage()).at(0)["down"].held_out is None


@pytest.mark.parametrize("bias", [False, True])
def test_a_reader_is_refitted_with_the_damping_that_held_out_tokens_choose(bias):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    fitted, held_out = (torch.randn(t, 24, generator=generator, dtype=torch.float64) @ mixing for t in (40, 30))
    whole = torch.randn(10, 24, generator=generator, dtype=torch.float64)
    columns = torch.arange(0, 24, 2)
    linear = torch.nn.Linear(len(columns), 10, bias=bias)
    moments = Moments((fitted.T @ fitted).float(), (held_out.T @ held_out).float())
    error = refit_reader(linear, whole.float(), moments, columns)

    def solved(x, damping):
        kept = x[:, columns].numpy()
        ridge = np.sqrt(damping * (kept**2).sum() / kept.shape[1])
        left = np.concatenate([kept, ridge * np.eye(len(columns))])
        right = np.concatenate([(x @ whole.T).numpy(), ridge * whole[:, columns].T.numpy()])
        return scipy.linalg.lstsq(left, right)[0].T

    def missed(x, weight):
        return float(np.linalg.norm(x[:, columns].numpy() @ weight.T - (x @ whole.T).numpy()))

    chosen = min(DAMPINGS, key=lambda damping: missed(held_out, solved(fitted, damping)))
    both = torch.cat([fitted, held_out])
    expected = solved(both, chosen)
    torch.testing.assert_close(linear.weight.detach().double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-4)
    assert error == pytest.approx(missed(both, expected) / float((both @ whole.T).norm()), rel=1e-3)


@pytest.mark.parametrize("chunk", [8, 40])
def test_linears_are_refitted_with_the_damping_that_held_out_tokens_choose(chunk):
    """Few tokens of noisy aims: what fits them best is not what serves others."""
    generator = torch.Generator().manual_seed(3)
    tokens, inputs = 80, 48
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    start = torch.randn(6, inputs, generator=generator, dtype=torch.float64)
    y = x @ start.T + 4 * torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    linear = torch.nn.Linear(inputs, 6, bias=False)
    linear.weight = torch.nn.Parameter(start.float())
    pairs = [(a.float(), (b.float(),)) for a, b in zip(x.split(chunk), y.split(chunk), strict=True)]
    refit_linears([linear], pairs, tokens)

    def solved(count, damping):
        ridge = np.sqrt(damping * float(x[:count].square().sum()) / inputs)
        left = np.concatenate([x[:count].numpy(), ridge * np.eye(inputs)])
        right = np.concatenate([y[:count].numpy(), ridge * start.T.numpy()])
        return scipy.linalg.lstsq(left, right)[0].T

    # Chunks that begin in the first three quarters are fitted, the others held out.
    first = sum(chunk for begin in range(0, tokens, chunk) if begin < (1 - HELD_OUT) * tokens)
    missed = {d: np.linalg.norm(x[first:].numpy() @ solved(first, d).T - y[first:].numpy()) for d in DAMPINGS}
    chosen = min(missed, key=missed.get) if first < tokens else 1e-2
    assert (chosen != 1e-2) == (first < tokens)
    np.testing.assert_allclose(linear.weight.detach().double().numpy(), solved(tokens, chosen), rtol=1e-3, atol=1e-4)
