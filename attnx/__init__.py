"""attnx: every attention mechanism under one contract, mixed per layer.

Public names load on first use, so that `import attnx` costs next to nothing:
  attnx.get('gla')                 a mechanism: its module, config, paper and limits
  attnx.list(family=…, has=…)      the catalogue, filtered
  attnx.explain(...)               which implementation runs, and why others do not
  attnx.ops                        the pure functions: arrays in, arrays out
  attnx.Context, Dims, Output      what a mechanism is called with, and what it returns
"""

import importlib

__version__ = '0.1.0'

_PUBLIC = {
    'get': 'attnx.catalog',
    'list': 'attnx.catalog',
    'explain': 'attnx.explanation',
    'Context': 'attnx.spec',
    'Dims': 'attnx.spec',
    'Output': 'attnx.spec',
    'Spec': 'attnx.spec',
    'build_model': 'attnx.models',
    'generate': 'attnx.models',
    'ModelConfig': 'attnx.models',
}
_MODULES = ('ops', 'nn', 'models', 'mechanisms', 'tasks', 'train', 'catalog', 'config', 'dispatch', 'sharding', 'spec')

__all__ = [*_PUBLIC, *_MODULES]  # noqa: PLE0604


def __getattr__(name):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f'attnx.{name}')
    else:
        raise AttributeError(f'attnx has no attribute {name!r}; it has {", ".join(sorted(__all__))}')
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
