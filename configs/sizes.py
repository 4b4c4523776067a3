"""Language models of 1, 7 and 70 billion parameters for pods: Gated DeltaNet and attention by turns.

    python -m attnx.plan --config=configs/sizes.py:7b --topology=v5p:8x8x4           # needs no data and no TPU
    python train.py --config=configs/sizes.py:7b --config.data.task.path='corpus/*.bin'

Gated DeltaNet (2412.06464), grouped-query attention with keys of 8 heads (2305.13245), SwiGLU, bfloat16, AdamW, 4 M tokens a
step (1b: 1 M). The data are files of token ids (`attnx.tasks.tokens`).
"""

import importlib.util
import pathlib

from ml_collections import ConfigDict

# name -> width, layers, attention heads (of 128), recurrent heads (keys of 128, values of 256), MLP, tokens a row, rows a step,
# rate, what is recomputed, mesh
SIZES = {
    '1b': (2048, 18, 16, 12, 5632, 4096, 256, 6e-4, 'full', {'fsdp': 16}),
    '7b': (4096, 32, 32, 24, 11008, 4096, 1024, 3e-4, 'dots', {'fsdp': 64}),
    '70b': (8192, 78, 64, 48, 24576, 8192, 512, 1.5e-4, 'full', {'fsdp': 64, 'tensor': 4}),
}


def get_config(size: str = '7b') -> ConfigDict:
    if size not in SIZES:
        raise ValueError(f'unknown size {size!r} of configs/sizes.py; valid: {", ".join(SIZES)}')
    width, layers, heads, recurrent, hidden, length, rows, rate, remat, mesh = SIZES[size]
    spec = importlib.util.spec_from_file_location('base', pathlib.Path(__file__).parent / 'base.py')
    base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(base)
    c = base.get_config()
    c.run_dir, c.steps, c.eval_every = f'runs/{size}', 100_000, 1000
    c.sharding = 'fsdp_tp' if 'tensor' in mesh else 'fsdp'
    c.mesh.update(mesh)
    m = c.model
    m.width, m.num_layers, m.pattern, m.dtype, m.remat = width, layers, ('d', 'a'), 'bfloat16', remat
    m.tie_embeddings, m.mlp.hidden = False, hidden
    with c.unlocked():
        delta = {'kind': 'gated_deltanet', 'num_heads': recurrent}
        m.mixers = ConfigDict({'d': delta, 'a': {'kind': 'gqa', 'num_heads': heads, 'num_kv_heads': 8, 'qk_norm': True}})
        c.data.task = ConfigDict({'kind': 'tokens', 'path': '', 'validation_path': '', 'vocab_size': 50304, 'separator': -1})
    c.data.length, c.data.batch_size, c.data.eval_batches = length, rows, 8
    c.optim.kind, c.optim.learning_rate, c.optim.warmup, c.optim.decay = 'adamw', rate, 2000, 20_000
    c.checkpoint.every, c.log.every, c.sample.tokens = 1000, 10, 0
    return c
