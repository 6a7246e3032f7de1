"""Models of every family, of a few thousand parameters, and a reading of PyTorch's weights."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from sparseffn_jax.models.families import FAMILIES

VOCAB, D, POSITIONS = 97, 32, 24
_GPT = {
    "n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
_LLAMA = {
    "hidden_size": D, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
}  # fmt: skip
LONGROPE = {
    "type": "longrope", "long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.3, 1.2],
}  # fmt: skip
_SMALL = {
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 5},
    # The second of its two layers has a window.
    "qwen2": {
        **_LLAMA, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5,
    },
    "qwen3": {**_LLAMA, "head_dim": 16},
    "phi3": {
        **_LLAMA, "rope_scaling": LONGROPE, "original_max_position_embeddings": 8,
        "pad_token_id": 0,
    },
    # The first of its two layers has no positions.
    "smollm3": {**_LLAMA, "no_rope_layers": [0, 1], "pad_token_id": 0},
    # The first of its two layers has a window, and rotary positions of its own.
    "gemma3_text": {
        **_LLAMA, "head_dim": 16, "sliding_window": 5, "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 24, "pad_token_id": 0,
    },
}  # fmt: skip
D_FF = {name: 4 * D if name in ("gpt2", "gptj") else 88 for name in _SMALL}


def make_config(family, **changes):
    tokens = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    # Configs change the dictionaries that they are given.
    settings = copy.deepcopy({**tokens, **_SMALL[family], **changes})
    return FAMILIES[family].config_class(**settings)


def make_model(family, ffns=(), config=None, **kwargs):
    """Returns a model and parameters without zeros and ones, so that every leaf matters."""
    model = FAMILIES[family](config or make_config(family), ffns, **kwargs)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        is_scale = path[-1].key in ("scale", "weight")
        return jnp.array(is_scale + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes_of(model))


def shapes_of(model):
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids)["params"]


def make_ids(seed=0, shape=(3, 12)):
    return jax.random.randint(jax.random.key(seed), shape, 0, VOCAB)


def from_torch(model):
    """Renames and transposes by hand: what the tree must look like, whatever ours says."""
    params = {}
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        *path, leaf = name.split(".")
        if path == ["lm_head"] and tied:
            continue
        if path[-1] in ("wte", "wpe", "embed_tokens"):
            leaf = "embedding"
        elif path[-1].startswith("ln_"):
            leaf = {"weight": "scale", "bias": "bias"}[leaf]
        elif leaf == "weight" and not path[-1].endswith("norm"):
            leaf, array = "kernel", array.T
        if path[-1] in ("qkv_proj", "gate_up_proj"):
            # As Phi-3's PyTorch model cuts its outputs.
            names = ("q_proj", "k_proj", "v_proj") if path[-1] == "qkv_proj" else None
            groups = model.config.num_key_value_heads * D // model.config.num_attention_heads
            cuts = (D, D + groups) if names else 2
            for part, columns in zip(
                names or ("gate_proj", "up_proj"), np.split(array, cuts, axis=1), strict=True
            ):
                params[(*path[:-1], part, leaf)] = columns
            continue
        params[(*path, leaf)] = array
    return unflatten_dict(params)


def random_torch_model(config):
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model
