"""The rig in this process: its turns, and what it says of a difference."""

import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from bench.interference import in_process, validation
from poc_kernels.scheduling import Pacing, TurnsClosed


def test_waits_of_steps_are_timed_while_the_pacing_changes():
    turns = in_process.TimedTurns(Pacing())
    step, proof = turns.inference(lambda: True), turns.proof()
    turns.pause_inference()
    taken = threading.Event()

    def take():
        with step:
            taken.set()

    thread = threading.Thread(target=take)
    thread.start()
    while not step.waiting:
        time.sleep(0.001)
    time.sleep(0.05)
    turns.resume_inference()
    thread.join(10)
    assert taken.is_set()
    assert turns.step_waits[0] >= 0.05
    turns.pacing = None
    with step, proof:
        assert step.computing
        assert proof.computing
    assert len(turns.step_waits) == 2, "slices' turns are not those of steps"
    turns.close()
    with pytest.raises(TurnsClosed), step:
        pass


def test_a_distance_that_differs_is_named():
    expected = SimpleNamespace(nonces=[7, 8], dist=[1.25, 1.5])
    assert str(validation.difference(expected, [1.25, 1.0])) == "the distance of nonce 8 is 1.0, alone it is 1.5"
    assert str(validation.difference(expected, [1.25])) == "1 distances came for 2 nonces"
