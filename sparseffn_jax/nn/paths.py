"""What the parameters of a SparseFFN are called, and how they are dealt out on a mesh of devices.

A sharding rule says of all leaves whose path, joined by slashes, ends in a pattern which mesh axis
each dimension is dealt out over. There are two such axes. ``tensor`` splits the computation of a
layer (Megatron-LM, Shoeybi et al. 2019, 1909.08053): hidden units and attention heads are dealt
out. ``fsdp`` splits what is stored and is gathered before the computation (ZeRO, Rajbhandari et
al. 2019, 1910.02054): it takes the other dimension of a matrix, which is most often ``d_model``.
"""

Axes = tuple[str | None, ...]
# The end of a path, as a regular expression, and the axis of each dimension.
ShardingRule = tuple[str, Axes]

# Every SparseFFN has one of these parts, or both, and no dense FFN has a part of that name.
SPARSE_FFN_PARTS = ("spectral", "core")
# Chebyshev coefficients, which say what the activation is and are not to be drawn to zero.
POLYNOMIAL = "polynomial"

# Two rules can have one pattern: a rule is for leaves of as many dimensions as it has axes.
SPARSE_FFN_SHARDING: tuple[ShardingRule, ...] = (
    # Low rank: components are few, so no device waits for another's. Only the hidden units are
    # dealt out, and the sum over the axis has `rank` numbers a token instead of d_model.
    (r"spectral/(gate|up)/axes", ("fsdp", None)),
    (r"spectral/(gate|up)/filter", ("fsdp", "tensor")),
    (r"spectral/down/axes", ("tensor", "fsdp")),
    (r"spectral/down/filter", (None, "fsdp")),
    # A bypass adds to the same sum over the axis as what comes out of hidden units.
    (r"spectral/bypass/axes", ("fsdp", "tensor")),
    (r"spectral/bypass/filter", ("tensor", "fsdp")),
    # Block-circulant, (frequencies, p, q): no frequency meets another, and p and q are d_model and
    # the hidden units in blocks. The transforms stay within a block, that is on one device.
    (r"spectral/(gate|up)/(real|imag)", (None, "fsdp", "tensor")),
    (r"spectral/(down|bypass)/(real|imag)", (None, "tensor", "fsdp")),
    (rf"spectral/{POLYNOMIAL}", ("tensor", None)),
    (r"(spectral|core)/(gate|up)/bias", ("tensor",)),
    # The core and the corrections, dense or with a structured mask: (in, out).
    (r"core/(gate|up)/kernel", ("fsdp", "tensor")),
    (r"core/down/kernel", ("tensor", "fsdp")),
    (r"correction_\d+/kernel", ("fsdp", "tensor")),
    # The same with an unstructured mask: living blocks (n, in, out), sorted by output block, so
    # that a device holds some output blocks.
    (r"core/(gate|up)/kernel", ("tensor", "fsdp", None)),
    (r"core/down/kernel", ("tensor", None, "fsdp")),
    (r"correction_\d+/kernel", ("tensor", "fsdp", None)),
)
