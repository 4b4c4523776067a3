"""Text: every byte is predicted exactly once, none across documents; files of any bytes; splits; tokenizers; errors."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnx import tasks
from attnx.tasks.documents import packed

SEP = 256
BLOB = bytes(range(256)) + b'\xff\xfe caf\xe9 \x00 \xed\xa0\x80'      # not UTF-8, with a NUL


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice(['attention', 'is', 'all', 'you', 'need', 'naïve', '\n'], rng.integers(1, 80))
        (tmp_path / f'{i:02}.txt').write_text(' '.join(words))
    (tmp_path / 'empty.txt').write_bytes(b'')
    (tmp_path / 'blob.txt').write_bytes(BLOB)
    return tmp_path


def segments(source):
    """(inputs, targets) of every segment of every row; checks the row's form on the way."""
    for index in range(len(source)):
        row = source[index]
        ids = row['segment_ids']
        kept = ids[ids > 0]
        assert (ids[len(kept):] == 0).all()
        assert (np.diff(kept, prepend=0) >= 0).all()
        assert set(np.unique(kept)) == set(range(1, kept.max() + 1))
        np.testing.assert_array_equal(row['weights'], ids > 0)
        for segment in range(1, kept.max() + 1):
            here = ids == segment
            np.testing.assert_array_equal(row['positions'][here], np.arange(here.sum()))
            yield row['tokens'][here], row['targets'][here]


def documents(source):
    """Documents put together again from their pieces, whatever the order, as a sorted list of bytes. Fails where a
    target is not its input's successor in the same document, or is missing, or appears twice."""
    heads, tails = [], []
    for inputs, targets in segments(source):
        np.testing.assert_array_equal(inputs[1:], targets[:-1])
        assert SEP not in inputs[1:]        # so nothing is predicted from another document
        (heads if inputs[0] == SEP else tails).append((inputs, targets))
    return heads, tails


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=40), st.integers(1, 24), st.integers(0, 9), st.booleans())
def test_packing_predicts_every_token_once(sizes, length, seed, share):
    """Tokens of a document are unique numbers, so that each (input, target) pair can be told apart."""
    parts, number = [], 1000
    for size in sizes:
        parts.append([0, *range(number, number + size)])
        number += size + 1
    data = np.array([t for part in parts for t in part] + [0], np.uint32)
    bounds = np.flatnonzero(data == 0)
    rows = packed(data, bounds, length, seed, share)
    seen = []
    for index in range(len(rows)):
        row = rows[index]
        assert share or row['segment_ids'].max() == 1
        at = row['segment_ids'] > 0
        seen += list(zip(row['tokens'][at].tolist(), row['targets'][at].tolist(), strict=True))
        assert not row['tokens'][~at].any()
        assert not row['weights'][~at].any()
    want = list(zip(data[:-1].tolist(), data[1:].tolist()))
    assert sorted(seen) == sorted(want)


def test_first_fit_fills_rows():
    sizes = np.random.default_rng(0).lognormal(5.3, 1, 4000).astype(int) + 1
    bounds = np.cumsum([0, *sizes])
    rows = packed(np.zeros(bounds[-1] + 1, np.uint16), bounds, 1024, 0)
    assert bounds[-1] / (len(rows) * 1024) > 0.97


@pytest.mark.parametrize('packing', ['first_fit', 'off'])
def test_no_byte_is_lost(folder, packing):
    task = tasks.build({'kind': 'text', 'path': str(folder), 'packing': packing}, length=64)
    assert task.packed == (packing == 'first_fit')
    total = 0
    for source in (task.train, task.evaluation):
        heads, tails = documents(source)
        total += sum(task.token_bytes[targets].sum() for _, targets in heads + tails)
    assert total == sum(file.stat().st_size for file in folder.iterdir())


def test_bytes_that_are_not_utf8_stay(folder):
    task = tasks.build({'kind': 'text', 'path': str(folder)}, length=512)
    whole = [bytes(t[:-1].tolist()) for s in (task.train, task.evaluation) for _, t in segments(s)]
    assert sorted(whole) == sorted(file.read_bytes() for file in folder.iterdir())
    assert BLOB in whole
    assert task.decode(task.encode('naïve')) == 'naïve'
    assert task.decode([SEP, 0xff, 65]) == '\ufffdA'


def test_split_is_by_name_and_stable(folder):
    def names(**fields):
        task = tasks.build({'kind': 'text', 'path': str(folder), 'validation': 0.3} | fields, length=512)
        return [{t.tobytes() for _, t in segments(s)} for s in (task.train, task.evaluation)]

    train, held = names()
    assert not train & held
    assert 4 <= len(held) <= 22         # 42 files, 30 %
    (folder / 'another.txt').write_text('more text')
    more, also = names()
    assert train <= more and held <= also


def test_one_file_holds_out_its_end(tmp_path):
    (tmp_path / 'one.txt').write_bytes(bytes(range(200)) * 10)
    for path in (tmp_path / 'one.txt', tmp_path / '*.txt', tmp_path):
        task = tasks.build({'kind': 'text', 'path': str(path)}, length=4096)
        assert [int(s[0]['weights'].sum()) for s in (task.train, task.evaluation)] == [1901, 101]
        assert task.evaluation[0]['tokens'][:2].tolist() == [SEP, 100]


def test_standard_library_by_default():
    task = tasks.build({'kind': 'text'}, length=512)
    held = sum(task.token_bytes[task.evaluation[i]['targets']].sum() for i in range(len(task.evaluation)))
    assert 5e6 < task.fingerprint['bytes'] < 1e8
    assert 0.01 < held / task.fingerprint['bytes'] < 0.12
    text = task.decode(np.concatenate([task.train[i]['tokens'] for i in range(200)]))
    assert 'def ' in text and 'import ' in text
    assert task.vocab_size == 257 and task.start == SEP


def test_jsonl(tmp_path):
    records = [{'text': f'record {i} é', 'other': i} for i in range(50)]
    file = tmp_path / 'a.jsonl'
    file.write_text('\n'.join(json.dumps(r) for r in records) + '\n\n')
    task = tasks.build({'kind': 'text', 'path': str(tmp_path), 'validation': 0.2}, length=64)
    found = [bytes(t[:-1].tolist()).decode() for s in (task.train, task.evaluation) for _, t in segments(s)]
    assert sorted(found) == sorted(r['text'] for r in records)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: expected a JSON object with the field 'body'"):
        tasks.build({'kind': 'text', 'path': str(file), 'key': 'body'})
    with pytest.raises(ValueError, match=r"line 1: field 'other' must be a string, got 0"):
        tasks.build({'kind': 'text', 'path': str(file), 'key': 'other'})
    file.write_text('{"text": "fine"}\n{"text": broken}\n')
    with pytest.raises(ValueError, match=r'a\.jsonl, line 2: .*broken'):
        tasks.build({'kind': 'text', 'path': str(file)})


def test_bpe_is_exact_kept_and_smaller(folder, tmp_path_factory):
    run = tmp_path_factory.mktemp('run')
    config = {'kind': 'text', 'path': str(folder), 'tokenizer': 'bpe', 'bpe_vocab_size': 300, 'vocab_multiple': 64}
    task = tasks.build(config, length=64, run_dir=run)
    assert (run / 'tokenizer.json').exists()
    assert task.vocab_size == 320 and task.token_bytes.shape == (320,)
    for text in ('attention is all you need', 'naïve <sep> \n\n\t日本', ''):
        ids = task.encode(text)
        assert task.decode(ids) == text
        assert task.token_bytes[ids].sum() == len(text.encode())
        assert task.start not in ids
    assert task.token_bytes[task.encode(BLOB)].sum() == len(BLOB)
    counted = sum(task.token_bytes[t].sum() for s in (task.train, task.evaluation) for _, t in segments(s))
    assert counted == sum(file.stat().st_size for file in folder.iterdir())
    assert len(task.encode('attention is all you need')) < 20
    again = tasks.build(config, length=64, run_dir=run)
    assert again.fingerprint == task.fingerprint
    assert again.encode('attention') == task.encode('attention')
    (run / 'tokenizer.json').write_text('{')
    with pytest.raises(ValueError, match=r'tokenizer\.json is not a readable tokenizer'):
        tasks.build(config, length=64, run_dir=run)


def test_validation_path(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp('other')
    (other / 'held.txt').write_text('held out')
    task = tasks.build({'kind': 'text', 'path': str(folder), 'validation_path': str(other)}, length=64)
    assert task.decode(task.evaluation[0]['targets'][:8]) == 'held out'
    with pytest.raises(ValueError, match='in both path and validation_path'):
        tasks.build({'kind': 'text', 'path': str(folder), 'validation_path': str(folder / '0*.txt')})


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r'no file in .*nothing-\*\.txt.*expected a text or \.jsonl file'):
        tasks.build({'kind': 'text', 'path': str(tmp_path / 'nothing-*.txt')})
    with pytest.raises(ValueError, match='no file in'):
        tasks.build({'kind': 'text', 'path': str(tmp_path)})
    (tmp_path / 'empty.txt').write_bytes(b'')
    with pytest.raises(ValueError, match='leaves no training text'):
        tasks.build({'kind': 'text', 'path': str(tmp_path)})
    for field, value, message in [('tokenizer', 'bytes', "did you mean 'byte'"), ('packing', 'first', 'first_fit'),
                                  ('validation', 1.5, 'validation'), ('vocab_multiple', 0, 'vocab_multiple')]:
        (tmp_path / 'a.txt').write_text('some text to read')
        with pytest.raises(ValueError, match=message):
            tasks.build({'kind': 'text', 'path': str(tmp_path), field: value})
