"""How the learning rate rises and falls over the updates of a stage."""

import jax
import jax.numpy as jnp
import optax

from sparseffn_jax.train.choices import ScheduleName

# GPT-3's cosine ends at this share of the peak (Brown et al. 2020, 2005.14165, appendix B).
_COSINE_END = 0.1
# Of a stage's updates, the share in which warmup-stable-decay falls (Hägele et al. 2024,
# 2405.18392, section 4).
_DECAY_SHARE = 0.2


def make_schedule(name: ScheduleName, peak: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Returns a rate that rises linearly to ``peak`` and then goes as its name says.

    The first update already has a rate above zero, and so has the last.

    Args:
      name: ``"cosine"`` falls to a tenth of the peak by a cosine; ``"linear"`` falls to zero;
        ``"constant"`` stays at the peak; ``"wsd"``, warmup-stable-decay, stays at the peak and
        falls to zero in the last fifth of the updates.
      peak: the highest learning rate.
      warmup_steps: the number of updates before the peak.
      steps: the number of updates after which ``"cosine"``, ``"linear"`` and ``"wsd"`` have fallen;
        ``"constant"`` does not depend on it.
    """
    after = steps - warmup_steps
    parts = [optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)]
    ends = [warmup_steps]
    if name == "cosine":
        parts.append(optax.cosine_decay_schedule(peak, after, alpha=_COSINE_END))
    elif name == "linear":
        parts.append(optax.linear_schedule(peak, 0.0, after))
    else:
        parts.append(optax.constant_schedule(peak))
    if name == "wsd":
        decay = min(int(_DECAY_SHARE * steps), after)
        parts.append(optax.linear_schedule(peak, 0.0, decay))
        ends.append(steps - decay)
    schedule = optax.join_schedules(parts, ends)
    # XLA would compute the rate, and compile it, once for every leaf.
    return lambda count: jax.lax.optimization_barrier(jnp.asarray(schedule(count)))
