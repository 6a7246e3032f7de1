import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    # Compiling takes most of the time of these tests, and none of them times what it compiled.
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
