"""A candidate on a live model against the forward of the same subnet built; block runs that sharing saved."""

import copy

import pytest
import torch
import transformers

from pycompress.search.evolution import Evolution, search
from pycompress.structural.encoding import Encoding, Order
from pycompress.structural.evaluator import Evaluator, Scorer
from pycompress.surgery.shrink import shrink

BLOCKS, BATCHES, WINDOW = 4, 1, 512


@pytest.fixture(scope="module")
def model():
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=BLOCKS,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def batches():
    ids = torch.randint(0, 4096, (BATCHES, 2, WINDOW), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": batch} for batch in ids]


@pytest.fixture(scope="module")
def subnets(model):
    """Nested and free masks of one size: the first run on views, the second on copies of a block's part."""
    encoding = Encoding(model)
    space = encoding.space(0.7)
    found = {}

    def never(candidates):
        found.setdefault("free", candidates[0])
        return [1.0] * len(candidates)

    search(space, never, Evolution(generations=1, population=2, mutations=1, crossovers=0, size=(0, 0)), progress=False)
    return {"nested": encoding.subnet(space.uniform()), "free": encoding.subnet(found["free"])}


@pytest.mark.parametrize("who", ["pycompress", "built subnet"])
@pytest.mark.parametrize("masks", ["nested", "free"])
def test_candidate(race, model, batches, subnets, masks, who):
    orders = [Order(mlp=torch.arange(2816)) for _ in range(BLOCKS)]
    evaluator = Evaluator(model, batches, orders, cache_bytes=0)
    built = copy.deepcopy(model)
    shrink(built, subnets[masks])
    losses = torch.nn.functional.cross_entropy

    def forward():
        total = 0.0
        for batch in batches:
            ids = batch["input_ids"]
            logits = built(ids, use_cache=False).logits[:, :-1]
            total += float(losses(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"))
        return float(torch.tensor(total / (BATCHES * 2 * (WINDOW - 1))).exp())

    runs = {"pycompress": lambda: evaluator.perplexity(subnets[masks]), "built subnet": forward}
    with torch.inference_mode():
        assert runs["pycompress"]() == pytest.approx(runs["built subnet"](), rel=1e-4)
    race(f"candidate of a Llama of 4 blocks, {masks} masks", who, torch.inference_mode()(runs[who]), rounds=4)


@pytest.mark.parametrize("masks", ["nested", "free"])
def test_sharing(race, masks):
    """A search of 80 candidates on a model of 12 tiny blocks: `skipped` of its block runs were shared."""
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    tiny = transformers.LlamaForCausalLM(config).eval()
    encoding = Encoding(tiny)
    ids = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    evaluator = Evaluator(tiny, [{"input_ids": ids}])
    scorer = Scorer(evaluator, encoding)
    evolution = Evolution(population=20, mutations=10, crossovers=6, generations=4, masks=masks)
    space = encoding.space(0.8)

    def run():
        search(space, lambda candidates: map(scorer, candidates), evolution, progress=False)

    run()
    facts = {"block_runs": evaluator.block_runs, "skipped": evaluator.block_skips}
    print(masks, facts)
    race(f"search of 80 candidates, {masks} masks", "pycompress", run, rounds=1, **facts)
