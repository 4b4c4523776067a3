"""A small language model on the Python standard library's source, byte by byte: the default of `make train`.

    python train.py --config=configs/base.py
    python train.py --config=configs/base.py --config.steps=2000          # continue, or train longer
    python train.py --config=configs/base.py --config.run_dir=runs/gla --config.model.pattern="('gla','gla','a')"

Two layers of Gated DeltaNet to one of grouped-query attention, as in 2412.06464's hybrids. Made for two CPU cores:
under 10 minutes, validation loss from 5.6 to under 2.0 nats a byte.
"""

from ml_collections import ConfigDict
from ml_collections import config_dict as cd


def get_config():
    c = ConfigDict()
    c.run_dir = 'runs/base'
    c.seed = 0
    c.steps = 400
    c.eval_every = 100

    c.model = ConfigDict()
    c.model.kind = 'decoder'
    c.model.width = 192
    c.model.num_layers = 6
    c.model.pattern = ('g', 'g', 'a')  # names of `mixers` below, or of any mechanism
    c.model.overrides = cd.placeholder(object)  # single layers that differ: "{5: 'gla'}"
    c.model.mixers = ConfigDict()
    c.model.mixers.g = ConfigDict({'kind': 'gated_deltanet', 'num_heads': 4})
    c.model.mixers.a = ConfigDict({'kind': 'gqa', 'num_heads': 4, 'num_kv_heads': 2})
    c.model.mlp = ConfigDict({'kind': 'swiglu', 'hidden': 0})
    c.model.dropout = 0.0
    c.model.remat = 'none'
    c.model.dtype = 'float32'  # bfloat16 on accelerators
    c.model.impl = 'auto'

    c.data = ConfigDict()
    c.data.task = ConfigDict({'kind': 'text', 'path': '', 'tokenizer': 'byte'})
    c.data.length = 256
    c.data.batch_size = 16
    c.data.eval_batches = 16
    c.data.seed = 0

    c.optim = ConfigDict()
    c.optim.kind = 'muon'
    c.optim.learning_rate = 0.01
    c.optim.adam_learning_rate = cd.placeholder(float)
    c.optim.weight_decay = 0.1
    c.optim.clip_norm = 1.0
    c.optim.schedule = 'wsd'
    c.optim.warmup = 20
    c.optim.decay = cd.placeholder(int)

    c.step = ConfigDict({'z_loss': 0.0, 'label_smoothing': 0.0, 'accumulate': 1, 'max_skipped': 0})
    c.checkpoint = ConfigDict({'every': 100, 'keep_last': 2, 'keep_best': 1, 'fallback': False})
    c.log = ConfigDict({'every': 10, 'tensorboard': False, 'wandb': False})
    c.sample = ConfigDict({'tokens': 600, 'prompt': '', 'temperature': 0.7, 'top_p': 0.95})
    c.profile = ConfigDict({'start': 0, 'steps': 5})
    c.mesh = ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1, 'context': 1})
    c.sharding = 'ddp'
    return c
