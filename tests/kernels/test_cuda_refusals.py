"""The package's machine code where something fails or is not there, and the command that compiles it."""

import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import CPU, project

pytest.importorskip("triton")
import cuda_stand_in
from cuda_stand_in import BACKEND, BY_BOTH_LAUNCHERS, STREAM, StandIn

from bench.gpu_check import driver
from poc_kernels import machine_code
from poc_kernels.kernels import native, trial
from poc_kernels.kernels.cuda import forms, launcher, package
from poc_kernels.kernels.triton import plan

# ---- errors ----------------------------------------------------------------------------------------------------------


@BY_BOTH_LAUNCHERS
def test_an_error_of_the_driver_is_raised_in_its_words_and_the_next_call_goes_on(idle):
    x = torch.zeros(2, 64)
    idle.fail("cuLibraryLoadData", 2)
    with pytest.raises(RuntimeError, match=r"cuLibraryLoadData of quantise_kernel: out of memory") as raised:
        project(BACKEND, x)
    assert trial.is_transient(raised.value)
    idle.fail("cuLaunchKernel", 1)
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel of quantise_kernel: invalid argument \(CUDA_ERROR_INV"):
        project(BACKEND, x)
    idle.fail("cuLaunchKernel", 999)
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel of quantise_kernel: unknown error \(999\)"):
        project(BACKEND, x)
    idle.fail("", 0)
    assert idle.calls.stand_in_launches() == 0
    project(BACKEND, x)
    assert idle.calls.stand_in_launches() == 2
    assert idle.calls.stand_in_depth() == 0


@BY_BOTH_LAUNCHERS
def test_a_kernel_takes_as_many_arguments_as_it_has_and_numbers_of_32_bits(kernel):
    with pytest.raises(TypeError, match="product_kernel takes 20 arguments, got 1"):
        kernel.launch(0, STREAM, 1, 1, 0)
    with pytest.raises(ValueError, match="product_kernel takes numbers of 32 bits, got 2147483648"):
        kernel.launch(0, STREAM, 1, 1, *[0] * 19, 2**31)
    with pytest.raises(OverflowError):
        kernel.launch(0, STREAM, 1, 1, -1, *[0] * 19)


@BY_BOTH_LAUNCHERS
@pytest.mark.parametrize("parameters", ["px", "p" * 65])
def test_parameters_are_of_known_kinds(idle, parameters):
    code = idle.made.objects["hash"]
    options = {"name": "hash_kernel", "threads": 128, "shared_bytes": 0, "parameters": parameters}
    with pytest.raises(ValueError, match="parameters must be at most 64 of the letters p, i and 0, got p"):
        launcher.classes().CudaKernel(driver=launcher._driver(launcher.DRIVER), code=code.code, **options)


@BY_BOTH_LAUNCHERS
def test_code_that_is_none_and_a_name_that_is_not_in_it(idle):
    driver = launcher._driver(launcher.DRIVER)
    options = {"threads": 128, "shared_bytes": 0, "parameters": "p"}
    with pytest.raises(RuntimeError, match="cuLibraryLoadData of a_kernel: invalid argument"):
        launcher.classes().CudaKernel(driver=driver, code=b"no code", name="a_kernel", **options)
    with pytest.raises(RuntimeError, match="cuLibraryGetKernel of a_kernel: unknown error"):
        launcher.classes().CudaKernel(driver=driver, code=idle.made.objects["hash"].code, name="a_kernel", **options)


# ---- what is not there -----------------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


@BY_BOTH_LAUNCHERS
def test_a_machine_without_a_driver_has_no_machine_code(monkeypatch, classes):
    launcher._driver.cache_clear()
    monkeypatch.setattr(launcher, "classes", lambda: classes)
    monkeypatch.setattr(launcher, "DRIVER", "libno_such_driver.so.1")
    assert launcher.unavailable(GPU).startswith("there is no NVIDIA driver: libno_such_driver.so.1: cannot open")
    assert launcher.unavailable(CPU) == "runs on NVIDIA's GPUs only"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert launcher.unavailable(GPU) == "runs on NVIDIA's GPUs only"


@BY_BOTH_LAUNCHERS
def test_a_library_that_lacks_what_a_driver_has_is_refused(classes):
    with pytest.raises(RuntimeError, match=r"^the NVIDIA driver has no cuDriverGetVersion$"):
        classes.CudaDriver("libm.so.6")


@BY_BOTH_LAUNCHERS
def test_an_old_driver_is_refused(driver_library, classes, tmp_path):
    made = cuda_stand_in.empty_package(tmp_path)
    with cuda_stand_in.in_use(StandIn(driver_library, made, {}, version=11080), tmp_path, classes):
        assert launcher.unavailable(CPU) == "needs an NVIDIA driver of CUDA 12.0 or later, got one of 11.8"


@BY_BOTH_LAUNCHERS
def test_a_driver_without_devices_is_refused(idle):
    idle.fail("cuInit", 101)
    assert launcher.unavailable(CPU).endswith(": unknown error (101)")


def test_a_core_without_the_launcher_is_refused_unless_a_benchmark_has_one(monkeypatch, driver_library, tmp_path):
    monkeypatch.delenv(launcher.INSTEAD, raising=False)
    stand_in = StandIn(driver_library, cuda_stand_in.empty_package(tmp_path), {})
    with cuda_stand_in.in_use(stand_in, tmp_path):
        monkeypatch.setattr(native, "load", lambda: None)
        assert launcher.unavailable(CPU) == "the native core was built without it"
        monkeypatch.setenv(launcher.INSTEAD, driver.__name__)
        assert launcher.unavailable(CPU) is None
        project(BACKEND, torch.zeros(2, 64))
        assert isinstance(launcher._driver(launcher.DRIVER), driver.CudaDriver)
        assert stand_in.calls.stand_in_launches() == 2


def test_the_native_core_comes_first(monkeypatch, classes):
    monkeypatch.setenv(launcher.INSTEAD, "no_such_module")
    assert launcher.classes() is classes
    monkeypatch.setattr(native, "load", lambda: None)
    with pytest.raises(ImportError, match="no_such_module"):
        launcher.classes()


def test_another_capability_and_another_arithmetic_are_refused(idle, monkeypatch):
    monkeypatch.setenv("POC_KERNELS_TRITON_ARITHMETIC", "fp16")
    reason = "its machine code multiplies in int8, POC_KERNELS_TRITON_ARITHMETIC asks for fp16"
    assert launcher.unavailable(CPU) == reason
    monkeypatch.setattr(plan, "hardware", lambda device: ((12, 1), 48))
    assert launcher.unavailable(CPU) == "there is no sm_121.tar.xz in this installation"


def test_files_that_cannot_be_used_are_refused(idle, tmp_path, monkeypatch):
    path = package.path_of((9, 0), tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:99], b"", whole[:200] + b"\0" + whole[201:]):
        path.write_bytes(damaged)
        launcher._package.cache_clear()
        assert "sm_90.tar.xz is damaged: " in launcher.unavailable(CPU)
    path.write_bytes(whole)
    monkeypatch.setattr(package, "sources_digest", lambda: "0")
    assert launcher.unavailable(CPU) == "sm_90.tar.xz was compiled from other sources than those that are installed"


def test_code_that_is_not_the_manifests_is_refused(tmp_path):
    made = cuda_stand_in.empty_package(tmp_path)
    codes = [each._replace(code=each.code + b"!") for each in made.objects.values()]
    path = tmp_path / "other"
    package.write(path, made.manifest, codes)
    package.read(path)  # its own digests
    manifest = json.loads(json.dumps(made.manifest))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package.hashlib, "sha256", lambda code: type("Digest", (), {"hexdigest": lambda self: "0"})())
        package.write(path, manifest, codes)
    with pytest.raises(package.PackageError, match="has another SHA-256 than the manifest says"):
        package.read(path)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_cannot_do(capsys, monkeypatch, tmp_path):
    with pytest.raises(SystemExit):
        machine_code.main(["--capabilities", "75"])
    assert "must be one of 80, 86, 89, 90, 100, 103, 120, got 75" in capsys.readouterr().err
    monkeypatch.setattr(forms, "TRITON", "1.2.3")
    assert machine_code.main(["--folder", str(tmp_path)]) == 1
    assert "no machine code for GPUs is compiled: takes Triton 1.2.3, got " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_compiles_what_is_not_there_yet(monkeypatch, tmp_path, capsys):
    few = [form for form in machine_code.all_forms((8, 0)) if form.name in ("hash", "entries")]
    made = []

    def compiled(form, capability):
        made.append((form.name, capability))
        return machine_code.Compiled("PTX", form.name.encode(), 0)

    monkeypatch.setattr(machine_code, "all_forms", lambda capability: few)
    monkeypatch.setattr(machine_code, "compiled", compiled)
    monkeypatch.setattr(machine_code, "processes", ThreadPoolExecutor)
    path = tmp_path / "sm_80.tar.xz"
    for _ in range(2):
        assert machine_code.main(["--capabilities", "80", "--folder", str(tmp_path), "--processes", "1"]) == 0
        size = f"{path.stat().st_size:,}"
        out = f"sm_80.tar.xz: 2 kernels, {size} bytes, 11 unpacked\n{size} bytes in all\n"
        assert capsys.readouterr().out == out
    assert made == [("entries", (8, 0)), ("hash", (8, 0))], "once"
    with tarfile.open(path) as archive:
        assert [member.name for member in archive] == ["manifest.json", "entries.cubin", "hash.cubin"]
        assert {(member.mtime, member.uid) for member in archive} == {(0, 0)}
    manifest = package.read(path).manifest
    assert (manifest["capability"], manifest["triton"]) == ([8, 0], forms.TRITON)
    assert manifest["ptxas"].startswith("Build cuda_")


def test_a_form_that_is_not_the_kernels_is_an_error():
    form = next(form for form in machine_code.all_forms((9, 0)) if form.name == "hash")
    with pytest.raises(ValueError, match=r"hash_kernel takes .*, the form hash has others"):
        machine_code.compiled(form._replace(constants={}), (9, 0))


def test_tests_and_wheels_take_the_release_that_compiles():
    root = Path(__file__).parents[2]
    for file in ("pyproject.toml", ".github/workflows/wheels.yml"):
        assert f"triton=={forms.TRITON}" in (root / file).read_text()
