"""Trains a model, or resumes its training: `python train.py --config=configs/base.py --config.steps=2000`.

Short on purpose: flags -> config -> attnx.train.loop.run. Exit codes: 0 complete, 1 NaN or Inf, 2 bad input, 143 stopped.
"""

import contextlib
import functools
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
with known_keys():
    CONFIG = config_flags.DEFINE_config_file('config', 'configs/base.py', lock_config=True)
TRACEBACK = flags.DEFINE_bool('traceback', False, 'show the traceback of an error')


def parse(argv):
    with known_keys():
        return app.parse_flags_with_usage(argv)


def main(argv):
    from attnx import config

    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells every file it writes
    with refusals(ValueError, traceback=lambda: TRACEBACK.value):
        if argv[1:]:
            raise ValueError(f'unexpected arguments {argv[1:]}; settings look like --config.steps=2000')
        config.check_names(CONFIG.value)

        from attnx.train import loop, report  # seconds: what names alone show is refused before

        try:
            result = loop.run(config.build(loop.Config, CONFIG.value))
        except report.TrainingFailure as failure:
            print(f'training failed: {failure}', file=sys.stderr)
            sys.exit(1)
    loop.tell(result)
    sys.exit(143 if result.status == 'stopped' else 0)


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
