"""Runs a module that measures in a process of its own, so that its devices' memory is its own."""

import json
import os
import subprocess
import sys
from typing import Any


def run(module: str, *arguments: str) -> Any:
    """Runs `python -m module arguments` and returns the JSON that it prints last.

    Raises:
      ValueError: it failed; the message ends with what it said.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "PYTHONUNBUFFERED": "1"}
    environment.pop("XLA_PYTHON_CLIENT_PREALLOCATE", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])
