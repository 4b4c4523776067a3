"""The text that a run draws at its end. See `draw`."""

from collections.abc import Callable

import jax

from attnx import models
from attnx.train.config import Config


def draw(config: Config, task, model: Callable, say: Callable) -> str | None:
    """Text drawn from `model()`; None, and a word to `say`, where there is none to draw."""
    how = config.sample
    if not how.tokens or not how.count:
        return None
    if task.decode is None or task.encode is None or config.model.kind != 'decoder':
        say(f'no sample: task {task.kind!r} with a model of kind {config.model.kind!r} writes no text')
        return None
    if jax.process_count() > 1:
        say('no sample: the model is spread over several processes')
        return None
    prompt = ([] if task.start is None else [task.start]) + list(task.encode(how.prompt))
    try:
        found = models.generate(
            model(), [prompt or [0]] * how.count, max_new_tokens=how.tokens, temperature=how.temperature,
            top_k=how.top_k, top_p=how.top_p, bases=how.bases, key=jax.random.key(config.seed),
        )  # fmt: skip
    except ValueError as error:
        say(f'no sample: {error}')
        return None
    return '\n--- next ---\n'.join(task.decode([*task.encode(how.prompt), *new]).rstrip() for new in found)
