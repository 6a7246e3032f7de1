"""The arguments of ``sparseffn export``."""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

from sparseffn_jax.checkpoints.folders import check_replaceable
from sparseffn_jax.commands.arguments.common import check_models
from sparseffn_jax.commands.parser import Arguments


@dataclasses.dataclass(frozen=True)
class ExportArguments(Arguments):
    """Write a model for other programs: a GGUF file for llama.cpp, or a plain Hugging Face folder.

    Layers must be narrower FFNs, beside a low-rank bypass or not, as "sparseffn convert --servable"
    makes them; in a Hugging Face folder all have one width.

    Attributes:
      model: Folder, GGUF file or hub name of a model, sparse or dense.
      out: File, named *.gguf, or folder to write.
      to: Kind of what is written.
      type: Type in which matrices are stored; q8_0, of eight bits, in GGUF files alone.
      overwrite: Replace the file, or the model, that lies in --out.
    """

    example = "sparseffn export --model sparse --out sparse.gguf"
    groups: ClassVar = {"options": ("model", "out", "to", "type", "overwrite")}

    model: str
    out: Path
    to: Literal["gguf", "huggingface"] = "gguf"
    type: Literal["f32", "f16", "bf16", "q8_0"] = "f16"
    overwrite: bool = False

    def check(self) -> None:
        check_models(self.model)
        if self.to == "huggingface":
            if self.type == "q8_0":
                raise ValueError("--type q8_0: expected f32, f16 or bf16 for a Hugging Face folder")
            check_replaceable(self.out, self.overwrite, [self.model])
