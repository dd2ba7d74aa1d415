"""Files of a checkpoint, each mapped and registered with CUDA once for all loads that read it.

A copy from memory that CUDA does not know holds a lock of the driver until it ends, so that loads
in several threads take turns. Copies from registered memory overlap, and are faster.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

if TYPE_CHECKING:
    import torch

#: Smaller tensors are read as SGLang reads them: CUDA copies up to 64 KiB without waiting for the
#: card, and what SGLang changes in place is small (see ``pinned_loads.WRITERS``).
LEAST_BYTES = 64 * 1024
_LENGTH_BYTES = 8
#: Limit of the header's length in safetensors (0.8, `MAX_HEADER_SIZE`).
_LONGEST_HEADER = 100_000_000


class NotMapped(Exception):
    """A file could not be mapped; the text says why."""


class NotRegistered(NotMapped):
    """CUDA did not register memory; the text says why."""


class Identity(NamedTuple):
    """What makes a file the same file: a path may be given other content."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, found: os.stat_result) -> Identity:
        """The identity of the file that ``found`` describes."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass
class MappedFile:
    """One file of a checkpoint, mapped to be read only.

    Attributes:
        path: where it was found first.
        identity: of the file that is mapped.
        users: how many loads use it now.
        ready: done when it is mapped and registered, or when that has failed.
    """

    path: str
    identity: Identity
    users: int = 0
    ready: Future[None] = field(default_factory=Future)
    _memory: Any = None
    _address: int = 0
    _spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.identity.size

    @property
    def address(self) -> int:
        """Where its mapping begins."""
        return self._address

    def map(self) -> None:
        """Map the file, and read where each tensor lies.

        Raises:
            NotMapped: it is another file by now, or no file of safetensors.
            OSError: it cannot be opened or mapped.
        """
        import numpy

        with Path(self.path).open("rb") as opened:
            if Identity.of(os.fstat(opened.fileno())) != self.identity:
                raise NotMapped(f"{self.path} was replaced while it was opened")
            # Shared, so that its pages are those of the page cache. In a private mapping that can
            # be written, CUDA 13.0 did not return from registering 3 GB within 15 s.
            mapping = mmap.mmap(
                opened.fileno(), self.size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ
            )
        self._spans = _spans(mapping, self.path)
        # Keeps the mapping, and has its address, which mmap does not tell.
        array = numpy.frombuffer(mapping, dtype=numpy.uint8)
        self._address = array.ctypes.data
        # torch (2.14) warns about memory that must not be written; of this type it does not know.
        memory: Any = (ctypes.c_char * self.size).from_address(self._address)
        memory.kept = array
        self._memory = memory

    def tensor(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The tensor ``name`` in the mapping: type, shape and bits of ``like``; or ``like``.

        It must not be written. It stays readable as long as it lives.

        Args:
            name: of a tensor in the file.
            like: the same tensor, as safetensors has opened it.
        """
        import torch

        span = self._spans.get(name)
        if span is None or like.nbytes < LEAST_BYTES or like.dim() < 2:
            return like
        begin, end = span
        if end - begin != like.nbytes or (self._address + begin) % like.element_size():
            return like
        flat = torch.frombuffer(self._memory, dtype=like.dtype, count=like.numel(), offset=begin)
        return flat.view(like.shape)


def _spans(mapping: mmap.mmap, path: str) -> dict[str, tuple[int, int]]:
    """Where each tensor begins and ends; safetensors checks the rest when it opens the file."""
    length = int.from_bytes(mapping[:_LENGTH_BYTES], "little")
    begin = _LENGTH_BYTES + length
    if length > _LONGEST_HEADER or begin > len(mapping):
        raise NotMapped(f"{path} has no header of safetensors")
    try:
        header = json.loads(mapping[_LENGTH_BYTES:begin])
        found = {
            name: (begin + entry["data_offsets"][0], begin + entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise NotMapped(f"{path} has no header of safetensors ({error})") from None
    if not all(begin <= first <= last <= len(mapping) for first, last in found.values()):
        raise NotMapped(f"{path} has tensors that lie outside of the file")
    return found


class MappedFiles:
    """The files that are mapped now. Each is registered by its first user and kept for the others.

    Mapping and registering need as much time as the file has pages. The lock is not held meanwhile:
    the first user does it, and the others wait for its future.
    """

    def __init__(
        self,
        register: Callable[[int, int], None],
        unregister: Callable[[int], None],
        most_bytes: Callable[[], int],
    ) -> None:
        """Begin without files.

        Args:
            register: called with address and length of a mapping; raises NotRegistered.
            unregister: called with the address.
            most_bytes: how much may be registered at a time. Its pages cannot be reclaimed.
        """
        self._register = register
        self._unregister = unregister
        self._most_bytes = most_bytes
        self.start_afresh()

    def start_afresh(self) -> None:
        """Forget all files: in a forked child they are its parent's, whose lock may be held."""
        self._lock = threading.Lock()
        self._files: dict[Identity, MappedFile] = {}
        self._bytes = 0

    def acquire(self, path: str, timeout: Optional[float] = None) -> Optional[MappedFile]:
        """Return the mapped file, which the caller must ``release``; None where there is no room.

        Args:
            path: of the file.
            timeout: seconds to wait for another thread that registers it; None: without end.

        Raises:
            NotMapped, NotRegistered: it cannot be mapped or registered.
            OSError: there is no such file, or it cannot be read.
            TimeoutError: the other thread has not registered it in time.
        """
        most = self._most_bytes()
        identity = Identity.of(os.stat(path))
        with self._lock:
            file = self._files.get(identity)
            leads = file is None
            if file is None:
                if self._bytes + identity.size > most:
                    return None
                file = self._files[identity] = MappedFile(path, identity)
                self._bytes += identity.size
            file.users += 1
        try:
            if leads:
                self._prepare(file)
            file.ready.result(timeout)
        except BaseException:
            self.release(file)
            raise
        return file

    def _prepare(self, file: MappedFile) -> None:
        try:
            file.map()
            self._register(file.address, file.size)
        except BaseException as error:
            # An interrupt is for this thread alone; the others read the file as SGLang does.
            told = isinstance(error, (NotMapped, OSError))
            file.ready.set_exception(error if told else NotMapped(f"{error!r} in another thread"))
            raise
        file.ready.set_result(None)

    def release(self, file: MappedFile) -> None:
        """End one use of ``file``; the last user's end unregisters it.

        No copy from it may be under way for this user.
        """
        with self._lock:
            file.users -= 1
            if file.users:
                return
            # A later load maps it anew, at another address, even while this one is unregistered.
            del self._files[file.identity]
        try:
            if file.ready.done() and file.ready.exception() is None:
                self._unregister(file.address)
        finally:
            with self._lock:
                self._bytes -= file.size

    def now(self) -> list[tuple[str, int, int]]:
        """Path, size and number of users of each file."""
        with self._lock:
            return [(it.path, it.size, it.users) for it in self._files.values()]
