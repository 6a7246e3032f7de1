"""What is taken where nothing else is asked for; cheap to import, for the command line's help."""

from pathlib import Path

# The folder of a small GPT-2 that writes Python; its README.md says what it was trained on.
EMBEDDED_MODEL = Path(__file__).parent / "assets" / "stdlib-gpt2"
# Stands for the source code of the running Python's standard library.
STDLIB = "stdlib"
# Share of what the layers before have lost that a layer makes up for. Swept on SmolLM2-135M: see
# docs/concepts/warm_start.md.
REPAIR = 0.5
