"""The comparison as a whole, on a clock that does not tick: what is sized, kept and refused."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from sparseffn_jax.bench import comparison, quality
from sparseffn_jax.bench.peers import PEERS, Searched
from sparseffn_jax.bench.quality import QualitySettings, run_quality
from sparseffn_jax.config import SparseFFNConfig
from sparseffn_jax.measure.costs import flops_ratio
from sparseffn_jax.train.run_lock import RunFolderError, hold_run_folder


@pytest.fixture(scope="module")
def settings(tiny, tmp_path_factory):
    return QualitySettings(
        **tiny,
        out=tmp_path_factory.mktemp("quality"),
        targets=(2.0,),
        methods=("narrow", "Monarch"),
        steps=2,
        batch_size=2,
        calibration_windows=32,
        distill_steps=2,
        evaluation_windows=4,
        timed_tokens=8,
    )


def run(settings):
    output = io.StringIO()
    return run_quality(settings, Console(file=output, width=140)), output.getvalue()


def test_a_stopped_run_goes_on_and_ends_with_a_complete_table(settings, exact_clock):
    first, _ = run(dataclasses.replace(settings, methods=("narrow",)))
    assert [(p["method"], p["target"]) for p in first["points"]] == [("narrow", 2)]
    whole, printed = run(settings)
    # JSON knows no tuples.
    assert whole["points"][:1] == json.loads(json.dumps(first["points"]))
    assert whole["dense"] == first["dense"]
    assert [p["method"] for p in whole["points"]] == ["narrow", "Monarch"]
    assert json.loads(json.dumps(whole)) == json.loads((settings.out / "quality.json").read_text())
    for point in whole["points"]:
        assert point["target"] <= point["speedup"]
        assert point["realised"] == pytest.approx(point["speedup"] * point["flops_ratio"])
        assert point["conditions"] == whole["dense"]["conditions"]
        assert np.isfinite([point["loss"], point["converted_loss"]]).all()
        assert point["method"] in printed
    picture = settings.out / "quality_at_equal_time.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    # Checkpoints of finished points only fill the disk.
    assert not list((settings.out / "training").iterdir())

    with pytest.raises(ValueError, match=r"made with other settings \(steps\)"):
        run(dataclasses.replace(settings, steps=3))


def test_methods_with_the_same_layers_are_given_the_same_size(settings, exact_clock, monkeypatch):
    """Even if the clock says something else each time."""
    rng, exact = np.random.default_rng(0), comparison.time_stacks

    def unsteady(baseline, candidate, x, **how):
        return exact(baseline, candidate * rng.uniform(0.6, 1.4), x, **how)

    monkeypatch.setattr(comparison, "time_stacks", unsteady)
    settings = dataclasses.replace(
        settings, out=settings.out.with_name("same"), methods=("narrow", "narrow+repair")
    )
    plain, helped = run(settings)[0]["points"]
    for name in ("config", "speedup", "speedup_quartiles"):
        assert plain[name] == helped[name]


def test_plans_are_methods_among_others(settings, exact_clock, tmp_path):
    methods = ("SparseFFN-planned", "narrow-planned")
    settings = dataclasses.replace(settings, out=tmp_path, methods=methods, targets=(2.0, 3.0))
    results, _ = run(settings)
    assert [(p["method"], p["target"]) for p in results["points"]] == [
        (method, target) for method in methods for target in settings.targets
    ]
    for point in results["points"]:
        assert point["speedup"] >= point["target"]
        (layer,) = SparseFFNConfig.layers_from_json(json.dumps(point["config"]["layers"]))
        assert point["flops_ratio"] == pytest.approx(flops_ratio(layer))
        assert point["flops_ratio"] < 0.6
        if point["method"] == "narrow-planned":
            assert layer.spectral is None
    assert (tmp_path / "estimates.json").exists()


def test_a_second_comparison_in_the_folder_is_refused(settings, tmp_path):
    with hold_run_folder(tmp_path), pytest.raises(RunFolderError, match="is in use"):
        run(dataclasses.replace(settings, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_a_target_out_of_reach_is_said_to_be(settings, exact_clock, tmp_path):
    results, printed = run(
        dataclasses.replace(settings, out=tmp_path, targets=(1000.0,), methods=("narrow",))
    )
    (point,) = results["points"]
    assert "loss" not in point
    (row,) = [line for line in printed.splitlines() if line.split()[:2] == ["1000x", "narrow"]]
    assert row.split()[2:] == ["never"]


def test_a_search_takes_the_candidate_with_the_lowest_loss(
    settings, exact_clock, monkeypatch, tmp_path
):
    search = Searched({name: PEERS[name] for name in ("narrow", "low-rank")})
    monkeypatch.setattr(quality, "METHODS", {"search": search})
    results, printed = run(
        dataclasses.replace(settings, out=tmp_path, targets=(2.0,), methods=("search",))
    )
    losses = {
        line.split(":")[0].split("candidate ")[1]: float(line.split(":")[1])
        for line in printed.splitlines()
        if "candidate" in line
    }
    assert set(losses) == set(search.candidates)
    assert results["points"][0]["candidate"] == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ()}, "targets is empty"),
        ({"targets": (2.0, 1.0)}, "speed-up of 1.0 must be above 1"),
        ({"steps": 0}, "steps=0"),
        ({"timed_tokens": 0}, "timed_tokens=0"),
        ({"distill_steps": -1}, "distill_steps=-1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        QualitySettings(model="dense", **change)


def test_an_unknown_method_is_refused(settings, tmp_path):
    unknown = dataclasses.replace(settings, out=tmp_path / "out", methods=("narrow", "magic"))
    with pytest.raises(ValueError, match="unknown methods magic: expected some of SparseFFN"):
        run(unknown)
    assert not unknown.out.exists()
