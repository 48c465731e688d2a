"""Measures the conditions of a plan on a node, and writes the figures."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.common.conditions import conditions as conditions_of_run
from bench.interference import chat, results
from bench.interference.in_process import InProcessRig
from bench.interference.load import Block, Condition, DifferenceError, Rig, poisson, regular, run_block, saturation
from bench.interference.plan import (
    ALONE,
    SOLO,
    Rate,
    conditions_at,
    conditions_of_vllm,
    default_name,
    default_of,
    in_order,
    parse,
)
from bench.interference.prefill import measure_prefill


def progress(text: str) -> None:
    """Tell whoever waits how far the run is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def measure_rate(
    rig: Rig, rate: Rate, per_second: float, conditions: list[Condition], options: argparse.Namespace
) -> dict[Condition, list[Block]]:
    """Run the blocks of each condition at one rate; in each round all get the same arrivals."""
    blocks: dict[Condition, list[Block]] = {condition: [] for condition in conditions}
    for turn in range(rate.rounds):
        seed = f"{options.seed} {rate.name} {turn}"
        if rate.every_seconds is None:
            arrivals = poisson(per_second, options.block_seconds, rig.prompts, seed)
        else:
            arrivals = regular(rate.every_seconds, options.block_seconds, rig.prompts, seed)
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
    """Keep only the rounds that every condition had."""
    rounds = min(map(len, blocks.values()))
    return {condition: some[:rounds] for condition, some in blocks.items()}


async def measure(rig: Any, rates: list[Rate], options: argparse.Namespace) -> dict[str, Any]:
    """Measure the saturation rate, then every rate.

    Raises:
        DifferenceError: something computed while users are served is not what was computed alone.
    """
    try:
        await rig.start(options.timeout_seconds)
        progress("answers and distances alone are known")
        gc.collect()
        gc.freeze()  # libraries' own objects are not looked through in every block
        return await measure_all(rig, rates, options)
    finally:
        gc.unfreeze()
        await rig.close()


async def measure_all(rig: Any, rates: list[Rate], options: argparse.Namespace) -> dict[str, Any]:
    """Do the same on a rig that has started."""
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
            options.device, rate, options.paced_shares, options.free_shares, bool(options.sms)
        )
        per_second = rate.per_second(saturated)
        blocks = await measure_rate(rig, rate, per_second, conditions, options)
        cells = results.cells(blocks, options.seed)
        measured.append(
            {"name": rate.name, "fraction": per_second / saturated, "requests_per_second": per_second, "cells": cells}
        )
    return {"saturation_requests_per_second": saturated, "rates": measured, "prefill": await prefill(rig, options)}


async def prefill(rig: Any, options: argparse.Namespace) -> dict[str, Any] | None:
    """Compare proofs alone with the server's own prompts alone; None where it is not vLLM."""
    if options.engine != results.VLLM or options.prefill_rounds == 0:
        return None
    return await measure_prefill(
        rig, SOLO, options.case.seq_len, options.prefill_rounds, options.block_seconds, options.timeout_seconds
    )


def _in_process(options: argparse.Namespace, served: chat.Served, directory: Path) -> Any:
    return InProcessRig(
        served,
        new_tokens=options.new_tokens,
        prompt_tokens=options.prompt_tokens,
        prompt_count=options.prompts,
        projection=options.projection,
        slice_seconds=options.slice_seconds,
        slices_in_flight=options.slices_in_flight,
        sms=options.sms,
        seed=options.seed,
    )


def _over_http(options: argparse.Namespace, served: chat.Served, directory: Path) -> Any:
    from bench.interference.over_http import HttpRig  # not above: a bare GPU machine has no HTTP client

    return HttpRig(
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


def _in_vllm(options: argparse.Namespace, served: chat.Served, directory: Path) -> Any:
    from bench.interference.over_vllm import VllmRig

    return VllmRig(
        options.vllm_python,
        directory,
        served,
        conditions=conditions_of_vllm(options.paced_shares),
        new_tokens=options.new_tokens,
        prompt_tokens=options.prompt_tokens,
        prompt_count=options.prompts,
        projection=options.projection,
        slice_seconds=options.slice_seconds,
        seed=options.seed,
        ready_seconds=3 * options.timeout_seconds,
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return the results as they are written.

    Raises:
        DifferenceError: something computed while users are served is not what was computed alone.
        RuntimeError: the node failed.
    """
    result = conditions_of_run(options.device)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # Over HTTP the model in this process only says what to expect.
        device = torch.device("cpu") if options.http else options.device
        served = chat.build(options.case, getattr(torch, options.dtype), device, Path(folder))
        make_rig = _in_vllm if options.engine == results.VLLM else _over_http if options.http else _in_process
        rig = make_rig(options, served, Path(folder))
        measured = asyncio.run(measure(rig, options.rates, options))
    result[results.KEY] = {
        "engine": options.engine,
        "device": options.device.type,
        "http": options.http,
        "quick": options.quick,
        "model": {
            "name": options.case.model,
            "dtype": options.dtype,
            "layers": served.layers,
            "parameters": served.parameters,
        },
        "batch_size": options.case.batch_size,
        "seq_len": options.case.seq_len,
        "default": default_name(options.engine, options.device),
        **{
            name: getattr(options, name)
            for name in (
                *("new_tokens", "prompt_tokens", "in_flight", "block_seconds", "slice_seconds", "slices_in_flight"),
                *("projection", "max_in_flight", "seed"),
            )
        },
        "multiprocessors": options.sms,
        **rig.facts(),
        **measured,
        "run_seconds": time.monotonic() - began,
    }
    return result


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, and print whether the goals are met; returns 1 if anything differs from what it is alone."""
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING)
    try:
        result = run(options)
    except DifferenceError as error:
        print(f"FAILED, no figures: {error}", file=sys.stderr)
        return 1
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for verdict in results.judge(result[results.KEY]):
        met = {True: "met", False: "MISSED", None: "not shown"}[verdict.met]
        print(f"{met}: {verdict.what}: {verdict.measured}; goal: {verdict.limit}")
    return 0
