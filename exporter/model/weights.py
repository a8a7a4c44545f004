"""A model's weights on the device that computes: some stay there, the others come when they are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from exporter.model.torch import as_tensor
from exporter.numerics.floats import F32

if TYPE_CHECKING:
    from torch import Tensor

# (tensor name, start, stop) -> float32 rows [start, stop) of the leading axis.
Read = Callable[[str, int, int], F32]
Key = tuple[str, int, int]

_SMALL = 1 << 28  # bytes that stay in the memory of a CPU: a small model whole, of a large one next to nothing


def room(device: str) -> int:
    """Bytes of weights to keep on a device: most of what a GPU has free, the rest is for keys, values and the work."""
    if not device.startswith("cuda"):
        return _SMALL
    import torch

    torch.cuda.empty_cache()  # what was given up counts as free
    free: int = torch.cuda.mem_get_info(torch.device(device))[0]
    return _share(free)


def holds(device: str, parameters: int) -> bool:
    """Whether a GPU can keep a model of so many parameters whole, in bfloat16: then a token costs no decoding."""
    if not device.startswith("cuda"):
        return False
    import torch

    total: int = torch.cuda.mem_get_info(torch.device(device))[1]
    return 2 * parameters <= _share(total)


def _share(nbytes: int) -> int:
    return nbytes * 6 // 10


class Weights:
    """float32 rows on the device; the first `keep` bytes of them stay, the rest are read each time.

    A pass over a model asks for the same weights in the same order, where dropping the least recent would drop each
    just before its use. What bfloat16 holds exactly (all of the release) is kept in it. What is `expect`ed is read
    ahead, up to `ahead` at once, in as many threads: decoding an expert of 20b takes one core 0.1 s.
    """

    def __init__(self, read: Read, device: str, keep: int = 0, ahead: int = 0) -> None:
        self.read, self.device, self._room, self._ahead = read, device, keep, ahead
        self._kept: dict[Key, Tensor] = {}
        self._expected: deque[Key] = deque()
        self._coming: dict[Key, Future[F32]] = {}
        self._pool = ThreadPoolExecutor(ahead) if ahead else None

    def expect(self, keys: Iterable[Key]) -> None:
        """These are asked for next, in this order. What was expected before and never came is forgotten."""
        if self._pool is None:
            return
        for future in self._coming.values():
            future.cancel()
        self._coming.clear()
        self._expected = deque(key for key in keys if key not in self._kept)
        self._fill()

    def _fill(self) -> None:
        assert self._pool is not None
        while self._expected and len(self._coming) < self._ahead:
            key = self._expected.popleft()
            self._coming[key] = self._pool.submit(self.read, *key)

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; raises as `read` does."""
        key = name, start, stop
        if key in self._kept:
            return self._kept[key].float()
        if key in self._coming:
            rows = self._coming.pop(key).result()
            self._fill()
        else:
            rows = self.read(*key)
        value = as_tensor(rows, self.device)
        if self._room >= 2 * value.numel():
            short = value.bfloat16()
            held = short if bool((short.float() == value).all()) else value
            if held.nbytes <= self._room:
                self._kept[key] = held
                self._room -= held.nbytes
        return value


def on_device(read: Read | Weights, device: str, keep: int = 0) -> Weights:
    """Weights as they are, or of a reader."""
    return read if isinstance(read, Weights) else Weights(read, device, keep)
