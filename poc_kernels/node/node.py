"""A node: one model, its users and its rounds, in one process."""

from __future__ import annotations

import logging
import time
from dataclasses import fields
from importlib import metadata
from typing import Any

from ..engines.transformers import openai_app
from ..engines.transformers.config import InferenceLimits
from ..engines.transformers.engine import TransformersEngine, dependence
from ..engines.transformers.inference import Inference
from ..engines.transformers.load import load_model, model_name
from ..protocol import EngineProver
from ..protocol.limits import SERVER_BOUNDS
from ..scheduling import Pacing, PriorityLanes, Turns
from ..service import routes
from ..service.device import TurnsDevice
from ..service.gate import Gate, GateRules, under
from ..service.receivers import is_loopback
from ..service.round_service import RoundService
from .settings import Settings

logger = logging.getLogger("poc_kernels")


class Node:
    """Everything of a node except the socket: `start` it, serve ``app``, `close` it.

    Args:
        settings: what the operator set.
        model, tokenizer: loaded already; by default those that the settings name are loaded.

    Raises:
        ValueError: the model cannot be loaded, cannot compute proofs, or a setting is out of range.
    """

    def __init__(self, settings: Settings, model: Any = None, tokenizer: Any = None) -> None:
        if model is None:
            model, tokenizer = load_model(settings.model, settings.device, settings.dtype)
        self.settings = settings
        lanes = self._lanes = PriorityLanes(model.device, validation_sms=settings.validation_sms)
        pacing = Pacing(
            share=settings.validation_share,
            max_wait_seconds=settings.validation_wait_seconds,
            paced=settings.paced(lanes.lowers_threads),
        )
        if lanes.device.type == "cpu" and not (pacing.paced or lanes.lowers_threads):
            logger.warning("validation_pacing is free, but threads have no priorities here: users are not protected")
        self.turns = Turns(pacing)
        # Before anything serves the model: the engine compares itself with it.
        self.engine = TransformersEngine(
            model, cuda_graphs=settings.cuda_graphs, slice_seconds=settings.slice_seconds, alone=self.turns.alone
        )
        lanes.wait_for_current_stream()  # the model and the engine were made there
        self._prover = EngineProver(self.engine, slice_seconds=settings.slice_seconds, bounds=SERVER_BOUNDS)
        limits = InferenceLimits(**{each.name: getattr(settings, each.name) for each in fields(InferenceLimits)})
        name = settings.served_name or model_name(settings.model)
        self.inference = Inference(model, tokenizer, name, self.turns, limits, settings.temperature, lanes)
        device = TurnsDevice(
            self.turns,
            lanes,
            self.inference.wait_idle,
            max_slices_in_flight=settings.slices_in_flight,
            low_priority=not pacing.paced,
        )
        self.service = RoundService(
            self._prover,
            device,
            settings,
            troubles=[self.inference.trouble],
            loopback=is_loopback(settings.host),
            models=[name, settings.model],
            engine=f"transformers {metadata.version('transformers')}",
        )
        self.api = openai_app.build(self.inference)
        self.api.include_router(routes.poc_router(self.service))
        self.api.include_router(routes.operation_router(self.service))
        routes.document_bodies(self.api)
        self.app = Gate(
            self.api,
            GateRules(is_user=under("/v1/")),
            settings,
            closed=self.service.refuses_users,
            refused=self.service.metrics.refused,
        )
        watch = self.service.metrics.watch
        watch("poc_inference_in_flight", "Users' requests being served", lambda: self.app.in_flight)
        watch("poc_inference_restarts", "Times that generation was rebuilt", lambda: self.inference.restarts)
        watch("poc_inference_batched", "1: continuous batching, 0: one at a time", lambda: self.inference.batched)

    def start(self) -> None:
        """Start inference, callbacks and the proof worker.

        Raises:
            ValueError: the bits of its rows depend on other rows, or it cannot be served with its own text: see
                `Inference.start`.
        """
        self._prover.compile_kernels()
        with self._lanes.validation():
            if (said := dependence(self.engine)) is not None:
                raise ValueError(said)
            self._prover.measure_slices()
        self.inference.start()
        self.service.start()
        logger.info(
            "node started",
            extra={
                "model": self.inference.name,
                "device": str(self.engine.device),
                "dtype": str(self.engine.dtype),
                "continuous_batching": self.inference.batched,
                "hidden_size": self.engine.hidden_size,
                "vocab_size": self.engine.vocab_size,
            },
        )

    def begin_shutdown(self) -> None:
        """Admit nothing more, end the round, and let requests in flight go on to their end."""
        self.service.begin_shutdown()

    def close(self) -> None:
        """End everything, in shutdown_seconds: proofs, inference, callbacks. Idempotent."""
        self.service.close(time.monotonic() + self.settings.shutdown_seconds, self._stop_inference)
        logger.info("node closed")

    def _stop_inference(self, timeout_seconds: float) -> None:
        self.turns.close()
        self.inference.stop(timeout_seconds)
