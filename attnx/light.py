"""Modules of this project without the libraries that are slow to import, so that a wrong config is refused at once.

`light.module('attnx.train.config').check(…)` runs the sources themselves, so no rule stands twice. A statement of a module runs
when a name that it binds is first read, and what it imports of `SLOW` is `Hollow`: it can be named, inherited from and
passed on; to use it raises `Heavy`. What needs the libraries is left to the modules proper.

Classes made here are not those of the modules proper. Statements that bind no name do not run.
"""

import ast
import builtins
import functools
import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
OURS = ('attnx', 'pallas_kernels')
MARKS = ('jax.tree_util.register_dataclass',)  # decorators that leave a class as it is
SLOW = ('jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain')


class Heavy(Exception):
    """What was asked for needs a library that is slow to import."""


class Hollow:
    """A library, or something in it, by name only."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> 'Hollow':
        if name.startswith('__'):
            raise AttributeError(name)
        inside = Hollow(f'{self._name}.{name}')
        setattr(self, name, inside)
        return inside

    def __mro_entries__(self, bases) -> tuple:
        return ()

    def __or__(self, other):  # in annotations, as are subscripts
        return self

    def __eq__(self, other):
        return self is other if isinstance(other, Hollow) else self._use()

    __ror__ = __or__
    __class_getitem__ = __getitem__ = lambda self, index: self
    __hash__ = object.__hash__

    def __call__(self, *args, **kwargs):
        return args[0] if self._name in MARKS else self._use()

    def _use(self, *args, **kwargs):
        raise Heavy(self._name)


_USES = 'bool iter len contains int float index lt le gt ge neg abs enter exit setitem instancecheck subclasscheck'
_USES += ''.join(f' {n} r{n}' for n in ('add', 'sub', 'mul', 'truediv', 'floordiv', 'mod', 'pow', 'matmul', 'and', 'xor'))
for _name in _USES.split():
    setattr(Hollow, f'__{_name}__', Hollow._use)


class _Names(dict):
    """The globals of a module whose statements wait until a name that they bind is read."""

    def __init__(self, name: str, path: pathlib.Path):
        super().__init__(__name__=name, __file__=str(path), __builtins__=vars(builtins) | {'__import__': _import})
        self.path, self.waiting = str(path), {}
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):  # annotations of functions decide nothing, and name much
            if isinstance(node, ast.FunctionDef | ast.arg):
                setattr(node, 'returns' if isinstance(node, ast.FunctionDef) else 'annotation', None)
        for statement in tree.body:
            for node in _single(statement):
                for bound in _bound(node):
                    self.waiting.setdefault(bound, []).append(node)

    def __missing__(self, name: str) -> Any:
        for node in self.waiting.pop(name):  # KeyError: it is a builtin, or nothing
            for other in _read(node):  # class bodies look names up in dicts, not in what stands for one
                if other in self.waiting:
                    self[other]
            exec(compile(ast.Module([node], []), self.path, 'exec'), self)
        return self[name]


def _single(statement: ast.stmt) -> list[ast.stmt]:
    if not isinstance(statement, ast.ImportFrom):
        return [statement]
    copies = [ast.ImportFrom(statement.module, [alias], statement.level) for alias in statement.names]
    return [ast.copy_location(copy, statement) for copy in copies]


def _bound(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.alias):
        yield node.asname or node.name.split('.')[0]
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
        yield node.value.id
    elif not isinstance(node, ast.comprehension):
        for child in ast.iter_child_nodes(node):
            yield from _bound(child)


def _read(node: ast.AST) -> Iterator[str]:
    """Names that a statement reads when it runs: all but those in bodies of functions."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node.id
    for field, value in ast.iter_fields(node):
        if not (field == 'body' and isinstance(node, ast.FunctionDef | ast.Lambda)):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _read(child)


class Module:
    """A module as others see it."""

    def __init__(self, name: str, path: pathlib.Path):
        self.__name__, self._names = name, _Names(name, path)

    def __getattr__(self, name: str) -> Any:
        if name in self._names or name in self._names.waiting:
            return self._names[name]
        if name.startswith('__'):
            raise AttributeError(name)
        return module(f'{self.__name__}.{name}')


@functools.cache
def module(name: str) -> Module:
    """The module `name` of this project.

    Raises:
      ImportError: there is none.
    """
    path = ROOT.joinpath(*name.split('.'))
    path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
    if not path.is_file():
        raise ImportError(f'no module {name}')
    made = Module(name, path)
    if name == 'attnx.catalog':
        mechanism = lambda kind: Module(f'mechanism {kind}', made.entry(kind).path)
        made._names['module'] = functools.cache(mechanism)
    return made


def _import(name: str, globals=None, locals=None, fromlist=(), level=0) -> Any:
    top = name.split('.')[0]
    if top in SLOW:
        return functools.reduce(getattr, name.split('.')[1:] if fromlist else (), _hollow(top))
    if top in OURS and not level:
        return module(name if fromlist else top)
    return importlib.__import__(name, globals, locals, fromlist, level)


_hollow = functools.cache(Hollow)
