"""What nodes claim in place of a round's fingerprints, computed on the model by the very prover of honest nodes.

A cheat is an engine that computes less than it should, or with other weights. `EngineProver` makes fingerprints of what
it gives just as it does for an honest node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engines.transformers.engine import TransformersEngine
from ..engines.transformers.load import load_model
from ..protocol import Engine, EngineProver, PoCConfig, Row
from ..protocol.artifacts.encoding import decode, encode
from ..protocol.engine import LayerTransform, never
from ..protocol.fingerprint.form import FINGERPRINT
from ..scheduling.slices import Pause, Slices
from .plan import EARLIER_HASH, OTHER_KEY
from .results import Claim

COMPUTED_SHARE = 0.75
"""Share of the layers, and of the positions, that those compute who leave some of them out."""
_OTHERS_START = 1_500_000_000
"""First of the nonces that the threshold is set with, and from which cheats learn what layers do."""
_OTHERS = 32
_OVER_NOISE = 4.0
_EVERYTHING, _SENT_TWICE = "all of the compute", "all, as they are sent twice"
_GROUP = 64
"""Weights that share a scale when they are rounded."""


@dataclasses.dataclass(frozen=True)
class Claims:
    """What is claimed for the same nonces, by honest nodes and by cheats, and how far apart honest nodes are.

    Attributes:
        claims: each has a fingerprint per nonce.
        noise: distances of the fingerprints that two honest nodes with different arithmetic have of other nonces.
    """

    claims: list[Claim]
    noise: list[float]

    @property
    def dist_threshold(self) -> float:
        """The threshold for this model: above the noise of honest nodes, and at most the form's own."""
        return min(FINGERPRINT.stat_test.dist_threshold, _OVER_NOISE * float(np.quantile(self.noise, 0.99)))


def prepare(model_name: str, device: str, dtype: str | None, config: PoCConfig, nonces: Sequence[int]) -> Claims:
    """Load a model, and compute with it what is claimed for ``nonces`` of a round.

    Args:
        model_name, device: as `load_model`.
        dtype: of the weights; None as they are stored.
        config: of the round of fingerprints.
        nonces: of the node.

    Raises:
        OSError, ValueError: the model cannot be loaded, or cannot prove that round.
    """
    model, _ = load_model(model_name, device, dtype or "auto")
    engine = TransformersEngine(model, cuda_graphs=False)

    other_key = dataclasses.replace(config, public_key=OTHER_KEY)
    other_block = dataclasses.replace(config, block_hash=EARLIER_HASH)

    def claimed(engine: Engine, computed_for: PoCConfig = config) -> tuple[str | None, ...]:
        return fingerprints(engine, computed_for, nonces)

    others = range(_OTHERS_START, _OTHERS_START + _OTHERS)
    watching = Watching(engine)
    expected = fingerprints(watching, config, others)
    changes, layers = watching.mean_changes(), engine.layers
    computed = int(COMPUTED_SHARE * layers)
    claims = [
        Claim("made-up vectors", _EVERYTHING, _made_up(len(nonces))),
        Claim("guesses without a forward", _EVERYTHING, claimed(Guess(engine, 0, changes))),
        Claim("another key's fingerprints", _SENT_TWICE, claimed(engine, other_key)),
        Claim("another block's fingerprints", _SENT_TWICE, claimed(engine, other_block)),
        Claim(
            f"{layers - computed} of {layers} layers guessed",
            f"{1 - computed / layers:.0%} of the layers",
            claimed(Guess(engine, computed, changes)),
        ),
        Claim("last positions left out", f"{1 - COMPUTED_SHARE:.0%} of the positions", claimed(LeftOut(engine))),
    ]
    model.to(torch.bfloat16 if model.dtype == torch.float32 else torch.float32)
    engine = TransformersEngine(model, cuda_graphs=False)
    noise = distances(fingerprints(engine, config, others), expected)
    name = f"honest, in {str(model.dtype).removeprefix('torch.')}"
    claims.insert(0, Claim(name, "nothing", claimed(engine), honest=True))
    round_weights(model)
    rounded = claimed(TransformersEngine(model, cuda_graphs=False))
    claims.append(Claim("4-bit weights", "most of the weights' memory", rounded))
    return Claims(claims, noise)


def fingerprints(engine: Engine, config: PoCConfig, nonces: Sequence[int]) -> tuple[str | None, ...]:
    """Compute the fingerprints of nonces on an engine.

    Raises:
        ValueError: the engine cannot prove that round.
    """
    prover = EngineProver(engine)
    prover.check(config)
    rows = [Row(config.public_key, nonce) for nonce in nonces]
    forwards = (rows[start : start + config.batch_size] for start in range(0, len(rows), config.batch_size))
    return tuple(value for some in forwards for value in prover.prove(config, some).values)


def distances(some: Sequence[str | None], others: Sequence[str | None]) -> list[float]:
    """Return how far apart the fingerprints of each nonce are (L2); NaN where one is no vector of finite numbers."""
    (vectors, good), (expected, known) = decode(some, FINGERPRINT.k_dim), decode(others, FINGERPRINT.k_dim)
    apart = np.linalg.norm(vectors - expected, axis=1)
    return [float(value) for value in np.where(good & known, apart, np.nan)]


def _made_up(count: int) -> tuple[str, ...]:
    """Return random vectors of the length 1."""
    vectors = np.random.default_rng(0).standard_normal((count, FINGERPRINT.k_dim))
    return tuple(encode(vector.astype(np.float16)) for vector in vectors / np.linalg.norm(vectors, axis=1)[:, None])


class _Changed:
    """An `Engine` whose forward is that of another one, changed by what is derived from this class."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.hidden_size, self.vocab_size = engine.hidden_size, engine.vocab_size
        self.max_positions, self.model_type = engine.max_positions, engine.model_type
        self.dtype, self.device = engine.dtype, engine.device

    @property
    def slices(self) -> Slices | None:
        """The slices of the other engine's forward."""
        return self.engine.slices

    @property
    def layers(self) -> int:
        """The number of the other engine's decoder layers."""
        return self.engine.layers

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Compute the other engine's logits."""
        return self.engine.compute_logits(hidden_states)


def _unchanged(layer: int, states: Tensor) -> Tensor:
    return states


class Watching(_Changed):
    """Changes nothing, and notes what each layer adds to the states on average, at each position."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._rows = 0
        self._added: dict[int, Tensor] = {}

    def forward(self, inputs_embeds: Tensor, pause: Pause = never, after_layer: LayerTransform | None = None) -> Tensor:
        """Compute the other engine's forward, and note."""
        self._rows += len(inputs_embeds)
        self._before, self._then = inputs_embeds, after_layer or _unchanged
        return self.engine.forward(inputs_embeds, pause, self)

    def __call__(self, layer: int, states: Tensor) -> Tensor:
        """Note what a layer returned, and return what the model goes on with."""
        added = (states.float() - self._before.float()).sum(0)
        self._added[layer] = self._added.get(layer, 0) + added
        self._before = self._then(layer, states)
        return self._before

    def mean_changes(self) -> Tensor:
        """Return the mean over all rows so far, [layers, seq_len, hidden_size]."""
        return torch.stack([self._added[layer] for layer in range(self.layers)]) / self._rows


class Guess(_Changed):
    """Takes what layers add on average, of nonces that are not asked for, in place of what layers from one on compute.

    From layer 0 on, that needs no forward. Here it is put into one, in which the layers' own work comes to nothing.

    Args:
        engine: the other one.
        first: the first layer that is not computed.
        changes: what each layer adds, [layers, seq_len, hidden_size].
    """

    def __init__(self, engine: Engine, first: int, changes: Tensor) -> None:
        super().__init__(engine)
        self._first, self._changes = first, changes

    def forward(self, inputs_embeds: Tensor, pause: Pause = never, after_layer: LayerTransform | None = None) -> Tensor:
        """Compute the other engine's forward, with guesses in it."""
        self._states, self._then = inputs_embeds, after_layer or _unchanged
        return self.engine.forward(inputs_embeds, pause, self)

    def __call__(self, layer: int, states: Tensor) -> Tensor:
        """Return what the model goes on with after a layer."""
        if layer >= self._first:
            states = (self._states + self._changes[layer]).to(self.dtype)
        self._states = self._then(layer, states)
        return self._states


class LeftOut(_Changed):
    """Computes the first positions alone; at the others, states are 0, the mean that they have."""

    def forward(self, inputs_embeds: Tensor, pause: Pause = never, after_layer: LayerTransform | None = None) -> Tensor:
        """Compute the other engine's forward of the first positions."""
        computed = int(COMPUTED_SHARE * inputs_embeds.shape[1])
        states = torch.zeros_like(inputs_embeds)
        states[:, :computed] = self.engine.forward(inputs_embeds[:, :computed].contiguous(), pause, after_layer)
        return states


@torch.no_grad()
def round_weights(model: Any, bits: int = 4) -> None:
    """Round a model's matrices, except embeddings and head, to ``bits`` bits, with a scale for each 64 weights."""
    largest = 2 ** (bits - 1) - 1
    for weight in _matrices(model):
        groups = weight.float().reshape(-1, _GROUP if weight.shape[-1] % _GROUP == 0 else weight.shape[-1])
        scale = groups.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / largest
        weight.copy_((groups / scale).round().mul(scale).view(weight.shape))


def _matrices(model: Any) -> Iterator[Tensor]:
    kept = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return (weight for weight in model.parameters() if weight.dim() > 1 and id(weight) not in kept)
