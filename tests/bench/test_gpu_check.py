"""The steps of make gpu-check: their time, what ends with them, and what is kept of them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import CPU

import poc_kernels

# Starts a process that would outlive it, writes its number to argv[1], and waits; argv[2:] are lines of Python before.
PARENT = """
import signal, subprocess, sys, time
exec(sys.argv[2])
child = subprocess.Popen([sys.executable, "-c", sys.argv[2] + "; import time; time.sleep(300)"])
with open(sys.argv[1], "w") as file:
    file.write(str(child.pid))
print("child started", flush=True)
time.sleep(300)
"""

PYTEST_ALONE = ["-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull]
WITHOUT_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@pytest.fixture
def gpu_check(module):
    return module("gpu_check")


@pytest.fixture
def make_check(gpu_check, tmp_path):
    def make(plan, total=60.0, grace=1.0, elapsed=0.0):
        return gpu_check.Check(tmp_path, "cpu", plan, total, grace, elapsed)

    return make


class LogClock:
    """A check's time: it stands still until a text is in a step's log, goes to that text's moment, and so on.

    After the last it runs. However long a machine takes to start a process, no step is late before its text is there;
    but it runs after a minute in any case.
    """

    def __init__(self, log, moments):
        self._log, self._moments, self._now = log, dict(moments), 0.0
        self._latest = time.monotonic() + 60
        self._runs_since = None

    def monotonic(self):
        while self._moments and (self._logged(next(iter(self._moments))) or time.monotonic() > self._latest):
            self._now = self._moments.pop(next(iter(self._moments)))
            self._runs_since = None if self._moments else time.monotonic()
        return self._now + (0.0 if self._runs_since is None else time.monotonic() - self._runs_since)

    def sleep(self, seconds):
        time.sleep(seconds)

    def _logged(self, text):
        return self._log.exists() and text in self._log.read_text()


FIRST_INTERRUPT, SECOND_INTERRUPT, KILL = 90.0, 105.0, 120.0


@pytest.fixture
def make_watched(gpu_check, make_check, tmp_path, monkeypatch):
    """A check of one step, interrupted at 90 s and at 105 s and killed at 120 s of a clock that its log sets."""

    def make(name, moments):
        monkeypatch.setattr(gpu_check, "time", LogClock(tmp_path / f"{name}.log", moments))
        return make_check({name: KILL}, total=KILL, grace=KILL - FIRST_INTERRUPT)

    return make


def python(gpu_check, code, *arguments, **environment):
    return gpu_check.Command([sys.executable, "-c", code, *map(str, arguments)], environment)


def with_sources():
    """The environment of a process that imports the package that these tests do."""
    paths = [str(Path(poc_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def gone(pid):
    """No such process, or one that has ended and only waits to be reaped."""
    status = Path("/proc", str(pid), "stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def wait_until_gone(pid):
    end = time.monotonic() + 30
    while not gone(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert gone(pid)


def test_what_fails_skips_or_is_absent_is_named(gpu_check, make_check, tmp_path):
    check = make_check({"good one": 10, "bad": 10, "absent": 10})
    assert check.run("good one", python(gpu_check, "print('SKIPPED [1] a.py:3: no device')"))
    assert not check.run("bad", python(gpu_check, "raise SystemExit(3)"))
    check.skip("absent", "not on this machine")
    table = check.table()
    assert "skipped [1] a.py:3: no device" in table
    assert "FAILED with 3" in table
    assert "skipped: not on this machine" in table
    assert (tmp_path / "good-one.log").read_text() == "SKIPPED [1] a.py:3: no device\n"
    assert (tmp_path / "gpu-check-cpu.txt").read_text() == table + "\n", "kept after every step"


@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc")
@pytest.mark.parametrize(
    ("before", "moment", "killed"),
    [
        ("pass", FIRST_INTERRUPT, False),
        ("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)", KILL - 0.5, True),
    ],
    ids=["interrupted", "killed"],
)
def test_at_the_limit_a_step_ends_with_all_that_it_started(
    gpu_check, make_watched, tmp_path, capsys, before, moment, killed
):
    check = make_watched("slow", {"child started": moment + 0.01})
    assert not check.run("slow", python(gpu_check, PARENT, tmp_path / "pid", before))
    assert (gpu_check.time.monotonic() >= KILL) is killed
    assert check.outcomes[0].result == "FAILED: not done after 90 s"
    assert (tmp_path / "slow.log").read_text().startswith("child started\n"), "output is kept"
    assert "child started" in capsys.readouterr().out
    wait_until_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc")
def test_what_a_step_leaves_running_ends_with_it(gpu_check, make_check, tmp_path):
    code = PARENT.replace("time.sleep(300)\n", "")
    check = make_check({"step": 30})
    assert check.run("step", python(gpu_check, code, tmp_path / "pid", "pass"))
    wait_until_gone(int((tmp_path / "pid").read_text()))


RIGHT, WRONG = "gives the known answers", "FAILED, never used: a tile"


@pytest.mark.parametrize(
    ("verdicts", "status", "trusted"),
    [
        ([f"triton        cuda:0  {RIGHT}, serves this device"], 0, None),
        ([f"triton        cuda:0  {WRONG}"], 1, "triton"),
        (["triton        cuda:0  NOT TRIED: out of memory"], 1, "triton"),
        ([f"native-avx2   cpu     {WRONG}", f"triton        cuda:0  {RIGHT}"], 1, None),
        ([f"triton        cuda:0  {WRONG}", f"triton        cuda:1  {RIGHT}"], 1, "triton"),
        ([], 1, "triton"),
    ],
    ids=["right", "wrong", "untried", "another wrong", "right on another", "crashed"],
)
def test_kernels_that_verify_rejects_are_measured_all_the_same(
    gpu_check, make_check, monkeypatch, verdicts, status, trusted
):
    monkeypatch.setenv("POC_BENCH_TRUST", "")
    monkeypatch.delenv("POC_BENCH_TRUST")
    check = make_check({"verify": 20})
    code = "import sys; print(*sys.argv[2:], sep='\\n'); sys.exit(int(sys.argv[1]))"
    check.run("verify", python(gpu_check, code, status, *verdicts))
    gpu_check._measure_what_is_wrong(check)
    assert os.environ.get("POC_BENCH_TRUST") == trusted


def test_what_is_measured_against_the_verdict_of_verify_says_so(module, monkeypatch):
    pytest.importorskip("pytest_benchmark")
    suite = module("test_projection_gpu")
    serving = suite.backends.select(CPU).name
    assert suite._backend(CPU) == serving
    monkeypatch.setattr(suite, "TRUSTED", serving)
    assert suite._backend(CPU) == f"{serving}, REJECTED BY VERIFY"
    monkeypatch.setattr(suite, "TRUSTED", "triton")
    assert suite._backend(CPU) == serving, "another backend serves, which nothing was said of"


def test_figures_are_kept_and_printed_before_the_sanitizer(gpu_check, tmp_path, monkeypatch, capsys):
    """Which takes all the time that is left; the table comes once more after it."""
    seen = []

    def run(check, name, *commands, **options):
        check._add(gpu_check.Outcome(name, "ok", 1.0))
        return True

    def memcheck(check):
        seen.extend([capsys.readouterr().out, (tmp_path / "gpu-check-cpu.txt").read_text()])
        check.skip("compute-sanitizer", "a test")

    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path), "--device", "cpu"])
    monkeypatch.setattr(gpu_check, "take_signals", lambda: None)
    monkeypatch.setattr(gpu_check.Check, "run", run)
    monkeypatch.setattr(gpu_check, "_benchmark", lambda check, suite, more: f"figures of {suite.name}")
    monkeypatch.setattr(gpu_check, "_memcheck", memcheck)
    assert gpu_check.main() == 0
    for text in seen:
        assert "figures of projection\nfigures of round\nfigures of beside\n" in text
    printed = capsys.readouterr().out.rstrip()
    assert re.search(r"\nverify +1  ok\n(.*\n)+compute-sanitizer +0  skipped: a test$", printed)


def test_the_summary_is_kept_by_every_later_step(gpu_check, make_check, tmp_path):
    check = make_check({"last": 20})
    check.summary = "figures"
    check.run("last", python(gpu_check, "pass"))
    assert (tmp_path / "gpu-check-cpu.txt").read_text() == f"figures\n{check.table()}\n"


def test_output_is_seen_while_a_step_runs(gpu_check, make_check, tmp_path):
    """The command ends only once its line is in the log."""
    code = """
import pathlib, sys, time
log = pathlib.Path(sys.argv[1])
print("first", flush=True)
while not log.exists() or "first" not in log.read_text():
    time.sleep(0.05)
"""
    (tmp_path / "step.log").write_text("of another run")
    assert make_check({"step": 20}).run("step", python(gpu_check, code, tmp_path / "step.log"))


def test_a_step_that_swallows_an_interrupt_gets_another(gpu_check, make_watched):
    code = """
import os, signal, time
interrupts = []
def swallow(*_):
    interrupts.append(1)
    os.write(1, b"interrupted\\n")
    if len(interrupts) == 2:
        os.write(1, b"ended by itself\\n")
        os._exit(0)
signal.signal(signal.SIGINT, swallow)
os.write(1, b"ready\\n")
time.sleep(300)
"""
    check = make_watched("slow", {"ready": FIRST_INTERRUPT + 0.01, "interrupted": SECOND_INTERRUPT + 0.01})
    assert not check.run("slow", python(gpu_check, code))
    assert check.outcomes[0].result == "FAILED: not done after 90 s"
    assert (check.out / "slow.log").read_text() == "ready\n" + "interrupted\n" * 2 + "ended by itself\n"


def test_late_pytest_keeps_what_it_has_measured(gpu_check, make_watched, tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "test_two.py").write_text("""
import time
def test_first(benchmark):
    benchmark.pedantic(lambda: None)
def test_second(benchmark):
    print("second began", flush=True)
    time.sleep(300)
""")
    json = tmp_path / "results.json"
    options = [
        *PYTEST_ALONE,
        "-s",
        "-p",
        "pytest_benchmark.plugin",
        f"--benchmark-json={json}",
        f"--rootdir={tmp_path}",
    ]
    command = gpu_check.Command([sys.executable, *options, str(tmp_path / "test_two.py")], WITHOUT_PLUGINS)
    assert not make_watched("suite", {"second began": FIRST_INTERRUPT + 0.01}).run("suite", command)
    assert '"test_first"' in json.read_text()


def test_steps_keep_to_the_total_and_take_what_earlier_ones_leave(gpu_check, make_check):
    check = make_check({"first": 10, "second": 20, "third": 5}, total=50.0, grace=1.0)
    assert 15 < check.left("first") < 25, "what the plan leaves of the total is the first's too"
    assert check.run("first", python(gpu_check, "pass"))
    assert 25 < check.left("second") < 45
    check.skip("second", "no reason")
    assert 25 < check.left("third") < 50
    assert 2.9 < make_check({"only": 4}, total=4.0, grace=10.0).left("only") <= 3, "a quarter, if the grace is longer"


def test_a_step_without_time_is_skipped(gpu_check, make_check):
    check = make_check({"late": 1}, total=1.0)
    assert not check.run("late", python(gpu_check, "pass"))
    assert check.outcomes[0].result == "skipped: no time left"


def test_the_total_counts_from_before_the_build(make_check):
    plan = {"first": 10, "second": 30}
    assert 19 < make_check(plan, total=50.0, grace=0.0).left("first") <= 20
    assert 9 < make_check(plan, total=50.0, elapsed=10.0, grace=0.0).left("first") <= 10
    less = make_check(plan, total=50.0, elapsed=30.0, grace=0.0)
    assert 4 < less.left("first") <= 5, "half of what was planned"
    assert 19 < less.left("second") <= 20
    none = make_check(plan, total=50.0, elapsed=51.0)
    assert max(none.left("first"), none.left("second")) <= 0


WAITS = "import time; print('waits', flush=True); time.sleep(300)"


def test_a_late_step_that_need_not_end_is_not_done(gpu_check, make_watched):
    check = make_watched("slow", {"waits": FIRST_INTERRUPT + 0.01})
    assert not check.run("slow", python(gpu_check, WAITS), must_end=False)
    assert check.outcomes[0].result == "not done after 90 s"


@pytest.mark.parametrize("then", ["pass", WAITS], ids=["done", "late"])
def test_a_line_with_an_error_is_a_failure_done_or_not(gpu_check, make_watched, then):
    check = make_watched("step", {"waits": FIRST_INTERRUPT + 0.01})
    code = f"print('==== Invalid write', flush=True); {then}"
    assert not check.run("step", python(gpu_check, code), must_end=False, error="=+ (Invalid|Misaligned) ")
    assert check.outcomes[0].result == "FAILED: ==== Invalid write"


@pytest.mark.parametrize(
    ("code", "goes_on", "result"),
    [
        ("pass", True, "ok"),
        ("raise SystemExit(1)", False, "FAILED with 1"),
        (WAITS, True, "not done after 90 s"),
    ],
)
def test_only_a_torch_that_sees_no_device_ends_the_check(gpu_check, make_watched, code, goes_on, result):
    check = make_watched("torch", {"waits": FIRST_INTERRUPT + 0.01})
    assert gpu_check._sees_a_device(check, python(gpu_check, code)) is goes_on
    assert check.outcomes[0].result == result


@pytest.mark.parametrize("step", ["verify", "tests", "short run", "suite"])
def test_no_command_imports_what_lies_in_the_folder_it_starts_in(gpu_check, tmp_path, step):
    """There lie the sources of the package, which have no native core. Without -P, which Python 3.10 lacks."""
    suite = gpu_check.Suite("some", "no_such_suite.py", "report.py", 40, 15)
    check = gpu_check.Check(tmp_path, "cpu", {"some": 40})
    code = "import poc_kernels, torch; print(poc_kernels.__file__)"
    command = {
        "verify": gpu_check._verify(),
        "tests": gpu_check._pytest("--version"),
        "short run": gpu_check._script(code, "cpu"),
        "suite": gpu_check._suite_command(check, suite, tmp_path / "some.json", ["--version"]),
    }[step]
    for name in ("poc_kernels", "pytest", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the folder')")
    assert "-P" not in command.arguments
    done = subprocess.run(command.arguments, cwd=tmp_path, env=with_sources(), capture_output=True, text=True)
    assert "of the folder" not in done.stderr
    assert done.returncode == 0, done.stderr
    if step == "short run":
        assert done.stdout == f"{poc_kernels.__file__}\n"


def test_make_starts_it_without_an_option_that_python_3_10_lacks(gpu_check):
    arguments = ["make", "-n", "gpu-check", "DEVICE=cpu", "PYTHON=python"]
    recipe = subprocess.run(arguments, cwd=gpu_check.ROOT, capture_output=True, text=True, check=True).stdout
    assert "\npython bench/gpu_check.py " in recipe


def test_make_says_when_it_began(gpu_check):
    arguments = ["make", "-n", "gpu-check", "DEVICE=cpu", "PYTHON=python"]
    before = time.time() - 1
    recipe = subprocess.run(arguments, cwd=gpu_check.ROOT, capture_output=True, text=True, check=True).stdout
    (began,) = re.findall(r"gpu_check\.py .*--began (\d+)", recipe)
    assert before < int(began) <= time.time()


def test_tests_that_look_at_what_overlaps_run_alone(gpu_check):
    commands = gpu_check._tests("cpu")
    files = {Path(part).name for command in commands for part in command.arguments if part.endswith(".py")}
    overlap = Path(gpu_check.ROOT, gpu_check.OVERLAP_TESTS)
    assert overlap.exists()
    assert "test_cuda.py" in files
    assert overlap.name not in files
    assert list(gpu_check.PLAN).index("overlap tests") == list(gpu_check.PLAN).index("tests") + 1


def test_the_short_run_of_a_model_measures_its_slices(gpu_check):
    pytest.importorskip("transformers")
    command = gpu_check._script(gpu_check.SHORT_FORWARDS, "cpu")
    done = subprocess.run(command.arguments, cwd=gpu_check.ROOT, env=with_sources(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"forwards in [1-9]\d* slices done\n", done.stdout)


def test_the_short_run_of_the_ops_tries_no_backend_again(gpu_check, tmp_path):
    """Triton's known answers under compute-sanitizer would take all its time."""
    before = """
from poc_kernels import backends
trusted, trust = [], backends.trust
backends.trust = lambda *arguments: trusted.append(arguments) or trust(*arguments)
"""
    after = "assert [(name, place.type) for name, place in trusted] == [('triton', 'cpu')], trusted"
    command = gpu_check._script(before + gpu_check.SHORT_RUN + after, "cpu")
    done = subprocess.run(command.arguments, cwd=tmp_path, env=with_sources(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "short run done\n"


def test_a_plan_longer_than_the_total_is_refused(make_check):
    with pytest.raises(ValueError, match="plan must add up to at most total, 20 s, got 30 s"):
        make_check({"a": 10, "b": 20}, total=20.0)


def test_the_plan_fits_ten_minutes(gpu_check):
    assert gpu_check.TOTAL_SECONDS == 570, "what ends after the last step takes time too"
    assert sum(gpu_check.PLAN.values()) <= 530, "and so does the build"
    suites = {suite.name: suite for suite in gpu_check.SUITES}
    assert {"torch", "verify", "tests", "overlap tests", "compute-sanitizer", *suites} < set(gpu_check.PLAN)
    assert list(gpu_check.PLAN)[-1] == "compute-sanitizer", "which may take all that is left"
    for suite in suites.values():
        assert (gpu_check.BENCH / suite.file).exists()
        assert (gpu_check.BENCH / suite.report).exists()
        if suite.case_seconds is None:  # the script begins nothing in the last half minute
            limit = float(suite.on_gpu[suite.on_gpu.index("--limit-seconds") + 1])
            assert limit <= suite.seconds - gpu_check.GRACE_SECONDS - 30


@pytest.mark.parametrize(("device", "quick"), [("cuda", {}), ("cpu", {"POC_BENCH_QUICK": "1"})])
def test_a_suite_of_pytest_is_told_device_results_and_time(gpu_check, tmp_path, device, quick):
    suite = gpu_check.Suite("some", "test_some.py", "report.py", 40, 15, on_gpu=("--gpu",), rehearsed=("--cpu",))
    check = gpu_check.Check(tmp_path, device, {"some": 40}, total=40.0, grace=5.0)
    arguments, environment = gpu_check._suite_command(check, suite, tmp_path / "some.json", ["--more"])
    assert arguments[:3] == gpu_check._python(gpu_check.PYTEST)
    assert arguments[3:8] == ["-q", "-rs", str(gpu_check.BENCH / "test_some.py"), "--bench-device", device]
    assert arguments[8:10] == ["--gpu" if device == "cuda" else "--cpu", "--more"]
    assert arguments[10:] == [f"--benchmark-json={tmp_path / 'some.json'}", "--bench-seconds=20"]
    assert environment == quick


@pytest.mark.parametrize(
    ("device", "options"), [("cuda", "--device cuda --short --limit-seconds 60"), ("cpu", "--quick")]
)
def test_the_script_that_measures_inference_takes_its_options(gpu_check, module, tmp_path, device, options):
    pytest.importorskip("transformers")
    suite = next(suite for suite in gpu_check.SUITES if suite.name == "beside")
    arguments, _ = gpu_check._suite_command(gpu_check.Check(tmp_path, device), suite, tmp_path / "beside.json", [])
    assert arguments == [
        sys.executable,
        str(gpu_check.BENCH / "beside.py"),
        str(tmp_path / "beside.json"),
        *options.split(),
    ]
    parsed = module("beside")._parsed([part.replace("cuda", "cpu") for part in arguments[2:]])
    assert parsed.out == tmp_path / "beside.json"


SCRIPT = """
import sys
print("met: one goal", "12:00:00 round 1 of 2", "MISSED: another", "not measured: a third", *sys.argv[2:], sep="\\n")
open(sys.argv[1], "w").write("{}")
"""


def test_the_verdicts_of_a_script_come_before_its_report(gpu_check, make_check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "BENCH", tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "report.py").write_text("print('a table')")
    suite = gpu_check.Suite("some", "script.py", "report.py", 20, None, rehearsed=("met: an option",))
    check = make_check({"some": 20, "some report": 20})
    summary = gpu_check._benchmark(check, suite, [])
    assert summary == "met: one goal\nMISSED: another\nnot measured: a third\nmet: an option\na table\n"
    assert (tmp_path / "some-rehearsal.json").exists()
    (tmp_path / "script.py").write_text("raise SystemExit(1)")
    check = make_check({"some": 20, "some report": 20})
    assert gpu_check._benchmark(check, suite, []) is None
    assert [outcome.result for outcome in check.outcomes] == ["FAILED with 1", "skipped: no results"]


def test_commands_of_a_step_run_at_once_and_their_skips_are_added(gpu_check, make_check, tmp_path):
    """Each waits for a file that the other makes."""
    code = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.05)
print("SKIPPED [2] a.py:1: no device")
"""
    a, b = tmp_path / "a", tmp_path / "b"
    check = make_check({"both": 20})
    assert check.run("both", python(gpu_check, code, a, b), python(gpu_check, code, b, a))
    assert check.outcomes[0].skipped == ("[4] a.py:1: no device",)
    assert sorted((tmp_path / "both.log").read_text().splitlines()) == [
        f"[{number}] SKIPPED [2] a.py:1: no device" for number in (1, 2)
    ]
    check = make_check({"both": 20})
    assert not check.run("both", python(gpu_check, "pass"), python(gpu_check, "raise SystemExit(4)"))
    assert check.outcomes[0].result == "FAILED with 4"


@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc")
def test_ending_the_check_ends_its_step(gpu_check, tmp_path):
    code = f"""
import pathlib, signal, sys
sys.path.insert(0, {str(gpu_check.BENCH)!r})
import gpu_check
gpu_check.take_signals()
check = gpu_check.Check(pathlib.Path({str(tmp_path)!r}), "cpu", {{"step": 60}})
check.run("step", gpu_check.Command([sys.executable, "-c", {PARENT!r}, {str(tmp_path / "pid")!r}, "pass"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while "child started" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    process.stdout.close()
    wait_until_gone(int((tmp_path / "pid").read_text()))


def test_a_signal_while_a_step_starts_ends_the_step(gpu_check, make_check, monkeypatch):
    started = []

    class Signalled(gpu_check._Process):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self._process)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(gpu_check, "_Process", Signalled)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    gpu_check.take_signals()
    try:
        with pytest.raises(SystemExit):
            make_check({"step": 60}).run("step", python(gpu_check, WAITS))
        assert started[0].poll() == -signal.SIGKILL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        started[0].kill()


def test_steps_of_a_check_in_the_background_can_be_interrupted(gpu_check, tmp_path):
    code = f"""
import pathlib, signal, sys
sys.path.insert(0, {str(gpu_check.BENCH)!r})
import gpu_check
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what ends in &
gpu_check.take_signals()
check = gpu_check.Check(pathlib.Path({str(tmp_path)!r}), "cpu", {{"step": 60}})
asks = "import signal; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
sys.exit(not check.run("step", gpu_check.Command([sys.executable, "-c", asks])))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_shards_share_the_selected_tests(gpu_check, tmp_path):
    (tmp_path / "test_nine.py").write_text("""
import pytest
@pytest.mark.parametrize("i", [pytest.param(i, marks=[pytest.mark.odd] if i % 2 else []) for i in range(10)])
def test_each(i):
    with open("ran", "a") as file:
        file.write(f"{i} ")
""")
    environment = {"PYTHONPATH": str(gpu_check.BENCH), "POC_TEST_SHARD": "2/3"}
    options = [*PYTEST_ALONE, "-p", "gpu_shard", "-m", "odd", f"--rootdir={tmp_path}"]
    command = [sys.executable, *options, str(tmp_path / "test_nine.py")]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **WITHOUT_PLUGINS, **environment}, check=True)
    assert (tmp_path / "ran").read_text().split() == ["3", "9"], "of 1, 3, 5, 7 and 9 the second and the fifth"
