"""The benchmark of proof forms: small, whole, and its report."""

import json

import pytest
import torch

from bench.proof_forms import __main__ as bench


def test_a_small_run(tmp_path, monkeypatch, capsys):
    path, threads = tmp_path / "forms.json", torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["bench", str(path), "--quick", "--rounds", "2"])
    try:
        assert bench.main() == 0
    finally:
        torch.set_num_threads(threads)
    (case,) = json.loads(path.read_text())["cases"]
    assert (case["case"], case["hidden_size"], case["layers"]) == ("demo@2x16", 256, 4)
    assert all(len(values) == 2 and min(values) >= 0 for values in case["seconds"].values())
    shown = capsys.readouterr().out
    assert shown == path.with_suffix(".md").read_text()
    assert "| demo@2x16 | 256 | 4 of 4 |" in shown


def test_what_comes_once_per_forward_does_not_grow_with_the_layers():
    names = {*bench.FINGERPRINTS, *bench.VECTOR_STEPS}
    seconds = {bench.FORWARD: [2.0, 4.0], **{name: [0.02, 0.04] for name in names}}
    medians = {name: share["median"] for name, share in bench._shares(seconds, 5.0).items()}
    for name in names:
        assert medians[name] == pytest.approx(0.01 if name in bench.PER_LAYER else 0.002)
    assert medians["fingerprint"] == pytest.approx(0.024)
    assert medians["vectors"] == pytest.approx(0.012)


@pytest.mark.parametrize("arguments", [["--cases", "gpt@2x8"], ["--rounds", "1"]])
def test_arguments_that_make_no_sense_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "x.json", *arguments])
    with pytest.raises(SystemExit):
        bench.main()
    assert "must" in capsys.readouterr().err
