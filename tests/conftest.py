"""Eight simulated CPU devices, cheap compiles, a persistent compilation cache. Set before jax starts."""

import gc
import os
import pathlib
import re

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
for flag in ('--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0'):
    flags = os.environ.get('XLA_FLAGS', '')
    if flag.split('=')[0] not in flags:
        os.environ['XLA_FLAGS'] = f'{flags} {flag}'.strip()

import jax
import pytest

_CACHE = pathlib.Path(__file__).parent.parent / '.jax_cache'
jax.config.update('jax_compilation_cache_dir', os.environ.get('TEST_CACHE', str(_CACHE)))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_traceback_in_locations_limit', 0)  # programs without them are lowered and compiled sooner


ALONE = ('test_papers.py', 'test_overrides.py')  # every case compiles a model of its own
MOST_MAPS = 20_000  # Linux gives a process 65,530


def forget_if_many():
    """Lets go of what was compiled if it takes many memory maps, of which a process has a limited number."""
    maps = pathlib.Path('/proc/self/maps')
    if not maps.exists() or maps.read_bytes().count(b'\n') > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope='session')
def let_go():
    return forget_if_many


@pytest.fixture(scope='module', autouse=True)
def forget():
    yield
    forget_if_many()


def pytest_collection_finish():
    """Libraries and tests stay: the collector, a tenth of the suite's time otherwise, looks at what comes after only."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """What shares compiled functions runs in one worker: the laws of a mechanism, else a file; in the order of the files.

    By default the scopes of few tests come last, among them the longest.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path, _, test = nodeid.partition('::')
            if path.endswith(ALONE):
                return nodeid
            return re.sub(r'.*\[(\w+).*', r'\1', test) if path.endswith('test_contract.py') else path

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    unknown = {}
    for item in items:
        if quick := item.get_closest_marker('quick'):
            unknown.setdefault(item.nodeid.split('[')[0], set(quick.args)).discard(item.callspec.id)
            if item.callspec.id not in quick.args:
                item.add_marker(pytest.mark.slow)
    if any(unknown.values()) and not any('::' in given for given in config.args):
        raise pytest.UsageError(f'quick: no such cases: {({test: ids for test, ids in unknown.items() if ids})}')
    if jax.default_backend() != 'gpu':
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='needs an NVIDIA GPU'))
