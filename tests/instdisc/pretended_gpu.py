"""A pretended GPU: tensors that say cuda:0 and lie in memory of the host.

It catches what a real one catches, without one: operations that mix devices, NumPy views of device tensors, and every
point where the host waits for the device or copies from memory that is not page-locked. It says nothing of speed, of
kernels or of numbers that only a GPU rounds differently.
"""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
ROOT = str(Path(__file__).parents[2]) + "/"
PACKAGES = ("cluster/", "dataloading/", "instdisc/")
# Whose answer the host waits for, by the operator's name.
READS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::item"}
SIZES = {"aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2", "aten::repeat_interleave.Tensor"}

host_waits: collections.Counter = collections.Counter()
"""Where the host waited for the device, or a copy blocked it: (what, file and function)."""
copies_to_device: collections.Counter = collections.Counter()
"""From where copies to the device were made, waited for or not."""
_locked: dict[int, torch.Tensor] = {}
"""Page-locked memory, by address; held, so that no other memory takes its place."""


def start_anew() -> None:
    """Forget the waits and copies so far."""
    host_waits.clear()
    copies_to_device.clear()


def where() -> str:
    """Return the innermost place of the project's code on the stack: its file and function."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and file[len(ROOT) :].startswith(PACKAGES) and not file.endswith("device_copies.py"):
            return f"{file[len(ROOT) :]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside"


def is_locked(tensor: torch.Tensor) -> bool:
    """Return whether a tensor of the host lies in page-locked memory."""
    return not isinstance(tensor, OnGpu) and tensor.untyped_storage().data_ptr() in _locked


def _lock(tensor: torch.Tensor) -> torch.Tensor:
    _locked[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


class _Runtime:
    """CUDA's runtime, as far as memory is locked by its address."""

    @staticmethod
    def cudaHostRegister(address, num_bytes, flags):
        _locked[address] = torch.empty(0)
        return 0

    @staticmethod
    def cudaHostUnregister(address):
        del _locked[address]


class OnGpu(torch.Tensor):
    """A tensor on the pretended device."""

    @staticmethod
    def __new__(cls, host, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            layout=host.layout, device="meta", requires_grad=requires_grad,
        )  # fmt: skip
        made.host = host
        return made

    def __init__(self, host, requires_grad=False): ...

    def __repr__(self, **kwargs):
        return f"OnGpu({self.host})"

    @property
    def device(self):
        return DEVICE

    @property
    def is_cuda(self):
        return True

    @property
    def is_meta(self):
        return False

    def is_pinned(self, *args):
        return False

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert a cuda:0 tensor to numpy, at {where()}")

    __array__ = numpy

    def tolist(self):
        host_waits["read", where()] += 1
        return self.host.tolist()

    def cpu(self):
        return self.to("cpu")

    def to(self, *args, **kwargs):
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        device = DEVICE if device is None else device
        if device.type == "cuda" and dtype in (None, self.dtype) and memory_format is None:
            return self
        options = {"dtype": dtype, "memory_format": memory_format}
        given = {name: value for name, value in options.items() if value is not None}
        return torch.ops.aten._to_copy(self, device=device, non_blocking=non_blocking, **given)

    def __getitem__(self, key):
        def on_gpu(part):
            return OnGpu(torch.tensor(part)) if isinstance(part, list) else part

        return super().__getitem__(tuple(map(on_gpu, key)) if isinstance(key, tuple) else on_gpu(key))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _host(value):
    return value.host if isinstance(value, OnGpu) else value


def _on_gpu(value):
    return OnGpu(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) else value


def _is_gpu(device) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _note_copy(source, to_gpu: bool, non_blocking: bool) -> None:
    """Take down a copy between the memories, and whether it blocks the host."""
    if to_gpu:
        copies_to_device[where()] += 1
    if not to_gpu:
        host_waits["copy to the host", where()] += 1
    elif not (non_blocking and is_locked(source)):
        host_waits["copy from pageable memory" if non_blocking else "blocking copy to the device", where()] += 1


def _run(func, args, kwargs):
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    on_host = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
    name, device = func._schema.name, kwargs.get("device")
    kwargs = {**kwargs, "device": torch.device("cpu")} if _is_gpu(device) else dict(kwargs)
    if kwargs.pop("pin_memory", None):
        return _lock(func(*args, **kwargs))
    if name == "aten::copy_":
        into, source = args[0], args[1]
        if isinstance(into, OnGpu) != isinstance(source, OnGpu):
            non_blocking = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
            _note_copy(source, isinstance(into, OnGpu), non_blocking)
        func(_host(into), _host(source))
        return into
    if name == "aten::_to_copy" and device is not None:
        if bool(on_gpu) != _is_gpu(device):
            _note_copy(args[0], _is_gpu(device), bool(kwargs.get("non_blocking")))
        found = func(*tree_map(_host, args), **kwargs)
        return OnGpu(found) if _is_gpu(device) else found
    if on_gpu:
        _refuse_mixed(name, args, on_host)
        _note_reads(name, func, tensors, on_gpu)
    found = func(*tree_map(_host, args), **tree_map(_host, kwargs))
    if not (on_gpu or _is_gpu(device)) or name in READS:
        return found
    wrapped = tree_map(_on_gpu, found)
    if any(part.alias_info is not None for part in (*func._schema.arguments, *func._schema.returns)):
        with contextlib.suppress(Exception):
            return return_and_correct_aliasing(func, args, kwargs, wrapped)
    return wrapped


def _refuse_mixed(name: str, args, on_host: list[torch.Tensor]) -> None:
    shapes = [tuple(tensor.shape) for tensor in on_host if tensor.dim() > 0]
    if shapes and name in ("aten::index", "aten::index_put", "aten::index_put_") and isinstance(args[0], OnGpu):
        host_waits["indices of the host", where()] += 1
        return
    if shapes or (on_host and name.endswith(("index_copy_", "index_select", "gather", "scatter_"))):
        raise RuntimeError(f"{name} mixes the device with the host, tensors {shapes}, at {where()}")


def _note_reads(name: str, func, tensors, on_gpu) -> None:
    by_mask = name == "aten::index" and any(tensor.dtype == torch.bool for tensor in tensors[1:])
    if name in READS:
        host_waits["read", where()] += 1
    elif name in SIZES or func.name() in SIZES or by_mask:
        host_waits["a size that the device decides", where()] += 1


class _Factories(TorchDispatchMode):
    """Makes what is asked of device cuda there, and takes down what is page-locked."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in ("aten::_pin_memory", "aten::pin_memory"):
            return _pinned(args[0])
        mine = any(isinstance(value, OnGpu) for value in tree_flatten((args, kwargs))[0])
        if mine or _is_gpu(kwargs.get("device")) or kwargs.get("pin_memory"):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _pinned(tensor: torch.Tensor, *args) -> torch.Tensor:
    if isinstance(tensor, OnGpu):
        raise RuntimeError(f"pin_memory of a cuda tensor, at {where()}")
    return _lock(tensor.clone())


def _to(plain):
    def to(self, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            return self.to(args[0].device, args[0].dtype, *args[1:], **kwargs)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type != "cuda":
            return plain(self, *args, **kwargs)
        _note_copy(self, True, non_blocking)
        host = self.detach().clone()
        host = host if dtype is None else plain(host, dtype)
        return OnGpu(host if memory_format is None else host.contiguous(memory_format=memory_format))

    return to


def _module_to(plain):
    def to(self, *args, **kwargs):
        device, _, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)

        def moved(tensor):
            host = _host(tensor.detach())
            if memory_format is not None and host.dim() == 4:
                host = host.contiguous(memory_format=memory_format)
            return OnGpu(host.clone()) if device is None or device.type == "cuda" else host

        if not (_is_gpu(device) or (device is None and any(isinstance(p, OnGpu) for p in self.parameters()))):
            return plain(self, *args, **kwargs)
        for module in self.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    fresh = torch.nn.Parameter(moved(parameter), requires_grad=parameter.requires_grad)
                    module._parameters[name] = fresh
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = moved(buffer)
        return self

    return to


class _Autocast:
    """Autocast of the device as that of the CPU, whose kernels compute."""

    of_cpu = torch.autocast

    def __init__(self, device_type, dtype=None, enabled=True, **kwargs):
        self._inner = self.of_cpu("cpu", dtype=dtype or torch.bfloat16, enabled=enabled)

    def __enter__(self):
        return self._inner.__enter__()

    def __exit__(self, *exc):
        return self._inner.__exit__(*exc)


def _tensor(plain):
    def tensor(data, *, dtype=None, device=None, requires_grad=False, pin_memory=False):
        made = plain(data, dtype=dtype, requires_grad=requires_grad)
        if not _is_gpu(device):
            return made
        host_waits["blocking copy to the device", where()] += 1
        return OnGpu(made)

    return tensor


def _as_tensor(data, dtype=None, device=None):
    if isinstance(data, torch.Tensor):
        return data.to(device or data.device, dtype or data.dtype)
    return torch.tensor(data, dtype=dtype, device=device)


@contextlib.contextmanager
def pretended_gpu(monkeypatch_context) -> Iterator[None]:
    """Have one GPU for a while. monkeypatch_context: pytest's `MonkeyPatch.context()`."""
    with monkeypatch_context as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
        patch.setattr(torch.cuda, "synchronize", lambda *a: None)
        patch.setattr(torch.cuda, "cudart", lambda: _Runtime)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "current_stream", lambda *a: None)
        patch.setattr(torch, "autocast", _Autocast)
        patch.setattr(torch, "tensor", _tensor(torch.tensor))
        patch.setattr(torch, "as_tensor", _as_tensor)
        patch.setattr(torch.Tensor, "is_pinned", lambda self, *a: is_locked(self))
        patch.setattr(torch.Tensor, "pin_memory", _pinned)
        patch.setattr(torch.nn.Module, "to", _module_to(torch.nn.Module.to))
        patch.setattr(torch.Tensor, "to", _to(torch.Tensor.to))
        start_anew()
        try:
            with _Factories():
                yield
        finally:
            _locked.clear()
