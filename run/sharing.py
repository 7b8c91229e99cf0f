"""Demonstrations in memory that the processes of a machine share: one encodes, all map the bytes.

The memory has no name in any folder: other users cannot open it, and with the last process that
holds it, however that one ends, it is gone.
"""
from __future__ import annotations

import mmap
import os
import time
from array import array
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import parallel
from data import TokenizedDialogues
from formats import Dialogue
from formats.files import naming
from parallel import Machine


class Place(NamedTuple):
    """Where a process holds numbers: an open file of it."""
    process: int
    file: int
    typecode: str


class Pages:
    """Numbers that other processes can map: an array that grows at its end alone."""

    def __init__(self, typecode: str, numbers: Iterable[int] = ()) -> None:
        self.typecode = typecode
        self.size = 0
        self.file = os.fdopen(os.memfd_create("demonstrations"), "wb")
        self.extend(numbers)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(mapped(self.place()))

    def extend(self, numbers: Iterable[int]) -> None:
        part = array(self.typecode, numbers)
        with naming(Path("memory for demonstrations")):
            self.file.write(part)
        self.size += len(part)

    def append(self, number: int) -> None:
        self.extend([number])

    def place(self) -> Place:
        with naming(Path("memory for demonstrations")):
            self.file.flush()
        return Place(os.getpid(), self.file.fileno(), self.typecode)


def mapped(place: Place) -> memoryview:
    """Map what a process holds; it may then let go of it."""
    with open(f"/proc/{place.process}/fd/{place.file}", "rb") as file:
        is_empty = os.fstat(file.fileno()).st_size == 0  # and cannot be mapped
        content = b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return memoryview(content).cast(place.typecode)


def shared(machine: Machine, fill: Callable[[TokenizedDialogues], None]) -> TokenizedDialogues:
    """Have one process of every machine fill an index of dialogues; return it on every rank."""
    everyone = parallel.gather_objects(neighbourhood(machine))
    first = everyone.index(everyone[machine.rank])
    is_alone = everyone.count(everyone[machine.rank]) == 1
    is_first = first == machine.rank
    examples = TokenizedDialogues()
    if is_first and not is_alone:
        examples = TokenizedDialogues(Pages("H"), Pages("q", [0]))

    def encode() -> list[Place]:
        if is_first:
            fill(examples)
        arrays = (examples.words, examples.ends)
        return [pages.place() for pages in arrays if isinstance(pages, Pages)]

    places = parallel.on_all(encode)[first]
    # the first one holds its files open until all have mapped them
    views: list[memoryview] = []
    parallel.on_all(lambda: views.extend(map(mapped, places)))
    return TokenizedDialogues(*views) if views else examples


def neighbourhood(machine: Machine) -> str:
    """Return what the ranks that see each other's files in /proc have in common."""
    # Not the name of the host: several machines can have the same, and so can containers.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return boot + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"rank {machine.rank} sees nobody"


def with_word(machine: Machine, records: Iterable[Dialogue]) -> Iterator[Dialogue]:
    """Yield records, and let the ranks that wait know now and then that there are more."""
    told = time.monotonic()
    for record in records:
        if time.monotonic() - told > 60 * machine.config.timeout / 10:
            parallel.gather_objects(parallel.AT_WORK)
            told = time.monotonic()
        yield record
