"""Hidden states that stand in for a forward's: those of a prover that saves compute, and what it knows of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poc_kernels.protocol import EngineProver, PoCConfig
from poc_kernels.protocol.engine import Engine, LayerTransform, never
from poc_kernels.protocol.prover import Row
from poc_kernels.scheduling.slices import Pause

KEY = "prover"

Compute = Callable[[Engine, Tensor, LayerTransform], Tensor]
"""Makes hidden states [rows, positions, hidden_size] from a forward's inputs and what is done after each layer."""


def unchanged(layer: int, states: Tensor) -> Tensor:
    """Return the states as they are: the transform of a form that has none."""
    return states


def honest(engine: Engine, inputs: Tensor, after_layer: LayerTransform) -> Tensor:
    """Compute the forward."""
    return engine.forward(inputs, never, after_layer)


class Substitute:
    """An `Engine` whose hidden states `compute` makes, with what it has of another engine.

    A prover on it does all that its form does before and after the forward.

    Attributes:
        compute: makes the states of the next forwards.
        states: those of the latest.
    """

    def __init__(self, engine: Engine, compute: Compute = honest) -> None:
        self.engine, self.compute = engine, compute
        self.states = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def forward(self, inputs_embeds: Tensor, pause: Pause = never, after_layer: LayerTransform | None = None) -> Tensor:
        """Have the states made."""
        self.states = self.compute(self.engine, inputs_embeds, after_layer or unchanged).clone()
        return self.states


class Seen(NamedTuple):
    """What a prover had of some nonces: hidden states [nonces, positions, hidden_size], and the outcomes."""

    states: Tensor
    outcomes: list[Any]


class Subject:
    """A model whose proofs of one form are computed, in one shape and one block.

    Args:
        engine: of the model.
        config: the round.
    """

    def __init__(self, engine: Engine, config: PoCConfig) -> None:
        self.engine, self.config = engine, config
        self._substitute = Substitute(engine)
        self._prover = EngineProver(self._substitute)
        self._prover.check(config)

    def see(self, nonces: Sequence[int], compute: Compute = honest, positions: slice = slice(None)) -> Seen:
        """Compute proofs of nonces; keep the hidden states of these positions."""
        self._substitute.compute = compute
        states, outcomes = [], []
        for start in range(0, len(nonces), self.config.batch_size):
            rows = [Row(self.config.public_key, nonce) for nonce in nonces[start : start + self.config.batch_size]]
            outcomes += self._prover.prove(self.config, rows).values
            states.append(self._substitute.states[: len(rows), positions].clone())
        return Seen(torch.cat(states), outcomes)


class Known(NamedTuple):
    """What a prover knows of a model from the forwards of other nonces.

    Attributes:
        mean: hidden states' mean, float32 [positions, hidden_size].
        few: the mean of 8 nonces.
        spread: their variance at the last position, float32 [hidden_size].
        changes: what each layer adds in the mean, before its transform, float32 [layers, positions, hidden_size].
        states: of all of them, at the last position, [nonces, hidden_size].
    """

    mean: Tensor
    few: Tensor
    spread: Tensor
    changes: Tensor
    states: Tensor


def know(subject: Subject, nonces: Sequence[int]) -> Known:
    """Compute these nonces, a whole number of batches, and what they have in common."""
    layers, shape = subject.engine.layers, (subject.config.seq_len, subject.engine.hidden_size)
    changes = torch.zeros(layers, *shape, device=subject.engine.device)

    def watched(engine: Engine, inputs: Tensor, after_layer: LayerTransform) -> Tensor:
        before = inputs

        def watch(layer: int, states: Tensor) -> Tensor:
            nonlocal before
            changes[layer] += (states.float() - before.float()).sum(0)
            states = after_layer(layer, states)
            before = states.clone()
            return states

        return engine.forward(inputs, never, watch)

    if len(nonces) % subject.config.batch_size:
        raise ValueError(f"nonces must fill batches of {subject.config.batch_size}, got {len(nonces)}")
    states = subject.see(nonces, watched).states.float()
    last = states[:, -1]
    return Known(states.mean(0), states[:8].mean(0), last.var(0), changes / len(nonces), last)


class Carried:
    """Computes a forward; notes what a prover has that stops after some layers.

    It goes on with what is public or known: the mean change of each layer, its transform, and the final norm.

    Args:
        known: of the model.
        norm: the model's final norm.
        after: the numbers of layers that are computed; with 0 the inputs alone are carried.

    Attributes:
        states: by that number, hidden states of the latest forward, [rows, positions, hidden_size].
    """

    def __init__(self, known: Known, norm: Callable[[Tensor], Tensor], after: Collection[int]) -> None:
        self._known, self._norm, self._after = known, norm, after
        self.states: dict[int, list[Tensor]] = {number: [] for number in after}

    def __call__(self, engine: Engine, inputs: Tensor, after_layer: LayerTransform) -> Tensor:
        """Compute the forward."""
        reached = {0: inputs}

        def tap(layer: int, states: Tensor) -> Tensor:
            states = after_layer(layer, states)
            if layer + 1 in self._after:
                reached[layer + 1] = states.clone()
            return states

        result = engine.forward(inputs, never, tap)
        for number in self._after:
            states = reached[number]
            for layer in range(number, engine.layers):
                states = after_layer(layer, (states + self._known.changes[layer]).to(engine.dtype))
            self.states[number].append(self._norm(states))
        return result


def without_layers(known: Known, left_out: Collection[int]) -> Compute:
    """Compute a forward without some layers, in whose places are their mean changes, and their transforms."""

    def compute(engine: Engine, inputs: Tensor, after_layer: LayerTransform) -> Tensor:
        before = inputs

        def replace(layer: int, states: Tensor) -> Tensor:
            nonlocal before
            if layer in left_out:  # what the layer computed is not looked at
                states = (before + known.changes[layer]).to(engine.dtype)
            before = after_layer(layer, states).clone()
            return before

        return engine.forward(inputs, never, replace)

    return compute


def last_positions(count: int) -> Compute:
    """Compute a forward of the last positions alone."""

    def compute(engine: Engine, inputs: Tensor, after_layer: LayerTransform) -> Tensor:
        return engine.forward(inputs[:, -count:].contiguous(), never, after_layer)

    return compute


@torch.inference_mode()
def final_norm(model: Any) -> Callable[[Tensor], Tensor]:
    """Return the module of a model of transformers whose result are its last hidden states.

    Raises:
        ValueError: there is none.
    """
    results: list[tuple[Any, Any]] = []
    hooks = [
        module.register_forward_hook(lambda module, _, result: results.append((module, result)))
        for module in model.base_model.modules()
    ]
    try:
        width = model.get_input_embeddings().weight.shape[1]
        inputs = torch.ones(1, 2, width, device=model.device, dtype=model.dtype)
        last = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    for module, result in reversed(results):
        if isinstance(result, Tensor) and torch.equal(result, last):
            return module
    raise ValueError(f"model must end with a norm of its hidden states, {type(model).__name__} has none")
