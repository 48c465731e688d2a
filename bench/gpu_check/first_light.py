"""The first four minutes on a machine with a GPU: what is right, how fast the GPU is, and how fast the kernels are.

It needs torch, Triton and the sources, with the package's machine code for this GPU among them: no build, no
installation, no pytest. That machine code comes first, each code object by itself, and then what Triton compiles here.
Every check and every measurement runs in a process of its own, so that a kernel that crashes or hangs loses only
itself. It ends itself. Its last lines are a table, which OUT/first-light.txt has too; OUT/first-light.tgz has all
results and logs. --device cpu rehearses it with small cases under Triton's interpreter, without machine code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.gpu_check import apart
from bench.gpu_check.apart import Done, Task
from bench.gpu_check.archive import pack
from bench.gpu_check.steps import take_signals

TOTAL_SECONDS = 235.0
CHECKS_SHARE = 0.5
"""Of the time that is left when checks begin: then measurements begin in any case."""
TABLE_SECONDS = 5.0
"""Kept for the table and the archive."""
GROUP_SECONDS = 30.0
"""The longest that one group of measurements takes."""
GROUP_CHECK_SECONDS = 45.0
"""The longest that code objects that are checked together take; then each is checked alone."""
DRIVER = "bench.gpu_check.driver"
"""Launches machine code where there is no native core."""
WORKERS = max(1, min(12, (os.cpu_count() or 1) - 2))
"""Checks at the same time: most of their time they compile."""


class Light:
    """What was found so far; it is kept on disk as it comes.

    Args:
        out: folder for the archive and the table.
        end: when it has to be over, by time.monotonic().
    """

    def __init__(self, out: Path, end: float) -> None:
        self.out, self.end, self.began = out, end, time.monotonic()
        self.folder = Path(tempfile.mkdtemp(prefix="first-light-"))
        self.facts: dict[str, Any] = {}
        self.checks: dict[str, str | None] = {}
        """What is wrong by check."""
        self.rates: dict[str, float] = {}
        self.times: dict[str, list[dict[str, Any]]] = {}

    def say(self, line: str) -> None:
        """Print a line, and keep it."""
        line = f"{time.monotonic() - self.began:6.1f} {line}"
        print(line, flush=True)
        with (self.folder / "log.txt").open("a") as file:
            file.write(f"{line}\n")

    def run(self, tasks: Iterable[Task], workers: int, end: float) -> Iterable[Done]:
        """Run tasks; what each took is said."""
        for done in apart.run(list(tasks), workers, min(end, self.end), self.folder):
            self.say(f"[{done.seconds:5.1f} s] {done.task.name}: {done.error or _words(done.result)}")
            yield done

    def save(self) -> None:
        """Write what was found to OUT: results in the archive, and the table."""
        found = {name: getattr(self, name) for name in ("facts", "checks", "rates", "times")}
        (self.folder / "results.json").write_text(json.dumps(found, indent=1))
        (self.out / "first-light.txt").write_text(self.table() + "\n")
        shutil.copy(self.out / "first-light.txt", self.folder)
        pack(self.folder, self.out / "first-light.tgz")

    def table(self) -> str:
        """Return the last lines: what is wrong, the rates against those that the model assumes, and times."""
        from bench.gpu_check import light_table

        return light_table.text(self.facts, self.checks, self.rates, self.times)


def _words(result: Any) -> str:
    if result is None:
        return "ok"
    return result if isinstance(result, str) else "done"


def _use_driver() -> None:
    """Have machine code launched also where there is no native core, in this process and those that it starts."""
    from poc_kernels.kernels.cuda import launcher

    os.environ.setdefault(launcher.INSTEAD, DRIVER)


def facts(device: str) -> dict[str, Any]:
    """Return what the device is, and why each backend does not run on it (None if it does)."""
    import torch

    from poc_kernels import backends
    from poc_kernels.kernels.cuda import launcher
    from poc_kernels.kernels.triton import plan

    torch_device = torch.empty(0, device=device).device
    capability, sms = plan.hardware(torch_device)
    return {
        "name": torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else "a CPU, as a rehearsal",
        "capability": capability,
        "sms": sms,
        "launcher": getattr(launcher.classes(), "__name__", None),
        "backends": {each.name: each.unavailable(torch_device) for each in backends.backends()},
    }


def _count_in_the_interpreter() -> None:
    """Let Triton's interpreter count loops, in the process of a task."""
    from triton.runtime import interpreter

    from bench.common.interpreter import counting

    interpreter._patch_lang_tensor = counting(interpreter._patch_lang_tensor)


def _check(name: str, device: str, *arguments: Any) -> Any:
    """Make a check of `light_checks`, or of `light_shipped` if its name has a dot, in the process of a task."""
    import torch

    from bench.gpu_check import light_checks, light_shipped

    torch.set_num_threads(1)
    if device == "cpu":
        _count_in_the_interpreter()
    module, _, function = name.rpartition(".")
    return getattr(light_shipped if module else light_checks, function)(
        torch.empty(0, device=device).device, *arguments
    )


def check_shipped(light: Light, device: str, names: list[str], end: float) -> None:
    """Check code objects of the package, and on a GPU what the backend `cuda` makes of them.

    They are checked in groups; then alone those of a group that came to no end.
    """
    from bench.gpu_check import light_shipped

    groups = {f"shipped {group}": of for group, of in light_shipped.groups(names).items()}
    tasks = [
        Task(name, _check, ("shipped.check_group", device, of), GROUP_CHECK_SECONDS) for name, of in groups.items()
    ]
    if device == "cuda":
        calls: list[tuple[str, str, tuple[Any, ...]]] = [
            ("shipped code in a graph with new rows and seeds", "graph", (True,)),
            *((f"shipped code again and again, {bits} bits", "repeated", (bits, True)) for bits in (16, 8)),
            ("shipped code as backend cuda, all it has to give", "backend", ("cuda",)),
        ]
        tasks += [Task(name, _check, (function, device, *arguments), 110.0) for name, function, arguments in calls]
    alone: list[str] = []
    for done in light.run(tasks, WORKERS, end):
        of = groups.get(done.task.name)
        if of is None:
            light.checks[done.task.name] = done.error or done.result
        elif done.error is None or done.error.startswith(apart.OUT_OF_TIME):
            verdicts = {name: done.error or done.result[name] for name in of}
            light.checks |= {f"shipped {name}": verdict for name, verdict in verdicts.items()}
            for name, verdict in verdicts.items():
                if verdict and done.error is None:
                    light.say(f"    {name}: {verdict}")
        else:
            alone += of
    tasks = [Task(f"shipped {name}", _check, ("shipped.check", device, name), GROUP_CHECK_SECONDS) for name in alone]
    for done in light.run(tasks, WORKERS, end):
        light.checks[done.task.name] = done.error or done.result
    light.save()


def checks(device: str, capability: tuple[int, int], sms: int, backends: list[str]) -> list[Task]:
    """Return the checks of torch and of what Triton compiles here, what others rest on first."""
    from bench.gpu_check import light_checks, light_times

    small = device == "cpu"
    calls: list[tuple[str, str, tuple[Any, ...]]] = [
        ("torch", "torch_itself", ()),
        ("order of the picks of vectors", "picked", ()),
        ("entries", "entries", ()),
        *(
            (f"quantise {dtype} {bits} bits K = {k}", "quantised", (dtype, bits, k))
            for dtype in ("bfloat16", "float32", "float16")
            for bits in (16, 8)
            for k in ((300,) if small else (1000, 8192, 8320))
        ),
        *((f"inputs {dtype}", "random_inputs", (dtype,)) for dtype in ("int32", "bfloat16", "float32")),
    ]
    forms = list(light_checks.table_forms(capability))
    calls += [(f"product {form}", "product", (form,)) for form in forms if form.arithmetic == "int8"]
    calls += [("graph with new rows and seeds", "graph", ())]
    calls += [(f"the same call again and again, {bits} bits", "repeated", (bits,)) for bits in (16, 8)]
    calls += [(f"backend {name}, all it has to give", "backend", (name,)) for name in backends if not small]
    if not small:
        others = light_times.forms_to_check(capability, light_times.SIZE, sms)
        calls += [(f"product {form}", "product", (form,)) for form in others if form not in forms]
    calls += [(f"product {form}", "product", (form,)) for form in forms if form.arithmetic != "int8"]
    return [Task(name, _check, (function, device, *arguments), 110.0) for name, function, arguments in calls]


def measure(light: Light, device: str) -> None:
    """Measure rates, then times, the most telling first, until it is over."""
    from bench.gpu_check import light_rates, light_times

    capability, sms = tuple(light.facts["capability"]), light.facts["sms"]
    if device == "cuda":
        for done in light.run([Task("rates", _rates, (light_rates.measure,), 40.0)], 1, light.end - TABLE_SECONDS):
            light.rates = done.result or {}
        light.save()
    groups, size = (light_times.GROUPS, light_times.SIZE) if device == "cuda" else (((16, 20), (8, 3)), 128)
    for bits, rows in groups:
        if time.monotonic() > light.end - TABLE_SECONDS:
            light.say(f"{bits} bits, M = {rows}: no time left")
            continue
        shipped = _right(light, light_times.shipped_variants(capability, bits, rows, size, sms))
        forms = _right(light, light_times.variants(capability, bits, rows, size, sms))
        forms = forms if device == "cuda" else forms[:2]
        seconds = 4.0 if device == "cuda" else 0.1
        # If Triton's forms end the process, the shipped ones are timed without them.
        for number, of in enumerate([[*shipped, *forms]] + [shipped] * bool(shipped and forms)):
            task = Task(
                f"times of {bits} bits, M = {rows}{', shipped' if number else ''}",
                *(_times, (device, bits, rows, of, size, seconds), GROUP_SECONDS),
            )
            for done in light.run([task], 1, light.end - TABLE_SECONDS):
                _note_times(light, f"{bits} {rows}", done)
            if done.error is None:
                break
        light.save()


def _right(light: Light, forms: list[Any]) -> list[Any]:
    """Return the forms that were found right."""
    return [form for form in forms if light.checks.get(_check_name(form), "not checked") is None]


def _note_times(light: Light, group: str, done: Done) -> None:
    from bench.gpu_check import light_times

    found = done.result or [light_times.Timed("all", None, done.error)]
    errors = [timed for timed in light.times.get(group, []) if timed["error"]]
    light.times[group] = [*(timed._asdict() for timed in found), *errors]
    for timed in found:
        light.say(f"    {timed.name}: {timed.error or f'{1e6 * (timed.seconds or 0):.1f} us'}")


def _check_name(form: Any) -> str:
    """Return the name of the check of a form of bfloat16 rows, and of aligned columns if it is shipped."""
    from poc_kernels.kernels.cuda import forms

    if form.shipped:
        return f"shipped {forms.product_name(1, form.bits, form.tile, form.parts, True)}"
    return f"product {form._replace(parts=1 if form.parts == 1 else 3)}"


def _rates(function: Any) -> Any:
    import torch

    return function(torch.empty(0, device="cuda").device)


def _times(device: str, *arguments: Any) -> Any:
    import torch

    from bench.gpu_check import light_times

    if device == "cpu":
        _count_in_the_interpreter()
    return light_times.time_group(torch.empty(0, device=device).device, *arguments)


def _machine() -> str:
    """Return what the driver says of the GPU, or why it says nothing."""
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"


def main() -> int:
    """Run it; returns 1 if a check failed."""
    parser = argparse.ArgumentParser("python -m bench.gpu_check.first_light", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the archive and the table")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="after which it is over")
    options = parser.parse_args()
    take_signals()
    options.out.mkdir(parents=True, exist_ok=True)
    light = Light(options.out.resolve(), time.monotonic() + options.seconds)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        light.say(f"Python {sys.version.split()[0]}; {_machine() if options.device == 'cuda' else 'a rehearsal'}")
        import torch
        import triton

        _use_driver()
        light.say(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}")
        for done in light.run([Task("facts", facts, (options.device,), 60.0)], 1, light.end):
            light.facts = done.result or {}
        if not light.facts:
            return 1
        light.facts |= {"torch": torch.__version__, "triton": triton.__version__}
        light.say(json.dumps(light.facts))
        capability, reasons = tuple(light.facts["capability"]), light.facts["backends"]
        now = time.monotonic()
        end = now + CHECKS_SHARE * (light.end - TABLE_SECONDS - now)
        if reasons["cuda"] is None:
            from bench.gpu_check import light_shipped

            check_shipped(light, options.device, light_shipped.names(capability), end)
        names = [name for name, reason in reasons.items() if reason is None and name not in ("cuda", "reference")]
        tasks = checks(options.device, capability, light.facts["sms"], names)
        for done in light.run(tasks, WORKERS, end):
            light.checks[done.task.name] = done.error or done.result
        light.save()
        measure(light, options.device)
    finally:
        light.save()
        print(f"\n{light.table()}", flush=True)
    from bench.gpu_check import light_table

    return 1 if light_table.failures(light.facts, light.checks) else 0


if __name__ == "__main__":
    sys.exit(main())
