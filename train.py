"""Trains a language model, or resumes it: `python train.py --config=configs/base.py --config.steps=2000`.

Short on purpose: flags -> config -> attnx.train.loop.run.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file('config', 'configs/base.py', lock_config=True)
TRACEBACK = flags.DEFINE_bool('traceback', False, 'show the traceback of an error')


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
    print(loop.describe(result))
    sys.exit(143 if result.status == 'stopped' else 0)


if __name__ == '__main__':
    app.run(main)
