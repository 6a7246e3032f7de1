"""Sizes of the layers that a budget of FLOPs gives."""

import pytest

from sparseffn_jax.measure.costs import flops_ratio
from sparseffn_jax.sparsify.sizing import size_ffn

MODELS = {
    "gpt2": (768, 3072, False),
    "smollm2": (576, 1536, True),
    "tinyllama": (2048, 5632, True),
    "llama-7b": (4096, 11008, True),
    "mistral-7b": (4096, 14336, True),
}


@pytest.mark.parametrize(
    ("ratio", "bypass"),
    [(ratio, None) for ratio in (0.05, 0.1, 0.15, 0.2, 0.4, 0.6, 0.75, 0.8, 0.95)]
    + [(ratio, True) for ratio in (0.1, 0.2, 0.4, 0.6, 0.75)]
    + [(ratio, False) for ratio in (0.1, 0.4)],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_uses_its_budget_and_no_more(name, ratio, bypass):
    d_model, d_ff, gated = MODELS[name]
    config = size_ffn(d_model, d_ff, ratio, gated=gated, bias=not gated, bypass=bypass)
    assert 0.92 * ratio < flops_ratio(config) <= ratio
    width, rank = config.micro.core.width, config.spectral.rank if config.spectral else 0
    assert width % 16 == 0
    # Large products, in which units and components lie side by side, fill whole tiles.
    if gated:
        assert width < 896 or width % 64 == 0
        assert rank < 448 or rank % 64 == 0
    else:
        assert width + rank < 896 or (width + rank) % 64 == 0
    assert (config.spectral is not None) == (ratio <= 0.15 if bypass is None else bypass)
    if config.spectral is not None:
        assert config.spectral.is_bypass
        assert config.spectral.rank % 8 == 0


def test_a_bypass_grows_with_what_is_saved():
    ratios = (0.7, 0.6, 0.4, 0.2)
    ranks = [size_ffn(4096, 11008, ratio, bypass=True).spectral.rank for ratio in ratios]
    assert ranks == sorted(set(ranks))


@pytest.mark.parametrize("bypass", [None, True])
@pytest.mark.parametrize("gated", [False, True])
def test_no_budget_is_exceeded_by_a_small_layer(gated, bypass):
    for d_ff in range(8, 40):
        for ratio in (0.15, 0.3, 0.5, 0.7, 0.9):
            config = size_ffn(8, d_ff, ratio, gated=gated, bypass=bypass)
            assert flops_ratio(config) <= ratio
            assert config.micro.core.width >= 1


def test_all_flops_buy_the_dense_ffn():
    config = size_ffn(8, 40, 1.0)
    assert config.spectral is None
    assert config.micro.core.width == 40


@pytest.mark.parametrize(("ratio", "message"), [(0.0, "above 0"), (1.5, "1.5"), (0.02, "0.025")])
def test_a_budget_out_of_range_is_refused(ratio, message):
    with pytest.raises(ValueError, match=message):
        size_ffn(8, 40, ratio)
