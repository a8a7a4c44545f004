"""What gpt-oss is: configuration, tensors, memory arithmetic, the reference forward."""

from exporter.model.config import ModelConfig, RopeConfig
from exporter.model.tensors import parameter_count, released_bytes, tensor_specs

__all__ = ["ModelConfig", "RopeConfig", "parameter_count", "released_bytes", "tensor_specs"]
