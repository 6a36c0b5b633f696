"""Simulators that fail in every way. Apart, and without torch: a child process imports the module of its function."""

from __future__ import annotations

import ctypes
import os

import numpy as np


def smooth_one(x):
    return np.sin(np.outer(x, np.arange(1.0, 200.0))).sum(axis=0)


def crash(x):
    if x[0] > 1.0:
        ctypes.string_at(0)
    return smooth_one(x)


def leave(x):
    if x[0] > 1.0:
        os._exit(7)
    return smooth_one(x)


def hang(x):
    if x[0] > 1.0:
        while True:
            pass
    return smooth_one(x)


def fail(x):
    if x[0] > 1.0:
        raise ValueError("no convergence")
    return smooth_one(x)
