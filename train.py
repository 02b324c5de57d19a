"""Trains a model, or goes on where an earlier run in the same work directory stopped.

python train.py --config=configs/retnet_tiny.py --config.total_steps=100
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from triform.arch import cli, hosts

CONFIG = config_flags.DEFINE_config_file("config", None, "the run, a file in configs/")
WORKDIR = flags.DEFINE_string("workdir", None, "where the run is kept; default runs/<config>")
PROCESSES = flags.DEFINE_string(
  "processes", None, "this is one of several processes: auto, or HOST:PORT,COUNT,INDEX"
)
PROFILE = flags.DEFINE_bool("profile", False, "write a trace of three steps to WORKDIR/profile")
flags.mark_flag_as_required("config")


def main() -> int:
  from triform.arch.training.config import keep_lengths
  from triform.arch.training.loop import train

  if PROCESSES.value is not None:
    hosts.start(PROCESSES.value)
  file, _, variant = cli.early_flag("config").partition(":")
  name = "_".join(filter(None, (Path(file).stem, variant)))
  workdir = WORKDIR.value or Path("runs") / name
  config = CONFIG.value
  keep_lengths(config, config_flags.get_override_values(flags.FLAGS["config"]))
  if not train(config, workdir, profile=PROFILE.value) and hosts.is_first():
    print(f"stopped; what was done is in {workdir}, and the same command goes on from there")
  return 0


if __name__ == "__main__":
  cli.run(main)
