import jax
import pytest
from train_models import make_model, make_windows


@pytest.fixture(autouse=True, scope="session")
def _compilation_cache(tmp_path_factory):
    # A run and its resumption compile the same step, and compiling takes most of the time.
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session")
def model_and_params():
    return make_model()


@pytest.fixture(scope="session")
def windows():
    return make_windows()
