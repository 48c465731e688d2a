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
from .conform.plan import ENGINE_PREFIX, FORMS, MLNODE_PREFIX, Plan
from .kernels import native
from .node.settings import DTYPES, OPTIONS, SECRETS, Settings, described
from .service.settings import REQUIRED, from_variables


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
    """Return the name of the backend that serves a device, or None and why there is none."""
    try:
        return backends.select(device).name, None
    except (ValueError, RuntimeError) as error:
        return None, str(error)


def verify() -> int:
    """Print every backend's verdict on every device, and which one serves it.

    Returns:
        1 if a backend that is available gives a wrong answer or cannot be tried, or none serves a device, else 0.
    """
    logging.getLogger("poc_kernels").addHandler(logging.NullHandler())  # the table has what it would log
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
            try:
                reason = backends.unavailable(backend, device)
                wrong = [] if reason else backends.verdict(backend, device)
            except (ValueError, RuntimeError, MemoryError) as error:
                failed, text = True, f"NOT TRIED: {error}"
            else:
                text = "gives the known answers" + (", serves this device" if serving == backend.name else "")
                if reason:
                    text = f"not available: {reason}"
                elif wrong:
                    failed, text = True, f"FAILED, never used: {'; '.join(wrong)}"
            rows.append((backend.name, str(device), text))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, where, text in rows:
        print(f"{name:<{widths[0]}}  {where:<{widths[1]}}  {text}")
    return 1 if failed else 0


def _add_serve(commands: Any) -> None:
    variables = "; ".join(f"{name}: {text}" for name, _, text in map(described, SECRETS))
    parser = commands.add_parser(
        "serve",
        help="serve a language model, and prove its compute in rounds",
        epilog=f"Environment variables: {variables}.",
    )
    for each in OPTIONS:
        choices = each.limit and each.limit.choices
        taken: dict[str, Any] = {"action": "store_false" if each.default else "store_true"}
        if each.kind is not bool:
            metavar = {int: "N", float: "X"}.get(each.kind)
            taken = {"type": each.kind, "required": each.default is REQUIRED, "choices": choices, "metavar": metavar}
        limit = f"{each.limit.text}; " if each.limit and not choices else ""
        option, default, text = described(each)
        default = default if each.default is REQUIRED else f"default: {default}"
        parser.add_argument(
            option,
            dest=each.name,
            default=argparse.SUPPRESS,  # Settings has the defaults
            help=f"{text} ({limit}{default})",
            **taken,
        )


def _library(error: ModuleNotFoundError) -> str:
    return (error.name or str(error)).split(".")[0]


def serve(chosen: argparse.Namespace) -> int:
    """Serve a node until SIGTERM; return the exit status."""
    options = {name: value for name, value in vars(chosen).items() if name != "command"}
    try:
        from .node import logs
        from .node.server import serve as serve_node
    except ModuleNotFoundError as error:
        print(f"poc-kernels: serving needs {_library(error)}: pip install 'poc-kernels[serve]'", file=sys.stderr)
        return 1
    try:
        # Secrets alone come from the environment: where a service of Kubernetes is named poc-kernels, every container
        # has a POC_KERNELS_PORT, which is no number.
        secrets = from_variables(SECRETS, os.environ)
        settings = Settings(**options, **secrets)
        logs.configure(settings.log_level, settings.log_format)
        serve_node(settings)
    except (OSError, ValueError) as error:
        print(f"poc-kernels: {error}", file=sys.stderr)
        return 1
    return 0


def positive_int(text: str) -> int:
    """Parse an int that is at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


class _DefaultsHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="serve a model and play rounds on it, as a validator, users and cheats would",
        formatter_class=_DefaultsHelpFormatter,
    )
    parser.add_argument("--model", help="directory or hub id; a small model with random weights is built if not set")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", choices=DTYPES.choices, help="dtype of the weights; auto keeps the one they are stored in"
    )
    parser.add_argument("--report", type=Path, default=Path("report.html"), help="where the report is written")
    parser.add_argument(
        "--port", type=int, default=0, help="port of the server on the loopback address; 0 for a free one"
    )
    parser.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help="nonces per forward")
    parser.add_argument(
        "--seq-len", type=positive_int, default=64, metavar="N", help="positions of a nonce's inputs, at least 16"
    )
    parser.add_argument("--seconds", type=float, default=12.0, help="minimum number of seconds to compute fingerprints")


def demo(chosen: argparse.Namespace) -> int:
    """Play the demonstration; return the exit status."""
    try:
        from .demo.plan import Plan
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
        plan=Plan(generate_seconds=chosen.seconds, rows=chosen.batch_size, seq_len=chosen.seq_len),
    )


def _add_conform(commands: Any) -> None:
    parser = commands.add_parser(
        "conform",
        help="play the chain's node and a validator against an endpoint, and say whether it speaks the network's wire",
        epilog="The exit status is 0 if nothing failed. Without --token, POC_KERNELS_TOKEN is the token.",
    )
    prefixes = (ENGINE_PREFIX, MLNODE_PREFIX)
    parser.add_argument("--url", required=True, help="base of the endpoint, such as http://127.0.0.1:8000")
    parser.add_argument("--prefix", choices=prefixes, help="of an engine's routes (default), or of an MLNode's")
    parser.add_argument("--model", help="name of the served model (default: the first of /v1/models)")
    parser.add_argument("--proof", choices=tuple(FORMS), help=f"proof form (default: {Plan.proof})")
    k_dims = ", ".join(f"{form.k_dim} of {name}" for name, form in FORMS.items())
    for name, what in (
        ("--seq-len", f"positions of a nonce's inputs (default: {Plan.seq_len})"),
        ("--k-dim", f"numbers of an artifact (default: {k_dims})"),
        ("--batch-size", f"nonces per forward (default: {Plan.batch_size})"),
        ("--queue-limit", "nonces that the endpoint lets wait; its 429 is tried if set"),
    ):
        parser.add_argument(name, type=positive_int, metavar="N", help=what)
    parser.add_argument("--token", help="bearer token")
    parser.add_argument(
        "--callback-host",
        metavar="HOST[:PORT]",
        help="where the endpoint reaches this machine (default: the address from which it is called, any port)",
    )
    for name, what in (
        ("--timeout", f"seconds for an answer or a callback (default: {Plan.timeout_seconds:g})"),
        ("--max-seconds", f"seconds for everything (default: {Plan.max_seconds:g})"),
    ):
        parser.add_argument(name, type=float, metavar="X", help=what)
    parser.add_argument("--only", action="append", metavar="NAME", help="play this check; may be given repeatedly")
    parser.add_argument("--strict", action="store_true", help="count holes of published implementations as failures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")


def conform(chosen: argparse.Namespace) -> int:
    """Judge an endpoint; return the exit status."""
    try:
        from .conform.report import line
        from .conform.run import NAMES
        from .conform.run import conform as judge
    except ModuleNotFoundError as error:
        print(f"poc-kernels: conform needs {_library(error)}: pip install 'poc-kernels[service]'", file=sys.stderr)
        return 1
    names = ("url", "prefix", "model", "proof", "seq_len", "k_dim", "batch_size", "queue_limit", "callback_host")
    given = {name: getattr(chosen, name) for name in names}
    given |= {"timeout_seconds": chosen.timeout, "max_seconds": chosen.max_seconds}
    given["token"] = chosen.token or os.environ.get("POC_KERNELS_TOKEN") or None
    width = max(map(len, NAMES))
    try:
        plan = Plan(**{name: value for name, value in given.items() if value is not None})
        if chosen.json is not None:
            chosen.json.open("a").close()  # a file that cannot be written is known before all is played
        report = judge(plan, chosen.only or (), lambda result: print(line(result, width), flush=True))
        print(report.summary())
        if chosen.json is not None:
            chosen.json.write_text(report.to_json())
    except (OSError, ValueError) as error:
        print(f"poc-kernels: {error}", file=sys.stderr)
        return 1
    return 0 if report.conforms(strict=chosen.strict) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="poc-kernels",
        description="Proof of compute on served language models: a node, and the random projections of its rounds.",
    )
    parser.add_argument("--version", action="version", version=f"poc-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("verify", help="check every backend on every device against the known answers")
    _add_serve(commands)
    _add_demo(commands)
    _add_conform(commands)
    chosen = parser.parse_args(arguments)
    if chosen.command == "verify":
        return verify()
    if chosen.command == "serve":
        return serve(chosen)
    if chosen.command == "conform":
        return conform(chosen)
    return demo(chosen)


if __name__ == "__main__":
    sys.exit(main())
