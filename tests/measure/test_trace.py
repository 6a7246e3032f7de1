"""Parts of a program's time: scopes joined to instructions, in the text and in a real trace."""

import jax
import jax.numpy as jnp
import pytest

from sparseffn_jax.measure.trace import PARTS, instruction_paths, part_of, time_by_part

HLO = """
HloModule jit_f, is_scheduled=true

%fused_computation (param_0: f32[2,4]) -> f32[2,4] {
  %param_0 = f32[2,4]{1,0} parameter(0)
  ROOT %tanh.1 = f32[2,4]{1,0} tanh(%param_0), metadata={op_name="jit(f)/polynomial/tanh"}
}

ENTRY %main (x: f32[2,4]) -> f32[2,4] {
  %x = f32[2,4]{1,0} parameter(0), metadata={op_name="x"}
  %copy.3 = f32[2,4]{0,1} copy(%x)
  %dot.5 = f32[2,4]{1,0} dot(%x, %x), metadata={op_name="jit(f)/core/expand/dot_general" stack=2}
  %while.2 = (s32[], f32[2,4]) while(%t), condition=%c, body=%b, metadata={op_name="jit(f)/while"}
  ROOT %fusion = f32[2,4]{1,0} fusion(%dot.5), kind=kLoop, calls=%fused_computation, \
metadata={op_name="jit(f)/polynomial/tanh"}, backend_config={"a":{"b":1}}
}
"""


def test_every_instruction_has_its_scopes():
    paths = instruction_paths(HLO)
    assert paths["dot.5"] == "jit(f)/core/expand/dot_general"
    assert paths["fusion"] == "jit(f)/polynomial/tanh"
    assert paths["copy.3"] == ""
    # A loop's time is that of what it runs.
    assert "while.2" not in paths


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("jit(f)/SparseFFN/core/up/dot_general", "core"),
        ("jit(f)/transpose(jvp(core))/up/dot_general", "core"),
        ("jit(f)/jvp(SparseFFN)/rematted_computation/polynomial/mul", "polynomial"),
        ("jit(f)/core/corrections/dot_general", "corrections"),
        ("jit(f)/core_up/dot_general", "other"),
        ("", "other"),
    ],
)
def test_the_innermost_scope_counts(path, part):
    assert part_of(path, PARTS) == part


def test_a_trace_finds_the_scopes_that_ran():
    def loss(x):
        with jax.named_scope("core"):
            y = x @ x
        with jax.named_scope("corrections"):
            y = jnp.tanh(y @ x)
        return jnp.sum(y)

    x = jnp.ones((128, 128))
    compiled = jax.jit(jax.grad(loss)).lower(x).compile()
    times = time_by_part(compiled, x, repeats=2)
    assert {"core", "corrections"} <= set(times.seconds) <= {*PARTS, "other"}
    assert all(seconds > 0 for seconds in times.seconds.values())
    assert sum(times.shares.values()) == pytest.approx(1.0)


def test_a_program_that_did_not_run_is_refused():
    x = jnp.ones((4, 4))
    ran = jax.jit(lambda x: x @ x).lower(x).compile()

    class Renamed:
        def as_text(self):
            return ran.as_text().replace("dot", "dit").replace("fusion", "fission")

        def __call__(self, x):
            return ran(x)

    with pytest.raises(ValueError, match="names no instruction of this program"):
        time_by_part(Renamed(), x)
