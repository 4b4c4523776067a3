"""Imports run one way, and cost nothing until used."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Package -> the attnx packages (and foreign ones) it must not import, directly.
LAYERS = [
    'pallas_kernels',
    'attnx.dispatch',
    'attnx.ops',
    'attnx.nn',
    'attnx.mechanisms',
    'attnx.models',
    'attnx.train',
]
FOREIGN = {
    'pallas_kernels': {'flax', 'ml_collections', 'optax', 'orbax', 'grain', 'attnx'},
    'attnx.ops': {'flax', 'ml_collections', 'optax', 'orbax', 'grain'},
    'attnx.tasks': {'flax', 'ml_collections', 'jax'},
    'configs': {'jax', 'flax', 'attnx', 'optax'},
}


def files():
    for folder in ('attnx', 'pallas_kernels', 'configs'):
        yield from sorted((ROOT / folder).rglob('*.py'))
    yield ROOT / 'train.py'


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imported(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f'{path}: relative import'
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def layer(module: str) -> int | None:
    for number, prefix in enumerate(LAYERS):
        if module == prefix or module.startswith(prefix + '.'):
            return number
    return None


@pytest.mark.parametrize('path', files(), ids=name_of)
def test_one_way(path):
    here, mine = name_of(path), layer(name_of(path))
    for module in imported(path):
        assert not module.startswith(('jax._src', 'jax.experimental.pallas.ops')), f'{here} imports {module}'
        for prefix, banned in FOREIGN.items():
            if here == prefix or here.startswith(prefix + '.'):
                assert module.split('.')[0] not in banned, f'{here} imports {module}'
        if mine is not None and (theirs := layer(module)) is not None:
            assert theirs <= mine, f'{here} imports {module}, which stands above it'


@pytest.mark.parametrize('path', sorted((ROOT / 'attnx' / 'mechanisms').rglob('*.py')), ids=name_of)
def test_mechanisms_import_no_other(path):
    for module in imported(path):
        banned = ('attnx.mechanisms', 'attnx.models', 'attnx.config', 'attnx.train', 'attnx.catalog')
        assert not module.startswith(banned), f'{name_of(path)} imports {module}'


def test_unknown_names_are_refused_before_jax_is_imported():
    code = """
import sys
from attnx import config
for given in (
    {'model': {'pattern': ('glaa',)}},
    {'model': {'pattern': ('gla',), 'overrides': {1: 'gqqa'}}},
    {'model': {'kind': 'encoder_decoder', 'encoder': {'pattern': ('gkla',)}}},
    {'model': {'mixers': {'a': {'kind': 'gqaa', 'window': 3}}}},
    {'data': {'task': {'kind': 'textt'}}},
    {'data': {'task': {'kind': 'text', 'path': '/nowhere/*.txt'}}},
    {'data': {'task': {'kind': 'text', 'lenght': 3}}},
):
    try:
        config.check_names(given)
        print(given)
    except ValueError:
        pass
config.check_names({'model': {'pattern': ('a', 'gla'), 'mixers': {'a': {'kind': 'gqa'}}}, 'data': {'task': {'kind': 'text'}}})
print('jax' in sys.modules or 'flax' in sys.modules)
"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == 'False'


def test_import_is_cheap():
    code = 'import sys, attnx; attnx.__version__; print(any(m in sys.modules for m in ("jax", "flax", "numpy")))'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == 'False'
