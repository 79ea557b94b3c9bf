"""SHA-256 of files and bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from io import BufferedReader

from latentrt.bundle.manifest import FileRecord

__all__ = ["ByteProgress", "file_record", "hash_bytes", "hash_stream", "open_regular", "read_at_most"]

ByteProgress = Callable[[int], None]
"""Called with the number of bytes hashed or transferred since the last call."""

# hashlib releases the interpreter's lock for each chunk; one MiB keeps calls rare and fits a core's cache.
_CHUNK_BYTES = 1 << 20


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading; reject a pipe or a device without blocking on it, as plain `open` would.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    stream = open(path, "rb", opener=_open_nonblocking)  # noqa: SIM115, the caller closes it
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return stream


def read_at_most(stream: BufferedReader, max_bytes: int) -> bytes:
    """Return the rest of an open file; of a longer one `max_bytes` + 1 bytes, so that the caller sees that it is.

    A stream allocates as many bytes as it is asked for, so it is asked for no more than the file has.
    """
    return stream.read(min(os.fstat(stream.fileno()).st_size, max_bytes) + 1)


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def hash_stream(stream: BufferedReader, progress: ByteProgress | None = None) -> tuple[str, int]:
    """Return the SHA-256 of the rest of a stream, in lower-case hexadecimal, and its length in bytes."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := stream.readinto(buffer):
        digest.update(buffer[:count])
        size += count
        if progress is not None:
            progress(count)
    return digest.hexdigest(), size


def hash_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def file_record(path: str | os.PathLike[str]) -> FileRecord:
    """Return the pin of the file at `path`, for a manifest."""
    with open_regular(path) as stream:
        sha256, size = hash_stream(stream)
    return FileRecord(sha256=sha256, size=size)
