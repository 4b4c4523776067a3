"""What is restored is what was written: damage, foreign folders, other settings and failed writes are named."""

import gc
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attnx.train import checkpoint

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


@pytest.mark.parametrize(
    ('hurt', 'message'),
    [
        (damage_flip, 'differs from its digest'),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), 'differs from its digest'),
        (lambda path: path.unlink(), 'is missing'),
    ],
)
def test_a_corrupt_checkpoint_is_named_and_the_last_good_one_used_only_if_asked(opened, tiny, tmp_path, hurt, message):
    write(opened, tiny)
    data = max((p for p in (tmp_path / 'checkpoints/3').rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    hurt(data)
    with pytest.raises(checkpoint.CheckpointError, match=rf'checkpoint 3 .* corrupt: .*{message}.*last good .* step 2'):
        opened().restore(like(state_of(tiny)))
    ck = opened(fallback=True)
    step, state, _ = ck.restore(like(state_of(tiny)))
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, state, state_of(tiny, 2))
    ck.save(3, state_of(tiny, 3), {})
    ck.wait()
    assert ck.steps() == [2, 3]
    assert (tmp_path / 'corrupt/3').is_dir()


def test_no_good_checkpoint_left(opened, tiny, tmp_path):
    write(opened, tiny, (1,))
    (tmp_path / 'checkpoints/1' / checkpoint.SEAL).write_text('{')
    with pytest.raises(checkpoint.CheckpointError, match=r'integrity.json is unreadable; there is no good checkpoint'):
        opened(fallback=True).restore(like(state_of(tiny)))


def test_an_unfinished_checkpoint_is_removed(opened, tiny, tmp_path):
    write(opened, tiny)
    (tmp_path / 'checkpoints/3' / checkpoint.SEAL).unlink()  # as if killed before the seal
    (tmp_path / 'checkpoints/7/state').mkdir(parents=True)  # as if killed while writing
    ck = opened()
    assert ck.restore(like(state_of(tiny)))[0] == 2
    assert len(ck.notes) == 2
    ck.save(3, state_of(tiny, 3), {})
    ck.wait()
    assert ck.steps() == [2, 3]


def test_a_foreign_folder_is_refused(opened, tmp_path):
    (tmp_path / 'theirs/100').mkdir(parents=True)
    with pytest.raises(checkpoint.CheckpointError, match=r'foreign files \(100\)'):
        opened(tmp_path / 'theirs')
    assert (tmp_path / 'theirs/100').exists()


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
    assert set(json.loads((folder / checkpoint.SEAL).read_text())['files']) == files - {checkpoint.SEAL}


def test_refuses_to_keep_fewer_than_two():
    with pytest.raises(ValueError, match='keep_last must be >= 2'):
        checkpoint.Config(keep_last=1)
