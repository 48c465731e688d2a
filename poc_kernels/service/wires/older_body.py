"""The body with which a round is begun on the older wire, as the network's clients send it."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

from pydantic import BaseModel, ConfigDict

from ...protocol import UNSET, PoCConfig
from .ignored import ignored_keys


class RoundParams(BaseModel):
    """Another place of seq_len. What else a client says here describes a model of its own, and is ignored."""

    model_config = ConfigDict(strict=True, extra="allow")

    seq_len: int | None = None


class RoundBody(BaseModel):
    """Body of /init, /init/generate and /init/validate: a `PoCConfig`. Unknown keys are ignored, and told of.

    ``url`` is another name of callback_url; an empty one means none. ``params.seq_len`` is another place of seq_len.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    block_hash: str
    block_height: int
    public_key: str
    r_target: float
    fraud_threshold: float = 0.01
    node_id: int = UNSET
    node_count: int = UNSET
    batch_size: int = 32
    seq_len: int = 256
    callback_url: str | None = None
    url: str | None = None
    params: RoundParams | None = None
    use_random_projection: bool | None = None
    group_id: int = 0
    n_groups: int = 1

    def keys(self) -> dict[str, str]:
        """Return what the fields of a `PoCConfig` are called in this body, where that is another name."""
        keys = {}
        if self.url and not self.callback_url:
            keys["callback_url"] = "url"
        if self._in_params() is not None and "seq_len" not in self.model_fields_set:
            keys["seq_len"] = "params.seq_len"
        return keys

    def _in_params(self) -> int | None:
        return None if self.params is None else self.params.seq_len

    def config(self) -> dict[str, Any]:
        """Return the fields of a `PoCConfig`; use_random_projection is None where the body does not say it.

        Raises:
            ValueError: two keys of one meaning contradict each other.
        """
        names = [field.name for field in dataclasses.fields(PoCConfig) if field.name in RoundBody.model_fields]
        fields = {name: getattr(self, name) for name in names}
        in_params = self._in_params()
        seq_len = self.seq_len if in_params is None or "seq_len" in self.model_fields_set else in_params
        return {
            **fields,
            "callback_url": _agreed("callback_url", self.callback_url or None, "url", self.url or None),
            "seq_len": _agreed("seq_len", seq_len, "params.seq_len", in_params),
        }

    def ignored(self) -> list[str]:
        """Name the keys of the body that mean nothing here."""
        of_params = {} if self.params is None else self.params.model_extra or {}
        return ignored_keys([*(self.model_extra or {}), *(f"params.{name}" for name in of_params)])


def _agreed(name: str, value: Hashable, other_name: str, other: Hashable) -> Hashable:
    """Return what either key says; None if neither does."""
    if value is not None and other is not None and value != other:
        got = f"{value} and {other}" if isinstance(value, int) else "two that differ"  # a URL can hold secrets
        raise ValueError(f"{name} and {other_name} must be the same where both are given, got {got}")
    return other if value is None else value
