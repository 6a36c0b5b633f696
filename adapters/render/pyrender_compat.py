"""Loads pyrender 0.1.45 on a machine without a screen, and opens OpenGL contexts for it.

pyrender's last release predates numpy 2 and Python 3.12, imports a window toolkit that it does not need off screen, and
its EGL code closes the display for everybody when one renderer goes. This module cures that from outside, and opens
contexts itself, by ctypes: one path for EGL and OSMesa, and the libraries can be tried before PyOpenGL commits to one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
import types
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, final

import numpy as np

from bridge.errors import InputError, SetupError

PlatformName = Literal["egl", "osmesa"]

_LIBRARIES = {
    "EGL": ("libEGL.so.1", "libEGL.so"),
    "GL": ("libGL.so.1", "libGL.so"),
    "OSMesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"),
}
_PACKAGES = (
    "Install them: Debian and Ubuntu: `apt-get install libegl1 libgl1 libgl1-mesa-dri` (or libosmesa6 "
    "where Mesa is older than 25.1); "
    "Fedora, RHEL and Rocky: `dnf install mesa-libEGL mesa-libGL mesa-dri-drivers`; "
    "openSUSE: `zypper install Mesa-libEGL1 Mesa-libGL1 Mesa-dri`; Arch: `pacman -S mesa libglvnd`; "
    "Alpine: `apk add mesa-egl mesa-gl mesa-dri-gallium`; on a cluster: load its Mesa module, or use a container."
)
_SOFTWARE = ("llvmpipe", "softpipe", "swrast", "software")
_GPU_FILES = ("nvidia[0-9]*", "dri/renderD*", "kfd")
_LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")

_lock = threading.RLock()
# "platform" -> the one that PyOpenGL has been committed to in this process; "triton" once its library was looked for.
_chosen: dict[str, str] = {}


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets variables that a library reads while it loads; those that the user set win, and nothing stays behind."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _load_triton() -> None:
    """Loads triton's library, where there is one, before Mesa's: a PyTorch for GPUs brings it and imports it late.

    Mesa opens its software driver for the whole process, and with it the LLVM that the driver is linked to. triton has
    an LLVM of its own inside and exports it: loaded afterwards, its calls would go to Mesa's, another version, and end
    in a segmentation fault as soon as a `torch.optim` optimiser is made. Loaded before, they are bound to its own.
    """
    if "triton" in _chosen or "triton._C.libtriton" in sys.modules:
        return
    _chosen["triton"] = "tried"
    try:
        found = importlib.util.find_spec("triton")
    except (ImportError, ValueError):  # somebody's stand-in
        return
    folders = [] if found is None else found.submodule_search_locations or []
    for file in (file for folder in folders for file in sorted(Path(folder, "_C").glob("libtriton*.so"))):
        # At once, not call by call: what is bound later would find Mesa's.
        mode = os.RTLD_NOW | os.RTLD_LOCAL
        if hasattr(ctypes.CDLL(None), "LLVMContextCreate"):  # somebody else was first
            mode |= getattr(os, "RTLD_DEEPBIND", 0)
        with suppress(OSError):  # an unusable triton is not the renderer's trouble
            ctypes.CDLL(str(file), mode=mode)


def _load_library(name: str) -> ctypes.CDLL:
    """The system's GL library called `name`, or OSError with the loader's own words."""
    with _lock:
        _load_triton()
    reason = OSError(name)
    for file in _LIBRARIES[name]:
        try:
            return ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            reason = error
    raise reason


class Context(ABC):
    """An OpenGL context of one renderer. It is current only between `make_current` and `release`."""

    @abstractmethod
    def make_current(self) -> None: ...

    @abstractmethod
    def release(self) -> None: ...

    @abstractmethod
    def destroy(self) -> None: ...

    @abstractmethod
    def address(self, name: str) -> int | None:
        """Of a GL function that PyOpenGL does not know."""


class _EGL:
    """The few EGL functions needed, with their types; on a private handle, so that PyOpenGL's are not touched."""

    PLATFORM_DEVICE, EXTENSIONS = 0x313F, 0x3055
    # Surface type pbuffer; 8 bits of red, green, blue; 24 of depth; desktop OpenGL.
    CONFIG = (0x3033, 0x0001, 0x3024, 8, 0x3023, 8, 0x3022, 8, 0x3025, 24, 0x3040, 0x0008, 0x3038)
    # OpenGL 4.1 core, as pyrender asks for.
    CONTEXT = (0x3098, 4, 0x30FB, 1, 0x30FD, 0x0001, 0x3038)

    def __init__(self) -> None:
        void, integer, unsigned = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
        self._library = library = _load_library("EGL")
        library.eglGetProcAddress.restype, library.eglGetProcAddress.argtypes = void, [ctypes.c_char_p]

        def core(name: str, result: Any, *arguments: Any) -> Any:
            function = getattr(library, name)
            function.restype, function.argtypes = result, list(arguments)
            return function

        def extension(name: str, result: Any, *arguments: Any) -> Any:
            address = library.eglGetProcAddress(name.encode())
            if not address:
                raise OSError(f"this EGL lacks {name} (EGL_EXT_device_enumeration and EGL_EXT_platform_device)")
            return ctypes.CFUNCTYPE(result, *arguments)(address)

        self.address = library.eglGetProcAddress
        self.error = core("eglGetError", integer)
        self.initialise = core("eglInitialize", unsigned, void, void, void)
        self.choose_config = core("eglChooseConfig", unsigned, void, void, void, integer, void)
        self.bind_api = core("eglBindAPI", unsigned, unsigned)
        self.create_context = core("eglCreateContext", void, void, void, void, void)
        self.make_current = core("eglMakeCurrent", unsigned, void, void, void, void)
        self.destroy_context = core("eglDestroyContext", unsigned, void, void)
        self.query_devices = extension("eglQueryDevicesEXT", unsigned, integer, void, void)
        self.device_string = extension("eglQueryDeviceStringEXT", ctypes.c_char_p, void, integer)
        self.platform_display = extension("eglGetPlatformDisplayEXT", void, unsigned, void, void)

    def devices(self) -> list[tuple[int, bool]]:
        """(device handle, is it a software renderer) of every EGL device, in EGL's order."""
        number = ctypes.c_int()
        if not self.query_devices(0, None, ctypes.byref(number)) or number.value < 1:
            return []
        handles = (ctypes.c_void_p * number.value)()
        self.query_devices(number.value, handles, ctypes.byref(number))
        found = []
        for handle in handles[: number.value]:
            extensions = (self.device_string(handle, self.EXTENSIONS) or b"").decode()
            found.append((handle, "EGL_MESA_device_software" in extensions))
        return found

    def display(self, device: int) -> int:
        """The display of a device, initialised. Never terminated: the whole process shares it."""
        # llvmpipe starts its threads here; without threads it survives fork, and at these sizes they gain nothing.
        with _environment(LP_NUM_THREADS="0"):
            display = self.platform_display(self.PLATFORM_DEVICE, device, None)
            if not display or not self.initialise(display, None, None):
                raise OSError(f"eglInitialize failed (EGL error {self.error():#x}); is a driver installed?")
        return display


@final
class EGLContext(Context):
    def __init__(self, device: int | None) -> None:
        self._egl = egl = _EGL()
        self._display = egl.display(_choose_device(egl.devices(), device))
        config, number = ctypes.c_void_p(), ctypes.c_int()
        attributes = (ctypes.c_int * len(egl.CONFIG))(*egl.CONFIG)
        chosen = egl.choose_config(self._display, attributes, ctypes.byref(config), 1, ctypes.byref(number))
        if not chosen or number.value < 1 or not egl.bind_api(0x30A2):  # EGL_OPENGL_API
            raise OSError(f"EGL offers no desktop OpenGL with a 24-bit depth buffer (EGL error {egl.error():#x})")
        attributes = (ctypes.c_int * len(egl.CONTEXT))(*egl.CONTEXT)
        self._context = egl.create_context(self._display, config, None, attributes)
        if not self._context:
            raise OSError(f"eglCreateContext failed for OpenGL 4.1 core (EGL error {egl.error():#x})")

    def make_current(self) -> None:
        # The bound API belongs to the thread, not to the context.
        if not self._egl.bind_api(0x30A2) or not self._egl.make_current(self._display, None, None, self._context):
            raise OSError(f"eglMakeCurrent failed (EGL error {self._egl.error():#x})")

    def release(self) -> None:
        self._egl.make_current(self._display, None, None, None)

    def destroy(self) -> None:
        self._egl.destroy_context(self._display, self._context)

    def address(self, name: str) -> int | None:
        return self._egl.address(name.encode())


@final
class OSMesaContext(Context):
    # RGBA, 24 bits of depth, OpenGL 3.3 core, as pyrender asks for.
    ATTRIBUTES = (0x22, 0x1908, 0x30, 24, 0x33, 0x34, 0x36, 3, 0x37, 3, 0)

    def __init__(self) -> None:
        self._library = library = _load_library("OSMesa")
        void, integer = ctypes.c_void_p, ctypes.c_int
        library.OSMesaCreateContextAttribs.restype = void
        library.OSMesaCreateContextAttribs.argtypes = [void, void]
        library.OSMesaMakeCurrent.restype = ctypes.c_ubyte
        library.OSMesaMakeCurrent.argtypes = [void, void, ctypes.c_uint, integer, integer]
        library.OSMesaDestroyContext.argtypes = [void]
        library.OSMesaGetProcAddress.restype, library.OSMesaGetProcAddress.argtypes = void, [ctypes.c_char_p]
        with _environment(LP_NUM_THREADS="0"):
            attributes = (integer * len(self.ATTRIBUTES))(*self.ATTRIBUTES)
            self._context = library.OSMesaCreateContextAttribs(attributes, None)
            if not self._context:
                raise OSError("OSMesaCreateContextAttribs failed for OpenGL 3.3 core")
            # Renders go to framebuffer objects; OSMesa only wants some memory of its own.
            self._buffer = (ctypes.c_ubyte * 4)()
            self.make_current()

    def make_current(self) -> None:
        if not self._library.OSMesaMakeCurrent(self._context, self._buffer, 0x1401, 1, 1):
            raise OSError("OSMesaMakeCurrent failed")

    def release(self) -> None:
        self._library.OSMesaMakeCurrent(None, None, 0, 0, 0)

    def destroy(self) -> None:
        self._library.OSMesaDestroyContext(self._context)

    def address(self, name: str) -> int | None:
        return self._library.OSMesaGetProcAddress(name.encode())


def _choose_device(devices: list[tuple[int, bool]], wanted: int | None) -> int:
    """The EGL device of this process: hardware before software, spread over the ranks of a node.

    `wanted` counts hardware devices in EGL's order, which is not CUDA's (CUDA_VISIBLE_DEVICES does not affect it). The
    user's EGL_DEVICE_ID counts all devices, as pyrender does. Untested on hardware with several GPUs.
    """
    if not devices:
        raise OSError("EGL lists no device")
    hardware = [handle for handle, software in devices if not software]
    if wanted is not None:
        if not hardware:
            return devices[0][0]  # the caller warns once it knows who renders
        if not 0 <= wanted < len(hardware):
            raise InputError(
                f"Expected device between 0 and {len(hardware) - 1}, got {wanted}: EGL lists no more GPUs."
            )
        return hardware[wanted]
    fixed = os.environ.get("EGL_DEVICE_ID")
    if fixed is not None:
        if not fixed.isdecimal() or int(fixed) >= len(devices):
            raise InputError(
                f"Expected EGL_DEVICE_ID between 0 and {len(devices) - 1}, got {fixed!r}. Change or unset it."
            )
        return devices[int(fixed)][0]
    rank = next((os.environ[name] for name in _LOCAL_RANK if os.environ.get(name, "").isdecimal()), "0")
    candidates = hardware or [handle for handle, _ in devices]
    return candidates[int(rank) % len(candidates)]


def _why_not(platform: str) -> str:
    """Why a platform cannot be used here, in words; "" when it can."""
    try:
        if platform == "egl":
            _load_library("GL")  # PyOpenGL looks desktop OpenGL up there
            egl = _EGL()
            devices = egl.devices()
            if not devices:
                return "EGL lists no device"
            # One device that starts is enough: a GPU's device file may be closed to us where software still works.
            reasons = []
            for handle, _ in devices:
                try:
                    egl.display(handle)
                    return ""
                except OSError as error:
                    reasons.append(str(error))
            return "; ".join(sorted(set(reasons)))
        _load_library("OSMesa")
    except (OSError, AttributeError) as error:
        return str(error)
    return ""


def _opengl_platform() -> str | None:
    """The platform that PyOpenGL has been imported with in this process, None if it has not been imported."""
    module = sys.modules.get("OpenGL.platform")
    if module is None:
        return None
    name = type(module.PLATFORM).__name__
    return {"EGLPlatform": "egl", "OSMesaPlatform": "osmesa"}.get(name, name)


def choose_platform(wanted: str = "auto") -> str:
    """The platform to render with: `wanted`, else PYOPENGL_PLATFORM, else EGL, else OSMesa.

    Raises:
        InputError: an unknown name.
        SetupError: no usable library, or PyOpenGL is already tied to another platform in this process.
    """
    if wanted not in ("auto", "egl", "osmesa"):
        raise InputError(f"Unknown platform {wanted!r}. Known: auto, egl, osmesa.")
    with _lock:
        tied = _opengl_platform()
        asked = None if wanted == "auto" else wanted
        if tied is not None:
            if tied not in ("egl", "osmesa") or asked not in (None, tied):
                raise SetupError(
                    f"Expected OpenGL on {asked or 'egl or osmesa'}, got {tied}: PyOpenGL was imported with it "
                    f"earlier in this process. Set PYOPENGL_PLATFORM={asked or 'egl'} before the first import of "
                    "OpenGL, or use one platform a process."
                )
            return tied
        if asked is None and os.environ.get("PYOPENGL_PLATFORM"):
            asked = os.environ["PYOPENGL_PLATFORM"]
            if asked not in ("egl", "osmesa"):
                raise SetupError(
                    f"Expected PYOPENGL_PLATFORM=egl or osmesa, got {asked!r}, which needs a screen. "
                    "Change or unset it."
                )
        reasons = {}
        for name in ("egl", "osmesa") if asked is None else (asked,):
            reasons[name] = _why_not(name)
            if not reasons[name]:
                return name
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise SetupError(f"Expected OpenGL libraries that render without a screen, found none ({said}). {_PACKAGES}")


def load(wanted: str = "auto") -> types.ModuleType:
    """Imports pyrender, tied to a platform, with its known troubles cured. Cheap when repeated.

    Raises:
        SetupError: pyrender or an OpenGL library is missing.
    """
    with _lock:
        platform = choose_platform(wanted)
        if "platform" in _chosen:
            return sys.modules["pyrender"]
        # pyrender.viewer imports pyglet, which wants X11 libraries even if no window is ever opened.
        if "pyrender" not in sys.modules:
            sys.modules.setdefault("pyrender.viewer", _viewer_stub())
        with _environment(PYOPENGL_PLATFORM=platform), warnings.catch_warnings():
            # PyOpenGL 3.1.0 and pyrender hold invalid escapes and use what Python and numpy have since deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", SyntaxWarning)
            try:
                import pyrender
            except ImportError as error:
                raise SetupError(
                    f"Expected pyrender, but it cannot be imported: {error}. Install it: "
                    '`pip install "simulation-bridge[render]"`.'
                ) from error
        _cure_numpy(pyrender)
        _cure_pyopengl()
        if platform == "egl":
            _cure_egl()
        _chosen["platform"] = platform
        return pyrender


def open_context(platform: str, device: int | None) -> Context:
    """A new context on the platform that `load` chose.

    Raises:
        SetupError: the driver refuses; the message says what it said.
    """
    try:
        return EGLContext(device) if platform == "egl" else OSMesaContext()
    except OSError as error:
        raise SetupError(f"Expected an OpenGL context on {platform}, got: {error}. {_PACKAGES}") from error


def is_software(renderer: str) -> bool:
    """Whether a GL_RENDERER string names a software renderer."""
    return any(word in renderer.lower() for word in _SOFTWARE)


def visible_gpus() -> list[str]:
    """Device files of GPUs that this process can see, whether or not OpenGL can use them."""
    return sorted(str(path) for pattern in _GPU_FILES for path in Path("/dev").glob(pattern))


def warn_of_software(renderer: str) -> None:
    """Warns once a place if a software renderer answers where there is a GPU, unless the user asked for software."""
    chosen = ("EGL_DEVICE_ID", "LIBGL_ALWAYS_SOFTWARE", "PYOPENGL_PLATFORM")
    if not is_software(renderer) or any(os.environ.get(name) for name in chosen):
        return
    gpus = visible_gpus()
    if gpus:
        warnings.warn(
            f"Expected a GPU to render ({', '.join(gpus)} can be seen), got the software renderer {renderer!r}. In a "
            "container, set NVIDIA_DRIVER_CAPABILITIES=graphics,utility,compute; else check that the driver brings its "
            "EGL library. LIBGL_ALWAYS_SOFTWARE=1 renders in software on purpose.",
            RuntimeWarning,
            stacklevel=2,
        )


def _viewer_stub() -> types.ModuleType:
    class Viewer:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise SetupError(
                "Expected pyrender off screen: the pyrender adapter has left its window toolkit out in this process. "
                "Import pyrender yourself before the adapter renders to have pyrender.Viewer."
            )

    module = types.ModuleType("pyrender.viewer")
    module.__dict__["Viewer"] = Viewer
    return module


def _cure_numpy(pyrender: Any) -> None:
    """`Mesh.bounds` uses np.infty, which numpy 2 does not have; scene bounds and shadows need it."""
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        return

    def bounds(mesh: Any) -> Any:
        if mesh._bounds is None:
            each = np.array([p.bounds for p in mesh.primitives])
            mesh._bounds = np.stack([each[:, 0].min(axis=0), each[:, 1].max(axis=0)])
        return mesh._bounds

    pyrender.Mesh.bounds = property(bounds)


def _cure_pyopengl() -> None:
    from OpenGL import platform
    from OpenGL.plugins import FormatHandler

    # Python 3.12 moved byref's type from builtins to _ctypes; PyOpenGL 3.1.0 looks it up by name (textures need it).
    kind = type(ctypes.byref(ctypes.c_int()))
    handler = FormatHandler.by_name("ctypesparameter")
    name = f"{kind.__module__}.{kind.__name__}"
    if handler is not None and name not in handler.check:
        handler.check.append(name)
    # The current context is a dictionary key in PyOpenGL: as a plain address it is hashable (OSMesa's was not) and
    # whole (EGL's was cut to 32 bits).
    platform.GetCurrentContext.restype = ctypes.c_void_p


def _cure_egl() -> None:
    """pyrender's own renderers terminate EGL's display when they go, and every context of the process with it."""
    from OpenGL import EGL
    from pyrender.platforms.egl import EGLPlatform

    def delete_context(platform: Any) -> None:
        if platform._egl_display is not None and platform._egl_context is not None:
            EGL.eglMakeCurrent(platform._egl_display, EGL.EGL_NO_SURFACE, EGL.EGL_NO_SURFACE, EGL.EGL_NO_CONTEXT)
            EGL.eglDestroyContext(platform._egl_display, platform._egl_context)
        platform._egl_display = platform._egl_context = None

    EGLPlatform.delete_context = delete_context
