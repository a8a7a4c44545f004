"""A report with every key of schema 2, and the ways in which one can be odd."""

from __future__ import annotations

import copy
import math
import random
import statistics
from typing import Any

TENSOR = "model.layers.7.mlp.experts.gate_up_proj"


def figure(kl: float, positions: int = 4096, flips: int = 61) -> dict[str, Any]:
    """The figures of one column, channel or depth."""
    return {
        "positions": positions,
        "kl_mean": kl,
        "kl_ci95": [kl * 0.86, kl * 1.15],
        "kl_median": kl * 0.21,
        "kl_p99": kl * 11,
        "kl_p999": kl * 38,
        "kl_max": kl * 117,
        "top1": 0.9812,
        "flips": flips / positions,
        "flips_to_wrong": flips - 27,
        "flips_to_right": 27,
        "flips_p": 0.4426,
        "ppl": 3.4172,
        "ppl_reference": 3.4093,
        "ppl_ratio": 1.00232,
        "delta_p_rms": 0.0118,
    }


def curve(kl: float) -> list[list[float]]:
    """KL by quantile, about as a log-normal has it."""
    quantiles = [*(n / 100 for n in range(100)), 0.999, 1.0]
    normal = statistics.NormalDist()
    return [[q, kl * 0.21 * math.exp(1.7 * normal.inv_cdf(min(max(q, 0.003), 0.9998)))] for q in quantiles]


def by_position(kl: float, tokens: int) -> list[list[float]]:
    step = max(1, tokens // 64)
    noise = random.Random(tokens)
    return [[p, kl * (1 + 0.9 / (1 + p / 90)) * noise.lognormvariate(0, 0.25)] for p in range(0, tokens, step)]


def column(kl: float, source: str, tokens: int, **parts: Any) -> dict[str, Any]:
    return {
        "source": source,
        "tokens": tokens,
        "all": figure(kl, tokens),
        "curve": curve(kl),
        "by_position": by_position(kl, tokens),
        **parts,
    }


def gate(name: str, value: float | bool | None, limit: float | bool, passed: bool = True) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "passed": passed}


def full() -> dict[str, Any]:
    """Everything measured, everything passed."""
    return {
        "schema": 2,
        "subject": _subject(),
        "against": {
            "name": "gpt-oss-20b",
            "repo": "openai/gpt-oss-20b",
            "revision": "6cee5e81ee83917806bbde320786a8fb61efebee",
            "top_k": 256,
            "tail_mass": 0.0019,
            "device": "cpu",
            "precision": "float32",
        },
        "made": {
            "exporter": "0.1.0",
            "date": "2026-11-26T10:31:07+00:00",
            "python": "3.11.9",
            "platform": "Linux-6.8-x86_64",
        },
        "accuracy": _accuracy(),
        "floor": {"kl_mean": 0.00011, "what": "the reference in bfloat16 against itself in float32"},
        "twins": _twins(),
        "generation": {
            "prompts": 24,
            "tokens": 256,
            "agreement": 0.8731,
            "same": 0.625,
            "length": 171.4,
            "length_reference": 169.9,
            "length_ratio": 1.0088,
            "ended": 0.7917,
            "ended_reference": 0.8333,
        },
        "router": {"choices": 98304, "flips": 1180, "share": 0.012},
        "weights": _weights(),
        "controls": _controls(),
        "tasks": _tasks(),
        "gates": _gates(),
        "status": "passed",
        **_machine(),
        "text": {
            "source": "standard library of Python 3.11, held-out files",
            "sha256": "1161f100439f7a0c07ad0724d16503932890da88dfb445520a84b3e0131ea082",
            "tokens": 2048,
            "windows": [4, 512],
        },
        "profile": {"name": "16gb", "sha256": "4756a3b1bd773f818f115a0644cfd404f13e875973d5f125d49678ebb5f6007f"},
        "digests": {"tensors": 459, "equal": 459, "different": []},
        "digests_equal": True,
        "head_equal": True,
        "tokenizer_equal": True,
        "tokenizer": {"pieces": 41, "ids": 15258, "first_difference": None},
        "not_run": {"gpu": "no engine was executed: there is no NVIDIA GPU here"},
    }


def failed() -> dict[str, Any]:
    """As `full`, with a broken window: some gates fail, a control is missed, it is nearer to a twin."""
    report = full()
    report["status"] = "gate failed"
    worse = {"release_kl_mean": 0.31, "release_top1": 0.7421, "tokenizer_equal": False, "long_kl_mean": None}
    for each in report["gates"]:
        if each["name"] in worse:
            each |= {"value": worse[each["name"]], "passed": False}
    report["accuracy"]["conversations"]["all"] = figure(0.31)
    report["tokenizer_equal"] = False
    report["tokenizer"]["first_difference"] = {"text": "caf\u00e9", "at": 1, "expected": [1, 2], "found": [3]}
    report["twins"] |= {"nearest": "window of 127", "passed": False}
    report["twins"]["each"][0] |= {"kl_mean": 0.0004, "nearer_by": -0.3, "share": 0.08, "ci95": [0.06, 0.1]}
    report["config_differs"] = ["sliding_window 127, not 128"]
    report["weights"] |= {
        "sound": False,
        "problems": [f"{TENSOR}: 1 block of 16,384 is 412% off, more than MXFP4 can be"],
    }
    report["controls"][0]["caught"] = False
    return report


def first_schema() -> dict[str, Any]:
    """As reports were before: no `schema`, no `subject`, one text."""
    full_report = full()
    kept = ("digests", "digests_equal", "head_equal", "predicted_memory", "text", "profile", "tokenizer_equal")
    kept += ("tokenizer", "gates", "status", "memory", "runtime", "not_run")
    plain = figure(0.00251, 2048)
    for key in [key for key in plain if key.startswith("flips")]:
        del plain[key]
    speed = {"load_seconds": 0.047, "prefill_tokens_per_second": 5605.9, "decode_tokens_per_second": 681.9}
    speed |= {"prefill_length": 512, "decode_length": 32, "context": 512, "greedy_text": "u Hye-Shik Chang <perky@"}
    router = {"choices": 640, "release": {"flips": 11, "share": 0.0172}, "export": {"flips": 10, "share": 0.0156}}
    more = {"release": plain, "export": plain, "runtime_difference": plain, "speed": speed, "router": router}
    return {key: full_report[key] for key in kept} | more


def small(name: str, nbytes: int, kl: float, **more: Any) -> dict[str, Any]:
    """A report to lay beside others: its size, its KL and its speed."""
    report = full()
    report["subject"] |= {
        "name": name,
        "recipe": "",
        "files": [],
        "bytes": nbytes,
        "bits_per_weight": nbytes * 8 / 20_914_757_184,
    }
    for key in ("conversations", "plain", "long"):
        report["accuracy"][key]["all"] |= {"kl_mean": kl, "kl_ci95": [kl * 0.9, kl * 1.1]}
    return report | more


def without(report: dict[str, Any], path: str) -> dict[str, Any]:
    """A copy without the value at a dotted path."""
    report = copy.deepcopy(report)
    *keys, last = path.split(".")
    where = report
    for key in keys:
        where = where[key]
    del where[last]
    return report


def _subject() -> dict[str, Any]:
    return {
        "name": "gpt-oss-20b",
        "format": "gguf",
        "recipe": "mxfp4-q8",
        "target": "",
        "bytes": 12_110_000_000,
        "files": [{"name": "gpt-oss-20b-mxfp4-q8.gguf", "bytes": 12_110_000_000, "sha256": "ab" * 32}],
        "tool": "exporter 0.1.0",
        "class": "near",
        "bits_per_weight": 4.63,
    }


def _accuracy() -> dict[str, Any]:
    channels = {
        "analysis": figure(0.0031, 2810, 44),
        "final": figure(0.0019, 933, 31),
        "tool call": figure(0.0044, 201, 28),
        "header": figure(0.0002, 152, 27),
    }
    near, past = "within the window", "past the window"
    return {
        "conversations": column(
            0.0025, "24 built-in conversations, the reference's own answers", 4096, channels=channels
        ),
        "plain": column(
            0.0041,
            "standard library of Python 3.11, held-out files",
            2048,
            depths={near: figure(0.0052, 512), past: figure(0.0037, 1536)},
        ),
        "long": column(
            0.0047,
            "standard library of Python 3.11, one file after another",
            8192,
            as_runtime=figure(0.0021, 8192),
            depths={near: figure(0.0052, 128), past: figure(0.0044, 3968), "past 4,096": figure(0.0049, 4096)},
        ),
    }


def _twins() -> dict[str, Any]:
    names = {"window of 127": (0.0412, 0.71), "window of 129": (0.0391, 0.69), "no sinks": (0.84, 0.998)}
    names |= {"gate and up swapped": (6.1, 1.0), "YaRN range rounded": (0.0068, 0.62)}
    each = [
        {
            "name": name,
            "kl_mean": kl,
            "nearer_by": kl - 0.0041,
            "share": share,
            "ci95": [share - 0.04, min(share + 0.04, 1)],
        }
        for name, (kl, share) in names.items()
    ]
    return {"nearest": "as released", "passed": True, "each": each}


def _weights() -> dict[str, Any]:
    def group(name: str, stored: dict[str, int], exact: int, error: float) -> dict[str, Any]:
        tensors = sum(stored.values())
        return {"group": name, "stored": stored, "exact": exact, "tensors": tensors, "relative_error": error}

    def worst(name: str, error: float) -> dict[str, Any]:
        return {"name": name, "stored": "Q8_0", "relative_error": error, "worst_block": 2 * error, "equal": 0.0046}

    return {
        "tensors": 459,
        "exact": 361,
        "compared": 20_914_757_184,
        "equal": 0.9271,
        "worst": [
            worst("model.layers.3.self_attn.k_proj.weight", 0.0051),
            worst("lm_head.weight", 0.0047),
        ],
        "groups": [
            group("experts", {"MXFP4": 72}, 72, 0.0),
            group("attention", {"Q8_0": 96}, 0, 0.0051),
            group("embedding", {"Q8_0": 1}, 0, 0.0046),
            group("head", {"Q8_0": 1}, 0, 0.0047),
            group("router", {"F32": 48}, 48, 0.0),
            group("norms, sinks, biases", {"F32": 241}, 241, 0.0),
        ],
        "kept_exact": True,
        "problems": [],
        "sound": True,
    }


def _controls() -> list[dict[str, Any]]:
    what = {
        "gate and up swapped": 6.1,
        "window of 127": 0.0412,
        "sinks dropped": 0.84,
        "scales moved by one block": 9.3,
        "low and high nibble swapped": 7.7,
    }
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "what": name,
            "applies": True,
            "caught": True,
            "gates_failed": ["release_kl_mean"],
            "kl_mean": kl,
        }
        for name, kl in what.items()
    ]
    found.append(
        {"name": "zero point off by one", "what": "", "applies": False, "why_not": "no integers with zero points"}
    )
    return found


def _tasks() -> list[dict[str, Any]]:
    return [
        {
            "task": "GPQA Diamond",
            "harness": "gpt_oss.evals",
            "score": 0.561,
            "n": 198,
            "stderr": 0.035,
            "published": 0.568,
            "published_effort": "low",
            "detects": 0.125,
            "verdict": "no difference that this run could show",
        }
    ]


def _gates() -> list[dict[str, Any]]:
    return [
        gate("digests_equal", True, True),
        gate("head_equal", True, True),
        gate("tokenizer_equal", True, True),
        gate("export_kl_mean", 0.00126, 0.005),
        gate("release_kl_mean", 0.0025, 0.01),
        gate("release_kl_p99", 0.045, 0.15),
        gate("release_top1", 0.9812, 0.97),
        gate("long_kl_mean", 0.0049, 0.02),
        gate("router_flips", 0.012, 0.1),
        gate("ppl_ratio", 1.00232, 1.02),
        gate("cached_difference", 0.00001335, 0.01),
    ]


def _machine() -> dict[str, Any]:
    def test(name: str, mean: float, tokens: int, depth: int = 0) -> dict[str, Any]:
        runs = [mean * 0.93, mean * 0.99, mean * 1.01, mean * 1.02, mean * 1.05]
        kind = "prompt" if name.startswith("pp") else "generate"
        spread = {"mean": mean, "sd": mean * 0.04, "median": runs[2], "low": runs[0], "high": runs[-1], "runs": runs}
        return {"test": name, "kind": kind, "tokens": tokens, "depth": depth, **spread}

    tests = [test("pp512", 143.2, 512), test("pp2048", 131.8, 2048), test("tg64", 17.4, 64)]
    return {
        "speed": {
            "load_seconds": 3.91,
            "ttft_seconds": 3.62,
            "prefill_tokens_per_second": 143.2,
            "decode_tokens_per_second": 17.4,
            "context": 8256,
            "tests": [*tests, test("tg64 @ d8192", 13.9, 64, 8192)],
            "not_run": {"tg64 @ d32768": "would take 310 s, more than was left"},
        },
        "predicted_memory": {
            "context": 32768,
            "weights": 12_100_000_000,
            "kv_full": 805_306_368,
            "kv_sliding": 3_145_728,
            "logits": 102_957_056,
            "scratch": 310_000_000,
            "runtime": 536_870_912,
            "usable": 16_267_188_634,
            "total": 13_858_280_064,
        },
        "memory": {
            "peak_rss_bytes": 13_020_000_000,
            "anonymous_bytes": 912_000_000,
            "file_bytes": 12_108_000_000,
            "limit_bytes": 15_900_000_000,
            "limit_by": "cgroup",
            "limit_peak_bytes": 13_400_000_000,
            "limit_read_again_bytes": 0,
        },
        "runtime": {"name": "llama.cpp", "version": "0.6.0", "threads": 8, "executed_on_target": True},
        "hardware": {
            "cpu": "AMD EPYC 9354",
            "cores": 16,
            "memory_bytes": 67_400_000_000,
            "system": "Linux 6.8",
            "python": "3.11.9",
            "gpus": [],
            "load_average": 0.42,
            "versions": {"xllamacpp": "2026.10.11549", "numpy": "2.4.6", "torch": "2.9.0"},
        },
        "target": {
            "profile": "16gb",
            "device": "a 16 GB GPU",
            "memory_bytes": 17_072_495_001,
            "on_target": False,
            "statement": "not validated on the target (a GPU with 16 GB): run on AMD EPYC 9354 under a limit of "
            "15.9 GB, enforced by cgroup",
        },
    }
