import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_three_hundred_damaged_folders_give_nothing_but_the_loaders_own_error(tmp_path):
    out = tmp_path / "fuzz.json"
    campaign = subprocess.run(
        [sys.executable, ROOT / "campaigns" / "fuzz_loaders.py", "--inputs", "300", "--out", out],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert campaign.returncode == 0, campaign.stdout[-4000:] + campaign.stderr[-2000:]
    results = json.loads(out.read_text())["results"]
    assert results["refused"] > 200
    assert results["loaded"] > 10
