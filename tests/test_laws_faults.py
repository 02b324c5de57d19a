"""The law suite bites: see `faults.py`."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_fault_is_caught():
  script = Path(__file__).with_name("faults.py")
  run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr
