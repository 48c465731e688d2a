"""`RandomProjection`: the projections of a round as a torch module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import definition, ops


class RandomProjection(nn.Module):
    """The projections x + x @ P of one round: `pre` before the model, `post` after it. Its state is an 8-byte seed.

    The seed is a tensor that is overwritten in place for the next round, so compiled code and captured graphs stay
    valid, and it moves with ``.to(device)``. It is a round's, not the model's: checkpoints leave it out, and it keeps
    its value where memory alone is given to a module (`to_empty`). On the meta device it lies on the CPU. There are no
    parameters and no buffers.

    Args:
        block_seed: the round's seed, an int of 64 bits (`seed_from_block_hash`).
        dim: hidden size of the model, 1 to 65536.
        std: standard deviation of the entries of P.
        activation_bits: 16 or 8, as for `residual_projection`.
        device: where the seed lies: that of the activations.

    Raises:
        TypeError: block_seed, dim or activation_bits is not an int, or std not a number.
        ValueError: a number outside its range.
    """

    seed: Tensor

    def __init__(
        self,
        block_seed: int,
        dim: int,
        std: float = definition.DEFAULT_STD,
        *,
        activation_bits: int = 16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        dim = definition.check_int("dim", dim)
        if not 1 <= dim <= definition.MAX_FEATURES:
            raise ValueError(f"dim must be in [1, {definition.MAX_FEATURES}], got {dim}")
        definition.check_activation_bits(activation_bits)
        definition.coefficient(std)
        self.dim = dim
        self.std = float(std)
        self.activation_bits = int(activation_bits)
        # Made outside inference mode, or it could not be overwritten outside it.
        with torch.inference_mode(False):
            self.seed = definition.seed_tensor(block_seed, device)
            if self.seed.is_meta:
                self.seed = definition.seed_tensor(block_seed, "cpu")

    @classmethod
    def from_block_hash(
        cls,
        block_hash: str,
        dim: int,
        std: float = definition.DEFAULT_STD,
        *,
        activation_bits: int = 16,
        device: torch.device | str | None = None,
    ) -> RandomProjection:
        """Make the projections of the round of ``block_hash``."""
        seed = definition.seed_from_block_hash(block_hash)
        return cls(seed, dim, std, activation_bits=activation_bits, device=device)

    def set_seed(self, block_seed: int) -> None:
        """Change to another round, in place. Nothing waits: the seed is written on the current stream."""
        with torch.no_grad():
            self.seed.fill_(definition.signed_seed(block_seed))

    def set_block_hash(self, block_hash: str) -> None:
        """Change to the round of ``block_hash``, in place."""
        self.set_seed(definition.seed_from_block_hash(block_hash))

    def forward(self, x: Tensor, domain: int, row_mask: Tensor | None = None) -> Tensor:
        """Compute x + x @ P of ``domain`` for x [..., dim]; see `residual_projection`."""
        definition.check_tensor("x", x)
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"x must have shape [..., {self.dim}], got {list(x.shape)}")
        seed = self.seed.to(x.device) if x.is_meta else self.seed
        return ops.residual_projection(
            x, seed, domain=domain, std=self.std, activation_bits=self.activation_bits, row_mask=row_mask
        )

    def pre(self, x: Tensor, row_mask: Tensor | None = None) -> Tensor:
        """Project before the model (domain 0): input embeddings [..., dim]."""
        result: Tensor = self(x, definition.DOMAIN_PRE, row_mask)
        return result

    def post(self, x: Tensor, row_mask: Tensor | None = None) -> Tensor:
        """Project after the model (domain 1): hidden states [..., dim]."""
        result: Tensor = self(x, definition.DOMAIN_POST, row_mask)
        return result

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> RandomProjection:
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        moved = function(self.seed)
        if not moved.is_meta:
            with torch.inference_mode(False):
                self.seed = self.seed.to(moved.device)  # whatever becomes of the dtype and, in `to_empty`, of the value
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of another module, as copies and loaded modules do."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.seed.is_inference():
            with torch.inference_mode(False):
                self.seed = self.seed.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        seed = state_dict.pop(f"{prefix}seed", None)  # older checkpoints have it
        if seed is not None:
            if seed.dtype != torch.int64:
                raise TypeError(f"{prefix}seed must be an int64 tensor, got {seed.dtype}")
            self.set_seed(int(seed))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return what torch prints of the module."""
        return f"dim={self.dim}, std={self.std}, activation_bits={self.activation_bits}"
