"""A node: one model, its users and its rounds, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import math
import signal
import socket
import threading
import time
from typing import Any

import torch
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import backends
from ..engines.transformers.config import InferenceLimits
from ..engines.transformers.engine import TransformersEngine
from ..engines.transformers.inference import Inference
from ..protocol import PoCConfig, PoCManager, PoCState, inputs
from ..scheduling import Pacing, PriorityLanes, Turns
from ..service import routes
from ..service.callbacks import CallbackSender
from ..service.gate import Gate
from ..service.metrics import Metrics
from ..service.worker import ProofWorker
from .settings import TOKEN_VARIABLE, Settings

logger = logging.getLogger("poc_kernels")

_LEAST_SECONDS = 1.0
"""What each part of a node is given to end, however little is left until the deadline."""

_KEEP_ALIVE_SECONDS = 75
"""How long an idle connection is kept: longer than clients keep theirs, or a request meets a connection that closes."""


def load_model(settings: Settings) -> tuple[Any, Any]:
    """The model, in eval mode on its device, and its tokenizer.

    Raises:
        OSError, ValueError: what transformers raises where there is no such model, or no such device or dtype.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an AssertionError of a torch without CUDA
        raise ValueError(f"device must be one that torch has here, got {device!r}: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model must be a directory, or an id on the Hugging Face hub, of a model with a tokenizer, "
            f"got {settings.model!r}: {error}"
        ) from error
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype)
    return model.to(torch.device(device)).eval(), tokenizer


class Node:
    """Everything of a node but the socket: `start` it, serve ``app``, `close` it.

    Args:
        settings: what the operator set.
        model, tokenizer: loaded already; by default those that the settings name are loaded.

    Raises:
        ValueError: the model cannot compute proofs, or a setting is out of range.
    """

    def __init__(self, settings: Settings, model: Any = None, tokenizer: Any = None) -> None:
        if model is None:
            model, tokenizer = load_model(settings)
        self.settings = settings
        self.streams = PriorityLanes(model.device, validation_sms=settings.validation_sms)
        self.pacing = Pacing(
            share=settings.validation_share,
            max_wait_seconds=settings.validation_wait_seconds,
            paced=settings.paced(self.streams.lowers_threads),
        )
        if self.streams.device.type == "cpu" and not (self.pacing.paced or self.streams.lowers_threads):
            logger.warning("validation_pacing is free, but threads have no priorities here: users are not protected")
        self.turns = Turns(self.pacing)
        # Before anything serves the model: the engine compares itself with it.
        self.engine = TransformersEngine(
            model,
            cuda_graphs=settings.cuda_graphs,
            slice_seconds=settings.slice_seconds,
            alone=self.turns.alone,
        )
        self.streams.wait_for_current_stream()  # the model and the engine were made there
        self.metrics = Metrics()
        self.manager = PoCManager(self.engine, self.metrics.batch, slice_seconds=settings.slice_seconds)
        limits = InferenceLimits(
            max_new_tokens=settings.max_new_tokens,
            cb_block_size=settings.kv_block_size,
            cb_num_blocks=settings.kv_blocks,
            cb_max_batch_tokens=settings.max_batch_tokens,
            cb_max_memory_percent=settings.kv_memory,
            stall_seconds=settings.stall_seconds,
        )
        name = settings.served_name or settings.model
        self.inference = Inference(model, tokenizer, name, self.turns, limits, settings.temperature, self.streams)
        key = None if settings.callback_key is None else settings.callback_key.encode()
        self.callbacks = CallbackSender(key=key, max_nonces=settings.callback_nonces, observer=self.metrics)
        api = self.inference.build_app()
        self.gate = Gate(
            api,
            closed=self._closed_to_users,
            refused=self.metrics.refused,
            max_in_flight=settings.max_in_flight,
            max_body_bytes=settings.max_body_bytes,
            max_pow_body_bytes=settings.max_pow_body_bytes,
            body_seconds=settings.body_seconds,
            token=settings.token,
        )
        self.worker = ProofWorker(
            self.manager,
            self.turns,
            self.streams,
            self.callbacks,
            self.metrics,
            drain=self.inference.wait_idle,
            drain_seconds=settings.drain_seconds,
            max_queued_nonces=settings.max_queued_nonces,
            result_seconds=settings.result_seconds,
            stall_seconds=settings.stall_seconds,
            max_slices_in_flight=settings.slices_in_flight,
            low_priority=not self.pacing.paced,
        )
        api.include_router(routes.poc_router(self))
        api.include_router(routes.operation_router(self))
        routes.handle_invalid_bodies(api)
        self.api = api
        self._watch()
        self._stopping = threading.Event()

    @property
    def app(self) -> Gate:
        """The ASGI application."""
        return self.gate

    def _watch(self) -> None:
        watch = self.metrics.watch
        watch("poc_inference_in_flight", "Users' requests being served", lambda: self.gate.in_flight)
        watch("poc_inference_restarts", "Times that continuous batching was rebuilt", lambda: self.inference.restarts)
        watch("poc_validation_queue_nonces", "Nonces waiting to be validated", lambda: self.worker.queued_nonces)
        watch("poc_validation_queue_batches", "Batches waiting to be validated", lambda: self.worker.queue.batches)
        watch("poc_callback_queue_batches", "Batches waiting to be delivered", self.callbacks.pending)
        watch("poc_callback_queue_nonces", "Nonces waiting to be delivered", self.callbacks.pending_nonces)

    @property
    def stopping(self) -> bool:
        """Whether the node shuts down: it admits nothing more."""
        return self._stopping.is_set()

    def _closed_to_users(self) -> tuple[str, str, int] | None:
        if self.stopping:
            return "shutting_down", "the server is shutting down", 1
        if self.manager.state == PoCState.GENERATING:
            message = "the node proves its compute now and serves again when the round's generating phase ends"
            return "generating", message, self.settings.retry_after_seconds
        return None

    def status(self) -> dict[str, Any]:
        """State and progress of the round, of the validation queue and of the callbacks."""
        config = self.manager.config
        return {
            **self.manager.status(),
            "config": None
            if config is None
            else {name: value for name, value in dataclasses.asdict(config).items() if name != "callback_url"},
            "queued_nonces": self.worker.queued_nonces,
            "validation": self._validation_status(),
            "callbacks": self.callbacks.status(),
        }

    def _validation_status(self) -> dict[str, Any]:
        slices = self.engine.slices
        return {
            **self.worker.queue.status(),
            "share": self.settings.validation_share,
            "pacing": "paced" if self.pacing.paced else "free",
            "slices": None
            if slices is None
            else {"count": len(slices.seconds), "longest_seconds": slices.longest_seconds},
        }

    def troubles(self) -> list[str]:
        """Why the node makes no progress: empty when it does."""
        if self.stopping:
            return ["the server is shutting down"]
        return [text for text in (self.inference.trouble(), self.worker.trouble()) if text is not None]

    def metrics_text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        self.metrics.state.state(self.manager.state.value)
        self.metrics.rate.set(self.manager.status()["rate_per_second"])
        return self.metrics.text()

    @torch.inference_mode()
    def _compile_kernels(self) -> None:
        """Have a GPU's kernels for rounds checked and compiled, which takes minutes where none is on disk.

        Those of the projection too: any round may ask for it, and by then the KV cache has taken the memory.
        """
        engine = self.engine
        if engine.device.type == "cuda":
            inputs.normal([0], 1, engine.device, engine.dtype)
            inputs.hash32([0], 0, 1, engine.device)
            backends.warmup(engine.device, engine.hidden_size, dtype=engine.dtype)

    @torch.inference_mode()
    def _measure_slices(self) -> None:
        """Measure and capture a GPU's forward of the usual shape of a round, before the KV cache takes the memory.

        A processor measures the first forwards of a round: one more could take minutes there.
        """
        engine = self.engine
        if engine.device.type == "cuda":
            length = min(PoCConfig.seq_len, engine.max_positions)
            with self.streams.validation():
                # Real inputs: zeros would be zeros in every layer, and the check of a captured graph would see nothing.
                seeds = list(range(PoCConfig.batch_size))
                x = inputs.normal(seeds, length * engine.hidden_size, engine.device, engine.dtype)
                engine.forward(x.view(len(seeds), length, engine.hidden_size))

    def start(self) -> None:
        """Start inference, callbacks and the proof worker."""
        self._compile_kernels()
        self._measure_slices()
        self.callbacks.start()
        self.inference.start()
        self.worker.start()
        logger.info(
            "node started",
            extra={
                "model": self.inference.name,
                "device": str(self.engine.device),
                "dtype": str(self.engine.dtype),
                "hidden_size": self.engine.hidden_size,
                "vocab_size": self.engine.vocab_size,
            },
        )

    def begin_shutdown(self) -> None:
        """Admit nothing more, end the round, and let requests in flight go on to their end."""
        self._stopping.set()
        self.manager.stop_round()
        self.worker.wake()

    def close(self) -> None:
        """End everything: proofs, inference, and callbacks, in shutdown_seconds for all three. Harmless twice."""
        self.begin_shutdown()
        deadline = time.monotonic() + self.settings.shutdown_seconds
        for end in (self.worker.close, self._stop_inference, self.callbacks.close):
            end(max(deadline - time.monotonic(), _LEAST_SECONDS))
        logger.info("node closed")

    def _stop_inference(self, timeout_seconds: float) -> None:
        self.turns.close()
        self.inference.stop(timeout_seconds)


class _Server(uvicorn.Server):
    """uvicorn, which on SIGTERM tells the node first, then waits for requests in flight up to its deadline.

    What is still in flight then ends in order, with an error, before uvicorn cuts its connection.
    """

    def __init__(self, node: Node) -> None:
        settings = node.settings
        config = uvicorn.Config(
            node.app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds + _LEAST_SECONDS),
        )
        super().__init__(config)
        self._node = node

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        host, port, *_ = self.servers[0].sockets[0].getsockname()  # uvicorn does not say it of sockets that it is given
        logger.info("listening", extra={"host": host, "port": port})

    async def shutdown(self, sockets: Any = None) -> None:
        self._node.begin_shutdown()
        ending = asyncio.create_task(self._end_inference())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_inference(self) -> None:
        await asyncio.sleep(self._node.settings.shutdown_seconds)
        await asyncio.to_thread(self._node.inference.stop, _LEAST_SECONDS)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        OSError, ValueError: the address cannot be had, the model cannot be loaded, or cannot compute proofs.
    """
    listener = _bound(settings)  # first: a model takes long to load
    node = Node(settings)
    server = _Server(node)

    def exit_soon(*_: Any) -> None:
        server.should_exit = True

    # While the node starts; and uvicorn raises the signal again once it has shut down: the process must live until the
    # node is closed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, exit_soon)
    with contextlib.closing(node):
        node.start()
        # What lives as long as the process is not looked through again: that would be a gap between users' tokens.
        gc.collect()
        gc.freeze()
        server.run([listener])


def _bound(settings: Settings) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on host {settings.host}, port {settings.port}: {error}") from error
    if settings.token is None and not listener.getsockname()[0].startswith(("127.", "::1")):
        logger.warning(
            "the PoC routes are open to whoever reaches this address: set a token",
            extra={"host": settings.host, "variable": TOKEN_VARIABLE},
        )
    return listener
