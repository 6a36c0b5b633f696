"""A state as text and arrays in one file, whose damage is noticed: never a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.errors import InputError
from bridge.storage.files import write_whole


def packed(state: Any) -> tuple[str, list[NDArray[Any]]]:
    """A state as JSON and the arrays that it refers to; copies, so that it stays what it is now."""
    arrays: list[NDArray[Any]] = []

    def pack(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, torch.Tensor):
            arrays.append(value.detach().to("cpu").numpy().copy())
            return {"tensor": len(arrays) - 1}
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            arrays.append(value.copy())
            return {"array": len(arrays) - 1}
        if isinstance(value, np.generic):
            return pack(value.item())
        if isinstance(value, list):
            return {"list": [pack(item) for item in value]}
        if isinstance(value, tuple):
            return {"tuple": [pack(item) for item in value]}
        if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
            return {"dict": [[key, pack(item)] for key, item in value.items()]}
        raise InputError(
            f"Expected a state of numbers, strings, arrays, tensors, lists, tuples and dictionaries, got "
            f"{type(value).__name__}."
        )

    return json.dumps(pack(state)), arrays


def unpacked(text: str, arrays: list[NDArray[Any]]) -> Any:
    """The inverse of `packed`."""

    def unpack(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return torch.as_tensor(arrays[content].copy())
        if kind == "array":
            return arrays[content].copy()
        if kind == "dict":
            return {key: unpack(item) for key, item in content}
        items = [unpack(item) for item in content]
        return items if kind == "list" else tuple(items)

    return unpack(json.loads(text))


def _digest(content: Mapping[str, NDArray[Any]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(content):
        array = content[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def write(path: Path, step: int, state: tuple[str, list[NDArray[Any]]]) -> None:
    """Writes what `packed` has made of the state after `step` steps; the file is whole or not there.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    text, arrays = state
    tree = json.dumps({"step": step, "state": text})
    content = {"tree": np.frombuffer(tree.encode(), dtype=np.uint8)}
    content |= {f"array{i}": array for i, array in enumerate(arrays)}
    digest = np.frombuffer(_digest(content), dtype=np.uint8)

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as opened:  # of a path without .npz numpy would make another
            np.savez(opened, digest=digest, **content)  # type: ignore[arg-type]

    write_whole(path, fill)


def read(path: Path) -> tuple[int, tuple[str, list[NDArray[Any]]]]:
    """The step and the state, for `unpacked`, of a file that `write` has written.

    Raises:
        ValueError: its checksum is wrong; other exceptions where it is no such file.
    """
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        content = {name: file[name] for name in file.files}
    if content.pop("digest").tobytes() != _digest(content):
        raise ValueError("its checksum is wrong")
    tree = json.loads(content["tree"].tobytes().decode())
    arrays = [content[f"array{i}"] for i in range(len(content) - 1)]
    return int(tree["step"]), (tree["state"], arrays)
