"""Names that a user may mistype. Imports nothing heavy, so that a wrong one is refused at once."""

import difflib


def nearest(name: str, valid) -> str:
    """The phrase that ends an error: the nearest valid name, and all of them."""
    valid = sorted(map(str, valid))
    close = difflib.get_close_matches(str(name), valid, n=1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    return f'{hint}valid: {", ".join(valid) or "none"}'
