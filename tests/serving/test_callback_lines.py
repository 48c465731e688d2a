"""The lines of callbacks, on a clock of the test's own."""

import pytest

from poc_kernels.serving.callback_lines import GENERATED, VALIDATED, Backoff, Batch, Failure, Line

REFUSED = Failure("answered 400", refused=True)
FAILED = Failure("answered 500")


def batch(nonce, due=0.0, **keys):
    made = Batch(GENERATED, {"nonces": [nonce], "dist": [1.0], **keys})
    made.arrival, made.due = nonce, due
    return made


def line_of(*batches, kind=GENERATED):
    line = Line(kind, f"http://node/{kind}", (1.0, 8.0))
    line.batches.extend(batches)
    return line


def next_nonces(line, now, max_nonces=100, flush=False):
    """The nonces of the next post, or when to look again."""
    post, look_again = line.next_post(now, max_nonces, flush)
    return [nonce for each in post for nonce in each.nonces] if post else look_again


def answer(line, now, failure=None):
    post, line.on_the_way = line.on_the_way, []
    if failure is None:
        line.taken(post)
    else:
        line.put_back(post, failure, now)


def test_waits_double_up_to_the_longest():
    backoff = Backoff(1.0, 8.0)
    for longest in (1, 2, 4, 8, 8, 8):
        backoff.failed(now=100.0)
        assert 0.75 * longest <= backoff.until - 100 <= longest
    backoff.reset()
    assert backoff.until == 0
    backoff.failed(now=0.0)
    assert backoff.until <= 1


def test_months_of_failures_do_not_overflow():
    backoff = Backoff(0.5, 30.0)
    for _ in range(5000):
        backoff.failed(now=0.0)
    assert 22.5 <= backoff.until <= 30


@pytest.mark.parametrize(("asked", "low", "high"), [(5.0, 5, 5), (3600.0, 8, 8), (-5.0, 0.75, 1), (0.0, 0.75, 1)])
def test_a_wait_is_at_least_what_the_receiver_asks_up_to_the_longest(asked, low, high):
    backoff = Backoff(1.0, 8.0)
    backoff.failed(now=0.0, at_least=asked)
    assert low <= backoff.until <= high


def test_a_batch_waits_until_it_is_due_or_flushed():
    line = line_of(batch(1, due=5.0), batch(2, due=6.0))
    assert next_nonces(line, now=4.0) == 5.0
    assert next_nonces(line, now=5.0) == [1, 2]
    assert next_nonces(line_of(batch(1, due=5.0)), now=0.0, flush=True) == [1]


def test_verdicts_go_alone():
    line = line_of(batch(1), batch(2), kind=VALIDATED)
    assert next_nonces(line, now=0.0) == [1]


def test_a_failed_post_keeps_its_place_and_later_batches_join_it():
    line = line_of(batch(1), batch(2))
    assert next_nonces(line, now=0.0) == [1, 2]
    line.batches.append(batch(3))
    answer(line, 0.0, FAILED)
    assert 0.75 <= next_nonces(line, now=0.5) <= 1.0
    assert next_nonces(line, now=1.0) == [1, 2, 3]
    answer(line, 1.0)
    assert line.empty


def test_refused_batches_wait_at_the_back_one_by_one():
    line = line_of(batch(1), batch(2))
    next_nonces(line, now=0.0)
    answer(line, 0.0, REFUSED)
    line.batches.append(batch(3, due=0.5))
    assert next_nonces(line, now=0.1) == 0.5
    assert next_nonces(line, now=0.5) == [3]
    answer(line, 0.5)
    assert next_nonces(line, now=1.0) == [1]
    answer(line, 1.0, REFUSED)
    assert 2.5 <= next_nonces(line, now=1.1) <= 3.0
    assert next_nonces(line, now=3.0) == [2]
    answer(line, 3.0)  # the receiver takes them again: waits are short again
    assert next_nonces(line, now=3.0) == [1]
    answer(line, 3.0, REFUSED)
    assert 3.75 <= next_nonces(line, now=3.1) <= 4.0


def test_a_newcomer_that_is_refused_does_not_put_off_those_before_it():
    line = line_of(batch(1, node_id=1))
    next_nonces(line, now=0.0)
    answer(line, 0.0, REFUSED)
    for nonce in range(2, 10):
        line.batches.append(batch(nonce, node_id=nonce))
        assert next_nonces(line, now=nonce / 20) == [nonce]
        answer(line, nonce / 20, REFUSED)
    assert next_nonces(line, now=1.0) == [1]


def test_a_refused_batch_that_comes_due_is_not_starved_by_a_full_line():
    line = line_of(batch(1, node_id=1))
    next_nonces(line, now=0.0)
    answer(line, 0.0, REFUSED)
    line.batches.extend(batch(nonce, node_id=nonce) for nonce in range(2, 9))
    seen = []
    for now in (0.2, 0.4, 1.0, 1.2):
        seen += next_nonces(line, now)
        answer(line, now)
    assert seen == [2, 3, 1, 4]


def test_log_fields_name_the_nonces():
    line = Line(GENERATED, "http://user:secret@node:80/generated", (1.0, 8.0))
    fields = line.fields([batch(5, block_hash="b"), batch(9, block_hash="a")])
    assert fields == {
        "kind": "generated",
        "url": "http://node:80/generated",
        "block_hash": "a, b",
        "batches": 2,
        "nonces": 2,
        "first_nonce": 5,
        "last_nonce": 9,
    }
