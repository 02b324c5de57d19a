"""README's table of architectures is what the script says."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_readme_has_the_table_of_architectures():
  spec = importlib.util.spec_from_file_location("t", ROOT / "benchmarks" / "architectures.py")
  script = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(script)
  readme = (ROOT / "README.md").read_text()
  assert f"{script.BEGIN}\n{script.table()}\n{script.END}" in readme
