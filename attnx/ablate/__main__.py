"""Runs a study from its file, and writes the report.

  python -m attnx.ablate --config=configs/ablations/ratio.py [--config.seeds="(0,)"]
  … --plan          says what would run, matched and validated, and stops
  … --only_report   writes the report from what is finished, and trains nothing
  … --workers=2     processes on this machine; start the command on further machines for more
  … --slurm=8 --slurm_options="timeout_min=240,slurm_partition=gpu,gpus_per_node=1"
                    submits 8 workers as a SLURM array through submitit, with its options; without a time SLURM ends them
                    after five minutes, and the same command goes on

Exit codes: 0 complete, 2 bad input, 143 stopped; the same command goes on where it was.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from attnx.train import early

CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
PLAN = flags.DEFINE_bool('plan', False, 'say what would run, and stop')
REPORT = flags.DEFINE_bool('report', True, 'write the report; --noreport: leave it')
ONLY = flags.DEFINE_bool('only_report', False, 'write the report from what is finished, and train nothing')
WORKERS = flags.DEFINE_integer('workers', 1, 'processes on this machine', lower_bound=1)
SLURM = flags.DEFINE_integer('slurm', 0, 'workers to submit as a SLURM array', lower_bound=0)
OPTIONS = flags.DEFINE_list('slurm_options', [], 'options of submitit: timeout_min=240,slurm_partition=gpu,…')


def describe(study) -> str:
    """The arms, what differs, and what they cost, as text."""
    from attnx.ablate.report import arms_table

    header, *rows = arms_table(study)
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    lines = ['  '.join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (header, *rows)]
    return '\n'.join([study.question, '', *lines, '', f'{len(study.cells())} runs in {study.run_dir}'])


def alone(study) -> None:
    if study.halving.rungs:
        raise ValueError('halving compares all arms at a rung: run it with --workers=1')


def main(argv):
    from attnx import config as config_lib
    from attnx.ablate import runner
    from attnx.ablate.study import Study

    if not flags.FLAGS['verbosity'].present:
        logging.set_verbosity(logging.WARNING)
    arguments = sys.argv[1:]
    try:
        if argv[1:]:
            raise ValueError(f'unexpected arguments {argv[1:]}; settings look like --config.seeds="(0,)"')
        if CONFIG.value is None:
            raise ValueError('give a study: --config=configs/ablations/<study>.py')
        study = config_lib.build(Study, CONFIG.value)
        if PLAN.value:
            print(describe(study))
            return
        if SLURM.value:
            options = runner.slurm_options(OPTIONS.value)
            alone(study)
            study.cells()
            jobs = runner.submit(arguments, SLURM.value, runner.folder(study), options)
            print(f'submitted {len(jobs)} workers; write the report later with --only_report')
            return
        if not ONLY.value:
            if WORKERS.value > 1:
                alone(study)
                study.cells()
                if code := runner.workers_of(arguments, WORKERS.value):
                    sys.exit(code)
            else:
                runner.run(study)
        if REPORT.value:
            print(study.report())
    except ValueError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except runner.Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(143)


if __name__ == '__main__':
    app.run(main, flags_parser=early.parse)
