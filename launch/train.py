"""Trains a model, or goes on training it.

    python launch/train.py --config=configs/tiny.py --config.data.corpus=DIR --workdir=runs/tiny

The same command continues from the newest checkpoint. SIGTERM saves and exits 0; Ctrl-C saves and exits 130.
"""

import signal
import sys

from absl import flags

from dsv3_jax import config_flags
from dsv3_jax.train.loop import train

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of checkpoints, metrics and plots", required=True)


def main() -> None:
    try:
        stopped_by = train(config_flags.resolve(), _WORKDIR.value)
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    if stopped_by == signal.SIGINT:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    config_flags.define()
    config_flags.run(main)
