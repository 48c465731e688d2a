"""Functions in processes of their own: what comes of those that return, raise, crash and hang."""

import os
import signal
import time

from bench.gpu_check import apart
from bench.gpu_check.apart import Task


def gives(value):
    print("printed")
    return value


def raises():
    raise ValueError("a reason\nand more")


def crashes():
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(pid_file):
    with open(pid_file, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(300)


def outcomes(tasks, folder, workers=4, seconds=60.0):
    return {done.task.name: done for done in apart.run(tasks, workers, time.monotonic() + seconds, folder)}


def test_one_that_raises_crashes_or_hangs_loses_only_itself(tmp_path):
    pid_file = tmp_path / "pid"
    done = outcomes(
        [
            Task("raises", raises),
            Task("crashes", crashes),
            Task("hangs", hangs, (str(pid_file),), seconds=1.0),
            *(Task(f"gives {i}", gives, ({"value": i},)) for i in range(5)),
        ],
        tmp_path,
    )
    assert [done[f"gives {i}"].result for i in range(5)] == [{"value": i} for i in range(5)]
    assert all(done[f"gives {i}"].error is None for i in range(5))
    assert (tmp_path / "gives-0.log").read_text() == "printed\n"
    assert done["raises"].error == "ValueError: a reason"
    assert "Traceback" in (tmp_path / "raises.log").read_text()
    assert done["crashes"].error == f"ended with {-signal.SIGKILL}: last words"
    assert done["hangs"].error.startswith("not done after ")
    if pid_file.exists():
        status = f"/proc/{pid_file.read_text()}/stat"
        assert not os.path.exists(status), "it was killed and waited for"


def test_what_has_not_begun_by_the_end_is_named(tmp_path):
    tasks = [Task("hangs", hangs, (str(tmp_path / "pid"),)), Task("waits", gives, (1,))]
    done = outcomes(tasks, tmp_path, workers=1, seconds=0.5)
    assert done["waits"].error == "out of time before it began"
    assert done["hangs"].error.startswith("out of time after ")


def test_tasks_that_are_left_are_ended_with_the_loop(tmp_path):
    pid_file = tmp_path / "pid"
    loop = apart.run(
        [Task("hangs", hangs, (str(pid_file),)), Task("gives", gives, (1,))], 2, time.monotonic() + 60, tmp_path
    )
    assert next(loop).task.name == "gives"
    loop.close()
    assert not pid_file.exists() or not os.path.exists(f"/proc/{pid_file.read_text() or 0}/stat")
