"""How many rows are computed between two pauses: on a CPU by its clock, on a GPU by events, on stand-ins."""

import types

import pytest
import torch

from poc_kernels.protocol import pieces as pieces_module
from poc_kernels.protocol.pieces import Pieces

ROW_SECONDS = 0.001


def test_on_a_cpu_pieces_take_as_long_as_they_should(monkeypatch):
    now = 0.0

    def clock():
        nonlocal now
        now += ROW_SECONDS
        return now

    monkeypatch.setattr(pieces_module, "time", types.SimpleNamespace(thread_time=clock))
    pieces, pauses = Pieces(torch.device("cpu"), 0.01), []

    def computed(count, width=7):
        nonlocal now
        found = []
        for piece in pieces.of("inputs", count, width, lambda: pauses.append(1), at_once=1000):
            now += ROW_SECONDS * (piece.stop - piece.start)  # each row takes as long as looking at the clock
            found.append((piece.start, piece.stop))
        return found

    # The first is timed: 2 ms with the clock, so 5 rows to 10 ms; then 1.2 ms a row, so 8.
    assert computed(20) == [(0, 1), (1, 6), (6, 14), (14, 20)]
    assert computed(20)[0] == (0, 8)
    assert computed(20, width=8)[0] == (0, 1)
    assert len(pauses) == 4 + 3 + 4
    assert computed(0) == []


class Device:
    """A GPU that computes rows when it is waited for, and events on it."""

    def __init__(self, monkeypatch):
        self.given, self.waited = 0.0, 0
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self, _):
        self.at = self.device.given

    def synchronize(self):
        self.device.waited += 1

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def test_on_a_gpu_pieces_are_timed_once_their_results_were_read(device):
    pieces = Pieces(torch.device("cuda", 0), 0.01)

    def computed(count):
        found = []
        for piece in pieces.of("inputs", count, 7, lambda: None, at_once=30, min_rows=2):
            device.given += ROW_SECONDS * (piece.stop - piece.start)
            found.append(piece.stop - piece.start)
        return found

    assert computed(70) == [30, 30, 10]
    assert computed(40) == [30, 10]  # nothing was read yet
    assert device.waited == 0  # and nobody waits between pieces
    pieces.forget_unread()
    assert computed(40) == [30, 10]
    pieces.read()
    assert computed(25) in ([10, 10, 5], [9, 9, 7])
    pieces.read()
    device.waited = 0
    pieces.read()
    assert device.waited == 0  # what was read is not read again


@pytest.mark.parametrize("slice_seconds", [1e308, float("inf")])
def test_a_piece_may_take_any_time(slice_seconds):
    pieces = Pieces(torch.device("cpu"), slice_seconds)
    found = [(piece.start, piece.stop) for piece in pieces.of("inputs", 20, 7, lambda: None, at_once=1000)]
    assert found == [(0, 1), (1, 20)]


def test_a_piece_has_its_minimum_of_rows(device):
    pieces = Pieces(torch.device("cuda", 0), 1e-9)

    def ends(count):
        return [piece.stop for piece in pieces.of("projection", count, 7, lambda: None, at_once=0, min_rows=256)]

    assert ends(600) == [256, 512, 600]
    pieces.read()
    assert ends(300) == [256, 300]


def test_a_piece_that_is_given_up_teaches_nothing(device):
    pieces = Pieces(torch.device("cuda", 0), 0.01)
    given_up = pieces.of("inputs", 5, 7, lambda: None, at_once=5)
    next(given_up)
    with pytest.raises(KeyError):
        given_up.throw(KeyError)
    pieces.read()
    assert device.waited == 0
