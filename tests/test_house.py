"""Rules for all packages that a program can check: imports, layers, public names, what `--help` imports."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import latentrt

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "latentrt": ROOT / "runtime",
    "latentrt_export": ROOT / "export",
    "latentrt_engines": ROOT / "engines",
    "sample": ROOT,
}
HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "safetensors", "scipy"}
ALLOWED = {
    "latentrt": {"latentrt", "numpy", "PIL", "click", "msgspec", "rich", "platformdirs", "onnxruntime", "openvino"}
    | {"cuda", "matplotlib", "tqdm", "huggingface_hub", "httpx2", "psutil", "pynvml"},
    "latentrt_export": {"latentrt", "latentrt_export", "numpy", "click", "msgspec", "rich", "onnxruntime"}
    | HEAVY - {"scipy"},
    "latentrt_engines": {"latentrt", "latentrt_engines", "numpy", "click", "msgspec", "rich", "filelock"},
    "sample": {"latentrt", "latentrt_export", "sample", "numpy", "PIL", "click", "rich", "scipy"}
    | {"torch", "diffusers", "transformers", "safetensors"},
}


def imports_of(package: str) -> Iterator[tuple[Path, str]]:
    for path in (PACKAGES[package] / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield path, node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_their_own_dependencies(package: str) -> None:
    strays = {
        (path.name, name)
        for path, name in imports_of(package)
        if name not in ALLOWED[package] | sys.stdlib_module_names
    }
    assert strays == set()


def test_the_hub_is_reached_from_one_module() -> None:
    """It imports the library within functions, so that nothing that a run imports can use the network."""
    found = {path.name for path, name in imports_of("latentrt") if name in {"huggingface_hub", "httpx2"}}
    assert found == {"hub.py"}
    tree = ast.parse((PACKAGES["latentrt"] / "latentrt" / "hub.py").read_text())
    named = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in named} <= {"latentrt", "__future__", *sys.stdlib_module_names}


def test_libraries_of_gpus_are_imported_in_one_place() -> None:
    importers = {path for package in PACKAGES for path, name in imports_of(package) if name in ("cuda", "pynvml")}
    assert importers == {ROOT / "runtime" / "latentrt" / "engines" / "gpu.py"}


def modules() -> list[str]:
    return [
        module.name
        for package, root in PACKAGES.items()
        for module in pkgutil.walk_packages([str(root / package)], f"{package}.")
    ]


@pytest.mark.parametrize("name", modules())
def test_public_names_exist_and_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__ or name.count(".") == 1
    for key in getattr(module, "__all__", ()):
        value = getattr(module, key)
        if isinstance(value, type) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{key} has no docstring"


def test_every_public_name_can_be_imported() -> None:
    assert sorted(latentrt.__all__) == sorted([*latentrt._HOMES, "__version__"])
    assert all(getattr(latentrt, name) is not None for name in latentrt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        latentrt.Pipelin  # noqa: B018


def test_public_names_are_listed_before_they_are_loaded() -> None:
    """`dir`, tab completion and `help` show them, and the import alone loads nothing heavy."""
    code = """
import sys
import latentrt
heavy = {"numpy", "PIL", "msgspec", "click", "tqdm", "asyncio"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert dir(latentrt) == sorted(latentrt.__all__)
import rlcompleter
matches = rlcompleter.Completer({"latentrt": latentrt}).attr_matches("latentrt.Pi")
assert [match.rstrip("()") for match in matches] == ["latentrt.Pipeline"], matches
import pydoc
text = pydoc.render_doc(latentrt, renderer=pydoc.plaintext)
assert all(name in text for name in latentrt.__all__ if name != "__version__")
assert "class Pipeline" in text and "Pipeline.load(" in text
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_diffusers_say_what_to_use() -> None:
    with pytest.raises(AttributeError, match=r"Pipeline\.load"):
        latentrt.StableDiffusionPipeline  # noqa: B018
    with pytest.raises(ImportError, match=r"Pipeline\.load"):
        from latentrt import AutoPipelineForText2Image  # noqa: F401
    with pytest.raises(ImportError, match="sampler='euler_a'"):
        from latentrt import EulerDiscreteScheduler  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'Pipelin'"):
        from latentrt import Pipelin  # noqa: F401
    assert not hasattr(latentrt, "StableDiffusionPipeline")


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["run"],
        ["demo"],
        ["bench"],
        ["doctor"],
        ["compare"],
        ["inspect"],
        ["verify"],
        ["export"],
        ["pull"],
        ["push"],
        ["build"],
        ["plan"],
        ["engines"],
        ["engines", "why"],
        ["config"],
        ["completion"],
        ["samplers"],
        ["schedule"],
    ],
)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\nfrom latentrt.cli.main import main\n"
        f"try:\n    main({[*command, '--help']!r})\nexcept SystemExit as end:\n    assert end.code in (0, None)\n"
        "print('loaded', sorted({'numpy', 'onnxruntime', 'PIL', 'torch', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage: latentrt" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_the_main_help_loads_the_command_line_alone() -> None:
    """Its time is that of an interpreter with click."""
    code = (
        "import sys\nfrom latentrt.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code in (0, None)\n"
        "own = {name for name in sys.modules if name.startswith('latentrt.') and not name.startswith('latentrt.cli')}\n"
        "print(sorted(own))\nprint(sorted({'msgspec', 'rich', 'platformdirs', 'tomllib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own, others = map(ast.literal_eval, done.stdout.splitlines()[-2:])
    assert others == []
    assert set(own) <= {
        "latentrt.bundle",
        "latentrt.bundle.interrupts",
        "latentrt.bundle.printable",
        "latentrt.errors",
    }


def test_no_file_has_a_generic_name() -> None:
    names = {path.stem for package, root in PACKAGES.items() for path in (root / package).rglob("*.py")}
    assert not names & {"utils", "helpers", "common", "misc", "base"}


# The runtime's layers, the lowest first: a module imports from its own layer and from those below it.
LAYERS = (
    ("errors", "telemetry", "timings", "migration", "hub", "bundle", "worker_process"),
    ("engines",),
    ("backends",),
    ("sampling", "text", "decode", "images"),
    ("families", "request", "resolve"),
    ("pipeline", "result", "refinement", "progress_bar", "batch"),
    ("cli",),
)
LAYER_OF = {name: layer for layer, names in enumerate(LAYERS) for name in names}


def imported_names(path: Path) -> Iterator[str]:
    """Yield the first name below `latentrt` of each import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("latentrt."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "latentrt":
            parts = (node.module or "").split(".")
            yield from parts[1:2] or [alias.name for alias in node.names]


def runtime_modules() -> list[Path]:
    return sorted((ROOT / "runtime" / "latentrt").rglob("*.py"))


def test_layers_point_down() -> None:
    """Imports inside functions and for types count as well."""
    folder, found = ROOT / "runtime" / "latentrt", set()
    for path in runtime_modules():
        name = path.relative_to(folder).as_posix()
        top = name.split("/")[0].removesuffix(".py")
        if top in ("__init__", "__main__"):
            continue  # the public names, and the command line
        assert top in LAYER_OF, f"{name} is in no layer"
        found |= {
            (name, imported)
            for imported in imported_names(path)
            if imported != "__version__" and LAYER_OF[imported] > LAYER_OF[top]
        }
    assert found == set()


# What only a family may know: names of one kind of model's components and inputs.
MODEL_WORDS = ("encoder_hidden_states", "unet", "text_encoder")


def test_only_families_know_a_model() -> None:
    """Nor do comments, docstrings and messages outside `families/` name a model's parts."""
    folder = ROOT / "runtime" / "latentrt"
    found = {
        path.relative_to(folder).as_posix()
        for path in runtime_modules()
        if not path.is_relative_to(folder / "families") and any(word in path.read_text() for word in MODEL_WORDS)
    }
    assert found == set()


def test_a_family_is_found_by_the_names_that_only_it_may_know() -> None:
    """Without this check the test above would pass with any words."""
    known = "".join(path.read_text() for path in (ROOT / "runtime" / "latentrt" / "families").glob("*.py"))
    assert all(word in known for word in MODEL_WORDS)


# The command line prints through these modules alone, which escape everything (`latentrt.cli.output`).
OUTPUT = ("runtime/latentrt/cli/output.py", "runtime/latentrt/cli/console.py")
PRINTS = (
    *("click.echo", "click.secho", "click.style", "click.progressbar", "print", "traceback.print_exc"),
    *("sys.stdout", "sys.stderr", "logging.StreamHandler", "logging.basicConfig"),
    *("rich.print", "rich.console.Console", "rich.progress.TextColumn", "rich.text.Text", "rich.markup"),
)


def names_used(path: Path) -> Iterator[str]:
    """Yield the dotted names that a module imports or uses, such as `click.echo`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id


def test_the_command_line_prints_through_one_place() -> None:
    folders = [root / package for package, root in PACKAGES.items() if package != "sample"]
    found = {
        (name, used)
        for folder in folders
        for path in folder.rglob("*.py")
        if (name := path.relative_to(ROOT).as_posix()) not in OUTPUT
        for used in names_used(path)
        if used in PRINTS
    }
    # The result of a worker; and whether a terminal is there for tqdm's bar.
    assert found <= {(f"runtime/latentrt/{name}.py", "sys.stderr") for name in ("worker_process", "progress_bar")}
    assert {"click.echo", "rich.text.Text"} <= {used for name in OUTPUT for used in names_used(ROOT / name)}


def test_files_and_folders_are_renamed_in_one_place() -> None:
    """Windows renames none that is open, which a virus scanner may keep for a moment (`latentrt.bundle.renames`)."""
    found = {
        (path.relative_to(ROOT).as_posix(), ast.unparse(node.func))
        for package, root in PACKAGES.items()
        if package != "sample"
        for path in (root / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        # A path's `rename` takes the target alone.
        and (
            ast.unparse(node.func) in ("os.rename", "os.replace")
            or (node.func.attr == "rename" and len(node.args) == 1)
        )
    }
    assert {name for name, _ in found} == {"runtime/latentrt/bundle/renames.py"}


# What is read whole: files of the package and of the system, and those that the same process has just written.
READ_WHOLE = {
    "runtime/latentrt/backends/cuda/device_loop.py",
    "runtime/latentrt/bundle/staging.py",
    "runtime/latentrt/telemetry.py",
    "runtime/latentrt/worker_process.py",
    "export/latentrt_export/checkpoints/tokenizer.py",
    "export/latentrt_export/worker.py",
    "export/latentrt_export/write.py",
}


def test_files_are_read_with_a_bound() -> None:
    """A file of unknown origin may be larger than the memory (`latentrt.bundle.digests.read_at_most`)."""
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("latentrt", "latentrt_export", "latentrt_engines")
        for path in (PACKAGES[package] / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in {"read_bytes", "read_text"} or (node.func.attr == "read" and not node.args)
    }
    assert found == READ_WHOLE


# Their types are built from the classes of Python alone, for which msgspec stores nothing in the class; and those of a
# decoder, which describes them when it is made.
_CONVERT = {"sampling/samplers/options.py", "bundle/strict_json.py"}


def names_called(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


_DECODERS = {
    "latentrt": {
        "bundle/digest_cache.py",
        "bundle/export_report.py",
        "bundle/manifest.py",
        "bundle/safetensors_header.py",
        "cli/bench_messages.py",
        "cli/bench_worker.py",
        "engines/store.py",
        "images/metadata.py",
        "text/tokenizer_json.py",
    },
    "latentrt_export": {"worker.py"},
    "latentrt_engines": {"cache.py", "worker.py"},
}


@pytest.mark.parametrize("package", _DECODERS)
def test_decoders_are_made_at_import(package: str) -> None:
    """msgspec describes a class at its first use, which ended the process where several threads did so at once."""
    folder, strays, made = PACKAGES[package] / package, set(), set()
    for path in folder.rglob("*.py"):
        name, tree = path.relative_to(folder).as_posix(), ast.parse(path.read_text())
        strays |= {(name, each) for each in names_called(tree) & {"msgspec.json.decode"}}
        if name in _CONVERT:
            continue
        strays |= {(name, each) for each in names_called(tree) & {"msgspec.convert"}}
        decoders = {"StrictDecoder", "msgspec.json.Decoder"}
        made |= {name} if names_called(tree) & decoders else set()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                strays |= {(name, each) for each in names_called(node) & decoders}
    assert strays == set()
    assert made == _DECODERS[package]


def test_threads_may_decode_for_the_first_time_at_once() -> None:
    code = """
import threading
from latentrt.bundle.manifest import decode_manifest
from latentrt.bundle.sample import bundle_path
from latentrt.text.tokenizer import Tokenizer

data = [(bundle_path() / name).read_bytes() for name in ("bundle.json", "tokenizer/tokenizer.json")]
start, done = threading.Barrier(8), []

def decode():
    start.wait()
    manifest = decode_manifest(data[0])
    done.append(Tokenizer.from_json(data[1], manifest.tokenizers["text_encoder"]))

threads = [threading.Thread(target=decode) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(done) == 8
"""
    subprocess.run([sys.executable, "-c", code], check=True)
