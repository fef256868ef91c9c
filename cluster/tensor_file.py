"""Named tensors as one object in the safetensors format, which holds numbers only and executes nothing.

The library's own writer makes two copies of everything in memory; the format is simple enough to be written from the
tensors where they lie: the header's length (8 bytes, little-endian), a JSON header, the bytes of the tensors.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor

from cluster.row_table import tensor_bytes

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def serialize(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Return the parts of a safetensors file that holds host tensors of any shape. ValueError for other dtypes."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or name == "__metadata__":
            raise ValueError(f"tensor {name!r}: found {tensor.dtype}, expected one of {', '.join(_DTYPES.values())}")
    # Wide numbers first keeps every tensor aligned to its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {}
    stop = 0
    for name in names:
        tensor = tensors[name]
        start, stop = stop, stop + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *(tensor_bytes(tensors[name]) for name in names)]


def deserialize(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the host."""
    return safetensors.torch.load(data)
