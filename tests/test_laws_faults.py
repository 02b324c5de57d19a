"""The law suite bites: see `faults.py`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from faults import ROOT
from faults_listed import FAULTS

ROW = re.compile(r"^\| (\w+) \| (.+) \| `(.+)` \| `(.+)` \|$", re.MULTILINE)


def test_the_code_to_break_is_there():
  for fault in FAULTS:
    assert (ROOT / fault.file).read_text().count(fault.old) == 1, fault.name


def test_the_documents_list_every_fault():
  section = (ROOT / "BUILD.md").read_text().partition("### The laws bite")[2].partition("\n## ")[0]
  rows = ROW.findall(section)
  assert [row[:3] for row in rows] == [(fault.kind, fault.name, fault.file) for fault in FAULTS]
  for fault, (*_, caught_by) in zip(FAULTS, rows, strict=True):
    assert caught_by in fault.select


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(dict.fromkeys(fault.kind for fault in FAULTS)))
def test_every_fault_is_caught(kind):
  names = [fault.name for fault in FAULTS if fault.kind == kind]
  command = [sys.executable, str(Path(__file__).with_name("faults.py")), *names]
  run = subprocess.run(command, capture_output=True, text=True)
  assert run.returncode == 0, run.stdout + run.stderr
