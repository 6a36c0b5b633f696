"""CPU time of a render: both renderers, the GL calls without the adapter, and stock pyrender, side by side.

    python tests/benchmarks/bench_pyrender.py [SIZE ...]

Newell teapot of 6,320 faces, random poses, one process and one thread each. "bare" draws and reads through the same
lean renderer, without turning parameters into poses and pixels into float arrays; "stock" is
`pyrender.OffscreenRenderer.render` with the flags that give the same image (SEG, DEPTH_ONLY, none), four samples a
pixel and pyrender's shaders; "per call" makes and deletes an OffscreenRenderer for each image, as many scripts do. Both
have processes of their own, as their renderers close the display of others. In each round all take their turn, so that
a busy machine treats them alike: the shortest of four tries a round, medians over the rounds, of times and of ratios.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

ROUNDS = 9
TRIES = 4  # in a round, of which the shortest counts: interruptions only add
KINDS = ("silhouette", "depth", "rgb")
Works = dict[str, tuple[int, Callable[[], object]]]  # name -> (renders, what makes them)


def rows(k: int) -> object:
    import numpy as np

    return np.random.default_rng(0).uniform([-180, -60, 3, 15], [180, 60, 5, 25], (k, 4))


def ours(kind: str, size: int) -> Works:
    import numpy as np

    from adapters.render.pyrender import PyrenderSimulator, _projections
    from adapters.render.raster import RasterSimulator

    k = 50 if size <= 64 else 20
    inputs, seeds = rows(k), np.zeros(k, np.uint64)
    simulator = PyrenderSimulator(size=(size, size), outputs=kind)
    raster = RasterSimulator(size=(size, size), outputs=kind)
    session = simulator._session()
    from OpenGL import GL

    from adapters.render.pyrender_renderer import COLOUR, DEPTH, SEGMENTATION

    what, number, dtype, channels, flag = {
        "silhouette": (GL.GL_RED, GL.GL_UNSIGNED_BYTE, np.uint8, (), SEGMENTATION),
        "depth": (GL.GL_DEPTH_COMPONENT, GL.GL_FLOAT, np.float32, (), DEPTH),
        "rgb": (GL.GL_RGB, GL.GL_UNSIGNED_BYTE, np.uint8, (3,), COLOUR),
    }[kind]
    pixels = np.empty((size, size, *channels), dtype)
    scene, renderer = session.scene, session.renderer
    views = simulator._model.views(inputs)
    poses, projections = simulator._from_centres(views), _projections(views, (size, size))
    nodes = session.objects[0].nodes

    def bare() -> None:
        with session:
            for pose, projection in zip(poses[:, 0], projections, strict=True):
                scene.poses |= dict.fromkeys(nodes, pose)
                renderer.look(projection, None)
                renderer.draw(scene, flag, 0, session.nodes)
                renderer.read(what, number, pixels)

    return {
        "adapter": (k, lambda: simulator(inputs, seeds)),
        "bare": (k, bare),
        "raster": (k, lambda: raster(inputs, seeds)),
    }


def stock(kind: str, size: int, keep: bool) -> Works:
    import numpy as np

    from adapters.render import pyrender_compat as compat
    from adapters.render.cameras import turntable_pose
    from adapters.render.pyrender import PyrenderSimulator

    os.environ["PYOPENGL_PLATFORM"] = "egl"
    pyrender = compat.load("egl")
    k = 15 if keep else 1
    inputs = rows(k)
    poses = turntable_pose(*inputs[:, :3].T)
    flags = {
        "silhouette": pyrender.RenderFlags.SEG,
        "depth": pyrender.RenderFlags.DEPTH_ONLY,
        "rgb": pyrender.RenderFlags.NONE,
    }[kind]
    scene, _ = PyrenderSimulator(size=(size, size), outputs=kind, shading="pbr")._build_scene()
    node = scene.main_camera_node
    node.camera.znear, node.camera.zfar = 1.0, 7.0
    nodes = dict.fromkeys(scene.mesh_nodes, 255)
    kept = pyrender.OffscreenRenderer(size, size) if keep else None

    def work() -> None:
        for row, pose in zip(inputs, poses, strict=True):
            node.camera.yfov = 2 * np.deg2rad(row[3])
            scene.set_pose(node, pose)
            renderer = kept or pyrender.OffscreenRenderer(size, size)
            renderer.render(scene, flags, nodes)
            if not keep:
                renderer.delete()

    return {"stock" if keep else "per call": (k, work)}


def serve(kind: str, size: int, variant: str) -> None:
    """Measures for each line read, and prints the CPU milliseconds a render of each work."""
    works = ours(kind, size) if variant == "ours" else stock(kind, size, keep=variant == "stock")
    for _, work in works.values():
        work()  # shaders, buffers, compilers
    print("{}", flush=True)
    for _ in sys.stdin:
        spent = dict.fromkeys(works, float("inf"))
        for _ in range(TRIES):
            for name, (renders, work) in works.items():
                begin = time.process_time()
                work()
                spent[name] = min(spent[name], 1e3 * (time.process_time() - begin) / renders)
        print(json.dumps(spent), flush=True)


def measure(kind: str, size: int) -> list[dict[str, float]]:
    """CPU milliseconds a render, by name, for each round."""
    servers = [
        subprocess.Popen(
            [sys.executable, __file__, kind, str(size), variant],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for variant in ("ours", "stock", "per call")
    ]
    try:
        for server in servers:
            if not server.stdout.readline():
                raise SystemExit("a renderer failed to start")
        found = []
        for _ in range(ROUNDS):
            spent = {}
            for server in servers:
                server.stdin.write("\n")
                server.stdin.flush()
                spent |= json.loads(server.stdout.readline())
            found.append(spent)
        return found
    finally:
        for server in servers:
            server.stdin.close()
            server.wait()


def main(sizes: list[int]) -> None:
    machine = platform.processor() or platform.machine()
    print(f"Python {platform.python_version()}, {machine}, load {os.getloadavg()[0]:.1f}; {ROUNDS} rounds")
    names = ("adapter", "bare", "raster", "stock", "per call")
    derived = ("adapter/s", "raster/s", "overhead", "raster x", "stock x", "per call x")
    print(f"{'CPU ms':<12}{'size':>5}" + "".join(f"{name:>11}" for name in names + derived))
    for size in sizes:
        for kind in KINDS:
            rounds = measure(kind, size)
            ms = {name: statistics.median(r[name] for r in rounds) for name in names}
            ratio = {name: statistics.median(r[name] / r["adapter"] for r in rounds) for name in names}
            figures = [f"{ms[name]:.3f}" for name in names]
            figures += [
                f"{1e3 / ms['adapter']:.0f}",
                f"{1e3 / ms['raster']:.0f}",
                f"{100 * (1 / ratio['bare'] - 1):.0f}%",
            ]
            figures += [f"{1 / ratio['raster']:.1f}", f"{ratio['stock']:.1f}", f"{ratio['per call']:.0f}"]
            print(f"{kind:<12}{size:>5}" + "".join(f"{figure:>11}" for figure in figures), flush=True)
    print("overhead: adapter over bare. raster x: times faster than the adapter; stock x, per call x: times slower.")
    print("rgb: Lambert for adapter, bare and raster; pyrender's own shader for the others.")


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in KINDS:
        serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        main([int(size) for size in sys.argv[1:]] or [64, 256])
