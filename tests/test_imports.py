"""Imports run one way, and cost nothing until used."""

import ast
import contextlib
import pathlib
import subprocess
import sys
import types

import pytest

from attnx import catalog, light

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


@pytest.mark.parametrize('name', [name for name in catalog.names() if name != 'echo'])  # whose example needs T5's buckets
def test_rules_of_mechanisms_run_without_jax(name):
    """What `attnx.light` makes of a file takes the same examples and knows the same of them."""
    spec, proper = light.module('attnx.catalog').get(name), catalog.get(name)
    dims = light.module('attnx.spec').Dims(width=32, causal=proper.causal != 'bidirectional', num_layers=2)
    assert len(spec.examples) == len(proper.examples)
    for config, same in zip(spec.examples, proper.examples):
        assert repr(config) == repr(same)
        assert spec.reads(config) == proper.reads(same) and spec.publishes(config) == proper.publishes(same)
        with contextlib.suppress(light.Heavy):  # the first parameter; not a refusal
            spec.build(config, dims, rngs=light.Hollow('rngs'))


def test_what_is_not_imported_can_only_be_named():
    jax = light.Hollow('jax')
    assert jax.numpy.float32 is jax.numpy.float32 and jax.numpy.float32 != jax.numpy.int32
    assert types.new_class('Child', (jax.Module,)).__mro__[1:] == (object,)
    for use in (jax.f, bool, len, list, lambda x: x + 1, lambda x: 2 * x, lambda x: x == 3, lambda x: isinstance(3, x)):
        with pytest.raises(light.Heavy):
            use(jax.x)


def test_import_is_cheap():
    code = 'import sys, attnx; attnx.__version__; print(any(m in sys.modules for m in ("jax", "flax", "numpy")))'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == 'False'
