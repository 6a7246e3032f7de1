"""The fair comparison: what each side trains on, from whom it learns, and what is held out."""

import dataclasses

import jax
import numpy as np
import pytest

from sparseffn_jax.bench import comparison
from sparseffn_jax.bench.comparison import Comparison, ComparisonSettings, load_dense
from sparseffn_jax.bench.fairness import check_comparable
from sparseffn_jax.checkpoints.pretrained import save_pretrained
from sparseffn_jax.sparsify.convert import sparsify
from sparseffn_jax.sparsify.sizing import size_model
from sparseffn_jax.train.data import load_windows


@pytest.fixture(scope="module")
def settings(tiny, tmp_path_factory):
    return ComparisonSettings(
        **tiny, out=tmp_path_factory.mktemp("comparison"), steps=2, distill_steps=0, batch_size=2,
        calibration_windows=32, evaluation_windows=4, learning_rate=2e-3,
        dense_learning_rate=1e-4, seed=5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sides(settings):
    """The comparison, and a sparse model with its parameters."""
    ours = Comparison(settings, load_dense(settings.model), timed_tokens=8, timing_seed=0)
    config = size_model(ours.dense.spec, 0.5, bypass=True)
    calibration = ours.calibration[:, :-1]
    return ours, *sparsify(ours.model, ours.dense.params, config, calibration, distill_steps=0)


def test_windows_are_drawn_by_the_seed(settings, sides):
    ours, *_ = sides
    whole = load_windows(settings.text, ours.tokenizer, 16)
    rng = np.random.default_rng(settings.seed)
    held_out = whole.validation[rng.permutation(len(whole.validation))[:4]]
    np.testing.assert_array_equal(ours.windows.validation, held_out)
    calibration = whole.train[rng.permutation(len(whole.train))[:32]]
    np.testing.assert_array_equal(ours.calibration, calibration)
    np.testing.assert_array_equal(ours.windows.train, whole.train)


def test_both_read_the_same_at_their_own_rates_and_targets(settings, sides, monkeypatch):
    ours, model, params = sides
    calls, train = [], comparison.train

    def spy(*arguments, **options):
        calls.append((arguments, options))
        return train(*arguments, **options)

    monkeypatch.setattr(comparison, "train", spy)
    dense, sparse = ours.tune_dense(), ours.tune("sparse", model, params)
    check_comparable("sparse", sparse.conditions, "dense", dense.conditions)
    (dense_config, sparse_config) = (arguments[3] for arguments, _ in calls)
    assert (dense_config.learning_rate, sparse_config.learning_rate) == (1e-4, 2e-3)
    assert sparse_config == dataclasses.replace(
        dense_config, learning_rate=2e-3, ffn_learning_rate=2e-3, distill_weight=1.0
    )
    (_, options_of_dense), (_, options_of_sparse) = calls
    assert options_of_dense["teacher"] is None
    teacher, teacher_params = options_of_sparse["teacher"]
    assert teacher is ours.model
    # Unless another is given, the teacher is the pretrained model, not the fine-tuned one.
    jax.tree.map(np.testing.assert_array_equal, teacher_params, load_dense(settings.model).params)
    ours.tune("sparse", model, params, teacher=dense.params)
    assert calls[-1][1]["teacher"] == (ours.model, dense.params)
    assert [step for step, _ in sparse.curve] == [1, 2]
    assert sparse.loss == ours.loss(model, sparse.params)
    shorter = ours.tune("sparse", model, params, steps=1)
    with pytest.raises(ValueError, match="steps"):
        check_comparable("sparse", shorter.conditions, "dense", dense.conditions)


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_a_sparse_model_may_learn_from_the_text_too(settings, sides, monkeypatch, weight):
    ours, model, params = sides
    asked = []

    def train(*arguments, teacher, **_):
        asked.append((arguments[3].distill_weight, teacher is not None))
        raise InterruptedError

    monkeypatch.setattr(comparison, "train", train)
    monkeypatch.setattr(ours, "_settings", dataclasses.replace(settings, distill_weight=weight))
    for tune in (ours.tune_dense, lambda: ours.tune("sparse", model, params)):
        with pytest.raises(InterruptedError):
            tune()
    assert asked == [(0.0, False), (weight, weight > 0.0)]


def test_a_sparse_model_is_refused(sides, tmp_path):
    ours, model, params = sides
    save_pretrained(tmp_path / "sparse", model, params, tokenizer=ours.tokenizer)
    with pytest.raises(ValueError, match="is sparse already: give a dense model"):
        load_dense(str(tmp_path / "sparse"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"calibration_windows": 0}, "calibration_windows=0 must be at least 1"),
        ({"distill_steps": -1}, "distill_steps=-1 must not be negative"),
        ({"dense_learning_rate": 0.0}, "dense_learning_rate=0.0 must be positive"),
        ({"distill_weight": 1.5}, "distill_weight=1.5 must be between 0 and 1"),
    ],
)
def test_bad_settings_are_refused(settings, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(settings, **change)


def test_a_window_beyond_the_models_positions_is_refused(settings):
    dense = load_dense(settings.model)
    settings = dataclasses.replace(settings, window=17)
    with pytest.raises(ValueError, match="window=17 must lie between 1 and the model's n_pos"):
        Comparison(settings, dense, timed_tokens=8, timing_seed=0)
