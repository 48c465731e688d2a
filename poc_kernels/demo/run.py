"""The demonstration from beginning to end: model, server, round, table, report."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import torch
import transformers
from transformers import AutoConfig

from .. import RandomProjection, __version__
from . import cheats, fingerprints, theory
from . import model as small_model
from . import report as html_report
from .client import Chatter, NodeClient
from .plan import BLOCK_HASH, Plan
from .play import Play
from .receiver import receiving
from .results import Claim, Results
from .server import SERVED_NAME, ServerFailedError, ServerProcess, serving
from .show import Show
from .stage import Stage

_READY_SECONDS = 120.0
_READY_SECONDS_GIVEN = 1800.0
"""The same for a model that was asked for, which may have to be downloaded first."""
_REFUSED_CALLBACKS = 2


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the block as Ctrl-C does, so that the server ends with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _prepared(model: str, device: str, dtype: str | None, plan: Plan, *, geometric: bool) -> Results:
    """Return results with what is known before the round."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    weights = getattr(torch, dtype) if dtype not in (None, "auto") else getattr(config, "dtype", None) or torch.float32
    r_target = theory.distance_at(plan.valid_share, config.vocab_size)
    return Results(
        about={
            "model": ("" if geometric else f"{model}: ")
            + f"{config.model_type}, hidden size {config.hidden_size}, {config.num_hidden_layers} layers, "
            f"vocabulary {config.vocab_size}",
            "round": f"forwards of {plan.rows} nonces with {plan.seq_len} positions, block {BLOCK_HASH}",
            "device": f"{device}, {str(weights).removeprefix('torch.')}",
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()}",
            "software": f"poc_kernels {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}",
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        },
        vocab_size=config.vocab_size,
        r_target=r_target,
        geometric=geometric,
        expected_share=theory.share_below(r_target, config.vocab_size),
        retained_bytes=RandomProjection(0, config.hidden_size).seed.nbytes,
        stored_bytes=2 * config.hidden_size**2 * weights.itemsize,
    )


def _claims(model: str, device: str, dtype: str | None, plan: Plan, results: Results) -> list[Claim]:
    """Return what will be claimed to be the node's first fingerprints, and set the threshold for this model."""
    nonces = range(plan.batch_nonces)
    prepared = cheats.prepare(model, device, dtype, fingerprints.config(plan), nonces)
    results.dist_threshold, results.noise = prepared.dist_threshold, prepared.noise
    return prepared.claims


def _play(server: ServerProcess, key: str, plan: Plan, claims: list[Claim], results: Results, show: Show) -> None:
    start = time.monotonic()

    def clock() -> float:
        return time.monotonic() - start

    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(receiving(key.encode(), clock, refuse=_REFUSED_CALLBACKS))
        node = stack.enter_context(contextlib.closing(NodeClient(server.url)))
        users = [
            stack.enter_context(contextlib.closing(Chatter(server.url, SERVED_NAME, clock, plan.max_tokens)))
            for _ in range(plan.users)
        ]
        Play(Stage(plan, server, node, receiver, users, results, show, clock), claims).play()


def run(
    *,
    model: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    report: Path = Path("report.html"),
    port: int = 0,
    plan: Plan | None = None,
    show: Show | None = None,
) -> int:
    """Play rounds against a real server, show what happens, and write the report.

    Args:
        model: directory or hub id of a causal language model; by default a small one is built in a temporary directory.
        device, dtype: as for `poc-kernels serve`.
        report: the HTML file to write.
        port: the server's port on loopback; 0 for a free one.
        plan: durations and amounts.
        show: shows what happens.

    Returns:
        The exit status: 0 if all checks passed, 1 if not, 130 after Ctrl-C.
    """
    plan, show = plan or Plan(), show or Show()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with _ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="poc-kernels-demo-") as scratch:
            directory = model
            if directory is None:
                directory = str(Path(scratch) / "model")
                small_model.build(Path(directory))
                show.say("Built a small Qwen3-like model with random weights: its text is noise, its compute is real.")
            results = _prepared(directory, device, dtype, plan, geometric=model is None)
            show.say(f"{results.about['model']}, on {results.about['device']}")
            show.say("Computing what cheats will claim ...")
            claims = _claims(directory, device, dtype, plan, results)
            torch.cuda.empty_cache()  # the server takes the memory
            show.say("Starting the server ...")
            key = secrets.token_hex(32)
            with serving(
                directory,
                device=device,
                dtype=dtype,
                port=port,
                callback_key=key,
                log=Path(scratch) / "server.log",
                ready_seconds=_READY_SECONDS if model is None else _READY_SECONDS_GIVEN,
                offline=model is None,
            ) as server:
                try:
                    _play(server, key, plan, claims, results, show)
                except httpx2.HTTPError as error:
                    raise ServerFailedError(f"{error}; the end of the server's log:\n{server.end_of_log()}") from error
    except KeyboardInterrupt:
        show.say("Interrupted; the server was stopped.")
        return 130
    except (ServerFailedError, OSError, ValueError) as error:
        show.say(f"The demonstration failed: {error}")
        return 1
    show.summary(results)
    html_report.write(report, results)
    show.say(f"Report: {report.resolve()}")
    return 0 if results.passed else 1
