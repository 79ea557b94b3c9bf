"""The site builds without a warning, and every link inside it leads somewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.blocks import ROOT


class Page(HTMLParser):
    """The anchors of a page, and the addresses that it links and shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {found[name] or "" for name in ("id", "name") if name in found}
        # The head has links to itself that differ by the place of the site.
        if tag in ("a", "img", "script") or (tag == "link" and found.get("rel") == "stylesheet"):
            self.links |= {found[name] or "" for name in ("href", "src") if name in found}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site without the outputs of the notebooks, which `test_notebooks.py` runs."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "docs", str(folder)]
    environment = {**os.environ, "LATENTRT_DOCS_NOTEBOOKS": "off"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_every_link_leads_somewhere(pages: dict[Path, Page]) -> None:
    broken, checked = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            checked += 1
            anchors = pages[target].anchors if parts.fragment and target in pages else {unquote(parts.fragment)}
            if not target.exists() or unquote(parts.fragment) not in anchors:
                broken.append((path.name, link))
    assert broken == []
    assert checked > 1000


def test_links_out_of_the_site_are_secure(pages: dict[Path, Page]) -> None:
    """They are not followed, as the tests use no network."""
    schemes = {urlsplit(link).scheme for page in pages.values() for link in page.links}
    assert schemes <= {"", "https", "data"}


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    from latentrt.cli.main import _COMMANDS

    text = (site / "reference" / "cli.html").read_text()
    assert [name for name in _COMMANDS if f'id="latentrt-{name}"' not in text] == []
    assert "--guidance-scale" in text


def test_public_names_are_in_the_reference(site: Path) -> None:
    import latentrt

    text = (site / "reference" / "python.html").read_text() + (site / "reference" / "errors.html").read_text()
    missing = [name for name in latentrt.__all__ if not name.startswith("__") and f">{name}<" not in text]
    assert missing == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_of_the_root_pages_lead_somewhere(name: str) -> None:
    import re

    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text()):
        assert "://" in target or (ROOT / target).exists(), target
