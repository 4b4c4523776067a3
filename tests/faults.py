"""The faults of `tests/chaos.py`. Each is given where to work, what is shared, and a source of randomness; it breaks a run,
sees to it that the run goes on as it must, and returns what happened."""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np

from attnx.train import checkpoint
from tests.trainers import (
    EVERY,
    PAIR,
    STEPS,
    Lost,
    Trainer,
    Watched,
    at_batch,
    expect,
    finish,
    finish_pair,
    make_config,
    sealed,
    suicide,
    two,
)


def kill_any_time(run_dir, places, rng):
    trainer = Trainer(make_config(run_dir, places.corpus))
    time.sleep(rng.uniform(0, 1.3 * float((places.root / 'seconds').read_text())))
    done = trainer.poll()
    if done is None:
        trainer.kill()
        trainer.wait()
    finish(run_dir, places)
    return 'killed' if done is None else 'was done'


def operations(places) -> int:
    """File operations of the undisturbed run."""
    return int((places.root / 'operations').read_text())


def kill_at_file_operation(run_dir, places, rng, at=None):
    left = at or rng.randrange(1, operations(places))

    def prepare():
        count = left

        def hook(event, args):
            nonlocal count
            if event in ('open', 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir') and str(run_dir) in str(args[0]):
                count -= 1
                if not count:
                    suicide()

        sys.addaudithook(hook)

    code, text = Trainer(make_config(run_dir, places.corpus), prepare).wait()
    if code not in (-9, 0):
        raise Lost(f'exit {code}: {text[-2000:]}')
    finish(run_dir, places)
    return 'killed' if code else 'was done'


def kill_in_checkpoint(run_dir, places, rng):
    which, delay = rng.randrange(1, 5), rng.uniform(0, 0.06)

    def prepare():
        plain = checkpoint.Checkpoints.save

        def save(self, step, *args):
            if step >= which * EVERY:
                threading.Timer(delay, suicide).start()
            return plain(self, step, *args)

        checkpoint.Checkpoints.save = save

    code, text = Trainer(make_config(run_dir, places.corpus), prepare).wait()
    if code not in (-9, 0):
        raise Lost(f'exit {code}: {text[-2000:]}')
    finish(run_dir, places)
    return f'{int(1000 * delay)} ms into checkpoint {which * EVERY}'


def sigterm(run_dir, places, rng):
    step = rng.randrange(1, STEPS)
    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
    text = expect(Trainer(make_config(run_dir, places.corpus), at_batch(step, terminate)).wait(), 143, 'stopped by SIGTERM')
    if f'at step {step} of' not in text or step not in sealed(run_dir):
        raise Lost(f'SIGTERM in step {step} lost it: {text[-500:]}')
    finish(run_dir, places)
    return f'saved step {step}'


def _flip(path, rng):
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def _zero(path, rng):
    raw = bytearray(path.read_bytes())
    start = rng.randrange(len(raw))
    if not any(raw[start:]):
        start = 0
    raw[start:] = bytes(len(raw) - start)
    path.write_bytes(raw)


DAMAGE = {
    'flip a bit': _flip,
    'truncate': lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    'zero a tail': _zero,
    'delete': lambda path, rng: path.unlink(),
    'link': lambda path, rng: (path.rename(path.parents[5] / 'aside'), path.symlink_to(path.parents[5] / 'aside')),
}


def damaged(kind):
    def fault(run_dir, places, rng):
        shutil.copytree(places.half, run_dir)
        newest = run_dir / 'checkpoints' / str(max(sealed(run_dir)))
        files = [path for path in newest.rglob('*') if path.is_file() and path.stat().st_size]
        if kind == 'link':
            files = list((newest / 'state/d').iterdir())
        # by size, so that most hits are in arrays, with some in every other file
        path = rng.choice(files) if rng.random() < 0.5 else rng.choices(files, [f.stat().st_size for f in files])[0]
        DAMAGE[kind](path, rng)
        message = rf'checkpoint {newest.name} .* is corrupt: .*last good checkpoint is step \d+; .* checkpoint.fallback=True'
        refused = expect(Trainer(make_config(run_dir, places.corpus)).wait(), 2, message)
        if path.name != checkpoint.SEAL and path.name not in refused:
            raise Lost(f'{path.name} is not named: {refused[-500:]}')
        finish(run_dir, places, **{'checkpoint.fallback': True})
        return path.name[:24]

    return fault


def full_disk(run_dir, places, rng):
    needed = sum(path.stat().st_size + 4096 for path in places.whole.rglob('*'))
    size = int(needed * rng.uniform(0.02, 0.9)) // 4096 * 4096 + 4096
    run_dir.mkdir()
    mounted = not subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(run_dir)], capture_output=True
    ).returncode  # fmt: skip
    try:
        if mounted:
            code, text = Trainer(make_config(run_dir, places.corpus)).wait()
            if code:
                expect((code, text), 2, 'the disk is full')
            subprocess.run(['mount', '-o', 'remount,size=64m', str(run_dir)], check=True)
        else:  # where nothing can be mounted: files may not grow
            limit = rng.randrange(512, 8192)
            prepare = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code, _ = expect(Trainer(make_config(run_dir, places.corpus), prepare).wait(), 2, 'could not be written'), ''
        finish(run_dir, places)
    finally:
        if mounted:
            subprocess.run(['umount', '-l', str(run_dir)], check=True)
    how = f'tmpfs of {size // 1024} KiB' if mounted else 'file size limit'
    return how if code else f'{how}: all fitted'


def nan_in_layer(processes):
    def fault(run_dir, places, rng):
        layer, step, value = rng.randrange(2), rng.randrange(2, STEPS - 1), rng.choice((np.nan, np.inf, 3e38))

        def poison(run, state):
            name = next(n for n in state['params'] if n.endswith('mlp/down/kernel'))
            params = state['params'] | {name: state['params'][name].at[layer].set(value)}
            return state | {'params': params}

        def prepare():
            Watched.at = {step: poison}

        message = f'step {step + 1}: loss .*first bad tensor: (parameter|activation) .*layer.* of layer {layer}'
        if processes == 2:
            config = make_config(run_dir, places.corpus, distributed=True, **PAIR)
            trainers = two(config, (prepare, prepare))
        else:
            config = make_config(run_dir, places.corpus)
            trainers = [Trainer(config, prepare)]
        for trainer in trainers:
            expect(trainer.wait(), 1, message)
        first = json.loads((run_dir / 'failure.json').read_text())['first']
        if first['layer'] != layer:
            raise Lost(f'{first}, but it was born in layer {layer}')
        if processes == 2:
            finish_pair(config, places, rng.random() < 0.5)
        else:
            finish(run_dir, places)
        return f'{value} in layer {layer}, step {step + 1}: {first["stage"]}'

    return fault


BAD_DATA = {
    'a cut line': (lambda text: text[: text.rindex('}')], r'line \d+: expected a JSON object'),
    'no such field': (lambda text: text.replace('"text"', '"txet"', 1), r"line 1: .*field 'text'"),
    'a number': (lambda text: '{"text": 5}\n' + text, r"line 1: field 'text' must be a string"),
    'not JSON': (lambda text: 'no \x1b[2Jjson\n' + text, r'line 1: expected a JSON object'),
    'empty': (lambda text: '', r'leaves no training text'),
}


def malformed_data(run_dir, places, rng):
    kind = rng.choice(list(BAD_DATA))
    corpus, (spoil, message) = run_dir.with_name(run_dir.name + '.jsonl'), BAD_DATA[kind]
    good = places.corpus.read_text()
    corpus.write_text(spoil(good))
    text = expect(Trainer(make_config(run_dir, corpus)).wait(), 2, message)
    if '\x1b' in text:
        raise Lost('an escape sequence of the data went to the terminal')
    corpus.write_text(good)
    # the split goes by the names of documents, which hold the file's
    renamed = run_dir.with_name(run_dir.name + '.data')
    renamed.mkdir()
    corpus.rename(renamed / places.corpus.name)
    shutil.rmtree(run_dir)
    finish(run_dir, places, corpus=renamed / places.corpus.name)
    return kind


def changed_data(run_dir, places, rng):
    """The corpus changes between two commands: refused, and continued when it is back."""
    folder = run_dir.with_name(run_dir.name + '.data')
    folder.mkdir()
    corpus = folder / places.corpus.name
    good = places.corpus.read_text()
    corpus.write_text(good)
    code, _ = Trainer(make_config(run_dir, corpus), at_batch(rng.randrange(2 * EVERY + 2, STEPS), suicide)).wait()
    assert code == -9
    corpus.write_text(good.replace('return', 'retrun', 1))
    expect(Trainer(make_config(run_dir, corpus)).wait(), 2, 'other data; differing: .*contents: saved')
    corpus.write_text(good)
    finish(run_dir, places, corpus=corpus)
    return 'one word of the corpus'


def other_config(run_dir, places, rng):
    shutil.copytree(places.half, run_dir)
    name, value = rng.choice((('model.width', 16), ('optim.learning_rate', 0.5), ('data.batch_size', 8), ('seed', 3)))
    ended = Trainer(make_config(run_dir, places.corpus, **{name: value})).wait()
    expect(ended, 2, f'was made with other settings: .*{name}: saved .*, now {value}')
    finish(run_dir, places)
    return name


def other_layout(run_dir, places, rng):
    shutil.copytree(places.half, run_dir)
    expect(Trainer(make_config(run_dir, places.corpus), devices=2).wait(), 2, 'another layout: devices: saved 1, now 2')
    finish(run_dir, places)
    return 'two devices for one'


def sigterm_of_two(run_dir, places, rng):
    """One process is told to stop: both save the same step and leave."""
    config = make_config(run_dir, places.corpus, distributed=True, **PAIR)
    told, step = rng.randrange(2), rng.randrange(2, STEPS - 3)
    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
    trainers = two(config, [at_batch(step, terminate) if i == told else lambda: None for i in range(2)])
    outcomes = [trainer.wait() for trainer in trainers]
    if all(code == 0 for code, _ in outcomes):  # processes agree on a step to save, here past the last one
        finish_pair(config, places, rng.random() < 0.5)
        return f'process {told} in step {step}, both were complete first'
    texts = [expect(outcome, 143) for outcome in outcomes]
    stopped = re.search(r'stopped by preemption at step (\d+)', texts[0])
    if not stopped or int(stopped[1]) not in sealed(run_dir) or int(stopped[1]) < step:
        raise Lost(f'SIGTERM in step {step} of process {told} lost it: {texts[0][-500:]}')
    finish_pair(config, places, rng.random() < 0.5)
    return f'process {told} in step {step}, both saved step {stopped[1]}'


def process_count(run_dir, places, rng):
    """Killed as two processes and continued as one, or the other way round."""
    together, when = rng.random() < 0.5, rng.randrange(EVERY + 2, STEPS)
    config = make_config(run_dir, places.corpus, distributed=True, **PAIR)
    die = at_batch(when, suicide)
    trainers = two(config, (die, die)) if together else [
        Trainer(dataclasses.replace(config, distributed=False), die, devices=2)
    ]  # fmt: skip
    codes = [trainer.wait()[0] for trainer in trainers]
    if -9 not in codes:
        raise Lost(f'exit codes {codes}')
    finish_pair(config, places, not together)
    return f'{"two, then one" if together else "one, then two"}, killed at step {when}'


def lost_process(run_dir, places, rng):
    config = make_config(run_dir, places.corpus, distributed=True, **PAIR)
    dead, when = rng.randrange(2), rng.randrange(2, STEPS)
    prepares = [at_batch(when, suicide) if i == dead else lambda: None for i in range(2)]
    trainers = two(config, prepares)
    codes = [trainer.wait()[0] for trainer in trainers]
    if codes[dead] != -9 or codes[1 - dead] == 0:
        raise Lost(f'process {dead} was to die and the other to notice: exit codes {codes}')
    finish_pair(config, places, together := rng.random() < 0.5)
    return f'process {dead} at step {when}, then {"both again" if together else "one with both devices"}'


FAULTS = {  # name -> (share, fault)
    'kill at any time': (16, kill_any_time),
    'kill at a file operation': (16, kill_at_file_operation),
    'kill inside a checkpoint': (16, kill_in_checkpoint),
    'SIGTERM': (6, sigterm),
    **{f'checkpoint file: {kind}': (4 if kind == 'link' else 5, damaged(kind)) for kind in DAMAGE},
    'full disk': (6, full_disk),
    'NaN in a layer': (6, nan_in_layer(1)),
    'malformed data': (3, malformed_data),
    'changed data': (2, changed_data),
    'other settings': (2, other_config),
    'other layout': (1, other_layout),
    'lost process of two': (2, lost_process),
    'SIGTERM to one of two': (2, sigterm_of_two),
    'NaN in a layer of two': (2, nan_in_layer(2)),
    'other number of processes': (2, process_count),
}
