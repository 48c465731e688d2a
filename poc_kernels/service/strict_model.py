"""Models of bodies that refuse keys which nobody knows."""

from __future__ import annotations

import itertools
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

_MAX_UNKNOWN = 20


class StrictModel(BaseModel):
    """A body, or a part of one, that has no other keys than its fields'; numbers are no texts, and texts no numbers.

    Of unknown keys the first are errors: pydantic makes all errors in one call that holds the interpreter, which takes
    seconds for half a million.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, value: Any) -> Any:
        """Leave out unknown keys after the first ones."""
        if not isinstance(value, dict) or len(value) <= _MAX_UNKNOWN:
            return value
        names = {info.alias or name for name, info in cls.model_fields.items()}
        unknown = itertools.islice((name for name in value if name not in names), _MAX_UNKNOWN)
        return {name: value[name] for name in (*(names & value.keys()), *unknown)}
