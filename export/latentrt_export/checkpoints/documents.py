"""Which documents travel with the weights, and what licence do they state?"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["UNKNOWN", "find_documents", "stated_licence"]

UNKNOWN = "unknown"
_LICENCE_FILE = re.compile(r"(?i)licen[cs]e(\.(txt|md))?")
_MODEL_CARD = re.compile(r"(?i)(readme|model_card)\.md")
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)
_ENTRY = re.compile(r"(licen[cs]e|licen[cs]e_name):\s*['\"]?([^'\"#]+?)['\"]?\s*(#.*)?")


def find_documents(folder: Path) -> dict[str, Path]:
    """Licence text and model card, as far as they are there: the name they get in a bundle → file."""
    documents: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if _LICENCE_FILE.fullmatch(path.name) and path.is_file():
            documents.setdefault("LICENSE", path)
        elif _MODEL_CARD.fullmatch(path.name) and path.is_file():
            documents.setdefault("MODEL_CARD.md", path)
    return documents


def stated_licence(documents: dict[str, Path]) -> str:
    """The licence's name: as the model card's front matter states it, else `see LICENSE` or `unknown`."""
    entries = _front_matter(documents["MODEL_CARD.md"]) if "MODEL_CARD.md" in documents else {}
    stated = entries.get("license")
    if stated == "other":  # the hub's word for a licence that is not on its list; the name stands beside it
        stated = entries.get("license_name", stated)
    return stated or ("see LICENSE" if "LICENSE" in documents else UNKNOWN)


def _front_matter(card: Path) -> dict[str, str]:
    front = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    found = (_ENTRY.fullmatch(line) for line in front.group(1).splitlines()) if front else ()
    return {entry.group(1).replace("licence", "license"): entry.group(2) for entry in found if entry}
