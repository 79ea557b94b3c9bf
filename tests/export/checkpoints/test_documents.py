"""The licence: from the model card, from its text, or unknown."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt_export.checkpoints.documents import find_documents, stated_licence


@pytest.mark.parametrize(
    ("front_matter", "licence"),
    [
        ("license: creativeml-openrail-m", "creativeml-openrail-m"),
        ('license: "openrail++"\ntags: [art]', "openrail++"),
        ("tags:\n- art\nlicense: mit   # as agreed", "mit"),
        ("licence: 'apache-2.0'", "apache-2.0"),
        ("license: other\nlicense_name: our-own-1.0", "our-own-1.0"),
        ("license: other", "other"),
        ("license: mit\r\ntags: x", "mit"),
    ],
)
def test_model_card(tmp_path: Path, front_matter: str, licence: str) -> None:
    (tmp_path / "README.md").write_bytes(f"---\n{front_matter}\n---\n# A model\nlicense: not this\n".encode())
    (tmp_path / "LICENSE").write_text("Text")
    documents = find_documents(tmp_path)
    assert stated_licence(documents) == licence
    assert set(documents) == {"LICENSE", "MODEL_CARD.md"}


@pytest.mark.parametrize(
    "card", [None, "# No front matter\nlicense: mit\n", "---\ntags: [a]\n---\n", "---\nlicense:\n"]
)
@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.md", "license.txt", "LICENCE"])
def test_licence_text_alone(tmp_path: Path, card: str | None, name: str) -> None:
    (tmp_path / name).write_text("Text")
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    documents = find_documents(tmp_path)
    assert stated_licence(documents) == "see LICENSE"
    assert documents["LICENSE"].name == name


def test_nowhere(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe not even text")
    assert stated_licence(find_documents(tmp_path)) == "unknown"


def test_a_folder_is_no_document(tmp_path: Path) -> None:
    (tmp_path / "license").mkdir()
    assert find_documents(tmp_path) == {}
