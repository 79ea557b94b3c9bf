"""Makes a Linux process behave as on Windows, as far as latentrt can tell; run as a program, it then runs a script.

Gone are the modules and functions that Windows lacks and everything below /proc. Files that are open are neither
renamed nor removed, locks cover bytes, and `sys.platform` is `win32`. Other packages are imported before that: they
would look for libraries of Windows.

What stays: POSIX paths, modes of files, and `os.name`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import os
import pkgutil
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["run_script"]

# According to typeshed, https://github.com/python/typeshed/tree/main/stdlib, `sys.platform != "win32"`.
MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")
OF_OS = (
    *("O_CLOEXEC", "O_DIRECTORY", "O_DSYNC", "O_NDELAY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC", "O_TMPFILE"),
    *(
        "chown",
        "chroot",
        "fchdir",
        "fchown",
        "fork",
        "forkpty",
        "getegid",
        "geteuid",
        "getgid",
        "getgroups",
        "getlogin",
    ),
    *("getloadavg", "getpgid", "getpriority", "getuid", "killpg", "lchown", "lockf", "memfd_create", "mkfifo", "mknod"),
    *("nice", "pathconf", "posix_fadvise", "posix_fallocate", "posix_spawn", "pread", "preadv", "pwrite", "pwritev"),
    *("readv", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "sendfile", "setpgid", "setsid", "setuid"),
    *("statvfs", "sync", "sysconf", "uname", "wait", "wait3", "wait4", "writev"),
)
OF_SIGNAL = (
    *("SIGALRM", "SIGBUS", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP"),
    *("SIGUSR1", "SIGUSR2", "alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "sigwait"),
)
# Packages of which some are missing in the runtime's environment.
OTHERS = (
    *(
        "PIL.Image",
        "PIL.PngImagePlugin",
        "PIL.JpegImagePlugin",
        "PIL.WebPImagePlugin",
        "PIL.ImageDraw",
        "PIL.ImageFont",
    ),
    *("click", "msgspec", "numpy", "onnxruntime", "rich.console", "rich.live", "rich.progress", "rich.table", "tqdm"),
    *(
        "concurrent.futures",
        "logging",
        "platform",
        "shutil",
        "tempfile",
        "tqdm.auto",
        "unittest.mock",
        "urllib.request",
    ),
)


def run_script(script: str, folder: Path, *, others: tuple[str, ...] = (), encoding: str = "utf-8") -> str:
    """Run a script in a process that pretends, and return its output.

    Args:
        folder: the user's profile, and the current folder.
        others: further packages to import before; of latentrt's, all that their modules import, and not themselves.
        encoding: of the standard streams.
    """
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(script, encoding="utf-8")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("XDG_", "LATENTRT_"))}
    environment |= {"HOME": str(folder), "LOCALAPPDATA": str(folder / "AppData"), "ORT_DISABLE_TELEMETRY": "1"}
    environment |= {"PYTHONIOENCODING": encoding, "PYTHONWARNINGS": "error::EncodingWarning:latentrt"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-X", "warn_default_encoding", "-m", "tests.pretend_windows", "script.py", *others]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode(encoding)


def pretend(others: tuple[str, ...] = ()) -> None:
    """Make this process pretend, for the rest of its life."""
    for name in (*OTHERS, *others):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.split(".")[0]:
                raise
    for package in [importlib.import_module(name) for name in others if name.startswith("latentrt")]:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(found.name)
    for name in [name for name in sys.modules if name.split(".")[0].startswith("latentrt")]:
        del sys.modules[name]  # imported again, without what is missing
    modules: dict[str, Any] = sys.modules
    modules["msvcrt"] = _make_msvcrt()
    for name in MODULES:
        modules[name] = None  # an import of it raises ImportError
    for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    # What Python's own modules have found out already.
    vars(shutil).update(_use_fd_functions=False, _USE_CP_SENDFILE=False)
    vars(tempfile).update(TemporaryFile=tempfile.NamedTemporaryFile)
    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        setattr(os, name, _keep_open_files(getattr(os, name)))
    _hide_proc()
    for name in [name for name in modules if name.split(".")[0] == "platformdirs"]:
        del modules[name]  # it looks at the system when it is imported
    sys.platform = "win32"
    windows: Any = importlib.import_module("platformdirs.windows")
    windows.get_win_folder = windows.get_win_folder_from_env_vars  # and not a function of Windows


def _make_msvcrt() -> types.ModuleType:
    """Return a module that locks bytes, for one open file and not for a process, as Windows does."""

    def locking(descriptor: int, mode: int, count: int) -> None:
        start = os.lseek(descriptor, 0, os.SEEK_CUR)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, start, count, 0))
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    module = types.ModuleType("msvcrt")
    vars(module).update(LK_NBLCK=2, locking=locking)
    return module


def _keep_open_files(function: Callable[..., Any]) -> Callable[..., Any]:
    islink = os.path.islink

    def refuse_open(*paths: Any, **options: Any) -> Any:
        opened = _list_open_files()
        for path in paths:
            place = Path(os.path.abspath(path))
            if not islink(place) and any(each.is_relative_to(place) for each in opened):
                raise PermissionError(errno.EACCES, "The process cannot access the file", os.fspath(path))
        return function(*paths, **options)

    return refuse_open


_looking = threading.local()
_listdir, _readlink = os.listdir, os.readlink


def _list_open_files() -> set[Path]:
    """Return the files that this process has open or mapped."""
    opened = set()
    for number in _listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # of the listing itself
            opened.add(Path(_readlink(f"/proc/self/fd/{number}")))
    _looking.now = True
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
            return opened | {Path(line[line.index("/") :].rstrip()) for line in lines if "/" in line}
    finally:
        _looking.now = False


def _hide_proc() -> None:
    stat = os.stat

    def find(path: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
        return stat(path, *arguments, **options)

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith("/proc") and not getattr(_looking, "now", False):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(arguments[0]))

    os.stat = find
    sys.addaudithook(refuse)


if __name__ == "__main__":
    pretend(tuple(sys.argv[2:]))
    runpy.run_path(sys.argv[1], run_name="__main__")
