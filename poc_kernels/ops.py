"""The torch ops ``torch.ops.poc_kernels.*``, and a public function for each, which documents its arguments.

Every op is functional and gives a contiguous result, with the same bits on every device and for every batch, shard and
number of threads (``docs/definition.md``). The seed is a tensor, so that compiled code serves every seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import definition
from .backends import select
from .definition import DEFAULT_STD, Request

# ---- checks: each error names the argument, what it got and what it takes ----


def _check_seed(seed: Tensor) -> None:
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int64 tensor of one element, got dtype {seed.dtype}")
    if seed.numel() != 1:
        raise ValueError(f"seed must be an int64 tensor of one element, got shape {list(seed.shape)}")


def _check_domain(domain: int) -> None:
    if not 0 <= domain <= definition.MAX_DOMAIN:
        raise ValueError(f"domain must be in [0, 2**32), got {domain}")


def _check_range(start_name: str, start: int, count_name: str, count: int, limit: int) -> None:
    if start < 0:
        raise ValueError(f"{start_name} must be at least 0, got {start}")
    if count < 0:
        raise ValueError(f"{count_name} must be at least 0, got {count}")
    if start + count > limit:
        raise ValueError(f"{start_name} + {count_name} must be at most {limit}, got {start} + {count}")


def _checked_coefficient(x: Tensor, seed: Tensor, domain: int, std: float, activation_bits: int) -> float:
    if x.dtype not in definition.DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("x must have shape [..., K], got a tensor of no dimensions")
    if not 1 <= x.shape[-1] <= definition.MAX_FEATURES:
        raise ValueError(f"x must have 1 to {definition.MAX_FEATURES} features K, got shape {list(x.shape)}")
    _check_seed(seed)
    if seed.device != x.device:
        raise ValueError(f"seed must be on the device of x, {x.device}, got {seed.device}")
    _check_domain(domain)
    coefficient = definition.coefficient(std)
    definition.check_activation_bits(activation_bits)
    return coefficient


def _residual_request(
    x: Tensor,
    seed: Tensor,
    domain: int = 0,
    std: float = DEFAULT_STD,
    activation_bits: int = 16,
    row_mask: Tensor | None = None,
    column_start: int = 0,
    columns: int | None = None,
) -> Request:
    coefficient = _checked_coefficient(x, seed, domain, std, activation_bits)
    features = x.shape[-1]
    if row_mask is not None:
        if row_mask.dtype != torch.bool:
            raise TypeError(f"row_mask must be a bool tensor, got {row_mask.dtype}")
        if row_mask.shape != x.shape[:-1]:
            raise ValueError(
                f"row_mask must have a value for each row of x, shape {list(x.shape[:-1])}, got {list(row_mask.shape)}"
            )
        if row_mask.device != x.device:
            raise ValueError(f"row_mask must be on the device of x, {x.device}, got {row_mask.device}")
        if row_mask.dim() != 1:
            row_mask = row_mask.reshape(-1)
    if not 0 <= column_start < features:
        raise ValueError(f"column_start must be in [0, {features}), the features of x, got {column_start}")
    if columns is None:
        columns = features - column_start
    if not 1 <= columns <= features - column_start:
        raise ValueError(
            f"columns must be in [1, {features - column_start}], from column_start {column_start} to the "
            f"{features} features of x, got {columns}"
        )
    return Request(domain, coefficient, activation_bits, columns, True, column_start, row_mask)


def _random_request(
    x: Tensor,
    seed: Tensor,
    out_features: int,
    domain: int = 0,
    std: float = DEFAULT_STD,
    activation_bits: int = 16,
    column_start: int = 0,
) -> Request:
    coefficient = _checked_coefficient(x, seed, domain, std, activation_bits)
    if out_features < 1:
        raise ValueError(f"out_features must be at least 1, got {out_features}")
    _check_range("column_start", column_start, "out_features", out_features, definition.MAX_COLUMNS)
    return Request(domain, coefficient, activation_bits, out_features, False, column_start)


def _entries_shape(seed: Tensor, domain: int, k_start: int, k: int, n_start: int, n: int) -> tuple[int, int]:
    _check_seed(seed)
    _check_domain(domain)
    _check_range("k_start", k_start, "k", k, definition.MAX_FEATURES)
    _check_range("n_start", n_start, "n", n, definition.MAX_COLUMNS)
    return k, n


# ---- implementations, and fake ones that make the same checks ----

Op = Callable[..., Tensor]
_unsafe_view: Op = torch.ops.aten._unsafe_view.default


def _project(x: Tensor, seed: Tensor, request: Request) -> Tensor:
    if x.numel() == 0:
        return _fake_project(x, request)
    project = select(x.device).project
    if x.dim() == 2:
        return project(x, seed, request)
    y = project(x.reshape(-1, x.shape[-1]), seed, request)
    # Not a view: one that was made without gradients could not be changed in place with them, nor detached in place.
    return _unsafe_view(y, (*x.shape[:-1], request.columns))


def _fake_project(x: Tensor, request: Request) -> Tensor:
    return x.new_empty(*x.shape[:-1], request.columns)


def _projection_entries(seed: Tensor, domain: int, k_start: int, k: int, n_start: int, n: int) -> Tensor:
    shape = _entries_shape(seed, domain, k_start, k, n_start, n)
    if 0 in shape:
        return seed.new_empty(shape, dtype=torch.int16)
    return select(seed.device).entries(seed, domain, k_start, k, n_start, n)


def _fake_entries(seed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return seed.new_empty(_entries_shape(seed, *args, **kwargs), dtype=torch.int16)


def _projection_matrix(
    seed: Tensor,
    domain: int,
    k_start: int,
    k: int,
    n_start: int,
    n: int,
    std: float = DEFAULT_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    coefficient = definition.coefficient(std)
    if dtype not in definition.DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return _entries_op(seed, domain, k_start, k, n_start, n).to(torch.float32).mul_(coefficient).to(dtype)


# ---- registration ----


# What it registers lasts as long as it does.
_LIBRARY = torch.library.Library("poc_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]


def _register(name: str, schema: str, implementation: Op, fake: Op) -> Op:
    torch.library.define(f"poc_kernels::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"poc_kernels::{name}", "default", implementation)
    torch.library.register_fake(f"poc_kernels::{name}", fake)
    op: Op = getattr(torch.ops.poc_kernels, name).default
    return op


# The keys with which autograd is called for plain tensors on the CPU: nothing but the kernel is left below it.
_PLAIN_CPU = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.CPU) | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)
).raw_repr()


def _refuse_derivatives(name: str, op: Any, implementation: Op) -> None:
    """Register what an op does for autograd: it runs, and raises NotImplementedError where a derivative is computed.

    `torch.library.register_autograd` would drop the tangents of forward mode, and takes no transform of torch.func.
    """

    # Of a single level: each transform of torch.func around a call calls the op once.
    class Refusal(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(keys: Any, *arguments: Any) -> Any:
            # What torch's own functions for autograd do: the op below autograd, with the keys that are left.
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

        @staticmethod
        def setup_context(context: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> NoReturn:
            raise NotImplementedError(
                f"poc_kernels::{name} has no backward: a proof is a forward pass. Call it under torch.inference_mode() "
                "or torch.no_grad(), or detach its result"
            )

    def call(keys: Any, x: Tensor, *arguments: Any) -> Any:
        if forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                f"poc_kernels::{name} has no forward-mode derivative: a proof is a forward pass. Detach x"
            )
        if x.requires_grad and torch.is_grad_enabled():
            with enable_single_level_autograd_function():
                return Refusal.apply(keys, x, *arguments)  # type: ignore[attr-defined]
        if keys.raw_repr() == _PLAIN_CPU:
            return implementation(x, *arguments)  # what a redispatch would call as well, 4 us later
        return Refusal.forward(keys, x, *arguments)

    _LIBRARY.impl(name, call, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


def _register_product(name: str, schema: str, checked_request: Callable[..., Request]) -> Op:
    def implementation(x: Tensor, seed: Tensor, *args: Any) -> Tensor:
        return _project(x, seed, checked_request(x, seed, *args))

    def fake(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _fake_project(x, checked_request(x, *args, **kwargs))

    op = _register(name, schema, implementation, fake)
    _refuse_derivatives(name, op, implementation)
    return op


_residual_op = _register_product(
    "residual_projection",
    f"(Tensor x, Tensor seed, SymInt domain=0, float std={DEFAULT_STD}, int activation_bits=16, "
    "Tensor? row_mask=None, SymInt column_start=0, SymInt? columns=None) -> Tensor",
    _residual_request,
)
_random_op = _register_product(
    "random_projection",
    f"(Tensor x, Tensor seed, SymInt out_features, SymInt domain=0, float std={DEFAULT_STD}, int activation_bits=16, "
    "SymInt column_start=0) -> Tensor",
    _random_request,
)
_entries_op = _register(
    "projection_entries",
    "(Tensor seed, SymInt domain, SymInt k_start, SymInt k, SymInt n_start, SymInt n) -> Tensor",
    _projection_entries,
    _fake_entries,
)
_matrix_op = _register(
    "projection_matrix",
    f"(Tensor seed, SymInt domain, SymInt k_start, SymInt k, SymInt n_start, SymInt n, float std={DEFAULT_STD}, "
    "ScalarType dtype=float) -> Tensor",
    _projection_matrix,
    _projection_matrix,
)

# ---- public functions ----
# torch.ops itself answers a value of the wrong type with an error of torch's own; these name the argument.


def _check_types(**values: object) -> None:
    for name, value in values.items():
        if name in ("x", "seed"):
            definition.check_tensor(name, value)
        else:
            definition.check_int(name, value)


def residual_projection(
    x: Tensor,
    seed: Tensor,
    domain: int = 0,
    std: float = DEFAULT_STD,
    activation_bits: int = 16,
    row_mask: Tensor | None = None,
    column_start: int = 0,
    columns: int | None = None,
) -> Tensor:
    """Compute x + x @ P, with the K x K matrix P drawn from ``seed`` while the product runs and never stored.

    Args:
        x: [..., K] activations, float32, bfloat16 or float16, any strides, 1 <= K <= 65536.
        seed: the round's 64-bit seed, an int64 tensor of one element on the device of x (`seed_tensor`).
        domain: which projection of the round, in [0, 2**32): 0 before the model, 1 after it.
        std: standard deviation of the entries of P.
        activation_bits: rows are rounded to integers of 16 bits (relative error near 5e-5) or 8 (near 7e-3).
        row_mask: [...] bool; rows where it is false come back bit for bit as in x.
        column_start: first column of a shard of the result.
        columns: columns of the shard; all from column_start on unless given.

    Returns:
        [..., columns] in the dtype of x, contiguous. A row that holds a NaN or an infinity gives a row of NaN.

    Raises:
        TypeError: x, seed or row_mask is not a tensor or has another dtype; another argument has another type.
        ValueError: a shape, device or number is not as above.
        NotImplementedError: on backward.
    """
    _check_types(x=x, seed=seed, domain=domain, column_start=column_start)
    if row_mask is not None:
        definition.check_tensor("row_mask", row_mask)
    if columns is not None:
        definition.check_int("columns", columns)
    std = definition.as_std(std)
    definition.check_activation_bits(activation_bits)
    return _residual_op(x, seed, domain, std, activation_bits, row_mask, column_start, columns)


def random_projection(
    x: Tensor,
    seed: Tensor,
    out_features: int,
    domain: int = 0,
    std: float = DEFAULT_STD,
    activation_bits: int = 16,
    column_start: int = 0,
) -> Tensor:
    """Compute x @ P with ``out_features`` columns of P from ``column_start`` on.

    For instance an output head that nobody stores.

    Args:
        x, seed, domain, std, activation_bits: as for `residual_projection`.
        out_features: columns of the result, at least 1.
        column_start: first column of P; column_start + out_features is below 2**32.

    Returns:
        [..., out_features] in the dtype of x, contiguous. A row of zeros gives +0; a row that is not finite gives NaN.

    Raises:
        TypeError, ValueError, NotImplementedError: as for `residual_projection`.
    """
    _check_types(x=x, seed=seed, domain=domain, column_start=column_start, out_features=out_features)
    std = definition.as_std(std)
    definition.check_activation_bits(activation_bits)
    return _random_op(x, seed, out_features, domain, std, activation_bits, column_start)


def projection_entries(seed: Tensor, domain: int, k_start: int, k: int, n_start: int, n: int) -> Tensor:
    """Draw the odd integers e[k_start : k_start + k, n_start : n_start + n] of P, |e| <= 247.

    Args:
        seed: as for `residual_projection`; the result is on its device.
        domain: as for `residual_projection`.
        k_start, k: rows (input features), k_start + k <= 65536.
        n_start, n: columns (output features), n_start + n < 2**32.

    Returns:
        [k, n] int16.

    Raises:
        TypeError: seed is not an int64 tensor, or a number is not an int.
        ValueError: a number is not as above.
    """
    _check_types(seed=seed, domain=domain, k_start=k_start, k=k, n_start=n_start, n=n)
    return _entries_op(seed, domain, k_start, k, n_start, n)


def projection_matrix(
    seed: Tensor,
    domain: int,
    k_start: int,
    k: int,
    n_start: int,
    n: int,
    std: float = DEFAULT_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Make the same part of P in floating point, e * float32(std / sigma) rounded to ``dtype``: P stored, to compare.

    Args:
        seed, domain, k_start, k, n_start, n: as for `projection_entries`.
        std: standard deviation of the entries.
        dtype: float32, bfloat16 or float16.

    Returns:
        [k, n] in ``dtype``.

    Raises:
        TypeError, ValueError: as for `projection_entries`, and for std and dtype.
    """
    _check_types(seed=seed, domain=domain, k_start=k_start, k=k, n_start=n_start, n=n)
    std = definition.as_std(std)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    return _matrix_op(seed, domain, k_start, k, n_start, n, std, dtype)
