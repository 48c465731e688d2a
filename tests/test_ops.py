"""The public functions and torch.ops.poc_kernels: forms of a call, compilation, autograd, shapes."""

import inspect

import pytest
import torch
from helpers import DTYPES, assert_same_bits, expected, rows_of_every_kind
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from vectors import PRODUCTS, VECTORS, activations, options_of, product_id, sha256

import poc_kernels
from poc_kernels import (
    projection_entries,
    projection_matrix,
    random_projection,
    residual_projection,
    seed_tensor,
)

OPS = torch.ops.poc_kernels
SEED = seed_tensor(7)
X = rows_of_every_kind(6, 40, torch.float32, 1)
MASK = torch.tensor([True, False, True, True, False, True])

FINITE = torch.randn(6, 40, generator=torch.Generator().manual_seed(2))
OPCHECKS = [
    (OPS.residual_projection, (FINITE, SEED), {}),
    (OPS.residual_projection, (FINITE.bfloat16().reshape(2, 3, 40), SEED, 1, 0.5, 8), {}),
    (OPS.residual_projection, (FINITE.half(), SEED), {"row_mask": MASK, "column_start": 3, "columns": 7}),
    (OPS.residual_projection, (FINITE.t(), SEED), {}),
    (OPS.residual_projection, (FINITE[:0], SEED), {}),
    (OPS.residual_projection, (FINITE[0], SEED), {"column_start": 39}),
    (OPS.random_projection, (FINITE, SEED, 17), {}),
    (OPS.random_projection, (FINITE.bfloat16()[:, ::2], SEED, 1, 5), {"column_start": 2**31, "activation_bits": 8}),
    (OPS.random_projection, (FINITE[:0].reshape(3, 0, 40), SEED, 5), {}),
    (OPS.projection_entries, (SEED, 0, 3, 20, 5, 9), {}),
    (OPS.projection_entries, (SEED.reshape(1), 2**32 - 1, 0, 0, 0, 9), {}),
    (OPS.projection_matrix, (SEED, 1, 0, 4, 0, 5), {}),
    (OPS.projection_matrix, (SEED, 1, 0, 4, 0, 5), {"std": 2.0, "dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(("op", "arguments", "options"), OPCHECKS)
def test_opcheck(op, arguments, options):
    torch.library.opcheck(op, arguments, options)


@pytest.mark.parametrize(("op", "more"), [(OPS.residual_projection, ()), (OPS.random_projection, (5,))])
def test_opcheck_of_activations_with_gradients(op, more):
    """All but the last of its checks, which runs backward."""
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (FINITE.clone().requires_grad_(), SEED, *more), test_utils=utilities)


# ---- results -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", PRODUCTS, ids=product_id)
def test_products_of_the_vectors(item, device):
    kind, case = item
    x, options = activations(case).to(device), options_of(kind, case)
    seed = seed_tensor(options.pop("seed"), device)
    if options.pop("residual"):
        y = residual_projection(x, seed, **options)
    else:
        y = random_projection(x, seed, case["N"], **options)
    assert y.device.type == device.type
    assert sha256(y) == case["sha256"]
    if kind == "edge":
        mask = torch.tensor(case["mask"], dtype=torch.bool, device=device)
        assert sha256(residual_projection(x, seed, row_mask=mask, **options)) == case["masked_sha256"]
        shard = {"column_start": case["column_start"], "columns": case["columns"]}
        assert sha256(residual_projection(x, seed, **shard, **options)) == case["shard_sha256"]


@pytest.mark.parametrize("case", VECTORS["entries"], ids=lambda c: f"{c['seed']}-{c['domain']}-{c['k0']}-{c['n0']}")
def test_entries_of_the_vectors(case, device):
    seed = seed_tensor(int(case["seed"], 16), device)
    e = projection_entries(seed, case["domain"], case["k0"], case["K"], case["n0"], case["N"])
    assert e.device.type == device.type
    assert sha256(e) == case["sha256_int16_le"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40,), (1, 40), (6, 40), (2, 3, 40), (1, 2, 3, 40), (2, 1, 3, 1, 40)])
def test_any_leading_shape(shape, dtype):
    rows = torch.Size(shape[:-1]).numel()
    x = rows_of_every_kind(rows, 40, dtype, 2)
    mask = torch.arange(rows) % 2 == 0
    y = residual_projection(x.reshape(shape), SEED, row_mask=mask.reshape(shape[:-1]))
    assert y.shape == shape
    assert_same_bits(y.reshape(rows, 40), expected(x, row_mask=mask))
    y = random_projection(x.reshape(shape), SEED, 13)
    assert y.shape == (*shape[:-1], 13)
    assert_same_bits(y.reshape(rows, 13), expected(x, columns=13, residual=False))


@pytest.mark.parametrize("shape", [(0, 40), (3, 0, 40), (0, 0, 40)])
def test_an_empty_batch_gives_an_empty_result(shape):
    x = torch.zeros(shape, dtype=torch.bfloat16)
    mask = torch.zeros(shape[:-1], dtype=torch.bool)
    assert_same_bits(residual_projection(x, SEED, row_mask=mask), x)
    assert_same_bits(random_projection(x, SEED, 5), x[..., :5])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(2, 0, 1),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2, ::3],
        lambda x: x[:, :1].expand(-1, 7, -1),
        lambda x: x[..., 4:],
        lambda x: x.unfold(1, 3, 2),
        lambda x: torch.complex(x, x).conj().imag,
    ],
    ids=["permuted", "transposed", "sliced", "expanded", "offset", "overlapping", "negated"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_any_strides(view, masked):
    x = view(rows_of_every_kind(5 * 6, 24, torch.float32, 3).reshape(5, 6, 24))
    assert not x.is_contiguous() or x.is_neg()
    rows = x.clone(memory_format=torch.contiguous_format).reshape(-1, x.shape[-1])
    mask = torch.arange(len(rows)) % 3 != 0 if masked else None
    y = residual_projection(x, SEED, row_mask=None if mask is None else mask.reshape(x.shape[:-1]))
    assert y.is_contiguous()
    assert_same_bits(y.reshape(rows.shape), expected(rows, row_mask=mask))


def test_a_mask_may_be_expanded():
    mask = torch.tensor([True, False, True])[:, None].expand(3, 2)
    y = residual_projection(X.reshape(3, 2, 40), SEED, row_mask=mask)
    assert_same_bits(y.reshape(6, 40), expected(X, row_mask=mask.reshape(6)))


def test_the_result_is_never_x_itself():
    kept = X.clone()
    y = residual_projection(X, SEED, row_mask=torch.zeros(6, dtype=torch.bool))
    y.zero_()
    assert_same_bits(X, kept)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -(2**63), -1])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_seed_is_one_element_of_any_shape(seed, shape):
    tensor = torch.full(shape, seed)
    assert_same_bits(residual_projection(X, tensor), expected(X, seed=seed))
    assert (
        projection_entries(tensor, 0, 0, 1, 0, 1).item() == projection_entries(seed_tensor(seed), 0, 0, 1, 0, 1).item()
    )


@pytest.mark.parametrize("domain", [0, 1, 2, 2**31, 2**32 - 1])
def test_a_domain_is_any_32_bit_number(domain):
    assert_same_bits(residual_projection(X, SEED, domain=domain), expected(X, domain=domain))
    assert_same_bits(residual_projection(X, SEED, domain), expected(X, domain=domain))


@pytest.mark.parametrize("start", [0, 2**31, 2**32 - 1 - 17])
def test_columns_reach_up_to_the_limit(start):
    y = random_projection(X, SEED, 17, column_start=start)
    assert_same_bits(y, expected(X, column_start=start, columns=17, residual=False))


# ---- entries and matrices ------------------------------------------------------------------------------------------


def test_any_window_of_the_entries_equals_that_part_of_the_whole():
    whole = projection_entries(SEED, 3, 0, 100, 0, 90)
    for k_start, k, n_start, n in [
        (0, 100, 0, 90),
        (1, 1, 1, 1),
        (15, 2, 7, 20),
        (16, 16, 64, 26),
        (99, 1, 0, 90),
        (5, 0, 5, 0),
    ]:
        part = projection_entries(SEED, 3, k_start, k, n_start, n)
        assert_same_bits(part, whole[k_start : k_start + k, n_start : n_start + n])


def test_entries_reach_up_to_the_limits():
    e = projection_entries(SEED, 2**32 - 1, 65536 - 3, 3, 2**32 - 1 - 4, 4)
    wider = projection_entries(SEED, 2**32 - 1, 65536 - 33, 33, 2**32 - 1 - 37, 37)
    assert_same_bits(e, wider[-3:, -4:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [0.01, 1.0, 100.0])
def test_a_matrix_is_the_entries_times_the_coefficient(dtype, std):
    window = (1, 5, 40, 6, 30)
    e = projection_entries(SEED, *window)
    matrix = projection_matrix(SEED, *window, std=std, dtype=dtype)
    rounded = (e.double() * poc_kernels.definition.coefficient(std)).float()  # one rounding: the product is exact
    assert_same_bits(matrix, rounded.to(dtype))
    assert matrix.is_contiguous()


def test_the_product_of_integers_shows_the_entries():
    """Rows of the unit matrix times a power of two: every step is exact, so y is a column of P."""
    x = torch.eye(32)
    y = random_projection(x, SEED, 50, domain=4, std=poc_kernels.definition.SIGMA)
    assert y.tolist() == projection_entries(SEED, 4, 0, 32, 0, 50).tolist()


def test_an_empty_window_is_empty():
    assert projection_entries(SEED, 0, 65536, 0, 2**32 - 1, 0).shape == (0, 0)
    matrix = projection_matrix(SEED, 0, 0, 0, 0, 5, dtype=torch.bfloat16)
    assert (matrix.shape, matrix.dtype) == ((0, 5), torch.bfloat16)


# ---- forms of a call -----------------------------------------------------------------------------------------------


def test_ops_take_positional_and_keyword_arguments():
    y = expected(X, domain=1, std=0.5, activation_bits=8, row_mask=MASK, column_start=2, columns=9)
    assert_same_bits(OPS.residual_projection(X, SEED, 1, 0.5, 8, MASK, 2, 9), y)
    named = {"domain": 1, "std": 0.5, "activation_bits": 8, "row_mask": MASK, "column_start": 2, "columns": 9}
    assert_same_bits(OPS.residual_projection(x=X, seed=SEED, **named), y)
    assert_same_bits(residual_projection(x=X, seed=SEED, **named), y)
    y = expected(X, domain=1, std=0.5, activation_bits=8, column_start=2, columns=9, residual=False)
    assert_same_bits(OPS.random_projection(X, SEED, 9, 1, 0.5, 8, 2), y)
    named = {"out_features": 9, "domain": 1, "std": 0.5, "activation_bits": 8, "column_start": 2}
    assert_same_bits(OPS.random_projection(x=X, seed=SEED, **named), y)
    window = {"domain": 1, "k_start": 2, "k": 3, "n_start": 4, "n": 5}
    e = projection_entries(SEED, 1, 2, 3, 4, 5)
    assert_same_bits(OPS.projection_entries(seed=SEED, **window), e)
    assert_same_bits(OPS.projection_entries(SEED, 1, 2, 3, 4, 5), e)
    matrix = projection_matrix(SEED, 1, 2, 3, 4, 5, 0.5, torch.float16)
    assert_same_bits(OPS.projection_matrix(SEED, 1, 2, 3, 4, 5, 0.5, torch.float16), matrix)
    assert_same_bits(OPS.projection_matrix(seed=SEED, **window, std=0.5, dtype=torch.float16), matrix)


@pytest.mark.parametrize(
    "name", ["residual_projection", "random_projection", "projection_entries", "projection_matrix"]
)
def test_the_functions_have_the_arguments_and_defaults_of_the_schema(name):
    schema = getattr(OPS, name).default._schema
    parameters = inspect.signature(getattr(poc_kernels, name)).parameters
    assert [argument.name for argument in schema.arguments] == list(parameters)
    for argument in schema.arguments:
        default = parameters[argument.name].default
        if argument.name == "dtype":
            assert default is torch.float32
        else:
            assert default == (argument.default_value if argument.has_default_value() else inspect.Parameter.empty)


def test_defaults_are_those_of_the_definition():
    documented = {"domain": 0, "std": 0.01, "activation_bits": 16, "row_mask": None, "column_start": 0, "columns": None}
    parameters = inspect.signature(residual_projection).parameters
    assert {name: parameters[name].default for name in documented} == documented
    assert_same_bits(residual_projection(X, SEED), residual_projection(X, SEED, **documented))
    assert_same_bits(residual_projection(X, SEED), expected(X))
    assert_same_bits(
        projection_matrix(SEED, 0, 0, 3, 0, 3), projection_matrix(SEED, 0, 0, 3, 0, 3, 0.01, torch.float32)
    )


def test_the_last_columns_are_taken_unless_told_otherwise():
    assert_same_bits(residual_projection(X, SEED, column_start=33), residual_projection(X, SEED)[:, 33:])
    assert_same_bits(residual_projection(X, SEED, columns=33), residual_projection(X, SEED)[:, :33])


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_the_default_device_does_not_matter(default):
    with torch.device(default):
        assert_same_bits(residual_projection(X, SEED), expected(X))
        assert projection_entries(SEED, 0, 0, 3, 0, 3).device.type == "cpu"


# ---- autograd ------------------------------------------------------------------------------------------------------


PRODUCT_CALLS = [
    ("residual_projection", lambda x: residual_projection(x, SEED)),
    ("random_projection", lambda x: random_projection(x, SEED, 5)),
]


@pytest.mark.parametrize(("name", "call"), PRODUCT_CALLS)
def test_forward_runs_with_gradients_and_backward_is_refused(name, call):
    x = X.clone().requires_grad_()
    y = call(x)
    assert_same_bits(y, call(X))
    with pytest.raises(NotImplementedError, match=f"poc_kernels::{name} has no backward"):
        y.sum().backward()


def tangent_of(call):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(FINITE, FINITE))).tangent


BACKWARD = {
    "grad": lambda call: torch.func.grad(lambda x: call(x).sum())(FINITE),
    "vjp": lambda call: torch.func.vjp(call, FINITE)[1](call(FINITE)),
    "jacrev": lambda call: torch.func.jacrev(call)(FINITE),
    "hessian": lambda call: torch.func.hessian(lambda x: call(x).sum())(FINITE),
    "grad of vmap": lambda call: torch.func.grad(lambda x: torch.func.vmap(call)(x).sum())(FINITE),
    "vmap of grad": lambda call: torch.func.vmap(torch.func.grad(lambda x: call(x).sum()))(FINITE),
    "jacobian": lambda call: torch.autograd.functional.jacobian(call, FINITE),
}
FORWARD = {
    "dual numbers": tangent_of,
    "dual numbers without gradients": torch.no_grad()(tangent_of),
    "jvp": lambda call: torch.func.jvp(call, (FINITE,), (FINITE,)),
    "jacfwd": lambda call: torch.func.jacfwd(call)(FINITE),
    "linearize": lambda call: torch.func.linearize(call, FINITE)[1](FINITE),
    "jvp of vmap": lambda call: torch.func.jvp(torch.func.vmap(call), (FINITE,), (FINITE,)),
}


@pytest.mark.parametrize(("name", "call"), PRODUCT_CALLS)
@pytest.mark.parametrize("mode", [*BACKWARD, *FORWARD])
def test_every_kind_of_derivative_is_refused_in_the_ops_words(name, call, mode):
    kind = "backward" if mode in BACKWARD else "forward-mode derivative"
    with pytest.raises(NotImplementedError, match=f"poc_kernels::{name} has no {kind}: a proof is a forward pass"):
        {**BACKWARD, **FORWARD}[mode](call)


@pytest.mark.parametrize(("name", "call"), PRODUCT_CALLS)
def test_where_another_input_is_differentiated_the_ops_give_constants(name, call):
    y = call(FINITE)

    def through_something_else(x):
        return (call(FINITE) * x.sum() + call(x.detach())).sum()

    for derivative in (torch.func.grad(through_something_else), torch.func.jacfwd(through_something_else)):
        torch.testing.assert_close(derivative(FINITE), y.sum().expand_as(FINITE))
    with forward_ad.dual_level():
        assert_same_bits(call(FINITE), y)
    assert_same_bits(torch.func.vmap(call)(torch.stack([FINITE, FINITE]))[1], y)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_nothing_is_recorded_without_gradients(mode):
    with mode():
        y = residual_projection(X.clone().requires_grad_(), SEED)
    assert not y.requires_grad
    assert_same_bits(y, expected(X))


@pytest.mark.parametrize("shape", [(63,), (4, 63), (2, 3, 63), (0, 3, 63)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_result_is_no_view_and_may_be_changed_in_place(mode, shape):
    with mode():
        y = residual_projection(torch.ones(shape), SEED)
    assert not y._is_view()
    if mode is torch.inference_mode:
        return
    y.detach_()
    factor = torch.ones(63, requires_grad=True)
    y.mul_(factor).sum().backward()
    assert factor.grad is not None


class Seen(TorchDispatchMode):
    """Notes the ops of this package that come to a mode, which lies between autograd and the kernels."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "poc_kernels":
            self.ops.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "call"), PRODUCT_CALLS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_what_lies_below_autograd_sees_the_ops(name, call, requires_grad):
    x = FINITE.clone().requires_grad_(requires_grad)
    with Seen() as seen:
        y = call(x)
    assert seen.ops == [getattr(torch.ops.poc_kernels, name).default]
    assert_same_bits(y.detach(), call(FINITE))
