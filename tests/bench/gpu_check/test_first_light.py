"""First light: what it says of wrong results, what its table has, and that it goes on and ends."""

import json
import os
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from bench_processes import ROOT, with_package

pytest.importorskip("triton")
from bench.gpu_check import driver, first_light, light_checks, light_rates, light_table, light_times
from bench.projection import model
from poc_kernels.kernels import native
from poc_kernels.kernels.cuda import launcher


def test_wrong_rows_and_columns_are_named():
    expected = torch.zeros(40, 300, dtype=torch.bfloat16)
    assert light_checks.difference(expected.clone(), expected) is None
    y = expected.clone()
    y[16:32, 64:128] = 1.0
    y[3, 7] = -0.0
    said = light_checks.difference(y, expected)
    assert said.startswith("WRONG: 1025 of 12000; rows 3, 16-31; columns 7, 64-127; first at [3, 7]: ")
    assert light_checks.ranges(list(range(0, 40, 2)), most=3) == "0, 2, 4 and 17 more"


def test_picks_in_another_order_are_found(monkeypatch):
    assert light_checks.picked(torch.device("cpu")) is None
    as_here = light_checks.picks
    monkeypatch.setattr(light_checks, "picks", lambda *arguments: as_here(*arguments).flip(1))
    assert light_checks.picked(torch.device("cpu")).startswith("2 of 256 in another order than torch's: WRONG: ")
    monkeypatch.setattr(light_checks, "picks", lambda *arguments: as_here(*arguments).sort(dim=1).values)
    assert "in another order" in light_checks.picked(torch.device("cpu"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_order_of_picks_is_checked_first_of_all(device):
    """It rests on torch alone, and the network's wire on it."""
    names = [task.name for task in first_light.checks(device, (9, 0), 132, [])]
    assert names[:2] == ["torch", "order of the picks of vectors"]


@pytest.mark.parametrize("rows", sorted({rows for _, rows in light_times.GROUPS}))
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 3)])
def test_every_form_that_is_timed_is_checked_before(capability, rows):
    checked = {*light_checks.table_forms(capability), *light_times.forms_to_check(capability, light_times.SIZE, 132)}
    names = {first_light._check_name(form) for form in checked}
    for bits in (16, 8):
        forms = light_times.variants(capability, bits, rows, light_times.SIZE, 132)
        assert forms[0] == light_times.table_form(capability, bits, rows, light_times.SIZE, 132)
        assert len(forms) == len(set(forms))
        if (bits, rows) in light_times.GROUPS:
            assert {first_light._check_name(form) for form in forms} <= names


FACTS = {"name": "GPU", "capability": [9, 0], "sms": 132}


REFUSED = {"cuda": None, "triton": "leaves out a fence", "reference": None}


def test_code_that_triton_compiles_where_it_is_refused_is_no_failure():
    facts = {**FACTS, "launcher": "bench.gpu_check.driver", "backends": REFUSED}
    checks = {"torch": None, "shipped hash": None, "shipped entries": None, "product 16 bits": "WRONG: 1 of 2"}
    assert light_table.text(facts, checks, {}, {}).splitlines() == [
        "FIRST LIGHT on GPU: 3 checks are right, 1 are not, 0 not made",
        "  shipped code, launched by bench.gpu_check.driver: 2 of 2 checks are right",
        "  Triton's code is not used here, whatever its checks say: leaves out a fence",
        "  refused, and not right: product 16 bits: WRONG: 1 of 2",
        "rates: not measured",
    ]
    assert light_table.failures(facts, checks) == {}
    checks |= {"shipped hash": "WRONG: 3 of 4", "torch": "WRONG"}
    assert set(light_table.failures(facts, checks)) == {"torch", "shipped hash"}
    assert "  NOT RIGHT shipped hash: WRONG: 3 of 4" in light_table.text(facts, checks, {}, {})
    assert set(light_table.failures(FACTS, checks)) == {"torch", "shipped hash", "product 16 bits"}


def test_machine_code_that_is_not_there_is_a_line():
    reason = "sm_90.tar.xz was compiled from other sources than those that are installed"
    facts = {**FACTS, "launcher": None, "backends": {"cuda": reason, "triton": None}}
    lines = light_table.text(facts, {"entries": None}, {}, {}).splitlines()
    assert lines[1:] == [f"  SHIPPED CODE NOT CHECKED: {reason}", "rates: not measured"]
    assert light_table.failures(facts, {"entries": None}) == {}


def test_the_table_holds_times_against_the_model():
    chosen, other = light_times.variants((9, 0), 16, 8192, light_times.SIZE, 132)[:2]
    times = {
        "16 8192": [
            {"name": str(other), "seconds": 1e-3, "error": None},
            {"name": "stored", "seconds": 1.4e-3, "error": None},
            {"name": str(chosen), "seconds": 2e-3, "error": None},
            {"name": "a third", "seconds": None, "error": "WRONG: 3 of 9"},
        ]
    }
    rates = {"l2_bytes": 5e12, "clocks per LOP3": 2.0, "clock_hz": 1.5e9}
    checks = {"entries": None, "graph": "not done after 3 s", "late": "out of time before it began"}
    lines = light_table.text(FACTS, checks, rates, times).splitlines()
    assert lines[0] == "FIRST LIGHT on GPU: 1 checks are right, 1 are not, 1 not made"
    assert lines[1:3] == ["  NOT RIGHT graph: not done after 3 s", "  not made: late"]
    assert any("l2_bytes" in line and "5e+12  assumed 6e+12" in line for line in lines)
    assert any("clocks per LOP3" in line and "assumed" not in line for line in lines)
    measured = light_table.measured_rates(rates)
    assert (measured.l2_bytes, measured.busy_clock_hz, measured.sms) == (5e12, 1.5e9, 132)
    predicted = 1e6 * model.call(8192, light_times.SIZE, 16, measured).total
    first, second, third, fourth = lines[-4:]
    assert first.startswith("16 bits, M = 8192: stored 1400.0 us, model ")
    assert second.split()[:3] == ["1000.0", "us", "0.71x"]
    assert f"2000.0 us  1.43x  model {predicted:7.1f}  {chosen} <- the table's" in third
    assert fourth == "  NOT TIMED a third: WRONG: 3 of 9"


COMPILED = """
import json, sys
from bench.gpu_check import light_rates
import triton_compiled

def compiled(name, types, constants, warps):
    aligned = tuple(argument for argument, kind in types.items() if kind[0] == "*")
    request = (light_rates.__name__, name, types, constants, aligned, ("cuda", 90, 32), {"num_warps": warps})
    return triton_compiled._compile(*request)

size = light_rates.WARPS * 32 * light_rates.CHAINS
loops = {}
for name, asm in light_rates.ASM.items():
    types = {"out": "*i32", "a": "i32", "b": "i32", "turns": "i32"}
    code = compiled("instructions_kernel", types, {"ASM": asm, "SIZE": size}, light_rates.WARPS)
    assert code.spills == 0
    loops[name] = max(code.code.loops, key=lambda loop: loop.count(name.replace(".", "[.]"))).histogram
types = {"source": "*i32", "out": "*i32", "words": "i32", "turns": "i32"}
assert compiled("read_kernel", types, {"SIZE": 4096}, 8).count(r"LDG[.]E[.]128[.]STRONG|LDG[.]E[.]128")
for stride in (1, 4):
    constants = {"STRIDE": stride, "SIZE": 1024, "WORDS": 2**20}
    assert compiled("add_kernel", {"out": "*i32", "turns": "i32"}, constants, 4).count("RED|ATOMG")
print(json.dumps(loops))
"""


def test_the_kernels_that_measure_rates_hold_what_they_are_named_after():
    """Compiled for sm_90: the loop has each instruction as often as the clocks are divided by."""
    search = (ROOT, ROOT / "tests" / "support")
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=ROOT,
        env=with_package(*search, TRITON_INTERPRET="0"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    number = light_rates.REPEATED * light_rates.CHAINS
    for name, loop in json.loads(done.stdout).items():
        assert loop[name.split(".")[0]] >= number, (name, loop)
        others = {"IMAD.WIDE": number}.get(name, 0)  # its xor
        assert sum(loop.values()) <= number + others + 24, (name, loop)


def test_make_starts_it_from_the_sources():
    arguments = [
        "make",
        "-n",
        "--no-print-directory",
        "gpu-first-light",
        "DEVICE=cpu",
        "PYTHON=python",
        "GPU_CHECK_OUT=here",
    ]
    recipe = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert recipe.startswith(f'PYTHONPATH="{ROOT}')
    assert "\npython -m bench.gpu_check.first_light here --device cpu\n" in recipe


def test_a_check_that_fails_is_a_line_and_the_rest_goes_on(tmp_path):
    light = first_light.Light(tmp_path, time.monotonic() + 60)
    light.facts = dict(FACTS)
    tasks = [
        first_light.Task("wrong", first_light._words, ("WRONG: 1 of 2",)),
        first_light.Task("crash", os._exit, (3,)),
        first_light.Task("right", dict.get, ({}, "nothing")),
    ]
    for done in light.run(tasks, 2, light.end):
        light.checks[done.task.name] = done.error or done.result
    light.save()
    assert light.checks == {"wrong": "WRONG: 1 of 2", "crash": "ended with 3: it said nothing", "right": None}
    assert "1 checks are right, 2 are not, 0 not made" in (tmp_path / "first-light.txt").read_text()
    with tarfile.open(tmp_path / "first-light.tgz") as archive:
        assert {"first-light/results.json", "first-light/log.txt", "first-light/crash.log"} <= set(archive.getnames())
        assert json.load(archive.extractfile("first-light/results.json"))["checks"] == light.checks


def test_it_ends_itself_with_a_table(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_check.first_light", str(tmp_path), "--device", "cpu", "--seconds", "6"]
    done = subprocess.run(command, cwd=ROOT, env=with_package(), capture_output=True, text=True, timeout=240)
    assert (tmp_path / "first-light.tgz").exists(), done.stderr
    assert "FIRST LIGHT" in done.stdout
    assert (tmp_path / "first-light.txt").read_text() in done.stdout
    assert len(list(tmp_path.iterdir())) == 2


def test_where_nothing_is_built_its_own_driver_launches(monkeypatch):
    """In this process and in those that it starts, as trials of backends do."""
    monkeypatch.setenv(launcher.INSTEAD, "")
    monkeypatch.delenv(launcher.INSTEAD)
    monkeypatch.setattr(native, "load", lambda: None)
    assert launcher.classes() is None
    first_light._use_driver()
    assert launcher.classes() is driver
    assert first_light.facts("cpu")["launcher"] == first_light.DRIVER == os.environ[launcher.INSTEAD]
