"""The figures of a run of the suite: times of batches, shares, the measured difference, and whether goals are met."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

from scipy.stats import quantile_test

from bench.common.spread import Spread, spread

PARTS = ("inputs", "projection", "forward", "distance")
LARGE_PARAMETERS = 6.5e9
"""A model with at least this many has 7B shapes."""
CONFIDENCE = 0.95


class Difference(NamedTuple):
    """The seconds that the projection adds to a batch: the median, and the interval that has it with `CONFIDENCE`."""

    median: float
    low: float
    high: float

    @property
    def below_noise(self) -> bool:
        """Whether no difference is seen: zero lies in the interval."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Batch:
    """The seconds of one batch, and of the decoder layers that ran in it, where they were timed."""

    seconds: float
    parts: dict[str, float]
    layers: float | None


@dataclass(frozen=True)
class Case:
    """The batches of a model: each with the projection ran between two without it."""

    model: str
    layers: int
    whole_layers: int
    parameters: int
    hidden_size: int
    batch_size: int
    seq_len: int
    dtype: str
    device: str
    warnings: list[str]
    off: list[Batch]
    on: list[Batch]
    memory: dict[str, int]
    measured: Case | None = None
    """The case that was measured, where the times here are computed from it for the whole model."""

    @property
    def computed(self) -> bool:
        """Whether times are computed."""
        return self.measured is not None

    @property
    def differences(self) -> list[float]:
        """Seconds of each batch with the projection, less the mean of those before and after it; always as measured."""
        if self.measured is not None:
            return self.measured.differences
        pairs = zip(self.off, self.off[1:], strict=False)
        return [
            on.seconds - (before.seconds + after.seconds) / 2
            for on, (before, after) in zip(self.on, pairs, strict=True)
        ]

    @property
    def difference(self) -> Difference:
        """The measured difference; the interval is that of the sign test, which assumes nothing about the noise.

        Raises:
            ValueError: there are fewer than 6 batches, too few for an interval.
        """
        differences = self.differences
        if len(differences) < 6:
            raise ValueError(f"a case must have at least 6 batches with the projection, got {len(differences)}")
        interval = quantile_test(differences, q=0.0, p=0.5).confidence_interval(CONFIDENCE)
        return Difference(statistics.median(differences), float(interval.low), float(interval.high))

    @property
    def relative_difference(self) -> Difference:
        """The difference over the median time without the projection."""
        base = statistics.median(batch.seconds for batch in self.off)
        return Difference(*(seconds / base for seconds in self.difference))

    @property
    def share(self) -> Spread:
        """The time of both projections over that of the batch."""
        return spread([batch.parts["projection"] / batch.seconds for batch in self.on])

    @property
    def is_whole(self) -> bool:
        """Whether times are those of the whole model, whether measured or computed."""
        return self.computed or self.layers == self.whole_layers

    def whole(self) -> Case:
        """Return the case of the whole model: a layer that did not run is given the mean time of those that ran.

        Raises:
            ValueError: the layers were not timed.
        """
        return dataclasses.replace(
            self, off=list(map(self._with_all, self.off)), on=list(map(self._with_all, self.on)), measured=self
        )

    def _with_all(self, batch: Batch) -> Batch:
        if batch.layers is None:
            raise ValueError(f"layers of {self.model} must have been timed to compute the whole model")
        missing = batch.layers * (self.whole_layers - self.layers) / self.layers
        parts = {**batch.parts, "forward": batch.parts["forward"] + missing}
        return Batch(batch.seconds + missing, parts, batch.layers + missing)


def read_cases(results: dict[str, Any]) -> list[Case]:
    """Read the cases of a pytest-benchmark result as measured; one of a few layers is followed by its whole model."""
    names = [field.name for field in dataclasses.fields(Case) if field.name not in ("off", "on", "measured")]
    cases = []
    for bench in results["benchmarks"]:
        if bench["group"] != "round":
            continue
        info = bench["extra_info"]
        off, on = ([Batch(**batch) for batch in info[side]] for side in ("off", "on"))
        case = Case(off=off, on=on, **{name: info[name] for name in names})
        cases.append(case)
        if not case.is_whole:
            cases.append(case.whole())
    return cases


class Goal(NamedTuple):
    """A limit on the share of a round spent in both projections."""

    share: float
    where: str


EVERYWHERE = Goal(0.05, "always")
LARGE_ON_GPU = Goal(0.005, "at 7B shapes on a GPU")
GOALS = (EVERYWHERE, LARGE_ON_GPU)


def applies(goal: Goal, case: Case) -> bool:
    """Return whether the goal is for this case: for whole models only, the second for large ones on a GPU."""
    if not case.is_whole:
        return False
    return goal == EVERYWHERE or (case.device == "cuda" and case.parameters >= LARGE_PARAMETERS)


class Verdict(NamedTuple):
    """Whether a goal is met, and what the measured difference says about it."""

    met: bool
    reason: str


def judge(goal: Goal, case: Case) -> Verdict:
    """Decide a goal: it is met if the share is under it and the measured difference is not surely over it."""
    difference = case.relative_difference
    if case.share.median >= goal.share:
        return Verdict(False, "the share is not under it")
    if difference.low >= goal.share:
        return Verdict(False, "the share is under it, the measured difference is not")
    if case.share.p90 >= goal.share:
        return Verdict(True, "by the median share; batches of the slowest tenth are over it")
    if case.computed:
        return Verdict(True, "by the share, which is computed")
    if difference.high < goal.share:
        return Verdict(True, "by the share; the measured difference confirms it")
    return Verdict(True, "by the share; the measured difference is too noisy to confirm it")
