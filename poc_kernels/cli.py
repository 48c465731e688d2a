"""The ``poc-kernels`` command."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import torch

from . import __version__, backends, definition, demo
from .kernels import native


def _devices() -> list[torch.device]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return [torch.device("cpu")]
    indices = range(torch.accelerator.device_count())
    return [torch.device("cpu"), *(torch.device(accelerator.type, index) for index in indices)]


def _native_core() -> str:
    core = native.load()
    if core is None:
        return "not there"
    compiler = f"device code compiled by CUDA {core.CUDA_COMPILER}" if core.CUDA_COMPILER else "no device code"
    return f"threads of {core.team_runtime()}, {compiler}"


def _serving(device: torch.device) -> tuple[str | None, str | None]:
    """The backend that serves a device, or why there is none."""
    try:
        return backends.select(device).name, None
    except (ValueError, RuntimeError) as error:
        return None, str(error)


def verify() -> int:
    """Print every backend's verdict on every device, and which one serves it.

    Returns:
        1 if a backend that is available gives a wrong answer or none serves a device, else 0.
    """
    logging.getLogger("poc_kernels").addHandler(logging.NullHandler())  # the table says it
    print(f"poc_kernels {__version__}, definition {definition.DEFINITION}, torch {torch.__version__}")
    print(f"native core: {_native_core()}\n")
    rows = [("backend", "device", "verdict")]
    failed = False
    for device in _devices():
        serving, trouble = _serving(device)
        if trouble is not None:
            failed = True
            rows.append(("-", str(device), f"NOT SERVED: {trouble}"))
        for backend in backends.backends():
            reason = backend.unavailable(device)
            wrong = [] if reason else backends.verdict(backend, device)
            if reason:
                text = f"not available: {reason}"
            elif wrong:
                failed = True
                text = f"FAILED, never used: {'; '.join(wrong)}"
            else:
                text = "gives the known answers"
                text += ", serves this device" if serving == backend.name else ""
            rows.append((backend.name, str(device), text))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, where, text in rows:
        print(f"{name:<{widths[0]}}  {where:<{widths[1]}}  {text}")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(prog="poc-kernels", description="Random projection layers for proof of compute.")
    parser.add_argument("--version", action="version", version=f"poc-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("verify", help="check every backend on every device against the known answers")
    shown = commands.add_parser(
        "demo", help="project activations for a round, in every way, and compare bits and times"
    )
    shown.add_argument("--block-hash", default=demo.BLOCK_HASH, help="block hash of the round (default: %(default)s)")
    shown.add_argument("--dim", type=int, default=4096, help="hidden size (default: %(default)s)")
    shown.add_argument("--rows", type=int, default=32, help="rows of activations (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    if chosen.command == "verify":
        return verify()
    if not 1 <= chosen.dim <= demo.MAX_DIM:
        parser.error(f"--dim must be in [1, {demo.MAX_DIM}], where P stored still fits, got {chosen.dim}")
    if chosen.rows < 2:
        parser.error(f"--rows must be at least 2, got {chosen.rows}")
    if (trouble := _serving(torch.device("cpu"))[1]) is not None:
        print(f"poc-kernels: {trouble}", file=sys.stderr)
        return 1
    return demo.run(chosen.block_hash, chosen.dim, chosen.rows)
