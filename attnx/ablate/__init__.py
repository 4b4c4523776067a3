"""Ablation studies: one question, matched arms, shared data order and seeds, a resumable grid of runs, paired statistics.

    study = attnx.ablate.Study(question='…', base='configs/base.py', arms={'gla': {…}, 'gqa': {…}})
    study.run()
    study.results        # {column: list}: pandas.DataFrame(study.results) is a table
    study.report()       # report.html, report.md, results.csv and figures in study.run_dir

`python -m attnx.ablate --config=configs/ablations/<study>.py` does the same from a file that asks one question.
"""

from attnx.ablate.match import Match
from attnx.ablate.study import Halving, Study

__all__ = ['Halving', 'Match', 'Study']
