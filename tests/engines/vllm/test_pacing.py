"""How many slices of proofs steps of users owe, and when."""

from __future__ import annotations

from poc_kernels.engines.vllm.pacing import ClockedDebt, CountedDebt, Counters, slices_per_1000_steps


def test_a_debt_is_paid_slice_by_slice_and_has_a_bound() -> None:
    counters = Counters(mean_step_seconds=0.010, mean_slice_seconds=0.002)
    debt = ClockedDebt(counters)
    debt.share = 0.2  # a quarter of each step
    debt.owe(0.004)
    assert not debt.due()
    debt.owe(0.005)
    assert debt.due()
    debt.pay(0.002)
    assert not debt.due()
    debt.owe(10.0)  # a long step is not paid at one go
    slices = 0
    while debt.due():
        debt.pay(0.002)
        slices += 1
    assert slices == 3
    debt.owe(10.0)
    debt.forgive()
    assert not debt.due()


def test_what_can_wait_is_less_than_two_slices_and_than_what_is_kept() -> None:
    counters = Counters(mean_step_seconds=0.010, mean_slice_seconds=0.002)
    clocked, counted = ClockedDebt(counters), CountedDebt()
    for share, thousandths, steps in ((0.05, 263, 2), (0.1, 555, 2), (0.2, 1250, 1), (0.3, 2142, 0)):
        clocked.share, counted.slices_per_1000_steps = share, thousandths
        for debt in (clocked, counted):
            debt.forgive()
            while not debt.due():
                debt.owe(0.010)
            waited = 0
            while debt.can_wait():
                debt.owe(0.010)
                waited += 1
            assert waited == steps, (share, debt)


def test_counted_debts_are_fractions_of_a_slice() -> None:
    debt = CountedDebt()
    debt.slices_per_1000_steps = 375
    slices = []
    for step in range(1, 801):
        debt.owe(0.0)
        while debt.due():
            debt.pay(0.0)
            slices.append(step)
    assert len(slices) == 300
    assert slices[:3] == [3, 6, 8]
    for _ in range(100):
        debt.owe(0.0)
    owed = 0
    while debt.due():
        debt.pay(0.0)
        owed += 1
    assert owed == 1


def test_slices_per_step_follow_the_lengths_of_both() -> None:
    assert slices_per_1000_steps(0.1, 0.018, 0.002) == 1000
    assert slices_per_1000_steps(0.5, 0.001, 0.004) == 250
    assert slices_per_1000_steps(0.1, 0.0, 0.002) == slices_per_1000_steps(0.1, 0.01, 0.0) == 0
