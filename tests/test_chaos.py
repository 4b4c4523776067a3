"""A few faults of tests/chaos.py, one of a kind: nothing is lost."""

import pathlib
import subprocess
import sys

import pytest

QUICK = ('kill inside a checkpoint', 'SIGTERM')
SLOW = (
    'checkpoint file: flip a bit', 'full disk', 'NaN in a layer',
    'lost process of two', 'other number of processes', 'SIGTERM to one of two', 'NaN in a layer of two', 'changed data',
    'kill at a file operation',
)  # fmt: skip


@pytest.mark.parametrize('kinds', [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=['quick', 'slow'])
def test_faults_are_survived(kinds):
    command = [sys.executable, pathlib.Path(__file__).parent / 'chaos.py', '--faults', str(len(kinds)), '--kinds', *kinds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('  ok  ') == len(kinds), done.stdout
