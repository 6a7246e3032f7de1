import dataclasses

import numpy as np
import pytest

from sparseffn_jax.bench.fairness import Conditions, check_comparable, token_hash

DENSE = Conditions("a1", "b2", batch_size=8, steps=100, precision="float32")


def test_equal_conditions_are_comparable():
    check_comparable("low_rank", dataclasses.replace(DENSE), "dense", DENSE)


@pytest.mark.parametrize(
    "change",
    [
        {"data_hash": "a2"},
        {"evaluation_hash": "b3"},
        {"batch_size": 4},
        {"steps": 99},
        {"precision": "bfloat16"},
        {"steps": 99, "batch_size": 4},
    ],
)
def test_a_comparison_is_refused_and_says_what_differs(change):
    with pytest.raises(ValueError, match="low_rank and dense cannot be compared") as refusal:
        check_comparable("low_rank", dataclasses.replace(DENSE, **change), "dense", DENSE)
    for field in dataclasses.asdict(DENSE):
        assert (field in str(refusal.value)) == (field in change)


def test_the_hash_is_of_tokens_and_windows():
    tokens = np.arange(12, dtype=np.int32)
    assert token_hash(tokens) == token_hash(tokens.astype(np.int64))
    assert token_hash(tokens.reshape(3, 4)) != token_hash(tokens.reshape(4, 3))
    assert token_hash(tokens) != token_hash(tokens[::-1])
