"""CPU time of a render: the adapter, the same GL calls without the adapter, and stock pyrender.

    python tests/benchmarks/bench_pyrender.py

Newell teapot of 6,320 faces, random poses, one process. "bare" moves pyrender's camera and draws and reads through the
same lean renderer, without turning parameters into poses and pixels into float arrays; "stock" is
`pyrender.OffscreenRenderer.render` with the flags that give the same image (SEG, DEPTH_ONLY, none), four samples a
pixel and pyrender's shaders. The best of several rounds each; adapter and bare take turns, so that a busy machine
treats them alike; stock has its own process, as its renderer would close the display of the others.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable

ROUNDS = 9


def best_ms(renders: int, **works: Callable[[], object]) -> dict[str, float]:
    """CPU milliseconds a render of each."""
    for work in works.values():
        work()  # shaders, buffers
    best = dict.fromkeys(works, float("inf"))
    for _ in range(ROUNDS):
        for name, work in works.items():
            begin = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - begin)
    return {name: 1e3 * seconds / renders for name, seconds in best.items()}


def measure(kind: str, size: int, variant: str) -> dict[str, float]:
    import numpy as np

    from adapters import _pyrender_compat as compat
    from adapters.pyrender import PyrenderSimulator, _turntable_pose

    k = 200 if size == 64 else 60
    rng = np.random.default_rng(0)
    rows = rng.uniform([-180, -60, 3, 15], [180, 60, 5, 25], (k, 4))
    simulator = PyrenderSimulator(size=(size, size), outputs=kind)
    poses = [_turntable_pose(*row[:3]) for row in rows]
    if variant == "ours":
        session = simulator._session()
        from OpenGL import GL

        from adapters._pyrender_renderer import COLOUR, DEPTH, SEGMENTATION

        what, number, dtype, channels, flag = {
            "silhouette": (GL.GL_RED, GL.GL_UNSIGNED_BYTE, np.uint8, (), SEGMENTATION),
            "depth": (GL.GL_DEPTH_COMPONENT, GL.GL_FLOAT, np.float32, (), DEPTH),
            "rgb": (GL.GL_RGB, GL.GL_UNSIGNED_BYTE, np.uint8, (3,), COLOUR),
        }[kind]
        pixels = np.empty((size, size, *channels), dtype)
        scene, renderer, node = session.scene, session.renderer, session.scene.main_camera_node
        node.camera.znear, node.camera.zfar = 1.0, 7.0

        def loop() -> None:
            with session:
                for row, pose in zip(rows, poses, strict=True):
                    node.camera.yfov = 2 * np.deg2rad(row[3])
                    scene.set_pose(node, pose)
                    renderer.draw(scene, flag, 0, session.nodes)
                    renderer.read(what, number, pixels)

        seeds = np.zeros(k, np.uint64)
        return best_ms(k, adapter=lambda: simulator(rows, seeds), bare=loop)

    os.environ["PYOPENGL_PLATFORM"] = "egl"
    pyrender = compat.load("egl")
    simulator = PyrenderSimulator(size=(size, size), outputs=kind, shading="pbr")
    scene = simulator._build_scene()
    node = scene.main_camera_node
    node.camera.znear, node.camera.zfar = 1.0, 7.0
    stock = pyrender.OffscreenRenderer(size, size)
    flags = {
        "silhouette": pyrender.RenderFlags.SEG,
        "depth": pyrender.RenderFlags.DEPTH_ONLY,
        "rgb": pyrender.RenderFlags.NONE,
    }[kind]
    nodes = dict.fromkeys(scene.mesh_nodes, 255)

    def stock_loop() -> None:
        for row, pose in zip(rows, poses, strict=True):
            node.camera.yfov = 2 * np.deg2rad(row[3])
            scene.set_pose(node, pose)
            stock.render(scene, flags, nodes)

    return best_ms(k, stock=stock_loop)


def main() -> None:
    machine = platform.processor() or platform.machine()
    print(f"Python {platform.python_version()}, {machine}, load {os.getloadavg()[0]:.1f}")
    print(f"{'image':<12}{'size':>5}{'adapter ms':>12}{'bare ms':>10}{'overhead':>10}{'stock ms':>10}{'adapter/s':>11}")
    for size in (64, 256):
        for kind in ("silhouette", "depth", "rgb"):
            ms = {}
            for variant in ("ours", "stock"):
                command = [sys.executable, __file__, kind, str(size), variant]
                ms |= json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            overhead = 100 * (ms["adapter"] / ms["bare"] - 1)
            print(
                f"{kind:<12}{size:>5}{ms['adapter']:>12.3f}{ms['bare']:>10.3f}{overhead:>9.0f}%{ms['stock']:>10.2f}"
                f"{1e3 / ms['adapter']:>11.0f}",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
    else:
        main()
