"""Repositories of the Hugging Face hub: their names, and downloads and uploads of their files.

This is the only module that imports huggingface_hub, and only when a function is called: a run uses no network. Tokens
(`HF_TOKEN`, or those of `hf auth login`), the cache (`HF_HOME`), the address (`HF_ENDPOINT`) and offline mode
(`HF_HUB_OFFLINE`) are that library's.

No message contains text of the library or of the server, which may hold a token or a signed address.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from latentrt.bundle.digests import ByteProgress
from latentrt.bundle.printable import printable, quote
from latentrt.errors import HubError, LatentRTError, MissingExtraError, OutputError, RequestError
from latentrt.telemetry import opt_out

__all__ = [
    "HubPath",
    "RemoteFile",
    "Repository",
    "check_room",
    "find_origin",
    "locate",
    "open_repository",
    "parse_hub_path",
    "upload",
]

_SCHEME = "hf://"
_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile("[A-Za-z0-9_][A-Za-z0-9_./+-]{0,254}")
_COMMIT = re.compile("[0-9a-f]{40}")
_MAX_PATH_CHARACTERS = 2048
# The hub's other kinds of repositories, whose addresses begin with these words.
_OTHER_KINDS = {"datasets", "spaces", "kernels", "buckets"}
# A path that ends in one of these is a file, although a repository could have such a name.
_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".json", ".onnx", ".gguf", ".png", ".jpg", ".webp")
# HTTP allows visible ASCII in a token; another character would be quoted in an error of the library.
_TOKEN = re.compile(r"[!-~]+")
_ETAG = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_QUERY = re.compile(r"(?<=\S)\?[^\s'\"<>]*[^\s'\"<>:,.]")


@dataclass(frozen=True)
class HubPath:
    """A repository on the hub, or a file in one.

    Attributes:
        repository: `owner/name`.
        revision: a branch, a tag or a commit; None for the default branch.
        file: the path of a file or a folder in it; None for the whole repository.
        bare: whether it was written as `owner/name`, which could be a local path as well.

    Raises:
        RequestError: the revision is no name of git; the library makes a path of it.
    """

    repository: str
    revision: str | None = None
    file: str | None = None
    bare: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.revision is not None and not _is_revision(self.revision):
            raise RequestError(f"`revision`: got {quote(self.revision)}, expected a branch, a tag or a commit")

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{_SCHEME}{self.repository}{revision}{f'/{self.file}' if self.file else ''}"


@dataclass(frozen=True)
class RemoteFile:
    """A file's size in bytes and its SHA-256, which the hub knows of large files only."""

    size: int
    sha256: str | None = None


def parse_hub_path(text: str) -> HubPath | None:
    """Read the name of a repository or of a file in one.

    Args:
        text: `owner/name`, `owner/name@revision`, `hf://owner/name`, `hf://owner/name/file@revision`,
            `hf://owner/name@revision/file`, or the address of a repository or file from a browser.

    Returns:
        None if the text is none of these, and so is a local path.

    Raises:
        RequestError: it begins with `hf://` or with the hub's address, and names no repository of models.
    """
    if text.startswith(_SCHEME):
        return _parse_uri(text)
    if re.match("https?://", text):
        return _parse_address(text)
    name, _, revision = text.partition("@")
    if len(text) > _MAX_PATH_CHARACTERS or not _is_repository(name) or name.lower().endswith(_FILE_SUFFIXES):
        return None
    if "@" in text and not _is_revision(revision):
        return None
    return HubPath(name, revision or None, bare=True)


def locate(text: str) -> Path | HubPath:
    """Return the local path that a text names, or else the place on the hub: a path that exists comes first.

    Raises:
        RequestError: as for `parse_hub_path`.
    """
    if os.path.lexists(text):
        return Path(text)
    return parse_hub_path(text) or Path(text)


def _parse_uri(text: str) -> HubPath:
    path = text.removeprefix(_SCHEME).removeprefix("models/").rstrip("/")
    # The revision stands after the name or at the end; a branch may contain slashes in the second place only.
    found = re.fullmatch(r"([^/@]+/[^/@]+)(?:@([^/@]+))?(?:/([^@]+))?(?:@([^@]+))?", path)
    if found is None or (found[2] and found[4]):
        raise _malformed(text)
    return _check_path(text, HubPath(found[1], found[2] or found[4], found[3]))


def _parse_address(text: str) -> HubPath:
    address = urlsplit(text)
    own = urlsplit(os.environ.get("HF_ENDPOINT", ""))
    if (address.hostname or "").lower() not in _HOSTS and (address.netloc != own.netloc or not own.netloc):
        raise RequestError(
            f"got the address {printable(text[:200])}, expected one of huggingface.co; download the file, and pass "
            "its path"
        )
    owner, name, kind, revision, file = ([*map(unquote, address.path.strip("/").split("/", 4))] + [""] * 5)[:5]
    if kind not in ("", "tree", "blob", "resolve", "raw"):
        raise _malformed(text)
    return _check_path(text, HubPath(f"{owner}/{name}", revision or None, file or None))


def _check_path(text: str, path: HubPath) -> HubPath:
    unsafe = path.file is not None and not {"", ".", ".."}.isdisjoint(path.file.split("/"))
    if unsafe or len(text) > _MAX_PATH_CHARACTERS or not _is_repository(path.repository):
        raise _malformed(text)
    return path


def _is_repository(name: str) -> bool:
    return (
        _REPOSITORY.fullmatch(name) is not None
        and "--" not in name
        and ".." not in name
        and not name.endswith(".git")
        and name.partition("/")[0] not in _OTHER_KINDS
    )


def _is_revision(name: str) -> bool:
    return _REVISION.fullmatch(name) is not None and ".." not in name and "//" not in name


def _malformed(text: str) -> RequestError:
    return RequestError(
        f"got {printable(text[:200])}, expected a repository of models: hf://OWNER/NAME, hf://OWNER/NAME@REVISION or "
        "hf://OWNER/NAME/FILE.safetensors"
    )


def find_origin(folder: Path) -> tuple[str, str] | None:
    """Return the repository and the commit of a snapshot in a hub cache; None for any other folder."""
    snapshot = Path(os.path.realpath(folder))
    for place in (snapshot, *snapshot.parents):
        kind, _, name = place.parent.parent.name.partition("--")
        repository = name.replace("--", "/", 1)
        known = _COMMIT.fullmatch(place.name) and _is_repository(repository)  # old ones have no owner
        if place.parent.name == "snapshots" and kind == "models" and known:
            return repository, place.name
    return None


class Repository:
    """A repository at one commit.

    Attributes:
        name: `owner/name`.
        commit: the commit that the revision led to.
        files: the path of each file → its size and digest. Without a connection: those of the cache.
    """

    def __init__(self, name: str, commit: str, files: Mapping[str, RemoteFile]) -> None:
        self.name, self.commit, self.files = name, commit, files

    def count_missing_bytes(self, names: Iterable[str]) -> int:
        """Return the bytes of these files that are not in the cache."""
        return sum(self.files[name].size for name in set(names) if not self._is_cached(name))

    def _is_cached(self, name: str) -> bool:
        return isinstance(_import_hub().try_to_load_from_cache(self.name, name, revision=self.commit), str)

    def fetch(self, names: Iterable[str], progress: ByteProgress | None = None) -> Path:
        """Download files into the cache, unless it has them; return the folder of the snapshot.

        Args:
            names: paths in the repository, at least one.

        Raises:
            HubError: a download failed, or a file is longer than the hub had said.
            OutputError: the disk has no room for them.
        """
        hub, wanted = _import_hub(), dict.fromkeys(names)
        check_room(Path(hub.constants.HF_HUB_CACHE), self.count_missing_bytes(wanted), self.name)
        for name in wanted:
            place = Path(self._download(name, progress))
        return place.parents[name.count("/")]

    def fetch_into(self, folder: Path, names: Iterable[str], progress: ByteProgress | None = None) -> None:
        """Download files into a folder of the caller's, past the cache.

        Raises:
            HubError, OutputError: as for `fetch`.
        """
        wanted = dict.fromkeys(names)
        check_room(folder, sum(self.files[name].size for name in wanted), self.name)
        for name in wanted:
            self._download(name, progress, local_dir=folder)

    def _download(self, name: str, progress: ByteProgress | None, **options: Any) -> str:
        hub = _import_hub()
        meter = _make_meter(f"{self.name}/{name}", self.files[name].size, progress)
        with _translated(self.name, self.commit, f"{name} cannot be downloaded"), _refusing_paths(self.name):
            place: str = hub.hf_hub_download(
                self.name, name, revision=self.commit, tqdm_class=meter, library_name="latentrt", **options
            )
        return place


def open_repository(path: HubPath) -> Repository:
    """Find the commit of a revision and list its files.

    Raises:
        HubError: there is no such repository or revision, or it may not be read; or the hub cannot be reached and
            nothing of it is in the cache. For a bare name the message says that it is no local path either.
        MissingExtraError: huggingface_hub is not installed.
    """
    try:
        return _open(path)
    except HubError as error:
        if not path.bare:
            raise
        raise HubError(f"{path.repository} is no local folder or file, and as a repository: {error}") from error


def _open(path: HubPath) -> Repository:
    hub = _import_hub()
    api = hub.HfApi(library_name="latentrt")
    with _translated(path.repository, path.revision, "it cannot be looked up"):
        commit = api.resolve_revision(path.repository, revision=path.revision).resolved
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise _malformed_answer(path.repository)
        try:
            info = api.model_info(path.repository, revision=commit, files_metadata=True)
        except Exception as error:
            files = _list_cached(path.repository, commit)
            if not files or not _is_unreachable(error):
                raise
            return Repository(path.repository, commit, files)
        files = {
            each.rfilename: RemoteFile(each.size or 0, each.lfs.sha256 if each.lfs else None)
            for each in info.siblings or ()
        }
        # The library takes the types of the answer as they are.
        if not all(isinstance(name, str) and isinstance(file.size, int) for name, file in files.items()):
            raise _malformed_answer(path.repository)
    return Repository(path.repository, commit, files)


def _list_cached(repository: str, commit: str) -> dict[str, RemoteFile]:
    """Return the files of a commit that are in the cache."""
    hub = _import_hub()
    folder = Path(hub.constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots", commit)
    places = [place for place in folder.rglob("*") if place.is_file()]
    return {place.relative_to(folder).as_posix(): RemoteFile(place.stat().st_size) for place in places}


def upload(
    repository: str,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    private: bool,
    branch: str | None,
    check: Callable[[Collection[str]], None],
    bars: bool = False,
) -> tuple[str, str]:
    """Create a repository if there is none, and put files into it in one commit.

    Args:
        repository: `owner/name`.
        files: path in the repository → a file, or its content.
        private: of a new repository; an existing one keeps its visibility.
        branch: created if there is none; None for the default branch.
        check: takes the names of the existing files; raises if they may not be added to.
        bars: show the library's progress bars.

    Returns:
        The commit and its address.

    Raises:
        HubError: the token may not write there, or the upload failed. Nothing is visible then.
    """
    hub = _import_hub()
    api = hub.HfApi(library_name="latentrt")
    with _translated(repository, branch, "it cannot be written"), _progress_bars(shown=bars):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        check([each.rfilename for each in api.model_info(repository, revision=branch).siblings or ()])
        operations = [
            hub.CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        done = api.create_commit(repository, operations, commit_message=message, revision=branch)
    return done.oid, str(done.commit_url)


def check_room(folder: Path, needed: int, purpose: str) -> None:
    """Check that a disk has room for a download.

    Args:
        folder: where it is written; need not exist.
        needed: in bytes.

    Raises:
        OutputError: the disk has fewer bytes free.
    """
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(
            f"{purpose} needs {needed:,} bytes in {folder}, and the disk has {free:,} free; free some, or use another "
            "disk (HF_HOME is the cache of the hub)"
        )


# The library


def _import_hub() -> Any:
    """Import huggingface_hub, without its telemetry.

    Raises:
        MissingExtraError: it is not installed.
    """
    opt_out()
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "huggingface_hub", "hub", "use the Hugging Face hub") from error
    return huggingface_hub


def _make_meter(title: str, size: int, progress: ByteProgress | None) -> type:
    """Return a class in place of the library's progress bar, which also ends a download that is too long.

    A server may send more than it has announced, until the disk is full.
    """
    from tqdm.auto import tqdm

    class Meter(tqdm):  # type: ignore[misc]  # a class without types
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(disable=True)
            self.received = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.received += int(n or 0)  # negative where a download begins anew
            if self.received > size:
                raise HubError(f"{title} is longer than {size:,} bytes, its size in the listing; try again later")
            if progress is not None:
                progress(int(n or 0))
            return None

        # With these two, the library does not make a second bar for the bytes on the network, which may be fewer.
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_transfer_postfix_str(self, s: str = "", refresh: bool = True) -> None:
            pass

    return Meter


@contextlib.contextmanager
def _refusing_paths(repository: str) -> Iterator[None]:
    """Refuse files with malformed ETags or commits within the block.

    The library makes paths of both as they are, so that a server could have a file written anywhere (2.4.0).

    Raises:
        HubError: an answer has one.
    """
    from huggingface_hub import file_download

    with _patching:
        find = file_download.get_hf_file_metadata

        def find_checked(*arguments: Any, **options: Any) -> Any:
            found = find(*arguments, **options)
            for pattern, text in ((_ETAG, found.etag), (_COMMIT, found.commit_hash)):
                if text is not None and not pattern.fullmatch(text):
                    raise _malformed_answer(repository)
            return found

        file_download.get_hf_file_metadata = find_checked
        try:
            yield
        finally:
            file_download.get_hf_file_metadata = find


_patching = threading.Lock()


def _malformed_answer(repository: str) -> HubError:
    return HubError(f"{repository}: the answer is not one that the hub gives; check HF_ENDPOINT")


@contextlib.contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Hide the library's progress bars within the block, unless they are shown."""
    hub = _import_hub()
    if shown or hub.constants.HF_HUB_DISABLE_PROGRESS_BARS is False:  # the user's variable, which the library obeys
        yield
        return
    with hub.utils.disable_progress_bars():
        yield


def _is_unreachable(error: BaseException) -> bool:
    """Return whether an error says nothing about the repository: no connection, offline mode, or a failing server."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return bool(error.response.status_code >= 500)
    return isinstance(error, httpx2.TransportError | OfflineModeIsEnabled)


@contextlib.contextmanager
def _translated(repository: str, revision: str | None, failure: str) -> Iterator[None]:
    """Raise every failure of the library as an error of ours, and keep its log records from printing by themselves.

    Args:
        failure: the end of the sentence "OWNER/NAME: …" for a failure of no known kind.

    Raises:
        HubError: the library failed, by whatever exception.
        OutputError: it could not write.
    """
    logger = logging.getLogger("huggingface_hub")
    # The root's handlers remain: those of the command line escape text.
    handlers, logger.handlers = logger.handlers, [_HideQueries()]
    try:
        _check_token()
        yield
    except LatentRTError:
        raise
    except Exception as error:
        raise _explain(error, repository, revision, failure) from error
    finally:
        logger.handlers = handlers


class _HideQueries(logging.Handler):
    """Removes the queries of addresses from records before other handlers see them: they sign a download."""

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = _QUERY.sub("?…", record.getMessage()), ()


def _check_token() -> None:
    """Check the characters of the token; an error of the library below would quote it.

    Raises:
        HubError: it has a character that cannot be sent.
    """
    token = _import_hub().get_token()
    if token and not _TOKEN.fullmatch(token):
        raise HubError(
            "the token of HF_TOKEN, or of hf auth login, has characters that no token has (spaces or letters beyond "
            "ASCII); copy it again from https://huggingface.co/settings/tokens"
        )


def _explain(error: Exception, repository: str, revision: str | None, failure: str) -> LatentRTError:
    """Describe a failure of the library in words of our own."""
    import httpx2
    from huggingface_hub import constants, errors

    chain = list(_causes(error))
    found = next((each for each in chain if isinstance(each, errors.HfHubHTTPError)), None)
    page = f"{constants.ENDPOINT}/{repository}"
    if found is not None:
        return HubError(_explain_answer(found, repository, revision, failure, page))
    if any(isinstance(each, errors.OfflineModeIsEnabled) for each in chain) or constants.is_offline_mode():
        return HubError(
            f"{repository}{f'@{revision}' if revision else ''}: {failure}, offline mode is on and the cache, "
            f"{constants.HF_HUB_CACHE}, does not have it; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
        )
    for each in chain:
        if isinstance(each, httpx2.TimeoutException):
            return HubError(f"{repository}: {constants.ENDPOINT} does not answer in time; try again later")
        if isinstance(each, httpx2.RemoteProtocolError):
            return HubError(f"{repository}: {failure}, the connection ended early; try again")
        if isinstance(each, httpx2.TransportError):
            return HubError(
                f"{repository}: {constants.ENDPOINT} cannot be reached; check the connection and HF_ENDPOINT, or use "
                "the files in the cache: HF_HUB_OFFLINE=1"
            )
        if isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            return OutputError(f"{repository}: {failure}: {each.strerror}; check {constants.HF_HUB_CACHE}")
        if type(each) is OSError and each.errno is None:  # the library's own, of a file with another size
            return HubError(f"{repository}: {failure}, it does not have the size that the hub says; try again")
    return HubError(f"{repository}: {failure} ({type(error).__name__}); check HF_ENDPOINT, and try again")


def _explain_answer(error: Any, repository: str, revision: str | None, failure: str, page: str) -> str:
    from huggingface_hub import errors

    status: int = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository} is gated: accept its terms at {page}, and set HF_TOKEN to a token of that account "
            "(or run: hf auth login)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {quote(revision)}; the page {page} lists its branches and tags"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{repository}: {failure}, the hub no longer has it; try again"
    if status == 401 or isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"the hub has no repository {repository}, or it is private; check the name at {page}, or set HF_TOKEN to "
            "a token that may read it (or run: hf auth login)"
        )
    if status == 403:
        return f"{repository}: the token is not allowed to do this; use one with the right permission (HF_TOKEN)"
    if status == 429:
        return f"{repository}: the hub limits requests from this address; try again later, or set HF_TOKEN"
    return f"{repository}: {failure}, the hub answered with status {status}; try again later"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
