"""Language models of 1, 7 and 70 billion parameters for pods, each of two mixers by turns.

    python -m attnx.plan --config=configs/sizes.py:7b --topology=v5p:8x8x4           # needs no data and no TPU
    python train.py --config=configs/sizes.py:7b --config.data.task.path='corpus/*.bin'

1b and 70b: Gated DeltaNet (2412.06464) and grouped-query attention (2305.13245) with keys of 8 heads. 7b: attention to the last
1024 tokens and to all (as in Gemma 2, 2408.00118). SwiGLU, bfloat16, AdamW, 4 M tokens a step (1b: 1 M). The data are files of
token ids (`attnx.tasks.tokens`).
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict


def attention(num_heads, **more):
    return {'num_heads': num_heads, 'num_kv_heads': 8, 'head_dim': 128, **more}


def delta(num_heads):
    return {'kind': 'gated_deltanet', 'num_heads': num_heads}  # keys of 128, values of 256


# name -> what stands beside attention, its heads, width, layers, MLP, tokens a row, rows a step, rate, what is recomputed, mesh
SIZES = {
    '1b': (delta(12), 16, 2048, 18, 5632, 4096, 256, 6e-4, 'full', {'fsdp': 16}),
    '7b': (attention(32, kind='sliding_window', window=1024), 32, 4096, 32, 14336, 4096, 1024, 3e-4, 'dots', {'fsdp': 64}),
    '70b': (delta(48), 64, 8192, 78, 24576, 8192, 512, 1.5e-4, 'full', {'fsdp': 64, 'tensor': 4}),
}


def get_config(size: str = '7b') -> ConfigDict:
    if size not in SIZES:
        raise ValueError(f'unknown size {size!r} of configs/sizes.py; valid: {", ".join(SIZES)}')
    beside, heads, width, layers, hidden, length, rows, rate, remat, mesh = SIZES[size]
    spec = importlib.util.spec_from_file_location('base', pathlib.Path(__file__).parent / 'base.py')
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)
    c = base.get_config()
    c.run_dir, c.steps, c.eval_every = f'runs/{size}', 100_000, 1000
    c.sharding = 'fsdp_tp' if 'tensor' in mesh else 'fsdp'
    c.mesh.update(mesh)
    m = c.model
    m.width, m.num_layers, m.pattern, m.dtype, m.remat = width, layers, ('b', 'a'), 'bfloat16', remat
    m.tie_embeddings, m.mlp.hidden = False, hidden
    with c.unlocked():
        m.mixers = ConfigDict({'b': beside, 'a': attention(heads, kind='gqa', qk_norm=size != '7b')})
        c.data.task = ConfigDict({'kind': 'tokens', 'path': '', 'validation_path': '', 'vocab_size': 50304, 'separator': -1})
    c.data.length, c.data.batch_size, c.data.eval_batches = length, rows, 8
    c.optim.kind, c.optim.learning_rate, c.optim.warmup, c.optim.decay = 'adamw', rate, 2000, 20_000
    c.checkpoint.every, c.log.every, c.sample.tokens = 1000, 10, 0
    return c
