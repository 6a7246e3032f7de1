"""The command ``sparseffn export``."""

import dataclasses
from pathlib import Path
from typing import Literal

from rich.console import Console

from sparseffn_jax.checkpoints.export import export_dense
from sparseffn_jax.checkpoints.folders import check_replaceable
from sparseffn_jax.checkpoints.gguf_export import GGUFType, check_gguf, export_gguf
from sparseffn_jax.checkpoints.pretrained import load_pretrained
from sparseffn_jax.commands.common import DTYPES, matching_tokenizer
from sparseffn_jax.progress import stage

_TYPES: dict[str, GGUFType] = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "q8_0": "q8_0",
}


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a model for other programs: a GGUF file for llama.cpp, or a plain Hugging Face folder.

    Layers must be narrower FFNs, beside a low-rank bypass or not, as "convert --servable" makes
    them; in a Hugging Face folder all have one width.

    Attributes:
      model: Folder, GGUF file or hub name of a model, sparse or dense.
      out: File, named *.gguf, or folder to write.
      to: Kind of what is written.
      type: How matrices are stored; q8_0, of eight bits, in GGUF files alone.
      overwrite: Replace an existing file, or model, in --out.
    """

    model: str
    out: Path
    to: Literal["gguf", "huggingface"] = "gguf"
    type: Literal["f32", "f16", "bf16", "q8_0"] = "f16"
    overwrite: bool = False

    def run(self, console: Console) -> None:
        """Runs the command."""
        name = _TYPES[self.type]
        if self.to == "gguf":
            check_gguf(self.out, overwrite=self.overwrite, sources=(self.model,))
        else:
            if name not in DTYPES:
                raise ValueError(
                    f"type={self.type}: expected f32, f16 or bf16 for a Hugging Face folder"
                )
            check_replaceable(self.out, self.overwrite, [self.model])
        with stage("loading the model", console):
            loaded = load_pretrained(self.model, param_dtype=None, on_demand=True)
            tokenizer = matching_tokenizer(self.model, loaded)
        what = self.out, loaded.model(), loaded.params
        with stage("writing", console):
            if self.to == "gguf":
                export_gguf(*what, tokenizer=tokenizer, dtype=name, overwrite=self.overwrite)
            else:
                export_dense(
                    *what, tokenizer=tokenizer, dtype=DTYPES[name], overwrite=self.overwrite
                )
        console.print(f"wrote {self.out}")
