"""The state of a node's rounds in HTTP: each round is told of by the wire of its proof form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import HTTPException

from ...protocol import IllegalTransitionError, PoCState
from ..round_service import RoundService
from .answers import bad_value, shutting_down
from .current import CurrentWire


class State:
    """Changes the state of a node's rounds, and tells of it.

    Args:
        service: the rounds.
        current: tells of rounds whose proofs are artifacts; of others the service itself does, as the older wire has
            it.
    """

    def __init__(self, service: RoundService, current: CurrentWire) -> None:
        self.service, self._current = service, current

    def status(self) -> dict[str, Any]:
        """Return what GET /status says."""
        told = self._current.status() or self.service.status()
        if self.service.manager.config is None:  # no round was begun, and a stop changes nothing
            told["status"] = PoCState.IDLE.value
        return told

    def changed(self, change: Callable[[], None], told: dict[str, Any] | None = None) -> dict[str, Any]:
        """Begin a round or a phase of it, and return what its route answers: the status, or ``told`` in its place."""
        if self.service.worker.ended and not self.service.stopping:
            raise HTTPException(503, "the proof thread is not running, so no round can begin")
        return self._changed(change, told)

    def _changed(self, change: Callable[[], None], told: dict[str, Any] | None = None) -> dict[str, Any]:
        if self.service.stopping:
            raise shutting_down()
        try:
            change()
        except (ValueError, TypeError) as error:
            raise bad_value(error) from error
        except IllegalTransitionError as error:
            raise self.not_allowed(error) from error
        return {"status": "OK", "pow_status": self.status() if told is None else told}

    def stop(self) -> dict[str, Any]:
        """End the round, and return what POST /stop answers."""
        stopped = {"status": PoCState.STOPPED.value}
        answer = self._changed(self.service.manager.stop_round, None if self._current.status() is None else stopped)
        return {**answer, "pow_status": {**answer["pow_status"], **stopped}}

    def not_allowed(self, error: Exception) -> HTTPException:
        """Return the answer to what the state does not allow."""
        return HTTPException(400 if self.service.manager.config is None else 409, str(error))
