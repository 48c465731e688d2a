"""First light's checks of the package's machine code, on a stand-in for the driver with the emulator behind it."""

import itertools
import os
import re
import sys
import time

import pytest
from helpers import CPU

pytest.importorskip("triton")
import cuda_stand_in
from cuda_stand_in import StandIn

from bench.gpu_check import driver, first_light, light_shipped, light_times
from poc_kernels import machine_code
from poc_kernels.kernels.cuda import forms, package

CAPABILITY = (9, 0)
NAMES = (
    "quantise-bfloat16-16-run4-1024",
    "quantise-bfloat16-16-run4-1024-any",
    "product-bfloat16-16-64x16-parts",
    "product-bfloat16-16-64x16-any",
    "entries",
    "normal-bfloat16",
    "hash",
)
compiles = pytest.mark.skipif(machine_code.missing() is not None, reason=str(machine_code.missing()))


@pytest.fixture
def gpu(driver_library, code_folder, compiled_code, monkeypatch):
    """A GPU on which nothing has run, without a native core."""
    stand_in = StandIn(driver_library, *compiled_code)
    monkeypatch.setattr(light_shipped, "_launch", stand_in.giving(light_shipped._launch))
    with cuda_stand_in.in_use(stand_in, code_folder, driver):
        yield stand_in


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A folder with a package of every form and no code, and the package."""
    folder = tmp_path_factory.mktemp("empty")
    return folder, cuda_stand_in.empty_package(folder)


@pytest.fixture
def idle_gpu(driver_library, empty):
    """A GPU that takes launches of every form and runs nothing, without a native core."""
    folder, made = empty
    stand_in = StandIn(driver_library, made, {})
    with cuda_stand_in.in_use(stand_in, folder, driver):
        yield stand_in


@pytest.fixture
def light(tmp_path):
    return first_light.Light(tmp_path, time.monotonic() + 300)


@compiles
def test_what_is_right_is_found_right_in_processes_of_their_own(gpu, light):
    """First light as on a GPU, with launches by ctypes."""
    first_light.check_shipped(light, "cpu", [*NAMES, "no-such"], light.end)
    assert light.checks.pop("shipped no-such") == "no code of that name in sm_90.tar.xz"
    assert light.checks == {f"shipped {name}": None for name in NAMES}


@compiles
@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("hash", (r"461845907;", "461845909;"), r"WRONG: 1024 of 3996; rows 0-3; columns 0-127, 512-639; first"),
        ("quantise-bfloat16-16-run4-1024-any", (r"(shr\.s32 .*), 23;", r"\1, 22;"), r"limbs WRONG: \d+ of 6020; rows "),
        ("product-bfloat16-16-64x16-any", ("-766435501;", "-766435500;"), r"WRONG: \d+ of 684; rows 0-"),
    ],
)
def test_code_that_computes_something_else_is_named_with_rows_and_columns(gpu, name, changed, said):
    mutated, count = re.subn(*changed, gpu.ptx[name], count=1)
    assert count == 1
    gpu.ptx = {**gpu.ptx, name: mutated}
    assert re.match(said, light_shipped.check(CPU, name))
    assert light_shipped.check(CPU, "entries") is None


@compiles
@pytest.mark.parametrize(
    ("tensor", "said"),
    [(2, "exponents WRONG: 1 of 20; rows 5;"), (3, "sums WRONG: 1 of 20; rows 5;"), (4, "WRONG: words that are")],
)
def test_all_that_quantise_writes_is_compared(gpu, monkeypatch, tensor, said):
    launch = light_shipped._launch

    def changing(name, grid, numbers, *tensors):
        launch(name, grid, numbers, *tensors)
        tensors[tensor][5] += 1

    monkeypatch.setattr(light_shipped, "_launch", changing)
    assert light_shipped.check(CPU, "quantise-bfloat16-16-run4-1024").startswith(said)


@pytest.mark.parametrize("name", [form.name for form in machine_code.all_forms(CAPABILITY)])
def test_each_check_launches_what_it_is_named_after_and_sees_that_nothing_was_written(idle_gpu, name):
    del idle_gpu.launched[:]
    assert "WRONG: " in light_shipped.check(CPU, name)
    assert name in [launched for launched, *_ in idle_gpu.launched]


@pytest.mark.parametrize("capability", forms.CAPABILITIES)
def test_all_forms_are_checked_most_telling_first(tmp_path, monkeypatch, capability):
    wanted = [form.name for form in machine_code.all_forms(capability)]
    manifest = {"sources": package.sources_digest(), "kernels": {name: {} for name in ("entries", "another")}}
    read = package.Package(manifest, dict.fromkeys(manifest["kernels"]))
    monkeypatch.setattr(package, "read", lambda path: read)
    assert light_shipped.names(capability) == [*wanted, "another"]
    groups = light_shipped.groups(wanted)
    assert sorted(itertools.chain.from_iterable(groups.values())) == sorted(wanted)
    assert list(groups)[:5] == [
        *(f"{kind} bfloat16 {bits} bits" for bits in (16, 8) for kind in ("product", "quantise")),
        "entries and inputs",
    ]


def test_what_ends_its_process_loses_only_itself(light, monkeypatch):
    def check(device, name):
        if name == "hash":
            os._exit(3)
        return "WRONG: all of it" if name == "entries" else None

    monkeypatch.setattr(light_shipped, "check", check)
    first_light.check_shipped(light, "cpu", ["normal-float32", "hash", "entries", "product-float32-8-64x16"], light.end)
    assert light.checks == {
        "shipped normal-float32": None,
        "shipped hash": "ended with 3: it said nothing",
        "shipped entries": "WRONG: all of it",
        "shipped product-float32-8-64x16": None,
    }


def test_on_a_gpu_the_backend_is_checked_as_well(light, monkeypatch):
    monkeypatch.setattr(first_light, "_check", lambda name, device, *given: {"hash": None} if "group" in name else name)
    first_light.check_shipped(light, "cuda", ["hash"], light.end)
    assert light.checks == {
        "shipped hash": None,
        "shipped code in a graph with new rows and seeds": "graph",
        "shipped code again and again, 16 bits": "repeated",
        "shipped code again and again, 8 bits": "repeated",
        "shipped code as backend cuda, all it has to give": "backend",
    }


def test_what_there_is_no_time_for_is_not_made(light):
    first_light.check_shipped(light, "cpu", ["hash", "entries"], time.monotonic() - 1)
    assert light.checks == dict.fromkeys(("shipped hash", "shipped entries"), "out of time before it began")


@compiles
def test_shipped_forms_are_timed_beside_the_stored_product(gpu, monkeypatch):
    (form,) = (form for form in light_times.shipped_variants(CAPABILITY, 16, 3, 256, 4) if form.parts == 2)
    assert first_light._check_name(form) == "shipped product-bfloat16-16-64x16-parts"
    other = form._replace(parts=1)  # of which there is no code
    times = light_times.time_group(CPU, 16, 3, [form, other], 256, 0.01)
    assert [timed.name for timed in times] == [str(form), "stored", str(other)]
    assert min(timed.seconds for timed in times[:2]) > 0
    assert times[2].error.startswith("KeyError: ")


@pytest.mark.parametrize("rows", sorted({rows for _, rows in light_times.GROUPS}))
@pytest.mark.parametrize("capability", forms.CAPABILITIES)
def test_every_shipped_form_that_is_timed_has_a_check(capability, rows):
    checked = {f"shipped {form.name}" for form in machine_code.all_forms(capability)}
    for bits in (16, 8):
        timed = light_times.shipped_variants(capability, bits, rows, light_times.SIZE, 132)
        assert timed[0] == light_times.table_form(capability, bits, rows, light_times.SIZE, 132, shipped=True)
        assert len(timed) == len({str(form) for form in timed})
        assert {first_light._check_name(form) for form in timed} <= checked


def test_shipped_forms_are_timed_alone_where_others_end_the_process(light, monkeypatch):
    light.facts = {"name": "GPU", "capability": [9, 0], "sms": 4}
    shipped = light_times.shipped_variants(CAPABILITY, 16, 20, 128, 4)
    compiled = light_times.variants(CAPABILITY, 16, 20, 128, 4)
    light.checks = dict.fromkeys(map(first_light._check_name, (*shipped, *compiled)))

    def time_group(device, bits, rows, forms, size, seconds):
        if not all(form.shipped for form in forms):
            os._exit(3)
        return [light_times.Timed(str(form), 1.0) for form in forms]

    monkeypatch.setattr(light_times, "time_group", time_group)
    first_light.measure(light, "cpu")
    assert [timed["name"] for timed in light.times["16 20"]] == [*map(str, shipped), "all"]
    assert light.times["16 20"][-1]["error"] == "ended with 3: it said nothing"


def test_the_machine_code_comes_first_and_is_what_counts_where_triton_is_refused(tmp_path, monkeypatch, capsys):
    """As on compute capability 9.x with the Triton 3.6 of GPU images."""
    facts = {"name": "GPU", "capability": [9, 0], "sms": 132, "launcher": driver.__name__}
    facts["backends"] = {"cuda": None, "triton": "leaves out a fence", "reference": None}
    asked = []

    def checks(device, capability, sms, names):
        asked.extend(names)
        return [first_light.Task("product of Triton's", str, ("WRONG: 1 of 2",))]

    for name, value in {"facts": lambda device: facts, "checks": checks, "take_signals": lambda: None}.items():
        monkeypatch.setattr(first_light, name, value)
    monkeypatch.setattr(first_light, "measure", lambda light, device: None)
    monkeypatch.setattr(light_shipped, "names", lambda capability: ["hash", "entries"])
    monkeypatch.setattr(light_shipped, "check", lambda device, name: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "argv", ["first_light", str(tmp_path), "--device", "cpu", "--seconds", "120"])
    assert first_light.main() == 0
    out = capsys.readouterr().out
    assert 0 < out.index("shipped entries and inputs: done") < out.index("product of Triton's: WRONG: 1 of 2")
    assert "FIRST LIGHT on GPU: 2 checks are right, 1 are not, 0 not made\n  shipped code, launched by" in out
    assert "  refused, and not right: product of Triton's: WRONG: 1 of 2" in out
    assert asked == []
