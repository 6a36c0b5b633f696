"""Sums of rows by weights: the one kernel that adds rows, as they come or afterwards."""

from __future__ import annotations

import numpy as np
import torch

from bridge.evaluation.rows import CHUNK

# Numbers of an output that are converted at once: what is made of 8 rows of them stays in a cache.
BLOCK = 1 << 14


def accumulate(total: torch.Tensor, weights: torch.Tensor, F: torch.Tensor, first: bool) -> None:
    """Adds weights (c, k) times F (k, m) to total (c, m), in pieces of fixed size; `first`: total is empty memory.

    Everything is added up in the dtype of the total and the weights, whatever that of F is. The value's row goes by
    itself: its bits are then the same whether or not derivatives are added up beside it, and kernels are made for
    multiples of four or eight rows.
    """
    for start in range(0, len(F), CHUNK):
        W, G = weights[:, start : start + CHUNK], F[start : start + CHUNK]
        if first and len(G) == 1:
            # An outer product, for which the matrix product is several times slower, as are two dtypes at once.
            torch.mul(W, total[:1].copy_(G) if len(total) == 1 else G.to(total.dtype), out=total)
        elif F.dtype == total.dtype:
            _add(total, W, G, first)
        else:
            wide = total.new_empty((len(G), BLOCK))
            for left in range(0, F.shape[1], BLOCK):
                part = G[:, left : left + BLOCK]
                _add(total[:, left : left + BLOCK], W, wide[:, : part.shape[1]].copy_(part), first)
        first = False


def accumulate_differences(
    total: torch.Tensor, weights: torch.Tensor, F: torch.Tensor, first: bool, in_place: bool
) -> None:
    """Adds weights (c, k) times F - r to total (c + 1, m), whose last row is r: the first row that came.

    What is added up is then as small as outputs differ, so that float32 is enough for it. At most `CHUNK` rows. All in
    one product, which takes half the time of two: of two rows of weights or more, each has the same bits whatever is
    beside it, in single precision.

    Args:
        in_place: whether F may be written to, which costs a tenth of new memory.
    """
    if first:
        total[-1].copy_(F[0])
        if len(F) == 1:
            total[:-1].zero_()
            return
    if not in_place:
        F = F - total[-1]
    elif F.device.type == "cpu":
        np.subtract(F.numpy(), total[-1].numpy(), out=F.numpy())  # in half of torch's time
    else:
        F.sub_(total[-1])
    _add_product(total[:-1], weights, F, first)


def _add(total: torch.Tensor, W: torch.Tensor, G: torch.Tensor, first: bool) -> None:
    """The value's row, and those of derivatives."""
    _add_product(total[:1], W[:1], G, first)
    if len(total) > 1:
        _add_product(total[1:], W[1:], G, first)


def _add_product(total: torch.Tensor, W: torch.Tensor, G: torch.Tensor, first: bool) -> None:
    if first:
        torch.mm(W, G, out=total)
    else:
        total.addmm_(W, G)
