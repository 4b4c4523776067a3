"""A small language model on the Python standard library's source, byte by byte: what `make train` trains.

    python train.py                                    # or: make train
    python train.py --config.steps=800                 # the same run, longer
    python train.py --config.run_dir=runs/delta --config.model.pattern="('gated_deltanet','gated_deltanet','gqa')"

Gated linear attention (2312.06635) and grouped-query attention by turns: 1.0 M parameters, 0.8 M tokens. Made for two
CPU cores: some minutes, validation loss from 5.6 to under 2.0 nats a byte. Every setting stands here, so that each can
be set on the command line; what it means is said beside its field in the dataclass named.
"""

from ml_collections import ConfigDict
from ml_collections import config_dict as cd


def get_config():
    c = ConfigDict()  # attnx.train.config.Config
    c.run_dir = 'runs/base'
    c.seed = 0
    c.steps = 400
    c.eval_every = 100
    c.mesh = ConfigDict({'data': -1, 'fsdp': 1, 'expert': 1, 'context': 1, 'tensor': 1})  # -1: the remaining devices
    c.sharding = 'ddp'
    c.context = 'auto'
    c.distributed = False
    c.compiler = cd.placeholder(object)  # "{'xla_gpu_enable_latency_hiding_scheduler': True}"
    c.tune = False
    c.model = model()
    c.data = ConfigDict(  # attnx.train.data.Config
        {
            'length': 256,
            'batch_size': 8,
            'eval_batches': 16,
            'seed': 0,
            'threads': 2,
            'prefetch': 4,
            'task': {  # attnx.tasks.<kind>.Config; what is left None is the task's own default
                'kind': 'text',
                'path': cd.placeholder(str),
                'validation_path': cd.placeholder(str),
                'tokenizer': cd.placeholder(str),
                'bpe_vocab_size': cd.placeholder(int),
                'packing': cd.placeholder(str),
                'key': cd.placeholder(str),  # of JSONL
                'vocab_size': cd.placeholder(int),  # of tokens, and of what is generated
                'dtype': cd.placeholder(str),  # of tokens, as the next
                'separator': cd.placeholder(int),
                'num_train': cd.placeholder(int),
                'num_eval': cd.placeholder(int),
            },
        }
    )
    c.optim = ConfigDict(  # attnx.train.optim.Config
        {
            'kind': 'muon',
            'learning_rate': 0.01,
            'adam_learning_rate': cd.placeholder(float),
            'b1': 0.9,
            'b2': 0.95,
            'eps': 1e-8,
            'momentum': 0.95,
            'consistent_rms': 0.2,
            'weight_decay': 0.1,
            'no_decay': ('*/scale', '*/bias', '*/embedding', '*/table', '*log*', '*/dt_*'),
            'clip_norm': 1.0,
            'schedule': 'wsd',
            'warmup': 20,
            'decay': 100,
            'hold': 0,
            'floor': 0.0,
            'shape': 'linear',
        }
    )
    c.step = ConfigDict(  # attnx.train.step.Config
        {
            'z_loss': 0.0,
            'label_smoothing': 0.0,
            'aux_weights': cd.placeholder(object),  # "{'balance_loss': 0.01}"
            'accumulate': 1,
            'non_finite': 'stop',
            'max_non_finite': 10,
            'distill': 0.0,  # needs a teacher: attnx.train.loop.run(config, teacher=model)
            'distill_temperature': 1.0,
            'hard': 1.0,
            'mask_heads': 0,
            'mask_heads_by': 'random',
            'mask_heads_rescale': False,
            'qk_clip': 0.0,
            'qk_clip_every': 1,
        }
    )
    c.checkpoint = ConfigDict(
        {'every': 100, 'keep_last': 2, 'keep_best': 1, 'fallback': False, 'elastic': False, 'folder': ''}
    )
    c.log = ConfigDict(
        {'every': 10, 'tensorboard': False, 'wandb': False, 'project': 'attnx', 'peak_flops': cd.placeholder(float)}
    )
    c.sample = ConfigDict({'tokens': 240, 'count': 3, 'prompt': 'def ', 'temperature': 0.9, 'top_k': 0, 'top_p': 0.95})
    c.sample.bases = ()
    c.profile = ConfigDict({'start': 0, 'steps': 5})
    c.health = ConfigDict({'every': 0, 'rows': 1})
    return c


def model():
    c = ConfigDict()  # attnx.models.ModelConfig
    c.kind = 'decoder'
    c.width = 128
    c.num_layers = 6
    c.pattern = ('g', 'a')  # names of `mixers`, or of any mechanism, repeated
    c.overrides = cd.placeholder(object)  # single layers that differ: "{5: 'mla'}"
    c.mixers = ConfigDict(  # name -> kind and fields of that mechanism's Config; None is the mechanism's own default
        {
            'g': {'kind': 'gla', 'num_heads': cd.placeholder(int)},
            'a': {
                'kind': 'gqa',
                'num_heads': cd.placeholder(int),
                'num_kv_heads': cd.placeholder(int),
                'window': cd.placeholder(int),
            },
        }
    )
    c.mlp_overrides = cd.placeholder(object)  # single layers: "{1: {'kind': 'moe', 'experts': 16}}"
    c.mlp = ConfigDict({'kind': 'swiglu', 'hidden': 0, 'bias': False})
    c.conv_taps = 0
    c.mlp.update({'expert': 'swiglu', 'experts': 8, 'top_k': 2, 'capacity': 0.0, 'router_z': 1e-3, 'balance': 1e-2})  # of moe
    c.mlp.update({'gates': 'normed', 'tasks': 1, 'task_weight': 5e-4, 'order': 'place', 'router': 'token'})  # likewise
    c.norm = 'rmsnorm'
    c.norm_position = 'pre'
    c.positions = 'none'
    c.tie_embeddings = cd.placeholder(bool)  # None: where the model is one of language
    c.logit_softcap = 0.0
    c.dropout = 0.0
    c.remat = 'none'
    c.unroll = 1
    c.dtype = 'float32'  # bfloat16 on accelerators
    c.impl = 'auto'
    c.vocab_size = c.input_dim = c.num_classes = c.max_length = 0  # 0: the task's
    c.output, c.grid, c.fixed = 'vocabulary', 0, ''
    c.cross = 'cross_attention'  # of an encoder_decoder, like the next
    c.encoder = ConfigDict({'num_layers': 6, 'pattern': ('gqa',)})
    c.encoder.update({'overrides': cd.placeholder(object), 'mlp_overrides': cd.placeholder(object)})
    return c
