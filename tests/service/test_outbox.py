"""The outbox of callbacks and its destinations, on a clock of the tests' own."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poc_kernels.service.outbox import GENERATED, VALIDATED, Backoff, Delivery, Destination, Failure, Outbox, merged

PER_NONCE = ("nonces", "dist")
REFUSED = Failure("answered 400", refused=True)
FAILED = Failure("answered 500")
ANSWERS = {"delivered": None, "failed": FAILED, "refused": REFUSED}


def delivery(nonce, due=0.0, **keys):
    made = Delivery({"nonces": [nonce], "dist": [1.0], **keys}, PER_NONCE)
    made.arrival, made.due = nonce, due
    return made


def destination_of(*deliveries, kind=GENERATED):
    destination = Destination(kind, f"http://node/{kind}", (1.0, 8.0))
    for each in deliveries:
        destination.add(each)
    return destination


def next_nonces(destination, now, max_nonces=100, flush=False):
    """The nonces of the next post, or when to look again."""
    look_again = destination.ready_at(now, max_nonces, flush)
    post = destination.next_post(now, max_nonces, flush)
    assert bool(post) == (look_again == now)
    return [nonce for each in post for nonce in each.nonces] if post else look_again


def answer(destination, now, failure=None):
    post, destination.in_flight = destination.in_flight, []
    if failure is None:
        destination.delivered(post)
    else:
        destination.put_back(post, failure, now)


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
    backoff.failed(now=0.0, min_seconds=asked)
    assert low <= backoff.until <= high


def test_a_delivery_waits_until_it_is_due_or_flushed():
    destination = destination_of(delivery(1, due=5.0), delivery(2, due=6.0))
    assert next_nonces(destination, now=4.0) == 5.0
    assert next_nonces(destination, now=5.0) == [1, 2]
    assert next_nonces(destination_of(delivery(1, due=5.0)), now=0.0, flush=True) == [1]


def test_verdicts_go_alone():
    destination = destination_of(delivery(1), delivery(2), kind=VALIDATED)
    assert next_nonces(destination, now=0.0) == [1]


def test_a_failed_post_keeps_its_place_and_is_repeated_as_it_was():
    destination = destination_of(delivery(1), delivery(2))
    assert next_nonces(destination, now=0.0) == [1, 2]
    post_ids = [[each.post_id for each in destination.in_flight]]
    destination.add(delivery(3))
    answer(destination, 0.0, FAILED)
    assert 0.75 <= next_nonces(destination, now=0.5) <= 1.0
    for _ in range(2):
        assert next_nonces(destination, now=1.0) == [1, 2]
        post_ids.append([each.post_id for each in destination.in_flight])
        answer(destination, 0.0, FAILED)
        destination.retry.reset()
    assert next_nonces(destination, now=1.0) == [1, 2]
    answer(destination, 1.0)
    assert next_nonces(destination, now=1.0) == [3]
    post_ids.append([each.post_id for each in destination.in_flight])
    answer(destination, 1.0)
    assert destination.empty
    first, *_ = post_ids[0]
    assert post_ids[:3] == [[first] * 2] * 3
    assert post_ids[3] not in ([first], [""])


def test_what_is_left_of_a_post_has_another_id():
    destination = destination_of(delivery(1), delivery(2), delivery(3))
    next_nonces(destination, now=0.0)
    before = destination.in_flight[0].post_id
    answer(destination, 0.0, FAILED)
    destination.drop(destination.fresh[0])
    destination.add(delivery(4))
    destination.retry.reset()
    assert next_nonces(destination, now=1.0) == [2, 3, 4]
    assert destination.in_flight[0].post_id not in (before, "")


def test_a_merged_post_that_is_refused_is_taken_apart_into_others_which_keep_their_ids():
    destination = destination_of(delivery(1), delivery(2))
    next_nonces(destination, now=0.0)
    merged_id = destination.in_flight[0].post_id
    answer(destination, 0.0, REFUSED)
    ids = {}
    for now in (100.0, 200.0, 300.0, 400.0):
        (nonce,) = next_nonces(destination, now)
        ids.setdefault(nonce, []).append(destination.in_flight[0].post_id)
        answer(destination, now, REFUSED)
    assert {nonce: len(set(each)) for nonce, each in ids.items()} == {1: 1, 2: 1}
    assert len({merged_id, ids[1][0], ids[2][0]}) == 3


def test_refused_deliveries_wait_behind_the_others_one_by_one():
    destination = destination_of(delivery(1), delivery(2))
    next_nonces(destination, now=0.0)
    answer(destination, 0.0, REFUSED)
    destination.add(delivery(3, due=0.5))
    assert next_nonces(destination, now=0.1) == 0.5
    assert next_nonces(destination, now=0.5) == [3]
    answer(destination, 0.5)
    assert next_nonces(destination, now=1.0) == [1]
    answer(destination, 1.0, REFUSED)
    assert 2.5 <= next_nonces(destination, now=1.1) <= 3.0
    assert next_nonces(destination, now=3.0) == [2]
    answer(destination, 3.0)  # the receiver takes them again: waits are short again
    assert next_nonces(destination, now=3.0) == [1]
    answer(destination, 3.0, REFUSED)
    assert 3.75 <= next_nonces(destination, now=3.1) <= 4.0


def test_a_new_refusal_does_not_delay_those_before_it():
    destination = destination_of(delivery(1, node_id=1))
    next_nonces(destination, now=0.0)
    answer(destination, 0.0, REFUSED)
    for nonce in range(2, 10):
        destination.add(delivery(nonce, node_id=nonce))
        assert next_nonces(destination, now=nonce / 20) == [nonce]
        answer(destination, nonce / 20, REFUSED)
    assert next_nonces(destination, now=1.0) == [1]


def test_a_refused_delivery_that_comes_due_is_not_starved_by_others():
    destination = destination_of(delivery(1, node_id=1))
    next_nonces(destination, now=0.0)
    answer(destination, 0.0, REFUSED)
    for nonce in range(2, 9):
        destination.add(delivery(nonce, node_id=nonce))
    seen = []
    for now in (0.2, 0.4, 1.0, 1.2):
        seen += next_nonces(destination, now)
        answer(destination, now)
    assert seen == [2, 3, 1, 4]


def test_a_refused_delivery_that_fails_otherwise_keeps_its_turn():
    destination = destination_of(delivery(1), delivery(2, node_id=2))
    for nonce in (1, 2):
        assert next_nonces(destination, now=0.0) == [nonce]
        answer(destination, 0.0, REFUSED)
    destination.add(delivery(3, node_id=3))
    assert next_nonces(destination, now=1.0) == [1]
    answer(destination, 1.0, FAILED)
    assert next_nonces(destination, now=2.0) == [1]
    answer(destination, 2.0)
    assert next_nonces(destination, now=2.0) == [2]
    answer(destination, 2.0)
    assert next_nonces(destination, now=2.0) == [3]


def test_a_refused_delivery_lets_pass_those_that_waited_and_no_later_ones():
    destination = destination_of(delivery(1, node_id=1), delivery(2, node_id=2), delivery(3, node_id=3))
    next_nonces(destination, now=0.0)
    answer(destination, 0.0, REFUSED)
    destination.add(delivery(4, node_id=4))
    seen = []
    for now in (5.0, 5.1, 5.2, 5.3):
        seen += next_nonces(destination, now)
        answer(destination, now)
    assert seen == [2, 3, 1, 4]
    assert destination.empty


def test_a_delivery_returns_its_body_and_shares_what_is_common():
    bodies = [{"nonces": [nonce], "dist": [1.0], "block_hash": "b" * 99, "node_id": nonce // 2} for nonce in range(3)]
    destination = destination_of()
    for body in bodies:
        destination.add(Delivery(body, PER_NONCE))
    assert [merged([each]) for each in destination.all] == bodies
    first, second, third = destination.all
    assert first.common is second.common is not third.common
    assert merged([first, second]) == {**bodies[0], "nonces": [0, 1], "dist": [1.0, 1.0]}


@given(
    st.integers(1, 12),
    st.lists(
        st.tuples(st.sampled_from(["add", "send", "age", "all", *ANSWERS]), st.integers(0, 2), st.integers(0, 5)),
        max_size=60,
    ),
)
def test_the_outbox_keeps_the_newest_up_to_the_bound(max_nonces, steps):
    """Compare with a plain list of all that wait."""
    outbox, destinations, waiting = Outbox(max_nonces), [destination_of() for _ in range(3)], []
    for arrival, (step, which, nonces) in enumerate(steps):
        destination = destinations[which]
        if step == "add":
            made = delivery(arrival, nonces=[arrival] * nonces, dist=[1.0] * nonces, block_height=nonces % 2)
            made.arrived = float(arrival)
            destination.add(made)
            outbox.add(destination, made)
            waiting.append(made)
        elif step == "send" and not destination.in_flight and not destination.empty:
            post = destination.next_post(1000.0 * arrival, max_nonces=6, flush=True)
            outbox.sent(post)
            waiting = [each for each in waiting if each not in post]
        elif step == "age":
            before = arrival - 3.0 * nonces
            older = [each for each in waiting if each.arrived < before]
            dropped = outbox.drop_older(before)
            assert sorted(itertools.chain(*dropped.values()), key=lambda each: each.arrival) == older
            waiting = [each for each in waiting if each not in older]
        elif step == "all":
            its = {each for each in destination.all if each.waiting}
            assert set(outbox.drop_all(destination)) == its
            assert destination.all == destination.in_flight
            waiting = [each for each in waiting if each not in its]
        elif step in ANSWERS and destination.in_flight:
            post = destination.in_flight
            answer(destination, 1000.0 * arrival, ANSWERS[step])
            if ANSWERS[step] is None:
                outbox.delivered(post)
            else:
                outbox.wait(post)
                waiting = sorted([*waiting, *post], key=lambda each: each.arrival)
        excess = []
        while len(waiting) > 1 and sum(max(1, len(each.nonces)) for each in waiting) > max_nonces:
            excess.append(waiting.pop(0))
        dropped = outbox.drop_excess()
        assert sorted(itertools.chain(*dropped.values()), key=lambda each: each.arrival) == excess
        kept = [each for destination in destinations for each in destination.all]
        assert {each for each in kept if each.waiting} == set(waiting)
        assert (len(outbox), outbox.nonces) == (len(kept), sum(len(each.nonces) for each in kept))


def test_log_fields_name_the_nonces():
    destination = Destination(GENERATED, "http://user:secret@node:80/generated", (1.0, 8.0))
    fields = destination.fields([delivery(5, block_hash="b"), delivery(9, block_hash="a")])
    assert fields == {
        "kind": "generated",
        "url": "http://node:80/generated",
        "block_hash": "a, b",
        "batches": 2,
        "nonces": 2,
        "first_nonce": 5,
        "last_nonce": 9,
    }


def test_log_fields_stay_on_one_line():
    destination = Destination(GENERATED, "http://node/\n\x1b[0m/generated", (1.0, 8.0))
    fields = destination.fields([delivery(5, block_hash="b\nforged\u2028é\ud800")])
    assert fields["url"] == "http://node/\\n\\x1b[0m/generated"
    assert fields["block_hash"] == "b\\nforged\\u2028é\\ud800"
    assert Failure("answered 500", "no\r\nforged\x00").text == "answered 500: no\\r\\nforged\\x00"
