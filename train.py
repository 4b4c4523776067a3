"""Trains a model, or resumes its training: `python train.py --config=configs/base.py --config.steps=2000`.

A config is Python and is executed. `python train.py --resolved=runs/base/config.json` runs what a run has written down,
from JSON alone. Short on purpose: flags -> config -> attnx.train.loop.command, which returns the exit code: 0 complete,
1 NaN or Inf, 2 bad input, 143 stopped.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from attnx.train import early

RESOLVED = flags.DEFINE_string('resolved', None, "a run's config.json to run again, in its run_dir, in place of --config")
if not any(argument.lstrip('-').startswith('resolved') for argument in sys.argv[1:]):  # else no config file is executed
    with early.refusals():
        CONFIG = config_flags.DEFINE_config_file('config', 'configs/base.py', lock_config=True)
TRACEBACK = flags.DEFINE_bool('traceback', False, 'show the traceback of an error')


def read(parts):
    """The Config of the command line, made by `attnx.train.config`, which is given as a module."""
    return parts.resolved(RESOLVED.value) if RESOLVED.value else parts.build(CONFIG.value)


def main(argv):
    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells every file it writes
    with early.refusals(traceback=lambda: TRACEBACK.value):
        if argv[1:]:
            raise ValueError(f'unexpected arguments {argv[1:]}; settings look like --config.steps=2000')
        task = early.check(read)  # before jax is imported, which takes longer than to refuse

        from attnx.train import config, loop

        made = read(config)
    sys.exit(loop.command(made, task=task, traceback=TRACEBACK.value))


if __name__ == '__main__':
    app.run(main, flags_parser=early.parse)
