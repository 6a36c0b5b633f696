"""What others hand over, as arrays of real numbers: any container, dtype, byte order, strides and mask.

Needs numpy alone; a torch tensor is known for one where torch has been imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.errors import BridgeError, InputError, OutputError

# What the mathematics is written in. (Not in a file called types.py: run by its path, `bridge/__main__.py` would find
# it in place of the standard library's.)
Array = NDArray[np.float64]

# All of their values are float32 values; those of any other type are made float64.
_NARROW = frozenset(map(np.dtype, (np.bool_, np.int8, np.uint8, np.int16, np.uint16, np.float16, np.float32)))
_SHOWN = 60


def real_array(given: Any, source: str, error: type[BridgeError] = OutputError) -> NDArray[Any]:
    """An array of booleans, integers or floats of what is given; masked numbers become NaN.

    Args:
        source: where it comes from, in words: "from simulator 'f'", "as the target".
        error: what is raised.

    Raises:
        error: it is no array of real numbers; the message says what it is and what to give in its place.
    """
    if type(given) is np.ndarray and given.dtype.kind in "fiub":
        return given
    if is_tensor(given):
        given = _of_tensor(given, source, error)
    elif isinstance(given, list | tuple) and any(map(is_tensor, given)):
        given = [_of_tensor(x, source, error) if is_tensor(x) else x for x in given]
    elif isinstance(given, list | tuple) and any(isinstance(x, np.ma.MaskedArray) for x in given):
        given = _stacked(given, source, error)
    if isinstance(given, np.ma.MaskedArray):
        return _of_masked(given, source, error)
    if isinstance(given, Mapping | set | frozenset | str | bytes) or given is None:
        raise error(_message(given, source))
    try:
        array = np.asarray(given)
    except Exception as problem:  # __array__ is somebody else's code
        raise error(_message(given, source, problem)) from problem
    if array.dtype.kind not in "fiub":
        raise error(_message(given, source, array=array))
    return array


def unmasked_array(given: Any, source: str) -> NDArray[Any]:
    """As `real_array`, for a file that has no place for a mask: what lies under one is no number of the array."""
    array = real_array(given, source, InputError)
    if any(map(np.ma.is_masked, given if isinstance(given, list | tuple) else (given,))):
        raise InputError(
            f"Expected numbers {source}, got a masked array: the file has no mask. Fill it: "
            "np.ma.filled(array, array.mean())."
        )
    return array


def floating(array: NDArray[Any], narrow: type[np.floating[Any]] = np.float32) -> NDArray[Any]:
    """The same numbers in float64, or in `narrow` where float32 has all values of the dtype."""
    dtype = array.dtype.newbyteorder("=")
    if dtype == np.float32:
        return array.astype(dtype, copy=False)
    return array.astype(narrow if dtype in _NARROW else np.float64, copy=False)


def one_number(given: Any, source: str, error: type[BridgeError] = OutputError) -> float:
    """The number that is given, as a Python float: nothing that happens to its memory afterwards matters.

    Raises:
        error: it is not one real number.
    """
    array = real_array(given, source, error)
    if array.size != 1:
        raise error(f"Expected one number {source}, got shape {array.shape}. Reduce it with .mean() or .sum().")
    return float(array.reshape(()))


def is_number(given: Any) -> bool:
    """Whether it is one finite real number; a boolean and text are none."""
    if isinstance(given, bool | np.bool_):
        return False
    try:
        return bool(np.isfinite(one_number(given, "")))
    except BridgeError:
        return False


def is_tensor(given: Any) -> bool:
    """Whether it is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(given, torch.Tensor)


def _of_tensor(tensor: Any, source: str, error: type[BridgeError]) -> NDArray[Any]:
    """On any device, of any layout, with or without a graph behind it."""
    import torch

    if tensor.is_complex():
        raise error(_message(tensor, source))
    try:
        tensor = tensor.detach()
        tensor = tensor.dequantize() if tensor.is_quantized else tensor
        tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
        tensor = tensor.cpu().resolve_neg()
        if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
            tensor = tensor.to(torch.float32)  # bfloat16 and smaller, which numpy does not have
        return np.asarray(tensor.numpy())
    except (RuntimeError, TypeError, NotImplementedError) as problem:
        raise error(_message(tensor, source, problem)) from problem


def _stacked(parts: Any, source: str, error: type[BridgeError]) -> Any:
    """One masked array of a list of which some are: `np.asarray` would lose the masks."""
    try:
        return np.ma.stack([np.ma.asarray(part) for part in parts])
    except ValueError as problem:
        raise error(_message(parts, source, problem)) from problem


def _of_masked(given: Any, source: str, error: type[BridgeError]) -> NDArray[Any]:
    data, mask = real_array(np.asarray(given.data), source, error), np.ma.getmaskarray(given)
    if not mask.any():
        return data
    filled = floating(data).copy()
    filled[mask] = np.nan
    return filled


def _message(given: Any, source: str, problem: Exception | None = None, array: NDArray[Any] | None = None) -> str:
    """Expected, got, what to do."""
    what = "Give" if source.startswith("as ") else "Return"
    kind = type(given).__name__
    if given is None:
        got, advice = "None", f"{what} an array of numbers; a function without a return statement returns None."
    elif isinstance(given, Mapping):
        names = ", ".join(map(repr, list(given)[:4]))
        got, advice = f"a {kind} with the keys {names}", f"{what} its values as one array: np.array([...])."
    elif isinstance(given, str | bytes):
        got, advice = f"text, {_short(given)}", f"{what} the number itself: float(text)."
    elif array is not None and array.dtype.kind in "US":
        got, advice = f"text (dtype {array.dtype})", f"{what} numbers: array.astype(float)."
    elif (array is not None and array.dtype.kind == "c") or (is_tensor(given) and given.is_complex()):
        dtype = given.dtype if array is None else array.dtype
        got = f"complex numbers (dtype {dtype})"
        advice = f"{what} the real and imaginary parts: np.stack([y.real, y.imag])."
    elif array is not None and array.dtype.kind == "V":
        got, advice = f"records (dtype {array.dtype})", f"{what} the fields as one array: np.stack([y['a'], y['b']])."
    elif array is not None and array.dtype.kind in "mM":
        got, advice = f"times (dtype {array.dtype})", f"{what} them as numbers of a unit of yours."
    elif hasattr(given, "toarray"):
        got, advice = f"a sparse {kind}", f"{what} it as an array: y.toarray()."
    elif isinstance(problem, ValueError) and ("inhomogeneous" in str(problem) or "same shape" in str(problem)):
        got, advice = f"a {kind} of parts of different shapes", f"{what} one array, for example np.concatenate(parts)."
    elif problem is not None:
        got, advice = f"a {kind} that is no array ({problem})", f"{what} a numpy array."
    elif array is not None and array.ndim:
        first = type(array.flat[0]).__name__ if array.size else "nothing"
        got = f"an array of Python objects (dtype {array.dtype}; the first is of type {first})"
        advice = f"{what} numbers: np.array(..., dtype=float)."
    else:
        got, advice = f"a {kind}", f"{what} an array of numbers."
    return f"Expected real numbers {source}, got {got}. {advice}"


def _short(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
