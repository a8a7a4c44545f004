"""llama.cpp through its C API, which xllamacpp's extension module exports.

xllamacpp's own Python API gives no logits. The structs below are those of llama.h in one exact
release and are passed by value, so another layout would corrupt memory silently: the version is
pinned and every default is compared before anything runs.
"""

from __future__ import annotations

import ctypes as ct
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from exporter.errors import ExporterError, MissingExtra
from exporter.model.config import RopeConfig
from exporter.numerics.floats import F32

if TYPE_CHECKING:
    from exporter.validate.llama_routes import Routing

VERSION = "2026.10.11549"

KvType = Literal["f32", "f16"]
FlashAttention = Literal["auto", "on", "off"]
_KV_TYPES: dict[str, int] = {"f32": 0, "f16": 1}  # enum ggml_type
_FLASH: dict[str, int] = {"auto": -1, "off": 0, "on": 1}  # enum llama_flash_attn_type
_WARN, _ERROR, _CONTINUE = 3, 4, 5  # enum ggml_log_level

_i32, _u32, _f32, _bool, _ptr, _size = ct.c_int32, ct.c_uint32, ct.c_float, ct.c_bool, ct.c_void_p, ct.c_size_t
_Log = ct.CFUNCTYPE(None, _i32, ct.c_char_p, _ptr)


class ModelParams(ct.Structure):
    """struct llama_model_params"""

    _fields_ = (
        ("devices", _ptr),
        ("tensor_buft_overrides", _ptr),
        ("n_gpu_layers", _i32),
        ("split_mode", _i32),
        ("load_mode", _i32),
        ("lazy_mode", _i32),
        ("main_gpu", _i32),
        ("tensor_split", _ptr),
        ("progress_callback", _ptr),
        ("progress_callback_user_data", _ptr),
        ("kv_overrides", _ptr),
        ("vocab_only", _bool),
        ("check_tensors", _bool),
        ("use_extra_bufts", _bool),
        ("no_host", _bool),
        ("no_alloc", _bool),
        ("load_mtp", _bool),
    )


class ContextParams(ct.Structure):
    """struct llama_context_params"""

    _fields_ = (
        ("n_ctx", _u32),
        ("n_batch", _u32),
        ("n_ubatch", _u32),
        ("n_seq_max", _u32),
        ("n_rs_seq", _u32),
        ("n_outputs_max", _u32),
        ("n_outputs_max_per_seq", _u32),
        ("n_threads", _i32),
        ("n_threads_batch", _i32),
        ("ctx_type", _i32),
        ("rope_scaling_type", _i32),
        ("pooling_type", _i32),
        ("attention_type", _i32),
        ("flash_attn_type", _i32),
        ("rope_freq_base", _f32),
        ("rope_freq_scale", _f32),
        ("yarn_ext_factor", _f32),
        ("yarn_attn_factor", _f32),
        ("yarn_beta_fast", _f32),
        ("yarn_beta_slow", _f32),
        ("yarn_orig_ctx", _u32),
        ("defrag_thold", _f32),
        ("cb_eval", _ptr),
        ("cb_eval_user_data", _ptr),
        ("type_k", _i32),
        ("type_v", _i32),
        ("moe_cache_size", _size),
        ("abort_callback", _ptr),
        ("abort_callback_data", _ptr),
        ("embeddings", _bool),
        ("offload_kqv", _bool),
        ("no_perf", _bool),
        ("op_offload", _bool),
        ("swa_full", _bool),
        ("kv_unified", _bool),
        ("samplers", _ptr),
        ("n_samplers", _size),
        ("ctx_other", _ptr),
    )


class Batch(ct.Structure):
    """struct llama_batch"""

    _fields_ = (
        ("n_tokens", _i32),
        ("token", ct.POINTER(_i32)),
        ("embd", _ptr),
        ("pos", ct.POINTER(_i32)),
        ("n_seq_id", ct.POINTER(_i32)),
        ("seq_id", ct.POINTER(ct.POINTER(_i32))),
        ("logits", ct.POINTER(ct.c_int8)),
    )


# What llama_*_default_params return in VERSION; fields not named here are zero.
MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0,
    "type_k": 1,
    "type_v": 1,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
}

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_version": (ct.c_char_p, []),
    "llama_print_system_info": (ct.c_char_p, []),
    "llama_log_set": (None, [_Log, _ptr]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (_ptr, [ct.c_char_p, ModelParams]),
    "llama_model_free": (None, [_ptr]),
    "llama_model_get_vocab": (_ptr, [_ptr]),
    "llama_vocab_n_tokens": (_i32, [_ptr]),
    "llama_tokenize": (_i32, [_ptr, ct.c_char_p, _i32, ct.POINTER(_i32), _i32, _bool, _bool]),
    "llama_token_to_piece": (_i32, [_ptr, _i32, ct.c_char_p, _i32, _i32, _bool]),
    "llama_init_from_model": (_ptr, [_ptr, ContextParams]),
    "llama_free": (None, [_ptr]),
    "llama_get_memory": (_ptr, [_ptr]),
    "llama_memory_clear": (None, [_ptr, _bool]),
    "llama_batch_init": (Batch, [_i32, _i32, _i32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (_i32, [_ptr, Batch]),
    "llama_get_logits": (ct.POINTER(_f32), [_ptr]),
    "llama_synchronize": (None, [_ptr]),
}


def runtime_rope(rope: RopeConfig) -> RopeConfig:
    """`rope` as llama.cpp computes it: the YaRN range is always rounded outward, whatever the file says.

    Source: ggml_rope_yarn_corr_dims in ggml.c. GGUF has no key that would change it.
    """
    return dataclasses.replace(rope, truncate=True)


def wrong_defaults(found: ct.Structure, expected: dict[str, Any]) -> list[str]:
    """Fields of a default struct that are not what VERSION returns: "n_batch 0, not 2048"."""
    wrong = []
    for field in found._fields_:
        value, wanted = getattr(found, field[0]), expected.get(field[0], 0)
        if (value or 0) != wanted:
            wrong.append(f"{field[0]} {value}, not {wanted}")
    return wrong


def load_library() -> Any:
    """The shared object with its functions declared. Raises MissingExtra, or ExporterError for another version."""
    from importlib import metadata, util

    try:
        version = metadata.version("xllamacpp")
        spec = util.find_spec("xllamacpp")
    except metadata.PackageNotFoundError as missing:
        raise MissingExtra("xllamacpp", "validate", "running a GGUF in llama.cpp") from missing
    cure = f"pip install xllamacpp=={VERSION}"
    if version != VERSION:
        raise ExporterError(f"xllamacpp {version} is installed; exporter knows the structs of {VERSION}", hint=cure)
    folder = Path(((spec and spec.submodule_search_locations) or [""])[0])
    files = [p for p in folder.glob("xllamacpp*") if p.suffix in (".so", ".pyd", ".dylib")]
    if len(files) != 1:
        raise ExporterError(f"xllamacpp {version} has no shared object in {folder}", hint=f"{cure} --force-reinstall")
    # Lazy binding: the object refers to Python symbols that only a real import needs.
    library: Any = ct.CDLL(str(files[0]), mode=getattr(os, "RTLD_LAZY", 0))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    wrong = wrong_defaults(library.llama_model_default_params(), MODEL_DEFAULTS)
    wrong += wrong_defaults(library.llama_context_default_params(), CONTEXT_DEFAULTS)
    if wrong:
        raise ExporterError(
            f"xllamacpp {version} has other structs than expected ({'; '.join(wrong[:3])})",
            hint=f"{cure} --force-reinstall",
        )
    return library


class Model:
    """A GGUF loaded by llama.cpp; `with` frees it. Warnings and errors go to stderr and `self.log`."""

    def __init__(self, path: Path, gpu_layers: int = 0) -> None:
        self.log: list[str] = []
        self.library = load_library()
        self._callback = _Log(self._logged)  # kept: the library holds only a pointer
        self._last_level = 0
        self.library.llama_log_set(self._callback, None)
        self.library.llama_backend_init()
        params = self.library.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        self.handle = self.library.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            reason = next((line for line in self.log if line), "no reason given")
            raise ExporterError(
                f"llama.cpp cannot load {path}: {reason}", hint="make the file again, or check its hash"
            )
        self.vocabulary = self.library.llama_model_get_vocab(self.handle)
        self.vocab_size = int(self.library.llama_vocab_n_tokens(self.vocabulary))

    def _logged(self, level: int, text: bytes, _data: Any) -> None:
        level = self._last_level if level == _CONTINUE else level
        self._last_level = level
        if level in (_WARN, _ERROR):
            message = text.decode("utf-8", "replace")
            print(message, end="", file=sys.stderr, flush=True)
            if level == _ERROR:
                self.log.append(message.strip())

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.library.llama_model_free(self.handle)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it are recognised, none are added."""
        data = text.encode()
        buffer = (_i32 * (len(data) + 1))()  # no token is shorter than a byte
        n = self.library.llama_tokenize(self.vocabulary, data, len(data), buffer, len(buffer), False, True)
        if n < 0:
            raise ExporterError(f"llama.cpp cannot tokenize {text[:40]!r} (code {n})")
        return list(buffer[:n])

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones written out; bytes that are not UTF-8 replaced."""
        out = b""
        for token in tokens:
            buffer = ct.create_string_buffer(256)
            n = self.library.llama_token_to_piece(self.vocabulary, token, buffer, len(buffer), 0, True)
            if n < 0:  # a longer piece: -n bytes
                buffer = ct.create_string_buffer(-n)
                n = self.library.llama_token_to_piece(self.vocabulary, token, buffer, len(buffer), 0, True)
            out += buffer.raw[: max(n, 0)]
        return out.decode("utf-8", "replace")


class Context:
    """One sequence of at most `length` tokens; `batch` is the most that one `decode` takes."""

    def __init__(
        self,
        model: Model,
        length: int,
        batch: int,
        threads: int,
        *,
        flash_attention: FlashAttention = "auto",
        kv_type: KvType = "f16",
        outputs: int = 0,
        routing: Routing | None = None,
    ) -> None:
        self.model, self.library, self.batch_size = model, model.library, batch
        params = self.library.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = length, batch, batch
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = _FLASH[flash_attention]
        params.type_k = params.type_v = _KV_TYPES[kv_type]
        params.n_outputs_max = outputs
        if routing is not None:
            params.cb_eval = ct.cast(routing.callback, _ptr)
        params.swa_full = False  # sliding layers keep their window only, as llama-server does
        self.handle = self.library.llama_init_from_model(model.handle, params)
        if not self.handle:
            reason = model.log[-1] if model.log else "no reason given"
            raise ExporterError(f"llama.cpp cannot make a context of {length} tokens: {reason}")
        self.batch = self.library.llama_batch_init(batch, 0, 1)
        self.position = 0

    def __enter__(self) -> Context:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.library.llama_batch_free(self.batch)
        self.library.llama_free(self.handle)

    def clear(self) -> None:
        """Forget the sequence."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.handle), True)
        self.position = 0

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.int64], *, all_logits: bool) -> F32:
        """Append tokens; logits float32 [n, V] of all of them, or [1, V] of the last.

        The array is the library's own memory: good until the next call.
        """
        n = len(tokens)
        for i, token in enumerate(tokens):
            self.batch.token[i] = int(token)
            self.batch.pos[i] = self.position + i
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = 0
            self.batch.logits[i] = int(all_logits or i == n - 1)
        self.batch.n_tokens = n
        code = self.library.llama_decode(self.handle, self.batch)
        if code != 0:
            raise ExporterError(f"llama.cpp failed to decode {n} tokens at position {self.position} (code {code})")
        self.position += n
        logits = self.library.llama_get_logits(self.handle)
        return np.ctypeslib.as_array(logits, shape=(n if all_logits else 1, self.model.vocab_size))

    def prefill(self, tokens: Sequence[int] | npt.NDArray[np.int64]) -> F32:
        """Append any number of tokens, batch by batch; logits [1, V] of the last."""
        for at in range(0, len(tokens), self.batch_size):
            logits = self.decode(tokens[at : at + self.batch_size], all_logits=False)
        return logits
