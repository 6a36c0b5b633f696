"""A leaner pyrender renderer, and the session that ties one to a context, a process and a thread.

Imported only after `_pyrender_compat.load`: pyrender's classes must exist before they can be derived from.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import pyrender
from numpy.typing import NDArray
from OpenGL import GL, contextdata
from OpenGL.raw.GL.VERSION.GL_1_0 import glGetIntegerv, glReadPixels
from OpenGL.raw.GL.VERSION.GL_2_0 import glUniform3fv, glUniform4fv, glUniformMatrix4fv
from pyrender.constants import RenderFlags
from pyrender.renderer import Renderer
from pyrender.shader_program import ShaderProgram, ShaderProgramCache

from adapters.render.pyrender_compat import Context, is_software, open_context
from bridge.errors import InputError, SetupError

_SHADERS = Path(__file__).parent / "shaders"
_PLAIN = {
    "segmentation.vert": str(_SHADERS / "plain.vert"),
    "mesh_depth.vert": str(_SHADERS / "plain.vert"),
}
_LAMBERT = {"mesh.vert": str(_SHADERS / "lambert.vert"), "mesh.frag": str(_SHADERS / "lambert.frag")}
_NORMALS = {"mesh.vert": str(_SHADERS / "lambert.vert"), "mesh.frag": str(_SHADERS / "normals.frag")}

SEGMENTATION = int(RenderFlags.SEG)
DEPTH = int(RenderFlags.DEPTH_ONLY)
COLOUR = int(RenderFlags.NONE)
NORMALS = -1  # not one of pyrender's


class Scene(pyrender.Scene):
    """pyrender's scene with poses of nodes that are given, not found by a walk through its graph: in camera axes.

    OpenGL computes in single precision: poses in the world, and a camera's, would lose what is far from the origin.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.poses: dict[Any, NDArray[np.float64]] = {}

    def get_pose(self, node: Any) -> NDArray[np.float64]:
        pose = self.poses.get(node)
        return super().get_pose(node) if pose is None else pose


class _Program(ShaderProgram):
    """pyrender's shader program, which asks GL for the place of each uniform once instead of at each draw."""

    def __init__(self, vertex: str, fragment: str, geometry: str | None, defines: dict[str, Any]) -> None:
        super().__init__(vertex, fragment, geometry, defines)
        self._places: dict[str, int] = {}

    def set_uniform(self, name: str, value: Any, unsigned: bool = False) -> None:
        place = self._places.get(name)
        if place is None:
            place = self._places[name] = GL.glGetUniformLocation(self._program_id, name)
        if place < 0:
            return  # shaders of ours do without some of pyrender's uniforms
        if isinstance(value, np.ndarray) and not unsigned and value.shape in _SETTERS:
            numbers = np.ascontiguousarray(value, dtype=np.float32)
            _SETTERS[value.shape](place, numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float)))
        else:
            super().set_uniform(name, value, unsigned)


_SETTERS = {
    (3,): lambda place, numbers: glUniform3fv(place, 1, numbers),
    (4,): lambda place, numbers: glUniform4fv(place, 1, numbers),
    (4, 4): lambda place, numbers: glUniformMatrix4fv(place, 1, True, numbers),
}


class _Shaders(ShaderProgramCache):
    """pyrender's shaders, some replaced by ours; of one context."""

    def __init__(self) -> None:
        super().__init__()
        self.replaced: dict[str, str] = {}

    def get_program(
        self, vertex_shader: str, fragment_shader: str, geometry_shader: str | None = None, defines: Any = None
    ) -> Any:
        names = [vertex_shader, fragment_shader, geometry_shader]
        files = tuple(None if name is None else self.replaced.get(name, name) for name in names)
        key = (files, tuple((defines or {}).items()))
        if key not in self._program_cache:
            # An absolute file name, as ours are, wins over the shader directory.
            paths = [None if file is None else str(Path(self.shader_dir) / file) for file in files]
            self._program_cache[key] = _Program(*paths, defines or {})
        return self._program_cache[key]


@final
class FastRenderer(Renderer):
    """pyrender's renderer with framebuffers by the number of samples, and reading left to the caller.

    pyrender always draws into a buffer of four samples a pixel and reads colour and depth back, wanted or not; on a
    software renderer that is most of the time. It also culls back faces in silhouettes and depths whatever the material
    says, which tears holes into open meshes.
    """

    def __init__(self, width: int, height: int, *, lambert: bool, two_sided: bool) -> None:
        super().__init__(width, height)
        self._program_cache = _Shaders()
        self._lambert = lambert
        self._two_sided = two_sided
        self._kind, self._samples = COLOUR, 0
        self._camera = (np.eye(4), np.eye(4))
        self._light: NDArray[np.float64] | None = None
        self._framebuffers: dict[tuple[int, bool], tuple[int, NDArray[np.uint32]]] = {}
        GL.glPixelStorei(GL.GL_PACK_ALIGNMENT, 1)

    def __del__(self) -> None:
        """Nothing: pyrender's deletes GL objects in whichever context is current then. The session does it."""

    def look(self, projection: NDArray[np.float64], light: NDArray[np.float64] | None) -> None:
        """What the next drawings see.

        Args:
            projection: (4, 4) camera axes to clip coordinates.
            light: (4,) of the Lambert shader: direction in camera axes, 0 for the camera's centre; intensity. None
                leaves its own, the camera's centre at intensity 1.
        """
        self._camera = (self._camera[0], projection)
        self._light = light

    def draw(self, scene: Any, kind: int, samples: int, nodes: dict[Any, Any]) -> None:
        """Draws one image.

        Args:
            kind: SEGMENTATION, DEPTH, COLOUR or NORMALS.
            samples: a pixel, 0 for plain.
            nodes: the mesh nodes to draw, in this order, and their colours in a segmentation (0 to 255).
        """
        self._kind, self._samples = kind, samples
        self._nodes = list(nodes)
        lambert = _LAMBERT if self._lambert else {}
        self._program_cache.replaced = _PLAIN | (_NORMALS if kind == NORMALS else lambert)
        flags = max(kind, 0) | RenderFlags.OFFSCREEN | (RenderFlags.SKIP_CULL_FACES if self._two_sided else 0)
        self.render(scene, flags, nodes)

    def read(self, what: int, number: Any, into: NDArray[Any]) -> None:
        """Reads the last image into an array, bottom row first; several samples a pixel are averaged first.

        Args:
            what: GL_RED, GL_RGB, GL_RGBA or GL_DEPTH_COMPONENT.
            number: the array's type to GL.
            into: C-contiguous.
        """
        width, height = self.viewport_width, self.viewport_height
        source, _ = self._framebuffers[self._samples, self._kind == NORMALS]
        if self._samples:
            target = self._framebuffer(0, False)
            GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, source)
            GL.glBindFramebuffer(GL.GL_DRAW_FRAMEBUFFER, target)
            box = (0, 0, width, height)
            GL.glBlitFramebuffer(*box, *box, GL.GL_COLOR_BUFFER_BIT, GL.GL_NEAREST)
            source = target
        GL.glBindFramebuffer(GL.GL_READ_FRAMEBUFFER, source)
        glReadPixels(0, 0, width, height, what, number, ctypes.c_void_p(into.ctypes.data))

    def _framebuffer(self, samples: int, floats: bool) -> int:
        key = (samples, floats)
        if key not in self._framebuffers:
            try:
                self._framebuffers[key] = self._new_framebuffer(samples, floats)
                status = GL.glCheckFramebufferStatus(GL.GL_DRAW_FRAMEBUFFER)
                trouble = "" if status == GL.GL_FRAMEBUFFER_COMPLETE else f"framebuffer status {int(status):#x}"
            except GL.GLError as error:
                trouble = f"OpenGL error {error.err}"
            if trouble:
                self._framebuffers.pop(key, None)
                raise InputError(
                    f"Expected images that this OpenGL has memory for, got {self.viewport_height} x "
                    f"{self.viewport_width} pixels of {max(samples, 1)} samples ({trouble}). Take a smaller size or "
                    "antialias=0."
                )
        return self._framebuffers[key][0]

    def _new_framebuffer(self, samples: int, floats: bool) -> tuple[int, NDArray[np.uint32]]:
        """A framebuffer, bound for drawing, and its buffers of colour and depth."""
        buffers = GL.glGenRenderbuffers(2)
        size = (self.viewport_width, self.viewport_height)
        forms = (GL.GL_RGBA32F if floats else GL.GL_RGBA8, GL.GL_DEPTH_COMPONENT32F)
        for buffer, form in zip(buffers, forms, strict=True):
            GL.glBindRenderbuffer(GL.GL_RENDERBUFFER, buffer)
            if samples:
                GL.glRenderbufferStorageMultisample(GL.GL_RENDERBUFFER, samples, form, *size)
            else:
                GL.glRenderbufferStorage(GL.GL_RENDERBUFFER, form, *size)
        framebuffer = GL.glGenFramebuffers(1)
        GL.glBindFramebuffer(GL.GL_DRAW_FRAMEBUFFER, framebuffer)
        points = (GL.GL_COLOR_ATTACHMENT0, GL.GL_DEPTH_ATTACHMENT)
        for buffer, point in zip(buffers, points, strict=True):
            GL.glFramebufferRenderbuffer(GL.GL_DRAW_FRAMEBUFFER, point, GL.GL_RENDERBUFFER, buffer)
        return int(framebuffer), buffers

    # What follows replaces private methods of pyrender 0.1.45 (the extra `render` pins that version).

    def _configure_main_framebuffer(self) -> None:
        self._main_fb_ms = self._framebuffer(self._samples, self._kind == NORMALS)

    def _configure_forward_pass_viewport(self, flags: int) -> None:
        super()._configure_forward_pass_viewport(flags)
        GL.glDepthFunc(GL.GL_GREATER)

    def _read_main_framebuffer(self, scene: Any, flags: int) -> None:
        return None

    def _delete_main_framebuffer(self) -> None:
        for framebuffer, buffers in self._framebuffers.values():
            GL.glDeleteFramebuffers(1, [framebuffer])
            GL.glDeleteRenderbuffers(2, buffers)
        self._framebuffers = {}

    def _compute_max_n_lights(self, flags: int) -> list[int]:
        return [1, 1, 1]  # pyrender asks GL at each draw; our scenes have one light

    def _get_camera_matrices(self, scene: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return self._camera

    def _sorted_mesh_nodes(self, scene: Any) -> list[Any]:
        # pyrender's order comes from a set, and of surfaces at one depth the first is seen.
        return self._nodes

    def _bind_and_draw_primitive(self, primitive: Any, pose: NDArray[Any], program: Any, flags: int) -> None:
        if self._kind == COLOUR:
            if self._lambert and self._light is not None:
                program.set_uniform("light", self._light)
            super()._bind_and_draw_primitive(primitive, pose, program, flags)
            return
        program.set_uniform("M", pose)
        primitive._bind()
        if self._samples:
            GL.glEnable(GL.GL_MULTISAMPLE)
        if self._two_sided:
            GL.glDisable(GL.GL_CULL_FACE)
        else:
            GL.glEnable(GL.GL_CULL_FACE)
            GL.glCullFace(GL.GL_BACK)
        GL.glDisable(GL.GL_BLEND)
        GL.glPolygonMode(GL.GL_FRONT_AND_BACK, GL.GL_FILL)
        if primitive.indices is not None:
            GL.glDrawElements(primitive.mode, primitive.indices.size, GL.GL_UNSIGNED_INT, None)
        else:
            GL.glDrawArrays(primitive.mode, 0, len(primitive.positions))
        primitive._unbind()


def _reverse_depth(context: Context) -> None:
    """Depth 1 at the near plane and 0 where there is nothing: then floating point resolves all distances alike.

    The other way round, everything beyond a thousand times the near plane's distance shares a few numbers, and near
    planes have to be so far away that they cut what is close.
    """
    address = context.address("glClipControl")
    if address:
        ctypes.CFUNCTYPE(None, ctypes.c_uint, ctypes.c_uint)(address)(0x8CA1, 0x935F)  # GL_LOWER_LEFT, GL_ZERO_TO_ONE
        mode = ctypes.c_int()
        glGetIntegerv(0x935D, ctypes.byref(mode))  # GL_CLIP_DEPTH_MODE
    if not address or mode.value != 0x935F:
        raise SetupError(
            f"Expected OpenGL 4.5, or the extension GL_ARB_clip_control, got {GL.glGetString(GL.GL_VERSION).decode()}. "
            "Take a newer driver or Mesa, or adapters.render.raster, which needs no OpenGL."
        )
    GL.glClearDepth(0.0)


class _Current(threading.local):
    """The context that is rendering in this thread."""

    context: Context | None = None


_current = _Current()
# Sessions that a fork inherited: their contexts are the parent's. Kept, so that nothing of theirs is ever deleted here.
_inherited: list[Any] = []


def _close(pid: int, context: Context, renderer: FastRenderer, scene: Any) -> None:
    if os.getpid() != pid:
        _inherited.append((context, renderer, scene))
        return
    # The garbage collector may call this in the middle of another session's batch: its context comes back afterwards.
    outer = _current.context
    try:
        context.make_current()
        renderer.delete()
        contextdata.cleanupContext()
        context.release()
        context.destroy()
    except OSError:
        pass  # current in another thread at exit: the process gives it back
    finally:
        if outer is not None:
            outer.make_current()


@dataclass(frozen=True)
class Drawn:
    """What pyrender holds of one object: its nodes, and materials with the RGBA factors that the mesh brought."""

    nodes: tuple[Any, ...]
    materials: tuple[tuple[Any, NDArray[np.float64]], ...]


@final
class Session:
    """A renderer with its scene and context; for one process and one thread at a time.

    Args:
        build: makes the scene, its camera node, and for each object its mesh nodes and materials with their own
            colours (a pyrender mesh belongs to one context).
    """

    def __init__(
        self, platform: str, device: int | None, size: tuple[int, int], build: Any, *, lambert: bool, two_sided: bool
    ) -> None:
        self.pid = os.getpid()
        self.context = open_context(platform, device)
        with self:
            _reverse_depth(self.context)
            self.gl_renderer = GL.glGetString(GL.GL_RENDERER).decode()
            self.renderer = FastRenderer(size[1], size[0], lambert=lambert, two_sided=two_sided)
        self.scene: Scene
        self.scene, self.objects = build()
        self.scene.poses[self.scene.main_camera_node] = np.eye(4)
        # Red says that something is there, green and blue which object.
        self.nodes = {
            node: np.array([255, number & 255, number >> 8])
            for number, drawn in enumerate(self.objects, start=1)
            for node in drawn.nodes
        }
        # At exit as well, while the modules that it needs still live.
        weakref.finalize(self, _close, self.pid, self.context, self.renderer, self.scene)
        if device is not None and is_software(self.gl_renderer):
            warnings.warn(
                f"Expected GPU {device}, got the software renderer {self.gl_renderer!r}. In a container, set "
                "NVIDIA_DRIVER_CAPABILITIES=graphics,utility,compute; else check that the driver brings its EGL "
                "library. Leave device out to render in software on purpose.",
                RuntimeWarning,
                stacklevel=2,
            )

    def __enter__(self) -> Session:
        try:
            self.context.make_current()
        except OSError as error:
            raise SetupError(
                f"Expected the OpenGL context that this renderer has opened, got: {error}. Something else in this "
                "process has closed its display (eglTerminate). Make a new simulator, or keep the other apart in a "
                "process of its own."
            ) from error
        _current.context = self.context
        return self

    def __exit__(self, *_: object) -> None:
        # Released after each batch: a context that stays current belongs to its thread, and no other may use it.
        _current.context = None
        self.context.release()


def abandon(session: Session) -> None:
    """Forgets a session that a fork inherited, without touching the parent's context."""
    _inherited.append(session)
