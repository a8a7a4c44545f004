"""The experts that llama.cpp chooses: read from its graph as it is computed, by the scheduler's callback.

Source: `ggml_backend_sched_eval_callback` in ggml-backend.h, the head of `struct ggml_tensor` in ggml.h, and the name
"ffn_moe_topk" that build_moe_ffn in llama-graph.cpp gives the chosen ids, a view of all of them sorted.
"""

from __future__ import annotations

import ctypes as ct
from typing import Any

import numpy as np

from exporter.errors import ExporterError
from exporter.model.reference import U16

_NAME = b"ffn_moe_topk-"
_I32 = 26  # enum ggml_type

Callback = ct.CFUNCTYPE(ct.c_bool, ct.c_void_p, ct.c_bool, ct.c_void_p)


class _Tensor(ct.Structure):
    """The first fields of struct ggml_tensor."""

    _fields_ = (("type", ct.c_int32), ("buffer", ct.c_void_p), ("ne", ct.c_int64 * 4), ("nb", ct.c_size_t * 4))


class Routing:
    """Collects the experts of every token, layer by layer; `callback` goes into a context's cb_eval."""

    def __init__(self, library: Any) -> None:
        self._library = library
        library.ggml_get_name.restype, library.ggml_get_name.argtypes = ct.c_char_p, [ct.c_void_p]
        library.ggml_nbytes.restype, library.ggml_nbytes.argtypes = ct.c_size_t, [ct.c_void_p]
        get = library.ggml_backend_tensor_get
        get.restype, get.argtypes = None, [ct.c_void_p, ct.c_void_p, ct.c_size_t, ct.c_size_t]
        self.callback = Callback(self._see)
        self._found: dict[int, list[U16]] = {}
        self._problem = ""

    def _see(self, tensor: int, ask: bool, _data: Any) -> bool:
        name: bytes = self._library.ggml_get_name(tensor)
        if not name.startswith(_NAME):
            return not ask
        if not ask:
            try:
                self._take(tensor, int(name[len(_NAME) :]))
            except (ValueError, MemoryError) as error:  # an exception must not cross native frames
                self._problem = self._problem or str(error)
        return True

    def _take(self, tensor: int, layer: int) -> None:
        head = ct.cast(tensor, ct.POINTER(_Tensor)).contents
        count, tokens, stride = head.ne[0], head.ne[1], head.nb[1]
        if head.type != _I32 or head.nb[0] != 4 or not 0 < count <= 64:
            raise ValueError(f"{_NAME.decode()}{layer} is not a list of experts")
        raw = np.zeros(self._library.ggml_nbytes(tensor), np.uint8)
        self._library.ggml_backend_tensor_get(tensor, raw.ctypes.data, 0, raw.nbytes)
        rows = np.lib.stride_tricks.as_strided(raw.view(np.int32), (tokens, count), (stride, 4))
        self._found.setdefault(layer, []).append(np.sort(rows, axis=1).astype(np.uint16))

    def experts(self, tokens: int) -> U16:
        """uint16 [layers, tokens, top_k], each ascending. Raises ExporterError where the graph did not show them."""
        layers = [np.concatenate(self._found[i]) for i in sorted(self._found)]
        if self._problem or not layers or any(len(layer) != tokens for layer in layers):
            raise ExporterError(f"llama.cpp did not say which experts it chose ({self._problem or 'no such nodes'})")
        return np.stack(layers)
