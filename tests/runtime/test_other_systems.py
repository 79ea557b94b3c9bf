"""The runtime where Linux's modules, functions and folders are missing (`tests.pretend_windows`)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from latentrt.bundle.sample import bundle_path
from tests.pretend_windows import run_script

PACKAGES = Path(__file__).parents[2]

IMPORT_ALL = """
import importlib, pkgutil
package = importlib.import_module(PACKAGE)
names = [module.name for module in pkgutil.walk_packages(package.__path__, f"{PACKAGE}.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""


def test_every_module_can_be_imported(tmp_path: Path) -> None:
    assert int(run_script(IMPORT_ALL.replace("PACKAGE", "'latentrt'", 2), tmp_path / "home")) > 100


GENERATE = """
import sys
from pathlib import Path
import numpy as np
from latentrt import Pipeline
from latentrt.cli.main import main

def run(*arguments):
    try:
        main([*arguments])
    except SystemExit as end:
        assert not end.code, (arguments, end.code)

result = Pipeline.load(device="cpu", threads=1)("a red circle", seed=7, num_inference_steps=2)
np.save("image.npy", np.asarray(result.images[0]))
result.save("image.png")
run("verify", BUNDLE)
run("inspect", "image.png")
run("run", BUNDLE, "красный круг", "--device", "cpu", "--threads", "1", "--steps", "1", "--seed", "7", "-o", "круг.png")
assert Path("круг.png").stat().st_size
print(sorted(path.name for path in Path(".").iterdir()))
"""


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "cp437", "ascii"])
def test_an_image_is_generated_and_saved(tmp_path: Path, encoding: str) -> None:
    """On consoles of other encodings too."""
    import numpy as np

    from latentrt import Pipeline

    script = GENERATE.replace("BUNDLE", repr(str(bundle_path())))
    output = run_script(script, tmp_path / "home", encoding=encoding)
    expected = Pipeline.load(device="cpu", threads=1)("a red circle", seed=7, num_inference_steps=2).images[0]
    np.testing.assert_array_equal(np.load(tmp_path / "home" / "image.npy"), np.asarray(expected))
    assert "a red circle" in output
    assert (tmp_path / "home" / "круг.png").exists()
    assert not list((tmp_path / "home").rglob("*draft*")), "nothing is left behind"


LOCKS = """
import os
from pathlib import Path
from latentrt.bundle.atomic_file import find_abandoned_drafts, remove_abandoned_drafts, write_atomically
from latentrt.bundle.file_lock import FIRST_BYTE, claim, create_locked
import msvcrt

folder = Path("folder")
folder.mkdir()
held = create_locked(folder / f".cat.png.{'0' * 16}.latentrt-draft")
assert find_abandoned_drafts(folder) == []
held.close()
assert find_abandoned_drafts(folder) == [held.path]
remove_abandoned_drafts(folder)
assert list(folder.iterdir()) == []

# A lock of the filelock package.
descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
with claim(folder / "lock", FIRST_BYTE) as found:
    assert found is None
os.close(descriptor)
with claim(folder / "lock", FIRST_BYTE) as found:
    assert found is not None
(folder / "lock").unlink()

# A link is not followed, although there is no flag for that.
(folder / "file").write_bytes(b"")
(folder / "link").symlink_to("file")
with claim(folder / "link") as found:
    assert found is None

# A reader has the target open for a moment.
from latentrt.bundle import renames
(folder / "image.png").write_bytes(b"earlier")
reader, pauses = open(folder / "image.png", "rb"), []
renames.time.sleep = lambda seconds: pauses.append(seconds) or (len(pauses) == 3 and reader.close())
write_atomically(folder / "image.png", b"new")
assert (folder / "image.png").read_bytes() == b"new" and len(pauses) == 3

# And one that stays.
renames._PATIENCE_SECONDS = 0.0
with open(folder / "image.png", "rb"):
    try:
        write_atomically(folder / "image.png", b"newer")
    except PermissionError as error:
        assert "another program" in error.strerror and error.filename.endswith("image.png")
    else:
        raise AssertionError
assert (folder / "image.png").read_bytes() == b"new"

# Another process took the closed draft for one that was left behind, before it was renamed.
replace, taken = os.replace, []
def be_taken(source, target):
    if not taken:
        taken.append(source)
        os.unlink(source)
    return replace(source, target)
os.replace = be_taken
write_atomically(folder / "image.png", b"newest")
assert (folder / "image.png").read_bytes() == b"newest" and taken
assert sorted(path.name for path in folder.iterdir()) == ["file", "image.png", "link"]
"""


def test_locks_and_renames(tmp_path: Path) -> None:
    run_script(LOCKS, tmp_path / "home")


STAGING = """
import shutil
from pathlib import Path
from latentrt.bundle.file_lock import create_locked
from latentrt.bundle import renames, staging
from latentrt.bundle.staging import find_abandoned_stages, remove_abandoned_stages, staged
from latentrt.errors import OutputError

renames._PATIENCE_SECONDS = 0.0
place = Path("bundle")

def write(**options):
    with staged(place, **options) as stage:
        shutil.copytree(BUNDLE, stage.bundle, dirs_exist_ok=True)

write(overwrite=False)
write(overwrite=True)
assert [path.name for path in Path(".").glob("*bundle*")] == ["bundle"]

# A run has loaded the earlier one.
with open(place / "bundle.json", "rb"):
    try:
        write(overwrite=True)
    except OutputError as error:
        assert "another program" in str(error) and "is untouched" in str(error), error
    else:
        raise AssertionError
assert [path.name for path in Path(".").glob("*bundle*")] == ["bundle"]

# A process was killed between the two renames.
root, lock = staging._make_root(place.absolute())
place.rename(root / "former")
lock.close()
(found,) = find_abandoned_stages(Path("."))
assert found.holds_former
remove_abandoned_stages(Path("."))
assert [path.name for path in Path(".").glob("*bundle*")] == ["bundle"]
"""


def test_a_bundle_is_written_and_replaced(tmp_path: Path) -> None:
    run_script(STAGING.replace("BUNDLE", repr(str(bundle_path()))), tmp_path / "home")


CACHE = """
import os
from pathlib import Path
from latentrt.bundle.digest_cache import DigestCache
from latentrt.bundle.user_cache import cache_root, open_own, private_folder, write_own

place = Path.home() / "AppData" / "latentrt" / "Cache"
assert cache_root() == place, cache_root()
folder = private_folder("compiled")
assert folder == place / "compiled"
write_own(folder / "file", b"data")
with open_own(folder / "file") as stream:
    assert stream.read() == b"data"
(folder / "link").symlink_to("file")

os.environ["LATENTRT_CACHE"] = str(Path.home() / "mine")
assert private_folder("compiled") == Path.home() / "mine" / "compiled"

# Where others may write, also by way of a junction, and the profile itself.
elsewhere = Path(ELSEWHERE)
elsewhere.mkdir()
(Path.home() / "junction").symlink_to(elsewhere)
for named in (elsewhere / "cache", Path.home() / "junction" / "cache", Path.home()):
    os.environ["LATENTRT_CACHE"] = str(named)
    assert private_folder("compiled") is None, named

# Its ctime is the time of creation there, so that a changed file could have the state of a hashed one.
del os.environ["LATENTRT_CACHE"]
found = os.stat(BUNDLE)
DigestCache().put(found, "0" * 64, 1 << 62)
assert DigestCache().get(found) is None
"""


def test_the_cache_is_in_the_profile(tmp_path: Path) -> None:
    script = CACHE.replace("ELSEWHERE", repr(str(tmp_path / "elsewhere")))
    run_script(script.replace("BUNDLE", repr(str(bundle_path() / "unet" / "model.safetensors"))), tmp_path / "home")


MEMORY = """
from latentrt.worker_process import peak_bytes
import sys
from types import SimpleNamespace
sys.modules["psutil"] = SimpleNamespace(
    Process=lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=5))
)
assert peak_bytes() == 5
sys.modules["psutil"] = None
assert peak_bytes() == 0
"""


def test_peak_memory(tmp_path: Path) -> None:
    """By psutil, where it is installed."""
    run_script(MEMORY, tmp_path / "home")


@pytest.mark.parametrize("package", ["runtime", "export", "engines"])
def test_text_files_name_their_encoding(package: str) -> None:
    """Windows' default is not UTF-8. Files are read as bytes or with an encoding."""
    found = {
        f"{path.name}:{node.lineno}"
        for path in (PACKAGES / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and is_text_without_encoding(node)
    }
    assert found == set()


def is_text_without_encoding(call: ast.Call) -> bool:
    """Return whether a call reads or writes text in the system's encoding."""
    keywords = {keyword.arg for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    if isinstance(call.func, ast.Attribute) and call.func.attr in {"read_text", "write_text"}:
        return ast.unparse(call.func.value) != "formatter"  # click's, which writes no file
    constants = [each.value for each in call.args if isinstance(each, ast.Constant)]
    if isinstance(call.func, ast.Name) and call.func.id == "open":
        return not any(isinstance(each, str) and "b" in each for each in constants)
    opens = isinstance(call.func, ast.Attribute) and call.func.attr in {"open", "fdopen"}
    runs = isinstance(call.func, ast.Attribute) and call.func.attr in {"run", "Popen", "check_output"}
    return (runs and "text" in keywords) or (opens and bool({"r", "w", "a", "x", "r+", "w+"} & {*constants}))
