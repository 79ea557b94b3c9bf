"""Validation of the JSON documents that commands print."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from latentrt.cli.schemas import make_schema


def validated(command: str, text: str) -> Any:
    """Return the document that a command printed, which is one and follows the command's schema."""
    document = json.loads(text, parse_constant=pytest.fail)
    jsonschema.validate(document, make_schema(command), jsonschema.Draft202012Validator)
    return document
