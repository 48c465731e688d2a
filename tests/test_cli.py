"""The poc-kernels command."""

from __future__ import annotations

import re

import pytest
import torch

import poc_kernels
from poc_kernels import backends, cli, demo, kernels, reference


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == f"poc-kernels {poc_kernels.__version__}"


def test_verify_lists_every_backend_and_the_one_that_serves(capsys):
    assert cli.main(["verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    on_cpu = [line for line in lines if re.search(r"\scpu\s", line)]
    assert [line.split()[0] for line in on_cpu] == [backend.name for backend in backends.backends()]
    serving = [line.split()[0] for line in on_cpu if "serves this device" in line]
    assert serving == [backends.select(torch.device("cpu")).name]


def test_verify_fails_when_a_backend_gives_a_wrong_answer(capsys, monkeypatch):
    def wrong(*args, **kwargs):
        return reference.project(*args, **kwargs) + 1

    broken = kernels.Backend("broken", wrong, reference.entries, lambda device: None)
    absent = kernels.Backend("absent", wrong, reference.entries, lambda device: "it is not there")
    monkeypatch.setattr(backends, "backends", lambda: (absent, broken))
    monkeypatch.setattr(backends, "_verdicts", {})
    monkeypatch.setattr(backends, "_selected", {})
    assert cli.main(["verify"]) == 1
    output = capsys.readouterr().out
    assert re.search(r"absent +cpu +not available: it is not there", output)
    assert re.search(r"broken +cpu +FAILED, never used: residual", output)
    assert "serves this device" not in output
    assert re.search(r"- +cpu +NOT SERVED: no poc_kernels backend can be used on cpu", output)


def test_verify_says_what_serves_when_one_is_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(backends, "_selected", {})
    monkeypatch.setenv("POC_KERNELS_BACKEND", "reference")
    assert cli.main(["verify"]) == 0
    assert re.search(r"reference +cpu +gives the known answers, serves this device", capsys.readouterr().out)


@pytest.mark.parametrize("command", ["verify", "demo"])
def test_a_backend_that_is_not_there_is_an_error(capsys, monkeypatch, command):
    monkeypatch.setattr(backends, "_selected", {})
    monkeypatch.setenv("POC_KERNELS_BACKEND", "nope")
    assert cli.main([command]) == 1
    shown = capsys.readouterr()
    assert "the backend asked for must be one of" in shown.out + shown.err


def test_verify_covers_every_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [str(device) for device in cli._devices()] == ["cpu", "cuda:0", "cuda:1"]


def test_verify_says_that_there_is_no_native_core(monkeypatch):
    monkeypatch.setattr(cli.native, "load", lambda: None)
    assert cli._native_core() == "not there"


@pytest.mark.parametrize("dim", [1, 100])
def test_demo_finds_one_answer(capsys, dim):
    assert cli.main(["demo", "--dim", str(dim), "--rows", "3", "--block-hash", "abc123"]) == 0
    output = capsys.readouterr().out
    assert "seed 83c870ca523da16c, 3 rows" in output
    assert output.count("same bits") == 4 + sum(
        backend.unavailable(torch.device("cpu")) is None for backend in backends.backends()
    )
    assert "DIFFERENT" not in output


def test_demo_reports_different_answers(capsys, monkeypatch):
    answers = iter("abcdefghijklmnopqrstuvwxyz")
    monkeypatch.setattr(demo, "digest", lambda values: next(answers))
    assert cli.main(["demo", "--dim", "32", "--rows", "2"]) == 1
    assert "DIFFERENT BITS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--dim", "0"], "--dim must be in [1, 16384]"),
        (["demo", "--dim", "16385"], "got 16385"),
        (["demo", "--rows", "1"], "--rows must be at least 2, got 1"),
        ([], "required: command"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
