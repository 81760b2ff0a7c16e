"""How much memory a step holds, counted tensor by tensor: to the byte, on any device, alike in every run."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside the block, counts the memory of every tensor that is made there and is still alive.

    Unlike the resident size of the process it does not depend on the allocator. What an operation needs besides its
    results, such as a convolution's workspace, is not in it.
    """

    def __init__(self, at_least: int = 0) -> None:
        """Storages smaller than `at_least` bytes are not counted."""
        super().__init__()
        self.now, self.peak = 0, 0
        self._at_least = at_least
        self._known: set[int] = set()

    def reset_peak(self) -> None:
        """From here on, `peak` is the largest value of `now`."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known_before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in known_before:
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if size < self._at_least or key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
