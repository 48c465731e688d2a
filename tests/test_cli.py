"""The poc-kernels command."""

from __future__ import annotations

import json
import logging
import re
import sys

import pytest
import torch

pytest.importorskip("fastapi")
from conform_stand_in import MODEL, stand_in
from helpers import run_python

import poc_kernels
from poc_kernels import backends, cli, kernels, reference
from poc_kernels.node.settings import OPTIONS, Settings, described
from poc_kernels.service.settings import REQUIRED


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
    monkeypatch.setattr(kernels.trial, "verdicts", {})
    monkeypatch.setattr(backends, "_selected", {})
    assert cli.main(["verify"]) == 1
    output = capsys.readouterr().out
    assert re.search(r"absent +cpu +not available: it is not there", output)
    assert re.search(r"broken +cpu +FAILED, never used: residual", output)
    assert "serves this device" not in output
    assert re.search(r"- +cpu +NOT SERVED: no poc_kernels backend can be used on cpu", output)


@pytest.mark.parametrize("error", [ValueError("no such arithmetic"), RuntimeError("CUDA error: out of memory")])
def test_verify_goes_on_where_a_backend_cannot_be_tried(capsys, monkeypatch, error):
    def raising(device):
        raise error

    monkeypatch.setattr(
        *(backends, "backends"),
        lambda: tuple(
            kernels.Backend(name, reference.project, reference.entries, raising) for name in ("one", "other")
        ),
    )
    monkeypatch.setattr(backends, "_selected", {})
    assert cli.main(["verify"]) == 1
    output = capsys.readouterr().out
    assert re.findall(r"(\w+) +cpu +NOT TRIED: (.*)", output) == [("one", str(error)), ("other", str(error))]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["serve"], "required: --model"),
        (["serve", "--model", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["serve", "--model", "x", "--port", "http"], "invalid int value: 'http'"),
        (["demo", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["demo", "--batch-size", "0"], "argument --batch-size: must be at least 1, got 0"),
        (["demo", "--seq-len", "x"], "argument --seq-len: invalid positive_int value: 'x'"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def logs_as_before():
    root, transformers = logging.getLogger(), logging.getLogger("transformers")
    before = root.handlers, root.level, transformers.handlers, transformers.level
    yield
    root.handlers, root.level, transformers.handlers, transformers.level = before


@pytest.mark.usefixtures("logs_as_before")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "poc-kernels: port must be in [0, 65536), got 70000"),
        (["--temperature", "-1"], "poc-kernels: temperature must be at least 0, got -1.0"),
        (["--max-in-flight", "0"], "poc-kernels: max_in_flight must be positive, got 0"),
        (["--validation-share", "1"], "poc-kernels: validation_share must be in (0, 1), got 1.0"),
        (["--validation-wait-seconds", "-1"], "poc-kernels: validation_wait_seconds must be at least 0, got -1.0"),
        (["--slice-seconds", "0"], "poc-kernels: slice_seconds must be positive, got 0.0"),
        (["--slices-in-flight", "0"], "poc-kernels: slices_in_flight must be positive, got 0"),
        (["--validation-sms", "0"], "poc-kernels: validation_sms must be positive, got 0"),
        (["--result-seconds", "0"], "poc-kernels: result_seconds must be positive, got 0.0"),
        (["--kv-memory", "1.5"], "poc-kernels: kv_memory must be in (0, 1), got 1.5"),
        ([], "nowhere' does not exist"),
    ],
)
def test_serve_says_why_it_does_not_start(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["serve", "--model", str(tmp_path / "nowhere"), *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("logs_as_before")
def test_serve_takes_settings_and_secrets(monkeypatch):
    served = []
    monkeypatch.setattr("poc_kernels.node.server.serve", served.append)
    monkeypatch.setenv("POC_KERNELS_TOKEN", "secret")
    monkeypatch.setenv("POC_KERNELS_CALLBACK_KEY", "key")
    assert cli.main(["serve", "--model", "m", "--random-projection", "--no-cuda-graphs", "--port", "0"]) == 0
    (settings,) = served
    assert settings == Settings(
        model="m", random_projection=True, cuda_graphs=False, port=0, token="secret", callback_key="key"
    )


@pytest.mark.usefixtures("logs_as_before")
def test_serve_takes_the_settings_of_validation(monkeypatch):
    served = []
    monkeypatch.setattr("poc_kernels.node.server.serve", served.append)
    given = {
        "max_queued_nonces": 5000,
        "result_seconds": 60.5,
        "validation_share": 0.25,
        "validation_wait_seconds": 0.0,
        "slice_seconds": 0.001,
        "slices_in_flight": 3,
        "validation_sms": 16,
    }
    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["serve", "--model", "m", *flags]) == 0
    assert served == [Settings(model="m", **given)]


def test_serve_s_defaults_are_the_settings_(monkeypatch):
    served = []
    monkeypatch.setattr("poc_kernels.node.server.serve", served.append)
    monkeypatch.setattr("poc_kernels.node.logs.configure", lambda *_: None)
    for variable in ("POC_KERNELS_TOKEN", "POC_KERNELS_CALLBACK_KEY"):
        monkeypatch.delenv(variable, raising=False)
    assert cli.main(["serve", "--model", "m"]) == 0
    assert served == [Settings(model="m")]


@pytest.mark.usefixtures("logs_as_before")
@pytest.mark.parametrize("variable", ["POC_KERNELS_TOKEN", "POC_KERNELS_CALLBACK_KEY"])
def test_an_empty_secret_is_refused(capsys, monkeypatch, variable):
    monkeypatch.setattr("poc_kernels.node.server.serve", lambda settings: pytest.fail("served"))
    monkeypatch.setenv(variable, "")
    assert cli.main(["serve", "--model", "m"]) == 1
    assert f"poc-kernels: {variable} must not be empty; leave it out for none" in capsys.readouterr().err


def test_only_secrets_come_from_the_environment(monkeypatch):
    served, configured = [], []
    monkeypatch.setattr("poc_kernels.node.server.serve", served.append)
    monkeypatch.setattr("poc_kernels.node.logs.configure", lambda *chosen: configured.append(chosen))
    monkeypatch.setenv("POC_KERNELS_PORT", "tcp://10.0.0.1:8000")  # as Kubernetes sets it
    monkeypatch.setenv("POC_KERNELS_MAX_IN_FLIGHT", "7")
    assert cli.main(["serve", "--model", "m", "--log-level", "error", "--log-format", "text"]) == 0
    assert served == [Settings(model="m", log_level="error", log_format="text")]
    assert configured == [("error", "text")]


@pytest.mark.parametrize("option", ["--token", "--callback-key"])
def test_secrets_are_no_options(capsys, option):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", "--model", "m", option, "secret"])
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {option} secret" in capsys.readouterr().err


def test_serve_help_has_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--model MODEL directory, or id on the Hugging Face hub, of a causal language model (required)" in shown
    assert "--drain-seconds X seconds of GENERATING before requests in flight are paused" in shown
    assert "requests in flight are paused (at least 0; default: 5)" in shown
    assert "--validation-pacing {auto,paced,free}" in shown
    assert "POC_KERNELS_TOKEN: bearer token" in shown
    for each in OPTIONS:
        option, default, _ = described(each)
        assert f" {option} " in shown
        assert each.default is REQUIRED or f"default: {default})" in shown


@pytest.mark.parametrize("command", ["verify", "serve", "demo", "conform"])
def test_help_tells_no_default_where_there_is_none(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "None" not in shown
    assert command != "demo" or "nonces per forward (default: 16)" in shown


WITHOUT_TRANSFORMERS = """
import sys
sys.stderr = sys.stdout
sys.modules["transformers"] = None
from poc_kernels import cli
print(cli.main({arguments}))
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--model", "m"], "poc-kernels: serving needs transformers: pip install 'poc-kernels[serve]'"),
        (["demo"], "poc-kernels: the demo needs transformers: pip install 'poc-kernels[demo]'"),
    ],
)
def test_missing_libraries_are_named(tmp_path, arguments, message):
    script = WITHOUT_TRANSFORMERS.format(arguments=arguments).replace(
        "import sys", "import sys; sys.stderr = sys.stdout"
    )
    assert run_python(script, tmp_path).splitlines() == [message, "1"]


def test_demo_passes_its_options_on(monkeypatch, tmp_path):
    played = []
    monkeypatch.setattr("poc_kernels.demo.run.run", lambda **options: played.append(options) or 0)
    arguments = ["--model", "m", "--device", "cuda", "--report", str(tmp_path / "r.html"), "--batch-size", "4"]
    assert cli.main(["demo", *arguments, "--seq-len", "32"]) == 0
    (options,) = played
    assert (options["plan"].rows, options["plan"].seq_len) == (4, 32)
    assert (options["model"], options["device"], options["report"]) == ("m", "cuda", tmp_path / "r.html")


def test_demo_needs_a_backend(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_serving", lambda device: (None, "no backend"))
    assert cli.main(["demo"]) == 1
    assert "poc-kernels: no backend" in capsys.readouterr().err


def test_conform_tells_each_check_and_fails_where_the_wire_is_not_spoken(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("POC_KERNELS_TOKEN", "the-token")
    with stand_in() as (server, url):
        options = ["conform", "--url", url, "--only", "health", "--only", "verdict.nan", "--timeout", "20"]
        assert cli.main(options) == 0
        lines = capsys.readouterr().out.splitlines()
        server.reset("not_finite_agrees")
        assert cli.main(options) == 0
        assert cli.main([*options, "--strict"]) == 1
        server.reset("unhealthy")
        report = tmp_path / "report.json"
        chosen = ["--proof", "fingerprint", "--prefix", "/api/v1/pow", "--model", MODEL, "--batch-size", "4"]
        assert cli.main([*options, *chosen, "--json", str(report)]) == 1
    assert re.findall(r"^pass +(\S+)", "\n".join(lines), re.MULTILINE) == [
        *("idle_before", "model", "health", "verdict.nan", "left_idle")
    ]
    assert re.fullmatch(r"5 checks in .* s: 5 pass, 0 fail, 0 skipped, 0 hole", lines[-1])
    content = json.loads(report.read_text())
    assert (content["counts"]["fail"], content["plan"]["proof"], content["plan"]["batch_size"]) == (1, "fingerprint", 4)
    assert "the-token" not in report.read_text()


def test_conform_says_before_all_is_played_that_it_cannot_write_its_report(capsys, tmp_path):
    assert cli.main(["conform", "--url", "http://127.0.0.1:1", "--json", str(tmp_path / "no" / "report.json")]) == 1
    out, err = capsys.readouterr()
    assert (out, "poc-kernels: [Errno 2]" in err) == ("", True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--url", "nowhere"], "poc-kernels: url must be http or https with a host"),
        (["--url", "http://127.0.0.1:1", "--only", "nope"], "poc-kernels: only must be names of checks"),
        (["--url", "http://127.0.0.1:1", "--callback-host", "a@b"], "poc-kernels: callback_host must be a host"),
    ],
)
def test_conform_names_what_is_wrong_with_its_options(capsys, options, message):
    assert cli.main(["conform", *options]) == 1
    assert message in capsys.readouterr().err


def test_conform_says_what_to_install(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("poc_kernels.conform")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    assert cli.main(["conform", "--url", "http://127.0.0.1:1"]) == 1
    assert "conform needs httpx2: pip install 'poc-kernels[service]'" in capsys.readouterr().err
