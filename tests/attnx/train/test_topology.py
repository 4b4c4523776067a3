"""Plans for chips that are not here: refusals, the model of GPUs, and the compiler's where libtpu is installed."""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys
import time

import pytest
from rich.console import Console

from attnx import config as config_lib
from attnx import plan as plan_lib
from attnx import sharding
from attnx.train import chips, compiled, topology
from attnx.train.config import Config
from pallas_kernels import libtpu

PATH = pathlib.Path(__file__).parents[3] / 'configs' / 'sizes.py'
needs_libtpu = pytest.mark.skipif(libtpu.missing() is not None, reason=str(libtpu.missing()))


def run_of(build=lambda given: config_lib.build(Config, given), **changes):
    given = {
        'model': {'width': 256, 'num_layers': 2, 'pattern': ('gla', 'gqa'), 'dtype': 'bfloat16', **changes.pop('model', {})},
        'data': {'length': 512, 'batch_size': 64, 'task': {'kind': 'tokens', 'vocab_size': 1024}},
        'mesh': {'fsdp': -1},
        'sharding': 'fsdp',
        **changes,
    }
    return build(given)


def size_of(size, **changes):
    spec = importlib.util.spec_from_file_location('sizes', PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dataclasses.replace(config_lib.build(Config, module.get_config(size)), **changes)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('v5q:8x8x8', r"unknown topology 'v5q:8x8x8'; did you mean 'v5[ep]'.*v5p:2x2x1\|.*16x16x16.*h100:<number>"),
        ('v5p:8x8', 'nearest: v5p:4x4x4.*topologies: v4'),
        ('v5e:16x32', 'nearest: v5e:16x16'),
        ('h100:2x4', 'a number of GPUs is expected, such as h100:8'),
        ('pod', "unknown topology 'pod'"),
    ],
)
def test_unknown_topologies(name, message):
    with pytest.raises(ValueError, match=message):
        topology.plan(run_of(), name)


def test_without_libtpu_the_pip_line(monkeypatch):
    monkeypatch.setattr(libtpu, 'missing', lambda: "libtpu is not installed: pip install 'libtpu>=0.0.50,<0.1'")
    with pytest.raises(ValueError, match="v5p:8x8x8: libtpu is not installed: pip install 'libtpu"):
        topology.plan(run_of(), 'v5p:8x8x8')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'mesh': {'data': 3, 'fsdp': 4}}, r"does not tile 8 devices; the nearest that does: \{'data': 2, 'fsdp': 4\}; .*fsdp"),
        ({'mesh': {'fsdp': 4, 'tensor': 2}}, "'fsdp' has no use for mesh axis 'tensor'"),
        ({'mesh': {'tensor': 8}, 'sharding': 'fsdp_tp'}, r"4 heads are not .* over the 8.*works: \{'data': 2, 'tensor': 4\}"),
        ({'data': {'length': 512, 'batch_size': 12, 'task': {'kind': 'tokens'}}}, 'batch_size 12 must be a multiple of 8'),
    ],
)
def test_a_run_that_does_not_suit_the_devices(changes, message):
    with pytest.raises(ValueError, match=message):
        topology.plan(run_of(**changes), 'h100:8')


def test_gpus_are_modelled():
    run = run_of()
    found = topology.plan(run, 'h100:8')
    assert found.how == 'analytic model' and 'neither compiled nor measured' in found.notes[0]
    ready, task = topology.prepared(run, topology.topology('h100:8'))
    made = topology.program(ready.model, packed=task.packed)
    whole = 4 * sum(s.size for s in made.shapes.values())
    assert found.memory['parameters'] == pytest.approx(whole / 8, rel=0.01)  # vectors without a model width are whole
    assert found.memory['optimizer'] == pytest.approx(whole / 4, rel=0.01)
    useful = plan_lib.flops_per_token(ready.model, made.axes, made.shapes, 512) * 64 * 512
    assert found.useful * 8 == useful
    assert {e.kind for e in found.exchanges} == {'all-gather', 'reduce-scatter'}
    full = topology.plan(run_of(model={'remat': 'full'}), 'h100:8')
    assert full.memory['activations'] < found.memory['activations'] and full.flops == pytest.approx(found.flops * 4 / 3)
    nodes = topology.plan(run_of(mesh={'data': 2, 'fsdp': 8}), 'h100:16')
    across = next(e for e in nodes.exchanges if e.axes == 'data')
    assert across.wire / across.seconds == pytest.approx(chips.LINKS * chips.NETWORK)


def test_links_of_a_torus():
    v5p, v5e = topology.topology('v5p:4x4x8'), topology.topology('v5e:4x8')
    line = [(x, 0, 0) for x in range(4)]
    assert chips.links(line, v5p) == 2 and chips.links(line[:2], v5p) == 1
    assert chips.links([(x, y, 0) for x in range(4) for y in range(4)], v5p) == 4
    assert chips.links([(x, 0, 0) for x in range(4)], v5e) == 1  # no ring below 16
    assert (v5p.size, topology.topology('tpu7x:2x2x2').size) == (128, 16)  # two devices a chip


def test_the_refusal_of_the_compiler_is_read():
    message = (
        'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries '
        '(18.64G) exceeds available HBM (15.75G). HLO module: jit__lambda.'
    )
    assert compiled.too_large(message) == 18.64 * 2**30
    assert compiled.too_large('INTERNAL: something else') is None


def test_buffers_of_a_program_are_counted():
    """Arguments, and what else lies in main memory: not what fusions hold, nor what lies on the chip."""
    buffers = """BufferAssignment:
allocation 0: size 4, color 8, page 0, thread-local:
 value: <4930 call-start.1{2} @8> (size=4,offset=0): u32[]{:S(8)}
allocation 1: size 999, page 0, thread-local:
allocation 2: size 100, page 0, parameter 20, shape |f32[5,5]| at ShapeIndex {}, maybe-live-out:
allocation 3: size 7, page 0, constant:
allocation 4: size 3, page 0, maybe-live-out:
allocation 5: size 5000, color 1, page 0, preallocated-temp:
allocation 6: size 400, page 0, preallocated-temp:
"""
    assert compiled.sizes_of(buffers) == (100, 410)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--topology=v9:2x2'], "unknown topology 'v9:2x2'"),
        (['--topology=h100:8', '--config.mesh.tensor=3'], "the nearest that does: {'data': 4, 'tensor': 2}"),
        (['--topology=h100:8', '--config.data.batch_size=12'], 'batch_size 12 must be a multiple of 8'),
    ],
)
def test_the_command_refuses_before_it_imports_jax(arguments, message):
    code = """
import sys
from attnx.train import early
try:
    early.plan()
finally:
    assert not {'jax', 'flax', 'optax'} & set(sys.modules)
"""
    root = PATH.parents[1]
    command = [sys.executable, '-c', code, f'--config={root}/configs/base.py', *arguments]
    out = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert out.returncode == 2 and message in out.stderr, out.stderr


def test_a_compiler_that_ends_its_process(monkeypatch):
    monkeypatch.setattr(compiled, '_child', print)  # it ends without an answer
    monkeypatch.setattr(libtpu, 'versions', lambda: 'libtpu 0')  # kept under no other's name
    with pytest.raises(ValueError, match='v5e:2x2, libtpu 0: the compiler ended its process'):
        compiled.found(run_of(), topology.topology('v5e:2x2'))


def fake(run, state):
    """A plan whose activations shrink by remat and micro-batches, and whose state by the fsdp axis."""
    scale = {'none': 8, 'dots': 4, 'full': 1}[run.model.remat] / run.step.accumulate
    sizes = sharding.mesh_shape(run.mesh, 8)
    memory = {'parameters': state / sizes['fsdp'] / sizes['tensor'], 'activations': 100e9 * scale}
    return topology.Found(
        topology='h100:8', mesh=sizes, preset=run.sharding, how='made up', memory=memory, capacity=80e9, tokens=1, useful=1.0,
        peak=1.0,
    )  # fmt: skip


@pytest.mark.parametrize('state', [1e9, 480e9])
def test_fit_changes_one_thing_after_another(monkeypatch, state):
    seen = []
    monkeypatch.setattr(topology, 'plan', lambda run, name: seen.append(run) or fake(run, state))
    console, small = Console(record=True, width=200), {'pattern': ('gqa',), 'num_layers': 1}
    start = run_of(sharding='ddp', mesh={'data': 8}, model=small)
    assert topology.command(start, 'h100:8', True, console) == 0
    text = console.export_text()
    last = seen[-1]
    assert fake(last, state).fits and not any(fake(run, state).fits for run in seen[:-1])
    assert last.model.remat == 'full' and last.step.accumulate > 1
    assert f'--config.model.remat=full --config.step.accumulate={last.step.accumulate}' in text
    assert ('--config.sharding=fsdp' in text) == (state > 80e9)
    assert topology.command(start, 'h100:8', False, Console(record=True)) == 1


@pytest.mark.parametrize('size, billions', [('1b', 1), ('7b', 7), ('70b', 70)])
def test_sizes(size, billions):
    """Parameters as named, a batch and heads that the mesh divides; nothing is compiled."""
    run, task = topology.prepared(size_of(size), topology.topology(PODS[size]))
    made = topology.program(run.model, packed=task.packed)
    assert 0.85 * billions < sum(s.size for s in made.shapes.values()) / 1e9 < 1.25 * billions
    assert len({layer.name for layer in run.model.layers()}) > 1


PODS = {'1b': 'v5e:8x8', '7b': 'v5p:8x8x4', '70b': 'v5p:8x8x8'}


@needs_libtpu
@pytest.mark.slow
def test_a_small_pod(tmp_path, monkeypatch):
    """The step that runs, compiled for four chips: memory by shares, products near the model's count; kept for next time."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    run = run_of(model={'remat': 'full', 'width': 128, 'num_layers': 2})
    found = topology.plan(run, 'v5e:2x2')
    assert found.fits and found.how.startswith('compiled by libtpu')
    whole = found.memory['parameters'] * 4
    assert found.memory['optimizer'] == pytest.approx(whole / 2, rel=0.01)
    assert found.useful < found.flops < 4 * found.useful
    assert {'all-gather'} <= {e.kind for e in found.exchanges} and all(e.axes == 'fsdp' for e in found.exchanges)
    start = time.monotonic()
    assert topology.plan(run, 'v5e:2x2') == found
    assert list(tmp_path.glob('**/*.json')) and time.monotonic() - start < 60


WHOLE = """
from attnx import config
from attnx.train import compiled, hlo, topology
from attnx.train.config import Config
from pallas_kernels import libtpu

libtpu.prepare()
where = topology.topology('v5e:2x2')
run, _ = topology.prepared(config.build(Config, GIVEN), where)
made = compiled._lowered(run, where)[-1].compile()
cost = hlo.cost(made.as_text(), where.size)
print(cost.flops, sum(c.times * c.wire for c in cost.collectives), made.memory_analysis().peak_memory_in_bytes)
"""


@needs_libtpu
@pytest.mark.slow
def test_the_compiler_ends_with_the_plan_that_asked_for_it(tmp_path):
    """Killed, a plan can end nothing by itself. Both are told by an environment of their own."""
    command = [sys.executable, '-m', 'attnx.plan', '--config=configs/sizes.py:7b', '--topology=v5p:8x8x4']
    env = os.environ | {'TMPDIR': str(tmp_path), 'XDG_CACHE_HOME': str(tmp_path)}
    asked = subprocess.Popen(command, cwd=PATH.parents[1], env=env, stdout=subprocess.DEVNULL)

    def told(process):
        with contextlib.suppress(OSError):
            return (process / 'environ').read_text()
        return ''

    def compilers():
        found = pathlib.Path('/proc').glob('[0-9]*')
        return [process for process in found if process.name != str(asked.pid) and str(tmp_path) in told(process)]

    def until(done, seconds):
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end
            time.sleep(0.1)

    until(compilers, 60)
    asked.kill()
    asked.wait()
    until(lambda: not compilers(), 5)  # it would take ten by itself


@needs_libtpu
@pytest.mark.slow
def test_machine_code_changes_nothing(tmp_path, monkeypatch):
    """FLOPs and bytes sent of a small step are those of the same step compiled to the end, memory is no less."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    given = run_of(model={'remat': 'full'}, build=dict)
    found = topology.plan(config_lib.build(Config, given), 'v5e:2x2')
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    command = [sys.executable, '-c', WHOLE.replace('GIVEN', repr(given))]
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    assert not out.returncode, out.stderr[-2000:]
    flops, wire, peak = map(float, out.stdout.split())
    assert (found.flops, sum(e.wire for e in found.exchanges)) == (flops, wire)
    assert peak <= found.needed < 1.25 * peak  # a plan counts the heap, its gaps too, the compiler what is live at once


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize('size', PODS)
def test_a_pod(size):
    found = topology.plan(size_of(size), PODS[size])
    assert found.fits and found.memory['activations'] > 0 and not found.notes
    assert sum('softmax_attention_backward' in name for name in found.kernels) == 1
    assert len(found.kernels) == (2 if size == '7b' else 4)
    assert 1 < found.flops / found.useful < 1.6  # the layers once more, and what masks hide inside tiles
    low, high = found.seconds
    assert 0.2 < found.useful / high / found.peak <= found.useful / low / found.peak < 0.9
