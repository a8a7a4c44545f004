"""The values that layers hand to each other: frozen, without I/O."""

from exporter.types.qtensor import QTensor, leaf_count, leaf_range, leaf_rows, leaves, tensor_digest
from exporter.types.scheme import Scheme
from exporter.types.tensor import Role, TensorRef, TensorSpec

__all__ = [
    "QTensor",
    "Role",
    "Scheme",
    "TensorRef",
    "TensorSpec",
    "leaf_count",
    "leaf_range",
    "leaf_rows",
    "leaves",
    "tensor_digest",
]
