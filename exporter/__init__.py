"""Quantize released gpt-oss weights once, export them everywhere, prove every artifact."""

__version__ = "0.1.0"
