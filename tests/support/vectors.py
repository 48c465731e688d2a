"""The definition's known answers, and x of each made by this file's own reading of the text."""

import hashlib
import json
from pathlib import Path

import torch
from helpers import from_bits

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "projection_vectors.json").read_text())
PRODUCTS = [(kind, case) for kind in ("residual", "projection", "edge") for case in VECTORS[kind]]


def product_id(item):
    kind, case = item
    return f"{kind}-{case['dtype']}-{case['M']}x{case['K']}-{case['bits']}bits"


def sha256(values):
    return hashlib.sha256(values.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def activations(case):
    """x of a vector, from the formula or the words that the definition states."""
    dtype = getattr(torch, case["dtype"])
    if "x_hex" in case:
        return from_bits(torch.tensor([[int(word, 16) for word in row.split()] for row in case["x_hex"]]), dtype)
    rows, k = case["M"], case["K"]
    words = [(index + case["x_salt"]) * 2654435761 % 2**32 for index in range(rows * k)]
    unit = torch.tensor(words, dtype=torch.float64) / 2**32 * 2 - 1
    return (unit * case["x_amp"]).float().to(dtype).reshape(rows, k)


def options_of(kind, case):
    return {
        "seed": int(case["seed"], 16),
        "domain": case["domain"],
        "std": case["std"],
        "activation_bits": case["bits"],
        "residual": kind != "projection",
    }
