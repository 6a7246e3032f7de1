import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
@pytest.mark.parametrize(("only", "inputs"), [("", 150), ("gguf", 200), ("text", 200)])
def test_damaged_models_give_nothing_but_the_loaders_own_error(tmp_path, only, inputs):
    out, script = tmp_path / "fuzz.json", ROOT / "campaigns" / "fuzz_loaders.py"
    options = ["--inputs", str(inputs), "--only", only, "--out", out]
    campaign = subprocess.run(
        [sys.executable, script, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert campaign.returncode == 0, campaign.stdout[-4000:] + campaign.stderr[-2000:]
    results = json.loads(out.read_text())["results"]
    assert results["refused"] > 100
    assert results["refused"] + results["loaded"] == inputs
    assert results["loaded"] > 10
