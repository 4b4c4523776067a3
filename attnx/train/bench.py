"""Times whole training steps beside a PyTorch peer, and what several devices gain. One command, on an NVIDIA machine:

    python -m attnx.train.bench [words] [--json FILE] [--steps N] [--tiny] [--no-peer] [--set remat=full ...]

Words keep the rows whose name contains one of them. Every measurement is a process of its own, so that none finds the
memory of another. A row is a model at a shape; `scaling` rows run on one device and on all of them, `overhead` once more
without norm, finite check and metrics, and with checkpoints written in the background. The peer is the same model in PyTorch:
`torch.compile`, SDPA by cuDNN, bfloat16 autocast, fused AdamW; it is left out where PyTorch is not installed. Weights and
optimizer states are float32 on both sides.

A step is timed between two waits for the device, over `--steps` steps after two that compile; the median of three rounds.
MFU counts 6 FLOPs for each weight that a token meets and 3 times the mixing's own, causal halves not counted
(`attnx.plan.flops_per_token`), over the dense peak that `attnx.train.metrics` knows; recomputation does not count. Prints a
line a measurement, then a table, and writes them all to FILE.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """A model, a shape and how it is trained."""

    name: str
    model: dict[str, Any]  # of ModelConfig
    length: int
    batch: int  # rows of a step, a device
    accumulate: int = 1
    kind: str = 'peer'  # peer: beside PyTorch; plain; scaling; overhead
    preset: str = 'ddp'
    mesh: str = 'data'  # the axis that all devices of a scaling row are on
    grow: str = 'batch'  # what of a scaling row grows with the devices: batch or length
    context: str = 'auto'


GPT2 = {
    'vocab_size': 50304, 'width': 768, 'num_layers': 12, 'pattern': ('a',), 'positions': 'learned', 'norm': 'layernorm',
    'mixers': {'a': {'kind': 'mha', 'num_heads': 12, 'position': 'none', 'bias': True}},
    'mlp': {'kind': 'gelu', 'hidden': 3072, 'bias': True}, 'unroll': 0,
}  # fmt: skip
LLAMA = {
    'vocab_size': 32000, 'width': 2048, 'num_layers': 24, 'pattern': ('a',), 'tie_embeddings': False,
    'mixers': {
        'a': {'kind': 'gqa', 'num_heads': 16, 'num_kv_heads': 16},
        'd': {'kind': 'gated_deltanet', 'num_heads': 24},  # heads of 64 and 128, which the kernel takes
        'g': {'kind': 'gla', 'num_heads': 16},
    },
    'mlp': {'kind': 'swiglu', 'hidden': 5504},
}  # fmt: skip
CUT = {'kind': 'scaling', 'preset': 'fsdp_context', 'mesh': 'context', 'grow': 'length'}
SHORT = LLAMA | {'num_layers': 4, 'remat': 'full'}

ROWS = (
    Row('gpt2-124m', GPT2, 1024, 32),
    Row('gpt2-124m overhead', GPT2, 1024, 32, kind='overhead'),
    Row('llama-1.3b', LLAMA | {'remat': 'dots'}, 4096, 8, accumulate=2),
    Row('llama-1.3b remat', LLAMA | {'remat': 'full'}, 4096, 8, kind='plain'),
    Row('llama-1.3b T16384', LLAMA | {'remat': 'dots'}, 16384, 1, kind='plain'),
    Row('hybrid-1.3b T16384', LLAMA | {'remat': 'dots', 'pattern': ('d', 'd', 'd', 'a')}, 16384, 1, kind='plain'),
    Row('fsdp llama-1.3b', LLAMA | {'remat': 'dots'}, 4096, 8, accumulate=2, kind='scaling', preset='fsdp', mesh='fsdp'),
    Row('ring', SHORT, 65536, 1, **CUT, context='ring'),
    Row('heads', SHORT, 65536, 1, **CUT, context='heads'),
    Row('lasp2 gla', SHORT | {'pattern': ('g',)}, 65536, 1, **CUT),
    Row('lasp2 delta', SHORT | {'pattern': ('d',)}, 65536, 1, **CUT),
)


def tiny(row: Row) -> Row:
    """The same row at a size for a CPU: nothing but its code is tried."""
    mixers = {name: mixer | {'num_heads': 4} for name, mixer in row.model['mixers'].items()}
    mixers = {name: m | ({'num_kv_heads': 4} if 'num_kv_heads' in m else {}) for name, m in mixers.items()}
    small = {'vocab_size': 128, 'width': 64, 'num_layers': 4, 'mixers': mixers, 'mlp': row.model['mlp'] | {'hidden': 96}}
    return dataclasses.replace(row, model=row.model | small, length=64, batch=2, accumulate=min(row.accumulate, 2))


def figures(row: Row, seconds: float, devices: int, length: int, flops: float, peak: float | None) -> dict[str, Any]:
    tokens = row.batch * (devices if row.grow == 'batch' else 1) * length
    found = {'devices': devices, 'length': length, 'batch': tokens // length, 'step_ms': 1e3 * seconds}
    found['tokens_per_second'] = tokens / seconds
    return found | ({'mfu': flops * tokens / seconds / (peak * devices)} if peak else {})


def timed(step, wait, steps: int) -> float:
    """Seconds a step."""
    for _ in range(2):
        step()
    wait()
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        rounds.append((time.perf_counter() - start) / steps)
    return statistics.median(rounds)


def named(model: dict[str, Any]) -> dict[str, Any]:
    """The model with those of its mixers that its pattern names."""
    return model | {'mixers': {name: mixer for name, mixer in model['mixers'].items() if name in model['pattern']}}


# Ours


def ours(row: Row, steps: int, devices: int, dtype: str, who: str = 'attnx') -> dict[str, Any]:
    """One measurement of the training step on the first `devices` devices; of who 'bare' without what an update can do
    without; of 'saving' with what one checkpoint costs, milliseconds: all of it, and the part in which nothing runs."""
    import jax
    import numpy as np
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    from attnx import config, models, plan, sharding
    from attnx.train import loop, metrics, optim
    from attnx.train import step as step_lib

    grown = {'batch': row.batch, 'length': row.length}
    grown[row.grow] *= devices
    given = config.build(models.ModelConfig, named(row.model) | {'max_length': grown['length'], 'dtype': dtype})
    made = loop.program(given, packed=False)
    mesh = sharding.make_mesh({row.mesh: devices}, jax.devices()[:devices])
    transform, rate = optim.build(optim.Config(warmup=10, schedule='constant'), 1000, made.axes)
    settings = step_lib.Config(accumulate=row.accumulate)
    full, key = step_lib.train_step(made.forward, transform, rate, settings), jax.random.key(0)

    def least(state, batch, key):
        """What an update can't do without."""
        key = jax.random.fold_in(key, state['step'])
        _, grads, _ = step_lib.gradients(made.forward, state['params'], batch, key, settings)
        updates, opt = transform.update(grads, state['opt'], state['params'])
        return state | {'params': optax.apply_updates(state['params'], updates), 'opt': opt, 'step': state['step'] + 1}, {}

    with sharding.use(mesh, row.preset, row.context):
        where = sharding.param_shardings(mesh, row.preset, made.axes, {name: s.shape for name, s in made.shapes.items()})
        single = NamedSharding(mesh, PartitionSpec())
        where = {
            'params': where,
            'opt': optim.state_shardings(transform, made.shapes, where, mesh),
            'step': single,
            'bad': single,
        }
        state = jax.jit(lambda key: step_lib.init_state(made.init(key), transform), out_shardings=where)(key)
        tokens = np.random.default_rng(0).integers(0, given.vocab_size, (grown['batch'], grown['length'] + 1), dtype=np.int32)
        batch = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': np.ones(tokens[:, 1:].shape, np.float32)}
        place = NamedSharding(mesh, sharding.partition(('batch', 'length'), sharding.rules(row.preset)))
        batch = jax.device_put(batch, place)
        update = jax.jit(least if who == 'bare' else full, donate_argnums=0, out_shardings=(where, single))
        last = {}

        def step():
            nonlocal state
            state, last['metrics'] = update(state, batch, key)

        wait = lambda: jax.block_until_ready((state, last))
        seconds = timed(step, wait, steps)
        saved = saving(lambda: state, step, wait, seconds) if who == 'saving' else {}
    loss = float(last['metrics']['loss']) if last['metrics'] else None
    assert loss is None or np.isfinite(loss), 'the loss is not finite'
    kind = jax.devices()[0].device_kind
    flops = plan.flops_per_token(given, made.axes, made.shapes, grown['length'])
    found = figures(row, seconds, devices, grown['length'], flops, metrics.peak_flops(kind))
    memory = jax.devices()[0].memory_stats() or {}
    found |= {'device': kind, 'loss': loss, 'flops_per_token': flops, 'peak_bytes': memory.get('peak_bytes_in_use')}
    return found | saved


def saving(state, step, wait, seconds: float) -> dict[str, float]:
    """What a checkpoint adds to the steps that run while it is written, sealed and the one before last removed."""
    from attnx.train import checkpoint

    costs, stalls = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = checkpoint.Checkpoints(folder, checkpoint.Config(), {})
        for number in range(ROUNDS + 1):  # the first one opens what the others find open
            before, began, count = checkpoints.stalled, time.perf_counter(), 0
            checkpoints.save(number, state(), {})
            while number not in checkpoints.steps():
                step()
                wait()  # the device works on nothing else; else steps would be queued without end
                checkpoints.poll()
                count += 1
            costs.append(time.perf_counter() - began - count * seconds)
            stalls.append(checkpoints.stalled - before)
        checkpoints.close()
    return {'save_ms': 1e3 * statistics.median(costs[1:]), 'stall_ms': 1e3 * statistics.median(stalls[1:])}


# The peer


def peer(row: Row, steps: int) -> dict[str, Any]:
    """The same model and update in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from attnx import config, models, plan
    from attnx.train import loop, metrics

    given = config.build(models.ModelConfig, named(row.model) | {'max_length': row.length})
    width, heads = given.width, given.layers()[0].config.num_heads
    rotary, gated = given.positions == 'none', given.mlp.kind == 'swiglu'
    bias = given.mlp.bias
    norm = lambda: nn.RMSNorm(width) if given.norm == 'rmsnorm' else nn.LayerNorm(width)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.set_float32_matmul_precision('high')

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([norm(), norm()])
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)
            self.up = nn.Linear(width, given.mlp.hidden * (2 if gated else 1), bias=bias)
            self.down = nn.Linear(given.mlp.hidden, width, bias=bias)

        def forward(self, x, cos, sin):
            B, T, _ = x.shape
            q, k, v = (y.view(B, T, heads, -1).transpose(1, 2) for y in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
            if rotary:
                turn = lambda y: y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin
                q, k = turn(q).to(v.dtype), turn(k).to(v.dtype)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))
            hidden = self.up(self.norms[1](x))
            if gated:
                gate, up = hidden.chunk(2, dim=-1)
                return x + self.down(F.silu(gate) * up)
            return x + self.down(F.gelu(hidden, approximate='tanh'))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(given.vocab_size, width)
            self.table = None if rotary else nn.Embedding(row.length, width)
            self.blocks = nn.ModuleList([Block() for _ in range(given.num_layers)])
            self.norm, self.head = norm(), nn.Linear(width, given.vocab_size, bias=False)
            if given.tied:
                self.head.weight = self.embedding.weight
            for p in self.parameters():
                if p.ndim > 1:
                    nn.init.normal_(p, std=0.02)
            half = width // heads // 2
            angles = torch.arange(row.length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
            self.register_buffer('angles', torch.cat([angles, angles], -1))

        def forward(self, tokens, targets):
            x = self.embedding(tokens)
            if self.table is not None:
                x = x + self.table.weight
            cos, sin = self.angles.cos(), self.angles.sin()
            for block in self.blocks:
                x = block(x, cos, sin)
            logits = self.head(self.norm(x))
            return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1))

    torch.manual_seed(0)
    model = GPT().to(device)
    run = torch.compile(model) if device == 'cuda' else model
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=device == 'cuda')
    tokens = torch.randint(given.vocab_size, (row.batch, row.length + 1), device=device)
    parts = tokens.chunk(row.accumulate)
    last = {}

    def step():
        for part in parts:
            with torch.autocast(device, torch.bfloat16):
                loss = run(part[:, :-1], part[:, 1:]) / len(parts)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last['loss'] = loss.detach()

    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION] if device == 'cuda' else [SDPBackend.MATH]):
        seconds = timed(step, wait, steps)
    kind = torch.cuda.get_device_name() if device == 'cuda' else 'cpu'
    made = loop.program(given, packed=False)
    flops = plan.flops_per_token(given, made.axes, made.shapes, row.length)
    found = figures(row, seconds, 1, row.length, flops, metrics.peak_flops(kind))
    loss = float(last['loss']) * len(parts)  # of the last part
    return found | {'device': kind, 'loss': loss, 'flops_per_token': flops, 'torch': torch.__version__}


# The command


def measure(row: Row, options, who: str, devices: int = 1) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, '-m', 'attnx.train.bench', '--one', row.name, '--who', who, '--devices', str(devices)]
    command += ['--steps', str(options.steps), *(['--tiny'] if options.tiny else [])]
    command += [x for given in options.set for x in ('--set', given)]
    env = dict(os.environ) | ({'JAX_PLATFORMS': 'cpu'} if who == 'torch' else {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, env=env)
    except subprocess.TimeoutExpired:
        return {'failed': f'more than {options.timeout} s'}
    lines = [line for line in done.stdout.splitlines() if line.startswith('RESULT ')]
    return json.loads(lines[-1][7:]) if lines else {'failed': (done.stderr.strip().splitlines() or ['no output'])[-1][:300]}


def count_devices() -> int:
    done = subprocess.run([sys.executable, '-c', 'import jax; print(len(jax.devices()))'], capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def compare(results: list[dict]) -> list[str]:
    """The ratios that the rows are there for."""
    from attnx.train import checkpoint

    rate = {(r['name'], r['who'], r['devices']): r['tokens_per_second'] for r in results if 'failed' not in r}
    lines = []
    for r in results:
        if 'save_ms' in r:
            every = checkpoint.Config().every
            share = 100 * r['save_ms'] / (every * r['step_ms'])
            lines.append(
                f'{r["name"]}: a checkpoint costs {r["save_ms"]:.0f} ms ({r["stall_ms"]:.0f} ms of them nothing runs), '
                f'{share:.2f} % of {every} steps'
            )
    for (name, who, devices), value in rate.items():
        if who == 'attnx' and (other := rate.get((name, 'torch', 1))) and devices == 1:
            lines.append(f'{name}: {value / other:.3f} times the tokens/s of PyTorch')
        if who == 'attnx' and devices > 1 and (one := rate.get((name, 'attnx', 1))):
            lines.append(f'{name}: {devices} devices have {value / one:.3f} times the tokens/s of one')
        if who == 'bare' and (other := rate.get((name, 'attnx', 1))):
            lines.append(f'{name}: norm, finite check and metrics cost {100 * (value / other - 1):.2f} % of a step')
    for ours_, theirs in (('hybrid-1.3b T16384', 'llama-1.3b T16384'),):
        if (a := rate.get((ours_, 'attnx', 1))) and (b := rate.get((theirs, 'attnx', 1))):
            lines.append(f'{ours_}: {a / b:.3f} times the tokens/s of {theirs}')
    return lines


def changed(row: Row, given: list[str]) -> Row:
    """`row` with `--set` applied: fields of a Row, else of its ModelConfig."""
    for text in given:
        name, _, value = text.partition('=')
        with contextlib.suppress(json.JSONDecodeError):  # else it is a string
            value = json.loads(value)
        if name in {f.name for f in dataclasses.fields(Row)} - {'name', 'model', 'kind'}:
            row = dataclasses.replace(row, **{name: value})
        else:
            row = dataclasses.replace(row, model=row.model | {name: value})
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m attnx.train.bench', description=__doc__.splitlines()[0])
    parser.add_argument('words', nargs='*', help='rows whose name contains one of them; all by default')
    parser.add_argument('--json', help='file for all measurements')
    parser.add_argument('--steps', type=int, default=10, help='steps of a round')
    parser.add_argument('--tiny', action='store_true', help='shapes for a CPU')
    parser.add_argument('--no-peer', action='store_true', help='without PyTorch')
    parser.add_argument('--timeout', type=int, default=500, help='seconds for one measurement')
    parser.add_argument('--set', action='append', default=[], metavar='NAME=VALUE', help='a field of the row or of its model')
    parser.add_argument('--one', help=argparse.SUPPRESS)
    parser.add_argument('--who', help=argparse.SUPPRESS)
    parser.add_argument('--devices', type=int, default=0, help='devices of the scaling rows; 0: all')
    options = parser.parse_args(argv)
    if options.one:
        row = changed(next(r for r in ROWS if r.name == options.one), options.set)
        row = tiny(row) if options.tiny else row
        if options.who == 'torch':
            found = peer(row, options.steps)
        else:
            dtype = 'float32' if options.tiny else 'bfloat16'
            found = ours(row, options.steps, options.devices, dtype, options.who)
        print('RESULT ' + json.dumps(found), flush=True)
        return 0
    chosen = [r for r in ROWS if not options.words or any(word in r.name for word in options.words)]
    if not chosen:
        print(f'no row is called like {" or ".join(options.words)}; rows: {", ".join(r.name for r in ROWS)}', file=sys.stderr)
        return 2
    total, results = options.devices or count_devices(), []
    has_torch = importlib.util.find_spec('torch') is not None and not options.no_peer
    for row in chosen:
        runs = [('attnx', 1)]
        runs += [('attnx', total)] if row.kind == 'scaling' and total > 1 else []
        runs += [('torch', 1)] if row.kind == 'peer' and has_torch else []
        runs += [('bare', 1), ('saving', 1)] if row.kind == 'overhead' else []
        for who, devices in runs:
            results.append({'name': row.name, 'who': who, 'devices': devices} | measure(row, options, who, devices))
            print(json.dumps(results[-1]), flush=True)
    for r in results:
        if 'failed' in r:
            print(f'{r["name"]:<22} {r["who"]:<6} {r["devices"]} FAILED {r["failed"]}')
        else:
            mfu = f'MFU {100 * r["mfu"]:5.1f} %' if 'mfu' in r else 'MFU unknown'
            rate = f'{r["tokens_per_second"]:12,.0f} tokens/s  {r["step_ms"]:9.1f} ms'
            print(f'{r["name"]:<22} {r["who"]:<6} {r["devices"]} {rate}  {mfu}')
    print('\n'.join(compare(results)))
    if not has_torch and any(r.kind == 'peer' for r in chosen):
        print('no PyTorch peer: ' + ('--no-peer' if options.no_peer else 'torch is not installed'))
    if options.json:
        with open(options.json, 'w') as file:
            json.dump(results, file, indent=1)
    return 1 if any('failed' in r for r in results) else 0


if __name__ == '__main__':
    sys.exit(main())
