"""The decoder layers of a model, found by what its forward calls, and a transform after each of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..protocol.engine import LayerTransform

_ROWS, _POSITIONS = 2, 5
"""Of the inputs that layers are found and tried with: different numbers, so that neither is taken for the other."""

_Run = Callable[[Tensor], Tensor]


class _RefusedError(Exception):
    """What a model's layers have not, as the end of a sentence."""


@dataclasses.dataclass
class _Call:
    """A call of a module, with copies, [tokens, hidden_size], of the hidden states that it was given and returned.

    Attributes:
        ended: how many modules had been called when it returned.
        returned: by their places in what it returned.
    """

    module: nn.Module
    given: list[Tensor]
    ended: int = 0
    returned: dict[int, Tensor] = dataclasses.field(default_factory=dict)


class DecoderLayers:
    """The decoder layers of a copy of a model that serves nobody.

    They are the list of modules that a forward calls once each, in its order. Each takes what the one before it
    returned, and whatever comes after the last takes what that returned. What a layer returns of the hidden states is
    one tensor, or two where the next norm adds them, in the dtype of input embeddings.

    They are tried: a transform that changes nothing leaves every bit, one that changes signs reaches the result from
    the first layer and from the last, and one that gives zeros after the last leaves nothing else to the result, such
    as a residual in another dtype. Where they are not found or the trial fails, forwards without a transform are as
    before, and all that needs the layers raises a ValueError that says why.

    Where several processes compute one model, each of them makes the same forwards for this.

    Args:
        model: the copy.
        run: computes its last hidden states from input embeddings, both [batch, seq_len, hidden_size].
        hidden_size, dtype, device: of input embeddings.
        count: number of layers by the model's configuration; None where it does not say.
    """

    def __init__(
        self,
        model: nn.Module,
        run: _Run,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        count: int | None,
    ) -> None:
        self._path = ""
        self._layers: list[nn.Module] = []
        self._places: frozenset[int] = frozenset()
        self._refusal: str | None = None
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_ROWS, _POSITIONS, hidden_size, generator=generator, device="cpu")
        signs = 1.0 - 2.0 * torch.randint(2, (hidden_size,), generator=generator, device="cpu")
        try:
            x, signs = x.to(device, dtype), signs.to(device, dtype)
            with torch.inference_mode():
                expected = self._find(model, run, x, count)
                self._try(run, x, signs, expected)
        except Exception as error:  # whatever it is, it is nothing to a forward without a transform
            reason = str(error) if isinstance(error, _RefusedError) else f"{type(error).__name__}: {error}"
            self._refusal = (
                "model must call its decoder layers one after the other, each with what the one before it returned, so "
                f"that this can be transformed; {type(model).__name__}: {reason}"
            )

    @property
    def count(self) -> int:
        """Number of layers.

        Raises:
            ValueError: they were not found, or a transform after them does not do what it has to.
        """
        if self._refusal is not None:
            raise ValueError(self._refusal)
        return len(self._layers)

    def move_to(self, model: nn.Module) -> None:
        """Take the layers of another copy, made since modules or weights of the served model were replaced."""
        if self._refusal is None:
            kinds = [type(layer) for layer in self._layers]
            self._layers = [*dict(model.named_modules()).get(self._path, nn.ModuleList()).children()]
            if [type(layer) for layer in self._layers] != kinds:
                self._refusal = f"model must keep its {len(kinds)} decoder layers in {self._path}, others are there now"

    @contextlib.contextmanager
    def transformed(self, after_layer: LayerTransform, shape: torch.Size) -> Iterator[None]:
        """Have a forward inside the block compute with ``after_layer``.

        Args:
            after_layer: gets the hidden states that layers return.
            shape: [batch, seq_len, hidden_size], in which it gets them, whatever shape they have in the model.

        Raises:
            ValueError: see `count`.
            RuntimeError: the forward did not call each layer once, in order.
        """
        count = self.count
        called: list[int] = []

        def change(layer: int, states: Tensor) -> Tensor:
            return after_layer(layer, states.view(shape)).view(states.shape)

        def after(layer: int, _: nn.Module, __: Any, returned: Any) -> Any:
            called.append(layer)
            if isinstance(returned, Tensor):
                return change(layer, returned)
            kind = type(returned)
            return kind(change(layer, part) if n in self._places else part for n, part in enumerate(returned))

        with contextlib.ExitStack() as undo:
            for number, layer in enumerate(self._layers):
                undo.callback(layer.register_forward_hook(functools.partial(after, number)).remove)
            yield
        if called != [*range(count)]:
            raise RuntimeError(f"a forward must call {count} decoder layers once each, in order, it called {called}")

    def _find(self, model: nn.Module, run: _Run, x: Tensor, count: int | None) -> Tensor:
        """Set which modules the layers are, from one forward; return its result."""
        calls, result = _calls(model, run, x)
        found = {path: made for path, made in _in_order(model, calls).items() if count in (None, len(made))}
        if len(found) != 1:
            which = "" if count is None else f"{count} (see its configuration) "
            raise _RefusedError(f"{len(found) or 'no'} lists of {which}modules are called so")
        ((self._path, layers),) = found.items()
        self._layers = [call.module for call in layers]
        after = calls[layers[-1].ended].given if layers[-1].ended < len(calls) else [_copy(result)]
        takers = [*(call.given for call in layers[1:]), after]
        places = [_handed_on(call, given) for call, given in zip(layers, takers, strict=True)]
        for number, handed_on in enumerate(places):
            if 0 not in handed_on or handed_on != places[0]:
                raise _RefusedError(f"what {self._path}.{number} returns is not what is taken after it")
        self._places = places[0]
        return result

    def _try(self, run: _Run, x: Tensor, signs: Tensor, expected: Tensor) -> None:
        """Raise `_RefusedError` if a transform does not do what it has to."""
        last = len(self._layers) - 1

        def with_transform(after_layer: LayerTransform) -> tuple[Tensor, bool]:
            given = x.clone()
            with self.transformed(after_layer, x.shape):
                return run(given).clone(), torch.equal(given, x)

        same, _ = with_transform(lambda layer, states: states)
        flipped, _ = with_transform(lambda layer, states: states * signs)
        in_place, kept = with_transform(lambda layer, states: states.mul_(signs))
        first_flipped, _ = with_transform(lambda layer, states: states * signs if layer == 0 else states)
        last_flipped, _ = with_transform(lambda layer, states: states * signs if layer == last else states)
        last_zero, _ = with_transform(lambda layer, states: torch.zeros_like(states) if layer == last else states)
        # Not before all of them are computed: other processes compute them too.
        if not torch.equal(same, expected):
            raise _RefusedError("results change with a transform that changes nothing")
        if not (kept and torch.equal(in_place, flipped)):
            raise _RefusedError("something else changes with what layers return")
        if torch.equal(first_flipped, expected) or torch.equal(last_flipped, expected):
            raise _RefusedError("results do not change with what its first and its last layer return")
        if not torch.equal(last_zero, last_zero[:1, :1].expand_as(last_zero)):
            raise _RefusedError("results depend on more than what a transform of the last layer's states is given")


def _calls(model: nn.Module, run: _Run, x: Tensor) -> tuple[list[_Call], Tensor]:
    """Record the calls of all modules in a forward, in their order; return them with its result."""
    calls: list[_Call] = []
    running: list[_Call] = []
    shapes = (x.shape, x.flatten(0, 1).shape)

    def states(values: Sequence[Any]) -> dict[int, Tensor]:
        """Copy what has the shape of hidden states."""
        tensors = {n: value for n, value in enumerate(values) if isinstance(value, Tensor)}
        alike = {n: tensor for n, tensor in tensors.items() if tensor.shape in shapes and tensor.dtype == x.dtype}
        return {n: _copy(tensor) for n, tensor in alike.items()}

    def before(module: nn.Module, arguments: Any, named: Any) -> None:
        running.append(_Call(module, [*states([*arguments, *named.values()]).values()]))
        calls.append(running[-1])

    def after(_: nn.Module, __: Any, returned: Any) -> None:
        call = running.pop()
        call.ended, call.returned = len(calls), states(returned if type(returned) in (list, tuple) else [returned])

    with contextlib.ExitStack() as undo:
        for module in model.modules():
            undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(after).remove)
        return calls, run(x.clone()).clone()


def _copy(states: Tensor) -> Tensor:
    """Copy states as [tokens, hidden_size], to where memory is not short."""
    return states.reshape(-1, states.shape[-1]).to("cpu", copy=True)


def _in_order(model: nn.Module, calls: Sequence[_Call]) -> dict[str, list[_Call]]:
    """Return, by its path, each outermost list whose modules were called once each, in its order."""
    found: dict[str, list[_Call]] = {}
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for path, modules in lists.items():
        if any(path.startswith(f"{other}.") for other in lists):
            continue
        ids = [id(module) for module in modules]
        once = frozenset(ids)
        of_list = [call for call in calls if id(call.module) in once]
        if len(once) == len(ids) > 0 and [id(call.module) for call in of_list] == ids:
            found[path] = of_list
    return found


def _handed_on(call: _Call, given: Sequence[Tensor]) -> frozenset[int]:
    """Return the places of what a call returned that the next one was given, or all if it was given their sum."""

    def is_given(states: Tensor) -> bool:
        return any(torch.equal(states, other) for other in given)

    places = frozenset(place for place, states in call.returned.items() if is_given(states))
    if not places and len(call.returned) > 1 and is_given(functools.reduce(torch.add, call.returned.values())):
        return frozenset(call.returned)
    return places
