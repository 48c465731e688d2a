"""Every error names the argument, what it got and what it takes: eager, in fake tensors, and on the meta device."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from poc_kernels import projection_entries, projection_matrix, random_projection, residual_projection

OPS = torch.ops.poc_kernels


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def seed(*shape, dtype=torch.int64, **options):
    return torch.zeros(shape, dtype=dtype, **options)


def mask(*shape, dtype=torch.bool):
    return torch.zeros(shape, dtype=dtype)


# What both products take: (error, message, positional arguments made when called, keyword arguments).
ACTIVATIONS = [
    (
        TypeError,
        "x must be float32, bfloat16 or float16, got torch.float64",
        lambda: (x(2, 8, dtype=torch.float64),),
        {},
    ),
    (TypeError, "x must be float32, bfloat16 or float16, got torch.int8", lambda: (x(2, 8, dtype=torch.int8),), {}),
    (ValueError, "x must have shape [..., K], got a tensor of no dimensions", lambda: (x(),), {}),
    (ValueError, "x must have 1 to 65536 features K, got shape [2, 0]", lambda: (x(2, 0),), {}),
    (ValueError, "x must have 1 to 65536 features K, got shape [0, 65537]", lambda: (x(0, 65537),), {}),
    (
        TypeError,
        "seed must be an int64 tensor of one element, got dtype torch.int32",
        lambda: (x(2, 8), seed(dtype=torch.int32)),
        {},
    ),
    (ValueError, "seed must be an int64 tensor of one element, got shape [2]", lambda: (x(2, 8), seed(2)), {}),
    (ValueError, "seed must be an int64 tensor of one element, got shape [0]", lambda: (x(2, 8), seed(0)), {}),
    (ValueError, "domain must be in [0, 2**32), got -1", lambda: (x(2, 8),), {"domain": -1}),
    (ValueError, "domain must be in [0, 2**32), got 4294967296", lambda: (x(2, 8),), {"domain": 2**32}),
    (ValueError, "finite and not zero, got 0.0", lambda: (x(2, 8),), {"std": 0.0}),
    (ValueError, "std must be positive with float32(std / 92.6917)", lambda: (x(2, 8),), {"std": -0.01}),
    (ValueError, "finite and not zero, got nan", lambda: (x(2, 8),), {"std": float("nan")}),
    (ValueError, "finite and not zero, got inf", lambda: (x(2, 8),), {"std": float("inf")}),
    (ValueError, "finite and not zero, got 1e-50", lambda: (x(2, 8),), {"std": 1e-50}),
    (ValueError, "activation_bits must be 16 or 8, got 12", lambda: (x(2, 8),), {"activation_bits": 12}),
]
RESIDUAL = [
    (
        TypeError,
        "row_mask must be a bool tensor, got torch.uint8",
        lambda: (x(2, 8), seed(), 0, 0.01, 16, mask(2, dtype=torch.uint8)),
        {},
    ),
    *(
        (
            ValueError,
            f"row_mask must have a value for each row of x, shape {list(shape)}, got {list(got)}",
            lambda shape=shape, got=got: (x(*shape, 8), seed(), 0, 0.01, 16, mask(*got)),
            {},
        )
        for shape, got in [((2,), (3,)), ((2,), (2, 1)), ((2, 3), (6,)), ((2, 3), (2, 3, 8)), ((), (1,)), ((2,), ())]
    ),
    (ValueError, "column_start must be in [0, 8), the features of x, got -1", lambda: (x(2, 8),), {"column_start": -1}),
    (ValueError, "column_start must be in [0, 8), the features of x, got 8", lambda: (x(2, 8),), {"column_start": 8}),
    *(
        (
            ValueError,
            f"columns must be in [1, 6], from column_start 2 to the 8 features of x, got {columns}",
            lambda: (x(2, 8),),
            {"column_start": 2, "columns": columns},
        )
        for columns in (0, -1, 7)
    ),
]
RANDOM = [
    (ValueError, "out_features must be at least 1, got 0", lambda: (x(2, 8),), {"out_features": 0}),
    (ValueError, "out_features must be at least 1, got -3", lambda: (x(2, 8),), {"out_features": -3}),
    (ValueError, "column_start must be at least 0, got -1", lambda: (x(2, 8),), {"column_start": -1}),
    (
        ValueError,
        "column_start + out_features must be at most 4294967295, got 4294967292 + 4",
        lambda: (x(2, 8),),
        {"column_start": 2**32 - 4},
    ),
]
WINDOW = [
    (TypeError, "seed must be an int64 tensor of one element, got dtype torch.float32", {"seed": torch.float32}),
    (ValueError, "domain must be in [0, 2**32), got -1", {"domain": -1}),
    (ValueError, "domain must be in [0, 2**32), got 4294967296", {"domain": 2**32}),
    (ValueError, "k_start must be at least 0, got -1", {"k_start": -1}),
    (ValueError, "k must be at least 0, got -1", {"k": -1}),
    (ValueError, "k_start + k must be at most 65536, got 65530 + 7", {"k_start": 65530, "k": 7}),
    (ValueError, "n_start must be at least 0, got -1", {"n_start": -1}),
    (ValueError, "n must be at least 0, got -1", {"n": -1}),
    (ValueError, "n_start + n must be at most 4294967295, got 4294967295 + 1", {"n_start": 2**32 - 1, "n": 1}),
]


def fake():
    return FakeTensorMode()


def meta():
    return torch.device("meta")


def eager():
    return torch.device("cpu")


each_mode = pytest.mark.parametrize("mode", [eager, fake, meta])


def refused(error, message, call, *arguments, **options):
    with pytest.raises(error, match=re.escape(message)):
        call(*arguments, **options)


@each_mode
@pytest.mark.parametrize(("error", "message", "arguments", "options"), ACTIVATIONS + RESIDUAL)
def test_residual_projection_refuses(mode, error, message, arguments, options):
    with mode():
        given = arguments()
        given = given if len(given) > 1 else (*given, seed())
        for call in (residual_projection, OPS.residual_projection):
            refused(error, message, call, *given, **options)


@each_mode
@pytest.mark.parametrize(("error", "message", "arguments", "options"), ACTIVATIONS + RANDOM)
def test_random_projection_refuses(mode, error, message, arguments, options):
    with mode():
        given = arguments()
        given = given if len(given) > 1 else (*given, seed())
        for call in (random_projection, OPS.random_projection):
            refused(error, message, call, *given, **{"out_features": 4, **options})


@each_mode
@pytest.mark.parametrize(("error", "message", "changes"), WINDOW)
def test_windows_of_entries_and_matrices_are_refused(mode, error, message, changes):
    window = {"domain": 0, "k_start": 1, "k": 2, "n_start": 3, "n": 4, **changes}
    with mode():
        window["seed"] = seed(dtype=changes.get("seed", torch.int64))
        for call in (projection_entries, OPS.projection_entries, projection_matrix, OPS.projection_matrix):
            refused(error, message, call, **window)


@each_mode
def test_a_matrix_takes_the_dtypes_of_activations(mode):
    with mode():
        message = "dtype must be float32, bfloat16 or float16, got torch.float64"
        refused(TypeError, message, projection_matrix, seed(), 0, 0, 2, 0, 2, dtype=torch.float64)
        message = "std must be positive with float32(std / 92.6917) finite and not zero, got -1.0"
        refused(ValueError, message, projection_matrix, seed(), 0, 0, 2, 0, 2, std=-1.0)


def test_tensors_must_share_a_device():
    elsewhere = {"device": "meta"}
    message = "seed must be on the device of x, cpu, got meta"
    refused(ValueError, message, residual_projection, x(2, 8), seed(**elsewhere))
    refused(ValueError, message, random_projection, x(2, 8), seed(**elsewhere), 4)
    message = "row_mask must be on the device of x, cpu, got meta"
    refused(ValueError, message, residual_projection, x(2, 8), seed(), row_mask=mask(2).to("meta"))


@pytest.mark.parametrize("wrong", [5, 5.0, None, [1.0, 2.0], "x"])
def test_tensors_must_be_tensors(wrong):
    name = type(wrong).__name__
    refused(TypeError, f"x must be a tensor, got {name}", residual_projection, wrong, seed())
    refused(TypeError, f"x must be a tensor, got {name}", random_projection, wrong, seed(), 3)
    refused(TypeError, f"seed must be a tensor, got {name}", residual_projection, x(2, 8), wrong)
    refused(TypeError, f"seed must be a tensor, got {name}", random_projection, x(2, 8), wrong, 3)
    refused(TypeError, f"seed must be a tensor, got {name}", projection_entries, wrong, 0, 0, 1, 0, 1)
    refused(TypeError, f"seed must be a tensor, got {name}", projection_matrix, wrong, 0, 0, 1, 0, 1)
    if wrong is not None:
        refused(
            TypeError, f"row_mask must be a tensor, got {name}", residual_projection, x(2, 8), seed(), row_mask=wrong
        )


@pytest.mark.parametrize("mode", [fake, meta])
def test_fake_results_have_the_shape_and_dtype_of_real_ones(mode):
    with mode():
        bfloat16 = x(2, 3, 8, dtype=torch.bfloat16)
        results = [
            residual_projection(bfloat16, seed(), column_start=1, columns=4),
            residual_projection(bfloat16.transpose(0, 1), seed()),
            random_projection(bfloat16, seed(), 2**20),
            projection_entries(seed(), 0, 0, 5, 0, 6),
            projection_matrix(seed(), 0, 0, 5, 0, 6, dtype=torch.float16),
        ]
        shapes = [list(result.shape) for result in results]
        dtypes = [result.dtype for result in results]
        assert all(result.is_contiguous() for result in results)
    assert shapes == [[2, 3, 4], [3, 2, 8], [2, 3, 2**20], [5, 6], [5, 6]]
    assert dtypes == [torch.bfloat16] * 3 + [torch.int16, torch.float16]
