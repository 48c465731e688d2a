"""What vLLM's entry points do: nothing unless they are named; and what a server refuses before it loads a model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from helpers import run_python
from vllm_stand_ins import vllm_config

from poc_kernels.engines.vllm import compat, plugin
from poc_kernels.engines.vllm.plugin import NAME, PoCEndpoints, register


class Args:
    """Stands in for vLLM's EngineArgs."""

    def __init__(self, **changes: Any) -> None:
        self._changes = changes

    def create_engine_config(self, usage_context: str | None = None, headless: bool = False) -> Any:
        return vllm_config(**self._changes)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stand-ins for the modules of vLLM that the plugin looks into."""

    class WorkerBase:
        pass

    class EngineArgs(Args):
        pass

    args, worker = types.ModuleType("vllm.engine.arg_utils"), types.ModuleType("vllm.v1.worker.worker_base")
    args.EngineArgs, worker.WorkerBase = EngineArgs, WorkerBase  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.engine", "vllm.v1", "vllm.v1.worker"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for module in (args, worker):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(compat, "version", lambda: "0.32.0")
    monkeypatch.setattr(compat, "rust_frontend", lambda: False)
    monkeypatch.setattr(logging.getLogger(NAME), "parent", logging.getLogger(NAME).parent)
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,poc_kernels")
    return types.SimpleNamespace(args=EngineArgs, worker=WorkerBase)


@pytest.mark.parametrize("named", [None, "", "poc_kernels_2,other"])
def test_where_it_is_not_named_nothing_changes(
    vllm: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    if named is None:
        monkeypatch.delenv("VLLM_PLUGINS")
    else:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    register()
    assert not hasattr(vllm.worker, "poc_kernels_call")
    assert vllm.args.create_engine_config is Args.create_engine_config


def test_registering_twice_is_registering_once(vllm: types.SimpleNamespace) -> None:
    register()
    method, checked = vllm.worker.poc_kernels_call, vllm.args.create_engine_config
    register()
    assert (vllm.worker.poc_kernels_call, vllm.args.create_engine_config) == (method, checked)
    with pytest.raises(ValueError, match=r"command must be open, .* got 'nonsense'|needs a session"):
        method(vllm.worker(), "nonsense", {})


def test_a_process_that_makes_no_configuration_is_left_alone(
    vllm: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "vllm.engine.arg_utils")
    register()
    assert hasattr(vllm.worker, "poc_kernels_call")


def test_an_unknown_version_ends_every_process(vllm: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda: "0.33.1")
    with pytest.raises(ValueError, match=r"^poc_kernels: proofs were tried with vLLM 0\.32\.\* only, this is 0\.33\.1"):
        register()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_api_process_count": 2}, "^poc_kernels: proofs need one API server.* --api-server-count 1"),
        ({"data_parallel_size": 2}, "^poc_kernels: proofs take no data parallelism"),
    ],
)
def test_a_server_of_a_configuration_that_is_not_supported_is_not_made(
    vllm: types.SimpleNamespace, changes: dict[str, Any], message: str
) -> None:
    register()
    with pytest.raises(ValueError, match=message):
        vllm.args(**changes).create_engine_config(usage_context="OPENAI_API_SERVER")
    assert vllm.args(**changes).create_engine_config(usage_context="LLM_CLASS") is not None
    assert vllm.args().create_engine_config(usage_context="OPENAI_API_SERVER", headless=True) is not None


def test_a_server_with_vllm_s_front_end_in_rust_is_not_made(
    vllm: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "rust_frontend", lambda: True)
    register()
    with pytest.raises(ValueError, match=r"^poc_kernels: .* start vLLM without VLLM_USE_RUST_FRONTEND"):
        vllm.args().create_engine_config(usage_context="OPENAI_API_SERVER")


def test_what_is_not_installed_is_told_before_a_model_is_loaded(
    vllm: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("greenlet", "httpx2") else find_spec(name)
    )
    register()
    with pytest.raises(ValueError, match=r"^poc_kernels: proofs need greenlet, httpx2: install .* extra vllm-plugin$"):
        vllm.args().create_engine_config(usage_context="OPENAI_API_SERVER")


def test_a_setting_that_is_wrong_is_told_before_a_model_is_loaded(
    vllm: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POC_KERNELS_VALIDATION_SHARE", "2")
    register()
    with pytest.raises(ValueError, match=r"^POC_KERNELS_VALIDATION_SHARE must be in \(0, 1\), got 2"):
        vllm.args().create_engine_config(usage_context="OPENAI_API_SERVER")


def test_what_vllm_logs_and_what_proofs_log_goes_the_same_way(vllm: types.SimpleNamespace) -> None:
    register()
    assert logging.getLogger(NAME).parent is logging.getLogger("vllm")


def test_the_plugin_takes_no_more_than_the_package_where_it_is_not_named(tmp_path: Path) -> None:
    code = (
        "import sys, poc_kernels\n"
        "before = set(sys.modules)\n"
        "from poc_kernels.engines.vllm import plugin\n"
        "plugin.register()\n"
        "new = set(sys.modules) - before\n"
        "print({name.split('.')[0] for name in new} & {'vllm', 'fastapi', 'prometheus_client', 'transformers'})\n"
    )
    assert run_python(code, tmp_path, VLLM_PLUGINS="another").strip() == "set()"


def test_vllm_is_as_it_was_where_nothing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    code = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        "from vllm.plugins import load_endpoint_plugins, load_general_plugins\n"
        "from vllm.v1.worker.worker_base import WorkerBase\n"
        "load_general_plugins()\n"
        "print(load_endpoint_plugins(('generate',)), hasattr(WorkerBase, 'poc_kernels_call'))\n"
        "print(hasattr(EngineArgs.create_engine_config, 'checked'))"
    )
    printed = run_python(code, tmp_path, VLLM_LOGGING_STREAM="ext://sys.stderr").splitlines()
    assert printed[-2:] == ["[] False", "False"]


def test_the_entry_points_lead_here() -> None:
    pytest.importorskip("vllm")
    found = {each.group: each for each in importlib.metadata.distribution("poc-kernels").entry_points}
    for group, target in (("vllm.general_plugins", register), ("vllm.endpoint_plugins", PoCEndpoints)):
        assert found[group].name == NAME == plugin.PoCEndpoints.name
        assert found[group].load() is target
