"""How the refusal of a user's request reads: an OpenAI error object."""

from __future__ import annotations

from collections.abc import Mapping


class AdmissionError(Exception):
    """A request that is refused, with the answer that its client gets.

    Args:
        status: HTTP status.
        message: what is wrong, for the client.
        param: the field of the body that is wrong, if one is.
        code: OpenAI's short name of the error, if it has one.
        headers: headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the OpenAI error object; its type is that of the status."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
