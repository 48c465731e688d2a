"""The instruction sets of arm64, cross-compiled and under an emulator: CPUs with and without them.

What runs is tests/sanitize: random products in every form against plain loops, and single products for the known
answers. It takes cmake and Debian's packages g++-aarch64-linux-gnu and qemu-user, and is skipped without them, except
for a line in the summary.
"""

import functools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CPU, assert_same_bits, expected, project, rows_of_every_kind

from poc_kernels.kernels import Backend, self_test
from poc_kernels.kernels.cpu import _DTYPE_CODES

SOURCES = Path(__file__).parents[1] / "sanitize"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
LACKING = [tool for tool in ("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64") if shutil.which(tool, path=PATH) is None]

CPUS = {
    "max": ["neon_i8mm", "neon_dotprod", "portable"],
    "neoverse-n1": ["neon_dotprod", "portable"],
    "cortex-a72": ["portable"],
}
"""What each emulated CPU has the instructions for."""

emulated = pytest.mark.skipif(bool(LACKING), reason=f"arm64 is not tested without {', '.join(LACKING)}")


def test_whether_arm64_is_tested(record_property):
    record_property(
        "summary",
        f"native kernels of arm64: not tested without {', '.join(LACKING)}"
        if LACKING
        else f"native kernels of arm64 tested under qemu: {', '.join(CPUS['max'])}; nothing says how fast they are",
    )


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The folder of random_products and one_product for arm64."""
    build = tmp_path_factory.mktemp("arm64")
    environment = {**os.environ, "PATH": PATH}
    toolchain = SOURCES / "arm64.cmake"
    for command in (
        ["cmake", "-S", SOURCES, "-B", build, "--toolchain", toolchain, "-DSANITIZE=", "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", build, "--parallel", "2"],
    ):
        built = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr
    return build


def emulate(programs, model, program, *arguments, stdin=b"", check=True):
    command = ["qemu-aarch64", "-cpu", model, "-L", "/usr/aarch64-linux-gnu", programs / program, *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True)
    if check:
        assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return done


def bytes_of(values):
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def emulated_backend(programs, kernels, *, model="max", form=1, panel_k=0):
    """A backend whose products and entries are computed by the emulator, one process for each."""

    def emulated_project(x, seed, request):
        mask = request.row_mask
        y = emulate(
            programs,
            model,
            *("one_product", "project", kernels, _DTYPE_CODES[x.dtype], *x.shape, request.activation_bits),
            *(request.columns, request.column_start, int(request.residual), int(mask is not None)),
            *(seed.view(torch.uint64).item(), request.domain, request.coefficient.hex(), form, panel_k),
            stdin=bytes_of(x) + (b"" if mask is None else bytes_of(mask)),
        )
        return torch.frombuffer(bytearray(y.stdout), dtype=x.dtype).view(len(x), request.columns)

    def entries(seed, domain, k_start, k, n_start, n):
        window = (seed.view(torch.uint64).item(), domain, k_start, k, n_start, n)
        e = emulate(programs, model, "one_product", "entries", kernels, *window)
        return torch.frombuffer(bytearray(e.stdout), dtype=torch.int16).view(k, n)

    return Backend(f"emulated-{kernels}", emulated_project, entries, unavailable=lambda device: None)


@emulated
@pytest.mark.parametrize("model", CPUS)
def test_random_products_have_the_bits_of_plain_loops_with_all_that_a_cpu_has(programs, model):
    done = emulate(programs, model, "random_products")
    assert done.stdout.decode().endswith(f"are right by {' '.join(CPUS[model])}\n")


@emulated
@pytest.mark.parametrize("panel_k", [0, 64])
@pytest.mark.parametrize("kernels", CPUS["max"])
def test_every_form_gives_the_known_answers(programs, kernels, panel_k):
    forms = emulate(programs, "max", "one_product", "forms", kernels).stdout.decode().splitlines()
    assert forms
    for form in range(1, 1 + len(forms)):
        assert self_test.wrong_answers(emulated_backend(programs, kernels, form=form, panel_k=panel_k), CPU) == []


@emulated
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("kernels", CPUS["max"])
def test_rows_of_every_kind_have_the_bits_of_the_reference(programs, kernels, bits):
    backend = emulated_backend(programs, kernels)
    for rows, k, dtype in ((1, 1000, torch.bfloat16), (29, 230, torch.float32), (67, 63, torch.float16)):
        x = rows_of_every_kind(rows, k, dtype, 11)
        mask = torch.arange(rows) % 5 != 3
        for options in ({}, {"column_start": 7, "columns": 41, "row_mask": mask}, {"residual": False, "columns": 97}):
            options["activation_bits"] = bits
            assert_same_bits(project(backend, x, **options), expected(x, **options), f"{rows} rows, {options}")


@emulated
@pytest.mark.parametrize(
    ("kernels", "lacking"),
    [("neon_dotprod", "cortex-a72"), ("neon_i8mm", "cortex-a72"), ("neon_i8mm", "neoverse-n1")],
)
def test_the_emulator_runs_the_instructions_that_kernels_are_named_for(programs, kernels, lacking):
    """A CPU without them stops at the first: the kernels do use them, and the emulator does tell the CPUs apart."""
    product = ("one_product", "project", kernels, 0, 1, 16, 16, 16, 0, 0, 0, 7, 0, 1.0, 1, 0)
    run = functools.partial(emulate, programs, stdin=bytes(64), check=False)
    assert run("max", *product).returncode == 0
    assert run(lacking, *product).returncode == -signal.SIGILL
