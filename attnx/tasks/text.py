"""Text: language modelling on files of text or JSONL; by default on the Python standard library's own source.

A row: documents packed first-fit into T tokens, `SEP d1 d2 …` each, to be predicted as `d1 d2 … SEP`. A document longer
than T is cut into pieces of T, the last one shorter; nothing is dropped, and no target crosses documents. A file is a
document; of a `.jsonl` file each line is one. Files are read as bytes: what is not UTF-8 stays as it is.

Documents go to training or validation by a hash of their names, so the split is the same on every machine. Where that
leaves a side empty (one file, say), the end of every document is held out instead.

Tokenizers: `byte` (256 bytes and SEP) and `bpe`, trained on the training documents and kept in the run directory. The
BPE works on bytes as well, so both can write any file and `Task.token_bytes` gives each token's exact size.
Everything is held in memory as uint16 or uint32: for corpora beyond that, use `tokens`.
"""

import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import sysconfig

import numpy as np

from attnx.tasks.base import Task, expected, require
from attnx.tasks.documents import packed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    path: str = ''                  # file, folder (read whole) or glob; '' is the Python standard library's .py files
    validation_path: str = ''       # files held out; '' holds out a share of `path`
    validation: float = 0.05        # that share
    key: str = 'text'               # field of a JSONL record that holds the text
    tests: bool = False             # the standard library's own tests too, where installed (about twice the text)
    tokenizer: str = 'byte'         # byte or bpe
    bpe_vocab_size: int = 4096      # ids of the BPE, separator included; at least 257
    packing: str = 'first_fit'      # first_fit; or off: one piece a row, padded, for mixers that can't reset
    vocab_multiple: int = 1         # vocab_size is rounded up to a multiple; the ids added never occur


ELSEWHERE = {'long': {'length': '×2'}}


Documents = list[tuple[str, bytes]]


# ------------------------------------------------------------------------------------------------------------- reading

def _stdlib(tests: bool) -> tuple[pathlib.Path, list[str]]:
    """Root and relative names of the standard library's source files."""
    root = pathlib.Path(sysconfig.get_paths()['stdlib'])
    skip = {'site-packages', 'dist-packages', '__pycache__'} | (set() if tests else {'test', 'tests', 'idle_test'})
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in skip and not f.startswith('config-')]
        found += [os.path.relpath(os.path.join(folder, f), root) for f in files if f.endswith('.py')]
    require(bool(found), f'text: this Python has no standard library source in {root}; give a path to other text')
    return root, sorted(name.replace(os.sep, '/') for name in found)


def _named(pattern: str) -> tuple[pathlib.Path, list[str]]:
    """Root and relative names of the files that a file name, folder or glob stands for."""
    path = os.path.expanduser(pattern)
    if os.path.isfile(path):
        return pathlib.Path(path).parent, [os.path.basename(path)]
    if os.path.isdir(path):
        root, found = path, glob.glob('**', root_dir=path, recursive=True)
    else:
        fixed = path[:next((i for i, c in enumerate(path) if c in '*?['), len(path))]
        root = os.path.dirname(fixed) or '.'
        found = [os.path.relpath(f, root) for f in glob.glob(path, recursive=True)]
    found = sorted(f.replace(os.sep, '/') for f in found
                   if os.path.isfile(os.path.join(root, f)) and '__pycache__' not in f)
    require(bool(found), f'text: no file in {pattern!r}; expected a text or .jsonl file, a folder or a glob of such '
                         'files (hidden files are left out)')
    return pathlib.Path(root), found


def _read(root: pathlib.Path, names: list[str], key: str) -> Documents:
    """(name, content) of each document, in order; of a JSONL file each line is one."""
    out = []
    for name in names:
        raw = (root / name).read_bytes()
        if not name.endswith('.jsonl'):
            out.append((name, raw))
            continue
        for i, line in enumerate(raw.split(b'\n'), 1):
            if not line.strip():
                continue
            try:
                given = json.loads(line)
            except ValueError:
                given = None
            if not isinstance(given, dict) or key not in given:
                known = f'its fields are {[*given]!r:.80}; task.key names that of the text' if isinstance(given, dict) else ''
                raise ValueError(f'{root / name}, line {i}: expected a JSON object with the field {key!r}; '
                                 + (known or f'got {line[:80]!r}'))
            text = given[key]
            require(isinstance(text, str), f'{root / name}, line {i}: field {key!r} must be a string, got {text!r:.80}')
            out.append((f'{name}:{i}', text.encode('utf-8', 'surrogatepass')))
    return out


def _held(name: str, share: float) -> bool:
    """Whether the document goes to validation."""
    digest = hashlib.blake2b(name.encode('utf-8', 'surrogateescape'), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def _split(documents: Documents, share: float) -> tuple[Documents, Documents]:
    held = [d for d in documents if _held(d[0], share)]
    kept = [d for d in documents if not _held(d[0], share)]
    if not any(raw for _, raw in held) or not any(raw for _, raw in kept):
        cuts = [len(raw) - max(1, round(len(raw) * share)) if raw else 0 for _, raw in documents]
        kept = [(name, raw[:cut]) for (name, raw), cut in zip(documents, cuts)]
        held = [(name, raw[cut:]) for (name, raw), cut in zip(documents, cuts)]
    return kept, held


# ---------------------------------------------------------------------------------------------------------- tokenizers

class Bytes:
    """A byte is a token; 256 separates documents."""

    separator, vocab_size, digest = 256, 257, 'byte'
    token_bytes = np.array([1] * 256 + [0], np.int32)

    def encode(self, texts: list[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(raw, np.uint8) for raw in texts]

    def decode(self, ids) -> bytes:
        return bytes(i for i in ids if i < 256)


class BPE:
    """Byte-pair encoding. Byte b is written as the character chr(b), so that `tokenizers` serves any bytes at all."""

    # runs of letters with the space or sign before them, up to three digits, signs, line ends, spaces
    PATTERN = r' ?[A-Za-z_\x80-\xff]+|[0-9]{1,3}| ?[^\sA-Za-z_0-9\x80-\xff]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s'

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.separator = tokenizer.get_vocab_size()     # beyond the tokenizer's ids, so no text can produce it
        self.vocab_size = self.separator + 1
        self.texts = [tokenizer.id_to_token(i) for i in range(self.separator)] + ['']
        self.token_bytes = np.array([len(text) for text in self.texts], np.int32)
        self.digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]

    @classmethod
    def train(cls, documents: Documents, vocab_size: int) -> 'BPE':
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(cls.PATTERN), 'isolated')
        trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, show_progress=False,
                                      initial_alphabet=[chr(b) for b in range(256)])
        tokenizer.train_from_iterator((raw.decode('latin-1') for _, raw in documents), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, file: pathlib.Path) -> 'BPE':
        from tokenizers import Tokenizer
        try:
            return cls(Tokenizer.from_file(str(file)))
        except Exception as error:      # tokenizers raises bare Exception
            raise ValueError(f'{file} is not a readable tokenizer ({error}); remove it to train another') from None

    def encode(self, texts: list[bytes]) -> list[np.ndarray]:
        out = []
        for i in range(0, len(texts), 64):      # in parallel; not all at once, as encodings are large
            batch = self.tokenizer.encode_batch_fast([raw.decode('latin-1') for raw in texts[i:i + 64]])
            out += [np.array(encoding.ids, np.int64) for encoding in batch]
        return out

    def decode(self, ids) -> bytes:
        return ''.join(self.texts[i] for i in ids if i < self.vocab_size).encode('latin-1')


def _tokenizer(config: Config, documents: Documents, run_dir):
    if config.tokenizer == 'byte':
        return Bytes()
    require(config.bpe_vocab_size >= 257, f'text: bpe_vocab_size must be at least 257, got {config.bpe_vocab_size}')
    if run_dir is None:
        return BPE.train(documents, config.bpe_vocab_size)
    file = pathlib.Path(run_dir) / 'tokenizer.json'
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f'{file.name}.{os.getpid()}')
        BPE.train(documents, config.bpe_vocab_size).tokenizer.save(str(partial))
        partial.replace(file)       # whole or not at all
    tokenizer = BPE.load(file)
    require(tokenizer.vocab_size <= config.bpe_vocab_size,
            f'{file} has {tokenizer.vocab_size} tokens, more than bpe_vocab_size {config.bpe_vocab_size}; '
            'use another run directory')
    return tokenizer


# --------------------------------------------------------------------------------------------------------------- build

def _joined(documents: Documents, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """All documents in one array, a separator before each and after the last, and where the separators are."""
    ids = tokenizer.encode([raw for _, raw in documents])
    bounds = np.cumsum([0] + [1 + len(i) for i in ids])
    data = np.full(bounds[-1] + 1, tokenizer.separator, np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    for start, i in zip(bounds, ids):
        data[start + 1:start + 1 + len(i)] = i
    return data, bounds


def check(config: Config) -> None:
    require(config.packing in ('first_fit', 'off'), expected('packing', config.packing, ('first_fit', 'off')))
    require(config.tokenizer in ('byte', 'bpe'), expected('tokenizer', config.tokenizer, ('byte', 'bpe')))
    require(0 < config.validation < 1, f'text: validation must lie in (0, 1), got {config.validation}')
    for name, idle, why in (
        ('bpe_vocab_size', config.tokenizer == 'byte', 'belongs to the tokenizer bpe'),
        ('tests', bool(config.path), 'belongs to the standard library; path is given'),
        ('key', not config.path, 'belongs to JSONL files; path is not given'),
        ('validation', bool(config.validation_path), 'is the share held out of path; validation_path is given'),
    ):
        given = getattr(config, name)
        require(not idle or given == Config.__dataclass_fields__[name].default, f'text: {name} = {given!r} {why}')
    for path in filter(None, (config.path, config.validation_path)):
        _named(path)


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length = length or 512
    check(config)
    require(config.vocab_multiple >= 1, f'text: vocab_multiple must be positive, got {config.vocab_multiple}')
    root, names = _named(config.path) if config.path else _stdlib(config.tests)
    documents = _read(root, names, config.key)
    if config.validation_path:
        other, others = _named(config.validation_path)
        both = {(root / n).resolve() for n in names} & {(other / n).resolve() for n in others}
        require(not both, f'text: {len(both)} files are in both path and validation_path: {min(both, default="")} …')
        kept, held = documents, _read(other, others, config.key)
    else:
        kept, held = _split(documents, config.validation)
    where = config.path or str(root)
    for name, side in (('training', kept), ('validation', held)):
        require(any(raw for _, raw in side), f'text: {where!r} leaves no {name} text ({len(documents)} documents, '
                                             f'{sum(len(raw) for _, raw in documents)} bytes)')
    tokenizer = _tokenizer(config, kept, run_dir)
    vocab_size = -(-tokenizer.vocab_size // config.vocab_multiple) * config.vocab_multiple
    token_bytes = np.zeros(vocab_size, np.int32)
    token_bytes[:tokenizer.vocab_size] = tokenizer.token_bytes

    def source(side, seed):
        return packed(*_joined(side, tokenizer), length, seed, config.packing == 'first_fit')

    def encode(text: str | bytes) -> list[int]:
        raw = text.encode('utf-8', 'surrogateescape') if isinstance(text, str) else text
        return tokenizer.encode([raw])[0].tolist()

    def decode(ids) -> str:
        return tokenizer.decode(int(i) for i in ids).decode('utf-8', 'replace')

    train, evaluation = source(kept, seed), source(held, 0)
    contents = hashlib.blake2b(digest_size=8)
    for name, raw in kept + held:
        contents.update(f'{name}\0{len(raw)}\0'.encode('utf-8', 'surrogateescape') + raw)
    return Task(kind='text', length=length, vocab_size=vocab_size, packed=config.packing == 'first_fit',
                documents=max(train.documents(), evaluation.documents()), train=train, evaluation=evaluation,
                token_bytes=token_bytes,
                start=tokenizer.separator, encode=encode, decode=decode,
                fingerprint={'tokenizer': tokenizer.digest, 'documents': len(kept) + len(held),
                             'bytes': sum(len(raw) for _, raw in kept + held), 'contents': contents.hexdigest()})
