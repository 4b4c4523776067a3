"""The TPU compiler on a machine without a TPU: whether it is here, and what it reads when it is loaded. Imports no jax."""

import importlib.metadata
import importlib.util
import os


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if importlib.util.find_spec('libtpu') or os.environ.get('TPU_LIBRARY_PATH'):
        return None
    return "libtpu is not installed: pip install 'libtpu>=0.0.50,<0.1' (the extra tpu-aot)"


def versions() -> str:
    """Who compiles."""
    return ', '.join(f'{name} {importlib.metadata.version(name)}' for name in ('libtpu', 'jax'))


def prepare(**flags):
    """Sets what libtpu reads when it is first loaded, and jax to this machine's CPU."""
    here = {
        'TPU_SKIP_MDS_QUERY': '1',  # no cloud to ask
        'TPU_ACCELERATOR_TYPE': 'v5litepod-4',  # any valid one: silences the search for workers
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }
    os.environ.update(here)  # where libtpu finds no TPU, jax has written complaints there
    os.environ['LIBTPU_INIT_ARGS'] = ' '.join(f'--{name}={value}' for name, value in flags.items())
    import jax

    jax.config.update('jax_platforms', 'cpu')
