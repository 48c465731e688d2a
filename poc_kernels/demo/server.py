"""The real server, as a process of its own on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from ..node.settings import CALLBACK_KEY_VARIABLE

HOST = "127.0.0.1"
SERVED_NAME = "demo"
"""What clients call the model."""
_POLL_SECONDS = 0.2
_SHUTDOWN_SECONDS = 15.0
_LOG_LINES = 25


class ServerFailedError(RuntimeError):
    """Raised when the server ended, or was not ready in time; the message has the end of its log."""


def free_port() -> int:
    """Return a port of loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def with_this_package() -> dict[str, str]:
    """Return the variables of this process, by which another Python imports this very package wherever it runs."""
    search = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(search)}


@dataclass
class ServerProcess:
    """A started server: its process, the URL where it answers, and its log."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @classmethod
    def started(cls, command: Sequence[str], environment: Mapping[str, str], port: int, log: Path) -> ServerProcess:
        """Start a command that serves on a port of loopback; its output goes to ``log``, in whose folder it runs.

        It has a session of its own: Ctrl-C reaches only who started it, who then stops it properly.
        """
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                env=environment,
                start_new_session=True,
            )
        return cls(process, f"http://{HOST}:{port}", log)

    def end_of_log(self) -> str:
        """Return the last lines that the server wrote."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:])

    def check(self) -> None:
        """Raise a `ServerFailedError` if the process has ended."""
        if self.process.poll() is not None:
            raise ServerFailedError(
                f"the server ended with status {self.process.returncode}; the end of its log:\n{self.end_of_log()}"
            )

    def wait_ready(self, seconds: float) -> None:
        """Wait up to ``seconds`` until /health answers 200.

        Raises:
            ServerFailedError: the process ended, or the server was not ready in time.
        """
        deadline, said = time.monotonic() + seconds, "nothing"
        with httpx2.Client(base_url=self.url, timeout=5.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                self.check()
                try:
                    answer = client.get("/health")
                except httpx2.TransportError as error:
                    said = type(error).__name__
                else:
                    if answer.status_code == 200:
                        return
                    said = f"{answer.status_code} {answer.text[:200]}"
                time.sleep(_POLL_SECONDS)
        raise ServerFailedError(
            f"the server was not ready after {seconds:.0f} s, /health answered {said}; "
            f"the end of its log:\n{self.end_of_log()}"
        )

    def stop(self) -> None:
        """End the process by SIGTERM, and by SIGKILL if that takes too long."""
        self.process.terminate()
        try:
            self.process.wait(_SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def serving(
    model: str,
    *,
    device: str,
    dtype: str | None,
    port: int,
    callback_key: str,
    log: Path,
    ready_seconds: float,
    offline: bool,
) -> Iterator[ServerProcess]:
    """Serve ``model`` with the random projection until the block ends, however it ends.

    Args:
        model, device, dtype: as `poc-kernels serve` takes them; the server chooses the dtype if it is None.
        port: the port on loopback; 0 for a free one.
        callback_key: the key that callbacks are signed with.
        log: the file that the server's output goes to; the server runs in its folder.
        ready_seconds: how long the server may take to become ready.
        offline: whether to keep the server from the Hugging Face hub.

    Raises:
        ServerFailedError: the server did not become ready.
    """
    port = port or free_port()
    model = str(Path(model).resolve()) if Path(model).exists() else model
    command = [sys.executable, "-m", "poc_kernels.cli", "serve", "--model", model, "--device", device]
    command += ["--random-projection", "--host", HOST, "--port", str(port), "--served-name", SERVED_NAME]
    command += [] if dtype is None else ["--dtype", dtype]
    environment = {**with_this_package(), CALLBACK_KEY_VARIABLE: callback_key}
    environment["NO_PROXY"] = ",".join(filter(None, [HOST, os.environ.get("NO_PROXY")]))  # callbacks go to loopback
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    server = ServerProcess.started(command, environment, port, log)
    try:
        server.wait_ready(ready_seconds)
        yield server
    finally:
        server.stop()
