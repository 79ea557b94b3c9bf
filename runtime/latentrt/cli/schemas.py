"""The JSON documents of all commands (`--json`), and their JSON Schemas, which docs/cli-json has.

`python -m latentrt.cli.schemas docs/cli-json` writes the schemas.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["DOCUMENTS", "make_schema", "write_schemas"]

# command → the structs that it may print
DOCUMENTS: dict[str, tuple[str, ...]] = {
    "bench": ("latentrt.cli.bench:BenchDocument",),
    "build": ("latentrt_engines.cli.build:BuildDocument",),
    "compare": ("latentrt.cli.comparison:CompareDocument",),
    "completion": ("latentrt.cli.completion:CompletionDocument",),
    "config": ("latentrt.cli.config:ConfigDocument",),
    "demo": ("latentrt.cli.demo:DemoDocument",),
    "doctor": ("latentrt.cli.doctor:DoctorDocument",),
    "engines list": ("latentrt_engines.cli.documents:EnginesDocument",),
    "engines prune": ("latentrt_engines.cli.documents:PruneDocument",),
    "engines refit": ("latentrt_engines.cli.documents:RefitDocument",),
    "engines seal": ("latentrt_engines.cli.documents:SealDocument",),
    "engines show": ("latentrt.engines.record:EngineRecord",),
    "engines verify": ("latentrt_engines.cli.documents:VerifyEnginesDocument",),
    "engines why": ("latentrt_engines.cli.documents:WhyDocument",),
    "export": ("latentrt_export.command:ExportDocument",),
    "inspect": ("latentrt.cli.inspect:InspectDocument", "latentrt.images.metadata:ImageMetadata"),
    "plan": ("latentrt_engines.cli.documents:PlanDocument",),
    "pull": ("latentrt.cli.pull:PullDocument",),
    "push": ("latentrt.cli.push:PushDocument",),
    "run": ("latentrt.cli.run:RunDocument",),
    "samplers": ("latentrt.cli.samplers:SamplersDocument",),
    "schedule": ("latentrt.cli.schedule:ScheduleDocument",),
    "verify": ("latentrt.cli.verify:VerifyDocument",),
}


def make_schema(command: str) -> dict[str, Any]:
    """Return the JSON Schema of the document that a command prints."""
    structs = []
    for place in DOCUMENTS[command]:
        module, name = place.split(":")
        structs.append(getattr(importlib.import_module(module), name))
    schemas, components = msgspec.json.schema_components(structs)
    root = schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"latentrt {command} --json",
        **root,
        "$defs": dict(components),
    }


def write_schemas(folder: Path) -> None:
    """Write the schema of each command to a folder, as `engines-list.schema.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    for command in DOCUMENTS:
        text = json.dumps(make_schema(command), indent=2, sort_keys=True) + "\n"
        (folder / f"{command.replace(' ', '-')}.schema.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
