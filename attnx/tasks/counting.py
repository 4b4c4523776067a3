"""Counting: a program of assignments and increments; print a variable.

A row: one token a statement, `pass`, `set v`, `increment v`, padded on the right, then `print v`; its target is the
value of v, and only that counts. Statements are drawn with weights 50 (pass), 1 (set a variable to 0) and 7
(increment one that is set); an increment above `most` is drawn again. Ids: 0 pass, then V set, V increment, V print,
then the values 0 … most. Harder with more variables, longer programs and more passes between.

Paper: Contextual position encoding (2405.18719), section 5.3, as its code has it. Sizes there: 1, 3, 5 variables, up to 512.
Differs: a statement is one token instead of three or four.
"""

import dataclasses

import numpy as np

from attnx.tasks.base import Task, generated, require, row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    num_variables: int = 1          # V
    most: int = 10                  # largest value
    shortest: int = 3               # statements of the shortest program
    passes: float = 50.0            # weight of a pass, beside 1 for a set and 7 for an increment
    num_train: int = 1_000_000      # different rows to train on
    num_eval: int = 512             # rows held out


ELSEWHERE = {'long': {'length': '×2'}, 'sparse': {'passes': 200.0}}


def build(config: Config, *, length: int, seed: int, run_dir=None) -> Task:
    length, v = length or 64, config.num_variables
    require(v >= 1 and config.most >= 1 and config.passes >= 0, 'counting: num_variables and most must be positive')
    require(1 <= config.shortest < length, f'counting: shortest {config.shortest} must lie in [1, length {length})')
    weights = np.array([config.passes, 1.0, 7.0]) / (config.passes + 8.0)

    def make(rng):
        values, n = {}, rng.integers(config.shortest, length)
        while not values:
            values, tokens = {}, []
            while len(tokens) < n:
                kind, name = rng.choice(3, p=weights), int(rng.integers(0, v))
                if kind == 1:
                    values[name] = 0
                elif kind == 2:
                    if name not in values or values[name] == config.most:
                        continue
                    values[name] += 1
                tokens.append(0 if kind == 0 else 1 + (kind - 1) * v + name)
        asked = sorted(values)[rng.integers(0, len(values))]
        tokens.append(1 + 2 * v + asked)
        targets = np.zeros(n + 1, np.int64)
        targets[-1] = 1 + 3 * v + values[asked]
        return row(tokens, targets, np.arange(n + 1) == n, length=length)

    return Task(kind='counting', length=length, vocab_size=2 + 3 * v + config.most, **generated(make, config, seed))
