"""Named tensors as one object in the safetensors format, which holds numbers only and executes nothing.

The library's own functions make two copies of everything in memory; the format is simple enough to be written from the
tensors where they lie, and to be read without a copy: the header's length (8 bytes, little-endian), a JSON header, the
bytes of the tensors.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from mmap import mmap
from typing import Any

import torch
from torch import Tensor

from cluster.document_kinds import PAIR, SHAPE, TEXT, require_kinds
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

_OF_NAMES = {name: dtype for dtype, name in _DTYPES.items()}
_KNOWN = ", ".join(_OF_NAMES)
_OF_TENSOR = {"dtype": TEXT, "shape": SHAPE, "data_offsets": PAIR}
_MAX_HEADER_BYTES = 100_000_000
"""As the library has it."""


def serialize(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Return the parts of a safetensors file that holds host tensors of any shape. ValueError for other dtypes."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or name == "__metadata__":
            raise ValueError(f"tensor {name!r}: found {tensor.dtype}, expected one of {_KNOWN}")
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


def deserialize(data: bytearray | mmap) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the host: views of its memory, nothing is copied.

    ValueError for what is no such file, whatever its header says.
    """
    start, header = _read_header(data)
    num_bytes, place = len(data) - start, 0
    tensors: dict[str, Tensor] = {}
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (first, last) = _OF_NAMES.get(about["dtype"]), about["shape"], about["data_offsets"]
        if dtype is None:
            raise ValueError(f"header: tensor {name[:80]!r}: found {about['dtype'][:80]!r}, expected one of {_KNOWN}")
        if first != place or last - first != math.prod(shape) * dtype.itemsize or last > num_bytes:
            raise ValueError(
                f"header: tensor {name[:80]!r} of shape {shape} in bytes [{first}, {last}) of {num_bytes}: expected it "
                f"to begin at {place} and to take what its shape needs"
            )
        place = last
        tensors[name] = _view(data, dtype, start + first, start + last).view(shape)
    if place != num_bytes:
        raise ValueError(f"header: its tensors take {place} bytes, expected all {num_bytes}")
    return tensors


def _read_header(data: bytearray | mmap) -> tuple[int, dict[str, Any]]:
    """Return where the tensors begin, and the header."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(len(data) - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"header: found a length of {length} in {len(data)} bytes")
    try:
        header = json.loads(data[8 : 8 + length])
        require_kinds(header, {}, "header")
        header.pop("__metadata__", None)
        for about in header.values():
            require_kinds(about, _OF_TENSOR, "header")
            if about.keys() != _OF_TENSOR.keys():
                raise ValueError(f"header: found {sorted(about)[:8]}, expected {sorted(_OF_TENSOR)}")
    except RecursionError as error:
        raise ValueError(f"header: {error}") from error
    return 8 + length, header


def _view(data: bytearray | mmap, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    if start == stop:
        return torch.empty(0, dtype=dtype)
    if start % dtype.itemsize:
        data, start, stop = bytearray(data[start:stop]), 0, stop - start  # a copy is aligned
    return torch.frombuffer(data, dtype=dtype, count=(stop - start) // dtype.itemsize, offset=start)
