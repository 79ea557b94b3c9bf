"""Writes a bundle in a staging folder, which replaces the destination once it is complete.

The staging folder is created beside the destination, on the disk that needs room for the weights anyway (a system's
temporary folder is often in memory), so that a rename suffices::

    .NAME.export-0123456789abcdef/
      lock        locked while its process runs; holds a signature and the destination's name
      bundle/     the new bundle; after an exchange, the former one
      scratch/    temporary files
      former/     the former bundle, where the system cannot exchange two folders in one step

An earlier bundle is exchanged with the new one in one step where the system can (Linux, macOS), so that a reader finds
one of the two at any time. Elsewhere it is moved to `former` first; `Bundle.open` waits for that short moment to pass.

A process that is killed leaves its staging folder. The next one that writes a bundle to the same parent removes it, and
no folder of a user: the second half of the name's digits follows from the first, so that a name alone tells an empty
folder that was just made, and a folder with anything but `lock` is removed only if `lock` has the signature.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import itertools
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from latentrt.bundle.digests import open_regular, read_at_most
from latentrt.bundle.export_report import REPORT_NAME
from latentrt.bundle.file_lock import LockedFile, claim, create_locked, is_own, list_matching
from latentrt.bundle.interrupts import uninterrupted
from latentrt.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, decode_manifest
from latentrt.bundle.printable import printable
from latentrt.bundle.renames import rename_folder
from latentrt.errors import ManifestError, OutputError

__all__ = ["Abandoned", "Stage", "find_abandoned_stages", "is_being_replaced", "remove_abandoned_stages", "staged"]

_ROOT = re.compile(r"\..{1,32}\.export-([0-9a-f]{8})([0-9a-f]{8})", re.DOTALL)
_SIGNATURE = b"staging folder of latentrt\n"  # the first line of its lock
_LOCK, _BUNDLE, _SCRATCH, _FORMER = "lock", "bundle", "scratch", "former"
_MAX_LISTED = 5
_MOUNTS = Path("/proc/self/mountinfo")
# Files that no manifest names and that a replacement may delete: the exporter's report, and file managers' own.
_EXPENDABLE = {MANIFEST_NAME, REPORT_NAME, ".DS_Store", "Thumbs.db"}


@dataclass(frozen=True)
class Stage:
    """The folder that a bundle is written to, and a folder for temporary files."""

    bundle: Path
    scratch: Path


@dataclass(frozen=True)
class Abandoned:
    """A staging folder that a killed process left behind.

    Attributes:
        path: the folder.
        destination: the path that its bundle was meant for.
        holds_former: whether it has the only copy of the bundle that was at `destination`, which is moved back when
            the folder is removed.
    """

    path: Path
    destination: Path
    holds_former: bool


@contextlib.contextmanager
def staged(destination: Path, *, overwrite: bool) -> Iterator[Stage]:
    """Yield two folders to work in. On success the bundle is moved to `destination`; on failure both are removed.

    Args:
        destination: of the bundle. If it is a symbolic link, the link's target is replaced.
        overwrite: replace an existing bundle.

    Raises:
        OutputError: `destination` exists without `overwrite`, is not a bundle, holds files that are not the bundle's,
            cannot be replaced (a mount point, the current folder), or cannot be written.
    """
    place = _resolve(destination)
    remove_abandoned_stages(place.parent)
    _check_destination(place, destination, overwrite=overwrite)
    made = [parent for parent in place.parents if not os.path.exists(parent)]
    cleaning = contextlib.ExitStack()
    try:
        with uninterrupted():
            cleaning.callback(_remove_empty, made)
            root = _open_root(place, cleaning)
        stage = Stage(bundle=root / _BUNDLE, scratch=root / _SCRATCH)
        try:
            stage.bundle.mkdir()
            stage.scratch.mkdir()
            yield stage
            # Checked again: another process may have created the destination meanwhile.
            _check_destination(place, destination, overwrite=overwrite)
            with uninterrupted():
                if not overwrite or not os.path.lexists(place):
                    rename_folder(stage.bundle, place)  # fails where a folder that is not empty was created meanwhile
                else:
                    _replace(place, stage.bundle, root / _FORMER, lambda folder: _check_bundle(folder, destination))
                cleaning.close()  # before a signal that waited is raised
        except OSError as error:
            reason, former = error.strerror or str(error), root / _FORMER
            kept = f"is in {former}" if former.exists() and not place.exists() else "is untouched"
            raise OutputError(f"{destination} cannot be written: {reason}; its former content {kept}") from error
    finally:
        with uninterrupted():
            cleaning.close()


def _resolve(destination: Path) -> Path:
    """Return the real path of a destination.

    Raises:
        OutputError: no folder can have this path: it is too long, or in a loop of links.
    """
    try:
        place = Path(os.path.realpath(destination))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(place)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise OutputError(f"{destination} cannot be written to: {reason}; choose another path") from error
    return place


# The former bundle


def _check_destination(place: Path, destination: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(place):
        return
    if not overwrite:
        raise OutputError(
            f"{destination} exists; choose another path, or --overwrite to replace it when the new bundle is complete"
        )
    if not os.path.isfile(place / MANIFEST_NAME):
        raise OutputError(f"{destination} is not a bundle, so --overwrite does not replace it; choose another path")
    if os.path.islink(place):  # since its path was resolved
        raise OutputError(f"{destination} was exchanged with a link meanwhile; export again")
    if (mounts := _list_mounts(place)) or os.path.ismount(place):
        if mounts in ([], [place]):
            raise OutputError(f"{destination} is a mount point, which cannot be replaced; choose a folder inside it")
        raise OutputError(
            f"{destination} contains the mount point {mounts[-1]}, whose files --overwrite would delete; unmount it, "
            "or choose another path"
        )
    with contextlib.suppress(OSError):  # the current folder may have been deleted
        if Path(os.path.realpath(os.getcwd())).is_relative_to(place):
            raise OutputError(
                f"{destination} is the current folder or contains it, and would be moved away under it; run the "
                "command from another folder"
            )
    _check_bundle(place, destination)


def _check_bundle(folder: Path, destination: Path) -> None:
    """Check that a folder is a bundle and has no file of its own beside the bundle's.

    Args:
        destination: the folder's path as the user wrote it.

    Raises:
        OutputError: `bundle.json` is not a manifest of this format, or does not name a file of the folder.
    """
    try:
        with open_regular(folder / MANIFEST_NAME) as stream:
            named = set(decode_manifest(read_at_most(stream, MAX_MANIFEST_BYTES)).files)
    except (OSError, ManifestError) as error:
        raise OutputError(
            f"{destination} has a {MANIFEST_NAME} that this version cannot read (another program's, of another format, "
            "or damaged), so --overwrite does not replace it; choose another path, or delete the folder yourself"
        ) from error
    try:
        unnamed = list(itertools.islice(_list_unnamed(folder, named), _MAX_LISTED + 1))
    except OSError as error:
        raise OutputError(
            f"{destination} cannot be replaced: {error.filename} cannot be read: {error.strerror}; choose another path"
        ) from error
    if unnamed:
        listed = ", ".join(map(printable, unnamed[:_MAX_LISTED])) + (" …" if len(unnamed) > _MAX_LISTED else "")
        raise OutputError(
            f"{destination} holds files that are not the bundle's ({listed}), which --overwrite would delete; move "
            "them elsewhere, or choose another path"
        )


def _list_mounts(folder: Path) -> list[Path]:
    """Return the mount points at a folder and inside it, as far as the system tells (Linux).

    The device numbers do not show a folder of the same file system that is mounted there ("bind").
    """
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return []
    # The fifth field of proc_pid_mountinfo(5); the kernel escapes spaces, tabs, newlines and backslashes.
    points = (re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), line.split(b" ")[4]) for line in lines)
    return sorted({point for point in map(Path, map(os.fsdecode, points)) if point.is_relative_to(folder)})


def _list_unnamed(folder: Path, named: set[str]) -> Iterator[str]:
    """Yield the paths in a folder that are neither folders nor in `named`. A link is never entered."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in sorted([*files, *linked]):
            path = Path(parent, name).relative_to(folder).as_posix()
            if path not in named and path not in _EXPENDABLE:
                yield path


# Replacing


def _replace(place: Path, bundle: Path, former: Path, check: Callable[[Path], None]) -> None:
    """Put the new bundle in the place of an earlier one.

    Args:
        former: the path to which the earlier bundle is moved where the two cannot be exchanged in one step.
        check: takes the earlier bundle's folder; raises if it must not be deleted, as another folder may have been put
            there since the last check. Then both folders are moved back.
    """
    if _exchange(bundle, place):
        try:
            check(bundle)
        except OutputError:
            _exchange(bundle, place)
            raise
        return
    try:
        rename_folder(place, former)
        check(former)
        rename_folder(bundle, place)
    finally:
        # Also on a signal between the two renames, or right after either.
        if former.exists() and not place.exists():
            rename_folder(former, place)


# The kernel's names for "exchange the two": linux/fs.h and sys/stdio.h.
_RENAME_EXCHANGE = _RENAME_SWAP = 2
_AT_FDCWD = -100
# ENOSYS, EINVAL, ENOTSUP: the kernel or the file system cannot. EPERM: a container's filter rejects unknown calls.
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders of one file system in one step; return False where the system cannot.

    Raises:
        OSError: it can, but failed; both folders are where they were.
    """
    call = _find_exchange()
    if call is None:
        return False
    sys.audit("os.rename", os.fspath(one), os.fspath(other), -1, -1)  # as Python reports its own renames
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), os.fspath(other))


@functools.cache
def _find_exchange() -> Callable[[bytes, bytes], int] | None:
    """Return the C library's function that exchanges two paths and returns 0 or sets errno; None if it has none."""
    with contextlib.suppress(OSError, AttributeError):
        if sys.platform == "linux":
            renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
            return lambda one, other: renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE)
        if sys.platform == "darwin":
            renamex_np = ctypes.CDLL(None, use_errno=True).renamex_np
            return lambda one, other: renamex_np(one, other, _RENAME_SWAP)
    return None


def is_being_replaced(folder: str | os.PathLike[str]) -> bool:
    """Return whether a bundle is missing because it is about to be replaced, on a system without an exchange."""
    try:
        place = Path(os.path.realpath(folder))
    except (OSError, ValueError):
        return False
    return any(
        (root / _FORMER).exists() and _read_destination(root).name == place.name for root in _list_roots(place.parent)
    )


# Staging folders


def _open_root(place: Path, cleaning: contextlib.ExitStack) -> Path:
    """Make a staging folder beside `place`, locked until `cleaning` removes it.

    Raises:
        OutputError: the parent folder cannot be made or written to.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        root, lock = _make_root(place)
    except OSError as error:
        # A file where a folder should be: the system's error depends on how deep below it the folder would be.
        reason = "not a folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise OutputError(f"{place.parent} cannot be written to: {reason}") from error
    cleaning.callback(lock.close)
    cleaning.callback(_remove_root_unless_needed, root, place, lock)
    return root


def _remove_root_unless_needed(root: Path, place: Path, lock: LockedFile) -> None:
    """Remove a staging folder, unless it has the only copy of the former bundle."""
    if place.exists() or not (root / _FORMER).exists():
        _remove_root(root, lock)


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders that are empty; each is listed before its parent."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _make_name(destination: str) -> str:
    """Return a new name of a staging folder for a destination of this name."""
    digits = secrets.token_hex(4)
    return f".{destination[:32]}.export-{digits}{_check_digits(digits)}"


def _check_digits(digits: str) -> str:
    return hashlib.sha256(_SIGNATURE + digits.encode()).hexdigest()[:8]


def _make_root(place: Path) -> tuple[Path, LockedFile]:
    """Make a staging folder beside `place`; return it and its lock."""
    while True:
        root = place.with_name(_make_name(place.name))
        try:
            root.mkdir(0o700)
        except FileExistsError:
            continue
        try:
            lock = create_locked(root / _LOCK)
        except FileNotFoundError:
            continue  # another process took the empty folder for one that was left behind
        except OSError:
            root.rmdir()
            raise
        if lock is None:
            with contextlib.suppress(OSError):
                root.rmdir()
            continue
        try:
            os.write(lock.descriptor, _SIGNATURE + os.fsencode(place.name))
        except OSError:
            _remove_root(root, lock)
            raise
        return root, lock


def remove_abandoned_stages(parent: Path) -> None:
    """Remove the staging folders that killed processes of this user left in a folder.

    A former bundle whose replacement was interrupted is moved back first. Folders of running processes stay.
    """
    for root in _list_roots(parent):
        with contextlib.suppress(OSError):
            root.rmdir()  # killed before the first file: an empty folder
            continue
        with contextlib.suppress(OSError), claim(root / _LOCK) as abandoned:
            if abandoned is not None and _is_ours(root):
                former, destination = root / _FORMER, _read_destination(root)
                if former.exists() and not os.path.lexists(destination):
                    rename_folder(former, destination)
                _remove_root(root, abandoned)


def find_abandoned_stages(parent: Path) -> list[Abandoned]:
    """Return the staging folders that `remove_abandoned_stages` would remove, without empty ones."""
    found = []
    for root in _list_roots(parent):
        with claim(root / _LOCK) as abandoned:
            if abandoned is not None and _is_ours(root):
                destination = _read_destination(root)
                holds_former = (root / _FORMER).exists() and not os.path.lexists(destination)
                found.append(Abandoned(root, destination, holds_former))
    return found


def _list_roots(parent: Path) -> list[Path]:
    """Return the folders whose names `_make_name` has made."""
    return [
        path
        for path in list_matching(parent, _ROOT)
        if (found := _ROOT.fullmatch(path.name))
        and found[2] == _check_digits(found[1])
        and os.path.isdir(path)
        and not os.path.islink(path)
    ]


def _is_ours(root: Path) -> bool:
    """Return whether a folder is this user's, contains only entries that `staged` makes, and is signed.

    A process may have been killed before it signed the lock, which then is the only entry.
    """
    entries, lock = set(os.listdir(root)), _read_lock(root)
    signed = lock.startswith(_SIGNATURE) or (entries == {_LOCK} and _SIGNATURE.startswith(lock))
    return is_own(os.lstat(root)) and signed and entries <= {_LOCK, _BUNDLE, _SCRATCH, _FORMER}


def _read_destination(root: Path) -> Path:
    """Return the path that a staging folder's bundle was meant for."""
    name = os.path.basename(os.fsdecode(_read_lock(root).removeprefix(_SIGNATURE)))
    # A process that was killed before it wrote the name had not moved anything yet.
    return root.parent / (name or root.name)


def _read_lock(root: Path) -> bytes:
    """Read the lock of a staging folder; b"" if it cannot be read."""
    try:
        with open_regular(root / _LOCK) as stream:
            return stream.read(4096)
    except OSError:
        return b""


def _make_removable(folder: Path) -> None:
    """Make folders that can be read but not written to writable, so that their entries can be removed.

    Links are not followed. A bundle with a folder that cannot be read is not replaced in the first place.
    """
    for parent, _, _ in os.walk(folder) if not os.path.islink(folder) else ():
        with contextlib.suppress(OSError):
            os.chmod(parent, 0o700)


def _remove_root(root: Path, lock: LockedFile) -> None:
    """Remove a staging folder, its lock last: while the lock is there, another process can finish the removal."""
    for name in (_BUNDLE, _SCRATCH, _FORMER):
        _make_removable(root / name)
        shutil.rmtree(root / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        if os.listdir(root) == [_LOCK]:
            lock.remove()
        root.rmdir()
    lock.close()
