"""Tables of the documentation that are made from the code, so that they cannot disagree with it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from docs.click_pages import common_options
from latentrt import errors
from latentrt.backends.execution_providers import PROVIDERS
from latentrt.cli.request_options import SPELLING
from latentrt.errors import LatentRTError, RequestError
from latentrt.request import OPTIONS
from latentrt.sampling import samplers

__all__ = [
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
    tables = {
        "common-options": _table(("option", ""), ((f"`{spelling}`", text) for spelling, text in common_options())),
        "errors": error_table(),
        "json": json_documents(Path(__file__).with_name("cli-json")),
        "manifest": manifest_fields(json.loads((files("latentrt.bundle") / "bundle.schema.json").read_text())),
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
    sections = []
    for name, record in schema["$defs"].items():
        described = inspect.cleandoc(f"{record.get('description', '')}")
        sections.append(f"### {name}\n\n{described}\n\n{_field_table(record, link=True)}")
    return "\n".join(sections)


def json_documents(folder: Path) -> str:
    """Return a section for each command: the fields of its JSON document, and its schema in `folder` to download."""
    sections = []
    for path in sorted(folder.glob("*.schema.json")):
        schema = json.loads(path.read_text())
        roots = [each["$ref"].rsplit("/", 1)[1] for each in schema.get("anyOf", [schema])]
        shown = [f"## {schema['title']}", f"Schema: {{download}}`{path.name} </cli-json/{path.name}>`"]
        for record in (schema["$defs"][root] for root in roots):
            text = inspect.cleandoc(f"{record.get('description', '')}").split("\n\nAttributes:")[0]
            shown += [text, _field_table(record, link=False)]
        sections.append("\n\n".join(shown))
    return "\n".join(sections)


def _field_table(record: Mapping[str, Any], *, link: bool) -> str:
    required = record.get("required", [])
    rows = [
        (f"`{key}`", _type_of(value, link), "yes" if key in required else f"no: `{json.dumps(value.get('default'))}`")
        for key, value in record.get("properties", {}).items()
    ]
    return _table(("field", "type", "required"), rows) if rows else ""


def _type_of(schema: Mapping[str, Any], link: bool = True) -> str:
    """Return a JSON Schema's type in words; `link` links a record to the section of its name."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})" if link else f"`{name}`"
    if "anyOf" in schema:
        return " or ".join(_type_of(each, link) for each in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(each)}`" for each in schema["enum"])
    kind = schema.get("type", "any JSON value")
    if kind == "array" and "prefixItems" in schema:
        return (
            f"list of {len(schema['prefixItems'])}: {', '.join(_type_of(each, link) for each in schema['prefixItems'])}"
        )
    if kind == "array" and schema.get("items"):
        return f"list of {_type_of(schema['items'], link)}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object: name → {_type_of(schema['additionalProperties'], link)}"
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
