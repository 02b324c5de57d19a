"""Settings every test runs under: CPU, no silent rank promotion, reproducible examples."""

import gc
import os
import re
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from hypothesis import HealthCheck, Phase, settings

# The programs are tiny: compile quickly rather than well. XLA reads its flags at the first compile,
# processes started by a test inherit them, and what the user set comes last and wins.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 "
if jax.__version_info__ < (0, 11):  # later versions have but one code generator
  QUICK += "--xla_cpu_use_fusion_emitters=false "
os.environ["XLA_FLAGS"] = QUICK + os.environ.get("XLA_FLAGS", "")

jax.config.update("jax_numpy_rank_promotion", "raise")

gc.set_threshold(100_000, 50, 100)  # tracing makes millions of objects, few of them garbage

DRAWN = r"(-parallel|-chunkwise|-recurrent|-\(\d+, \d+\))?(-b?float\d+)?"
LAW = re.compile(rf"test_laws(?:_kernels)?.py::.*\[(.*?){DRAWN}\]$")
# Files whose tests take long and share nothing.
APART = re.compile(r"(test_compiled_for_\w+|test_laws_faults)\.py::")
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile(
  "quick",
  max_examples=5,
  derandomize=True,
  database=None,
  phases=[Phase.explicit, Phase.generate],  # shrinking is for `thorough`
  **COMMON,
)
settings.register_profile("thorough", max_examples=100, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_runtest_teardown():
  """Programs compiled for some thousand tests would fill the memory: drops them every 2 GB."""
  global kept_bytes
  if resident_bytes() > kept_bytes + 2**31:
    jax.clear_caches()
    gc.collect()
    kept_bytes = resident_bytes()


def resident_bytes() -> int:
  """Memory of this process; 0 where Linux does not tell."""
  statm = Path("/proc/self/statm")
  return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


kept_bytes = 2**30


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """For `-n`: a file's tests go to one worker, which makes and compiles what they share once."""
  from xdist.scheduler import LoadScopeScheduling

  class BySubject(LoadScopeScheduling):
    def _split_scope(self, nodeid):
      if APART.search(nodeid):
        return nodeid
      law = LAW.search(nodeid)
      return law[1] if law else nodeid.partition("::")[0]

  return BySubject(config, log) if config.getvalue("dist") == "load" else None
