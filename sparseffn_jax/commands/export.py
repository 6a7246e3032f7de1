"""The command ``sparseffn export``."""

from rich.console import Console

from sparseffn_jax.checkpoints.export import export_dense
from sparseffn_jax.checkpoints.gguf_export import GGUFType, check_gguf, export_gguf
from sparseffn_jax.checkpoints.pretrained import load_pretrained
from sparseffn_jax.commands.arguments.export import ExportArguments
from sparseffn_jax.commands.common import DTYPES, matching_tokenizer
from sparseffn_jax.progress import stage

_TYPES: dict[str, GGUFType] = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "q8_0": "q8_0",
}


class Export(ExportArguments):
    """Writes a model for other programs."""

    def run(self, console: Console) -> None:
        """Runs the command."""
        name = _TYPES[self.type]
        if self.to == "gguf":
            check_gguf(self.out, overwrite=self.overwrite, sources=(self.model,))
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
