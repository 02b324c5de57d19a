"""The table of what a configuration costs.

python -m triform.arch.flops --config=configs/retnet_tiny.py --json=costs.json
"""

import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from triform.arch import cli
from triform.arch.flops.report import report, table

CONFIG = config_flags.DEFINE_config_file("config", None, "the run, a file in configs/")
JSON = flags.DEFINE_string("json", None, "a file to write the numbers to")
flags.mark_flag_as_required("config")


def main() -> int:
  told = report(CONFIG.value)
  print(table(told))
  if JSON.value is not None:
    Path(JSON.value).write_text(json.dumps(told, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  cli.run(main)
