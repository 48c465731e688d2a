"""Validation beside inference, measured: python bench/beside.py OUT.json; then python bench/beside_report.py OUT.json.

One node serves a model; requests come by an open-loop Poisson process at several rates; proofs come to be validated.
The conditions of a rate take turns in short blocks with the same arrivals. Every distance and every answer is compared
with the one computed alone: a run in which one differs ends with status 1 and writes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import beside_models
import beside_results
import conditions
import round_models
import torch
from beside_load import (
    EQUAL,
    PARTITION,
    PRIORITIES,
    Block,
    Condition,
    DifferenceError,
    Rig,
    poisson,
    run_block,
    saturation,
)
from beside_node import Node, device_of

from poc_kernels.node.settings import Settings
from poc_kernels.scheduling import Pacing, threads_have_priorities

DEFAULT_SHARE = Settings(model="").validation_share
ALONE = Condition(beside_results.ALONE, validation=False)
SOLO = Condition(beside_results.SOLO, chat=False)
UNPACED = Condition("no pacing")
NEITHER = Condition("no pacing, no priorities", side=EQUAL)
PART = Condition("no pacing, a part of the GPU", side=PARTITION)


class Rate(NamedTuple):
    """A request rate: its name, its part of the saturation rate, its rounds, and whether all shares run at it."""

    name: str
    fraction: float
    rounds: int
    every_share: bool


class Plan(NamedTuple):
    """What is run if nothing else is said."""

    case: str
    new_tokens: int
    prompt_tokens: int
    prompts: int
    in_flight: int
    """Of the closed loop that finds the saturation rate."""
    saturation_seconds: float
    block_seconds: float
    rounds: tuple[int, ...]
    """Of `RATES`; 0 leaves a rate out."""
    held: tuple[float, ...]
    """Shares of a pacing that holds slices back, besides the end and the default."""
    free: tuple[float, ...]
    """Shares of one that does not, besides the end and the default."""


NAMES, FRACTIONS = ("light", "half", "near saturation"), (0.15, 0.5, 0.85)
LEAST_END, MOST_END = 0.05, 0.8
"""The ends of the setting: the share of a pacing that holds back, and of one that does not."""
PLANS = {
    "quick": Plan("demo@4x16", 6, 8, 6, 4, 1.0, 0.6, (1, 1, 1), (), ()),
    "cpu": Plan("demo@16x64", 32, 64, 24, 32, 12.0, 10.0, (8, 4, 3), (), (0.5,)),
    "cuda": Plan("qwen3-8b@32x256", 64, 256, 24, 32, 12.0, 10.0, (4, 4, 2), (0.2, 0.4), (DEFAULT_SHARE,)),
    "short": Plan("qwen3-8b@32x256", 48, 128, 8, 16, 4.0, 4.0, (0, 2, 0), (), (DEFAULT_SHARE,)),
}
"""Short: on a GPU, in about two minutes."""


def default_of(device: torch.device) -> Condition:
    """Both at once, as a node with the defaults of its settings does it there."""
    paced = Settings(model="").paced(threads_have_priorities(device))
    return condition_of(device, DEFAULT_SHARE, paced, ", the default")


def condition_of(device: torch.device, share: float, paced: bool, note: str = "") -> Condition:
    """Both at once, with a pacing of that share."""
    name = f"{'held' if paced else 'free'}, share {share:g}{note}"
    # As a node: on a processor only slices that are not held back have a thread of low priority.
    side = EQUAL if paced and threads_have_priorities(device) else PRIORITIES
    return Condition(name, share=share, paced=paced, side=side)


def conditions_at(
    device: torch.device, rate: Rate, held: Sequence[float], free: Sequence[float], partition: bool = False
) -> list[Condition]:
    """What takes turns at a rate."""
    default = default_of(device)
    chosen = {(True, LEAST_END), (False, MOST_END), (default.paced, default.share)}
    if rate.every_share:
        chosen |= {(True, share) for share in held} | {(False, share) for share in free}
    paced = [
        default if (paced, share) == (default.paced, default.share) else condition_of(device, share, paced)
        for paced, share in sorted(chosen, key=lambda each: (not each[0], each[1]))
    ]
    return [ALONE, *paced, UNPACED, *([PART] if partition else []), NEITHER, SOLO]


def in_order(conditions: list[Condition], turn: int, rounds: int) -> list[Condition]:
    """The conditions of a round: rotated, so that over the rounds each comes early and late."""
    shift = turn * len(conditions) // max(rounds, 1)
    return conditions[shift:] + conditions[:shift]


def progress(text: str) -> None:
    """Tell whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def measure_rate(
    rig: Rig, rate: Rate, per_second: float, conditions: list[Condition], options: argparse.Namespace
) -> dict[Condition, list[Block]]:
    """The blocks of each condition at one rate; in each round all get the same arrivals."""
    blocks: dict[Condition, list[Block]] = {condition: [] for condition in conditions}
    for turn in range(rate.rounds):
        seed = f"{options.seed} {rate.name} {turn}"
        arrivals = poisson(per_second, options.block_seconds, rig.prompts, seed)
        for condition in in_order(conditions, turn, rate.rounds):
            if turn > 0 and time.monotonic() > options.deadline:
                return whole_rounds(blocks)
            block = await run_block(
                rig,
                condition,
                arrivals,
                options.block_seconds,
                max_in_flight=options.max_in_flight,
                timeout_seconds=options.timeout_seconds,
            )
            blocks[condition].append(block)
        progress(f"{rate.name}: round {turn + 1} of {rate.rounds}")
    return blocks


def whole_rounds(blocks: dict[Condition, list[Block]]) -> dict[Condition, list[Block]]:
    """Only the rounds that every condition had."""
    rounds = min(map(len, blocks.values()))
    return {condition: some[:rounds] for condition, some in blocks.items()}


async def measure(rig: Any, rates: list[Rate], options: argparse.Namespace) -> dict[str, Any]:
    """Saturation first, then every rate.

    Raises:
        DifferenceError: something computed beside other work is not what was computed alone.
    """
    try:
        await rig.start(options.timeout_seconds)
        progress("answers and distances alone are known")
        gc.collect()
        gc.freeze()  # libraries' own objects are not looked through in every block
        return await _measure_all(rig, rates, options)
    finally:
        gc.unfreeze()
        await rig.close()


async def _measure_all(rig: Any, rates: list[Rate], options: argparse.Namespace) -> dict[str, Any]:
    saturated = await saturation(rig, options.in_flight, options.saturation_seconds, options.timeout_seconds)
    if saturated == 0:
        seconds = f"{options.saturation_seconds:g} s"
        raise SystemExit(f"no request rate to measure at, no token came in {seconds}: give --saturation-seconds more")
    progress(f"saturation: {saturated:.3g} requests/s with {options.in_flight} in flight")
    measured = []
    for rate in rates:
        if measured and time.monotonic() > options.deadline:
            progress(f"{rate.name}: left out, --limit-seconds is over")
            continue
        conditions = rig.conditions or conditions_at(
            options.device, rate, options.held_shares, options.free_shares, bool(options.multiprocessors)
        )
        per_second = rate.fraction * saturated
        blocks = await measure_rate(rig, rate, per_second, conditions, options)
        cells = beside_results.cells(blocks, options.seed)
        measured.append(
            {"name": rate.name, "fraction": rate.fraction, "requests_per_second": per_second, "cells": cells}
        )
    return {"saturation_requests_per_second": saturated, "rates": measured}


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="JSON to write; its folder must exist")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="float32; bfloat16 on a GPU")
    add("--http", action="store_true", help="a node in a process of its own, over HTTP; the demonstration's model")
    add("--quick", action="store_true", help="small cases in seconds, as POC_BENCH_QUICK=1")
    add("--short", action="store_true", help="a GPU's half rate only, in about two minutes")
    add("--case", help="MODEL[:LAYERS]@BATCHxSEQ with MODEL demo, qwen3-0.6b or qwen3-8b")
    add("--new-tokens", type=int, help="of each answer")
    add("--prompt-tokens", type=int, help="of a prompt, in the mean")
    add("--prompts", type=int, help="different prompts")
    add("--in-flight", type=int, help="users of the closed loop that finds the saturation rate")
    add("--saturation-seconds", type=float, help="of that loop")
    add("--block-seconds", type=float, help="of a condition's turn")
    add("--rounds", help="of the light, the half and the rate near saturation, comma separated; 0 leaves one out")
    add("--fractions", default=",".join(map(str, FRACTIONS)), help="of the saturation rate that those rates are")
    add("--held-shares", help="of a pacing that holds slices back, besides the end; at the light and the half rate")
    add("--free-shares", help="of one that does not, besides the end; at the light and the half rate")
    add("--slice-seconds", type=float, default=0.002, help="longest that a slice should take")
    add("--slices-in-flight", type=int, default=2, help="that a GPU is given before the first is done")
    add("--multiprocessors", type=int, help="one more condition: validation is kept to so many of a GPU")
    add("--no-projection", dest="projection", action="store_false", help="rounds without the random projection")
    add("--max-in-flight", type=int, default=256, help="requests that come beyond are refused")
    add("--timeout-seconds", type=float, default=120.0, help="for whatever is waited for")
    add("--limit-seconds", type=float, default=float("inf"), help="later no round begins but a first one")
    add("--seed", type=int, default=0, help="of arrivals and prompts")
    options = parser.parse_args(arguments)
    quick = options.quick or os.environ.get("POC_BENCH_QUICK") == "1"
    plan = PLANS["quick" if quick else "short" if options.short else options.device]
    for name in ("case", "new_tokens", "prompt_tokens", "prompts", "in_flight", "saturation_seconds", "block_seconds"):
        if name == "case" and options.http and options.case is None:
            options.case = PLANS["quick" if quick else "cpu"].case
        if getattr(options, name) is None:
            setattr(options, name, getattr(plan, name))
        if name != "case" and not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if options.new_tokens < 2:
        parser.error(f"--new-tokens must be at least 2, or nothing lies between tokens, got {options.new_tokens}")
    try:
        options.held_shares = _numbers(options.held_shares, plan.held)
        options.free_shares = _numbers(options.free_shares, plan.free)
        fractions = _numbers(options.fractions, FRACTIONS)
        if options.http and options.rounds is None:
            options.rounds = "0,1,0" if quick else "0,4,0" if options.device == "cuda" else "4,0,0"
        rounds = plan.rounds if options.rounds is None else tuple(map(int, options.rounds.split(",")))
        options.rates = [
            Rate(name, fraction, count, name != NAMES[-1])
            for name, fraction, count in zip(NAMES, fractions, rounds, strict=True)
            if count > 0
        ]
        for share in (*options.held_shares, *options.free_shares):
            Pacing(share=share)
        (options.case,) = round_models.parse_cases(options.case)
        options.device = device_of(options.device)
    except ValueError as error:
        parser.error(str(error))
    if not options.rates:
        parser.error(f"--rounds must be positive for a rate at least, got {options.rounds}")
    half_on_gpu = "bfloat16" if options.device.type == "cuda" and not options.http else "float32"
    options.dtype = options.dtype or half_on_gpu
    if options.http and (options.case.model, options.dtype) != ("demo", "float32"):
        parser.error(f"--http takes the demonstration's model in float32, got {options.case} in {options.dtype}")
    options.quick = quick
    options.deadline = time.monotonic() + options.limit_seconds
    if not options.out.absolute().parent.is_dir():
        parser.error(f"the folder of {options.out} must exist")
    return options


def _numbers(text: str | None, default: tuple[float, ...]) -> tuple[float, ...]:
    if text is None:
        return default
    return tuple(map(float, text.split(","))) if text else ()


def _in_process(options: argparse.Namespace, directory: Path) -> tuple[Any, dict[str, Any]]:
    served = beside_models.build(options.case, getattr(torch, options.dtype), options.device, directory)
    node = Node(
        served,
        new_tokens=options.new_tokens,
        prompt_tokens=options.prompt_tokens,
        prompt_count=options.prompts,
        projection=options.projection,
        slice_seconds=options.slice_seconds,
        slices_in_flight=options.slices_in_flight,
        multiprocessors=options.multiprocessors,
        seed=options.seed,
    )
    return node, {"layers": served.layers, "parameters": served.parameters}


def _over_http(options: argparse.Namespace, directory: Path) -> tuple[Any, dict[str, Any]]:
    from beside_http import HttpNode  # a bare GPU machine has no HTTP client

    served = beside_models.build(options.case, getattr(torch, options.dtype), torch.device("cpu"), directory)
    node = HttpNode(
        directory,
        served,
        device=options.device.type,
        conditions=[ALONE, default_of(options.device), SOLO],
        new_tokens=options.new_tokens,
        prompt_words=options.prompt_tokens,
        prompt_count=options.prompts,
        projection=options.projection,
        seed=options.seed,
        ready_seconds=options.timeout_seconds,
    )
    return node, {"layers": served.layers, "parameters": served.parameters}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The results of a run, as they are written.

    Raises:
        DifferenceError: something computed beside other work is not what was computed alone.
        RuntimeError: the node failed.
    """
    result = conditions.conditions(options.device)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rig, model = (_over_http if options.http else _in_process)(options, Path(folder))
        measured = asyncio.run(measure(rig, options.rates, options))
    result["beside"] = {
        "device": options.device.type,
        "http": options.http,
        "quick": options.quick,
        "model": {"name": options.case.model, "dtype": options.dtype, **model},
        "batch_size": options.case.batch_size,
        "seq_len": options.case.seq_len,
        "default": default_of(options.device).name,
        **{
            name: getattr(options, name)
            for name in (
                *("new_tokens", "prompt_tokens", "in_flight", "block_seconds", "slice_seconds", "slices_in_flight"),
                *("multiprocessors", "projection", "max_in_flight", "seed"),
            )
        },
        **rig.facts(),
        **measured,
        "run_seconds": time.monotonic() - began,
    }
    return result


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, and say whether the goals are met; 1 if anything was not what it is alone."""
    options = _parsed(arguments)
    logging.basicConfig(level=logging.WARNING)
    try:
        result = run(options)
    except DifferenceError as error:
        print(f"FAILED, no figures: {error}", file=sys.stderr)
        return 1
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for verdict in beside_results.judge(result["beside"]):
        met = {True: "met", False: "MISSED", None: "not measured"}[verdict.met]
        print(f"{met}: {verdict.what}: {verdict.measured}; goal: {verdict.limit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
