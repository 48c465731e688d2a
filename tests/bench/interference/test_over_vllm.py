"""The suite on a stand-in for vLLM: what it writes, that nothing wrong gets figures, and what its plugin changes."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import vllm_serve_stand_in

pytest.importorskip("transformers")
pytest.importorskip("httpx2")
pytest.importorskip("uvicorn")

from bench.interference import plan, results
from bench.interference import run as suite

# Of this seed a block's first request comes early, as in test_run.py.
SHORT = [
    *("--quick", "--engine", "vllm", "--rounds", "0,1,0", "--block-seconds", "0.4", "--saturation-seconds", "1.5"),
    *("--prompts", "3", "--seed", "38", "--prefill-rounds", "2"),
]


def environment_of(folder, *options):
    """Return the Python of an environment whose vllm is the stand-in, with the plugin of this package."""
    described = folder / "packages" / "poc_kernels-0.dist-info"
    (folder / "packages" / "vllm").mkdir(parents=True)
    (folder / "packages" / "vllm" / "__init__.py").touch()
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: poc-kernels\nVersion: 0\n")
    (described / "entry_points.txt").write_text("[vllm.endpoint_plugins]\npoc_kernels = plugin:PoCEndpoints\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}/packages:$PYTHONPATH" exec {sys.executable} "$@"\n')
    vllm = folder / "vllm"
    vllm.write_text(f'#!/bin/sh\nexec {sys.executable} {vllm_serve_stand_in.__file__} "$@" {" ".join(options)}\n')
    for script in (python, vllm):
        script.chmod(0o755)
    return python


@pytest.fixture
def package_in_path(monkeypatch):
    """Have processes find what this one imports."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


@pytest.mark.usefixtures("package_in_path")
def test_a_run_measures_every_share_and_prompts_alone_and_its_report_follows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from bench.interference import report

    out = tmp_path / "out.json"
    python = environment_of(tmp_path / "environment")
    assert suite.main([str(out), *SHORT, "--paced-shares", "0.5", "--vllm-python", str(python)]) == 0
    result = json.loads(out.read_text())[results.KEY]
    assert (result["engine"], result["default"]) == ("vllm", "paced, share 0.1, the default")
    (rate,) = result["rates"]
    cells = {cell["condition"]: cell for cell in rate["cells"]}
    assert list(cells) == [
        *("chat alone", "paced, share 0.05", "paced, share 0.1, the default", "paced, share 0.5"),
        *("whole batches", "validation alone"),
    ]
    for cell in cells.values():
        assert (cell["engine"]["steps"] > 0) is cell["chat"]
        assert (cell["engine"]["slices"] > 0) is cell["validation"]
    alone = cells["chat alone"]["engine"]
    assert results.bound(cells["chat alone"]) == pytest.approx(1 - alone["steps_share"])
    prefill = result["prefill"]
    assert len(prefill["rounds"]) == 2
    assert all(each["tokens_per_step"] == 4 * 16 for each in prefill["rounds"])
    assert prefill["ratio"][0] > 0
    monkeypatch.setattr(sys, "argv", ["report", str(out)])
    report.main()
    text = (tmp_path / "out.md").read_text()
    assert "| whole batches |" in text
    assert "p95 / alone (95 %)" in text
    assert "leaves validation **" in text
    assert "in steps of 64 tokens" in text


@pytest.mark.usefixtures("package_in_path")
@pytest.mark.parametrize(
    ("wrong", "message"), [("distance", "the distance of nonce"), ("token", "an answer to prompt")]
)
def test_a_difference_ends_the_run_without_figures(tmp_path, capsys, wrong, message):
    out = tmp_path / "out.json"
    python = environment_of(tmp_path / "environment", wrong)
    assert suite.main([str(out), *SHORT, "--vllm-python", str(python)]) == 1
    told = capsys.readouterr().err
    assert "FAILED, no figures" in told
    assert message in told
    assert not out.exists()


@pytest.mark.parametrize(
    ("has_vllm", "has_package", "message"),
    [(False, True, "it has no vLLM"), (True, False, "it has no installed poc-kernels")],
)
def test_an_environment_without_vllm_or_the_package_is_refused(tmp_path, capsys, has_vllm, has_package, message):
    python = environment_of(tmp_path / "environment")
    packages = tmp_path / "environment" / "packages"
    if not has_vllm:
        (packages / "vllm" / "__init__.py").unlink()
        (packages / "vllm").rename(packages / "another")
    if not has_package:
        (packages / "poc_kernels-0.dist-info" / "entry_points.txt").unlink()
    with pytest.raises(SystemExit):
        plan.parse([str(tmp_path / "out.json"), "--engine", "vllm", "--vllm-python", str(python)])
    assert message in capsys.readouterr().err


def test_a_place_without_an_environment_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        plan.parse([str(tmp_path / "out.json"), "--engine", "vllm", "--vllm-python", str(tmp_path / "python")])
    assert "--vllm-python must be the Python of an environment with vLLM" in capsys.readouterr().err


def test_the_plan_has_a_rate_of_its_own_and_both_ends_of_the_share(tmp_path, monkeypatch):
    python = environment_of(tmp_path / "environment")
    monkeypatch.chdir(tmp_path)
    options = plan.parse(["out.json", "--engine", "vllm", "--vllm-python", str(python.relative_to(tmp_path))])
    assert options.vllm_python == python
    assert [(rate.name, rate.per_second(20.0)) for rate in options.rates] == [
        ("one chat every 0.25 s", 4),
        ("light", 3),
    ]
    shares = [condition.share for condition in plan.conditions_of_vllm(options.paced_shares)]
    assert shares == [None, 0.05, 0.1, 0.3, 0.5, 0.8, None, None]
    assert str(options.case) == "demo@8x64"


class Prover:
    def __init__(self, device):
        self.device, self.asked = device, []

    def prove(self, config, rows, pause=None, then=()):
        self.asked.append((rows, list(then)))
        return rows


def test_the_plugin_changes_the_share_and_has_whole_batches_computed_alone():
    testclient = pytest.importorskip("starlette.testclient")
    from fastapi import FastAPI

    from bench.interference.vllm_plugin import BenchEndpoints
    from poc_kernels.engines.vllm.remote import RemoteDevice

    app, plugin = FastAPI(), BenchEndpoints()
    link = SimpleNamespace(users=lambda: 3, sleep=lambda seconds: None, cancelled=False)
    device = RemoteDevice(link, share=0.1)
    prover = Prover(device)
    app.state.poc_kernels = SimpleNamespace(service=SimpleNamespace(manager=SimpleNamespace(prover=prover)))
    plugin.attach_router(app)
    http = testclient.TestClient(app)

    def switch(share, whole):
        assert http.post("/bench/condition", json={"share": share, "whole_batches": whole}).status_code == 200

    before = device.budget()
    assert (before["share"], before["alone"]) == (0.1, False)
    switch(0.5, False)
    assert device.budget() == {**before, "share": 0.5}
    prover.prove("config", "rows", None, ["next"])
    switch(None, True)
    assert device.budget()["alone"]
    assert device.budget()["slices"] > 10_000
    prover.prove("config", "rows", None, ["next"])
    switch(0.1, False)
    assert device.budget() == before
    prover.prove("config", "rows", None, ["next"])
    assert prover.asked == [("rows", ["next"]), ("rows", []), ("rows", ["next"])]
