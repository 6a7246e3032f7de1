import gc
import os

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# Compiling takes most of the time of these tests. Without LLVM's optimisations the HLO and its
# buffers stay the same. With the older of XLA's two ways to write a fusion's code they nearly do,
# and a training step compiles in half of the time. The environment tells the processes that tests
# start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

# Shapes and types in the package's signatures are checked at every call of the test run.
install_import_hook(
    (
        "sparseffn_jax.nn.sparse_ffn",
        "sparseffn_jax.ops.fourier",
        "sparseffn_jax.ops.low_rank",
        "sparseffn_jax.ops.polynomial",
    ),
    "beartype.beartype",
)

# On GPU XLA multiplies float32 in TF32 unless told not to, and the references are float64.
jax.config.update("jax_default_matmul_precision", "highest")

hypothesis.settings.register_profile(
    "sparseffn", deadline=None, derandomize=True, max_examples=8, print_blob=True
)
hypothesis.settings.load_profile("sparseffn")

# Tracing makes many objects, and each full collection would walk all that is imported as well:
# that took a tenth of the time.
gc.set_threshold(20_000, 50, 1000)


def pytest_collection_finish():
    """Leaves what is imported by now out of all further collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, worker_id):
    """Returns a folder that all workers of the test run share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(autouse=True, scope="session")
def _compile_once(shared_folder):
    """Keeps compiled programs for the other workers, and for the processes that tests start."""
    settings = {
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_compilation_cache_dir": str(shared_folder / "compiled"),
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture
def optimizations():
    """The compiler's optimizations, which other tests do without."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def kernels_on_gpu(optimizations):
    """Skips tests of kernels that are written by hand where they cannot run."""
    from sparseffn_jax.ops.plans.kernels import triton_refusal

    is_there = jax.default_backend() == "gpu"
    if reason := triton_refusal(["9.0"]) if is_there else "there is no GPU":
        pytest.skip(reason)
