"""What is restored is what was written: damage, foreign folders, other settings and failed writes are named."""

import argparse
import errno
import gc
import importlib.util
import json
import pathlib
import pickle
import resource
import shutil
import sys

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from attnx.train import checkpoint, seal

SETTINGS = {'model.width': 64, 'model.pattern': ('gla', 'gqa'), 'train.steps': 10, 'optim.decay': None}


def state_of(tiny, seed=0):
    params = tiny.params(seed)
    return {'params': params, 'opt': optax.adamw(1e-3).init(params), 'step': jnp.int32(seed), 'bad': jnp.int32(0)}


def like(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture
def opened(tmp_path):
    """Opens the checkpoints of one folder; closes them at the end."""
    alive = []

    def make(folder=tmp_path / 'checkpoints', settings=SETTINGS, **config):
        free = lambda name: name == 'train.steps'
        alive.append(checkpoint.Checkpoints(folder, checkpoint.Config(**config), settings, free=free))
        return alive[-1]

    yield make
    for item in alive:
        item.close()


def write(opened, tiny, steps=(1, 2, 3), losses=(None, None, None)):
    ck = opened()
    for step, loss in zip(steps, losses):
        ck.save(step, state_of(tiny, step), {'batches': step}, loss)
    ck.wait()
    return ck


def test_round_trip_and_what_is_kept(opened, tiny):
    ck = write(opened, tiny, (1, 2, 3, 4, 5), (3.0, 1.0, 2.0, 2.5, None))
    assert ck.steps() == [2, 4, 5]  # the best by loss, and the newest two
    step, state, data = opened(settings=SETTINGS | {'train.steps': 99}).restore(like(state_of(tiny)))
    assert (step, data) == (5, {'batches': 5})
    jax.tree.map(np.testing.assert_array_equal, state, state_of(tiny, 5))
    assert jax.tree.structure(state) == jax.tree.structure(state_of(tiny))


def test_nothing_to_restore(opened, tiny):
    assert opened().restore(like(state_of(tiny))) is None


def damage_flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def a_link(path):
    """The same bytes, outside the folder."""
    path.rename(path.parents[4] / 'elsewhere')
    path.symlink_to(path.parents[4] / 'elsewhere')


HURT = {
    'flip': (damage_flip, 'differs from its digest'),
    'truncate': (lambda path: path.write_bytes(path.read_bytes()[:-1]), 'differs from its digest'),
    'zero': (lambda path: path.write_bytes(bytes(path.stat().st_size)), 'differs from its digest'),
    'delete': (lambda path: path.unlink(), 'is missing'),
    'add': (lambda path: (path.parent / 'more').write_text('x'), 'more was not there when it was sealed'),
    'link': (a_link, 'is a link'),
    'seal lost': (lambda path: (path.parents[2] / checkpoint.SEAL).unlink(), 'has no integrity.json'),
    'seal flipped': (lambda path: damage_flip(path.parents[2] / checkpoint.SEAL), 'integrity.json (differs|is unread)'),
    'gone': (lambda path: shutil.rmtree(path.parents[2]), 'is gone'),
    'renamed': (lambda path: path.parents[2].rename(path.parents[3] / '9'), 'was sealed as step 3'),
}


@pytest.mark.parametrize(('hurt', 'message'), HURT.values(), ids=HURT)
def test_a_corrupt_checkpoint_is_named_and_the_last_good_one_used_only_if_asked(opened, tiny, tmp_path, hurt, message):
    write(opened, tiny)
    data = max((tmp_path / 'checkpoints/3/state/d').iterdir(), key=lambda p: p.stat().st_size)
    hurt(data)
    with pytest.raises(checkpoint.CheckpointError, match=rf'checkpoint [39] .* corrupt: .*{message}.*last good .* step 2'):
        opened().restore(like(state_of(tiny)))
    ck = opened(fallback=True)
    step, state, _ = ck.restore(like(state_of(tiny)))
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, state, state_of(tiny, 2))
    ck.save(3, state_of(tiny, 3), {})
    ck.wait()
    assert ck.steps() == [2, 3]
    assert ck.notes[-1].endswith('continuing from step 2')
    assert len(list((tmp_path / 'checkpoints/corrupt').iterdir())) == (message != 'is gone')


def test_no_good_checkpoint_left(opened, tiny, tmp_path):
    write(opened, tiny, (1,))
    (tmp_path / 'checkpoints/1' / checkpoint.SEAL).write_text('{')
    with pytest.raises(checkpoint.CheckpointError, match=r'integrity.json is unreadable; there is no good checkpoint'):
        opened(fallback=True).restore(like(state_of(tiny)))


def test_an_unfinished_checkpoint_is_removed(opened, tiny, tmp_path):
    write(opened, tiny)
    folder = tmp_path / 'checkpoints'
    shutil.copytree(folder / '3', folder / '5', ignore=lambda *_: [checkpoint.SEAL])  # as if killed before the seal
    (folder / '7/state').mkdir(parents=True)  # as if killed while writing
    (folder / '08').mkdir()  # no step's name, and not ours to remove
    ck = opened()
    assert ck.restore(like(state_of(tiny)))[0] == 3
    assert ck.notes == [f'checkpoint {step} was never finished: removed' for step in (5, 7)]
    ck.save(5, state_of(tiny, 5), {})
    ck.wait()
    assert ck.steps() == [3, 5]
    assert (folder / '08').exists()


def test_a_foreign_folder_is_refused(opened, tmp_path):
    (tmp_path / 'theirs/100').mkdir(parents=True)
    with pytest.raises(checkpoint.CheckpointError, match=r'foreign files \(100\)'):
        opened(tmp_path / 'theirs')
    assert (tmp_path / 'theirs/100').exists()


def test_a_folder_whose_first_mark_was_never_finished_is_ours(opened, tiny, tmp_path):
    folder = tmp_path / 'checkpoints'
    folder.mkdir()
    (folder / f'{seal.MARK}{seal.DRAFT}').write_text('{"form')
    write(opened, tiny, (1,))
    assert opened().restore(like(state_of(tiny)))[0] == 1


def test_other_settings_are_named(opened, tiny):
    write(opened, tiny, (1,))
    other = SETTINGS | {'model.width': 32, 'train.steps': 20, 'model.new': 1}
    with pytest.raises(checkpoint.CheckpointError) as error:
        opened(settings=other).restore(like(state_of(tiny)))
    assert 'model.width: saved 64, now 32' in str(error.value)
    assert "model.new: saved '(absent)', now 1" in str(error.value)
    assert 'steps' not in str(error.value)


def test_other_arrays_are_named(opened, tiny):
    write(opened, tiny, (1,))
    state = state_of(tiny)
    state['params']['embed/embedding'] = state['params']['embed/embedding'].astype(jnp.bfloat16)
    with pytest.raises(checkpoint.CheckpointError, match=r'params/embed/embedding: saved .*float32.* now .*bfloat16'):
        opened().restore(like(state))


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # orbax's abandoned coroutines
def test_a_failed_write_stops_and_leaves_the_last_one_valid(opened, tiny):
    ck = write(opened, tiny, (1,))
    big = state_of(tiny, 2) | {'more': jax.random.normal(jax.random.key(0), (512, 512))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))  # the operating system refuses the bytes beyond
    try:
        with pytest.raises(checkpoint.CheckpointError, match=r'checkpoint 2 could not be written.* valid .* is step 1'):
            ck.save(2, big, {})
            ck.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    gc.collect()
    ck = opened()
    step, state, _ = ck.restore(like(state_of(tiny)))
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, state, state_of(tiny, 1))


def test_removes_a_folder_that_a_failed_writer_still_changes(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path / '2')
    (folder / 'state').mkdir(parents=True)
    errors, rmtree = [errno.ENOENT, errno.ENOTEMPTY], type(folder).rmtree

    def changing(path):
        if errors:
            raise OSError(errors.pop(), 'changed meanwhile')
        rmtree(path)

    monkeypatch.setattr(type(folder), 'rmtree', changing)
    checkpoint._remove(folder)
    assert not errors and not folder.exists()

    def denied(path):
        raise PermissionError(errno.EACCES, 'denied')

    folder.mkdir()
    monkeypatch.setattr(type(folder), 'rmtree', denied)
    with pytest.raises(PermissionError):
        checkpoint._remove(folder)


def test_a_full_disk_is_named(opened, tiny, monkeypatch):
    ck = write(opened, tiny, (1,))

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(ck._manager, 'wait_until_finished', full)
    with pytest.raises(checkpoint.CheckpointError, match='the disk is full; the last valid checkpoint is step 1'):
        ck.save(2, state_of(tiny, 2), {})
        ck.wait()
    monkeypatch.undo()
    assert ck.steps() == [1]


def test_seal_covers_every_file(opened, tiny, tmp_path):
    write(opened, tiny, (1,))
    folder = tmp_path / 'checkpoints/1'
    files = {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()}
    assert set(json.loads((folder / checkpoint.SEAL).read_text())['seal']['files']) == files - {checkpoint.SEAL}


def test_folders(opened, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ck = opened('relative/folder')
    ck.save(1, state_of(tiny), {})
    ck.wait()
    assert (tmp_path / 'relative/folder/1' / checkpoint.SEAL).exists()
    with pytest.raises(ValueError, match="folder 'memory://x': expected a local one, or gs:// or s3://"):
        checkpoint.Config(folder='memory://x')
    if importlib.util.find_spec('gcsfs') is None:
        with pytest.raises(checkpoint.CheckpointError, match=r'can not be opened: .*gcsfs'):
            opened('gs://bucket/run')


class Bucket(MemoryFileSystem):
    """Stands for s3:// in this process."""

    protocol, store, pseudo_dirs = 's3', {}, ['']

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).replace('s3://', 'memory://'))


class Plain:
    """Writes what orbax would, without its arrays, which go to a bucket by a driver of their own."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, step, args):
        for name, text in {'state/d/0': 'arrays' * 100, 'meta/metadata': json.dumps(args['meta'].item)}.items():
            path = self.folder / str(step) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (self.folder / str(step) / checkpoint.COMMIT).touch()
        return True

    def restore(self, step, args):
        return argparse.Namespace(state={'restored': step})

    def __getattr__(self, name):
        return lambda: None


def test_a_bucket(opened, tiny, monkeypatch):
    """Claiming, sealing, retiring, verifying and setting aside, on a file system that is not local."""
    monkeypatch.setattr(fsspec, 'filesystem', lambda name, **_: {'s3': Bucket}[name]())
    monkeypatch.setattr(checkpoint.Checkpoints, '_open', lambda self: Plain(self.folder))
    folder = 's3://bucket/run'
    ck, state = opened(folder), state_of(tiny)
    for step in range(1, 5):
        ck.save(step, state, {'batches': step}, loss=float(step))
        ck.wait()
    assert ck.steps() == [1, 3, 4]
    assert opened(folder).restore(like(state)) == (4, {'restored': 4}, {'batches': 4})
    epath.Path(f'{folder}/4/state/d/0').write_text('arrayz' * 100)
    with pytest.raises(checkpoint.CheckpointError, match=r'checkpoint 4 in s3://bucket/run is corrupt: state/d/0 differs'):
        opened(folder).restore(like(state))
    ck = opened(folder, fallback=True)
    assert ck.restore(like(state))[0] == 3 and ck.steps() == [1, 3]
    assert epath.Path(f'{folder}/corrupt/4/{checkpoint.SEAL}').exists()
    (epath.Path(folder) / '3' / checkpoint.SEAL).unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r'checkpoint 3 .* has no integrity.json'):
        opened(folder).restore(like(state))


def test_refuses_to_keep_fewer_than_two():
    with pytest.raises(ValueError, match='keep_last must be >= 2'):
        checkpoint.Config(keep_last=1)


def test_another_layout_is_refused_unless_asked(opened, tiny, tmp_path):
    """Its sums are taken in another order, so the run would not be the same to the bit."""
    make = lambda **change: opened(tmp_path / 'here', **change)
    ck = make()
    ck.layout = {'devices': 2}
    ck.save(1, state_of(tiny), {})
    ck.wait()
    ck = make()
    ck.layout = {'devices': 4}
    with pytest.raises(checkpoint.CheckpointError, match=r'another layout: devices: saved 2, now 4.*checkpoint.elastic=True'):
        ck.restore(like(state_of(tiny)))
    ck = make(elastic=True)
    ck.layout = {'devices': 4}
    assert ck.restore(like(state_of(tiny)))[0] == 1
    assert 'to rounding only' in ck.notes[-1]


def test_data_are_refused_before_arrays_are_read(opened, tiny, monkeypatch):
    write(opened, tiny, (1,))
    ck = opened()
    monkeypatch.setattr(ck, '_manager', None)

    def accept(data):
        raise ValueError(f'not these: {data}')

    with pytest.raises(ValueError, match=r"not these: \{'batches': 1\}"):
        ck.restore(like(state_of(tiny)), accept)


def test_retired_steps_lose_their_seal_first(opened, tiny, monkeypatch):
    """A kill while a step is removed leaves what was never finished, not what is damaged."""
    ck = write(opened, tiny, (1, 2))
    kept = []
    monkeypatch.setattr(type(ck._path(1)), 'rmtree', lambda self, **_: kept.append(self.name))
    ck.save(3, state_of(tiny, 3), {})
    ck.wait()
    assert kept == ['1']
    assert ck.steps() == [2, 3]
    monkeypatch.undo()
    assert opened().notes == ['checkpoint 1 was never finished: removed']


def test_nothing_is_unpickled(opened, tiny):
    ck, seen = write(opened, tiny, (1,)), []
    hook = lambda event, _: seen is not None and event == 'pickle.find_class' and seen.append(event)
    sys.addaudithook(hook)  # for good: Python has no way to take it off
    assert ck.restore(like(state_of(tiny)))[0] == 1
    assert not seen
    pickle.loads(pickle.dumps(pathlib.Path('x')))
    assert seen  # the hook sees it where it happens
    seen = None


def crc32c(raw: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in raw:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_names_inside_can_not_lead_out(tmp_path):
    """What orbax reads arrays with names its data files itself, so a forged manifest may hold any path."""
    import tensorstore

    base = {'driver': 'file', 'path': f'{tmp_path}/in/'}
    plain = {'compression': None, 'max_inline_value_bytes': 0}
    tensorstore.KvStore.open({'driver': 'ocdbt', 'base': base, 'config': plain}).result().write(b'x', b'y' * 99).result()
    (file,) = (tmp_path / 'in/d').iterdir()
    forged = f'../out/{file.name}'[: len(file.name) + 2].encode()
    raw = (tmp_path / 'in/manifest.ocdbt').read_bytes()
    assert crc32c(raw[:-4]).to_bytes(4, 'little') == raw[-4:]
    raw = raw[:-4].replace(f'd/{file.name}'.encode(), forged)
    (tmp_path / 'in/manifest.ocdbt').write_bytes(raw + crc32c(raw).to_bytes(4, 'little'))
    (tmp_path / 'out').mkdir()
    file.rename(tmp_path / 'in' / forged.decode())
    store = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': base}, context=tensorstore.Context()).result()
    with pytest.raises(ValueError, match='Invalid key'):
        store.read(b'x').result()
