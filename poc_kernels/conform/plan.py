"""What is played against an endpoint, and what the wire says of the proof forms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

ENGINE_PREFIX = "/api/v1/pow"
MLNODE_PREFIX = "/api/v1/inference/pow"


class StatTest(NamedTuple):
    """How a verdict is reached."""

    dist_threshold: float
    p_mismatch: float
    fraud_threshold: float

    def p_value(self, n_mismatch: int, n_total: int) -> float:
        """Return the probability that at least n_mismatch of n_total nonces of an honest node mismatch."""
        p = self.p_mismatch
        return math.fsum(
            math.comb(n_total, count) * p**count * (1 - p) ** (n_total - count)
            for count in range(n_mismatch, n_total + 1)
        )


class Form(NamedTuple):
    """A proof form.

    Attributes:
        k_dim: numbers of an artifact.
        defaults: the test of a request that brings none.
        bound: two artifacts of one nonce that are farther apart than this count as different.
    """

    k_dim: int
    defaults: StatTest
    bound: float


FORMS = {
    "vectors": Form(12, StatTest(0.02, 0.001, 0.01), bound=0.4),  # the chain's own threshold
    "fingerprint": Form(64, StatTest(0.30, 0.02, 0.01), bound=0.3),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is played.

    Args:
        url: base of the endpoint, http or https; ``prefix`` is added to its path.
        prefix: `ENGINE_PREFIX`, or `MLNODE_PREFIX` for the routes that an MLNode has before its engines.
        model: name of the served model; None to ask /v1/models for it.
        proof: name of a proof form in `FORMS`.
        seq_len, batch_size: of the requests.
        k_dim: numbers of an artifact; None for the form's own.
        token: bearer token, or None. Blanks at its ends, such as the line end of a file, are no part of it.
        callback_host: host, and port after a colon, at which the endpoint reaches this process; None for the address
            from which this machine reaches the endpoint, and a free port.
        queue_limit: nonces that the endpoint lets wait; None to leave its 429 alone.
        timeout_seconds: for an answer, and for a callback.
        max_seconds: for everything.

    Raises:
        ValueError: naming the argument, what it got and what it takes.
    """

    url: str
    prefix: str = ENGINE_PREFIX
    model: str | None = None
    proof: str = "vectors"
    seq_len: int = 256
    k_dim: int | None = None
    batch_size: int = 8
    token: str | None = None
    callback_host: str | None = None
    queue_limit: int | None = None
    timeout_seconds: float = 60.0
    max_seconds: float = 1800.0

    def __post_init__(self) -> None:
        if not _is_base(self.url):
            raise ValueError(
                "url must be http or https with a host, a valid port if any, without query and fragment, "
                f"got {self.url!r}"
            )
        for name, taken in (("prefix", (ENGINE_PREFIX, MLNODE_PREFIX)), ("proof", tuple(FORMS))):
            if getattr(self, name) not in taken:
                raise ValueError(f"{name} must be one of {', '.join(taken)}, got {getattr(self, name)!r}")
        for name, least in (("seq_len", 1), ("batch_size", 1), ("k_dim", 2), ("queue_limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in ("timeout_seconds", "max_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.token is not None and not (self.token.strip() and self.token.strip().isprintable()):
            raise ValueError("token must be printable text, which a header can carry")  # it is told to nobody
        if self.callback_host is not None:
            self.callback_address()

    @property
    def form(self) -> Form:
        """The proof form; its k_dim is that of the requests."""
        form = FORMS[self.proof]
        return form if self.k_dim is None else form._replace(k_dim=self.k_dim)

    @property
    def is_mlnode(self) -> bool:
        """Whether the routes are those of an MLNode."""
        return self.prefix == MLNODE_PREFIX

    def callback_address(self) -> tuple[str, int]:
        """Return host and port of ``callback_host``; 0 where it names no port.

        Raises:
            ValueError: it is no host.
        """
        try:
            parts = urlsplit(f"//{self.callback_host}")
            host, port = parts.hostname, parts.port or 0
        except ValueError:
            host, port = None, 0
        if not host or parts.netloc != self.callback_host or "@" in parts.netloc:
            raise ValueError(f"callback_host must be a host, or host:port, got {self.callback_host!r}")
        return host, port


def _is_base(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        port = parts.port
    except ValueError:
        return False
    plain = url.isprintable() and " " not in url and not (parts.query or parts.fragment)
    return plain and parts.scheme in ("http", "https") and bool(host) and port != 0
