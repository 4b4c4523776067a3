"""Trains a model, or resumes its training: `python train.py --config=configs/base.py --config.steps=2000`.

A config is Python and is executed. `python train.py --resolved=runs/base/config.json` runs what a run has written down,
from JSON alone. Short on purpose: flags -> config -> attnx.train.loop.command, which returns the exit code: 0 complete,
1 NaN or Inf, 2 bad input, 143 stopped.
"""

import contextlib
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags


@contextlib.contextmanager
def known_keys():
    try:
        yield
    except AttributeError as error:  # ml_collections on a key that the config file does not have
        text = str(error.args[0]).replace('\n', ' ')
        print(f'error: unknown config key {text} (valid: the keys of the config file)', file=sys.stderr)
        sys.exit(2)


RESOLVED = flags.DEFINE_string('resolved', None, "a run's config.json to run again, in its run_dir, in place of --config")
if not any(argument.lstrip('-').startswith('resolved') for argument in sys.argv[1:]):  # else no config file is executed
    with known_keys():
        CONFIG = config_flags.DEFINE_config_file('config', 'configs/base.py', lock_config=True)
TRACEBACK = flags.DEFINE_bool('traceback', False, 'show the traceback of an error')


def parse(argv):
    with known_keys():
        return app.parse_flags_with_usage(argv)


def resolved(path):
    from attnx import config
    from attnx.train import loop

    try:
        return config.from_json(loop.Config, pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f'--resolved={path}: {error}') from None


def main(argv):
    from attnx import config
    from attnx.train import loop

    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells every file it writes
    try:
        if argv[1:]:
            raise ValueError(f'unexpected arguments {argv[1:]}; settings look like --config.steps=2000')
        made = resolved(RESOLVED.value) if RESOLVED.value else config.build(loop.Config, CONFIG.value)
    except ValueError as error:
        if TRACEBACK.value:
            raise
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    sys.exit(loop.command(made, traceback=TRACEBACK.value))


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
