"""The benchmark's own code: a tiny row on eight devices, and the ratios it prints."""

import numpy as np
import pytest

from attnx import config, models
from attnx.ablate import match
from attnx.train import bench, timing


def entry(name, who, devices, rate, **more):
    return {'name': name, 'who': who, 'devices': devices, 'tokens_per_second': rate, 'flops_per_token': 2.0} | more


def test_ratios():
    results = [
        entry('gpt2-124m', 'attnx', 1, 120.0),
        entry('gpt2-124m', 'attnx', 1, 150.0, variant=['batch=64']),
        entry('gpt2-124m', 'torch', 1, 100.0),
        entry('ring', 'attnx', 1, 10.0),
        entry('ring', 'attnx', 2, 18.0, flops_per_token=3.0),
        entry('gpt2-124m overhead', 'attnx', 1, 100.0),
        entry('gpt2-124m overhead', 'bare', 1, 101.0),
        entry('gpt2-124m overhead', 'saving', 1, 100.0, step_ms=100.0, save_ms=500.0, stall_ms=200.0),
        {'name': 'llama-1.3b', 'who': 'attnx', 'devices': 1, 'failed': 'out of memory'},
    ]
    assert bench.compare(results) == [
        'gpt2-124m: 1.200 times the tokens/s of PyTorch',
        'gpt2-124m batch=64, 1 devices: 1.250 times the tokens/s without',
        'gpt2-124m batch=64: 1.500 times the tokens/s of PyTorch',
        'ring: 2 devices have 1.800 times the tokens/s of one, 2.700 the FLOP/s',
        'gpt2-124m overhead: norm, finite check and metrics cost 1.00 % of a step',
        'gpt2-124m overhead: a checkpoint costs 500 ms (200 ms of them nothing runs), 1.00 % of 500 steps',
    ]


def test_settings_reach_the_row_or_its_model():
    row = bench.changed(bench.ROWS[0], ['batch=4', 'remat=full', 'num_layers=3'])
    assert (row.batch, row.model['remat'], row.model['num_layers']) == (4, 'full', 3)


def test_models_that_are_compared_have_as_many_parameters():
    def parameters(name):
        row = next(r for r in bench.ROWS if r.name == name)
        return match.costs(config.build(models.ModelConfig, timing.named(row.model)), row.length).parameters

    for name, other in bench.BEATEN.items():
        if '1.3b' in name:
            assert parameters(name) == pytest.approx(parameters(other), rel=match.Match().tolerance / 2)


@pytest.mark.slow
def test_a_tiny_row_on_eight_devices():
    def ours(name, devices, who='attnx'):
        row = bench.tiny(next(r for r in bench.ROWS if r.name == name))
        return row, timing.measure(timing.compiled(timing.lower(row, devices, 'float32', who)), steps=1)

    row, found = ours('llama-1.3b', 1)
    assert np.isfinite(found['loss'])
    assert found['tokens_per_second'] == pytest.approx(1e3 * row.batch * row.length / found['step_ms'])
    _, saved = ours('llama-1.3b', 1, 'saving')
    assert saved['stall_ms'] > 0 and np.isfinite(saved['save_ms'])  # a difference of times, here of a busy machine
    row, found = ours('ring', 8)
    assert (found['length'], found['batch'], found['devices']) == (8 * row.length, row.batch, 8)
