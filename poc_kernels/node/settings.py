"""What an operator sets."""

from __future__ import annotations

import math
from dataclasses import dataclass

TOKEN_VARIABLE = "POC_KERNELS_TOKEN"
CALLBACK_KEY_VARIABLE = "POC_KERNELS_CALLBACK_KEY"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a node; `poc-kernels serve --help` has the same names.

    Args:
        model: directory, or id on the Hugging Face hub, of a causal language model.
        served_name: what clients call it; the model's directory or id by default.
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:1".
        dtype: "auto" (that of the weights), "float32", "bfloat16" or "float16".
        random_projection: projections before and after the model in rounds that do not say.
        cuda_graphs: replay the proof forward from a captured graph on CUDA.
        temperature: of sampling, 0 for greedy; None for the model's generation configuration.
        max_new_tokens: most tokens of one answer.
        kv_blocks, kv_block_size, max_batch_tokens, kv_memory: size of the KV cache and of the steps of continuous
            batching (`InferenceLimits`); kv_memory is a share of the memory free at start.
        max_in_flight: most requests under /v1 at once; more get 429.
        max_body_bytes, max_pow_body_bytes: largest bodies under /v1 and /api/v1/pow; more get 413.
        body_seconds: a client's time to send its body; then 408.
        max_queued_nonces: most nonces waiting to be validated; more get 429.
        result_seconds: how long verdicts are kept for those who ask for them later.
        max_proof_tokens: most batch_size * seq_len of a round.
        validation_pacing: what slices of validation do while users' steps compute. "held": they wait, but for the share
            that they are sure of; "free": they run beside steps on the device's priorities alone, and a step waits for
            them only where they got less; "auto": free on a processor under Linux, else held.
        validation_share: share of the device, in (0, 1), that validation is sure of while users are served: more makes
            validation faster and users' tokens later.
        validation_wait_seconds: longest that a slice of validation is held back for users.
        slice_seconds: longest that a slice of validation should take.
        slices_in_flight: slices that a GPU is given before the first of them is done.
        validation_sms: keep validation to so many multiprocessors of a GPU; None for all.
        drain_seconds: how long requests in flight may go on after GENERATING begins, before they are paused.
        retry_after_seconds: Retry-After of 503 while GENERATING.
        stall_seconds: without progress for so long, /health turns 503.
        shutdown_seconds: how long SIGTERM waits for requests in flight, and for callbacks.
        callback_nonces: most nonces kept for receivers that do not answer; then the oldest callbacks are dropped.
        token: bearer token that the routes under /api/v1/pow then ask for.
        callback_key: key of the callbacks' signature.
    """

    model: str
    served_name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    random_projection: bool = False
    cuda_graphs: bool = True
    host: str = "127.0.0.1"
    port: int = 8000
    temperature: float | None = None
    max_new_tokens: int = 1024
    kv_blocks: int | None = None
    kv_block_size: int | None = None
    max_batch_tokens: int | None = None
    kv_memory: float | None = None
    max_in_flight: int = 256
    max_body_bytes: int = 2**20
    max_pow_body_bytes: int = 2**23
    body_seconds: float = 30.0
    max_queued_nonces: int = 100_000
    result_seconds: float = 3600.0
    max_proof_tokens: int = 65536
    validation_pacing: str = "auto"
    validation_share: float = 0.1
    validation_wait_seconds: float = 1.0
    slice_seconds: float = 0.002
    slices_in_flight: int = 2
    validation_sms: int | None = None
    drain_seconds: float = 5.0
    retry_after_seconds: int = 10
    stall_seconds: float = 120.0
    shutdown_seconds: float = 10.0
    callback_nonces: int = 100_000
    token: str | None = None
    callback_key: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype}")
        if self.validation_pacing not in ("auto", "paced", "free"):
            raise ValueError(f"validation_pacing must be auto, paced or free, got {self.validation_pacing}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be in [0, 65536), got {self.port}")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.kv_memory is not None and not 0 < self.kv_memory < 1:
            raise ValueError(f"kv_memory must be in (0, 1), got {self.kv_memory}")
        positive = (
            "max_new_tokens kv_blocks kv_block_size max_batch_tokens max_in_flight max_body_bytes max_pow_body_bytes "
            "body_seconds max_queued_nonces max_proof_tokens retry_after_seconds stall_seconds callback_nonces "
            "result_seconds slice_seconds slices_in_flight validation_sms"
        )
        for name in positive.split():
            number = getattr(self, name)
            if number is not None and not number > 0:
                raise ValueError(f"{name} must be positive, got {number}")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be in (0, 1), got {self.validation_share}")
        for name in ("drain_seconds", "shutdown_seconds", "validation_wait_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("token", "callback_key"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must not be empty; leave it out for none")

    def paced(self, lowers_threads: bool) -> bool:
        """`Pacing.paced` by validation_pacing, on a device with priorities of threads or not."""
        return self.validation_pacing == "paced" or (self.validation_pacing == "auto" and not lowers_threads)
