"""The lines of callbacks, on a clock of the test's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poc_kernels.service.outbox import GENERATED, VALIDATED, Backlog, Backoff, Batch, Failure, Line, merged

REFUSED = Failure("answered 400", refused=True)
FAILED = Failure("answered 500")
ANSWERS = {"taken": None, "failed": FAILED, "refused": REFUSED}


def batch(nonce, due=0.0, **keys):
    made = Batch(GENERATED, {"nonces": [nonce], "dist": [1.0], **keys})
    made.arrival, made.due = nonce, due
    return made


def line_of(*batches, kind=GENERATED):
    line = Line(kind, f"http://node/{kind}", (1.0, 8.0))
    for each in batches:
        line.add(each)
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
    line.add(batch(3))
    answer(line, 0.0, FAILED)
    assert 0.75 <= next_nonces(line, now=0.5) <= 1.0
    assert next_nonces(line, now=1.0) == [1, 2, 3]
    answer(line, 1.0)
    assert line.empty


def test_refused_batches_wait_at_the_back_one_by_one():
    line = line_of(batch(1), batch(2))
    next_nonces(line, now=0.0)
    answer(line, 0.0, REFUSED)
    line.add(batch(3, due=0.5))
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
        line.add(batch(nonce, node_id=nonce))
        assert next_nonces(line, now=nonce / 20) == [nonce]
        answer(line, nonce / 20, REFUSED)
    assert next_nonces(line, now=1.0) == [1]


def test_a_refused_batch_that_comes_due_is_not_starved_by_a_full_line():
    line = line_of(batch(1, node_id=1))
    next_nonces(line, now=0.0)
    answer(line, 0.0, REFUSED)
    for nonce in range(2, 9):
        line.add(batch(nonce, node_id=nonce))
    seen = []
    for now in (0.2, 0.4, 1.0, 1.2):
        seen += next_nonces(line, now)
        answer(line, now)
    assert seen == [2, 3, 1, 4]


def test_a_refused_batch_that_fails_otherwise_keeps_its_turn():
    line = line_of(batch(1), batch(2, node_id=2))
    for nonce in (1, 2):
        assert next_nonces(line, now=0.0) == [nonce]
        answer(line, 0.0, REFUSED)
    line.add(batch(3, node_id=3))
    assert next_nonces(line, now=1.0) == [1]
    answer(line, 1.0, FAILED)
    assert next_nonces(line, now=2.0) == [1]
    answer(line, 2.0)
    assert next_nonces(line, now=2.0) == [2]
    answer(line, 2.0)
    assert next_nonces(line, now=2.0) == [3]


def test_a_refused_batch_lets_pass_those_that_waited_and_no_later_ones():
    line = line_of(batch(1, node_id=1), batch(2, node_id=2), batch(3, node_id=3))
    next_nonces(line, now=0.0)
    answer(line, 0.0, REFUSED)
    line.add(batch(4, node_id=4))
    seen = []
    for now in (5.0, 5.1, 5.2, 5.3):
        seen += next_nonces(line, now)
        answer(line, now)
    assert seen == [2, 3, 1, 4]
    assert line.empty


def test_a_batch_gives_back_its_content_and_shares_what_is_common():
    contents = [{"nonces": [nonce], "dist": [1.0], "block_hash": "b" * 99, "node_id": nonce // 2} for nonce in range(3)]
    line = line_of()
    for content in contents:
        line.add(Batch(GENERATED, content))
    assert [each.content for each in line.all] == contents
    first, second, third = line.all
    assert first.common is second.common is not third.common
    assert merged([first, second]) == {**contents[0], "nonces": [0, 1], "dist": [1.0, 1.0]}


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.sampled_from(["add", "send", *ANSWERS]), st.integers(0, 2), st.integers(0, 5)), max_size=60),
)
def test_the_backlog_keeps_the_newest_up_to_the_bound(max_nonces, steps):
    """Against a plain list of all that wait."""
    backlog, lines, waiting = Backlog(max_nonces), [line_of() for _ in range(3)], []
    for arrival, (step, which, nonces) in enumerate(steps):
        line = lines[which]
        if step == "add":
            made = batch(arrival, nonces=[arrival] * nonces, dist=[1.0] * nonces, block_height=nonces % 2)
            line.add(made)
            backlog.add(line, made)
            waiting.append(made)
        elif step == "send" and not line.on_the_way and not line.empty:
            post, _ = line.next_post(1000.0 * arrival, max_nonces=6, flush=True)
            backlog.sent(post)
            waiting = [each for each in waiting if each not in post]
        elif step in ANSWERS and line.on_the_way:
            post = line.on_the_way
            answer(line, 1000.0 * arrival, ANSWERS[step])
            if ANSWERS[step] is None:
                backlog.taken(post)
            else:
                backlog.put_back(post)
                waiting = sorted([*waiting, *post], key=lambda each: each.arrival)
        excess = []
        while len(waiting) > 1 and sum(max(1, len(each.nonces)) for each in waiting) > max_nonces:
            excess.append(waiting.pop(0))
        dropped = backlog.drop_excess()
        assert sorted((b for batches in dropped.values() for b in batches), key=lambda each: each.arrival) == excess
        kept = [each for line in lines for each in line.all]
        assert {each for each in kept if each.waiting} == set(waiting)
        assert (len(backlog), backlog.nonces) == (len(kept), sum(len(each.nonces) for each in kept))


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


def test_log_fields_stay_on_their_line():
    line = Line(GENERATED, "http://node/\n\x1b[0m/generated", (1.0, 8.0))
    fields = line.fields([batch(5, block_hash="b\nforged\u2028é\ud800")])
    assert fields["url"] == "http://node/\\n\\x1b[0m/generated"
    assert fields["block_hash"] == "b\\nforged\\u2028é\\ud800"
    assert Failure("answered 500", "no\r\nforged\x00").text == "answered 500: no\\r\\nforged\\x00"
