"""Fixtures that several rooms share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from interleaving import Instruments


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small causal LM of random weights and its tokenizer, as ``from_pretrained`` takes it."""
    from poc_kernels.demo import model as demo_model

    directory = tmp_path_factory.mktemp("tiny-model")
    demo_model.build(directory)
    return directory


@pytest.fixture
def instruments(monkeypatch: pytest.MonkeyPatch) -> Instruments:
    """A simulated clock, and threads that run one at a time, in `turns`."""
    from interleaving import Instruments

    from poc_kernels.scheduling import turns

    made = Instruments()
    made.patch(monkeypatch, turns)
    return made


@pytest.fixture(scope="session")
def driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for the NVIDIA driver."""
    pytest.importorskip("triton")
    import cuda_stand_in

    return cuda_stand_in.compile_stand_in(tmp_path_factory.mktemp("driver")) or pytest.skip("no C++ compiler")


@pytest.fixture(scope="module")
def code_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `compiled_code` lies."""
    return tmp_path_factory.mktemp("code")


@pytest.fixture(scope="module")
def compiled_code(code_folder: Path, request: pytest.FixtureRequest) -> Any:
    """The package of the forms that the test's module has in NAMES, and their PTX."""
    import cuda_stand_in

    return cuda_stand_in.compiled_package(code_folder, request.module.NAMES)


@pytest.fixture
def classes(request: pytest.FixtureRequest) -> Any:
    """What has CudaDriver and CudaKernel: the native core, or what `cuda_stand_in.BY_BOTH_LAUNCHERS` asks for."""
    from bench.gpu_check import driver
    from poc_kernels.kernels import native

    if getattr(request, "param", "native") == "ctypes":
        return driver
    core = native.load()
    return core if hasattr(core, "CudaDriver") else pytest.skip("the native core has no launcher")
