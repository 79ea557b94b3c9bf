"""The card of a bundle's repository: what the hub reads in it, and that text of a bundle is neither YAML nor markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.card import write_card
from tests.runtime.small_bundle import edit_manifest, write_bundle


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the entries and the text of a card; each entry is a key and a JSON value, which is YAML too."""
    _, head, text = write_card(Bundle.open(folder), "owner/name").split("---\n", 2)
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in head.splitlines())}, text


def test_entries(tmp_path: Path) -> None:
    entries, text = read_card(write_bundle(tmp_path))
    assert entries == {
        "library_name": "latentrt",
        "license": "openrail",
        "pipeline_tag": "text-to-image",
        "tags": ["latentrt", "onnx", "stable-diffusion-1", "inpainting"],
    }
    assert text.startswith("\n# name\n")
    assert Bundle.open(tmp_path).digest in text


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("MIT", {"license": "mit"}),
        ("unknown", {"license": "unknown"}),
        ("Stability AI Community", {"license": "other", "license_name": "stability-ai-community"}),
        ("see LICENSE", {"license": "other", "license_name": "see-license"}),
        ("\n---\nlicense: mit", {"license": "other", "license_name": "license-mit"}),
        ("許可", {"license": "other", "license_name": "unknown"}),
    ],
)
def test_licences_are_names_of_the_hub(tmp_path: Path, licence: str, expected: dict[str, str]) -> None:
    edit_manifest(write_bundle(tmp_path), lambda tree: tree["licence"].update(name=licence))
    entries, _ = read_card(tmp_path)
    assert {key: entries[key] for key in ("license", "license_name") if key in entries} == expected
    assert ("license_link" in entries) == ("license_name" in expected)


def test_text_of_a_bundle_stays_text(tmp_path: Path) -> None:
    hostile = "x`\n\n<script>alert(1)</script>[a](javascript:b)\x1b[31m"
    edit_manifest(write_bundle(tmp_path), lambda tree: tree.update(created_by=hostile))
    edit_manifest(tmp_path, lambda tree: tree["source"].update(name=hostile))
    _, text = read_card(tmp_path)
    assert "\x1b" not in text
    for line in text.splitlines():
        outside = line.split("`")[::2]
        assert not any("<script>" in part or "javascript" in part for part in outside)
