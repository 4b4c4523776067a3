"""Finds mechanisms by file name: `attnx/mechanisms/<family>/<name>.py` is mechanism `<name>`.

  python -m attnx.catalog                    a table of all mechanisms
  python -m attnx.catalog --family linear    filters; also --has matrix, --paper 2312.06635, --search "gated recurrence"
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
    limits: dict

    def abilities(self) -> set[str]:
        causal = {'causal', 'bidirectional'} if self.causal == 'both' else {self.causal}
        decode = {'decode'} if self.state != 'none' else set()
        return {self.family, self.state, *self.ops, *self.needs, *causal, *decode}


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
            'limits': literal('limits', {}),
        }
    except ValueError as error:
        raise ValueError(f'{path}: paper, ops, state, causal, needs and limits of SPEC are literals ({error})') from None
    sections = dict(re.findall(r'^(Paper|Differs|Cost|Equation):\s*(.*?)(?=^\S+:|\n\n|\Z)', doc, re.M | re.S))
    sections = {k: ' '.join(v.split()) for k, v in sections.items()}
    return Entry(
        name=path.stem, family=path.parent.name, path=path, summary=doc.splitlines()[0], sections=sections, **fields
    )


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
    paper: an arXiv id. search: words that the summary or docstring holds.
    """
    entries = list(scan().values())
    if family is not None and family not in FAMILIES:
        raise _unknown('unknown family', family, FAMILIES)
    if has is not None and has not in (valid := set().union(*(e.abilities() for e in entries))):
        raise _unknown('no mechanism has', has, valid)

    def fits(e: Entry) -> bool:
        text = f'{e.name} {e.summary} {" ".join(e.sections.values())}'.lower()
        return (
            (family is None or e.family == family)
            and (has is None or has in e.abilities())
            and (paper is None or paper == e.paper or paper in e.sections.get('Paper', ''))
            and (search is None or all(word in text for word in search.lower().split()))
        )

    return [e for e in entries if fits(e)]


def names(*, family: str | None = None, has: str | None = None) -> tuple[str, ...]:
    """Names of mechanisms: `attnx.list(family='linear')`, `attnx.list(has='decode')`."""
    return tuple(e.name for e in select(family=family, has=has))


# Generated files.


def golden(name: str) -> str:
    """The parameter tree of the example config at width 32: one line a parameter, with shape, dtype and axes."""
    import jax
    from flax import nnx

    from attnx.nn.params import flat_axes, to_flat
    from attnx.spec import Dims

    spec = get(name)
    dims = Dims(width=32, causal=spec.causal != 'bidirectional', num_layers=2, max_length=64)
    built = jax.eval_shape(lambda: spec.build(spec.example, dims, rngs=nnx.Rngs(0)))
    axes = flat_axes(built)
    lines = [f'{k}  {v.dtype}[{", ".join(map(str, v.shape))}]  {axes[k]}' for k, v in to_flat(built).items()]
    return '\n'.join([f'{name} {spec.example}', *lines]) + '\n'


def index() -> str:
    """INDEX.md: every mechanism by family, its paper, state, cost, and the laws it is excused from."""
    entries = scan().values()
    lines = [
        '# Mechanisms',
        '',
        'Generated by `python -m attnx.catalog --write` from the files themselves. Every mechanism passes every law of',
        '`tests/test_contract.py`, but those in the last column.',
    ]
    for family, meaning in FAMILIES.items():
        members = [e for e in entries if e.family == family and e.path.is_relative_to(PACKAGE)]
        if not members:
            continue
        lines += ['', f'## {family}: {meaning}', '']
        lines += ['| mechanism | what | paper | causal | state | cost | laws not held |', '|---|---|---|---|---|---|---|']
        for e in members:
            link = f'[{e.paper}](https://arxiv.org/abs/{e.paper})' if re.fullmatch(r'\d{4}\.\d{4,5}', e.paper) else e.paper
            excused = '; '.join(f'{law}: {why}' for law, why in e.limits.items()) or 'none'
            cells = [f'[`{e.name}`]({family}/{e.name}.py)', e.summary.rstrip('.'), link, e.causal, e.state]
            lines.append('| ' + ' | '.join([*cells, e.sections.get('Cost', ''), excused]) + ' |')
    return '\n'.join(lines) + '\n'


def generated() -> dict[pathlib.Path, str]:
    """Path -> text of every generated file. Golden files live beside the tests, in a checkout."""
    files = {PACKAGE / 'INDEX.md': index()}
    folder = PACKAGE.parent.parent / 'tests' / 'golden'
    if folder.parent.is_dir():
        files |= {folder / f'{e.name}.txt': golden(e.name) for e in scan().values() if e.path.is_relative_to(PACKAGE)}
    return files


def stale() -> list[str]:
    """Names of generated files that differ from what the sources give."""
    return [str(p) for p, text in generated().items() if not p.is_file() or p.read_text() != text]


def main(argv: list[str] | None = None) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog='python -m attnx.catalog', description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--family', help='only this family')
    parser.add_argument('--has', help='only with this ability: a family, kind of state, op, causal, decode, …')
    parser.add_argument('--paper', help='only this arXiv id')
    parser.add_argument('--search', help='only those whose description holds all these words')
    parser.add_argument('--check', action='store_true', help='fail if generated files are stale')
    parser.add_argument('--write', action='store_true', help='renew generated files')
    options = parser.parse_args(argv)
    if options.write:
        for path, text in generated().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if options.write or options.check:
        left = stale()
        for path in left:
            print(f'stale: {path}; renew with python -m attnx.catalog --write', file=sys.stderr)
        return 1 if left else 0
    try:
        chosen = select(family=options.family, has=options.has, paper=options.paper, search=options.search)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not chosen:
        print('no mechanism fits', file=sys.stderr)
        return 1
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ('mechanism', 'family', 'paper', 'causal', 'state', 'what'):
        table.add_column(column, overflow='fold', no_wrap=column == 'mechanism')
    for e in chosen:
        table.add_row(e.name, e.family, e.paper, e.causal, e.state, e.summary.rstrip('.'))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return 0


if __name__ == '__main__':
    sys.exit(main())
