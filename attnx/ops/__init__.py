"""Pure functions: arrays in, arrays out. No Flax, no config. Names load on first use.

`attnx.ops.softmax_attention` is the function; its forms come by `from attnx.ops.softmax_attention import xla`.
"""

import importlib
import sys
import types

# Each op is a function in the module of its own name; the others are modules to compose from.
_OPS = ('softmax_attention', 'gated_linear', 'delta_rule', 'short_conv')
_MODULES = ('masks', 'scores', 'positions', 'feature_maps')

__all__ = [*_OPS, *_MODULES]


class _Ops(types.ModuleType):
    """Importing attnx.ops.<op> makes Python bind the submodule to the op's name: bind the function in its place."""

    def __setattr__(self, name, value):
        if name in _OPS and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __getattr__(self, name):
        if name not in __all__:
            raise AttributeError(f'attnx.ops has no {name!r}; it has {", ".join(__all__)}')
        importlib.import_module(f'attnx.ops.{name}')
        return self.__dict__[name]

    def __dir__(self):
        return __all__


sys.modules[__name__].__class__ = _Ops
