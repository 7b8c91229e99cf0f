"""Files of tensors: safetensors and what torch.save writes, mapped and not copied."""
from __future__ import annotations

import json
import math
import mmap
import os
import pickle
import struct
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping, NamedTuple

import torch
from torch import Tensor

from formats.files import read_json

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
                      "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


class Source(NamedTuple):
    """A tensor that is not read yet."""
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Weights(Mapping[str, Tensor]):
    """The tensors in `path` by name.

    Each is mapped into memory when it is asked for and, from safetensors, unmapped with its last reference:
    what nobody touches is not read, and what has been used takes no room.
    """

    def __init__(self, path: Path, sources: dict[str, Source]) -> None:
        self.path, self.sources = path, sources

    def __getitem__(self, name: str) -> Tensor:
        return self.sources[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.sources

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


def map_tensor(file: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Map the bytes of one tensor: private pages, because torch wants a writable buffer."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    page = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with open(file, "rb") as handle:
        data = mmap.mmap(handle.fileno(), offset - page + count * dtype.itemsize, access=mmap.ACCESS_COPY, offset=page)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset - page).view(shape)


def read_safetensors(file: Path) -> Weights:
    """Read the header of a .safetensors file: an 8-byte little-endian length, a JSON object, then the tensors' bytes.

    Raises ValueError naming the file, and the tensor, unless the tensors fill the file to its end without hole or overlap.
    """
    with open(file, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        start = 8 + int.from_bytes(handle.read(8), "little")
        try:
            header = json.loads(handle.read(start - 8)) if start <= size else None
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: not a safetensors file, or cut off in its header")
    header.pop("__metadata__", None)
    sources, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            possible = all(type(n) is int and n >= 0 for n in (*shape, begin)) and end == begin + math.prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError):
            possible = False
        if not possible:
            raise ValueError(f"{file}: tensor {name} has an impossible size or an unknown type: {str(entry)[:100]}")
        if start + end > size:
            raise ValueError(f"{file}: cut off: it has {size} bytes, and tensor {name} ends at {start + end}")
        sources[name] = Source(file, shape, dtype, partial(map_tensor, file, start + begin, shape, dtype))
        spans.append((begin, end, name))
    filled = 0
    for begin, end, name in sorted(spans):
        if begin != filled:
            raise ValueError(f"{file}: tensor {name} {'overlaps the one before it' if begin < filled else 'comes after a hole'}")
        filled = end
    if start + filled != size:
        raise ValueError(f"{file}: {size - start - filled} bytes after the last tensor belong to none")
    return Weights(file, sources)


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file written by torch.save; ValueError naming the file if it is torn or holds anything else.

    Nothing in it is executed: torch's restricted unpickler refuses all but tensors and plain containers.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises a dozen kinds, some for a torn file, some for a hostile one
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(f"{file}: not a plain dictionary of tensors; what else its pickle holds is never executed") from None
        raise ValueError(f"{file}: cut off, or not a file of torch.save since version 1.6; fetch it again or save it anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds {type(content).__name__}, expected a dictionary of tensors")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise ValueError(f"{file}: entry {name} is {type(tensor).__name__}, expected a tensor")
    return content


def read_bin(file: Path) -> Weights:
    """Map a pytorch_model*.bin file."""
    tensors = read_pickle(file)
    return Weights(file, {name: Source(file, tuple(x.shape), x.dtype, partial(tensors.get, name)) for name, x in tensors.items()})


def read_indexed(index: Path, read: Callable[[Path], Weights]) -> Weights:
    """Read the files that an index names; every tensor has to be where it says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) and Path(name).name == name for name in places.values()):
        raise ValueError(f"{index}: has no weight_map, from tensors to files beside it")
    files: dict[str, Weights] = {}
    for tensor, name in places.items():
        file = index.with_name(name)
        if not file.is_file():
            raise ValueError(f"{file}: no such file, but {index.name} says it holds tensor {tensor}")
        if name not in files:
            files[name] = read(file)
        if tensor not in files[name]:
            raise ValueError(f"{file}: tensor {tensor} is missing, but {index.name} says it is there")
    return Weights(index, {tensor: files[name].sources[tensor] for tensor, name in places.items()})


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], stream: Iterable[Tensor] | None = None) -> None:
    """Write a .safetensors file, wide types first so that every tensor stays aligned.

    stream: in place of the values of `tensors`, which then only tell names, shapes and (alike) dtypes; taken one at a time.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, offset = {}, 0
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    for name, tensor in ordered.items():
        size = tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered.values() if stream is None else stream:
            handle.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
