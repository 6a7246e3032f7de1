import hypothesis
import jax
from jaxtyping import install_import_hook

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
