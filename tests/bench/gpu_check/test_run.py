"""What the check runs: its commands, its plan, and what is made of their results."""

import os
import re
import subprocess
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from bench_processes import FIRST_INTERRUPT, PYTEST_ALONE, ROOT, WAITS, run_python, step_command, with_package
from helpers import CPU

import poc_kernels
from bench.gpu_check import driver, short_run, short_vllm, steps
from bench.gpu_check import run as gpu_check
from poc_kernels import backends
from poc_kernels.kernels.cuda import launcher

RIGHT, WRONG = "gives the known answers", "FAILED, never used: a tile"


@pytest.mark.parametrize(
    ("verdicts", "status", "trusted"),
    [
        ([f"triton        cuda:0  {RIGHT}, serves this device"], 0, None),
        ([f"triton        cuda:0  {WRONG}"], 1, "cuda,triton"),
        (["triton        cuda:0  NOT TRIED: out of memory"], 1, "cuda,triton"),
        ([f"native-avx2   cpu     {WRONG}", f"triton        cuda:0  {RIGHT}"], 1, None),
        ([f"cuda          cuda:0  {WRONG}", f"triton        cuda:0  {RIGHT}"], 1, None),
        ([f"cuda          cuda:0  {RIGHT}", f"triton        cuda:0  {WRONG}"], 1, None),
        ([f"cuda          cuda:0  {WRONG}", "triton        cuda:0  not available: a fence"], 1, "cuda,triton"),
        ([f"triton        cuda:0  {WRONG}", f"triton        cuda:1  {RIGHT}"], 1, "cuda,triton"),
        ([], 1, "cuda,triton"),
    ],
    ids=["right", "wrong", "untried", "on CPU", "cuda wrong", "triton wrong", "refused", "right on another", "crashed"],
)
def test_kernels_that_verify_rejects_are_measured_all_the_same(make_check, monkeypatch, verdicts, status, trusted):
    monkeypatch.setenv("POC_BENCH_TRUST", "")
    monkeypatch.delenv("POC_BENCH_TRUST")
    check = make_check({"verify": 20})
    code = "import sys; print(*sys.argv[2:], sep='\\n'); sys.exit(int(sys.argv[1]))"
    check.run("verify", step_command(code, status, *verdicts))
    gpu_check._measure_what_is_wrong(check)
    assert os.environ.get("POC_BENCH_TRUST") == trusted


def test_what_is_measured_against_the_verdict_of_verify_says_so(monkeypatch):
    pytest.importorskip("pytest_benchmark")
    from bench.projection import test_gpu as suite

    serving = suite.backends.select(CPU).name
    assert suite._backend(CPU) == serving
    monkeypatch.setattr(suite, "TRUSTED", ("cuda", serving))
    assert suite._backend(CPU) == f"{serving}, REJECTED BY VERIFY"
    monkeypatch.setattr(suite, "TRUSTED", ("cuda", "triton"))
    assert suite._backend(CPU) == serving, "another backend serves, which nothing was said of"


def test_figures_are_kept_and_printed_before_the_sanitizer(tmp_path, monkeypatch, capsys):
    """Which takes all the time that is left; the table comes once more after it."""
    seen = []

    def run(check, name, *commands, **options):
        check._add(steps.Outcome(name, "ok", 1.0))
        return True

    def memcheck(check):
        seen.extend([capsys.readouterr().out, (tmp_path / "gpu-check-cpu.txt").read_text()])
        check.skip("compute-sanitizer", "a test")

    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path), "--device", "cpu"])
    monkeypatch.setattr(gpu_check, "take_signals", lambda: None)
    monkeypatch.setattr(steps.Check, "run", run)
    monkeypatch.setattr(gpu_check, "_benchmark", lambda check, suite, more: f"figures of {suite.name}")
    monkeypatch.setattr(gpu_check, "_memcheck", memcheck)
    assert gpu_check.main() == 0
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-check-cpu.txt", "gpu-check-cpu.tgz"}
    with tarfile.open(tmp_path / "gpu-check-cpu.tgz") as archive:
        assert "gpu-check-cpu/gpu-check-cpu.txt" in archive.getnames()
    for text in seen:
        assert "figures of projection\nfigures of round\nfigures of interference\n" in text
    printed = capsys.readouterr().out.rstrip()
    assert re.search(r"\nverify +1  ok\n(.*\n)+compute-sanitizer +0  skipped: a test$", printed)


@pytest.mark.parametrize(
    ("code", "goes_on", "result"),
    [
        ("pass", True, "ok"),
        ("raise SystemExit(1)", False, "FAILED with 1"),
        (WAITS, True, "not done after 90 s"),
    ],
)
def test_only_a_torch_that_sees_no_device_ends_the_check(make_watched, code, goes_on, result):
    check = make_watched("torch", {"waits": FIRST_INTERRUPT + 0.01})
    assert gpu_check._sees_a_device(check, step_command(code)) is goes_on
    assert check.outcomes[0].result == result


@pytest.mark.parametrize("step", ["a module of the package", "verify", "tests", "overlap tests", "suite", "script"])
def test_no_command_imports_what_lies_in_the_folder_it_starts_in(tmp_path, step):
    """There lie the sources of the package, which have no native core. Without -P, which Python 3.10 lacks."""
    script = next(suite for suite in gpu_check.SUITES if suite.case_seconds is None)
    suite = gpu_check.Suite("some", "no_such_suite.py", "report", 40, 15)
    check = steps.Check(tmp_path, "cpu", {"some": 40}, 60.0)
    command = {
        "a module of the package": gpu_check._python("import poc_kernels, torch; print(poc_kernels.__file__)"),
        "verify": gpu_check._verify().arguments,
        "tests": [*gpu_check._tests("cpu")[0].arguments, "--version"],
        "overlap tests": [*gpu_check._overlap_tests().arguments, "--version"],
        "suite": gpu_check._suite_command(check, suite, tmp_path / "some.json", ["--version"]).arguments,
        "script": gpu_check._suite_command(check, script, tmp_path / "some.json", ["--help"]).arguments,
    }[step]
    for name in ("poc_kernels", "pytest", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the folder')")
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    assert "-P" not in command
    done = subprocess.run(command, cwd=tmp_path, env=with_package(), capture_output=True, text=True)
    assert "of the folder" not in done.stderr
    assert done.returncode == 0, done.stderr
    if step == "a module of the package":
        assert done.stdout == f"{poc_kernels.__file__}\n"


def test_make_starts_it_without_an_option_that_python_3_10_lacks():
    arguments = ["make", "-n", "gpu-check", "DEVICE=cpu", "PYTHON=python"]
    recipe = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "\npython -m bench.gpu_check " in recipe


@pytest.mark.parametrize("installs", [True, False])
def test_make_goes_on_from_the_sources_where_the_package_cannot_be_installed(tmp_path, installs):
    """With a Python that installs nothing, and otherwise says which sources it would run."""
    python = tmp_path / "python"
    says = f'echo "ran $PYTHONPATH $* without=$POC_TESTS_WITHOUT_NATIVE launcher=${launcher.INSTEAD}"'
    python.write_text(f'#!/bin/sh\n[ "$2" = pip ] && exit {int(not installs)}\n{says}\n')
    python.chmod(0o755)
    arguments = ["make", "gpu-check", "DEVICE=cpu", f"PYTHON={python}", "TOTAL_SECONDS=420", "GPU_CHECK_OUT=here"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", launcher.INSTEAD)}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    (ran,) = re.findall(r"^ran (.*)", done.stdout, re.MULTILINE)
    assert ran.startswith(" -m bench.gpu_check here" if installs else f"{ROOT} -m bench.gpu_check here")
    assert "--total 420" in ran
    assert ran.endswith("without= launcher=" if installs else f"without=1 launcher={driver.__name__}")
    assert bool(re.search("^gpu-check: the package cannot be installed", done.stdout, re.MULTILINE)) == (not installs)


def test_make_says_when_it_began():
    arguments = ["make", "-n", "gpu-check", "DEVICE=cpu", "PYTHON=python"]
    before = time.time() - 1
    recipe = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (began,) = re.findall(r"bench\.gpu_check .*--began (\d+)", recipe)
    assert before < int(began) <= time.time()


def test_tests_that_look_at_what_overlaps_run_alone():
    commands = gpu_check._tests("cpu")
    files = {Path(part).name for command in commands for part in command.arguments if part.endswith(".py")}
    overlap = Path(ROOT, gpu_check.OVERLAP_TESTS)
    assert overlap.exists()
    assert "test_cuda.py" in files
    assert overlap.name not in files
    assert list(gpu_check.PLAN).index("overlap tests") == list(gpu_check.PLAN).index("tests") + 1


def test_tests_on_a_gpu_take_nothing_that_serves_http():
    """A machine with a GPU that only computes may lack it."""
    files = [part for part in gpu_check._tests("cpu")[0].arguments if part.endswith(".py") or Path(part).is_dir()]
    lacking = ["fastapi", "starlette", "uvicorn", "openai", "pythonjsonlogger", "pydantic", "vllm"]
    code = f"import sys; sys.modules.update(dict.fromkeys({lacking})); import pytest; sys.exit(pytest.main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *gpu_check.MARKED_GPU, "--collect-only", *files],
        cwd=ROOT,
        env=with_package(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", POC_TESTS_WITHOUT_NATIVE="1"),  # a plugin may serve
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "test_engine.py::" in done.stdout
    assert "test_cuda.py::" in done.stdout


def test_tests_go_on_past_a_file_that_lacks_a_package(tmp_path):
    (tmp_path / "test_lacks.py").write_text("import no_such_package\n")
    (tmp_path / "test_has.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    print('ran')\n")
    options = [*gpu_check.GOES_ON, "-o", "markers=gpu: x", "-s", "-m", "gpu", str(tmp_path)]
    done = run_python(*PYTEST_ALONE, *options)
    assert done.returncode == 1
    assert "ran" in done.stdout


def test_the_short_run_of_a_model_measures_its_slices():
    pytest.importorskip("transformers")
    done = run_python("-m", "bench.gpu_check.short_forwards", "cpu")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"forwards in [1-9]\d* slices done\n", done.stdout)


def test_the_short_run_in_vllm_is_skipped_in_a_word_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    short_vllm.main("cpu")
    assert capsys.readouterr().out.startswith("SKIPPED [1] proofs in vLLM: ")


@pytest.mark.usefixtures("fresh_choice")
def test_the_short_run_of_the_ops_tries_no_backend_again(monkeypatch, capsys):
    """Triton's known answers under compute-sanitizer would take all its time."""
    trusted, trust = [], backends.trust

    def noting(name, device):
        trusted.append((name, device.type))
        trust(name, device)

    monkeypatch.setattr(backends, "trust", noting)
    short_run.main("cpu")
    assert trusted == [("cuda", "cpu"), ("triton", "cpu")]
    assert capsys.readouterr().out == "short run done\n"


def test_the_plan_fits_ten_minutes():
    assert gpu_check.TOTAL_SECONDS == 570, "what ends after the last step takes time too"
    assert sum(gpu_check.PLAN.values()) <= 530, "and so does the build"
    suites = {suite.name: suite for suite in gpu_check.SUITES}
    assert {"torch", "verify", "tests", "overlap tests", "compute-sanitizer", *suites} < set(gpu_check.PLAN)
    assert list(gpu_check.PLAN)[-1] == "compute-sanitizer", "which may take all that is left"
    for suite in suites.values():
        assert (ROOT / "bench" / suite.target).exists()
        assert find_spec(f"bench.{suite.report}") is not None
        if suite.case_seconds is None:  # the script begins nothing in the last half minute
            assert gpu_check.SCRIPT_END_SECONDS >= 30
            assert suite.seconds - steps.GRACE_SECONDS - gpu_check.SCRIPT_END_SECONDS >= gpu_check.SCRIPT_SECONDS


def test_figures_with_goals_come_before_the_tests():
    order = list(gpu_check.PLAN)
    assert order.index("verify") < order.index("projection report") < order.index("tests")


@pytest.mark.parametrize("total", [60.0, 420.0, 570.0, 900.0])
def test_the_plan_fits_any_total(tmp_path, total):
    plan = gpu_check.plan_of(total)
    assert list(plan) == list(gpu_check.PLAN)
    assert sum(plan.values()) <= min(total, sum(gpu_check.PLAN.values())) + 1e-6
    check = steps.Check(tmp_path, "cuda", {**plan}, total)
    script = next(suite for suite in gpu_check.SUITES if suite.case_seconds is None)
    check._ends[script.name] = time.monotonic() + plan[script.name]
    arguments, _ = gpu_check._suite_command(check, script, tmp_path / "some.json", [])
    limit = float(arguments[arguments.index("--limit-seconds") + 1])
    assert 1 <= limit <= max(1, plan[script.name] - gpu_check.SCRIPT_END_SECONDS)


def test_a_late_verify_says_nothing(make_watched, monkeypatch):
    for name in ("POC_BENCH_TRUST", "POC_BENCH_VERDICT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    check = make_watched("verify", {"waits": FIRST_INTERRUPT + 0.01})
    check.run("verify", step_command(WAITS), must_end=False)
    gpu_check._measure_what_is_wrong(check)
    assert check.outcomes[0].result == "not done after 90 s"
    assert os.environ["POC_BENCH_TRUST"] == "cuda,triton"
    assert os.environ["POC_BENCH_VERDICT"] == "NOT VERIFIED IN TIME"


@pytest.mark.parametrize(("device", "quick"), [("cuda", {}), ("cpu", {"POC_BENCH_QUICK": "1"})])
def test_a_suite_of_pytest_is_told_device_results_and_time(tmp_path, device, quick):
    suite = gpu_check.Suite("some", "some/test_some.py", "some.report", 40, 15, on_gpu=("--gpu",), rehearsed=("--cpu",))
    check = steps.Check(tmp_path, device, {"some": 40}, total=40.0, grace=5.0)
    arguments, environment = gpu_check._suite_command(check, suite, tmp_path / "some.json", ["--more"])
    assert arguments[:3] == gpu_check._python(gpu_check.PYTEST)
    assert arguments[3:8] == ["-q", "-rs", str(ROOT / "bench" / "some" / "test_some.py"), "--bench-device", device]
    assert arguments[8:10] == ["--gpu" if device == "cuda" else "--cpu", "--more"]
    assert arguments[10:] == [f"--benchmark-json={tmp_path / 'some.json'}", "--bench-seconds=20"]
    assert environment == quick


@pytest.mark.parametrize(
    ("device", "options"), [("cuda", "--device cuda --short --limit-seconds 60"), ("cpu", "--quick")]
)
def test_the_script_that_measures_inference_takes_its_options(tmp_path, device, options):
    pytest.importorskip("transformers")
    suite = next(suite for suite in gpu_check.SUITES if suite.name == "interference")
    out = tmp_path / "interference.json"
    check = steps.Check(tmp_path, device, gpu_check.PLAN, gpu_check.TOTAL_SECONDS)
    arguments, _ = gpu_check._suite_command(check, suite, out, [])
    assert arguments == [
        sys.executable,
        *("-m", "bench.interference"),
        str(out),
        *options.split(),
    ]
    from bench.interference import plan

    parsed = plan.parse([part.replace("cuda", "cpu") for part in arguments[3:]])
    assert parsed.out == out


SCRIPT = """
import sys
print("met: one goal", "12:00:00 round 1 of 2", "MISSED: another", "not measured: a third", *sys.argv[2:], sep="\\n")
open(sys.argv[1], "w").write("{}")
"""


def test_the_verdicts_of_a_script_come_before_its_report(make_check, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "report.py").write_text("print('a table')")
    suite = gpu_check.Suite("some", "script", "report", 20, None, rehearsed=("met: an option",))
    check = make_check({"some": 20, "some report": 20})
    summary = gpu_check._benchmark(check, suite, [])
    assert summary == "met: one goal\nMISSED: another\nnot measured: a third\nmet: an option\na table\n"
    assert (tmp_path / "some-rehearsal.json").exists()
    (folder / "script.py").write_text("raise SystemExit(1)")
    check = make_check({"some": 20, "some report": 20})
    assert gpu_check._benchmark(check, suite, []) is None
    assert [outcome.result for outcome in check.outcomes] == ["FAILED with 1", "skipped: no results"]


def test_shards_share_the_selected_tests(tmp_path):
    (tmp_path / "test_nine.py").write_text("""
import pathlib, pytest
@pytest.mark.parametrize("i", [pytest.param(i, marks=[pytest.mark.odd] if i % 2 else []) for i in range(10)])
def test_each(i):
    with open(pathlib.Path(__file__).with_name("ran"), "a") as file:
        file.write(f"{i} ")
""")
    options = [*PYTEST_ALONE[2:], "-m", "odd", f"--rootdir={tmp_path}", str(tmp_path / "test_nine.py")]
    command = [sys.executable, "-m", "bench.gpu_check.shard", "2/3", *options]
    subprocess.run(command, cwd=ROOT, env=with_package(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"), check=True)
    assert (tmp_path / "ran").read_text().split() == ["3", "9"], "of 1, 3, 5, 7 and 9 the second and the fifth"
