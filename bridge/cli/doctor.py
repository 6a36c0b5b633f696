"""`bridge doctor`: what this machine has, and under MPI what each rank has."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata

import torch

from bridge.dispatch import get_dispatcher
from bridge.dispatch.world import launched_size, local_device
from bridge.environment import child_environment
from bridge.simulator import registry

_PACKAGES = ("numpy", "scipy", "torch", "gemmi", "mrcfile", "pyrender", "trimesh", "numba", "matplotlib", "mpi4py")


def doctor() -> int:
    """Collective under MPI: what each rank has; rank 0 prints."""
    dispatcher = get_dispatcher()
    threads, scratch = torch.get_num_threads(), tempfile.gettempdir()
    lines = dispatcher.each(
        f"{socket.gethostname()}, cores {_ranges(sorted(os.sched_getaffinity(0)))}, {threads} thread(s), device "
        f"{local_device()}, scratch {scratch} ({shutil.disk_usage(scratch).free / 1e9:.1f} GB free)"
    )
    if dispatcher.rank != 0:
        return 0
    print(f"python     {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            print(f"{package:<11}{metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:<11}not installed")
    print(f"cuda       {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    print(f"OpenGL     {_opengl()}")
    print(f"MPI        {dispatcher.library}")
    print(f"launcher   {launched_size()} rank(s), as many as are seen: it belongs to that MPI")
    print(f"simulators {', '.join(registry.list_simulators())}")
    external = os.environ.get("TEM_SIMULATOR") or shutil.which("TEM-simulator")
    print(f"programs   TEM-simulator: {external or 'not found (TEM_SIMULATOR names it)'}")
    for rank, line in enumerate(lines):
        print(f"rank {rank:<6}{line}")
    if threads * dispatcher.local_size > (os.cpu_count() or 1):
        print(
            f"           {dispatcher.local_size} ranks of {threads} thread(s) on {os.cpu_count()} cores are too many: "
            "start fewer, or set BRIDGE_THREADS."
        )
    return 0


def _opengl() -> str:
    """What OpenGL there is, tried in a process of its own: a broken driver may take it along."""
    program = (
        "import os; os.environ.setdefault('PYOPENGL_PLATFORM', 'egl'); "
        "from adapters.render.pyrender import PyrenderSimulator; import pyrender; "
        "from OpenGL.GL import glGetString, GL_RENDERER; r = pyrender.OffscreenRenderer(8, 8); "
        "r._platform.make_current(); print(glGetString(GL_RENDERER).decode())"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=child_environment(1)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"none ({type(error).__name__})"
    said = (done.stdout.strip() or done.stderr.strip() or "?").splitlines()[-1]
    return said if done.returncode == 0 else f"none ({said})"


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as 0-2,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
