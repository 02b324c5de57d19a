"""What is installed, and what importing it costs.

The packages are folders of other names (`arch/` is `triform.arch`), so a mistake in the mapping
builds a wheel that overwrites other people's packages without a word.
"""

import ast
import email
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("arch", "kernels")


def python(*arguments, cwd, **environment):
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=cwd,
    env=os.environ | environment,
    capture_output=True,
    text=True,
  )


def succeed(*arguments, cwd, **environment):
  done = python(*arguments, cwd=cwd, **environment)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def project_files():
  """What is tracked, or would be at the next commit."""
  listed = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  if listed.returncode:
    pytest.skip(f"needs a git checkout: {listed.stderr.strip()}")
  return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Built from a copy: a `build/` left in the tree puts deleted modules back into the wheel."""
  folder = tmp_path_factory.mktemp("wheel")
  for name in project_files():
    copy = folder / "source" / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes((ROOT / name).read_bytes())
  options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "out")
  succeed("-m", "pip", "wheel", *options, "./source", cwd=folder)
  (path,) = (folder / "out").iterdir()
  return path


@pytest.mark.slow
def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  packaged = {f"triform/{name}" for name in project_files() if name.split("/")[0] in PACKAGES}
  information = {name for name in names if name.split("/")[0].endswith(".dist-info")}
  assert names - information == packaged
  assert {f"triform/{package}/py.typed" for package in PACKAGES} <= names
  assert any(name.endswith("/LICENSE") for name in information)


def third_party_imports():
  """The names of the packages that any module of ours imports, wherever in it."""
  names = set()
  for package in PACKAGES:
    for path in (ROOT / package).rglob("*.py"):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
          names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
          names.add(node.module)
  return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"triform"}


@pytest.mark.slow
def test_the_wheel_declares_what_it_imports(wheel):
  """As a dependency, or as one of an extra for users; extras for tests do not count."""
  with zipfile.ZipFile(wheel) as archive:
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
  declared = {
    re.match(r"[\w.-]+", requirement)[0].replace("_", "-").lower()
    for requirement in metadata.get_all("Requires-Dist")
    if 'extra == "test"' not in requirement
  }
  distributions = importlib.metadata.packages_distributions()
  for imported in sorted(third_party_imports()):
    names = {name.replace("_", "-").lower() for name in distributions.get(imported, [imported])}
    assert names & declared, f"{imported} is imported but not declared"


@pytest.mark.slow
def test_a_layer_runs_from_the_wheel(wheel, tmp_path):
  site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
  elsewhere.mkdir()
  options = ("--no-deps", "--no-index", "--target", str(site))
  succeed("-m", "pip", "install", *options, str(wheel), cwd=elsewhere)
  program = """
import jax.numpy as jnp
from flax import nnx
import triform.arch, triform.kernels
layer = triform.arch.Retention(16, num_heads=2, rngs=nnx.Rngs(0))
y, state = layer(jnp.ones((2, 5, 16)), form="chunkwise")
print(y.shape, state.position, triform.arch.__file__, triform.kernels.__file__, sep="\\n")
"""
  # An editable install of the checkout is found after PYTHONPATH.
  out = succeed("-c", program, cwd=elsewhere, PYTHONPATH=str(site)).splitlines()
  assert out == [
    "(2, 5, 16)",
    "[5 5]",
    str(site / "triform" / "arch" / "__init__.py"),
    str(site / "triform" / "kernels" / "__init__.py"),
  ]


@pytest.mark.parametrize(
  ("package", "forbidden"),
  [
    (
      "triform.arch",
      {"tensorflow_datasets", "tensorflow", "grain", "orbax", "fastapi", "tensorboardX"},
    ),
    ("triform.kernels", {"flax", "optax", "triform.arch"}),
  ],
)
def test_imports_are_light(package, forbidden, tmp_path):
  program = f"import sys, {package}; print(*sys.modules, sep='\\n')"
  loaded = succeed("-c", program, cwd=tmp_path).split()
  assert package in loaded
  assert not forbidden & set(loaded)


def test_the_bare_folder_says_what_it_is():
  done = python("-c", "import arch", cwd=ROOT)
  assert done.returncode != 0
  assert "this folder is the package `triform.arch`: install it" in done.stderr
