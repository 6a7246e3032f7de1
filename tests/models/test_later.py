"""Versions of transformers that lack a family."""

import sys

import pytest
import transformers

from sparseffn_jax.models import families, later


def test_a_family_that_transformers_lacks_is_left_out(monkeypatch):
    monkeypatch.setattr(transformers, "Qwen3Config", None, raising=False)
    monkeypatch.delitem(sys.modules, "sparseffn_jax.models.qwen3", raising=False)
    monkeypatch.delitem(families._families, "qwen3", raising=False)
    monkeypatch.setattr(families, "_missing", {})
    families._register_later("qwen3", "Qwen3ForCausalLM", "qwen3")
    assert "qwen3" not in families.FAMILIES
    for find in (families.family, families.gguf_family):
        with pytest.raises(ValueError, match=r"no Qwen3Config: pip .* 'transformers>=4.51'; kn"):
            find("qwen3")
    with pytest.raises(later.MissingConfigError, match=r"has no Qwen3Config: pip install"):
        __import__("sparseffn_jax.models.qwen3")
