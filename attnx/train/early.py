"""What is refused of a run before jax is imported: all that its config, its data and its checkpoints show by themselves."""

import contextlib
import glob
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from attnx import config as config_lib
from attnx import light, tasks
from attnx.light import Heavy, Hollow
from attnx.names import nearest, printable
from attnx.train import chips, seal
from pallas_kernels import libtpu


@contextlib.contextmanager
def refusals(traceback=lambda: False):
    """Within: what a user did wrong ends the process with one line and exit code 2 instead of a traceback."""
    try:
        yield
    except (ValueError, AttributeError, KeyError) as error:
        text = str(error) if isinstance(error, ValueError) else _unknown_key(error)
        if traceback() or not text:
            raise
        print('error:', printable(text), file=sys.stderr)
        sys.exit(2)


def parse(argv: Sequence[str]) -> list[str]:
    """The arguments that are no flags, of a command whose config is the flag `config`; for `app.run(flags_parser=…)`.

    Ends the process with one line where a flag is unknown, a config file is not there, or raises a ValueError; what else it
    raises is a mistake in it, whose traceback is kept.
    """
    with refusals():
        for argument in argv[1:]:
            file = argument.lstrip('-').removeprefix('config=').partition(':')[0]
            if argument.lstrip('-').startswith('config=') and not pathlib.Path(file).exists():
                there = map(str, pathlib.Path('configs').glob('**/*.py'))
                raise ValueError(f'there is no config file {file!r}; {nearest(file, there)}')
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            last = str(error).strip().splitlines()[-1].strip()
            mistake = 'Traceback' in str(error) and not last.startswith('ValueError: ')
            raise ValueError(str(error) if mistake else last.removeprefix('ValueError: ')) from None


def _unknown_key(error: Exception) -> str | None:
    """The words for what ml_collections raises where a config does not have a key; None for any other error."""
    at = (error.__context__ or error).__traceback__
    while at and at.tb_next:
        at = at.tb_next
    seen = at.tb_frame.f_locals if at else {}
    if isinstance(seen.get('self'), ConfigDict):
        return f'unknown config key {seen["key"]!r}; {nearest(seen["key"], seen["self"])}'
    return None


def check(read) -> tasks.Task | None:
    """Refuses the run of a config, or gives its task, built; None where jax must say more first.

    read: `attnx.train.config`, as a module -> its Config.

    Raises:
      ValueError: what `attnx.train.loop.run` would refuse.
    """
    parts = light.module('attnx.train.config')
    with contextlib.suppress(Heavy):
        config = read(parts)
        parts.check(config, _to_first_parameter)
        if (count := _cpus()) and not config.distributed:
            light.module('attnx.sharding').mesh_shape(config.mesh, count)
        tasks.check(config.data.task)
        run_dir = pathlib.Path(config.run_dir).absolute()
        task = tasks.build(config.data.task, length=config.data.length, seed=config.data.seed, run_dir=run_dir)
        served = parts.served(config, task)
        light.module('attnx.plan').check_numbers(served.model, config.mesh, config.sharding, task.length)
        least = {axis: max(config.mesh.get(axis, 1), 1) for axis in light.module('attnx.sharding').MESH_AXES}
        light.module('attnx.train.program').check_rows(config, least)
        settings = config_lib.flatten(config_lib.to_dict(served))
        folder = config.checkpoint.folder or run_dir / 'checkpoints'
        seal.check(folder, config.checkpoint.fallback, settings, parts.free)
        return task


def plan() -> None:
    """The flags of `python -m attnx.plan`; ends the process where they, the config or its mesh are refused."""
    flags.DEFINE_enum('platform', 'cuda', light.module('attnx.explanation').PLATFORMS, 'where the run is to happen')
    flags.DEFINE_string('topology', '', 'chips that are not here: v5p:8x8x8 (compiled by libtpu), h100:8 (modelled)')
    flags.DEFINE_bool('fit', False, 'with --topology: try changes until the run fits')
    with refusals():
        config = config_flags.DEFINE_config_file('config', 'configs/base.py', lock_config=True)
        app.define_help_flags()
        if unexpected := parse(sys.argv)[1:]:  # once: overrides of a config are flags made by parsing
            raise ValueError(f'unexpected arguments {unexpected}; settings look like --config.model.width=512')
        name, parts = flags.FLAGS.topology, light.module('attnx.train.config')
        if name and chips.topology(name).tpu and (reason := libtpu.missing()):
            raise ValueError(f'{name}: {reason}')
        with contextlib.suppress(Heavy):
            run = parts.build(config.value)
            parts.check(run, _to_first_parameter)
            if name:
                sizes = light.module('attnx.sharding').mesh_shape(run.mesh, chips.topology(name).size)
                light.module('attnx.train.program').check_rows(run, sizes)


def _cpus() -> int | None:
    """The number of jax's devices where it will have processors only, as the environment tells; None: jax must say."""
    plugins = importlib.util.find_spec('jax_plugins') or any(glob.glob(path) for path in ('/dev/accel*', '/dev/vfio/*'))
    if os.environ.get('JAX_PLATFORMS', '' if plugins else 'cpu') != 'cpu':
        return None
    forced = re.findall(r'--xla_force_host_platform_device_count=(\d+)', os.environ.get('XLA_FLAGS', ''))
    return int(os.environ.get('JAX_NUM_CPU_DEVICES') or [1, *forced][-1])


def _to_first_parameter(build) -> None:
    with contextlib.suppress(Heavy):
        build(rngs=Hollow('rngs'))
