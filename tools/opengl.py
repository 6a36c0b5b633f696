"""Says whether programs can render off-screen here: exit status 0 and the renderer's name, or 1 and why not.

Opens a real EGL context, as the renderer adapter does, instead of looking for packages: NVIDIA's libraries and
Mesa's are equally good, and a library without a driver is not. Standard library only, as `tools/setup.sh` runs it
before anything is installed.
"""

from __future__ import annotations

import ctypes
import sys

EGL_PLATFORM_DEVICE = 0x313F
EGL_OPENGL_API = 0x30A2
EGL_NONE = 0x3038
EGL_SURFACE_TYPE = 0x3033
EGL_PBUFFER_BIT = 0x0001
EGL_RENDERABLE_TYPE = 0x3040
EGL_OPENGL_BIT = 0x0008
GL_RENDERER = 0x1F01


def library(name: str) -> ctypes.CDLL:
    """Loads a shared library, or raises OSError."""
    return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)


def egl_renderer() -> str:
    """The name of the first EGL device that gives an OpenGL context.

    Raises:
        OSError: a library is missing, or no device works.
    """
    egl = library("libEGL.so.1")
    library("libGL.so.1")  # PyOpenGL 3.1.0, which pyrender asks for, looks for this one
    egl.eglGetProcAddress.restype = ctypes.c_void_p

    def function(name: str, result: type, *arguments: type):
        address = egl.eglGetProcAddress(name.encode())
        if not address:
            raise OSError(f"libEGL has no {name}")
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    pointer, number = ctypes.c_void_p, ctypes.c_int
    query_devices = function("eglQueryDevicesEXT", number, number, pointer, pointer)
    get_display = function("eglGetPlatformDisplayEXT", pointer, number, pointer, pointer)
    initialize = function("eglInitialize", number, pointer, pointer, pointer)
    terminate = function("eglTerminate", number, pointer)
    bind_api = function("eglBindAPI", number, number)
    choose_config = function("eglChooseConfig", number, pointer, pointer, pointer, number, pointer)
    create_context = function("eglCreateContext", pointer, pointer, pointer, pointer, pointer)
    make_current = function("eglMakeCurrent", number, pointer, pointer, pointer, pointer)

    devices, count = (pointer * 16)(), number()
    if not query_devices(16, devices, ctypes.byref(count)) or count.value == 0:
        raise OSError("EGL lists no device (a driver is missing: libgl1-mesa-dri, or the GPU's own)")
    for device in devices[: count.value]:
        display = get_display(EGL_PLATFORM_DEVICE, device, None)
        if not display or not initialize(display, None, None):
            continue
        wanted = [EGL_SURFACE_TYPE, EGL_PBUFFER_BIT, EGL_RENDERABLE_TYPE, EGL_OPENGL_BIT, EGL_NONE]
        attributes = (number * len(wanted))(*wanted)
        config, found = pointer(), number()
        bind_api(EGL_OPENGL_API)
        if choose_config(display, attributes, ctypes.byref(config), 1, ctypes.byref(found)) and found.value:
            context = create_context(display, config, None, None)
            if context and make_current(display, None, None, context):
                name = function("glGetString", ctypes.c_char_p, number)(GL_RENDERER)
                terminate(display)
                return name.decode() if name else "unnamed renderer"
        terminate(display)
    raise OSError(f"none of the {count.value} EGL devices gives an OpenGL context (libgl1-mesa-dri missing?)")


def main() -> int:
    """Prints what was found; the exit status says whether it is enough."""
    try:
        print(f"EGL, {egl_renderer()}")
        return 0
    except OSError as error:
        reason = str(error)
    try:
        library("libOSMesa.so.8")
    except OSError:
        print(reason)
        return 1
    print(f"OSMesa ({reason})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
