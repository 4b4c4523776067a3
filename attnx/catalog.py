"""Finds mechanisms by file name: `attnx/mechanisms/<family>/<name>.py` is mechanism `<name>`.

  python -m attnx.catalog                    a table of all mechanisms
  python -m attnx.catalog --family linear    filters; also --has matrix
  python -m attnx.catalog --paper 2312.06635 or words of a title; --search "negative weights": words of descriptions. These find
                                             options too: masks, scores, feature maps, …, and fields of configs
  python -m attnx.catalog --check            fails where INDEX.md or the golden parameter trees are stale
  python -m attnx.catalog --write            renews them

Further folders of `<family>/<name>.py` files can be named in the environment variable ATTNX_PATH (separated as PATH is).
The table is read from the sources without importing them, so it answers at once; `get` imports one file.
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Mapping

from attnx.names import nearest

PACKAGE = pathlib.Path(__file__).parent / 'mechanisms'
FAMILIES = {
    'softmax': 'all past keys, all scored',
    'local': 'a bounded window',
    'sparse': 'all past keys, a chosen few',
    'latent': 'compressed or factored keys',
    'linear': 'matrix state: add or decay',
    'delta': 'matrix state: erase and write',
    'ssm': 'vector state, long convolution',
    'memory': 'state that outlives the context',
    'cross_layer': 'state owned by another layer',
    'cross': 'reads a second sequence or modality',
    'encoder': 'needs the whole sequence',
    'mixer': 'no queries and keys at all',
}


_ID = r'\b\d{4}\.\d{4,5}(?!\d)'  # of arXiv


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What a mechanism's source says of it."""

    name: str
    family: str
    path: pathlib.Path
    summary: str  # first line of the docstring
    sections: dict  # 'Paper', 'Differs', 'Cost' of the docstring
    paper: str
    ops: tuple
    state: str
    causal: str
    needs: tuple
    inputs: dict
    limits: dict
    snippet: str  # an entry of `model.mixers`: "{'kind': 'gla', 'num_heads': 4}"

    def cites(self, paper: str) -> bool:
        """Is `paper` its arXiv id, one that its docstring names, or words of a title there, or of what it is called?"""
        return _cites(f'{self.paper} {self.name} {self.summary} {self.sections.get("Paper", "")}', paper)

    def holds(self, words: str) -> bool:
        """Are all words in its name or docstring?"""
        return _holds(f'{self.name} {self.summary} {" ".join(self.sections.values())}', words)

    def abilities(self) -> set[str]:
        causal = {'causal', 'bidirectional'} if self.causal == 'both' else {self.causal}
        decode = {'decode'} if self.state != 'none' else set()
        return {self.family, self.state, *self.ops, *self.needs, *self.inputs, *causal, *decode}


def _cites(text: str, paper: str) -> bool:
    ids = re.findall(_ID, paper)  # alone, or as in 'arXiv:2410.11842v3' and https://arxiv.org/abs/2410.11842
    return all(i in text for i in ids) if ids else _holds(text, paper)


def _holds(text: str, words: str) -> bool:
    """Does every one of `words` begin a word of `text`? Case, punctuation and a plural's s do not matter."""
    split = lambda t: re.findall(r'[^\W_]+', t.lower())
    there = split(text)
    return all(any(t.startswith(w.removesuffix('s') or w) for t in there) for w in split(words))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """What is no mechanism but an option of many: a function of `attnx.ops`, or a field of a config that cites a paper."""

    name: str  # 'masks.window', 'softmax.Options.qk_norm'
    path: pathlib.Path
    text: str  # what it is
    use: str  # how it is written

    @property
    def papers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(re.findall(_ID, self.text)))

    def cites(self, paper: str) -> bool:
        return _cites(self.text, paper)

    def holds(self, words: str) -> bool:
        return _holds(f'{self.name} {self.text}', words)


VOCABULARY = ('masks', 'scores', 'positions', 'feature_maps', 'normalizers')  # modules of attnx.ops that hold options


@functools.cache
def options() -> tuple[Option, ...]:
    """Every option, read from the sources."""
    source = PACKAGE.parent
    found = []
    entries = {}  # masks and scores that `softmax.Options` takes by name
    for node in ast.parse((source / 'nn' / 'softmax.py').read_text()).body:
        if isinstance(node, ast.Assign) and _target(node) in ('MASKS', 'SCORES'):
            entries[_target(node).lower()] = ast.literal_eval(node.value)
    for kind in VOCABULARY:
        path = source / 'ops' / f'{kind}.py'
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith('_') or not (doc := ast.get_docstring(node)):
                continue
            needed = [a.arg for a in node.args.args[: len(node.args.args) - len(node.args.defaults)]]
            use = f'ops.{kind}.{node.name}' + ('' if needed[:1] == ['s'] else f'({", ".join(needed)})')
            if node.name in entries.get(kind, ()):
                own = [] if node.name in ('alibi', 't5') else needed  # the tables and slopes of these are the model's
                use = f"{kind} = (({', '.join([repr(node.name), *own])}{'' if own else ','}),)"
            elif kind == 'feature_maps' and needed == ['x']:
                use = f'feature_map = {node.name!r}'
            found.append(Option(name=f'{kind}.{node.name}', path=path, text=' '.join(doc.split()), use=use))
    shared = ('interop', 'models', 'nn', 'train')
    for path in sorted(p for folder in shared for p in (source / folder).glob('*.py')):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ''
        if re.search(_ID, doc):
            name = f'{path.parent.name}.{path.stem}'
            found.append(Option(name=name, path=path, text=' '.join(doc.split()), use=f'attnx.{name}'))
    for path in sorted((*(p for folder in shared for p in (source / folder).glob('*.py')), *PACKAGE.glob('*/*.py'))):
        where = ''
        for line in path.read_text().splitlines():
            if begins := re.match(r'class (\w+)', line):
                where = begins[1]
            field = re.match(r'    (\w+): [^=#]+ = (.*?)  # (.*)', line)
            if field and where and re.search(rf'{_ID}|\b, (19|20)\d\d\)?', field[3]):
                name = f'{path.stem}.{where}.{field[1]}' if path.parent.name in shared else f'{path.stem}.{field[1]}'
                found.append(Option(name=name, path=path, text=field[3], use=f'{field[1]} = {_other(field[2])}'))
    return tuple(found)


@functools.cache
def models() -> dict[str, list[str]]:
    """Paper -> names of its small models in configs/papers.py, read from the source; none outside a checkout."""
    path, found = PACKAGE.parents[1] / 'configs' / 'papers.py', {}
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    tables = [n.value for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Dict)]
    for name, value in ((k, v) for table in tables for k, v in zip(table.keys, table.values) if isinstance(k, ast.Constant)):
        words = [n.value for n in ast.walk(value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        for paper in [word for word in words if re.fullmatch(_ID, word)][:1]:
            found.setdefault(paper, []).append(name.value)
    return found


def _other(default: str) -> str:
    return {'False': 'True'}.get(default, '…')


def roots() -> list[pathlib.Path]:
    return [PACKAGE, *(pathlib.Path(p) for p in os.environ.get('ATTNX_PATH', '').split(os.pathsep) if p)]


def scan() -> dict[str, Entry]:
    """Name -> entry, of every mechanism file, sorted by name.

    Raises:
      ValueError: two files of one name; a file without a literal SPEC or docstring.
    """
    found: dict[str, Entry] = {}
    for root in roots():
        for path in sorted(root.glob('*/*.py')):
            if path.name.startswith('_'):
                continue
            if path.stem in found:
                raise ValueError(f'two mechanisms are named {path.stem!r}: {found[path.stem].path} and {path}')
            found[path.stem] = _read(str(path), path.stat().st_mtime_ns)
    return dict(sorted(found.items()))


@functools.cache
def _read(file: str, stamp: int) -> Entry:
    path = pathlib.Path(file)
    tree = ast.parse(path.read_text())
    call = next(
        (
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _target(node) == 'SPEC'
        ),
        None,
    )
    doc = ast.get_docstring(tree)
    if call is None or doc is None:
        raise ValueError(f'{path}: a mechanism file has a module docstring and ends in SPEC = Spec(…)')
    given = {k.arg: k.value for k in call.keywords}

    def literal(name, default):
        return ast.literal_eval(given[name]) if name in given else default

    try:
        fields = {
            'paper': literal('paper', ''),
            'ops': literal('ops', ()),
            'state': literal('state', 'none'),
            'causal': literal('causal', 'both'),
            'needs': literal('needs', ()),
            'inputs': literal('inputs', {}),
            'limits': literal('limits', {}),
            'snippet': _snippet(path.stem, given.get('example')),
        }
    except ValueError as error:
        raise ValueError(f'{path}: SPEC is literal but for module, config, example and functions ({error})') from None
    sections = dict(re.findall(r'^(Paper|Differs|Cost|Equation):\s*(.*?)(?=^\S+:|\n\n|\Z)', doc, re.M | re.S))
    sections = {k: ' '.join(v.split()) for k, v in sections.items()}
    return Entry(
        name=path.stem, family=path.parent.name, path=path, summary=doc.splitlines()[0], sections=sections, **fields
    )


def _snippet(name: str, example: ast.expr | None) -> str:
    """The entry of `model.mixers` that makes the (first) example config."""
    if isinstance(example, ast.Tuple):
        example = example.elts[0]
    given = [f'{k.arg!r}: {ast.unparse(k.value)}' for k in example.keywords] if isinstance(example, ast.Call) else []
    return '{' + ', '.join([f"'kind': {name!r}", *given]) + '}'


def _target(node: ast.Assign) -> str:
    target = node.targets[0]
    return target.id if isinstance(target, ast.Name) else ''


def entry(name: str) -> Entry:
    """The entry of mechanism `name`.

    Raises:
      ValueError: there is none; names the nearest.
    """
    entries = scan()
    if name not in entries:
        raise _unknown('unknown mechanism', name, entries)
    return entries[name]


def _unknown(what: str, name: str, valid) -> ValueError:
    return ValueError(f'{what} {name!r}; {nearest(name, valid)}')


def resolve(name: str, mixers: Mapping) -> tuple[str, dict]:
    """What a name of a layer pattern stands for: (mechanism, fields of its Config). Imports no mechanism.

    mixers: name -> {'kind': mechanism, …}; any other name is a mechanism with its default config.

    Raises:
      ValueError: there is no such name, or its `kind` is missing or unknown.
    """
    if name not in mixers:
        if name not in scan():
            raise ValueError(
                f'pattern names {name!r}, which is neither in model.mixers nor a mechanism; '
                + nearest(name, [*mixers, *scan()])
            )
        return name, {}
    fields = dict(mixers[name])
    if 'kind' not in fields:
        raise ValueError(f"config.model.mixers.{name} has no 'kind'; valid: {', '.join(scan())}")
    return entry(fields.pop('kind')).name, fields


def get(name: str):
    """The `Spec` of mechanism `name`: `attnx.get('gla').build(config, dims, rngs=rngs)`."""
    return module(name).SPEC


@functools.cache
def module(name: str):
    """The module that holds mechanism `name`."""
    path = entry(name).path
    if path.is_relative_to(PACKAGE):
        return importlib.import_module(f'attnx.mechanisms.{path.parent.name}.{path.stem}')
    spec = importlib.util.spec_from_file_location(f'attnx_mechanism_{name}', path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def select(*, family: str | None = None, has: str | None = None, paper: str | None = None, search: str | None = None):
    """Entries that fit every filter that is given.

    family: a family's name. has: an ability: a family, a kind of state, an op, 'causal', 'bidirectional', 'decode', 'memory'.
    paper: an arXiv id, or words of the title. search: words that the name, summary or docstring holds.
    """
    entries = list(scan().values())
    if family is not None and family not in FAMILIES:
        raise _unknown('unknown family', family, FAMILIES)
    if has is not None and has not in (valid := set().union(*(e.abilities() for e in entries))):
        raise _unknown('no mechanism has', has, valid)
    return [
        e
        for e in entries
        if (family is None or e.family == family)
        and (has is None or has in e.abilities())
        and (paper is None or e.cites(paper))
        and (search is None or e.holds(search))
    ]


def find_options(*, paper: str | None = None, search: str | None = None) -> list[Option]:
    """Options that fit every filter that is given, as in `select`."""
    return [o for o in options() if (paper is None or o.cites(paper)) and (search is None or o.holds(search))]


def names(*, family: str | None = None, has: str | None = None) -> tuple[str, ...]:
    """Names of mechanisms: `attnx.list(family='linear')`, `attnx.list(has='decode')`."""
    return tuple(e.name for e in select(family=family, has=has))


def main(argv: list[str] | None = None) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog='python -m attnx.catalog', description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--family', help='only this family')
    parser.add_argument('--has', help='only with this ability: a family, kind of state, op, causal, decode, …')
    parser.add_argument('--paper', help='only this arXiv id, or title with these words')
    parser.add_argument('--search', help='only those whose description holds all these words')
    parser.add_argument('--check', action='store_true', help='fail if generated files are stale')
    parser.add_argument('--write', action='store_true', help='renew generated files')
    given = parser.parse_args(argv)
    if given.write or given.check:
        from attnx import generated  # slow: it builds models

        if given.write:
            for path, text in generated.files().items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
        left = generated.stale()
        for path in left:
            print(f'stale: {path}; renew with python -m attnx.catalog --write', file=sys.stderr)
        return 1 if left else 0
    try:
        chosen = select(family=given.family, has=given.has, paper=given.paper, search=given.search)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    asked = given.family is None and given.has is None and (given.paper, given.search) != (None, None)
    others = find_options(paper=given.paper, search=given.search) if asked else []
    if not chosen and not others:
        print('no mechanism and no option fits', file=sys.stderr)
        return 1
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140)

    def show(columns, rows):
        table = Table(box=None, pad_edge=False)
        for column in columns:
            table.add_column(column, overflow='fold', no_wrap=column in ('mechanism', 'option'))
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False)

    if chosen:
        rows = [(e.name, e.family, e.paper, e.causal, e.state, e.summary.rstrip('.')) for e in chosen]
        show(('mechanism', 'family', 'paper', 'causal', 'state', 'what'), rows)
    if others:
        show(('option', 'use', 'what'), [(o.name, o.use, o.text[:300]) for o in others])
    papers = dict.fromkeys([*(e.paper for e in chosen), *(p for o in others for p in o.papers)] if asked else [])
    named = re.findall(_ID, given.paper or '')
    if small := [(p, f'python train.py --config=configs/papers.py:{n}') for p in named or papers for n in models().get(p, ())]:
        show(('paper', 'a small model of it'), small)
    return 0


if __name__ == '__main__':
    sys.exit(main())
