"""The reference: gpt-oss computed in float32, one layer's weights in memory at a time.

What an artifact's runtime is compared with. Logits of a whole text are V numbers a token (201088 for
gpt-oss), so only the k most likely tokens and the mass of the rest are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from exporter.errors import ExporterError
from exporter.model.config import ModelConfig
from exporter.model.layer import AsVariant, Layer, Observe, Routed, rms_norm
from exporter.model.tensors import parameter_count
from exporter.model.torch import as_tensor, import_torch
from exporter.model.weights import Read, Weights, on_device
from exporter.numerics.floats import F32
from exporter.types import leaves

if TYPE_CHECKING:
    from torch import Tensor

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U16 = npt.NDArray[np.uint16]

DEFAULT_TOP_K = 1024
_ROWS = 4096  # token rows that meet a slice of the head at once


@dataclass(frozen=True, eq=False)
class ReferenceLogits:
    """What the reference predicts at every position of a text; N = W * T, position n predicts n + 1.

    tokens          int64 [W, T]
    top_ids         int32 [N, k], most likely first
    top_logprobs    float32 [N, k], of those
    tail_logprob    float32 [N], log of the mass outside the top k; -inf where k is the vocabulary
    target_logprob  float32 [N], of the token that follows; NaN at the end of each window

    float32 rounds each to 1e-7 or so: normalise again in float64 before taking divergences.
    """

    tokens: I64
    top_ids: I32
    top_logprobs: F32
    tail_logprob: F32
    target_logprob: F32

    def save(self, path: Path) -> None:
        """Write an .npz; the file appears whole or not at all."""
        _save(path, {n: getattr(self, n) for n in self.__dataclass_fields__})

    @staticmethod
    def load(path: Path) -> ReferenceLogits:
        """Raises ExporterError when the file is not what `save` writes."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                fields = {name: arrays[name] for name in ReferenceLogits.__dataclass_fields__}
        except Exception as error:  # zipfile, numpy and OS raise a dozen kinds for a damaged file
            raise _damaged(path, str(error)) from error
        loaded = ReferenceLogits(**fields)
        if problem := loaded._problem():
            raise _damaged(path, problem)
        return loaded

    def first(self, windows: int) -> ReferenceLogits:
        """Those of the first windows."""
        n = windows * self.tokens.shape[1]
        others = {name: getattr(self, name)[:n] for name in self.__dataclass_fields__ if name != "tokens"}
        return ReferenceLogits(tokens=self.tokens[:windows], **others)

    def _problem(self) -> str | None:
        wanted = {
            "tokens": (np.int64, 2),
            "top_ids": (np.int32, 2),
            "top_logprobs": (np.float32, 2),
            "tail_logprob": (np.float32, 1),
            "target_logprob": (np.float32, 1),
        }
        for name, (dtype, axes) in wanted.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != axes:
                return f"{name} is {array.dtype} with {array.ndim} axes"
            if name != "tokens" and len(array) != self.tokens.size:
                return f"{name} has {len(array)} positions for {self.tokens.size} tokens"
        if self.top_ids.shape != self.top_logprobs.shape:
            return f"{self.top_ids.shape} ids for {self.top_logprobs.shape} probabilities"
        return None


class Routes:
    """The experts that the reference chooses for each token: `experts` uint16 [layers, N, top_k], ascending.

    Called by the layers as they route (`Routed`); of several rope variants only the first is kept.
    """

    def __init__(self, config: ModelConfig, positions: int) -> None:
        shape = (config.num_hidden_layers, positions, config.num_experts_per_tok)
        self.experts: U16 = np.zeros(shape, np.uint16)

    def __call__(self, layer: int, chosen: Tensor) -> None:
        self.experts[layer] = chosen[: self.experts.shape[1]].sort(dim=-1).values.cpu().numpy()

    def save(self, path: Path) -> None:
        """Write an .npz; the file appears whole or not at all."""
        _save(path, {"experts": self.experts})

    @staticmethod
    def load(path: Path) -> U16:
        """The experts of a saved record. Raises ExporterError when the file is not what `save` writes."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                experts: U16 = arrays["experts"]
        except Exception as error:  # as in ReferenceLogits.load
            raise _damaged(path, str(error)) from error
        if experts.dtype != np.uint16 or experts.ndim != 3:
            raise _damaged(path, f"experts is {experts.dtype} with {experts.ndim} axes")
        return experts


def _save(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _damaged(path: Path, problem: str) -> ExporterError:
    return ExporterError(f"{path}: reference logits cannot be read ({problem})", hint=f"rm {path}")


class _Progress:
    """Counts parameters done, out of all of the model's."""

    def __init__(self, total: int, report: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.report = 0, total, report

    def add(self, parameters: int) -> None:
        self.done += parameters
        if self.report:
            self.report(self.done, self.total)


def reference_logits(
    config: ModelConfig,
    read: Read | Weights,
    tokens: I64,
    ropes: Sequence[AsVariant],
    *,
    top_k: int = DEFAULT_TOP_K,
    device: str = "cpu",
    routed: Routed | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[ReferenceLogits]:
    """The reference's predictions for tokens int64 [W, T], one result for each of `ropes`.

    `read(name, start, stop)` gives float32 rows of a canonical tensor (model/tensors.py), or Weights do. The
    variants share every decoded weight. `routed` hears of the experts that each layer chooses;
    `on_progress(done, total)` counts parameters.

    Memory: two copies of the hidden states [R, W, T, H], one expert, one slice of the head, and the
    kept predictions (8 bytes * k a position). Raises ExporterError when a result is not finite.
    """
    torch = import_torch()
    progress = _Progress(parameter_count(config), on_progress)
    weights = on_device(read, device)
    with torch.inference_mode():
        x = embed(config, weights.read, tokens, device)
        progress.add(config.vocab_size * config.hidden_size)
        x = x.expand(len(ropes), *x.shape).contiguous()  # [R, W, T, H]
        run_layers(config, weights, x, ropes, device, routed=routed, progress=progress.add)
        norm = weights("model.norm.weight", 0, config.hidden_size)
        rows = rms_norm(x, norm, config.rms_norm_eps).view(-1, config.hidden_size)  # [R * W * T, H]
        head = _Head(config, rows, np.tile(following(tokens), len(ropes)), top_k)
        parts = leaves((config.vocab_size, config.hidden_size))
        weights.expect(("lm_head.weight", *part) for part in parts)
        for start, stop in parts:
            head.add(weights("lm_head.weight", start, stop), start)
            progress.add((stop - start) * config.hidden_size)
    progress.add(progress.total - progress.done)
    return head.results(tokens, len(ropes))


def embed(config: ModelConfig, read: Read, tokens: I64, device: str) -> Tensor:
    """Embeddings [W, T, H] of tokens [W, T]; reads only the leaves that the tokens touch."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ExporterError(
            f"token {wrong} is outside the vocabulary of {config.vocab_size}",
            hint="use the tokenizer.json of this checkpoint",
        )
    out = np.empty((*tokens.shape, config.hidden_size), np.float32)
    for start, stop in leaves((config.vocab_size, config.hidden_size)):
        here = (tokens >= start) & (tokens < stop)
        if here.any():
            out[here] = read("model.embed_tokens.weight", start, stop)[tokens[here] - start]
    return as_tensor(out, device)


def run_layers(
    config: ModelConfig,
    read: Read | Weights,
    x: Tensor,
    ropes: Sequence[AsVariant],
    device: str,
    *,
    observe: Observe | None = None,
    routed: Routed | None = None,
    progress: Callable[[int], None] = lambda parameters: None,
) -> None:
    """Change x [R, W, T, H] from embeddings into the last layer's output, in place."""
    torch = import_torch()
    expert = 3 * config.intermediate_size * config.hidden_size
    q_and_o = 2 * config.num_attention_heads * config.head_dim * config.hidden_size
    k_and_v = 2 * config.num_key_value_heads * config.head_dim * config.hidden_size
    for index in range(config.num_hidden_layers):
        layer = Layer(config, index, read, device, observe, routed)
        layer.forward(x, ropes, lambda part: progress(q_and_o + k_and_v if part < 0 else expert))
        if not bool(torch.isfinite(x).all()):
            raise ExporterError(
                f"the reference forward is not finite after layer {index}",
                hint="exporter doctor CHECKPOINT finds damaged tensors",
            )


def following(tokens: I64) -> I64:
    """The token that follows each position, -1 at the end of a window; int64 [W * T]."""
    out = np.full_like(tokens, -1)
    out[:, :-1] = tokens[:, 1:]
    return out.reshape(-1)


class _Head:
    """The vocabulary met slice by slice: running top k, and the log of the mass outside it."""

    def __init__(self, config: ModelConfig, rows: Tensor, targets: I64, top_k: int) -> None:
        torch = import_torch()
        self.rows, self.vocab = rows, config.vocab_size
        self.k = min(top_k, config.vocab_size)
        n, device = len(rows), rows.device
        self.targets = torch.from_numpy(targets).to(device)
        self.values = torch.empty((n, self.k), device=device)
        self.ids = torch.empty((n, self.k), dtype=torch.int32, device=device)
        self.filled = 0
        self.tail = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
        self.target = torch.full((n,), torch.nan, dtype=torch.float64, device=device)

    def add(self, weight: Tensor, start: int) -> None:
        """Meet weight [n, H], the head's rows from `start`."""
        torch = import_torch()
        filled = min(self.k, self.filled + len(weight))
        new_ids = torch.arange(start, start + len(weight), dtype=torch.int32, device=weight.device)
        for at in range(0, len(self.rows), _ROWS):
            part = slice(at, at + _ROWS)
            logits = self.rows[part] @ weight.T  # [rows, n]
            target = self.targets[part] - start
            inside = ((target >= 0) & (target < len(weight))).nonzero()[:, 0]
            self.target[part][inside] = logits[inside, target[inside]].double()
            values = torch.cat((self.values[part, : self.filled], logits), dim=1)
            ids = torch.cat((self.ids[part, : self.filled], new_ids.expand(len(logits), -1)), dim=1)
            if values.shape[1] > self.k:
                top = torch.topk(values, self.k, dim=1, sorted=False)
                # All mass less the kept mass would cancel where the tail is small: sum what is left.
                rest = values.scatter(1, top.indices, -torch.inf).double().logsumexp(dim=1)
                self.tail[part] = torch.logaddexp(self.tail[part], rest)
                values, ids = top.values, ids.gather(1, top.indices)
            self.values[part, :filled], self.ids[part, :filled] = values, ids
        self.filled = filled

    def results(self, tokens: I64, variants: int) -> list[ReferenceLogits]:
        n = tokens.size
        return [self._result(tokens, slice(r * n, (r + 1) * n)) for r in range(variants)]

    def _result(self, tokens: I64, part: slice) -> ReferenceLogits:
        torch = import_torch()
        values, order = self.values[part].sort(dim=1, descending=True)
        tail = self.tail[part]
        total = torch.logaddexp(torch.logsumexp(values.double(), dim=1), tail)  # [W * T]
        if not bool(torch.isfinite(total).all()):
            raise ExporterError(
                "the reference's logits are not finite", hint="exporter doctor CHECKPOINT finds damaged tensors"
            )
        return ReferenceLogits(
            tokens=tokens,
            top_ids=self.ids[part].gather(1, order).cpu().numpy(),
            top_logprobs=(values - total[:, None]).float().cpu().numpy(),
            tail_logprob=(tail - total).float().cpu().numpy(),
            target_logprob=(self.target[part] - total).float().cpu().numpy(),
        )
