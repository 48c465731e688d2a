"""Every field of OpenAI's schema, as the openai package has it, is honoured, refused by name, or without effect."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import typing_extensions
from openai.types.chat import completion_create_params as chat_params
from openai.types.completion_create_params import CompletionCreateParamsStreaming
from openai.types.responses import response_create_params
from pydantic import BaseModel

from poc_kernels.engines.transformers import bodies, fields
from poc_kernels.engines.transformers.bodies import Body, ChatBody, CompletionBody, ResponseBody
from poc_kernels.engines.transformers.fields import NoEffect, Refused, checked, declared
from poc_kernels.service.errors import AdmissionError

SCHEMAS: list[tuple[type[Body], Any]] = [
    (ChatBody, chat_params.CompletionCreateParamsStreaming),
    (CompletionBody, CompletionCreateParamsStreaming),
    (ResponseBody, response_create_params.ResponseCreateParamsStreaming),
]
LEAST: dict[type[Body], dict[str, Any]] = {
    ChatBody: {"messages": [{"role": "user", "content": "a"}]},
    CompletionBody: {"prompt": "a"},
    ResponseBody: {"input": "a"},
}
# What must stand around a part for it to be reached.
AROUND: dict[str, dict[str, Any]] = {
    "messages[]": {"role": "assistant"},
    "input[].output": {"type": "function_call_output", "call_id": "1"},
    "input[].content": {"role": "user"},
    "input[].summary": {"type": "reasoning"},
}
ONLY_OURS = {
    *("chat_template_kwargs", "generation_config", "ignore_eos", "include_stop_str_in_output", "min_p", "min_tokens"),
    *("prompt_logprobs", "repetition_penalty", "return_token_ids", "skip_special_tokens", "stop_token_ids", "top_k"),
    *("use_beam_search",),
}


def typed_dicts(hint: Any, listed: str = "") -> Iterator[tuple[str, Any]]:
    """The typed dictionaries in a type, with "[]" before those in a list."""
    if typing_extensions.is_typeddict(hint):
        yield listed, hint
        return
    is_list = isinstance(typing.get_origin(hint), type) and issubclass(typing.get_origin(hint), typing.Iterable)
    for argument in typing.get_args(hint):
        if not isinstance(argument, str):
            yield from typed_dicts(argument, "[]" if is_list and not typing_extensions.is_typeddict(hint) else listed)


def literals(hint: Any) -> set[str]:
    """The strings that a type names."""
    if typing.get_origin(hint) is Literal:
        return {value for value in typing.get_args(hint) if isinstance(value, str)}
    return {value for argument in typing.get_args(hint) for value in literals(argument)}


def models_in(annotation: Any) -> list[type[BaseModel]]:
    return [model for _, model in fields._models_in(annotation)]


def fields_of(model: type[BaseModel]) -> dict[str, Any]:
    return {info.alias or name: info for name, info in model.model_fields.items()}


def meant(models: list[type[BaseModel]], alternative: Any) -> list[type[BaseModel]]:
    """Those of ``models`` that take a typed dictionary, by the type that it must have."""
    kinds = literals(typing_extensions.get_type_hints(alternative).get("type"))
    return [
        model
        for model in models
        if not kinds or "type" not in model.model_fields or kinds & literals(model.model_fields["type"].annotation)
        if not model.__name__.startswith("_Unknown")
    ]


def walk(schema: Any, models: list[type[BaseModel]], path: str = "") -> Iterator[tuple[str, Any]]:
    """Look at all fields of a typed dictionary; yield (path, a value) of alternatives that no model takes."""
    for name, hint in typing_extensions.get_type_hints(schema).items():
        infos = [fields_of(model)[name] for model in models if name in fields_of(model)]
        assert infos, f"{path}{name} of OpenAI's is not declared in {', '.join(m.__name__ for m in models)}"
        if any(isinstance(mark, (Refused, NoEffect)) for info in infos for mark in info.metadata):
            continue
        within = [model for info in infos for model in models_in(info.annotation)]
        whole = any(dict in _origins(info.annotation) for info in infos)
        for listed, alternative in typed_dicts(hint):
            candidates = meant(within, alternative)
            if candidates:
                yield from walk(alternative, candidates, f"{path}{name}{listed}.")
            elif not whole:
                kinds = literals(typing_extensions.get_type_hints(alternative).get("type"))
                yield f"{path}{name}{listed}", {"type": next(iter(kinds), "unknown"), "name": "f"}


def _origins(annotation: Any) -> list[Any]:
    inner = [found for argument in typing.get_args(annotation) for found in _origins(argument)]
    return [typing.get_origin(annotation), *inner]


def placed(path: str, value: Any, least: dict[str, Any]) -> dict[str, Any]:
    """A body that has ``value`` at ``path``."""
    names = path.split(".")
    for n in range(len(names) - 1, -1, -1):
        name = names[n]
        value = {name.removesuffix("[]"): [value] if name.endswith("[]") else value}
        if n:
            before = ".".join(names[:n])
            value = {**AROUND.get(f"{before}.{name.removesuffix('[]')}", AROUND.get(before, {})), **value}
    return {**least, **value}


@pytest.mark.parametrize(("model", "schema"), SCHEMAS, ids=lambda value: getattr(value, "__name__", None))
def test_every_field_of_openais_is_declared(model: type[Body], schema: Any) -> None:
    untaken = list(walk(schema, [model]))
    for path, value in untaken:
        body = placed(path, value, LEAST[model])
        with pytest.raises(AdmissionError) as refused:
            checked(body, model)
        assert refused.value.status == 400
        assert (refused.value.param or "").startswith(path.split(".")[0].removesuffix("[]")), (path, value)
    assert (len(untaken) > 4) == (model is not CompletionBody)


@pytest.mark.parametrize(("model", "schema"), SCHEMAS, ids=lambda value: getattr(value, "__name__", None))
def test_what_is_declared_is_openais_or_a_known_extension(model: type[Body], schema: Any) -> None:
    theirs = typing_extensions.get_type_hints(schema).keys()
    extra = {"frequency_penalty", "logit_bias", "presence_penalty", "seed", "stop"} if model is ResponseBody else set()
    assert fields_of(model).keys() - theirs - ONLY_OURS == extra


@pytest.mark.parametrize("model", LEAST)
def test_a_field_that_is_refused_names_itself_and_takes_what_means_off(model: type[Body]) -> None:
    tried = 0
    for path, mark in declared(model):
        if not isinstance(mark, Refused) or "." in path:
            continue
        tried += 1
        for value in (None, *mark.off):
            assert getattr(checked({**LEAST[model], path: value}, model), path) is None
        for value in ({"id": "x"}, "high", 7, [1]):
            with pytest.raises(AdmissionError, match="not supported") as refused:
                checked({**LEAST[model], path: value}, model)
            assert (refused.value.status, refused.value.param) == (400, path)
    assert tried > 5


def test_false_is_not_zero_and_true_is_not_one() -> None:
    for body in ({"n": True}, {"min_tokens": False}):
        with pytest.raises(AdmissionError):
            checked({**LEAST[ChatBody], **body}, ChatBody)


@pytest.mark.parametrize("model", LEAST)
def test_a_field_without_effect_takes_anything(model: type[Body]) -> None:
    names = [path for path, mark in declared(model) if isinstance(mark, NoEffect) and "." not in path]
    assert "user" in names
    checked({**LEAST[model], **{name: {"a": [1]} for name in names}}, model)


def test_the_lists_of_the_documentation_are_these_declarations() -> None:
    page = (Path(__file__).parents[3] / "docs" / "operating.md").read_text()
    begin = "<!-- fields: begin, printed by python -m poc_kernels.engines.transformers.bodies -->\n\n"
    assert page.split(begin)[1].split("\n\n<!-- fields: end -->")[0] == bodies.tables()


def test_a_field_that_another_route_honours_is_listed_as_refused_too() -> None:
    rows = [line.strip("| ").split(" | ") for line in bodies.tables().splitlines() if line.startswith("| `")]
    listed = {(path.strip("`"), route) for path, routes, *_ in rows for route in routes.split(", ")}
    for route, model in bodies.ROUTES.items():
        marked = {path for path, mark in declared(model) if mark is not None}
        missing = {path for path in marked if (path, route.removeprefix("/v1/")) not in listed}
        assert not missing, route
