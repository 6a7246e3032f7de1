import copy
import dataclasses
import functools
import json
import pickle
import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import alive

from sparseffn_jax.config import (
    CoreConfig,
    MicroRefinementConfig,
    PolynomialConfig,
    SparseFFNConfig,
    SpectralConfig,
)
from sparseffn_jax.ops.activations import ACTIVATIONS
from sparseffn_jax.ops.masks import BlockMask

FULL = SparseFFNConfig(
    d_model=12,
    d_ff=48,
    activation="silu",
    spectral=SpectralConfig(
        "block_circulant", width=24, block_size=6, frequency_mask=(True, False, True, True)
    ),
    polynomial=PolynomialConfig(3, (True, True, False, True), radius=0.1, groups=2),
    micro=MicroRefinementConfig(
        core=CoreConfig(
            8, up_mask=BlockMask((3, 2), ((True,) * 4, (True,) * 4, (False,) * 4, (True,) * 4))
        ),
        corrections=(BlockMask((6, 6), ((True, False), (True, True))),),
        implementation="gather",
    ),
)


def some(strategy):
    return st.none() | strategy


@st.composite
def bool_rows(draw, size):
    row = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    return tuple(row)


@st.composite
def block_masks(draw, shape):
    sides = tuple(draw(st.sampled_from([s for s in range(1, n + 1) if n % s == 0])) for n in shape)
    rows, columns = (n // side for n, side in zip(shape, sides, strict=True))
    flat = draw(bool_rows(rows * columns))
    return BlockMask.from_array(np.reshape(flat, (rows, columns)), sides)


@st.composite
def spectral_configs(draw, d_model):
    b = draw(st.sampled_from([b for b in range(1, d_model + 1) if d_model % b == 0]))
    width = b * draw(st.integers(1, 6))
    if draw(st.booleans()):
        plan = draw(some(st.sampled_from(["fft", "dft", "split", "dense"])))
        mask = draw(some(bool_rows(b // 2 + 1)))
        return SpectralConfig(
            "block_circulant", width, block_size=b, frequency_mask=mask, implementation=plan
        )
    ranks = st.integers(1, min(d_model, width))
    plan = draw(some(st.sampled_from(["two_gemms", "merged"])))
    down_rank = draw(st.just(0) | ranks)
    return SpectralConfig("low_rank", width, draw(ranks), down_rank, implementation=plan)


@st.composite
def polynomial_configs(draw, width):
    degree = draw(st.integers(1, 8))
    return PolynomialConfig(
        degree,
        draw(some(bool_rows(degree + 1))),
        draw(st.floats(1e-3, 1e3)),
        draw(st.sampled_from([g for g in range(1, width + 1) if width % g == 0])),
    )


@st.composite
def configs(draw):
    d_model = draw(st.integers(1, 12))
    plan = some(st.sampled_from(["slice", "rows", "columns", "gather", "masked"]))
    spectral = draw(some(spectral_configs(d_model)))
    core = None
    if spectral is None or draw(st.booleans()):
        width = draw(st.integers(1, 12))
        masks = [draw(some(block_masks(shape))) for shape in ((d_model, width), (width, d_model))]
        core = CoreConfig(width, *masks, draw(plan) if any(masks) else None)
    corrections = tuple(draw(st.lists(block_masks((d_model, d_model)), max_size=2)))
    micro = None
    if core or corrections:
        micro = MicroRefinementConfig(core, corrections, draw(plan) if corrections else None)
    return SparseFFNConfig(
        d_model,
        draw(st.integers(1, 64)),
        draw(st.sampled_from(sorted(ACTIVATIONS))),
        spectral,
        draw(some(polynomial_configs(spectral.width))) if spectral else None,
        micro,
        draw(st.booleans()),
        draw(st.booleans()),
    )


@given(configs())
def test_json_round_trip_is_exact(config):
    for again in (
        SparseFFNConfig.from_json(config.to_json()),
        SparseFFNConfig.from_dict(config.to_dict()),
        SparseFFNConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
    ):
        assert again == config
        assert hash(again) == hash(config)
        assert again.to_json() == config.to_json()


@given(configs(), configs())
def test_equal_exactly_when_their_json_is(one, other):
    assert (one == other) == (one.to_json() == other.to_json())


def test_json_is_written_as_people_would():
    written = json.loads(FULL.to_json())
    assert written["micro"]["corrections"] == [{"block_shape": [6, 6], "blocks": ["10", "11"]}]
    assert written["spectral"]["frequency_mask"] == [True, False, True, True]
    assert written["polynomial"]["radius"] == 0.1


def test_what_is_left_out_of_json_takes_its_default():
    text = '{"d_model": 8, "d_ff": 32, "micro": {"core": {"width": 32}}}'
    micro = MicroRefinementConfig(core=CoreConfig(width=32))
    assert SparseFFNConfig.from_json(text) == SparseFFNConfig(8, 32, micro=micro)


def test_numpy_values_and_lists_are_taken_as_pythons():
    spectral = SpectralConfig(
        "block_circulant",
        np.int64(8),
        block_size=np.int32(4),
        frequency_mask=np.array([True, False, True]),
    )
    assert spectral == SpectralConfig(
        "block_circulant", 8, block_size=4, frequency_mask=(True, False, True)
    )
    assert type(spectral.width) is int
    assert type(PolynomialConfig(radius=np.float32(2)).radius) is float
    assert PolynomialConfig(radius=2).radius == 2.0
    mask = BlockMask((4, 4), ((True, True), (False, True)))
    assert hash(MicroRefinementConfig(corrections=[mask])) == hash(
        MicroRefinementConfig(corrections=(mask,))
    )


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.d_model = 3


def test_static_under_jit_and_the_same_when_copied():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def width(x, config):
        traces.append(config)
        return x + config.d_ff

    copies = (FULL, pickle.loads(pickle.dumps(FULL)), copy.deepcopy(FULL))
    copies += (dataclasses.replace(FULL), SparseFFNConfig.from_json(FULL.to_json()))
    assert [int(width(1, config)) for config in copies] == [49] * len(copies)
    assert traces == [FULL]


def test_a_mask_is_hashed_once_and_copies_hash_anew():
    hashed = []

    class Counted(tuple):
        def __hash__(self):
            hashed.append(self)
            return super().__hash__()

    mask = BlockMask((4, 4), ((True, True), (False, True)))
    object.__setattr__(mask, "blocks", Counted(mask.blocks))
    assert hash(mask) == hash(mask) == hash(BlockMask(mask.block_shape, mask.blocks))
    assert len(hashed) == 1
    names = {field.name for field in dataclasses.fields(mask)}
    plain = BlockMask((4, 4), ((True, True), (False, True)))
    assert hash(plain) == hash(mask)
    for again in (pickle.loads(pickle.dumps(plain)), copy.deepcopy(plain)):
        assert again == plain
        assert vars(again).keys() == names
    wider = dataclasses.replace(plain, block_shape=(4, 8))
    assert hash(wider) == hash(BlockMask((4, 8), plain.blocks)) != hash(plain)


def test_kept_components():
    assert FULL.spectral.frequencies == (0, 2, 3)
    assert FULL.polynomial.degrees == (0, 1, 3)
    assert SpectralConfig("block_circulant", 5, block_size=5).frequencies == (0, 1, 2)
    assert PolynomialConfig(degree=2).degrees == (0, 1, 2)


def build(**changes):
    values = FULL.to_dict()
    for path, value in changes.items():
        *parents, key = path.split("__")
        target = values
        for parent in parents:
            target = target[int(parent) if parent.isdigit() else parent]
        target[key] = value
    return SparseFFNConfig.from_json(json.dumps(values))


LOW_RANK = {"transform": "low_rank", "width": 24, "rank": 4}

BAD = {
    "d_model not divisible by block_size": (
        {"d_model": 16},
        "block_size=6 does not divide d_model=16",
    ),
    "d_model zero": ({"d_model": 0}, "d_model=0: expected a positive integer"),
    "d_ff negative": ({"d_ff": -4}, "d_ff=-4: expected a positive integer"),
    "d_model float": ({"d_model": 12.0}, "config.d_model=12.0: expected an integer"),
    "d_model string": ({"d_model": "12"}, "config.d_model='12': expected an integer"),
    "d_model boolean": ({"d_model": True}, "config.d_model=True: expected an integer"),
    "d_model null": ({"d_model": None}, "config.d_model=null: expected an integer"),
    "unknown activation": (
        {"activation": "mish"},
        "unknown activation 'mish': expected one of gelu",
    ),
    "activation no string": ({"activation": ["gelu"]}, "activation=['gelu']: expected a string"),
    "unknown key": ({"d_modle": 12}, "config has unknown keys d_modle: expected some of d_model"),
    "unknown inner key": ({"polynomial__order": 3}, "config.polynomial has unknown keys order"),
    "unknown transform": (
        {"spectral__transform": "dct"},
        "transform='dct': expected one of low_rank, block_circulant",
    ),
    "transform null": (
        {"spectral__transform": None},
        "spectral.transform=null: expected one of low_rank, block_circulant",
    ),
    "part is no object": (
        {"spectral": 3},
        "config.spectral=3: expected a SpectralConfig, or a JSON object with its fields",
    ),
    "width not a multiple": ({"spectral__width": 25}, "width=25 is not a multiple of block_size=6"),
    "width negative": ({"spectral__width": -6}, "spectral width=-6: expected 0 or a positive"),
    "polynomial without units": (
        {"spectral__width": 0},
        "polynomial is the activation of the spectral branch's hidden units",
    ),
    "down_rank without units": (
        {"spectral": LOW_RANK | {"width": 0, "down_rank": 2}},
        "down_rank=2 has no meaning without hidden units",
    ),
    "bypass too large": (
        {"spectral": LOW_RANK | {"width": 0, "rank": 13}, "polynomial": None},
        "rank=13 exceeds 12",
    ),
    "block_size negative": ({"spectral__block_size": -6}, "block_size=-6: expected a positive"),
    "circulant with a rank": (
        {"spectral__rank": 4},
        "rank=4 has no meaning with transform='block_circulant'",
    ),
    "low rank with blocks": (
        {"spectral": LOW_RANK | {"block_size": 6}},
        "block_size=6 has no meaning with",
    ),
    "low rank with frequencies": (
        {"spectral": LOW_RANK | {"frequency_mask": []}},
        "frequency_mask=() has no",
    ),
    "low rank too large": (
        {"spectral": LOW_RANK | {"rank": 13}},
        "rank=13 exceeds 12, the smaller of",
    ),
    "low rank negative": (
        {"spectral": LOW_RANK | {"rank": -1}},
        "rank=-1: expected a positive integer",
    ),
    "down_rank": ({"spectral": LOW_RANK | {"down_rank": 13}}, "down_rank=13 exceeds 12"),
    "frequency_mask length": (
        {"spectral__frequency_mask": [True] * 3},
        "frequency_mask has 3 entries, but block_size=6 has 4 frequencies",
    ),
    "frequency_mask empty": (
        {"spectral__frequency_mask": [False] * 4},
        "frequency_mask keeps no frequency",
    ),
    "frequency_mask of integers": (
        {"spectral__frequency_mask": [1, 0, 1, 1]},
        "frequency_mask[0]=1: expected true or false",
    ),
    "plan of another transform": (
        {"spectral__implementation": "merged"},
        "implementation='merged': expected one of fft, dft, split, dense",
    ),
    "unknown plan": (
        {"micro__implementation": "csr"},
        "'csr': expected one of slice, rows, columns, gather, masked",
    ),
    "plan is no name": ({"micro__implementation": 1}, "implementation=1: expected a string"),
    "degree zero": ({"polynomial__degree": 0}, "polynomial degree=0: expected a positive integer"),
    "degree_mask length": (
        {"polynomial__degree": 4},
        "degree_mask has 4 entries, but degree=4 has 5 terms",
    ),
    "degree_mask empty": ({"polynomial__degree_mask": [False] * 4}, "degree_mask keeps no term"),
    "radius negative": ({"polynomial__radius": -1.0}, "radius=-1.0: expected a positive number"),
    "radius NaN": ({"polynomial__radius": float("nan")}, "radius=nan: expected a positive number"),
    "radius infinite": ({"polynomial__radius": float("inf")}, "radius=inf: expected a positive"),
    "radius boolean": ({"polynomial__radius": True}, "radius=True: expected a number"),
    "radius string": ({"polynomial__radius": "4"}, "radius='4': expected a number"),
    "radius too large": (
        {"polynomial__radius": 10**400},
        "radius=100000000000000000...0000000000000000000: expected a number of at most 1.8e308",
    ),
    "groups": ({"polynomial__groups": 5}, "groups=5 do not divide the spectral width=24"),
    "polynomial alone": ({"spectral": None}, "polynomial is the spectral branch's activation"),
    "nothing": (
        {"spectral": None, "polynomial": None, "micro__core": None},
        "needs a spectral branch or a micro-refinement core",
    ),
    "empty micro": (
        {"micro": {"corrections": []}},
        "config.micro: micro-refinement needs a core or",
    ),
    "plan without corrections": (
        {"micro__corrections": []},
        "config.micro: implementation='gather' is the plan of corrections, but there are none",
    ),
    "plan of a core without masks": (
        {"micro__core__up_mask": None, "micro__core__implementation": "rows"},
        "config.micro.core: implementation='rows' has no meaning in a core without a mask",
    ),
    "core without width": (
        {"micro__core": {}},
        "config.micro.core lacks width: expected an integer",
    ),
    "core width string": ({"micro__core__width": "8"}, "config.micro.core.width='8': expected"),
    "up_mask shape": (
        {"micro__core__width": 10},
        "up_mask covers (12, 8) (4 x 4 blocks of 3 x 2), but the weight is (12, 10)",
    ),
    "correction shape": (
        {"micro__corrections__0__block_shape": [6, 3]},
        "corrections[0] covers (12, 6) (2 x 2 blocks of 6 x 3), but the weight is (12, 12)",
    ),
    "corrections no list": (
        {"micro__corrections": "11"},
        "config.micro.corrections='11': expected a list",
    ),
    "correction null": (
        {"micro__corrections": [None]},
        "config.micro.corrections[0]=null: expected a BlockMask",
    ),
    "block_shape length": (
        {"micro__corrections__0__block_shape": [6]},
        "config.micro.corrections[0]: block_shape=(6,): expected two positive integers",
    ),
    "block_shape zero": (
        {"micro__corrections__0__block_shape": [6, 0]},
        "expected two positive integers",
    ),
    "block_shape string": (
        {"micro__corrections__0__block_shape": "66"},
        "block_shape='66': expected a list",
    ),
    "block_shape float": (
        {"micro__corrections__0__block_shape": [6.0, 6]},
        "[0]=6.0: expected an integer",
    ),
    "blocks empty": (
        {"micro__corrections__0__blocks": ["00", "00"]},
        "the block mask keeps no block",
    ),
    "blocks ragged": (
        {"micro__corrections__0__blocks": ["10", "1"]},
        "all of one and the same length",
    ),
    "blocks letters": ({"micro__corrections__0__blocks": ["1x", "11"]}, "written with 0 and 1"),
    "blocks missing": (
        {"micro__corrections": [{"block_shape": [6, 6]}]},
        "corrections[0] lacks blocks: expected a list",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is checked below)
        build(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_bad_configs_differ_from_a_good_one():
    assert build() == FULL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the config is not JSON"),
        ("{'d_model': 12}", "the config is not JSON"),
        ('{"d_model": 12', "the config is not JSON"),
        ("[]", r"config=\[\]: expected a SparseFFNConfig, or a JSON object"),
        ("null", "config=null: expected a SparseFFNConfig, or a JSON object"),
        ('{"d_model": 12}', "config lacks d_ff: expected an integer"),
    ],
)
def test_refuses_text_that_is_no_config(text, message):
    with pytest.raises(ValueError, match=message):
        SparseFFNConfig.from_json(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseFFNConfig("12", 48), "d_model='12': expected an integer"),
        (lambda: SparseFFNConfig(12, 48.0), "d_ff=48.0: expected an integer"),
        (lambda: SpectralConfig("low_rank", 8, True), "rank=True: expected an integer"),
        (
            lambda: SpectralConfig("block_circulant", 8, rank="", block_size=4),
            "rank='': expected an integer",
        ),
        (lambda: PolynomialConfig(radius=np.nan), "radius=nan: expected a positive number"),
        (lambda: PolynomialConfig(degree_mask="10x11"), "written with 0 and 1"),
        (lambda: CoreConfig(8, up_mask="1111"), "up_mask='1111': expected a BlockMask"),
        (
            lambda: MicroRefinementConfig(corrections=(True,)),
            "corrections[0]=True: expected a BlockMask",
        ),
        (lambda: MicroRefinementConfig(corrections={True}), "corrections={True}: expected a list"),
        (lambda: MicroRefinementConfig(corrections=None), "corrections=null: expected a list"),
    ],
)
def test_refuses_wrong_types_in_python(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is checked below)
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("up", "down", "kept"),
    [
        (None, ((4, 12), ["1", "0", "1"]), [0, 1, 2, 3, 8, 9, 10, 11]),
        (((6, 4), ["101", "101"]), ((4, 12), ["1", "0", "1"]), [0, 1, 2, 3, 8, 9, 10, 11]),
        # Blocks of 4 and of 6 units: only a whole 12 of them can go; here the first mask goes too.
        (((6, 4), ["101101", "101111"]), ((6, 12), ["1", "0", "0", "0"]), list(range(12))),
        (((12, 4), ["1" * 6]), ((6, 12), ["1", "0", "0", "0"]), list(range(6))),
        (((12, 4), ["110"]), ((4, 6), ["10", "11", "01"]), list(range(12))),
    ],
)
def test_units_that_no_output_reads_are_left_out(up, down, kept):
    masks = [
        part and BlockMask(part[0], [[d == "1" for d in row] for row in part[1]])
        for part in (up, down)
    ]
    core = CoreConfig(masks[1].shape[0], *masks)
    smaller = core.without_dead_units()
    assert smaller.width == len(kept)
    dead = np.setdiff1d(np.arange(core.width), kept)
    assert not alive(core.down_mask)[dead].any()
    for name, take in (("up_mask", (slice(None), kept)), ("down_mask", (kept,))):
        mask, left = getattr(core, name), getattr(smaller, name)
        entries = np.ones((12, core.width)[:: 1 if name == "up_mask" else -1], bool)
        entries = (entries if mask is None else alive(mask))[take]
        np.testing.assert_array_equal(entries, True if left is None else alive(left))
    assert smaller.without_dead_units() == smaller
    if any(masks):
        forced = dataclasses.replace(core, implementation="masked").without_dead_units()
        plan = "masked" if smaller.up_mask or smaller.down_mask else None
        assert forced == dataclasses.replace(smaller, implementation=plan)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"core": 64}, "no core, which belongs into micro=MicroRefinementConfig(core=...): it has"),
        ({"rank": 8}, "has no rank, which belongs into spectral=SpectralConfig(rank=...): it has"),
        ({"d_model": 8, "d_ff": 8, "width": 8}, "has no width, which belongs into spectral="),
        ({"hidden": 8}, "SparseFFNConfig has no hidden: it has d_model, d_ff, activation, spec"),
    ],
)
def test_a_field_that_there_is_not(values, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        SparseFFNConfig(**values)
