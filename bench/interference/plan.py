"""What a run measures: the command line, the request rates, and the conditions that take turns at each."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import ROOT
from bench.common import models
from bench.interference import results
from bench.interference.load import EQUAL, PARTITION, PRIORITIES, Condition
from poc_kernels.node.settings import Settings
from poc_kernels.scheduling import Pacing, threads_have_priorities

DESCRIPTION = """\
Measures what validating proofs costs users, and what it leaves to proofs. Then: python -m bench.interference.report OUT

One node serves a model. Requests come by an open-loop Poisson process at several rates, and proofs come to be
validated. At each rate the conditions take turns in short blocks, with the same arrivals. Every distance and every
answer is compared with the one computed alone: if one differs, the run ends with status 1 and writes nothing.
"""

VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
DEFAULT_SHARE = Settings(model="").validation_share
ALONE = Condition(results.ALONE, validation=False)
SOLO = Condition(results.SOLO, chat=False)
UNPACED = Condition("no pacing")
NEITHER = Condition("no pacing, no priorities", lanes=EQUAL)
PART = Condition("no pacing, a part of the GPU", lanes=PARTITION)


WHOLE = Condition("whole batches", whole_batches=True)
"""What a batch in one call does, as other stacks compute proofs in vLLM."""


class Rate(NamedTuple):
    """A request rate: its name, its part of the saturation rate, its rounds, and whether all shares run at it."""

    name: str
    fraction: float
    rounds: int
    every_share: bool
    every_seconds: float | None = None
    """In place of a part of the saturation rate and of random arrivals: one request each time."""

    def per_second(self, saturated: float) -> float:
        """Return the requests per second, where ``saturated`` of them are the most."""
        return self.fraction * saturated if self.every_seconds is None else 1 / self.every_seconds


class Plan(NamedTuple):
    """The defaults of options."""

    case: str
    new_tokens: int
    prompt_tokens: int
    prompts: int
    in_flight: int
    """Users of the closed loop that finds the saturation rate."""
    saturation_seconds: float
    block_seconds: float
    rounds: tuple[int, ...]
    """For each of `NAMES`; 0 leaves the rate out."""
    paced: tuple[float, ...]
    """Shares of paced validation, besides `MIN_SHARE` and the default."""
    free: tuple[float, ...]
    """Shares of free validation, besides `MAX_SHARE` and the default."""


NAMES, FRACTIONS = (results.LIGHT, results.HALF, results.NEAR_SATURATION), (0.15, 0.5, 0.85)
EVERY_SECONDS = 0.25
"""Of `results.STEADY`."""
MIN_SHARE, MAX_SHARE = 0.05, 0.8
"""The ends of the setting: the share of paced validation that spares users most, and the free one that does least."""
PLANS = {
    "quick": Plan("demo@4x16", 6, 8, 6, 4, 1.0, 0.6, (1, 1, 1), (), ()),
    "cpu": Plan("demo@16x64", 32, 64, 24, 32, 12.0, 10.0, (8, 4, 3), (), (0.5,)),
    "cuda": Plan("qwen3-8b@32x256", 64, 256, 24, 32, 12.0, 10.0, (4, 4, 2), (0.2, 0.4), (DEFAULT_SHARE,)),
    results.VLLM: Plan("demo@8x64", 40, 50, 24, 32, 10.0, 5.0, (4, 0, 0), (0.3, 0.5, MAX_SHARE), ()),
    "short": Plan("qwen3-8b@32x256", 48, 128, 8, 16, 4.0, 4.0, (0, 2, 0), (), (DEFAULT_SHARE,)),
}
"""By device or engine, or by --quick and --short; "short" takes about two minutes on a GPU."""


def default_of(device: torch.device) -> Condition:
    """Return the condition of chat and validation at once with the default settings of a node on that device."""
    paced = Settings(model="").paced(threads_have_priorities(device))
    return condition_of(device, DEFAULT_SHARE, paced, ", the default")


def condition_of(device: torch.device, share: float, paced: bool, note: str = "") -> Condition:
    """Return the condition of chat and validation at once, with that pacing."""
    name = f"{'paced' if paced else 'free'}, share {share:g}{note}"
    # As a node does it: on a CPU only slices that are not paced run in a thread of low priority.
    lanes = EQUAL if paced and threads_have_priorities(device) else PRIORITIES
    return Condition(name, share=share, paced=paced, lanes=lanes)


def conditions_at(
    device: torch.device, rate: Rate, paced: Sequence[float], free: Sequence[float], partition: bool = False
) -> list[Condition]:
    """Return the conditions that take turns at a rate; ``paced`` and ``free`` are shares."""
    default = default_of(device)
    chosen = {(True, MIN_SHARE), (False, MAX_SHARE), (default.paced, default.share)}
    if rate.every_share:
        chosen |= {(True, share) for share in paced} | {(False, share) for share in free}
    both = [
        default if (paced, share) == (default.paced, default.share) else condition_of(device, share, paced)
        for paced, share in sorted(chosen, key=lambda each: (not each[0], each[1]))
    ]
    return [ALONE, *both, UNPACED, *([PART] if partition else []), NEITHER, SOLO]


def conditions_of_vllm(paced: Sequence[float]) -> list[Condition]:
    """Return the conditions that take turns in vLLM, where validation is always paced; ``paced`` are more shares."""
    default = _vllm_condition(DEFAULT_SHARE)
    both = [_vllm_condition(share) for share in sorted({MIN_SHARE, default.share, *paced})]
    return [ALONE, *both, WHOLE, SOLO]


def _vllm_condition(share: float) -> Condition:
    return condition_of(torch.device("cpu"), share, True, ", the default" if share == DEFAULT_SHARE else "")


def default_name(engine: str, device: torch.device) -> str:
    """Return the name of the condition with the default settings of an engine on a device."""
    return (_vllm_condition(DEFAULT_SHARE) if engine == results.VLLM else default_of(device)).name


def in_order(conditions: list[Condition], turn: int, rounds: int) -> list[Condition]:
    """Return the conditions in the order of one round: rotated, so that each comes early in some and late in others."""
    shift = turn * len(conditions) // max(rounds, 1)
    return conditions[shift:] + conditions[:shift]


def _absolute(path: str) -> Path:
    """Return where a path leads from here: it is used in other directories. Links stay, as an environment is one."""
    return Path(path).absolute()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; the options of the plan that it leaves out get their defaults."""
    parser = argparse.ArgumentParser(
        "python -m bench.interference", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, help="JSON to write; its folder must exist")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="float32; bfloat16 on a GPU")
    add("--engine", choices=results.ENGINES, default=results.TRANSFORMERS, help="whose server it is")
    add("--vllm-python", type=_absolute, default=VLLM_PYTHON, help="of the environment with vLLM and this package")
    add("--http", action="store_true", help="a node in a process of its own, over HTTP; the demonstration's model")
    add("--quick", action="store_true", help="small cases in seconds, as POC_BENCH_QUICK=1")
    add("--short", action="store_true", help="only the half rate, on a GPU in about two minutes")
    add("--case", help="MODEL[:LAYERS]@BATCHxSEQ with MODEL demo, qwen3-0.6b or qwen3-8b")
    add("--new-tokens", type=int, help="length of each answer")
    add("--prompt-tokens", type=int, help="mean length of a prompt")
    add("--prompts", type=int, help="number of different prompts")
    add("--in-flight", type=int, help="users of the closed loop that finds the saturation rate")
    add("--saturation-seconds", type=float, help="length of that loop")
    add("--block-seconds", type=float, help="length of a condition's turn")
    add("--rounds", help="of the light, the half and the rate near saturation, comma separated; 0 leaves one out")
    add("--fractions", default=",".join(map(str, FRACTIONS)), help="those rates, as parts of the saturation rate")
    add("--paced-shares", help="more shares of paced validation, at the light and the half rate")
    add("--free-shares", help="more shares of free validation, at the light and the half rate")
    add("--slice-seconds", type=float, default=0.002, help="longest that a slice should take")
    add("--slices-in-flight", type=int, default=2, help="slices that a GPU is given before the first is done")
    add("--sms", type=int, help="adds a condition in which validation is kept to this many SMs of a GPU")
    add("--no-projection", dest="projection", action="store_false", help="rounds without the random projection")
    add("--prefill-rounds", type=int, default=5, help="of proofs alone and vLLM's prompts alone; 0 for none")
    add("--max-in-flight", type=int, default=256, help="requests that come when this many are in flight are refused")
    add("--timeout-seconds", type=float, default=120.0, help="limit for each thing that is waited for")
    add(
        "--limit-seconds",
        type=float,
        default=float("inf"),
        help="after this no condition begins except in the first round of the first rate",
    )
    add("--seed", type=int, default=0, help="of arrivals and prompts")
    options = parser.parse_args(arguments)
    quick = options.quick or os.environ.get("POC_BENCH_QUICK") == "1"
    vllm = options.engine == results.VLLM
    if vllm:
        options.http = True
    plan = PLANS["quick" if quick else results.VLLM if vllm else "short" if options.short else options.device]
    for name in ("case", "new_tokens", "prompt_tokens", "prompts", "in_flight", "saturation_seconds", "block_seconds"):
        if name == "case" and options.http and not vllm and options.case is None:
            options.case = PLANS["quick" if quick else "cpu"].case
        if getattr(options, name) is None:
            setattr(options, name, getattr(plan, name))
        if name != "case" and not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if options.new_tokens < 2:
        parser.error(f"--new-tokens must be at least 2, or nothing lies between tokens, got {options.new_tokens}")
    try:
        options.paced_shares = _numbers(options.paced_shares, plan.paced)
        options.free_shares = _numbers(options.free_shares, plan.free)
        fractions = _numbers(options.fractions, FRACTIONS)
        if vllm and quick and options.rounds is None:
            options.rounds = "1,0,0"
        if options.http and not vllm and options.rounds is None:
            options.rounds = "0,1,0" if quick else "0,4,0" if options.device == "cuda" else "4,0,0"
        rounds = plan.rounds if options.rounds is None else tuple(map(int, options.rounds.split(",")))
        options.rates = [
            Rate(name, fraction, count, name != NAMES[-1])
            for name, fraction, count in zip(NAMES, fractions, rounds, strict=True)
            if count > 0
        ]
        if vllm and rounds[0] > 0:
            options.rates.insert(0, Rate(results.STEADY, 0.0, rounds[0], True, EVERY_SECONDS))
        for share in (*options.paced_shares, *options.free_shares):
            Pacing(share=share)
        (options.case,) = models.parse_cases(options.case)
        options.device = device_of(options.device)
    except ValueError as error:
        parser.error(str(error))
    if not options.rates:
        parser.error(f"--rounds must be positive for a rate at least, got {options.rounds}")
    half_on_gpu = "bfloat16" if options.device.type == "cuda" and not options.http else "float32"
    options.dtype = options.dtype or half_on_gpu
    if options.http and (options.case.model, options.dtype) != ("demo", "float32"):
        option = "--engine vllm" if vllm else "--http"
        parser.error(f"{option} takes the demonstration's model in float32, got {options.case} in {options.dtype}")
    if vllm and options.device.type != "cpu":
        parser.error(f"--engine vllm is measured with vLLM for CPUs, got --device {options.device.type}")
    if vllm:
        from bench.interference.over_vllm import unusable  # not above: a bare GPU machine has no HTTP client

        if (reason := unusable(options.vllm_python)) is not None:
            parser.error(reason)
    options.quick = quick
    options.deadline = time.monotonic() + options.limit_seconds
    if not options.out.absolute().parent.is_dir():
        parser.error(f"the folder of {options.out} must exist")
    return options


def _numbers(text: str | None, default: tuple[float, ...]) -> tuple[float, ...]:
    if text is None:
        return default
    return tuple(map(float, text.split(","))) if text else ()


def device_of(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ValueError: torch has no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that torch has here, got 'cuda'")
    return torch.device(name)
