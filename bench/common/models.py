"""Models that suites run: real configurations with random weights, all or some of their layers."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common import memory

_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "intermediate_size": 1536,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
}
"""The published numbers that decide shapes; "demo" is what the demonstration builds."""
_LLAMAS = {"smollm2-135m"}
"""Those that are Llamas; others are models of Qwen 3."""
_CASE = re.compile(r"(?P<model>[^:@]+)(:(?P<layers>[0-9]+))?@(?P<batch_size>[0-9]+)x(?P<seq_len>[0-9]+)")
_TAKES = f'"MODEL[:LAYERS]@BATCHxSEQ", comma separated, where MODEL is {", ".join(["demo", *_CONFIGS])}'


class Case(NamedTuple):
    """A model, how many of its layers run (None for all), and the shape of its forwards."""

    model: str
    layers: int | None
    batch_size: int
    seq_len: int

    def __str__(self) -> str:
        layers = "" if self.layers is None else f":{self.layers}"
        return f"{self.model}{layers}@{self.batch_size}x{self.seq_len}"


def parse_cases(text: str) -> list[Case]:
    """Read the cases of an option, for instance ``qwen3-0.6b@2x64,qwen3-8b:2@2x64``.

    Raises:
        ValueError: the text is something else, or a batch has one row, in which a nonce has no other position.
    """
    cases = []
    for part in text.split(","):
        match = _CASE.fullmatch(part.strip())
        if match is None or match["model"] not in ("demo", *_CONFIGS):
            raise ValueError(f"cases must be {_TAKES}, got {part!r}")
        case = Case(
            match["model"],
            None if match["layers"] is None else int(match["layers"]),
            int(match["batch_size"]),
            int(match["seq_len"]),
        )
        if case.layers == 0 or case.batch_size < 2 or case.seq_len < 1:
            raise ValueError(f"cases must have at least 1 layer, 2 rows and 1 position, got {part!r}")
        cases.append(case)
    return cases


class LayerClock:
    """Measures the seconds from the start of a model's first decoder layer to the end of its last, on a CPU.

    Make it before the engine: the engine's copy of the modules has the hooks too.
    """

    def __init__(self, layers: Any) -> None:
        started, spans = [0.0], [0.0]  # in plain functions, which a copy of the modules shares

        def start(*_: Any) -> None:
            started[0] = time.perf_counter()

        def stop(*_: Any) -> None:
            spans[0] += time.perf_counter() - started[0]

        self._spans = spans
        layers[0].register_forward_pre_hook(start)
        layers[-1].register_forward_hook(stop)

    def take(self) -> float:
        """Return the seconds that layers took since the last call."""
        seconds, self._spans[0] = self._spans[0], 0.0
        return seconds


class Built(NamedTuple):
    """A model, and what a report says of it; it has a clock where some of its layers are left out."""

    model: Any
    layers: int
    whole_layers: int
    parameters: int
    """Of the whole model."""
    clock: LayerClock | None


def _config(name: str, directory: Path) -> Any:
    from transformers import AutoConfig, LlamaConfig, Qwen3Config

    if name in _LLAMAS:
        return LlamaConfig(**_CONFIGS[name])
    if name != "demo":
        return Qwen3Config(**_CONFIGS[name])
    from poc_kernels.demo import model

    model.build(directory)
    return AutoConfig.from_pretrained(directory)


def _count_parameters(config: Any) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters())


def build(case: Case, dtype: torch.dtype, device: torch.device, directory: Path) -> Built:
    """Build the model of ``case`` with random weights on ``device``; the demonstration's writes into ``directory``.

    Raises:
        ValueError: the case has more layers than the model, or only some of them on a GPU.
        MemoryError: the device has too little free memory.
    """
    from transformers import AutoModelForCausalLM

    config = _config(case.model, directory)
    whole_layers, parameters = config.num_hidden_layers, _count_parameters(config)
    layers = whole_layers if case.layers is None else case.layers
    if layers > whole_layers:
        raise ValueError(f"cases must have at most the {whole_layers} layers of {case.model}, got {case}")
    if layers < whole_layers and device.type != "cpu":
        raise ValueError(f"cases must have all layers on a GPU, where a layer's time is not taken, got {case}")
    if layers < whole_layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:layers]
    positions = case.batch_size * case.seq_len
    needed = (
        _count_parameters(config) * dtype.itemsize
        + 64 * max(case.batch_size, 32) * config.vocab_size  # logits and permutations, in several forms
        + 16 * positions * (config.intermediate_size + 2 * config.hidden_size)
        + 2**29
    )
    available = memory.available(device)
    if available < needed:
        raise MemoryError(f"{case} needs {needed >> 20} MiB of memory, {available >> 20} are available")
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    clock = LayerClock(model.get_decoder().layers) if layers < whole_layers else None
    return Built(model, layers, whole_layers, parameters, clock)
