"""Trains a model, or resumes its training: `python train.py --config=configs/base.py --config.steps=2000`.

Short on purpose: flags -> config -> attnx.train.loop.run. Exit codes: 0 complete, 1 NaN or
Inf, 2 bad input, 143 stopped.
"""

import contextlib
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


with known_keys():
    CONFIG = config_flags.DEFINE_config_file('config', 'configs/base.py', lock_config=True)
TRACEBACK = flags.DEFINE_bool('traceback', False, 'show the traceback of an error')


def parse(argv):
    with known_keys():
        return app.parse_flags_with_usage(argv)


def main(argv):
    from attnx import config
    from attnx.train import loop, report

    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells every file it writes
    try:
        if argv[1:]:
            raise ValueError(f'unexpected arguments {argv[1:]}; settings look like --config.steps=2000')
        result = loop.run(config.build(loop.Config, CONFIG.value))
    except ValueError as error:
        if TRACEBACK.value:
            raise
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except report.TrainingFailure as failure:
        print(f'training failed: {failure}', file=sys.stderr)
        sys.exit(1)
    loop.tell(result)
    sys.exit(143 if result.status == 'stopped' else 0)


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
