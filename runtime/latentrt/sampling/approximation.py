"""Which work of the loop may be left out, at a price?

Nothing is, unless a request asks for it; what each costs is measured in docs/cpu.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from latentrt.bundle.manifest import Manifest
from latentrt.errors import RequestError

__all__ = ["EXACT", "Approximation", "Decoder", "plain"]

Decoder = Literal["full", "preview", "tiled"]
_MOST_REUSED = 50


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """What a run leaves out.

    Attributes:
        guidance_start, guidance_end: guidance is applied from this share of the rows to that one (Kynkäänniemi et al.
            2024, arXiv 2404.07724); outside of it the model is asked about the prompt alone, which is half the work.
            What belongs to the interval is decided as diffusers does for `control_guidance_start` and `_end`.
        deep_cache: every so many rows the denoiser is run whole, and the rows between take its deep features from
            there (DeepCache, Ma et al. 2023, arXiv 2312.00858, with its uniform interval N); 1 reuses nothing.
        decoder: `full`; `preview` for the tiny autoencoder's decoder; `tiled` for overlapped tiles
            (`latentrt.decode.tiles`) of pictures that are larger than the bundle's default, which cannot be decoded
            whole.
    """

    guidance_start: float = 0.0
    guidance_end: float = 1.0
    deep_cache: int = 1
    decoder: Decoder = "full"

    @property
    def changes_rows(self) -> bool:
        """Whether something is left out of the loop."""
        return (self.guidance_start, self.guidance_end, self.deep_cache) != (0, 1, 1)

    def guides(self, row: int, rows: int) -> bool:
        """Whether guidance, where there is any, is applied at a row."""
        return row / rows >= self.guidance_start and (row + 1) / rows <= self.guidance_end

    def reuses(self, row: int) -> bool:
        """Whether a row takes the deep features of an earlier one."""
        return row % self.deep_cache != 0

    def check(self, manifest: Manifest) -> None:
        """Refuse what is impossible, or what the bundle was not exported for.

        Raises:
            RequestError: saying what was found, what is possible, and what to do.
        """
        for name in ("guidance_start", "guidance_end"):
            _check_share(name, getattr(self, name))
        if self.guidance_start > self.guidance_end:
            raise RequestError(
                f"found guidance_start {self.guidance_start:g} behind guidance_end {self.guidance_end:g}, expected "
                "shares of the steps in their order"
            )
        interval = self.deep_cache
        if isinstance(interval, bool) or not isinstance(interval, int) or not 1 <= interval <= _MOST_REUSED:
            raise RequestError(f"deep_cache: found {interval!r}, expected a whole number from 1 to {_MOST_REUSED}")
        if interval > 1 and "shallow_body" not in manifest.components["unet"].parts:
            raise RequestError(
                f"found deep_cache {interval}, and this bundle's denoiser has no shallow part; export it with one: "
                "latentrt export CHECKPOINT BUNDLE --deep-cache 0"
            )
        if self.decoder not in get_args(Decoder):
            raise RequestError(f"decoder: found {self.decoder!r}, expected one of {', '.join(get_args(Decoder))}")
        if self.decoder == "preview" and "preview_decoder" not in manifest.components:
            raise RequestError(
                "found the decoder preview, and this bundle has none; export it with one: latentrt export CHECKPOINT "
                "BUNDLE --preview-decoder FOLDER"
            )


def plain(value: Any) -> Any:
    """Python's own number for one of numpy's."""
    return value.item() if isinstance(value, np.generic) else value


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise RequestError(f"{name}: found {value!r}, expected a share of the steps from 0 to 1")


EXACT = Approximation()
