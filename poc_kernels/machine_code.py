"""Compiles the GPU kernels ahead of time into the package: ``python -m poc_kernels.machine_code``.

It takes Triton, in the one release that `forms.TRITON` names, and no GPU. Two runs make the same bytes. A file that was
compiled from the same sources is kept.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .kernels.cuda import forms, package
from .kernels.cuda.forms import Form
from .kernels.triton import tiles
from .protocol import cuda_inputs

ENVIRONMENT = {"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
"""What of Triton's environment changes what is compiled: without lines of the sources, whose place is not the same
everywhere."""


class Compiled(NamedTuple):
    """A form, compiled."""

    ptx: str
    code: bytes
    shared_bytes: int


def all_forms(capability: tuple[int, int]) -> list[Form]:
    """Return every form of a compute capability."""
    return [*forms.projection_forms(capability), *cuda_inputs.forms()]


def compiled(form: Form, capability: tuple[int, int]) -> Compiled:
    """Compile a form here, in a process in which Triton does not interpret.

    Raises:
        ValueError: the kernel has other parameters than the form.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    kernel = getattr(importlib.import_module(form.module), form.kernel)
    if set(kernel.arg_names) != {*form.parameters, *form.constants}:
        raise ValueError(f"{form.kernel} takes {kernel.arg_names}, the form {form.name} has others")
    plain = {each.name for each in kernel.params if each.do_not_specialize or each.do_not_specialize_on_alignment}
    pointers = {name for name, kind in form.parameters.items() if kind.startswith("*")}
    divisible = (pointers - {*form.unaligned} | {*form.divisible}) - plain
    source = ASTSource(
        kernel,
        {name: form.parameters.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in form.constants.items()},
        attrs={
            (number,): [["tt.divisibility", 16]] for number, name in enumerate(kernel.arg_names) if name in divisible
        },
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    options = {"num_warps": form.warps, "num_stages": form.stages, "enable_fp_fusion": False}
    result = triton_compile(source, target=target, options=options)
    return Compiled(result.asm["ptx"], result.asm["cubin"], result.metadata.shared)


def parameters_of(form: Form) -> list[tuple[str, str]]:
    """Return name and kind of each parameter of a form's code, in order; the last two are Triton's own."""
    kernel = getattr(importlib.import_module(form.module), form.kernel)
    kinds = {"*": "p", "i": "i"}
    given = [(name, kinds[form.parameters[name][0]]) for name in kernel.arg_names if name in form.parameters]
    return [*given, ("global_scratch", "0"), ("profile_scratch", "0")]


def described(form: Form, made: Compiled) -> tuple[dict[str, Any], package.CodeObject]:
    """Return what the manifest says of a form that was compiled, and its code object."""
    parameters = parameters_of(form)
    letters = "".join(kind for _, kind in parameters)
    code = package.CodeObject(form.name, form.kernel, letters, form.warps, made.shared_bytes, made.code)
    entry = {
        "kernel": form.kernel,
        "parameters": parameters,
        "constants": form.constants,
        "aligned_to_16": sorted(
            {name for name, kind in form.parameters.items() if kind[0] == "*"} - {*form.unaligned} | {*form.divisible}
        ),
        "grid": form.grid,
        "warps": form.warps,
        "stages": form.stages,
        "shared_bytes": made.shared_bytes,
        "ptx_sha256": hashlib.sha256(made.ptx.encode()).hexdigest(),
    }
    return entry, code


def _compile(form: Form, capability: tuple[int, int]) -> tuple[dict[str, Any], package.CodeObject]:
    return described(form, compiled(form, capability))


def build(
    capability: tuple[int, int],
    folder: Path,
    pool: concurrent.futures.Executor,
    names: Sequence[str] | None = None,
) -> Path:
    """Compile the forms of a capability, or those of ``names`` alone, and write their file."""
    wanted = [form for form in all_forms(capability) if names is None or form.name in names]
    done = list(pool.map(_compile, wanted, [capability] * len(wanted)))
    manifest = {
        "capability": capability,
        "arithmetic": tiles.arithmetic(capability),
        "triton": forms.TRITON,
        "ptxas": pool.submit(ptxas_version, capability).result(),
        "sources": package.sources_digest(),
        "kernels": {code.name: entry for entry, code in done},
    }
    path = package.path_of(capability, folder)
    package.write(path, manifest, [code for _, code in done])
    return path


def ptxas_version(capability: tuple[int, int]) -> str:
    """Return the release of the assembler that Triton takes for a capability."""
    from triton.backends.nvidia.compiler import get_ptxas

    version = subprocess.run(
        [get_ptxas(10 * capability[0] + capability[1]).path, "--version"], capture_output=True, text=True, check=True
    )
    return version.stdout.strip().splitlines()[-1]


def processes(count: int) -> concurrent.futures.ProcessPoolExecutor:
    """Return processes that compile, even where this one interprets; they begin with this one's environment."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(count, context, initializer=_begin)


def _begin() -> None:
    os.environ.update(ENVIRONMENT)  # before Triton is imported


def missing() -> str | None:
    """Return why nothing can be compiled here, or None."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if triton.__version__ != forms.TRITON:
        return f"takes Triton {forms.TRITON}, got {triton.__version__}"
    return None


def _is_current(path: Path) -> bool:
    with contextlib.suppress(package.PackageError):
        package.read(path)
        return True
    return False


def _capability(text: str) -> tuple[int, int]:
    known = {f"{major}{minor}": (major, minor) for major, minor in forms.CAPABILITIES}
    if text not in known:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(known)}, got {text}")
    return known[text]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m poc_kernels.machine_code", description=__doc__)
    parser.add_argument("--capabilities", type=_capability, nargs="+", default=forms.CAPABILITIES, metavar="90")
    parser.add_argument("--folder", type=Path, default=package.FOLDER, help="where the files go; the package's own")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    reason = missing()
    if reason is not None:
        print(f"no machine code for GPUs is compiled: {reason}", file=sys.stderr)
        return 1
    total = 0
    with processes(options.processes) as pool:
        for capability in options.capabilities:
            path = package.path_of(capability, options.folder)
            if not _is_current(path):
                build(capability, options.folder, pool)
            kernels, size = package.read(path).objects, path.stat().st_size
            raw = sum(len(each.code) for each in kernels.values())
            total += size
            print(f"{path.name}: {len(kernels)} kernels, {size:,} bytes, {raw:,} unpacked", flush=True)
    print(f"{total:,} bytes in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
