"""One process: it owns every leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.dispatch.base import Dispatcher
from bridge.dispatch.tree import TreeSum


@final
class SerialDispatcher(Dispatcher):
    """Everything in this process, without MPI."""

    @property
    def rank(self) -> int:
        return 0

    @property
    def size(self) -> int:
        return 1

    def begin(self, kind: str, signature: str) -> None:
        pass

    def claims(self, count: int, steal: Callable[[], bool]) -> Iterator[tuple[int, bool]]:
        for item in range(count):
            if self.stopping:
                return
            yield item, False

    def give_up(self) -> None:
        pass

    def agree(self, error: Exception | None) -> None:
        if error is not None:
            raise error

    def broadcast(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def broadcast_object(self, value: Any) -> Any:
        return value

    def finish(
        self, sums: Sequence[TreeSum], like: Sequence[torch.Tensor], owners: Sequence[NDArray[np.int64]]
    ) -> list[torch.Tensor]:
        return [tree.result() for tree in sums]

    def transfer(self, tensor: torch.Tensor, source: int, dest: int) -> torch.Tensor:
        return tensor

    def transpose(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def concatenate(self, columns: torch.Tensor) -> torch.Tensor:
        return columns

    def scatter_add(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values
