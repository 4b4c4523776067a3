"""attnx.ops.<op> is the function, however its module was imported before."""

import importlib
import types

import pytest

from attnx import ops


@pytest.mark.parametrize('name', ops.__all__)
def test_name(name):
    module = importlib.import_module(f'attnx.ops.{name}')
    assert isinstance(module, types.ModuleType)
    value = getattr(ops, name)
    assert value is (getattr(module, name) if callable(value) else module)
    assert callable(value) == (name in ('softmax_attention', 'gated_linear', 'delta_rule', 'short_conv'))


def test_unknown_name():
    with pytest.raises(AttributeError, match='softmax_attention'):
        _ = ops.softmax
