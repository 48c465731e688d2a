"""What a refusal calls an argument: the key that the client sent, wherever it was found to be wrong."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

_MUST = " must "
"""Before it, an error of a check names its arguments; after it come what they take, and what was got."""


@contextlib.contextmanager
def named(keys: Mapping[str, str]) -> Iterator[None]:
    """Have the checks that are made within this block name the keys of a body.

    Args:
        keys: of the body, by the names that these arguments have in the checks; others have the same in both.

    Raises:
        TypeError, ValueError: what a check raised, with the keys in place of the names. Errors of libraries, which are
            often derived from these, come through as they are.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):
            raise
        raise type(error)(_renamed(str(error), keys)) from error


def _renamed(text: str, keys: Mapping[str, str]) -> str:
    names, must, rest = text.partition(_MUST)
    if not must:
        return text
    # A name within a longer one, or in a key, is none.
    return re.sub(r"(?<![\w.])\w+(?![\w.])", lambda name: keys.get(name[0], name[0]), names) + must + rest
