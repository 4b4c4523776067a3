"""ListOps: the value of a nested expression of minimum, maximum, median and sum modulo ten.

A row: `[MAX 2 [MIN 7 4 ] 0 ]` as tokens, padded on the right; the target at its last token is its value, and only
that counts. Digits are ids 0 … 9, the operators 10 … 13 (MIN, MAX, MED, SM), the closing bracket 14. A node above the
deepest level is an operator with probability `branch`, else a digit; it has 2 to `arguments` children; a median of an
even number is the truncated mean of the middle two. Expressions shorter than `shortest` or longer than the row are
drawn again. Harder when deeper and longer.

Paper: ListOps (1804.06028), as in Long Range Arena (2011.04006): depth 10, 10 arguments, 500 to 2,000 tokens.
Differs: small sizes by default; no row is removed for being drawn twice; the answer is a token, not a class.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row

OPERATORS = (min, max, lambda v: int(np.median(v)), lambda v: sum(v) % 10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    depth: int = 4                  # levels of the tree, the root included
    arguments: int = 5              # most children of an operator
    branch: float = 0.25            # probability of an operator below the root
    shortest: int = 8               # tokens of the shortest expression
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'deep': {'depth': '×2', 'length': '×2'}, 'long': {'shortest': '×2', 'length': '×2'}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length = length or 64
    require(config.depth >= 2 and config.arguments >= 2, 'listops: depth and arguments must be at least 2')
    require(0 < config.branch < 1, f'listops: branch must lie in (0, 1), got {config.branch}')
    require(4 <= config.shortest <= length, f'listops: shortest {config.shortest} must lie in [4, length {length}]')
    largest = _largest(config.depth, config.arguments)
    require(config.shortest <= largest, f'listops: depth {config.depth} gives {largest} tokens at most, not {config.shortest}')

    def make(rng):
        def node(level):
            if level > 1 and (level == config.depth or rng.random() >= config.branch):
                digit = int(rng.integers(0, 10))
                return [digit], digit
            operator, count = int(rng.integers(0, 4)), rng.integers(2, config.arguments + 1)
            children = [node(level + 1) for _ in range(count)]
            tokens = [10 + operator, *(t for part, _ in children for t in part), 14]
            return tokens, OPERATORS[operator]([value for _, value in children])

        tokens, value = node(1)
        while not config.shortest <= len(tokens) <= length:
            tokens, value = node(1)
        last = np.arange(len(tokens)) == len(tokens) - 1
        return row(tokens, last * value, last, length=length)

    return Task(kind='listops', length=length, vocab_size=15, **generated(make, config, seed))


def _largest(depth: int, arguments: int) -> int:
    size = 1
    for _ in range(depth - 1):
        size = 2 + arguments * size
    return size
