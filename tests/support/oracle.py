"""The projection from the text of docs/definition.md alone: Python integers and fractions, one element at a time.

It shares no code with the package. Its only floating point is the float64 quotient that the text asks for. Slow.
"""

from __future__ import annotations

import functools
import hashlib
import math
from fractions import Fraction

# name: (exponent bits, fraction bits)
FORMATS = {"float32": (8, 23), "bfloat16": (8, 7), "float16": (5, 10)}
A = [0, 2, 4, 11, 23, 28, 39, 51]
B = [0, 1, 5, 8, 11, 15, 21, 72]

# A number is a Fraction, "inf", "-inf", "nan" or "-0".
Number = Fraction | str


def decode(bits: int, name: str) -> Number:
    """The number that a bit pattern stands for."""
    exponent_bits, fraction_bits = FORMATS[name]
    sign = bits >> (exponent_bits + fraction_bits)
    exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1)
    fraction = bits & ((1 << fraction_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == (1 << exponent_bits) - 1:
        return "nan" if fraction else ("-inf" if sign else "inf")
    if exponent == 0 and fraction == 0:
        return "-0" if sign else Fraction(0)
    significand = fraction if exponent == 0 else fraction + (1 << fraction_bits)
    power = max(exponent, 1) - bias - fraction_bits
    return (-1 if sign else 1) * significand * Fraction(2) ** power


def encode(value: Number, name: str) -> int:
    """The bit pattern of a number, rounded to nearest even with subnormals and overflow."""
    exponent_bits, fraction_bits = FORMATS[name]
    sign_bit = 1 << (exponent_bits + fraction_bits)
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    if isinstance(value, str):
        nan = infinity | 1 << (fraction_bits - 1)
        return {"inf": infinity, "-inf": infinity | sign_bit, "nan": nan, "-0": sign_bit}[value]
    sign = sign_bit if value < 0 else 0
    value = abs(value)
    if value == 0:
        return sign
    bias = (1 << (exponent_bits - 1)) - 1
    power = max(floor_log2(value), 1 - bias) - fraction_bits  # weight of the last place
    significand = round(value / Fraction(2) ** power)  # Python rounds fractions half to even
    if significand == 0:
        return sign
    # A significand that rounded up to the next power of two carries into the exponent by itself.
    bits = ((power + fraction_bits + bias - 1) << fraction_bits) + significand
    return sign | min(bits, infinity)


def floor_log2(value: Fraction) -> int:
    power = value.numerator.bit_length() - value.denominator.bit_length()
    return power if Fraction(2) ** power <= value else power - 1


def rounded(value: Number) -> Number:
    """One rounding to float32."""
    return decode(encode(value, "float32"), "float32")


def product(a: Number, b: Fraction) -> Number:
    """The float32 product of a with b > 0; a negative product that underflows is -0."""
    return a if isinstance(a, str) else rounded(a * b)


def total(a: Number, b: Number) -> Number:
    """The float32 sum of a finite a and any b."""
    if a == "-0" and b == "-0":
        return "-0"
    if b in ("inf", "-inf"):
        return b
    return rounded((Fraction(0) if a == "-0" else a) + (Fraction(0) if b == "-0" else b))


def seed_of(block_hash: str) -> int:
    return int.from_bytes(hashlib.sha256(block_hash.encode("utf-8")).digest()[:8], "little")


def philox(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@functools.cache
def words_of_call(seed: int, domain: int, call: int, n: int) -> list[int]:
    return philox([call, n, domain, 0], [seed % 2**32, seed >> 32])


def entry(seed: int, domain: int, k: int, n: int) -> int:
    w, i = words_of_call(seed, domain, k >> 4, n)[(k >> 2) & 3], k & 3
    u = A[(w >> 4 * i) & 7] + B[(w >> (16 + 4 * i)) & 7]
    return (2 * u + 1) * (1 - 2 * ((w >> (4 * i + 3)) & 1))


def coefficient(std: float) -> Fraction:
    """float32(std / sigma): divided in float64, then rounded."""
    value = rounded(Fraction(std / math.sqrt(549872 / 64)))
    assert isinstance(value, Fraction)
    return value


def quantised(row: list[Number], activation_bits: int) -> tuple[list[int], int]:
    """q and E of a row of finite numbers."""
    numbers = [Fraction(0) if x == "-0" else x for x in row]
    largest = max(abs(x) for x in numbers)
    exponent = max(floor_log2(largest), -100) if largest else -100
    q = [round(x * Fraction(2) ** ((13 if activation_bits == 16 else 6) - exponent)) for x in numbers]
    return (q if activation_bits == 16 else [min(max(v, -127), 127) for v in q]), exponent


def project_row(
    row: list[int],
    name: str,
    seed: int,
    *,
    domain: int,
    std: float,
    activation_bits: int,
    columns: range,
    residual: bool,
) -> list[int]:
    """A row of the result as bit patterns, from a row of x as bit patterns of the format ``name``."""
    x = [decode(bits, name) for bits in row]
    if any(value in ("nan", "inf", "-inf") for value in x):
        return [encode("nan", name)] * len(columns)
    q, exponent = quantised(x, activation_bits)
    scale = Fraction(2) ** (exponent - (13 if activation_bits == 16 else 6))
    result = []
    for n in columns:
        t = Fraction(sum(q[k] * entry(seed, domain, k, n) for k in range(len(row))))
        g = product(product(rounded(t), coefficient(std)), scale)
        result.append(encode(total(x[n], g) if residual else g, name))
    return result
