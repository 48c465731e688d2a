"""The steps of the check: their time, what ends with them, and what is kept of them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_processes import (
    FIRST_INTERRUPT,
    KILL,
    PYTEST_ALONE,
    ROOT,
    SECOND_INTERRUPT,
    WAITS,
    step_command,
)

from bench.gpu_check import steps

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


def gone(pid):
    """No such process, or one that has ended and only waits to be reaped."""
    status = Path("/proc", str(pid), "stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def wait_until_gone(pid):
    end = time.monotonic() + 30
    while not gone(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert gone(pid)


def test_what_fails_skips_or_is_absent_is_named(make_check, tmp_path):
    check = make_check({"good one": 10, "bad": 10, "absent": 10})
    assert check.run("good one", step_command("print('SKIPPED [1] a.py:3: no device')"))
    assert not check.run("bad", step_command("raise SystemExit(3)"))
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
def test_at_the_limit_a_step_ends_with_all_that_it_started(make_watched, tmp_path, capsys, before, moment, killed):
    check = make_watched("slow", {"child started": moment + 0.01})
    assert not check.run("slow", step_command(PARENT, tmp_path / "pid", before))
    assert (steps.time.monotonic() >= KILL) is killed
    assert check.outcomes[0].result == "FAILED: not done after 90 s"
    assert (tmp_path / "slow.log").read_text().startswith("child started\n"), "output is kept"
    assert "child started" in capsys.readouterr().out
    wait_until_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc")
def test_what_a_step_leaves_running_ends_with_it(make_check, tmp_path):
    code = PARENT.replace("time.sleep(300)\n", "")
    check = make_check({"step": 30})
    assert check.run("step", step_command(code, tmp_path / "pid", "pass"))
    wait_until_gone(int((tmp_path / "pid").read_text()))


def test_the_summary_is_kept_by_every_later_step(make_check, tmp_path):
    check = make_check({"last": 20})
    check.summary = "figures"
    check.run("last", step_command("pass"))
    assert (tmp_path / "gpu-check-cpu.txt").read_text() == f"figures\n{check.table()}\n"


def test_output_is_seen_while_a_step_runs(make_check, tmp_path):
    """The command ends only once its line is in the log."""
    code = """
import pathlib, sys, time
log = pathlib.Path(sys.argv[1])
print("first", flush=True)
while not log.exists() or "first" not in log.read_text():
    time.sleep(0.05)
"""
    (tmp_path / "step.log").write_text("of another run")
    assert make_check({"step": 20}).run("step", step_command(code, tmp_path / "step.log"))


def test_a_step_that_swallows_an_interrupt_gets_another(make_watched):
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
    assert not check.run("slow", step_command(code))
    assert check.outcomes[0].result == "FAILED: not done after 90 s"
    assert (check.out / "slow.log").read_text() == "ready\n" + "interrupted\n" * 2 + "ended by itself\n"


def test_late_pytest_keeps_what_it_has_measured(make_watched, tmp_path, monkeypatch):
    pytest.importorskip("pytest_benchmark")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark measures nothing in one
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
    command = steps.Command(
        [sys.executable, *options, str(tmp_path / "test_two.py")], {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    )
    assert not make_watched("suite", {"second began": FIRST_INTERRUPT + 0.01}).run("suite", command)
    assert '"test_first"' in json.read_text()


def test_steps_keep_to_the_total_and_take_what_earlier_ones_leave(make_check):
    check = make_check({"first": 10, "second": 20, "third": 5}, total=50.0, grace=1.0)
    assert 15 < check.left("first") < 25, "what the plan leaves of the total is the first's too"
    assert check.run("first", step_command("pass"))
    assert 25 < check.left("second") < 45
    check.skip("second", "no reason")
    assert 25 < check.left("third") < 50
    assert 2.9 < make_check({"only": 4}, total=4.0, grace=10.0).left("only") <= 3, "a quarter, if the grace is longer"


def test_a_step_without_time_is_skipped(make_check):
    check = make_check({"late": 1}, total=1.0)
    assert not check.run("late", step_command("pass"))
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


def test_a_late_step_that_need_not_end_is_not_done(make_watched):
    check = make_watched("slow", {"waits": FIRST_INTERRUPT + 0.01})
    assert not check.run("slow", step_command(WAITS), must_end=False)
    assert check.outcomes[0].result == "not done after 90 s"


@pytest.mark.parametrize("then", ["pass", WAITS], ids=["done", "late"])
def test_a_line_with_an_error_is_a_failure_done_or_not(make_watched, then):
    check = make_watched("step", {"waits": FIRST_INTERRUPT + 0.01})
    code = f"print('==== Invalid write', flush=True); {then}"
    assert not check.run("step", step_command(code), must_end=False, error="=+ (Invalid|Misaligned) ")
    assert check.outcomes[0].result == "FAILED: ==== Invalid write"


def test_what_a_device_does_not_support_is_skipped(make_check):
    check = make_check({"step": 20})
    code = "print('========= Error: Device not supported. Please refer', flush=True); raise SystemExit(1)"
    check.run("step", step_command(code), unsupported="=+ .*Device not supported")
    assert check.outcomes[0].result == "skipped: ========= Error: Device not supported. Please refer"
    check = make_check({"step": 20})
    check.run("step", step_command(code), error="=+ Error", unsupported="=+ .*Device not supported")
    assert check.outcomes[0].result.startswith("FAILED: ")


def test_a_plan_longer_than_the_total_is_refused(make_check):
    with pytest.raises(ValueError, match="plan must add up to at most total, 20 s, got 30 s"):
        make_check({"a": 10, "b": 20}, total=20.0)


def test_commands_of_a_step_run_at_once_and_their_skips_are_added(make_check, tmp_path):
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
    assert check.run("both", step_command(code, a, b), step_command(code, b, a))
    assert check.outcomes[0].skipped == ("[4] a.py:1: no device",)
    assert sorted((tmp_path / "both.log").read_text().splitlines()) == [
        f"[{number}] SKIPPED [2] a.py:1: no device" for number in (1, 2)
    ]
    check = make_check({"both": 20})
    assert not check.run("both", step_command("pass"), step_command("raise SystemExit(4)"))
    assert check.outcomes[0].result == "FAILED with 4"


@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc")
def test_ending_the_check_ends_its_step(tmp_path):
    code = f"""
import pathlib, signal, sys
from bench.gpu_check import steps
steps.take_signals()
check = steps.Check(pathlib.Path({str(tmp_path)!r}), "cpu", {{"step": 60}}, 60.0)
check.run("step", steps.Command([sys.executable, "-c", {PARENT!r}, {str(tmp_path / "pid")!r}, "pass"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while "child started" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    process.stdout.close()
    wait_until_gone(int((tmp_path / "pid").read_text()))


def test_a_signal_while_a_step_starts_ends_the_step(make_check, monkeypatch):
    started = []

    class Signalled(steps._Process):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self._process)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(steps, "_Process", Signalled)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    steps.take_signals()
    try:
        with pytest.raises(SystemExit):
            make_check({"step": 60}).run("step", step_command(WAITS))
        assert started[0].poll() == -signal.SIGKILL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        started[0].kill()


def test_steps_of_a_check_in_the_background_can_be_interrupted(tmp_path):
    code = f"""
import pathlib, signal, sys
from bench.gpu_check import steps
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what ends in &
steps.take_signals()
check = steps.Check(pathlib.Path({str(tmp_path)!r}), "cpu", {{"step": 60}}, 60.0)
asks = "import signal; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
sys.exit(not check.run("step", steps.Command([sys.executable, "-c", asks])))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
