"""Every Python block of the README runs as it stands."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / 'README.md').read_text()
BLOCKS = re.findall(r'^```python\n(.*?)^```', README, re.M | re.S)


@pytest.mark.parametrize('code', BLOCKS, ids=[re.sub(r'\W+', '_', b.splitlines()[0])[:40] for b in BLOCKS])
def test_snippet(code):
    assert len(code.splitlines()) <= 15, 'a snippet has at most 15 lines'
    exec(compile(code, 'README.md', 'exec'), {})


def test_there_are_snippets():
    assert len(BLOCKS) >= 4
