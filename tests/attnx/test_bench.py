"""The memory benchmark, at a length that compiles quickly."""

import re

import pytest

from attnx import bench


def test_memory_grows_with_the_length_not_its_square():
    sizes = {T: bench.temporary_bytes(bench.blockwise, True, True, T, heads=1, width=16) for T in (1024, 4096)}
    assert sizes[4096] < 4.5 * sizes[1024]
    assert bench.temporary_bytes(bench.quadratic, True, True, 4096, heads=1, width=16) > 30 * sizes[4096]


def test_table(monkeypatch, capsys):
    sizes = {'quadratic': 64 * 2**20, 'blockwise': 2**20}
    monkeypatch.setattr(bench, 'temporary_bytes', lambda form, *_: sizes[form.__name__])
    bench.main(['memory', '--length=512'])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 4 and all(re.search(r'64\.0 +1\.0 +64\.0$', row) for row in rows)
    with pytest.raises(SystemExit):
        bench.main(['speed'])
