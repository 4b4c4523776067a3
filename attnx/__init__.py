"""attnx: every attention mechanism under one contract, mixed per layer.

Public names load on first use, so that `import attnx` costs next to nothing:
  attnx.get('gla')                 a mechanism: its module, config, paper and limits
  attnx.list(family=…, has=…)      the catalogue, filtered
  attnx.explain(...)               which implementation runs, and why others do not
  attnx.load('runs/base')          a trained model, its config and step
  attnx.ops                        the pure functions: arrays in, arrays out
  attnx.Context, Dims, Output      what a mechanism is called with, and what it returns
"""

import importlib

__version__ = '0.1.0'

_PUBLIC = {
    'get': 'attnx.catalog.get',
    'list': 'attnx.catalog.names',
    'explain': 'attnx.explanation.explain',
    'Context': 'attnx.spec.Context',
    'Dims': 'attnx.spec.Dims',
    'Output': 'attnx.spec.Output',
    'Spec': 'attnx.spec.Spec',
    'ModelConfig': 'attnx.models.ModelConfig',
    'build_model': 'attnx.models.build',
    'generate': 'attnx.models.generate',
    'load': 'attnx.train.load.load',
}
_MODULES = (
    'ablate', 'catalog', 'config', 'dispatch', 'mechanisms', 'models', 'nn', 'ops', 'sharding', 'spec', 'tasks', 'train',
)  # fmt: skip

__all__ = [*_PUBLIC, *_MODULES]


def __getattr__(name):
    if name in _PUBLIC:
        module, attribute = _PUBLIC[name].rsplit('.', 1)
        value = getattr(importlib.import_module(module), attribute)
    elif name in _MODULES:
        value = importlib.import_module(f'attnx.{name}')
    else:
        raise AttributeError(f'attnx has no attribute {name!r}; it has {", ".join(sorted(__all__))}')
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
