"""The message about a name that is not known."""

import difflib
from collections.abc import Iterable


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """ "preset 'vea' is unknown: did you mean 'vae'?", or all the known names where none looks like it."""
    known = tuple(known)
    near = difflib.get_close_matches(str(name), known, cutoff=0.5)
    rest = f": did you mean {' or '.join(map(repr, near))}?" if near else f"; it is one of {', '.join(known)}"
    return f"{what} {name!r} is unknown{rest}"
