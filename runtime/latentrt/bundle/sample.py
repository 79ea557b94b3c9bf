"""The sample bundle, which ships with the package: a small Stable Diffusion model that generates coloured shapes."""

from __future__ import annotations

from pathlib import Path

__all__ = ["bundle_path"]


def bundle_path() -> Path:
    """Return the folder of the sample bundle, which `Pipeline.load()` opens by default."""
    return Path(__file__).parent.with_name("sample_bundle")
