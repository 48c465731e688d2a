"""The suite on a real node, small and short: what it writes, and that nothing wrong gets figures."""

import dataclasses
import json

import pytest
from bench_processes import run_python

pytest.importorskip("transformers")

from bench.interference import in_process, results
from bench.interference import run as suite

# Of this seed a block's first request comes early: within 0.4 s at the lowest rate that is not refused.
SHORT = [
    *("--quick", "--rounds", "0,1,0", "--block-seconds", "0.4", "--saturation-seconds", "1.5"),
    *("--prompts", "3", "--seed", "38"),
]
LACKING = ("fastapi", "uvicorn", "prometheus_client", "openai", "pytest_benchmark")
HIDER = f"""
from importlib.machinery import PathFinder
found = PathFinder.find_spec
def find_spec(name, *arguments):
    return None if name.partition(".")[0] in {LACKING} else found(name, *arguments)
PathFinder.find_spec = find_spec
"""


def test_a_run_needs_no_server_and_its_report_follows(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "sitecustomize.py").write_text(HIDER)
    assert run_python("-c", "import fastapi", search=[tmp_path]).returncode == 1
    out = tmp_path / "out.json"
    done = run_python("-m", "bench.interference", out, *SHORT, search=[tmp_path])
    assert done.returncode == 0, done.stderr
    assert "goal: at least 40% of its solo rate" in done.stdout
    result = json.loads(out.read_text())[results.KEY]
    (rate,) = result["rates"]
    cells = {cell["condition"]: cell for cell in rate["cells"]}
    assert rate["requests_per_second"] == pytest.approx(0.5 * result["saturation_requests_per_second"])
    chats = [cell["done"] + cell["refused"] for cell in cells.values() if cell["chat"]]
    assert chats[0] > 0
    assert set(chats) == {chats[0]}  # the same arrivals
    solo = cells["validation alone"]["nonces_per_second"]
    assert solo > 0
    for name in ("no pacing", "no pacing, no priorities"):  # threads of low priority may get nothing beside other tests
        assert cells[name]["solo_share"] == pytest.approx(cells[name]["nonces_per_second"] / solo)
    assert cells["chat alone"]["between"]["samples"] == chats[0] * (result["new_tokens"] - 1)
    assert cells["validation alone"]["slices"]["count"] > 0
    assert result["parts_per_batch"] > len(result["planned_slices"])
    reported = run_python("-m", "bench.interference.report", out, search=[tmp_path])
    assert reported.returncode == 0, reported.stderr
    assert "| no pacing |" in (tmp_path / "out.md").read_text()


def test_over_http_a_run_has_a_node_of_its_own(tmp_path):
    pytest.importorskip("httpx2")
    pytest.importorskip("uvicorn")
    out = tmp_path / "out.json"
    done = run_python("-m", "bench.interference", out, "--http", *SHORT)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())[results.KEY]
    cells = {cell["condition"]: cell for cell in result["rates"][0]["cells"]}
    assert result["http"]
    assert len(cells) == 3
    assert cells["validation alone"]["nonces_per_second"] > 0
    assert cells["chat alone"]["done"] > 0


def another_distance(monkeypatch):
    alone = in_process.distances_alone

    def wrong(model, config):
        first, *others = alone(model, config)
        return [dataclasses.replace(first, dist=[first.dist[0] * (1 + 2**-52), *first.dist[1:]]), *others]

    monkeypatch.setattr(in_process, "distances_alone", wrong)


def another_answer(monkeypatch):
    check = in_process.InProcessRig.check

    def wrong(rig, requests):
        for request in requests:
            request.answer[-1] ^= 1
        check(rig, requests)

    monkeypatch.setattr(in_process.InProcessRig, "check", wrong)


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (another_distance, "float32", "the distance of nonce 0 is"),
        (another_answer, "float32", "the first that differs is number 5"),
        (another_answer, "bfloat16", "more than a near tie"),
    ],
)
def test_a_difference_ends_the_run_without_figures(tmp_path, monkeypatch, capsys, change, dtype, message):
    change(monkeypatch)
    out = tmp_path / "out.json"
    assert suite.main([str(out), "--dtype", dtype, *SHORT]) == 1
    told = capsys.readouterr().err
    assert "FAILED, no figures" in told
    assert message in told
    assert not out.exists()
