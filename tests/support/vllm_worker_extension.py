"""What gives the workers of a real vLLM the RPC method of proofs without our plugin: its ``worker_extension_cls``."""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """A base that vLLM adds to its class of workers."""

    def poc_kernels_call(self, command: str, payload: dict[str, Any]) -> dict[str, Any]:
        from poc_kernels.engines.vllm import session

        return session.call(self, command, payload)
