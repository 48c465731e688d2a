"""What becomes of the fields of a body, and how a refusal names the one that is wrong."""

from __future__ import annotations

import functools
import json
import logging
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, to_json
from pydantic_core.core_schema import no_info_plain_validator_function

from ...service.errors import AdmissionError
from ...service.strict_model import StrictModel

logger = logging.getLogger("poc_kernels")

_MAX_SHOWN = 300
"""Characters of what a client sent that a refusal repeats at most."""

_UNSUPPORTED = "unsupported"


class Refused:
    """Marks a field that is refused unless it is null or has one of the values ``off``, which mean that it is off."""

    def __init__(self, *off: Any) -> None:
        self.off = off

    def __get_pydantic_core_schema__(self, *_: Any) -> CoreSchema:
        """Return how pydantic checks the field."""
        return no_info_plain_validator_function(self._check)

    def _check(self, value: Any) -> None:
        if value is None or any(type(value) is type(off) and value == off for off in self.off):
            return
        others = "".join(f" or send {json.dumps(off)}" for off in self.off)
        raise PydanticCustomError(_UNSUPPORTED, "is not supported here: leave it out{others}", {"others": others})


@dataclass(frozen=True)
class NoEffect:
    """Marks a field that is taken and changes nothing, and says why that does no harm."""

    why: str


_T = TypeVar("_T")
# Checking ends at the first wrong item: a body can have a million, each with an error per member of a union.
List = Annotated[list[_T], Field(fail_fast=True)]
Items = Annotated[list[_T], Field(min_length=1, fail_fast=True)]


class Item(BaseModel):
    """A part of a body that clients send back as they got it: fields that nobody knows are left out."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Options(StrictModel):
    """A part of a body that asks for something: fields that nobody knows are refused."""


def one_of(kind: Callable[[Any], str]) -> Discriminator:
    """Choose the member of a union, so that a refusal names what is wrong in the one that is meant."""
    return Discriminator(kind)


class CheckedBody(Options):
    """A whole body."""

    def check(self) -> None:
        """Check fields that depend on each other.

        Raises:
            AdmissionError: 400.
        """


def _models_in(annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """List the models that a field's annotation holds, with what stands between: "[]" for a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "", annotation
        return
    listed = "[]" if typing.get_origin(annotation) is list else ""
    for argument in typing.get_args(annotation):
        if not isinstance(argument, str):
            for between, model in _models_in(argument):
                yield listed + between, model


def declared(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Refused | NoEffect | None]]:
    """List the fields of a body, those within its parts too, with what becomes of each: None where it is honoured."""
    for name, info in model.model_fields.items():
        path = prefix + (info.alias or name)
        yield path, next((mark for mark in info.metadata if isinstance(mark, (Refused, NoEffect))), None)
        for between, inner in _models_in(info.annotation):
            yield from declared(inner, f"{path}{between}.")


# ---- checking ----

_B = TypeVar("_B", bound=CheckedBody)


def check_encodable(body: Mapping[str, Any]) -> None:
    """Refuse a body that no answer could repeat.

    JSON can escape a lone surrogate, but no answer, log or tokenizer can encode it; and answers are made to a depth of
    some 250 objects and lists.

    Raises:
        AdmissionError: 400; a name or a text has a lone surrogate, or the body is nested too deeply.
    """
    try:
        to_json([[[body]]])  # an answer has what it repeats within some objects of its own
    except ValueError as error:
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise AdmissionError(400, "the body has a lone surrogate, which is no character of UTF-8") from error
        raise AdmissionError(400, "the body is nested too deeply") from error


def parse(content: bytes, model: type[_B]) -> _B:
    """Read and check a body.

    Raises:
        AdmissionError: 400, naming the field that is wrong or unknown.
    """
    too_large = ""

    def number(text: str) -> float:
        nonlocal too_large
        if math.isinf(value := float(text)):
            too_large = text
        return value

    try:
        body = json.loads(content, parse_constant=no_constant, parse_float=number)
        if not isinstance(body, dict):
            raise AdmissionError(400, "the body must be a JSON object")
        check_encodable(body)
        result = checked(body, model)  # names a field that is a number; one that is repeated may hold any
        if too_large:
            raise _too_large(too_large)
        return result
    except RecursionError as error:
        raise AdmissionError(400, "the body is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise AdmissionError(400, f"the body must be JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise AdmissionError(400, f"the body must be UTF-8: {error.reason} at byte {error.start}") from error
    except ValueError as error:
        # The only other one of json: Python takes no longer integers from strangers.
        raise AdmissionError(400, "the body must be JSON: a number in it has too many digits") from error


def no_constant(name: str) -> Any:
    raise AdmissionError(400, f"the body must be JSON, which has no {name}")


def finite(text: str) -> float:
    """Return the number of a text of JSON; refuse one that no answer could repeat, as it is read as an infinity."""
    if math.isinf(value := float(text)):
        raise _too_large(text)
    return value


def _too_large(text: str) -> AdmissionError:
    return AdmissionError(400, f"the body has a number that is too large: {_short(text)}")


def checked(body: Mapping[str, Any], model: type[_B]) -> _B:
    """Check the fields of ``body``. Fields without effect are said once per process.

    Raises:
        AdmissionError: 400, naming the field that is wrong or unknown.
    """
    unknown = sorted(body.keys() - {info.alias or name for name, info in model.model_fields.items()})
    if unknown:
        raise AdmissionError(400, _short(f"unknown fields in the body: {', '.join(unknown)}"), _short(unknown[0]))
    try:
        result = model.model_validate(dict(body))
    except ValidationError as error:
        raise _refusal(error) from error
    result.check()
    for name, info in model.model_fields.items():
        if any(isinstance(mark, NoEffect) for mark in info.metadata) and getattr(result, name) is not None:
            _say_no_effect(name)
    return result


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _refusal(error: ValidationError) -> AdmissionError:
    # Every member of a union reports errors: those of the member that is meant lie deepest in the value. Of several
    # there, a wrong type is why others are missing.
    errors = error.errors(include_url=False, include_input=False)
    fields = [[part for part in entry["loc"] if not _names_a_type(part)] for entry in errors]
    deepest = max(
        fields, key=lambda path: (len(path), [part for part in path if isinstance(part, int)], path[-1:] == ["type"])
    )
    field = _short(".".join(map(str, deepest)))
    meant = [entry for entry, path in zip(errors, fields, strict=True) if path == deepest]
    if meant[0]["type"] == "missing":
        return AdmissionError(400, f"{field} is missing", field)
    if meant[0]["type"] == _UNSUPPORTED:
        return AdmissionError(400, f"{field} {meant[0]['msg']}", field)
    if meant[0]["type"] == "extra_forbidden":
        return AdmissionError(400, f"{field} is unknown", field)
    messages = dict.fromkeys(entry["msg"].removeprefix("Value error, ") for entry in meant)
    return AdmissionError(400, f"{field} is wrong: {'; or: '.join(messages)}", field)


_TYPES = ("str", "dict", "int", "bool", "float", "[key]")
_TYPE_BEGINS = ("_", "list[", "dict[", "function-", "constrained-", "literal[", "nullable", "fail-fast")


def _names_a_type(part: int | str) -> bool:
    """Tell whether a part of pydantic's location is a member of a union (str, list[...], _Message), not a field."""
    return isinstance(part, str) and (part in _TYPES or part.startswith(_TYPE_BEGINS))


@functools.cache
def _say_no_effect(field: str) -> None:
    logger.info("requests set %s, which has no effect here: docs/operating.md lists such fields", field)
