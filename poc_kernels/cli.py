"""The ``poc-kernels`` command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends, definition
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
        1 if a backend that is available gives a wrong answer or cannot be tried, or none serves a device, else 0.
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
            reason, wrong, untried = None, [], None
            try:
                reason = backends.unavailable(backend, device)
                wrong = [] if reason else backends.verdict(backend, device)
            except (ValueError, RuntimeError, MemoryError) as error:
                untried = str(error)
            if untried is not None:
                failed = True
                text = f"NOT TRIED: {untried}"
            elif reason:
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


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a language model, and prove its compute in rounds",
        epilog="POC_KERNELS_TOKEN: bearer token that the PoC routes then ask for. "
        "POC_KERNELS_CALLBACK_KEY: key that callbacks are signed under.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="directory, or id on the Hugging Face hub, of a causal language model")
    add("--served-name", help="what clients call the model, if not that")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="auto: the weights'")
    add("--random-projection", action="store_true", help="projections before and after the model in rounds")
    add(
        "--no-cuda-graphs",
        dest="cuda_graphs",
        action="store_false",
        default=argparse.SUPPRESS,  # of Settings
        help="do not capture the proof forward",
    )
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port to listen on")
    add("--temperature", type=float, help="of sampling, 0 for greedy; the model's generation configuration if not set")
    add("--max-new-tokens", type=int, default=1024, help="most tokens of one answer")
    add("--kv-blocks", type=int, help="blocks of the KV cache")
    add("--kv-block-size", type=int, help="tokens of a block")
    add("--max-batch-tokens", type=int, help="most tokens of one step of inference")
    add("--kv-memory", type=float, help="share of the free memory for the KV cache")
    add("--max-in-flight", type=int, default=256, help="most requests under /v1 at once")
    add("--max-body-bytes", type=int, default=2**20, help="largest body under /v1")
    add("--max-pow-body-bytes", type=int, default=2**23, help="largest body under /api/v1/pow")
    add("--body-seconds", type=float, default=30.0, help="a client's time to send its body")
    add("--max-queued-nonces", type=int, default=100_000, help="most nonces waiting to be validated")
    add("--result-seconds", type=float, default=3600.0, help="how long verdicts are kept for those who ask later")
    add("--max-proof-tokens", type=int, default=65536, help="most batch_size * seq_len of a round")
    add(
        "--validation-pacing",
        choices=["auto", "paced", "free"],
        default="auto",
        help="while users are served, slices of validation wait for their share, or run beside on priorities alone",
    )
    add("--validation-share", type=float, default=0.1, help="share of the device that validation is sure of")
    add("--validation-wait-seconds", type=float, default=1.0, help="longest that a slice of validation is held back")
    add("--slice-seconds", type=float, default=0.002, help="longest that a slice of validation should take")
    add("--slices-in-flight", type=int, default=2, help="slices that a GPU is given before the first is done")
    add("--validation-sms", type=int, help="keep validation to so many of a GPU's multiprocessors")
    add("--drain-seconds", type=float, default=5.0, help="requests in flight go on so long when GENERATING begins")
    add("--retry-after-seconds", type=int, default=10, help="Retry-After of 503 while GENERATING")
    add("--stall-seconds", type=float, default=120.0, help="without progress for so long, /health turns 503")
    add("--shutdown-seconds", type=float, default=10.0, help="how long SIGTERM waits for requests and callbacks")
    add("--callback-nonces", type=int, default=100_000, help="most nonces kept for receivers that do not answer")
    add("--log-level", default="info", choices=["debug", "info", "warning", "error"], help="least level logged")
    add("--log-format", default="json", choices=["json", "text"], help="JSON objects or plain lines")


def _library(error: ModuleNotFoundError) -> str:
    return (error.name or str(error)).split(".")[0]


def serve(chosen: argparse.Namespace) -> int:
    """Serve a node until SIGTERM; the exit status."""
    values = {key: value for key, value in vars(chosen).items() if key not in ("command", "log_level", "log_format")}
    try:
        from .node import logs
        from .node.node import serve as serve_node
        from .node.settings import CALLBACK_KEY_VARIABLE, TOKEN_VARIABLE, Settings
    except ModuleNotFoundError as error:
        print(f"poc-kernels: serving needs {_library(error)}: pip install 'poc-kernels[serve]'", file=sys.stderr)
        return 1
    logs.configure(chosen.log_level, chosen.log_format)
    try:
        settings = Settings(
            **values, token=os.environ.get(TOKEN_VARIABLE), callback_key=os.environ.get(CALLBACK_KEY_VARIABLE)
        )
        serve_node(settings)
    except (OSError, ValueError) as error:
        print(f"poc-kernels: {error}", file=sys.stderr)
        return 1
    return 0


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="serve a model and play a round on it as a validator and a user would",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", help="directory or hub id; a small model with random weights is built if not set")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help="auto: the weights'")
    parser.add_argument("--report", type=Path, default=Path("report.html"), help="where the report is written")
    parser.add_argument("--port", type=int, default=0, help="port of loopback for the server; 0 for a free one")
    parser.add_argument("--seconds", type=float, default=12.0, help="how long to look for nonces, at least")


def demo(chosen: argparse.Namespace) -> int:
    """Play the demonstration; the exit status."""
    try:
        from .demo.play import Plan
        from .demo.run import run
    except ModuleNotFoundError as error:
        print(f"poc-kernels: the demo needs {_library(error)}: pip install 'poc-kernels[demo]'", file=sys.stderr)
        return 1
    if (trouble := _serving(torch.device("cpu"))[1]) is not None:
        print(f"poc-kernels: {trouble}", file=sys.stderr)
        return 1
    return run(
        model=chosen.model,
        device=chosen.device,
        dtype=chosen.dtype,
        report=chosen.report,
        port=chosen.port,
        plan=Plan(generate_seconds=chosen.seconds),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(prog="poc-kernels", description="Random projection layers for proof of compute.")
    parser.add_argument("--version", action="version", version=f"poc-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("verify", help="check every backend on every device against the known answers")
    _add_serve(commands)
    _add_demo(commands)
    chosen = parser.parse_args(arguments)
    if chosen.command == "verify":
        return verify()
    if chosen.command == "serve":
        return serve(chosen)
    return demo(chosen)


if __name__ == "__main__":
    sys.exit(main())
