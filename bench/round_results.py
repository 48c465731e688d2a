"""What a run of the round's suite says: times of batches, shares, the measured difference, goals met or not."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

from scipy.stats import quantile_test

PARTS = ("inputs", "projection", "forward", "distance")
LARGE_PARAMETERS = 6.5e9
"""From so many on a model is of 7B shapes."""
CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Median, and what the least and the greatest tenth lie beyond."""

    median: float
    p10: float
    p90: float


def spread(values: list[float]) -> Spread:
    """The spread of at least two values."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), deciles[0], deciles[-1])


class Difference(NamedTuple):
    """Seconds that the projection adds to a batch: the median, and the interval of `CONFIDENCE` that holds it."""

    median: float
    low: float
    high: float

    @property
    def below_noise(self) -> bool:
        """Whether no difference is seen: the interval holds zero."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Batch:
    """Seconds of one batch; ``layers`` of the decoder layers that ran, where they were timed."""

    seconds: float
    parts: dict[str, float]
    layers: float | None


@dataclass(frozen=True)
class Case:
    """A model's batches, without the projection and with it: each with it was taken between two without."""

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
    """What was measured, where the times here are those of the whole model, computed from it."""

    @property
    def computed(self) -> bool:
        """Whether times are computed."""
        return self.measured is not None

    @property
    def differences(self) -> list[float]:
        """Seconds of each batch with the projection, less the mean of the two beside it; always as measured."""
        if self.measured is not None:
            return self.measured.differences
        pairs = zip(self.off, self.off[1:], strict=False)
        return [
            on.seconds - (before.seconds + after.seconds) / 2
            for on, (before, after) in zip(self.on, pairs, strict=True)
        ]

    @property
    def difference(self) -> Difference:
        """The measured difference; the interval is that of the sign test, which takes no shape of noise for granted.

        Raises:
            ValueError: fewer than 6 batches, of which no interval can be told.
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
        """Time in both projections over that of the batch."""
        return spread([batch.parts["projection"] / batch.seconds for batch in self.on])

    @property
    def is_whole(self) -> bool:
        """Whether times are those of the whole model, measured or computed."""
        return self.computed or self.layers == self.whole_layers

    def whole(self) -> Case:
        """The case of the whole model: every layer that did not run takes what one that ran took in that batch.

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
    """The cases of a pytest-benchmark result: as measured, each of a few layers followed by its whole model."""
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
    """Whether the goal is for this case: whole models only, the second for large ones on a GPU."""
    if not case.is_whole:
        return False
    return goal == EVERYWHERE or (case.device == "cuda" and case.parameters >= LARGE_PARAMETERS)


class Verdict(NamedTuple):
    """Whether a goal is met, and what the measured difference says to it."""

    met: bool
    reason: str


def judge(goal: Goal, case: Case) -> Verdict:
    """Met if the share is under the goal, and the measured difference is not surely over it."""
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
