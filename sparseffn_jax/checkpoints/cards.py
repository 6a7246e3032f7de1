"""Model cards: what ``README.md`` says, on the Hugging Face Hub, of a model that was made here.

What is known is written where it is known: each command adds a section on what it did, and a card
takes over the sections of the model that its own was made from.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import ModelCard, ModelCardData

from sparseffn_jax.checkpoints.folders import CARD, PathLike
from sparseffn_jax.checkpoints.matching import expected_leaves
from sparseffn_jax.measure.layers import describe_layer
from sparseffn_jax.models.decoder import Decoder

_TAG = "sparseffn_jax"
# Around the sections, so that the next card finds them whatever else its owner has written.
_BEGIN, _END = "<!-- how it was made -->", "<!-- /how it was made -->"
_MOST_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a model was made from.

    Attributes:
      name: what the text calls it: a hub name, or the last part of a path.
      hub_name: the model on the Hub that it is or was made from, if that is known.
      license: the license that its card states, if any.
      sections: what its card says of how it was made, if it was made here.
    """

    name: str
    hub_name: str | None = None
    license: str | None = None
    sections: str = ""


def origin_of(source: PathLike, folder: Path | None) -> Origin:
    """Returns what is known of a model that was loaded.

    Args:
      source: the folder, file or hub name that it was loaded from.
      folder: the folder that its files lie in, if any.
    """
    data, text = _read_card(folder)
    made_here = isinstance(tags := data.get("tags"), list) and _TAG in tags
    found = re.search(f"{_BEGIN}(.*){_END}", text, re.DOTALL) if made_here else None
    name = _name_of(source)
    # Of a model that was made here from a local folder, the Hub may know what that was made from.
    is_local = Path(source).expanduser().exists() and "/" not in name
    base = name if not is_local else data.get("base_model") if made_here else None
    license = data.get("license")
    return Origin(
        name,
        hub_name=base if isinstance(base, str) else None,
        license=license if isinstance(license, str) else None,
        sections=found[1].strip() if found else "",
    )


def model_card(
    name: str,
    model: Decoder,
    params: Mapping[str, Any],
    origin: Origin | None = None,
    section: str = "",
) -> str:
    """Returns the text of a model's card.

    Args:
      name: the model's name on the Hub, or that of its folder.
      model: the model.
      params: its parameters, or what has their shapes.
      origin: what it was made from, if that is known.
      section: how it was made from that, as Markdown.
    """
    spec, sparse = model.spec, sum(ffn is not None for ffn in model.ffns)
    layers = [describe_layer(model, i, 1) for i in range(spec.n_layer)]
    ratio = sum(layer.flops_ratio for layer in layers) / len(layers)
    dense_shapes = expected_leaves(model.clone(ffns=()), "the model's config").values()
    dense = sum(map(math.prod, dense_shapes))
    own = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    made_from = f" of {_code(origin.name)}" if origin else ""
    what = f"A {model.config.model_type} language model{made_from}"
    if sparse:
        what += (
            f", in which {sparse} of {spec.n_layer} feed-forward networks (FFNs) are sparse: what "
            "is masked is neither stored nor multiplied"
        )
    by_parts: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        by_parts.setdefault((layer.parts, layer.flops_ratio), []).append(i)
    rows = [
        (_ranges(numbers), "; ".join(parts), f"{of_dense:.3f}")
        for (parts, of_dense), numbers in by_parts.items()
    ]
    trust = _trust(model)
    body = [
        f"# {name.rpartition('/')[2]}",
        f"{what}. Made with sparseffn_jax.",
        table(
            ("", "dense", "this model"),
            [("parameters", f"{dense:,}", f"{own:,}"), ("FFN FLOPs", "1", f"{ratio:.3f}")],
        ),
        "## Layers",
        table(("layers", "FFN", "FLOPs of dense"), rows),
        *_history(origin, section),
        "## How to load it",
        _python(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ),
        _python(
            "import sparseffn_jax as sf",
            "",
            f'pretrained = sf.load_pretrained("{name}")',
            "model, params = pretrained.model(), pretrained.params",
        ),
    ]
    # Others load it with transformers: by that name the Hub shows them how.
    tags = ["sparse"] if sparse else []
    return _card(body, "transformers", origin, tags)


def adapter_card(name: str, model: Decoder, origin: Origin, section: str = "") -> str:
    """Returns the text of the card of LoRA adapters.

    Args:
      name: the adapters' name on the Hub, or that of their folder.
      model: the model that they are for.
      origin: where that model comes from.
      section: how they were made, as Markdown.
    """
    base, trust = origin.name, _trust(model)
    body = [
        f"# {name.rpartition('/')[2]}",
        f"LoRA adapters for {_code(origin.name)}. Made with sparseffn_jax.",
        *_history(origin, section),
        "## How to load it",
        _python(
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{base}"{trust})',
            f'model = PeftModel.from_pretrained(base, "{name}")',
        ),
        _python(
            "import sparseffn_jax as sf",
            "",
            f'pretrained = sf.load_pretrained("{base}", adapter="{name}")',
        ),
    ]
    return _card(body, "peft", origin, ["lora"])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _trust(model: Decoder) -> str:
    # A dense folder needs no code but transformers' own.
    return ", trust_remote_code=True" if any(model.ffns) else ""


def _history(origin: Origin | None, section: str) -> list[str]:
    parts = [origin.sections if origin else "", section.strip()]
    sections = "\n\n".join(filter(None, parts))
    return [_BEGIN, sections, _END] if sections else []


def _card(body: list[str], library: str, origin: Origin | None, tags: list[str]) -> str:
    data = ModelCardData(
        base_model=origin.hub_name if origin else None,
        license=origin.license if origin else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=[_TAG, *tags],
    )
    text = "\n\n".join(filter(None, body))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _read_card(folder: Path | None) -> tuple[dict[str, Any], str]:
    """Returns a card's metadata and its text; nothing of one that cannot be read."""
    file = folder and folder / CARD
    try:
        if not file or file.stat().st_size > _MOST_BYTES:
            return {}, ""
        text = file.read_text(encoding="utf-8")
        # Without metadata, of which huggingface_hub would warn, nothing is known.
        if not text.startswith("---"):
            return {}, ""
        card = ModelCard(text, ignore_metadata_errors=True)
    # Anybody may write a card: what reads its YAML has errors of its own.
    except Exception:
        return {}, ""
    return card.data.to_dict(), card.text


def _name_of(source: PathLike) -> str:
    """Returns a hub name, or the last part of a path: the rest concerns nobody else."""
    path = Path(source).expanduser()
    if not path.exists():
        return os.fspath(source)
    # Where huggingface_hub keeps what it has downloaded.
    downloaded = re.search(r"/models--([^/]+)/snapshots/", f"{path.resolve().as_posix()}/")
    return downloaded[1].replace("--", "/") if downloaded else path.resolve().name


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _python(*lines: str) -> str:
    return "\n".join(("```python", *lines, "```"))


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"
