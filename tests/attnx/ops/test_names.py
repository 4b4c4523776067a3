"""attnx.ops.<op> is the function, also after its module of the same name was imported."""

import importlib
import types

import pytest

from attnx import ops


@pytest.mark.parametrize('name', [
    'softmax_attention', 'gated_linear', 'delta_rule', 'paged_attention', 'short_conv', 'weighted_attention',
])  # fmt: skip
def test_op(name):
    module = importlib.import_module(f'attnx.ops.{name}')
    assert isinstance(module, types.ModuleType) and getattr(ops, name) is getattr(module, name)


@pytest.mark.parametrize('name', ['masks', 'scores', 'positions', 'feature_maps', 'normalizers'])
def test_vocabulary(name):
    assert isinstance(getattr(ops, name), types.ModuleType)
