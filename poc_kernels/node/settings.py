"""Settings of a node.

``python -m poc_kernels.node.settings`` prints README's table of them, and with ``limits`` that of docs/operating.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from ..service.settings import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    REQUIRED,
    Limit,
    ServiceSettings,
    Setting,
    one_of,
    setting,
    settings_of,
    variable,
)

TOKEN_VARIABLE = variable("token")
CALLBACK_KEY_VARIABLE = variable("callback_key")

DTYPES = one_of("auto", "float32", "bfloat16", "float16")
_PORT = Limit("in [0, 65536)", lambda value: 0 <= value < 65536)


@dataclass(frozen=True, kw_only=True)
class Settings(ServiceSettings):
    """Settings of a node: those of the round as a service, and those of its model, its address and its logs."""

    model: str = setting(REQUIRED, "directory, or id on the Hugging Face hub, of a causal language model")
    served_name: str | None = setting(None, "name that clients use for the model", unset="id or folder of --model")
    device: str = setting("auto", "auto (CUDA where there is one, else the CPU), cpu, cuda or cuda:N")
    dtype: str = setting("auto", "dtype of the weights; auto keeps the one they are stored in", DTYPES)
    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port to listen on; 0 for a free one", _PORT)
    max_connections: int = setting(2048, "maximum connections; one more ends one that waits for its client", POSITIVE)
    head_seconds: float = setting(30.0, "seconds that a client has to send the head of a request", POSITIVE)
    keep_alive_seconds: float = setting(75.0, "seconds that a connection is kept for its next request", POSITIVE)
    send_seconds: float = setting(60.0, "seconds without a byte taken until a connection is cut", POSITIVE)
    max_unread_bytes: int = setting(2**20, "maximum bytes of an answer that wait for a client; then it waits", POSITIVE)
    temperature: float | None = setting(
        None, "sampling temperature of requests that set none; 0: greedy", NOT_NEGATIVE, unset="the model's"
    )
    max_new_tokens: int = setting(1024, "maximum number of tokens per answer", POSITIVE)
    kv_blocks: int | None = setting(None, "number of blocks of the KV cache", POSITIVE, unset="automatic")
    kv_block_size: int | None = setting(None, "number of tokens per block of the KV cache", POSITIVE, unset="automatic")
    kv_memory: float | None = setting(None, "fraction of the free memory for the KV cache", FRACTION, unset="automatic")
    max_batch_tokens: int | None = setting(None, "maximum tokens per step of inference", POSITIVE, unset="automatic")
    slices_in_flight: int = setting(2, "slices that a GPU is given before the first of them is done", POSITIVE)
    validation_sms: int | None = setting(None, "number of SMs that validation is kept to", POSITIVE, unset="all")
    log_level: str = setting("info", "minimum level of what is logged", one_of("debug", "info", "warning", "error"))
    log_format: str = setting("json", "form of a log record: a JSON object or a plain line", one_of("json", "text"))

    max_log_records: int = setting(10_000, "maximum log records that wait to be written; more are dropped", POSITIVE)


_SERVICE = {each.name for each in settings_of(ServiceSettings)}
_ALL = sorted(settings_of(Settings), key=lambda each: each.name in _SERVICE)  # the node's own come first
OPTIONS = tuple(each for each in _ALL if not each.secret)
SECRETS = tuple(each for each in _ALL if each.secret)
_BOUNDS = re.compile(r"max_.*|(?!retry_).*_(seconds|nonces|bytes|urls|posts)")
LIMITS = tuple(each for each in OPTIONS if _BOUNDS.fullmatch(each.name))
"""Those that bound something: a number, a size or a time."""


def described(each: Setting) -> tuple[str, str, str]:
    """Give a setting's option (a secret's variable), its default and its help; a boolean's option reverses it."""
    if each.secret:
        return variable(each.name), each.shown_default, each.help
    option = each.name.replace("_", "-")
    if each.default is True:
        return f"--no-{option}", "off", f"do not {each.help}"
    return f"--{option}", each.shown_default, each.help


def table(settings: Iterable[Setting] = (*OPTIONS, *SECRETS)) -> str:
    """Format a table of settings; README's has all of them."""
    rows = [f"| `{name}` | {default} | {help} |" for name, default, help in map(described, settings)]
    return "\n".join(["| option of `serve`, or variable | default | |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":
    print(table(LIMITS) if sys.argv[1:] == ["limits"] else table())
