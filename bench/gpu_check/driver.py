"""The native core's CudaDriver and CudaKernel again, by ctypes: launches code objects where nothing can be built.

The same arguments, calls of the driver and errors as csrc/cuda, for programs of this folder alone: a launch takes 28 us
of the host where the native core's takes 0.8 (against the stand-in for the driver; AMD EPYC).
`poc_kernels.kernels.cuda.launcher` takes them where `launcher.INSTEAD` names this module and the native core has none.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

_OLDEST_DRIVER = 12000  # of CUDA 12.0: the first with libraries, which belong to no context
_MAX_PARAMETERS = 64
_USUAL_SHARED_BYTES = 49152  # more has to be asked for
_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PREFER_SHARED = 1  # CU_FUNC_CACHE_PREFER_SHARED

_Int, _Unsigned, _Handle, _Text = ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p
_Out = ctypes.POINTER
_ENTRY_POINTS = {
    "cuInit": (_Unsigned,),
    "cuDriverGetVersion": (_Out(_Int),),
    "cuGetErrorName": (_Int, _Out(_Text)),
    "cuGetErrorString": (_Int, _Out(_Text)),
    "cuDeviceGet": (_Out(_Int), _Int),
    "cuDevicePrimaryCtxRetain": (_Out(_Handle), _Int),
    "cuCtxGetCurrent": (_Out(_Handle),),
    "cuCtxGetDevice": (_Out(_Int),),
    "cuCtxPushCurrent_v2": (_Handle,),
    "cuCtxPopCurrent_v2": (_Out(_Handle),),
    "cuLibraryLoadData": (_Out(_Handle), _Text, *[_Handle] * 2, _Unsigned, *[_Handle] * 2, _Unsigned),
    "cuLibraryGetKernel": (_Out(_Handle), _Handle, _Text),
    "cuKernelGetFunction": (_Out(_Handle), _Handle),
    "cuKernelSetAttribute": (_Int, _Int, _Handle, _Int),
    "cuKernelSetCacheConfig": (_Handle, _Int, _Int),
    "cuLaunchKernel": (_Handle, *[_Unsigned] * 7, _Handle, _Out(_Handle), _Handle),
}
"""The driver's functions that are used, with the types of their parameters."""


class CudaDriver:
    """The driver of this process; the contexts that it retains stay.

    Args:
        library: its name or path.

    Raises:
        RuntimeError: there is none that can be used; says why.
    """

    def __init__(self, library: str) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise RuntimeError(f"there is no NVIDIA driver: {error}") from None
        self._functions: dict[str, Callable[..., int]] = {}
        self._contexts: dict[int, int] = {}
        self._lock = threading.Lock()
        for name in ("cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString"):
            self._find(name)
        version = _Int()
        self.call("cuDriverGetVersion", library, ctypes.byref(version))
        if version.value < _OLDEST_DRIVER:
            major, minor = version.value // 1000, version.value % 1000 // 10
            raise RuntimeError(f"needs an NVIDIA driver of CUDA 12.0 or later, got one of {major}.{minor}")
        for name in _ENTRY_POINTS:
            self._find(name)
        self.call("cuInit", library, 0)

    def _find(self, name: str) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise RuntimeError(f"the NVIDIA driver has no {name}") from None
        function.argtypes = _ENTRY_POINTS[name]
        self._functions[name] = function

    def call(self, name: str, of: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            RuntimeError: it failed, in the driver's words; ``of`` says with what.
        """
        result = self._functions[name](*arguments)
        if result:
            words, symbol = _Text(), _Text()
            self._functions["cuGetErrorString"](result, ctypes.byref(words))
            self._functions["cuGetErrorName"](result, ctypes.byref(symbol))
            said, known = (words.value or b"unknown error").decode(), (symbol.value or str(result).encode()).decode()
            raise RuntimeError(f"{name.removesuffix('_v2')} of {of}: {said} ({known})")

    def device(self, ordinal: int) -> int:
        """Return the driver's handle of a device."""
        handle = _Int()
        self.call("cuDeviceGet", f"device {ordinal}", ctypes.byref(handle), ordinal)
        return handle.value

    def _primary_context(self, ordinal: int) -> int:
        with self._lock:
            if ordinal not in self._contexts:
                context, device = _Handle(), self.device(ordinal)
                self.call("cuDevicePrimaryCtxRetain", f"device {ordinal}", ctypes.byref(context), device)
                self._contexts[ordinal] = context.value or 0
            return self._contexts[ordinal]

    def _is_current(self, ordinal: int) -> bool:
        context, device = _Handle(), _Int()
        if self._functions["cuCtxGetCurrent"](ctypes.byref(context)) or not context.value:
            return False
        return not self._functions["cuCtxGetDevice"](ctypes.byref(device)) and device.value == self.device(ordinal)

    @contextlib.contextmanager
    def on_device(self, ordinal: int) -> Iterator[None]:
        """Have calls of this thread go to a device: in a context of it that is current, or else in torch's there."""
        if self._is_current(ordinal):
            yield
            return
        self.call("cuCtxPushCurrent_v2", f"device {ordinal}", self._primary_context(ordinal))
        try:
            yield
        finally:
            self._functions["cuCtxPopCurrent_v2"](ctypes.byref(_Handle()))


class CudaKernel:
    """A kernel of a code object, for every device and context; it stays loaded.

    Args:
        driver: loads it.
        code: the code object.
        name: its symbol.
        parameters: a letter for each: p for an address, i for an int32, 0 for an address that is null and not given.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.

    Raises:
        ValueError: other letters, or more than 64.
        RuntimeError: the driver's, in its words.
    """

    def __init__(
        self, *, driver: CudaDriver, code: bytes, name: str, parameters: str, threads: int, shared_bytes: int
    ) -> None:
        if len(parameters) > _MAX_PARAMETERS or set(parameters) - set("pi0"):
            raise ValueError(
                f"parameters must be at most {_MAX_PARAMETERS} of the letters p, i and 0, got {parameters}"
            )
        self._driver, self._name, self._parameters = driver, name, parameters
        self._given = len(parameters) - parameters.count("0")
        self._threads, self._shared_bytes = threads, shared_bytes
        library, self._handle = _Handle(), _Handle()
        driver.call("cuLibraryLoadData", name, ctypes.byref(library), code, None, None, 0, None, None, 0)
        driver.call("cuLibraryGetKernel", name, ctypes.byref(self._handle), library, name.encode())

    def prepare(self, device: int) -> None:
        """Load it on a device, so that launches there may be captured, and let it have its shared memory."""
        with self._driver.on_device(device):
            self._driver.call("cuKernelGetFunction", self._name, ctypes.byref(_Handle()), self._handle)
            if self._shared_bytes <= _USUAL_SHARED_BYTES:
                return
            of_device = self._handle, self._driver.device(device)
            self._driver.call("cuKernelSetCacheConfig", self._name, self._handle, _PREFER_SHARED, of_device[1])
            self._driver.call(
                "cuKernelSetAttribute", self._name, _MAX_DYNAMIC_SHARED_BYTES, self._shared_bytes, *of_device
            )

    def launch(self, device: int, stream: int, grid_x: int, grid_y: int, *given: int) -> None:
        """Put a launch on a stream of a device.

        Raises:
            TypeError: another number of arguments than it takes.
            ValueError: a number of more than 32 bits.
            OverflowError: an address of more than 64 bits, or below 0.
            RuntimeError: the driver's, in its words.
        """
        if len(given) != self._given:
            raise TypeError(f"{self._name} takes {self._given} arguments, got {len(given)}")
        left = iter(given)
        values = [
            ctypes.c_uint64(0 if kind == "0" else self._value(next(left), kind)) for kind in self._parameters
        ]  # of 64 bits, of which the driver reads the first 32 of a number
        addresses = (_Handle * max(1, len(values)))(*map(ctypes.addressof, values))
        with self._driver.on_device(device):
            self._driver.call(
                *("cuLaunchKernel", self._name, self._handle, grid_x, grid_y, 1, self._threads, 1, 1),
                *(self._shared_bytes, stream, addresses, None),
            )

    def _value(self, given: int, kind: str) -> int:
        if kind == "p":
            if not 0 <= given < 2**64:
                raise OverflowError(f"{self._name} takes addresses of 64 bits, got {given}")
            return given
        if not -(2**31) <= given < 2**31:
            raise ValueError(f"{self._name} takes numbers of 32 bits, got {given}")
        return given % 2**32
