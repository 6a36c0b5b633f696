"""What a walk sees of texts, numbers, containers, arrays and files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from bridge.simulator.digest_code import see_class, see_own_kind
from bridge.simulator.digest_walk import UnseenError, Walk, bypass, with_article
from bridge.simulator.file_contents import content_digest

_MANY, _WORD = 64, 2**63
_LARGE = 1_000_000  # bytes of an array whose digest is kept


def see_text(walk: Walk, value: str) -> None:
    """A text; where it names a program, or something in the folder for temporary files, what is there."""
    if value.startswith(tempfile.gettempdir() + os.sep) and "\0" not in value and len(value) < 4096:
        see_file(walk, PurePath(value))
        return
    if "/" in value[:4096] and len(value) < 4096 and "\0" not in value:
        with contextlib.suppress(OSError, ValueError):
            if os.path.isfile(value) and os.access(value, os.X_OK):
                walk.put("program", f"{os.path.basename(value)} {content_digest(value)}")
                return
        words = value.split()[:_MANY]
        for word in words if len(words) > 1 else ():  # of a line for a shell
            with contextlib.suppress(OSError, ValueError):
                if os.path.isabs(word) and os.path.isfile(word) and os.access(word, os.X_OK):
                    walk.put("program", content_digest(word))
    walk.put("str", value)


def see_items(walk: Walk, value: Any) -> None:
    if isinstance(value, list) and walk.again(value):
        return
    walk.put(type(value).__name__, str(len(value)))
    if len(value) >= _MANY and all(type(item) is float for item in value):
        walk.put("floats", np.array(value).tobytes())  # all at once, as there may be millions
        return
    if len(value) >= _MANY and all(type(item) is int and -_WORD <= item < _WORD for item in value):
        walk.put("ints", np.array(value, dtype=np.int64).tobytes())
        return
    for i, item in enumerate(value):
        walk.see_as(f"item {i}", item)


def see_set(walk: Walk, value: Any) -> None:
    walk.put(type(value).__name__, str(len(value)))
    for digest in sorted(walk.apart(item) for item in value):
        walk.out.update(digest)


def see_dict(walk: Walk, value: Mapping[Any, Any], ordered: bool) -> None:
    if value is sys.modules:
        raise walk.unseen(bypass(value))
    if walk.again(value, ordered):
        return
    walk.put("dict" if ordered else "table", str(len(value)))
    keys = list(value)
    if not ordered:
        texts = all(type(key) is str for key in keys)
        keys = sorted(keys) if texts else sorted(keys, key=walk.apart)
    for key in keys:
        with walk.inside(f"key {key!r}" if isinstance(key, str | int | float) else f"a {type(key).__name__} key"):
            walk.see(key)
            walk.see(value[key])


def see_array(walk: Walk, value: Any) -> None:
    array = np.asarray(value)
    walk.put(type(value).__name__, f"{array.dtype.str} {array.shape}")
    if array.dtype.metadata:
        walk.attributes(array.dtype.metadata)
    if isinstance(value, np.generic):
        see_own_kind(walk, value)
    elif type(value) not in (np.ndarray, np.memmap):
        see_class(walk, type(value))
        if isinstance(value, np.ma.MaskedArray):
            see_array(walk, np.ma.getmaskarray(value))
            walk.see((value.fill_value, value.hardmask))
            array = np.ma.getdata(value)
        walk.extras(value)
    see_numbers(walk, np.asarray(array), value)


def see_numbers(walk: Walk, array: np.ndarray[Any, Any], owner: Any) -> None:
    """Adds the numbers of an array, the owner's or a view of it."""
    if array.dtype.names is not None:
        # Field by field: what lies between them is anything.
        for name in array.dtype.names:
            walk.put("field", f"{name} {array.dtype.fields[name][0].str}")
            see_numbers(walk, np.asarray(array[name]), None)
    elif array.dtype.hasobject:
        for i, item in enumerate(array.reshape(-1).tolist()):
            walk.see_as(f"item {i}", item)
    elif array.nbytes < _LARGE:
        walk.out.update(_bytes(array))
    else:
        known = None if walk.kept is None or owner is None else walk.kept.get(id(owner))
        if known is None:
            known = owner, hashlib.blake2b(_bytes(array), digest_size=16).hexdigest()
            if walk.kept is not None and owner is not None:
                walk.kept[id(owner)] = known
        walk.put("large", known[1])


def see_tensor(walk: Walk, value: torch.Tensor) -> None:
    walk.put("tensor", f"{value.dtype} {tuple(value.shape)} {value.layout}")
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        see_class(walk, type(value))
    walk.extras(value)
    try:
        see_elements(walk, value)
    except UnseenError:
        raise
    except Exception as error:  # of a subclass that has its numbers elsewhere
        raise walk.unseen(f"{with_article(type(value).__name__)} whose numbers cannot be read ({error})") from error


def see_elements(walk: Walk, value: torch.Tensor) -> None:
    plain = value.detach()
    if plain.layout == torch.sparse_coo:
        plain = plain.coalesce()
        see_tensor(walk, plain.indices())
        see_tensor(walk, plain.values())
        return
    if plain.layout != torch.strided or plain.is_quantized or plain.device.type == "meta":
        raise walk.unseen(f"a tensor with layout {value.layout} on {value.device}")
    plain = plain.resolve_conj().resolve_neg().to("cpu").contiguous().reshape(-1)
    see_numbers(walk, plain.view(torch.uint8).numpy() if plain.numel() else np.empty(0, np.uint8), value)


def see_file(walk: Walk, value: PurePath) -> None:
    """A path stands for what is there; its name is none of it. Where nothing is, its last part stands for it."""
    path = os.path.expanduser(value)
    if not os.path.exists(path):
        walk.put("no file", value.name)
        return
    try:
        walk.put("file", content_digest(path))
    except OSError as error:
        raise walk.unseen(f"{str(value)!r}, which cannot be read ({error})") from error


def _bytes(array: np.ndarray[Any, Any]) -> Any:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""
