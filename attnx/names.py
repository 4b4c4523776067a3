"""What errors are made of. Imports nothing heavy, so that a wrong name is refused at once."""

import difflib


def nearest(name: str, valid) -> str:
    """The phrase that ends an error: the nearest valid name, and all of them."""
    valid = sorted(map(str, valid))
    close = difflib.get_close_matches(str(name), valid, n=1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    return f'{hint}valid: {", ".join(valid) or "none"}'


def printable(text: str) -> str:
    r"""`text` with control characters written out (\x1b): what a model or a file says must not steer a terminal."""
    return ''.join(c if c.isprintable() or c in '\n\t' else c.encode('unicode_escape').decode() for c in text)
