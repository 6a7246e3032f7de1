import jax
import pytest
from train_models import make_model, make_windows


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation(tmp_path_factory):
    # Compiling takes most of the time of these tests. Without LLVM's optimisations the HLO and its
    # buffers stay the same, and a run and its resumption need to compile their step only once.
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.getbasetemp() / "compiled"))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def model_and_params():
    return make_model()


@pytest.fixture(scope="session")
def windows():
    return make_windows()
