"""The plan of a run: its conditions, their order, and options that are refused."""

import sys

import pytest
import torch

from bench.interference import plan
from bench.interference import run as suite


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
def test_conditions_of_a_rate_and_their_order():
    light, near = plan.Rate("light", 0.15, 3, True), plan.Rate("near saturation", 0.85, 2, False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    conditions = plan.conditions_at(cpu, light, (0.2,), (0.1, 0.6), True)
    names = [condition.name for condition in conditions]
    shares = [
        *("paced, share 0.05", "paced, share 0.2"),
        *("free, share 0.1, the default", "free, share 0.6", "free, share 0.8"),
    ]
    unpaced = ["no pacing", "no pacing, a part of the GPU", "no pacing, no priorities"]
    assert names == ["chat alone", *shares, *unpaced, "validation alone"]
    equal = {condition.name for condition in conditions if condition.lanes == "equal"}
    assert equal == {"paced, share 0.05", "paced, share 0.2", "no pacing, no priorities"}
    conditions = plan.conditions_at(gpu, near, (0.2,), (0.6,))
    assert [condition.name for condition in conditions] == [
        *("chat alone", "paced, share 0.05", "paced, share 0.1, the default", "free, share 0.8"),
        *("no pacing", "no pacing, no priorities", "validation alone"),
    ]
    assert [condition.name for condition in conditions if condition.lanes == "equal"] == ["no pacing, no priorities"]
    orders = [plan.in_order(names, turn, 3) for turn in range(3)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len({order[0] for order in orders}) == 3


def test_the_default_is_that_of_a_node():
    cpu, gpu = plan.default_of(torch.device("cpu")), plan.default_of(torch.device("cuda", 0))
    assert gpu.name == "paced, share 0.1, the default"
    assert cpu.paced is (sys.platform != "linux")
    assert (cpu.share, gpu.share) == (0.1, 0.1)


def test_only_rounds_that_all_conditions_had_count():
    assert suite.whole_rounds({"a": [1, 2], "b": [3]}) == {"a": [1], "b": [3]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "device must be one that torch has here"),
        (["--case", "gpt@2x8"], "cases must be"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["--block-seconds", "0"], "--block-seconds must be positive, got 0"),
        (["--rounds", "0,0,0"], "--rounds must be positive"),
        (["--rounds", "1,1"], "zip"),
        (["--paced-shares", "1.5"], "share must be in"),
        (["--free-shares", "0"], "share must be in"),
        (["--http", "--case", "qwen3-0.6b@2x8"], "--http takes the demonstration's model"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    if "cuda" in arguments:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        plan.parse([str(tmp_path / "out.json"), *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
