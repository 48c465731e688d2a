"""What the entries are like, and how near the product is to real numbers.

Seeds are fixed. Bounds are z-scores: distances from what is expected in standard deviations of a sample of that size.
"""

import itertools
import math

import pytest
import torch

from poc_kernels import definition, projection_entries, random_projection, residual_projection, seed_tensor

SIGMA = definition.SIGMA
# The 128 equally likely outcomes of an entry, as multiples of sigma.
OUTCOMES = torch.tensor(
    [s * (2 * (a + b) + 1) / SIGMA for s in (1, -1) for a in definition.TABLE_A for b in definition.TABLE_B],
    dtype=torch.float64,
)
Z_LIMIT = 4.5  # exceeded by chance 7 times in a million
WINDOWS = [(1, 0), (2**63 + 12345, 1), (0, 2**32 - 1)]  # seed, domain


def normal_below(values):
    return 0.5 * (1 + torch.erf(values / math.sqrt(2)))


def sample(seed, domain, k=1024, n=2048):
    return projection_entries(seed_tensor(seed), domain, 0, k, 0, n).double() / SIGMA


# ---- the distribution ----------------------------------------------------------------------------------------------


def test_outcomes_are_those_that_the_definition_describes():
    values, counts = OUTCOMES.unique(return_counts=True)
    assert len(values) == 108
    assert OUTCOMES.mean().abs() < 1e-15
    assert (OUTCOMES**2).mean().item() == pytest.approx(1, abs=1e-12)
    assert (OUTCOMES**4).mean().item() == pytest.approx(3.001, abs=5e-4)
    assert (OUTCOMES**6).mean().item() == pytest.approx(13.70, abs=5e-3)
    assert OUTCOMES.max().item() == pytest.approx(2.66, abs=5e-3)
    below = counts.cumsum(0) / 128
    distance = torch.maximum(below - normal_below(values), normal_below(values) - (below - counts / 128)).max()
    assert distance.item() == pytest.approx(0.0122, abs=5e-5)


@pytest.mark.parametrize(("seed", "domain"), WINDOWS)
@pytest.mark.parametrize("power", [1, 2, 3, 4, 5, 6])
def test_moments_of_a_sample(seed, domain, power):
    e = sample(seed, domain)
    expected = (OUTCOMES**power).mean()
    deviation = ((OUTCOMES ** (2 * power)).mean() - expected**2).sqrt() / math.sqrt(e.numel())
    z = ((e**power).mean() - expected) / deviation
    assert abs(z.item()) < Z_LIMIT


@pytest.mark.parametrize(("seed", "domain"), WINDOWS)
def test_every_outcome_is_as_frequent_as_it_should_be(seed, domain):
    e = sample(seed, domain)
    values, counts = OUTCOMES.unique(return_counts=True)
    found, frequencies = e.unique(return_counts=True)
    assert torch.allclose(found, values, rtol=0, atol=1e-12)
    expected = counts.double() / 128 * e.numel()
    chi_squared = ((frequencies - expected) ** 2 / expected).sum()
    freedom = len(values) - 1
    assert abs((chi_squared.item() - freedom) / math.sqrt(2 * freedom)) < Z_LIMIT


@pytest.mark.parametrize(("seed", "domain"), WINDOWS)
def test_a_sample_is_as_far_from_the_normal_as_its_outcomes(seed, domain):
    e = sample(seed, domain).flatten().sort().values
    below = torch.arange(1, len(e) + 1) / len(e)
    distance = torch.maximum(below - normal_below(e), normal_below(e) - (below - 1 / len(e))).max().item()
    # A sample's distribution is within 2.5 / sqrt(n) of its own, but 7 times in a million (Massart).
    assert abs(distance - 0.0122) < 2.5 / math.sqrt(len(e)) + 5e-5


# ---- independence --------------------------------------------------------------------------------------------------


def assert_independent(streams):
    """No two of the streams [m, n] are correlated: neither entries, nor signs, nor magnitudes."""
    square = streams**2 - 1
    forms = {
        "entries": streams,
        "signs": streams.sign(),
        "magnitudes": square / (OUTCOMES**4).mean().sub(1).sqrt(),
    }
    m, n = streams.shape
    upper = torch.ones(m, m, dtype=torch.bool).triu(1)
    pairs = m * (m - 1) // 2
    for (left_name, left), (right_name, right) in itertools.combinations_with_replacement(forms.items(), 2):
        z = (left @ right.T / math.sqrt(n))[upper]
        what = f"{left_name} and {right_name}"
        assert z.abs().max() < math.sqrt(2 * math.log(pairs)) + Z_LIMIT / 1.5, what
        assert abs((z.pow(2).mean().item() - 1) / math.sqrt(2 / pairs)) < Z_LIMIT, what


def test_a_correlation_would_be_noticed():
    streams = sample(5, 0, 4096, 40).T.contiguous()
    assert_independent(streams)
    for i, j, weight in [(3, 17, 0.15), (0, 39, 0.15)]:
        linked = streams.clone()
        linked[j] = math.sqrt(1 - weight**2) * streams[j] + weight * streams[i]
        with pytest.raises(AssertionError):
            assert_independent(linked)


@pytest.mark.parametrize(("seed", "domain"), WINDOWS)
def test_columns_are_independent(seed, domain):
    assert_independent(sample(seed, domain, 8192, 128).T)


@pytest.mark.parametrize(("seed", "domain"), WINDOWS)
def test_rows_are_independent(seed, domain):
    assert_independent(sample(seed, domain, 128, 8192))


def test_the_sixteen_entries_of_a_call_are_independent():
    assert_independent(sample(3, 2, 4096, 64).reshape(256, 16, 64).transpose(0, 1).reshape(16, -1))


def test_columns_far_apart_are_independent():
    seed = seed_tensor(4)
    columns = [0, *(2**bit for bit in range(32))]
    streams = [projection_entries(seed, 0, 0, 8192, n, 1)[:, 0] for n in columns if n < definition.MAX_COLUMNS]
    assert len(streams) == 33
    assert_independent(torch.stack(streams).double() / SIGMA)


def test_rows_far_apart_are_independent():
    seed = seed_tensor(4)
    rows = [0, *(2**bit for bit in range(16))]
    assert_independent(torch.stack([projection_entries(seed, 0, k, 1, 0, 8192)[0] for k in rows]).double() / SIGMA)


def test_seeds_that_differ_in_one_bit_are_independent():
    seeds = [0, *(1 << bit for bit in range(64))]
    assert_independent(torch.stack([sample(seed, 0, 128, 64).flatten() for seed in seeds]))


def test_domains_that_differ_in_one_bit_are_independent():
    domains = [0, *(1 << bit for bit in range(32))]
    assert_independent(torch.stack([sample(6, domain, 128, 64).flatten() for domain in domains]))


# ---- accuracy ------------------------------------------------------------------------------------------------------


def relative_error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


def rounding_error(x, activation_bits, std):
    """Root mean square of the error of x @ P: q is off by 1/12 of the square of its step, which is one for a row."""
    exponents = x.abs().amax(1).log2().floor()
    steps = torch.exp2(exponents - definition.ACTIVATION_SHIFT[activation_bits])
    return std * math.sqrt(x.shape[1] / 12) * steps.pow(2).mean().sqrt().item()


@pytest.mark.parametrize(("activation_bits", "least", "most"), [(16, 4.6e-5, 5.8e-5), (8, 6e-3, 7.4e-3)])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_error_is_what_the_definition_states(activation_bits, least, most, seed):
    k, columns, std = 4096, 512, 0.01
    x = torch.randn(64, k, generator=torch.Generator().manual_seed(seed))
    p = projection_entries(seed_tensor(seed), 0, 0, k, 0, columns).double() * (std / SIGMA)
    products = x.double() @ p
    exact = x[:, :columns].double() + products
    options = {"std": std, "activation_bits": activation_bits}
    y = residual_projection(x, seed_tensor(seed), columns=columns, **options)
    assert least < relative_error(y, exact) < most
    g = random_projection(x, seed_tensor(seed), columns, **options)
    assert 1.8 < relative_error(g, products) / relative_error(y, exact) < 2.0
    error = (g.double() - products).pow(2).mean().sqrt().item()
    assert error == pytest.approx(rounding_error(x, activation_bits, std), rel=0.03)


@pytest.mark.parametrize("k", [63, 1024])
def test_the_standard_deviation_of_a_product(k):
    """Each element of x @ P is x times k independent entries: its deviation is std * |x|."""
    x = torch.randn(8, k, generator=torch.Generator().manual_seed(k))
    g = random_projection(x, seed_tensor(k), 20000, std=0.5).double() / (0.5 * x.double().norm(dim=1, keepdim=True))
    assert (g.mean(1) * math.sqrt(20000)).abs().max() < Z_LIMIT
    assert ((g.pow(2).mean(1) - 1) / math.sqrt(2 / 20000)).abs().max() < Z_LIMIT
