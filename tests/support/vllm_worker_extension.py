"""What gives the workers of a real vLLM the RPC method of proofs without our plugin: its ``worker_extension_cls``."""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """A base that vLLM adds to its class of workers."""

    def poc_kernels_call(self, command: str, payload: dict[str, Any]) -> dict[str, Any]:
        from poc_kernels.engines.vllm import session

        return session.call(self, command, payload)

    def poc_kernels_fail_once(self, rank: int) -> None:
        """Have the next forward of proofs fail on one rank, with the others in the middle of it."""
        from poc_kernels.engines.vllm import session

        engine = getattr(self, session._ATTRIBUTE).engine
        layer = engine.twin.decoder_layers()[1]
        forward = layer.forward

        def fail_once(*arguments: Any, **named: Any) -> Any:
            layer.forward = forward
            raise MemoryError("on this rank alone")

        if self.rank == rank:  # type: ignore[attr-defined]
            layer.forward = fail_once
