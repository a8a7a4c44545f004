"""Byte counts as people write them: "12G" and "12GB" are 10^9, "15.9GiB" is 2^30."""

from __future__ import annotations

import re

from exporter.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(i?)(B?)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in "12G", "600 MB", "15.9GiB" or "4096"."""
    m = _SIZE.fullmatch(text)
    if not m or (m[3] and not m[2]):
        raise UsageError(f'"{text}" is not a size', hint='write sizes like "12G" (10^9) or "11.5GiB" (2^30)')
    unit = m[2].upper()
    return round(float(m[1]) * (_BINARY[unit] if m[3] else _UNITS[unit]))


def format_size(n: float) -> str:
    """Decimal, three digits: "13.8 GB", "7.42 MB", "812 B"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB" if n < 999.5 else f"{n:,.0f} TB"
