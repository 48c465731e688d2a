"""Settings of a round as a service, and how a setting is declared.

A setting is declared once, with `setting`: its name, type, default, help and limit. Its checks, the option of
``poc-kernels serve``, the environment variable and the row of README's table all come from this declaration.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass
from types import NoneType
from typing import Any, NamedTuple, TypeVar

from .receivers import CallbackHosts

REQUIRED: Any = MISSING
"""The default of a setting that has none."""

_KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


class Limit(NamedTuple):
    """What the values of a setting have in common, in words and as a predicate."""

    text: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] | None = None


POSITIVE = Limit("positive", lambda value: value > 0)
NOT_NEGATIVE = Limit("at least 0", lambda value: value >= 0)
FRACTION = Limit("in (0, 1)", lambda value: 0 < value < 1)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*]+")
ORIGINS = Limit(
    "* or origins such as https://example.org, separated by commas",
    lambda value: value == "*" or all(map(_ORIGIN.fullmatch, value.split(","))),
)
HEADER_TEXT = Limit("printable text, which a header can carry", lambda value: value.strip().isprintable())
# Bytes of the environment that are no text are surrogates.
UTF8 = Limit("text in UTF-8", lambda value: value.encode(errors="ignore").decode() == value)


def _are_hosts(text: str) -> bool:
    try:
        CallbackHosts(text)
    except ValueError:
        return False
    return True


HOSTS = Limit("names, *.suffix, addresses or networks, separated by commas", _are_hosts)


def one_of(*choices: str) -> Limit:
    """Limit a setting to these values."""
    return Limit(f"{', '.join(choices[:-1])} or {choices[-1]}", choices.__contains__, choices)


def variable(name: str) -> str:
    """Name the environment variable of a setting."""
    return f"POC_KERNELS_{name.upper()}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is known of one setting.

    Attributes:
        kind: str, int, float or bool; where it is optional, None is taken as well.
        help: a verb phrase for booleans, else a noun phrase that names the unit.
        unset: what None, the default, stands for.
        secret: comes from the environment only, and is never shown.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    limit: Limit | None
    unset: str
    secret: bool

    @property
    def shown_default(self) -> str:
        """The default, for people."""
        if self.default is REQUIRED:
            return "required"
        if self.kind is bool:
            return "on" if self.default else "off"
        return self.unset if self.default is None else f"{self.default:{'g' if self.kind is float else ''}}"

    def check(self, value: Any, name: str) -> None:
        """Raise TypeError or ValueError, which call the setting by ``name``, where it cannot have this value."""
        if value is None and self.optional:
            return
        accepted = (int, float) if self.kind is float else self.kind
        if not isinstance(value, accepted) or isinstance(value, bool) != (self.kind is bool):
            got = f"a value of type {type(value).__name__}" if self.secret else repr(value)
            raise TypeError(f"{name} must be {_KINDS[self.kind]}, got {got}")
        if self.secret and not str(value).strip():
            raise ValueError(f"{name} must not be empty; leave it out for none")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
        if self.limit and not self.limit.holds(value):
            raise ValueError(f"{name} must be {self.limit.text}" + ("" if self.secret else f", got {value}"))

    def parse(self, text: str, name: str) -> Any:
        """Read a value of this setting; raise ValueError, which calls it by ``name``, where that is none."""
        try:
            value = _FLAGS[text.lower()] if self.kind is bool else self.kind(text)
        except (KeyError, ValueError):
            raise ValueError(f"{name} must be {_KINDS[self.kind]}, got {text!r}") from None
        self.check(value, name)
        return value


def setting(default: Any, help: str, limit: Limit | None = None, *, unset: str = "none", secret: bool = False) -> Any:
    """Declare a setting as a field of a dataclass; the arguments are attributes of `Setting`."""
    metadata = {"help": help, "limit": limit, "unset": unset, "secret": secret}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


def settings_of(declaring: type) -> tuple[Setting, ...]:
    """List the settings that a dataclass declares, or inherits."""
    hints = typing.get_type_hints(declaring)
    found = []
    for field in dataclasses.fields(declaring):
        kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
        optional = NoneType in kinds
        found.append(
            Setting(name=field.name, kind=kinds[0], optional=optional, default=field.default, **field.metadata)
        )
    return tuple(found)


def from_variables(settings: Iterable[Setting], environ: Mapping[str, str]) -> dict[str, Any]:
    """Read those of the settings whose environment variables are set.

    Raises:
        ValueError: a variable has no value of its setting.
    """
    named = [(each, variable(each.name)) for each in settings]
    return {each.name: each.parse(environ[name], name) for each, name in named if name in environ}


_Service = TypeVar("_Service", bound="ServiceSettings")


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Settings of a round as a service, whatever engine computes the proofs.

    Raises:
        TypeError, ValueError: a setting has a value of another type, or out of its limit.
    """

    random_projection: bool = setting(False, "use the projections in rounds of distances that do not say whether to")
    # None: an engine that has bounds on users of its own keeps them.
    max_in_flight: int | None = setting(
        512, "maximum users' requests at once, half of it per client; more get 429", POSITIVE
    )
    max_body_bytes: int | None = setting(2**20, "maximum number of bytes of a body under /v1; more get 413", POSITIVE)
    max_pow_body_bytes: int = setting(2**23, "maximum bytes of a body of the PoC routes; more get 413", POSITIVE)
    max_bodies_bytes: int = setting(2**28, "maximum bytes of all bodies, half of it per client; more get 429", POSITIVE)
    body_seconds: float = setting(30.0, "seconds that a client has to send its body; then it gets 408", POSITIVE)
    max_queued_nonces: int = setting(100_000, "maximum nonces waiting to be validated; more get 429", POSITIVE)
    max_queued_batches: int = setting(4096, "maximum batches waiting to be validated; more get 429", POSITIVE)
    result_seconds: float = setting(3600.0, "seconds for which verdicts are kept to be asked for", POSITIVE)
    max_proof_tokens: int = setting(65536, "maximum batch_size * seq_len of a round, in tokens", POSITIVE)
    # While users' steps compute, paced slices of validation wait, except for their guaranteed share. Free slices run at
    # low priority, and a step waits for them only where they got less than their share. auto: free on a CPU under Linux
    # (threads have priorities there), else paced.
    validation_pacing: str = setting(
        "auto",
        "paced: validation waits for users; free: low priority alone; auto: free on Linux CPUs",
        one_of("auto", "paced", "free"),
    )
    validation_share: float = setting(0.1, "fraction of the device guaranteed to validation", FRACTION)
    validation_wait_seconds: float = setting(1.0, "seconds that a slice waits for users at most", NOT_NEGATIVE)
    slice_seconds: float = setting(0.002, "seconds that a slice of validation should take at most", POSITIVE)
    cuda_graphs: bool = setting(True, "replay the proof forward from a captured graph on CUDA")
    drain_seconds: float = setting(5.0, "seconds of GENERATING before requests in flight are paused", NOT_NEGATIVE)
    retry_after_seconds: int = setting(10, "seconds in the Retry-After of a 503 while GENERATING", POSITIVE)
    stall_seconds: float = setting(120.0, "seconds without progress until /health answers 503", POSITIVE)
    shutdown_seconds: float = setting(10.0, "seconds for which SIGTERM waits for requests and callbacks", NOT_NEGATIVE)
    callback_nonces: int = setting(100_000, "maximum undelivered nonces kept for callbacks", POSITIVE)
    callback_urls: int = setting(256, "maximum URLs with undelivered callbacks; the least recent are dropped", POSITIVE)
    callback_seconds: float = setting(21600.0, "seconds after which an undelivered callback is dropped", POSITIVE)
    callback_posts: int = setting(32, "maximum number of callbacks that are posted at once", POSITIVE)
    # None: all hosts, except addresses that only machines nearby can mean; loopback is one unless the server listens
    # there (`CallbackHosts`).
    callback_hosts: str | None = setting(
        None, "names, wildcards and networks that callbacks may go to, with commas", HOSTS, unset="all but local ones"
    )
    allowed_origins: str | None = setting(None, "origins whose web pages may call, by commas; * for all", ORIGINS)
    guard_metrics: bool = setting(False, "ask for the token on all routes except users' and /health")
    token: str | None = setting(None, "bearer token that the PoC routes require", HEADER_TEXT, secret=True)
    callback_key: str | None = setting(None, "key that signs callbacks", UTF8, secret=True)

    def __post_init__(self) -> None:
        for each in settings_of(type(self)):
            each.check(getattr(self, each.name), each.name)
        if self.guard_metrics and self.token is None:
            raise ValueError(f"guard_metrics must come with a token, got none: set {variable('token')}")

    @classmethod
    def from_environment(cls: type[_Service], environ: Mapping[str, str]) -> _Service:
        """Read every setting from its variable, ``POC_KERNELS_<NAME>``; those whose variable is not set get defaults.

        Raises:
            ValueError: a variable has no value of its setting.
        """
        return cls(**from_variables(settings_of(cls), environ))

    def paced(self, lowers_threads: bool) -> bool:
        """Decide `Pacing.paced` by validation_pacing, on a device where threads have priorities or not."""
        return self.validation_pacing == "paced" or (self.validation_pacing == "auto" and not lowers_threads)
