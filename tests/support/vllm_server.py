"""One `vllm serve` with rounds for all tests of a session, and how to start others: fixtures, for `pytest_plugins`."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from nodes import SETTINGS, Alone, posted, status
from served import NAME
from server_process import ServerProcess
from web import client, eventually

pytest_plugins = ["round_fixtures"]

READY_SECONDS = 300
MAX_LENGTH = 4096
TOLERANCE = 1e-5
CHOICE = ("--override-generation-config", json.dumps({"temperature": 0}), "--logits-processors", "slow_steps:SlowSteps")
SLOW = {"vllm_xargs": {"step_seconds": 0.01}}
"""Fields of a chat whose text comes as it is computed."""
ENVIRON = {
    "VLLM_PLUGINS": "poc_kernels",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "NO_PROXY": "*",
}


class VllmProcess(ServerProcess):
    """`vllm serve` of a model, in float32 and without a compiler, with rounds where VLLM_PLUGINS names them.

    Args:
        settings: of rounds, by their names.
        environ: further variables.
    """

    def __init__(
        self,
        model_dir: Path,
        *options: str,
        settings: dict[str, Any] | None = None,
        environ: dict[str, str] | None = None,
    ) -> None:
        serve = [str(Path(sys.executable).with_name("vllm")), "serve", str(model_dir), "--served-model-name", NAME]
        with socket.socket() as free:  # vLLM does not say which one it chose
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address = ["--host", "127.0.0.1", "--port", str(port)]
        small = ["--max-model-len", str(MAX_LENGTH), "--max-num-seqs", "8", "--dtype", "float32", "--enforce-eager"]
        ours = dict.fromkeys(name for name in os.environ if name.startswith("VLLM_"))  # of vLLM in this process
        told = {f"POC_KERNELS_{name.upper()}": str(value) for name, value in (settings or {}).items()}
        super().__init__(
            [*serve, *address, *small, *CHOICE, *options],
            model_dir,
            "Application startup complete",
            {**ours, **ENVIRON, **told, **(environ or {})},
            READY_SECONDS,
            port,
            [Path(__file__).parent / "vllm_site"],
        )

    def ended(self, within_seconds: float) -> int:
        """The exit status, once nothing of the process is left: Python's tracker of resources outlives it a little."""
        self.popen.wait(within_seconds)
        eventually(self._is_alone)
        return super().ended(within_seconds)

    def _is_alone(self) -> bool:
        try:
            os.killpg(self.popen.pid, 0)
        except ProcessLookupError:
            return True
        return False


class Near(float):
    """A distance that equals others up to what another engine's roundings change, and not one more."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(float(self) - float(other)) <= TOLERANCE

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = float.__hash__


class NearlyAlone(Alone):
    """Computes distances with transformers; that vLLM's own have the same bits however they come, is tested apart."""

    def distances(self, nonces: Iterable[int], **changes: Any) -> list[float]:
        return list(map(Near, super().distances(nonces, **changes)))


@pytest.fixture(scope="session")
def alone(model_dir: Path) -> Alone:
    return NearlyAlone(model_dir)


@pytest.fixture(scope="session")
def server(model_dir: Path) -> Iterator[VllmProcess]:
    server = VllmProcess(model_dir, settings=SETTINGS)
    try:
        server.url()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def idle_http(server: VllmProcess) -> Iterator[httpx2.Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        with client(server.url()) as http:
            yield http


def idle(http: httpx2.Client) -> bool:
    """Whether nothing waits to be validated, and no user is served."""
    return status(http)["queued_nonces"] == 0 and "poc_inference_in_flight 0.0" in http.get("/metrics").text


@pytest.fixture
def http(idle_http: httpx2.Client) -> Iterator[httpx2.Client]:
    yield idle_http
    posted(idle_http, "/stop")
    eventually(lambda: idle(idle_http))
