"""Settings of rounds inside vLLM: they come from the environment, since a plugin has no options on a command line."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...service.settings import POSITIVE, ServiceSettings, setting, settings_of, variable

logger = logging.getLogger("poc_kernels")

_ELSEWHERE = {
    "allowed_origins": "use vLLM's --allowed-origins",
    "validation_pacing": "in vLLM validation is always paced, by POC_KERNELS_VALIDATION_SHARE",
    "validation_wait_seconds": "in vLLM no slice waits for users, see POC_KERNELS_VALIDATION_SHARE",
}
"""Settings of our own server that have no effect in vLLM, and what to do instead."""
_OF_THE_OPS = {"backend", "native", "triton_arithmetic", "amx_model"}
"""Names of variables that are read elsewhere in the package, or when it is built."""


@dataclass(frozen=True, kw_only=True)
class VllmSettings(ServiceSettings):
    """Settings of a round as a service inside vLLM, whose own bounds on users hold unless they are set here."""

    max_in_flight: int | None = setting(
        None, "maximum users' requests at once, half of it per client; more get 429", POSITIVE, unset="vLLM's own"
    )
    max_body_bytes: int | None = setting(
        None, "maximum number of bytes of a user's body; more get 413", POSITIVE, unset="vLLM's own"
    )

    guard_metrics: bool = setting(False, "ask for the token on /metrics too")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> VllmSettings:
        """Read every setting from its variable, and warn of variables that are none of a setting.

        Raises:
            ValueError: a variable has no value of its setting, or is of a setting that has no effect in vLLM.
        """
        for name, instead in _ELSEWHERE.items():
            if variable(name) in environ:
                raise ValueError(f"{variable(name)} has no effect in vLLM: {instead}")
        known = {variable(each.name) for each in settings_of(cls)} | set(map(variable, _OF_THE_OPS))
        unknown = sorted(name for name in environ if name.startswith(variable("")) and name not in known)
        if unknown:
            logger.warning("no settings in vLLM, and without effect: %s", ", ".join(unknown))
        return super().from_environment(environ)


def table() -> str:
    """Format the table of docs/vllm.md: the settings that have an effect in vLLM."""
    rows: list[Any] = [each for each in settings_of(VllmSettings) if each.name not in _ELSEWHERE]
    lines = [f"| `{variable(each.name)}` | {each.shown_default} | {each.help} |" for each in rows]
    return "\n".join(["| variable | default | |", "| --- | --- | --- |", *lines])


if __name__ == "__main__":
    print(table())
