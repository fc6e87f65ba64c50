"""The list of exported tensors against that of the published checkpoint."""

import gzip
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_dry_run_lists_the_published_tensors():
    """Name, shape, dtype and file of all 91,991, and nothing else on stdout."""
    command = [
        sys.executable,
        "launch/export_hf.py",
        "--config=configs/deepseek_v3_671b.py",
        "--dtype=fp8",
        "--dry_run",
    ]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = [json.loads(line) for line in printed.splitlines()]
    official = json.loads(gzip.decompress((ROOT / "tests/golden/official_tensors.json.gz").read_bytes()))
    assert len(listed) == 91_991
    assert {tensor.pop("name"): tensor for tensor in listed} == official
