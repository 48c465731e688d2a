"""The suite beside inference on a real node, small and short: what it writes, and that nothing wrong gets figures."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
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


def run(folder, *arguments):
    search = os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_run_needs_no_server_and_its_report_follows(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "sitecustomize.py").write_text(HIDER)
    assert run(tmp_path, "-c", "import fastapi").returncode == 1
    done = run(tmp_path, ROOT / "bench" / "beside.py", "out.json", *SHORT)
    assert done.returncode == 0, done.stderr
    assert "goal: at least 40% of its solo rate" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())["beside"]
    (rate,) = result["rates"]
    cells = {cell["condition"]: cell for cell in rate["cells"]}
    assert rate["requests_per_second"] == pytest.approx(0.5 * result["saturation_requests_per_second"])
    chats = [cell["done"] + cell["refused"] for cell in cells.values() if cell["chat"]]
    assert chats[0] > 0
    assert set(chats) == {chats[0]}  # the same arrivals
    assert cells["validation alone"]["nonces_per_second"] > 0
    assert cells["no pacing"]["solo_share"] > 0
    assert cells["no pacing, no priorities"]["solo_share"] > 0
    assert cells["chat alone"]["between"]["samples"] == chats[0] * (result["new_tokens"] - 1)
    assert cells["validation alone"]["slices"]["count"] > 0
    assert result["parts_per_batch"] > len(result["planned_slices"])
    reported = run(tmp_path, ROOT / "bench" / "beside_report.py", "out.json")
    assert reported.returncode == 0, reported.stderr
    assert "| no pacing |" in (tmp_path / "out.md").read_text()


def test_over_http_a_run_has_a_node_of_its_own(tmp_path):
    pytest.importorskip("httpx2")
    pytest.importorskip("uvicorn")
    done = run(tmp_path, ROOT / "bench" / "beside.py", "out.json", "--http", *SHORT)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())["beside"]
    cells = {cell["condition"]: cell for cell in result["rates"][0]["cells"]}
    assert result["http"]
    assert len(cells) == 3
    assert cells["validation alone"]["nonces_per_second"] > 0
    assert cells["chat alone"]["done"] > 0


def another_distance(m, monkeypatch):
    alone = m.distances_alone

    def wrong(model, config):
        first, *others = alone(model, config)
        return [dataclasses.replace(first, dist=[first.dist[0] * (1 + 2**-52), *first.dist[1:]]), *others]

    monkeypatch.setattr(m, "distances_alone", wrong)


def another_answer(m, monkeypatch):
    check = m.Node.check

    def wrong(node, requests):
        for request in requests:
            request.answer[-1] ^= 1
        check(node, requests)

    monkeypatch.setattr(m.Node, "check", wrong)


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (another_distance, "float32", "the distance of nonce 0 is"),
        (another_answer, "float32", "the first that differs is number 5"),
        (another_answer, "bfloat16", "more than a near tie"),
    ],
)
def test_a_difference_ends_the_run_without_figures(module, tmp_path, monkeypatch, capsys, change, dtype, message):
    change(module("beside_node"), monkeypatch)
    out = tmp_path / "out.json"
    assert module("beside").main([str(out), "--dtype", dtype, *SHORT]) == 1
    told = capsys.readouterr().err
    assert "FAILED, no figures" in told
    assert message in told
    assert not out.exists()


def test_leads_are_those_of_a_plain_forward(module, tmp_path):
    m = module("beside_models")
    case = module("round_models").Case("demo", 1, 2, 4)
    served = m.build(case, torch.float32, torch.device("cpu"), tmp_path)
    assert served.layers == 1
    prompt, answer = [5, 6, 7], []
    with torch.inference_mode():
        for _ in range(3):
            logits = served.model(torch.tensor([prompt + answer]), use_cache=False).logits[0, -1]
            answer.append(int(logits.argmax()))
        first, second = logits.topk(2).values
    margins = m.Margins(served.model)
    assert margins.exact
    lead = margins.lead(prompt, answer)
    assert 0 < lead <= float((first - second) / (first - logits.mean())) * (1 + 1e-5)
    least = int(logits.argmin())
    expected = float((logits[least] - first) / (first - logits.mean()))
    assert margins.lead(prompt, [*answer[:2], least]) == pytest.approx(expected, rel=1e-4)


def test_a_part_of_a_real_model_is_refused(module, tmp_path):
    case = module("round_models").Case("qwen3-0.6b", 2, 2, 4)
    with pytest.raises(ValueError, match="case must be a whole model"):
        module("beside_models").build(case, torch.float32, torch.device("cpu"), tmp_path)


def test_prompts_are_of_the_seed_and_their_lengths_spread(module):
    prompts = module("beside_models").prompts
    made = prompts(200, 8, 500, 1)
    assert made == prompts(200, 8, 500, 1) != prompts(200, 8, 500, 2)
    assert {len(prompt) for prompt in made} == set(range(4, 13))
    assert all(3 <= token < 500 for prompt in made for token in prompt)
