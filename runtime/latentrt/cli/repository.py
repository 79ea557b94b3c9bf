"""Names of repositories of the hub on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from latentrt.bundle.printable import quote
from latentrt.errors import RequestError
from latentrt.hub import HubPath, locate, parse_hub_path

__all__ = ["Location", "RepositoryName", "with_revision"]


class Location(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """A path, or a place on the hub; a path that exists comes first."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | HubPath:
        return value if isinstance(value, Path | HubPath) else locate(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete paths, as a shell does."""
        return click.Path().shell_complete(ctx, param, incomplete)


class RepositoryName(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """`owner/name`, also as `hf://owner/name@revision` or as an address from a browser."""

    name = "owner/name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> HubPath:
        if isinstance(value, HubPath):  # click may convert twice
            return value
        found = parse_hub_path(value)
        if found is None:
            self.fail(f"got {quote(value)}, expected a repository on the hub, OWNER/NAME", param, ctx)
        return replace(found, bare=False)


def with_revision(path: HubPath, revision: str | None) -> HubPath:
    """Return a repository with the revision of an option.

    Raises:
        RequestError: its name has another one already.
    """
    if revision is not None and path.revision not in (None, revision):
        raise RequestError(f"`revision`: got {quote(revision)} with {path}, expected one of the two")
    return path if revision is None else replace(path, revision=revision)
