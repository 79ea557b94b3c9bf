"""Tables of the documentation that are made from the code, so that they cannot disagree with it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from docs.click_pages import common_options
from latentrt import errors
from latentrt.backends.execution_providers import PROVIDERS
from latentrt.cli.main import _SECTIONS as COMMAND_SECTIONS
from latentrt.cli.request_options import SPELLING
from latentrt.errors import LatentRTError, RequestError
from latentrt.request import OPTIONS
from latentrt.sampling import samplers

__all__ = [
    "command_sections",
    "error_table",
    "json_documents",
    "manifest_fields",
    "option_table",
    "provider_table",
    "root_page",
    "sampler_names",
    "write",
]

# The samplers that the other tools list, in their order and spelling.
OTHER_TOOLS = {
    "AUTOMATIC1111's web UI": (
        *("DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE", "Euler a"),
        *("Euler", "LMS", "Heun", "DPM2", "DPM2 a", "DPM fast", "DPM adaptive", "Restart", "DDIM", "DDIM CFG++"),
        *("PLMS", "UniPC", "LCM"),
    ),
    "ComfyUI": (
        *("euler", "euler_ancestral", "heun", "heunpp2", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast"),
        *("dpm_adaptive", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "ddpm"),
        *("lcm", "ipndm", "deis", "res_multistep", "sa_solver", "ddim", "uni_pc", "uni_pc_bh2"),
    ),
}

ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
ROOT_LINKS = {
    **ROOT_PAGES,
    **{f"docs/{name}.md": f"../{name}.md" for name in ("cpu", "measurements", "samplers")},
    "README.md": "../index.md",
}


def write(folder: Path) -> None:
    """Write every table to a folder, as Markdown; a file whose content stays the same is not touched."""
    folder.mkdir(exist_ok=True)
    manifest = json.loads((files("latentrt.bundle") / "bundle.schema.json").read_text())
    tables = {
        "commands": command_sections(),
        "common-options": _table(("option", ""), ((f"`{spelling}`", text) for spelling, text in common_options())),
        "errors": error_table(),
        "json": json_documents(Path(__file__).with_name("cli-json"), manifest),
        "manifest": manifest_fields(manifest),
        "options": option_table(),
        "providers": provider_table(),
        "samplers": sampler_names(),
    }
    root = Path(__file__).parents[1]
    tables |= {name.removesuffix(".md"): root_page(root / name) for name in ROOT_PAGES}
    for name, text in tables.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def command_sections() -> str:
    """Return a section for each heading of `latentrt --help`, with its commands in their order."""
    sections = []
    for heading, commands in COMMAND_SECTIONS.items():
        directives = [
            f".. click:: {place}\n   :prog: latentrt {name}\n   :nested: full\n"
            for name, (place, _) in commands.items()
        ]
        sections.append(f"## {heading}\n\n```{{eval-rst}}\n" + "\n".join(directives) + "```\n")
    return "\n".join(sections)


def root_page(path: Path) -> str:
    """Return a page of the repository's root with its links as seen from `docs/reference`."""
    return re.sub(
        r"\]\((?!https?:|#)(?P<file>[^)#]+)(?P<anchor>#[^)]*)?\)",
        lambda link: f"]({ROOT_LINKS.get(link['file'], '../../' + link['file'])}{link['anchor'] or ''})",
        path.read_text(),
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; `|` in a cell is escaped."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def sampler_names() -> str:
    """Return, for each other tool, its samplers and the name and options by which `--sampler` finds them."""
    sections = [
        "### diffusers\n\n"
        + _table(
            ("scheduler class", "here", "sampler"),
            (
                (f"`{each.class_name}`", "not run by the pipeline" if _is_special(each) else f"`{name}`", each.title)
                for name, each in samplers.SAMPLERS.items()
            ),
        )
    ]
    for tool, names in OTHER_TOOLS.items():
        rows = [(f"`{name}`", _our_name(name)) for name in names]
        sections.append(f"### {tool}\n\n" + _table(("there", "here"), rows))
    return "\n".join(sections)


def _is_special(sampler: type[samplers.Sampler]) -> bool:
    return sampler.inverse or bool(sampler.unsupported_reason)


def _our_name(name: str) -> str:
    try:
        choice = samplers.choose(name)
    except RequestError:
        return "not available"
    options = ", ".join(f"`{key}={value}`" for key, value in choice.options.items())
    return f"`{choice.name}`" + (f" with {options}" if options else "")


def option_table() -> str:
    """Return the options of a request: the keyword in Python, the option of `latentrt run`, the meaning."""
    return _table(
        ("Python", "command line", "meaning"),
        ((f"`{key}`", f"`{SPELLING[key]}`" if key in SPELLING else "", each.help) for key, each in OPTIONS.items()),
    )


def provider_table() -> str:
    """Return ONNX Runtime's execution providers: the short name for `--provider`, and how to get it."""
    return _table(
        ("`--provider`", "ONNX Runtime's name", "how to get it"),
        ((f"`{name}`", f"`{each.name}`", each.remedy) for name, each in PROVIDERS.items()),
    )


def error_table() -> str:
    """Return the classes of errors with their exit codes, each below its base class."""
    return _table(
        ("class", "exit code", "meaning"),
        (
            (f"{'　' * depth}`{each.__name__}`", str(each.exit_code), _summary(each))
            for depth, each in _walk(LatentRTError)
        ),
    )


def _walk(error: type[LatentRTError], depth: int = 0) -> Iterator[tuple[int, type[LatentRTError]]]:
    yield depth, error
    for each in error.__subclasses__():
        if each.__module__ == errors.__name__:
            yield from _walk(each, depth + 1)


def _summary(item: type) -> str:
    """Return the first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(item) or "").split("\n\n")[0].split())


def manifest_fields(schema: Mapping[str, Any]) -> str:
    """Return a section for each record of the manifest's schema: its description, and its fields."""
    return "\n".join(_record_section(name, record) for name, record in schema["$defs"].items())


def json_documents(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Return a section for each command: the fields of its JSON document, and its schema in `folder` to download.

    Args:
        folder: the schemas of the documents.
        manifest: that of a bundle's manifest, whose records the page of the bundle format describes.
    """
    elsewhere, shown, sections = set(manifest["$defs"]), set[str](), []
    for path in sorted(folder.glob("*.schema.json")):
        schema = json.loads(path.read_text())
        roots = [each["$ref"].rsplit("/", 1)[1] for each in schema.get("anyOf", [schema])]
        sections.append(f"## {schema['title']}\n\nSchema: {{download}}`{path.name} </cli-json/{path.name}>`\n")
        for root in roots:
            text, meanings = _describe(schema["$defs"][root])
            # The heading says so already.
            text = re.sub(r"^(What|The (document|output) of) `latentrt [a-z ]+ --json`( prints)?\.", "", text)
            sections.append(f"{text}\n\n{_field_table(schema['$defs'][root], meanings, elsewhere)}")
        # A record of several documents has a section below the first.
        nested = [name for name in schema["$defs"] if name not in {*roots, *elsewhere, *shown}]
        sections += [_record_section(name, schema["$defs"][name], elsewhere) for name in nested]
        shown.update(nested)
    return "\n".join(sections)


def _record_section(name: str, record: Mapping[str, Any], elsewhere: Collection[str] = ()) -> str:
    text, meanings = _describe(record)
    return f"### {name}\n\n{text}\n\n{_field_table(record, meanings, elsewhere)}"


def _describe(record: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Return the description of a record, and the meaning of each field, which its `Attributes:` section has."""
    described = re.sub(r"\bNone\b", "`null`", inspect.cleandoc(f"{record.get('description', '')}"))
    text, _, attributes = described.partition("\n\nAttributes:\n")
    name = "|".join(map(re.escape, record.get("properties", {}))) or "$^"
    # "name: meaning.", where a line may have several, and a meaning several names.
    parts = re.split(rf"(?:^|(?<=\.)|\n)\s*((?:{name})(?:, (?:{name}))*): ", attributes)
    meanings = {
        each: " ".join(meaning.split()).removesuffix(".")
        for names, meaning in zip(parts[1::2], parts[2::2], strict=True)
        for each in names.split(", ")
    }
    return text, meanings


def _field_table(record: Mapping[str, Any], meanings: Mapping[str, str], elsewhere: Collection[str]) -> str:
    required = record.get("required", [])
    rows = [
        (
            f"`{key}`",
            _type_of(value, elsewhere),
            "yes" if key in required else f"no: `{json.dumps(value.get('default'))}`",
            meanings.get(key, ""),
        )
        for key, value in record.get("properties", {}).items()
    ]
    columns = 4 if meanings else 3
    head = ("field", "type", "required", "meaning")[:columns]
    return _table(head, (row[:columns] for row in rows)) if rows else ""


def _type_of(schema: Mapping[str, Any], elsewhere: Collection[str] = ()) -> str:
    """Return a type in words; a record links to its section of this page or, `elsewhere`, the bundle's."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}]({'bundle.md' if name in elsewhere else ''}#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type_of(each, elsewhere) for each in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(each)}`" for each in schema["enum"])
    kind = schema.get("type", "any JSON value")
    if kind == "array" and "prefixItems" in schema:
        types = [_type_of(each, elsewhere) for each in schema["prefixItems"]]
        return f"list of {len(types)}: {', '.join(types)}"
    if kind == "array" and schema.get("items"):
        return f"list of {_type_of(schema['items'], elsewhere)}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object: name → {_type_of(schema['additionalProperties'], elsewhere)}"
    words = {"integer": "whole number", "string": "text", "boolean": "`true` or `false`", "null": "`null`"}
    bounds = [
        text.format(schema[key])
        for key, text in (
            ("minimum", "at least {:,}"),
            ("maximum", "at most {:,}"),
            ("maxLength", "at most {:,} characters"),
        )
        if key in schema
    ]
    return ", ".join([words.get(kind, str(kind)), *bounds])
