"""Trains a model, or resumes its training: `python train.py --config=configs/base.py --config.steps=2000`.

A config is Python and is executed. `python train.py --resolved=runs/base/config.json` runs what a run has written down,
from JSON alone. Short on purpose: flags -> config -> attnx.train.loop.command, which returns the exit code: 0 complete,
1 NaN or Inf, 2 bad input, 143 stopped.
"""

import contextlib
import functools
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags


@contextlib.contextmanager
def refusals(kind, text='{}', traceback=lambda: False):
    """Within: errors of `kind` end the process with one line instead of a traceback."""
    try:
        yield
    except kind as error:
        if traceback():
            raise
        print('error:', text.format(str(error.args[0]).replace('\\n', ' ').replace("\\'", '')), file=sys.stderr)
        sys.exit(2)


# What ml_collections raises for a key that the config file does not have.
known_keys = functools.partial(refusals, AttributeError, 'unknown config key {} (valid: the keys of the config file)')
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
    from attnx.train import loop, metrics

    try:
        return config.from_json(loop.Config, pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(metrics.printable(f'--resolved={path}: {error}')) from None


def main(argv):
    from attnx import config

    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells every file it writes
    with refusals(ValueError, traceback=lambda: TRACEBACK.value):
        if argv[1:]:
            raise ValueError(f'unexpected arguments {argv[1:]}; settings look like --config.steps=2000')
        if not RESOLVED.value:
            config.check_names(CONFIG.value)

        from attnx.train import loop  # seconds: what names alone show is refused before

        made = resolved(RESOLVED.value) if RESOLVED.value else config.build(loop.Config, CONFIG.value)
    sys.exit(loop.command(made, traceback=TRACEBACK.value))


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
