"""Checkpoints in: any gpt-oss folder opened, described and diagnosed."""

from exporter.checkpoint.doctor import Diagnosis, diagnose
from exporter.checkpoint.findings import Finding
from exporter.checkpoint.source import Checkpoint, open_checkpoint
from exporter.checkpoint.summary import describe

__all__ = ["Checkpoint", "Diagnosis", "Finding", "describe", "diagnose", "open_checkpoint"]
