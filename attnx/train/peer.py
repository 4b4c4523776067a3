"""The peer of `attnx.train.bench`: the same model and update in PyTorch, as one would write them there.

`torch.compile`, SDPA by cuDNN, bfloat16 autocast, fused AdamW, float32 weights and optimizer states.
"""

import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnx import config, models, plan
from attnx.train import metrics, program
from attnx.train.timing import Row, figures, named, timed


def measure(row: Row, steps: int, compile: bool = True) -> dict[str, Any]:
    """One measurement, as `timing.measure` gives it. compile: by torch.compile, on a GPU."""
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
    run = torch.compile(model) if compile and device == 'cuda' else model
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

    wait, began = torch.cuda.synchronize if device == 'cuda' else lambda: None, time.perf_counter()
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION] if device == 'cuda' else [SDPBackend.MATH]):
        step()  # compiles
        wait()
        compile_s = time.perf_counter() - began
        rounds = timed(step, wait, steps)
    kind = torch.cuda.get_device_name() if device == 'cuda' else 'cpu'
    made = program.program(given, packed=False)
    flops = plan.flops_per_token(given, made.axes, made.shapes, row.length)
    found = figures(row, rounds, 1, row.length, flops, metrics.peak_flops(kind))
    loss = float(last['loss']) * len(parts)  # of the last part
    found |= {'device': kind, 'loss': loss, 'flops_per_token': flops, 'torch': torch.__version__}
    return found | {'compile_s': round(compile_s, 1)}
