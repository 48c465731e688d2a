"""The bodies of the wire of today. Each carries a whole configuration, whose model and form are in ``params``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ...protocol import PoCConfig
from ...protocol.artifacts.encoding import bounded
from ...protocol.artifacts.form import ArtifactForm
from ...protocol.artifacts.proofs import ArtifactBatch
from ...protocol.checks import check_ints
from ..strict_model import StrictModel
from .ignored import ignored_keys

_MAX_SHOWN = 64
_OF_PARAMS = ("seq_len", "k_dim", "proof", "use_random_projection")


class Params(StrictModel):
    """What is proved: the model, the proof form and its size. Unknown keys are refused.

    ``proof`` and ``use_random_projection`` are ours. Of the decode scheme there is nothing here: ``scheme`` and
    ``decode`` must say that it is not asked for, and then ``max_tokens`` and ``route_window``, which describe it, mean
    nothing.
    """

    model: str
    seq_len: int
    k_dim: int | None = None
    proof: str = "vectors"
    use_random_projection: bool = False
    scheme: str | None = None
    decode: bool | None = None
    max_tokens: int | None = None
    route_window: int | None = None

    def check_scheme(self) -> None:
        """Raise a ValueError if the decode scheme is asked for."""
        for name, plain in (("scheme", "prefill"), ("decode", False)):
            value = getattr(self, name)
            if value not in (None, plain):
                got = value[:_MAX_SHOWN] if isinstance(value, str) else value
                raise ValueError(f"params.{name} must be {plain!r}: there is no decode scheme here, got {got!r}")


class _Body(BaseModel):
    """What the bodies of /init/generate and /generate have in common. An empty ``url`` means none."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    block_hash: str
    block_height: int
    public_key: str
    node_id: int
    node_count: int
    batch_size: int = PoCConfig.batch_size
    params: Params
    url: str | None = None
    poc_stronger_rng: bool = False

    def keys(self) -> dict[str, str]:
        """Return what the fields of a `PoCConfig` and of a `StatTest` are called here, where that is another name."""
        of_params = {name: f"params.{name}" for name in _OF_PARAMS}
        return {**of_params, "callback_url": "url", "stronger_rng": "poc_stronger_rng"}

    def config(self) -> dict[str, Any]:
        """Return the fields of a `PoCConfig`.

        Raises:
            ValueError: the decode scheme is asked for.
        """
        self.params.check_scheme()
        same = ("block_hash", "block_height", "public_key", "node_id", "node_count")
        return {
            **{name: getattr(self, name) for name in same},
            **{name: getattr(self.params, name) for name in _OF_PARAMS},
            "batch_size": self.batch_size or PoCConfig.batch_size,  # 0: whatever the node has
            "callback_url": self.url or None,
            "stronger_rng": self.poc_stronger_rng,
        }


class GenerationBody(_Body):
    """Body of /init/generate: a round that generates at once. Unknown keys are ignored, and told of."""

    model_config = ConfigDict(extra="allow")

    group_id: int = 0
    n_groups: int = 1

    def config(self) -> dict[str, Any]:
        """Return the fields of a `PoCConfig`: see `_Body.config`."""
        return {**super().config(), "group_id": self.group_id, "n_groups": self.n_groups}

    def ignored(self) -> list[str]:
        """Name the keys of the body that mean nothing here."""
        return ignored_keys(self.model_extra or {})


class Artifact(BaseModel):
    """What a node claims for a nonce. A text that is no vector is a mismatch, and no error."""

    model_config = ConfigDict(strict=True)

    nonce: int
    vector_b64: str


class Claims(BaseModel):
    """An artifact for each of the nonces, in any order."""

    model_config = ConfigDict(strict=True)

    artifacts: Annotated[list[Artifact], Field(fail_fast=True)]


class StatTestBody(BaseModel):
    """How to judge: what is missing is the proof form's. ``p_value_threshold`` is another name of fraud_threshold."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    dist_threshold: float | None = None
    p_mismatch: float | None = None
    fraud_threshold: float | None = None
    p_value_threshold: float | None = None

    def keys(self) -> dict[str, str]:
        """Return the keys of a body that give the fields of a `StatTest`."""
        other_name = self.fraud_threshold is None and self.p_value_threshold is not None
        return {
            "dist_threshold": "stat_test.dist_threshold",
            "p_mismatch": "stat_test.p_mismatch",
            "fraud_threshold": "stat_test.p_value_threshold" if other_name else "stat_test.fraud_threshold",
        }

    def given(self) -> dict[str, float]:
        """Return the fields of a `StatTest` that are given.

        Raises:
            ValueError: the two names of the threshold contradict each other.
        """
        fraud_threshold = self.p_value_threshold if self.fraud_threshold is None else self.fraud_threshold
        if self.p_value_threshold not in (None, fraud_threshold):
            raise ValueError(
                "stat_test.fraud_threshold and stat_test.p_value_threshold must be the same where both are given, "
                f"got {self.fraud_threshold} and {self.p_value_threshold}"
            )
        fields = {"dist_threshold": self.dist_threshold, "p_mismatch": self.p_mismatch}
        return {
            name: value for name, value in {**fields, "fraud_threshold": fraud_threshold}.items() if value is not None
        }


class GenerateBody(_Body):
    """Body of /generate: nonces to compute and, where there is a ``validation``, to compare with what a node claims."""

    # The first wrong value ends it: a body can have a hundred thousand of them.
    nonces: Annotated[list[int], Field(fail_fast=True)]
    wait: bool = False
    validation: Claims | None = None
    stat_test: StatTestBody | None = None

    def keys(self) -> dict[str, str]:
        """Return what fields are called here: see `_Body.keys`."""
        return {**super().keys(), **({} if self.stat_test is None else self.stat_test.keys())}

    def proof(self, form: ArtifactForm, config: PoCConfig) -> ArtifactBatch:
        """Return what is to be computed, and what was claimed of it.

        A claimed text that is no vector for its length alone is kept as an empty one, which mismatches as well: what
        waits, and what is kept of it, is bounded by the number of nonces.

        Args:
            form: that of the configuration.
            config: what the body asks for.

        Raises:
            ValueError: a value is one that a proof does not take, or the claims are not of these nonces.
        """
        check_ints("nonces", self.nonces, 0, form.max_nonce)
        given = {} if self.stat_test is None else self.stat_test.given()
        return ArtifactBatch(
            self.public_key,
            self.block_hash,
            self.block_height,
            self.nonces,
            [bounded(text, form.k_dim_of(config)) for text in self._claimed()],
            self.node_id,
            dataclasses.replace(form.stat_test, **given),
        )

    def _claimed(self) -> list[str]:
        if self.validation is None:
            return []
        claimed = {artifact.nonce: artifact.vector_b64 for artifact in self.validation.artifacts}
        artifacts, unknown = len(self.validation.artifacts), len(claimed.keys() - set(self.nonces))
        if unknown or not artifacts == len(claimed) == len(self.nonces):
            raise ValueError(
                f"validation.artifacts must have one artifact for each of the {len(self.nonces)} nonces, "
                f"got {artifacts}, {artifacts - len(claimed)} of them repeated and {unknown} of other nonces"
            )
        return [claimed[nonce] for nonce in self.nonces]
