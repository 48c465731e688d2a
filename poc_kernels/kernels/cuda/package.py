"""The files with machine code: a compressed tar archive per compute capability, with a manifest in front.

`poc_kernels.machine_code` makes them, `launcher` uses them. Two runs of the same compiler on the same sources make the
same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).with_name("code")
_MANIFEST = "manifest.json"
_PACKAGE = Path(__file__).parents[2]
_SOURCES = (
    *(f"kernels/triton/{name}.py" for name in ("device", "product", "plan", "tiles")),
    "kernels/cuda/forms.py",
    "protocol/triton_inputs.py",
    "protocol/cuda_inputs.py",
)
"""Of what is compiled, and of what it is compiled for."""


class CodeObject(NamedTuple):
    """A kernel's machine code with what a launch has to know of it."""

    name: str
    kernel: str
    """Its symbol."""
    parameters: str
    """A letter for each: p for an address, i for an int32, 0 for an address that is null."""
    warps: int
    shared_bytes: int
    """Dynamic shared memory of a block."""
    code: bytes


class Package(NamedTuple):
    """The machine code for one compute capability."""

    manifest: dict[str, Any]
    objects: Mapping[str, CodeObject]
    """By the names of their forms."""


class PackageError(Exception):
    """A file of machine code cannot be used; says why."""


@functools.cache
def sources_digest() -> str:
    """Return the SHA-256, in hexadecimal, of the sources that machine code depends on."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(hashlib.sha256((_PACKAGE / name).read_bytes()).digest())
    return digest.hexdigest()


def path_of(capability: tuple[int, int], folder: Path | None = None) -> Path:
    """Return where the machine code for a compute capability lies."""
    return (folder or FOLDER) / f"sm_{capability[0]}{capability[1]}.tar.xz"


def write(path: Path, manifest: dict[str, Any], objects: Iterable[CodeObject]) -> None:
    """Write a file: the manifest, completed by its objects' digests, and their code, in the order of their names."""
    ordered = sorted(objects)
    codes = {f"{each.name}.cubin": each.code for each in ordered}
    digests = {each.name: hashlib.sha256(each.code).hexdigest() for each in ordered}
    kernels = {name: {**entry, "sha256": digests[name]} for name, entry in sorted(manifest["kernels"].items())}
    text = json.dumps({**manifest, "kernels": kernels}, indent=1).encode()
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in {_MANIFEST: text, **codes}.items():
            entry = tarfile.TarInfo(name)  # without a date, nor an owner
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(lzma.compress(memory.getvalue(), preset=6))
    partial.replace(path)


def read(path: Path) -> Package:
    """Read a file.

    Raises:
        PackageError: there is none, it was made of other sources, or it is damaged.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(path.read_bytes()))) as archive:
            contents = {member.name: _content(archive, member) for member in archive}
        manifest = json.loads(contents.pop(_MANIFEST))
        if manifest["sources"] != sources_digest():
            raise PackageError(f"{path.name} was compiled from other sources than those that are installed")
        objects = {name: _object(name, entry, contents) for name, entry in manifest["kernels"].items()}
    except FileNotFoundError:
        raise PackageError(f"there is no {path.name} in this installation") from None
    except (OSError, lzma.LZMAError, tarfile.TarError, ValueError, KeyError) as error:
        raise PackageError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return Package(manifest, objects)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


def _object(name: str, entry: Mapping[str, Any], contents: Mapping[str, bytes]) -> CodeObject:
    code = contents[f"{name}.cubin"]
    if hashlib.sha256(code).hexdigest() != entry["sha256"]:
        raise ValueError(f"{name} has another SHA-256 than the manifest says")
    parameters = "".join(kind for _, kind in entry["parameters"])
    return CodeObject(name, entry["kernel"], parameters, entry["warps"], entry["shared_bytes"], code)
