"""Files of tensors: safetensors and what torch.save writes, mapped and not copied."""
from __future__ import annotations

import json
import math
import mmap
import os
import pickle
import re
import shlex
import struct
import zlib
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor

from formats.files import naming, read_json, to_disk

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}


class Source(NamedTuple):
    """A tensor that is not read yet."""
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Weights(Mapping[str, Tensor]):
    """The tensors in `path` by name.

    Each is mapped into memory when it is asked for and, from safetensors, unmapped with its last
    reference: what nobody touches is not read, and what has been used takes no room.
    """

    def __init__(self, path: Path, sources: dict[str, Source]) -> None:
        self.path = path
        self.sources = sources

    def __getitem__(self, name: str) -> Tensor:
        return self.sources[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.sources

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    def with_tensor(self, name: str, tensor: Tensor) -> Weights:
        """Return these weights and one more that stands in no file: a fresh head, say."""
        source = Source(self.path, tuple(tensor.shape), tensor.dtype, lambda: tensor)
        return Weights(self.path, {**self.sources, name: source})

    def summed_files(self) -> list[Path]:
        """Return the files that may carry a checksum."""
        files = {source.file for source in self.sources.values()}
        return sorted(file for file in files if file.suffix == ".safetensors")


# ---------------------------------------------------------------------------------------------
# safetensors: an 8-byte little-endian length, a JSON object of that length, the tensors' bytes

NO_SUM = b"0" * 8  # where the checksum of the file will stand
PIECE = 1 << 20    # bytes that are summed at a time
# The beginning of a file that was written here, which holds all checksums: "crc32" is that of the
# file itself, without any, "crc32 NAME" that of a file beside it.
BEGINNING = 4096
STORED = re.compile(rb'"crc32(?: ([^" ]+))?": "([0-9a-f]{8})"')


class Entry(NamedTuple):
    """What the header says of one tensor; begin and end count bytes from the first tensor's."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def map_tensor(file: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Map the bytes of one tensor: private pages, because torch wants a writable buffer."""
    count = math.prod(shape)
    if count == 0:  # an empty range cannot be mapped
        return torch.empty(shape, dtype=dtype)
    # a mapping starts at the beginning of a page, so a little before the tensor
    page = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    before = offset - page
    size = before + count * dtype.itemsize
    with open(file, "rb") as handle:
        data = mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_COPY, offset=page)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=before).view(shape)


def read_safetensors(file: Path) -> Weights:
    """Read the header of a .safetensors file; its tensors are mapped when they are asked for.

    Raises ValueError naming the file, and the tensor, unless the tensors fill the file to its end
    without hole or overlap: a file that was cut off or damaged is noticed before it is used.
    """
    size = os.path.getsize(file)
    start, header = read_header(file, size)
    entries = {name: parse_entry(file, name, entry) for name, entry in header.items()}
    for name, entry in entries.items():
        if start + entry.end > size:
            raise ValueError(f"{file}: cut off: it has {size} bytes, "
                             f"and tensor {name} ends at {start + entry.end}")
    check_filled(file, entries, size - start)

    # nothing but the header has been read so far
    sources = {}
    for name, entry in entries.items():
        read = partial(map_tensor, file, start + entry.begin, entry.shape, entry.dtype)
        sources[name] = Source(file, entry.shape, entry.dtype, read)
    return Weights(file, sources)


def read_header(file: Path, size: int) -> tuple[int, dict[str, Any]]:
    """Return where the tensors of a file of `size` bytes start, and its header's entries."""
    header = None
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        start = 8 + length
        # in a torn file the length is any number: no buffer of that size before it is compared
        if start <= size:
            try:
                header = json.loads(handle.read(length))
            except (ValueError, RecursionError):
                pass
    if not isinstance(header, dict):
        raise ValueError(f"{file}: not a safetensors file, or cut off in its header")
    header.pop("__metadata__", None)
    return start, header


def parse_entry(file: Path, name: str, entry: Any) -> Entry:
    """Check one tensor's entry in the header: its bytes have to be those of its shape and type."""
    # the header is whatever stands in the file: nothing in it need be what the format asks for
    try:
        begin, end = entry["data_offsets"]
        parsed = Entry(SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), begin, end)
        # type, not isinstance: true and false are no sizes
        whole_numbers = all(type(n) is int and n >= 0 for n in (*parsed.shape, begin))
        possible = whole_numbers and end - begin == math.prod(parsed.shape) * parsed.dtype.itemsize
    except (KeyError, TypeError, ValueError):
        possible = False
    if not possible:
        raise ValueError(f"{file}: tensor {name} has an impossible size or an unknown type: "
                         f"{str(entry)[:100]}")
    return parsed


def check_filled(file: Path, entries: Mapping[str, Entry], size: int) -> None:
    """Raise ValueError unless the tensors, one after the other, are all of the `size` bytes."""
    filled = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < filled:
            raise ValueError(f"{file}: tensor {name} overlaps the one before it")
        if entry.begin > filled:
            raise ValueError(f"{file}: tensor {name} comes after a hole")
        filled = entry.end
    if filled != size:
        raise ValueError(f"{file}: {size - filled} bytes after the last tensor belong to none")


def write_safetensors(file: Path, tensors: Mapping[str, Tensor],
                      stream: Iterable[Tensor] | None = None, beside: Sequence[Path] = ()) -> str:
    """Write a .safetensors file, wide types first so that every tensor stays aligned.

    Returns its checksum, which stands in its header as well.

    stream: in place of the values of `tensors`, which then only tell names, shapes and (alike)
        dtypes; taken one at a time, so that no more than one has to be in memory.
    beside: files in the same folder, whose checksums this one is to carry as well.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    widest_first = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {
        "format": "pt", "crc32": NO_SUM.decode(),
        **{f"crc32 {other.name}": sum_of(other) for other in beside}}}
    offset = 0
    for name in widest_first:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    # the tensors begin at a multiple of 8, too
    text += b" " * (-len(text) % 8)

    if stream is None:
        stream = (tensors[name] for name in widest_first)
    beginning = struct.pack("<Q", len(text)) + text
    checksum = zlib.crc32(without_sums(beginning))
    with naming(file, len(beginning) + offset), open(file, "wb") as handle:
        handle.write(beginning)
        for tensor in stream:
            # as bytes, for numpy has no bfloat16
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            for start in range(0, len(values), PIECE):  # each is summed and written from the cache
                piece = values[start:start + PIECE]
                checksum = zlib.crc32(piece, checksum)
                handle.write(piece)
        # known only now; until here the file says of itself that it is damaged
        handle.seek(beginning.index(NO_SUM))
        handle.write(f"{checksum:08x}".encode())
        to_disk(handle)
    return f"{checksum:08x}"


def stored_sum(file: Path) -> str:
    """Return the checksum in the header of a .safetensors file; "": it has none, ours have."""
    return stored_sums(file).get("", "")


def stored_sums(file: Path) -> dict[str, str]:
    """Return the checksums in the header of a .safetensors file, by file name; "" is its own."""
    with open(file, "rb") as handle:
        found = STORED.findall(handle.read(BEGINNING))
    return {name.decode(): checksum.decode() for name, checksum in found}


def sum_of(file: Path) -> str:
    return f"{zlib.crc32(file.read_bytes()):08x}"


def without_sums(beginning: bytes) -> bytes:
    """Return the beginning of a file as it was before there were checksums to be put into it."""
    pieces = bytearray(beginning)
    for found in STORED.finditer(beginning[:BEGINNING]):
        pieces[found.start(2):found.end(2)] = NO_SUM
    return bytes(pieces)


def check_sum(file: Path) -> None:
    """Raise ValueError naming a .safetensors file whose bytes are not those that were written."""
    status = os.stat(file)
    stored = stored_sum(file)
    if stored and stored != actual_sum(file, status.st_size, status.st_mtime_ns):
        raise ValueError(f"{file}: damaged: its bytes are not those that were written; take it "
                         "from a copy, or make it anew")


@lru_cache
def actual_sum(file: Path, size: int, changed: int) -> str:
    """Read a .safetensors file for the checksum of its bytes; an unchanged file is read once."""
    piece = bytearray(PIECE)
    with open(file, "rb", buffering=0) as handle:
        total = zlib.crc32(without_sums(handle.read(BEGINNING)))
        while count := handle.readinto(piece):
            total = zlib.crc32(memoryview(piece)[:count], total)
    return f"{total:08x}"


def first_of(folder: Path) -> Path | None:
    """Return the .safetensors file of a model folder that carries the others' checksums, if any."""
    return min(folder.glob("model*.safetensors"), default=None)


def changed_beside(folder: Path) -> dict[str, str]:
    """Return the files beside the weights that are not as they were written with them.

    Name -> checksum of today. A file that is gone is none of them: its readers know what they need.
    """
    carrier = first_of(folder)
    stored = stored_sums(carrier) if carrier else {}
    present = {name: sum_of(folder / name) for name in stored if (folder / name).is_file()}
    return {name: now for name, now in present.items() if now != stored[name]}


def check_beside(folder: Path) -> None:
    """Raise ValueError naming a file beside the weights that is not as it was written with them."""
    for name in changed_beside(folder):
        raise ValueError(f"{folder / name}: damaged or edited: its bytes are not those that were "
                         "written; take it from a copy, or, if the change is meant, accept it "
                         f"with: python -m weights {shlex.quote(str(folder))}")


def accept_changed(folder: Path) -> list[str]:
    """Have the weights carry the checksums of the files beside them as they are; name those."""
    changed = changed_beside(folder)
    if changed:
        with open(first_of(folder), "r+b") as handle:
            for found in STORED.finditer(handle.read(BEGINNING)):
                name = (found[1] or b"").decode()
                handle.seek(found.start(2))
                handle.write(changed.get(name, found[2].decode()).encode())
            to_disk(handle)
    return list(changed)


# ---------------------------------------------------------------------------------------------
# What torch.save wrote, and models of several files

def read_pickle(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file written by torch.save.

    Nothing in it is executed: torch's restricted unpickler refuses all but tensors and plain
    containers. Raises ValueError naming the file if it is torn or holds anything else.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{file}: not a plain dictionary of tensors; what else its pickle holds "
                         "is never executed") from None
    except Exception:
        # torch raises a dozen kinds for a torn file
        raise ValueError(f"{file}: cut off, or not a file of torch.save since version 1.6; "
                         "fetch it again or save it anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds {type(content).__name__}, "
                         "expected a dictionary of tensors")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise ValueError(f"{file}: entry {name} is {type(tensor).__name__}, expected a tensor")
        # a sparse one has no strides, one on "meta" no values, one that is quantized other ones
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(f"{file}: tensor {name} is {tensor.layout}, {tensor.dtype} on "
                             f"{tensor.device}: expected its plain values; save it anew, dense")
    return content


def read_bin(file: Path) -> Weights:
    """Map a pytorch_model*.bin file."""
    tensors = read_pickle(file)
    sources = {}
    for name, tensor in tensors.items():
        sources[name] = Source(file, tuple(tensor.shape), tensor.dtype, partial(tensors.get, name))
    return Weights(file, sources)


def read_indexed(index: Path, read: Callable[[Path], Weights]) -> Weights:
    """Read the files that an index names; every tensor has to be where it says."""
    places = read_json(index).get("weight_map")
    # only files beside the index: a name with a folder in it would lead anywhere
    if not isinstance(places, dict) or not all(map(is_bare_name, places.values())):
        raise ValueError(f"{index}: has no weight_map, from tensors to files beside it")
    files: dict[str, Weights] = {}
    sources = {}
    for tensor, name in places.items():
        file = index.with_name(name)
        if not file.is_file():
            raise ValueError(f"{file}: no such file, "
                             f"but {index.name} says it holds tensor {tensor}")
        # many tensors, few files: each is opened once
        if name not in files:
            files[name] = read(file)
        if tensor not in files[name]:
            raise ValueError(f"{file}: tensor {tensor} is missing, "
                             f"but {index.name} says it is there")
        sources[tensor] = files[name].sources[tensor]
    return Weights(index, sources)


def is_bare_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name
