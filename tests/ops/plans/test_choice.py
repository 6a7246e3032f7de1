import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseffn_jax.ops.plans import costs
from sparseffn_jax.ops.plans.choice import PlanTable, pick, recorded, use


def test_none_picks_the_cheapest_that_can_run():
    assert pick("op", None, {"a": 3.0, "b": 1.0, "c": 2.0}, {"d": "never"}) == "b"


def test_a_name_forces_the_plan():
    assert pick("op", "a", {"a": 3.0, "b": 1.0}) == "a"


def test_a_forced_plan_that_cannot_run_says_why():
    with pytest.raises(ValueError, match="op cannot run as 'b' here: no such chip; use one of a,"):
        pick("op", "b", {"a": 1.0}, {"b": "no such chip"})


@pytest.mark.parametrize("name", ["", "A", "fft"])
def test_an_unknown_plan_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=f"op has no plan '{name}': use one of a, b, or None"):
        pick("op", name, {"a": 1.0, "b": 2.0})


def test_recorded_lists_what_was_picked_inside_it():
    pick("before", None, {"a": 1.0})
    with recorded() as picked:
        pick("op", None, {"a": 3.0, "b": 1.0}, problem=(7, "float32"))
        pick("op", "a", {"a": 3.0, "b": 1.0})
    pick("after", None, {"a": 1.0})
    assert [(choice.operator, choice.problem, choice.plan) for choice in picked] == [
        ("op", (7, "float32"), "b"),
        ("op", (), "a"),
    ]
    assert picked[0].costs == {"a": 3.0, "b": 1.0}


def table_of(**plans):
    device = jax.devices()[0].device_kind
    return PlanTable(device, {("op", (int(n[1:]), "f32")): p for n, p in plans.items()})


def test_a_table_decides_what_it_knows_and_can_run():
    costs = {"a": 3.0, "b": 1.0}

    def plan(tokens, implementation=None):
        return pick("op", implementation, costs, problem=(tokens, "f32"))

    with use(table_of(t1="a", t2="gone")):
        assert plan(1) == "a"
        assert plan(1, "b") == "b"
        assert plan(2) == "b"
        assert plan(3) == "b"
    assert plan(1) == "b"


def test_a_table_survives_its_file(tmp_path):
    saved = table_of(t1="a", t2="b")
    saved.save(tmp_path / "plans.json")
    assert PlanTable.load(tmp_path / "plans.json") == saved


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"device": "cpu", "plans": [{"plan": "a"}]}'])
def test_a_file_that_is_no_table(tmp_path, text):
    (tmp_path / "plans.json").write_text(text)
    with pytest.raises(ValueError, match=r"plans.json is not a table of plans: .*--autotune"):
        PlanTable.load(tmp_path / "plans.json")


def test_a_table_of_another_device_is_refused():
    with (
        pytest.raises(ValueError, match="measured on 'abacus', this is"),
        use(PlanTable("abacus")),
    ):
        pass


def test_low_rank_multiplies_the_factors_out_only_where_that_is_less_work():
    def plan(tokens, rank):
        return pick("low_rank", None, costs.low_rank_costs(tokens, 768, rank, 3072))

    assert plan(2048, 128) == "two_gemms"
    assert plan(65536, 768) == "merged"
    # The product of the factors is part of the program: one token does not pay for it.
    assert plan(1, 768) == "two_gemms"


def test_block_circulant_is_dense_without_blocks_or_where_transforms_take_longer():
    def plan(tokens, b, platform, sides=(768, 3072)):
        (p, q), complex_ones = (side // b for side in sides), (b - 1) // 2
        products = b - 2 * complex_ones + 4 * complex_ones
        estimates = costs.block_circulant_costs(tokens, p, q, b, b, products, platform)
        return pick("block_circulant", None, estimates)

    assert plan(2048, 16, "cpu") == "dft"
    assert plan(2048, 1, "cpu") == "dense"
    assert plan(1, 16, "cpu") == "split"
    # On an H100 the transforms of narrow layers take longer than the products that they save: 0.71
    # of the dense layer's speed, and 2.5 in wide ones (campaigns/results).
    assert plan(16384, 16, "gpu") == "dense"
    assert plan(8192, 16, "gpu", (4096, 11008)) == "dft"


def block_sparse_plan(tokens, density, shape=(768, 3072), side=64):
    grid = (shape[0] // side, shape[1] // side)
    estimates = costs.block_sparse_costs(
        tokens, shape, (side, side), int(density * shape[0] * shape[1]), grid, "cpu"
    )
    del estimates["slice"]
    return pick("block_sparse", None, estimates)


def test_block_sparse_plans_by_tokens_and_density():
    assert block_sparse_plan(2048, 0.25) == "rows"
    assert block_sparse_plan(2048, 0.9) == "masked"
    # One token pays neither for a GEMM a block nor for laying out weights.
    assert block_sparse_plan(1, 0.25) == "gather"


@given(
    tokens=st.integers(0, 4096),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    share=st.floats(0, 1, allow_nan=False),
)
def test_costs_are_never_negative_and_slicing_never_loses(tokens, grid, share):
    shape = (16 * grid[0], 16 * grid[1])
    estimates = costs.block_sparse_costs(
        tokens, shape, (16, 16), int(share * shape[0] * shape[1]), grid, "cpu"
    )
    assert min(estimates.values()) >= 0
    assert estimates["slice"] <= min(estimates.values())
