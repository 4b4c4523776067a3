"""The closed list of logical axis names and of shape letters.

Parameters carry one name per dimension; `sharding.py` maps names to mesh axes. A name outside this list is an error.
"""

NAMES = {
    'batch': 'sequences',
    'length': 'tokens of the sequence',
    'embed': 'model width M',
    'heads': 'query heads times head width, or query heads',
    'kv_heads': 'key/value heads times head width, or key/value heads',
    'head_dim': 'width inside one head',
    'mlp': 'hidden width of the MLP, or the inner width of a gated block',
    'vocab': 'vocabulary',
    'layers': 'repeats of a scanned unit',
    'expert': 'experts',
    'rank': 'low rank or latent width',
    'conv': 'taps of a convolution',
    'features': 'input features, classes, table rows: never sharded',
}

LETTERS = {
    'B': 'batch',
    'T': 'query length',
    'S': 'key length',
    'N': 'query heads',
    'K': 'key/value heads',
    'G': 'N / K',
    'H': 'head width',
    'M': 'model width',
    'V': 'vocabulary',
    'C': 'chunk',
}


def check(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `axes` names every dimension of `shape` from the closed list (None: never sharded)."""
    if not shape or len(axes) != len(shape):
        raise ValueError(f'axes {axes} for shape {shape}: one name per dimension, at least one dimension')
    for name in axes:
        if name is not None and name not in NAMES:
            raise ValueError(f'unknown logical axis {name!r}; valid: {", ".join(NAMES)}')
