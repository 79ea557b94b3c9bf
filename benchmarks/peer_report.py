"""The tables of a report of `benchmarks.peers`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["COLUMNS", "NOISE", "Bar", "bars", "markdown", "median_value"]

Report = Mapping[str, Any]

# The deviation of a ratio from 1 that is not significant.
NOISE = 0.10
COLUMNS = {
    "step_s": "s / step",
    "image_s": "s / image",
    "first_image_s": "s to first image",
    "text_encoder": "text encoder s",
    "unet": "UNet s",
    "vae_decoder": "VAE decoder s",
}
_PACKAGES = (
    *("latentrt", "diffusers", "transformers", "optimum-onnx", "optimum-intel", "openvino-genai", "nncf"),
    *("stable-diffusion-cpp-python", "torch", "onnxruntime", "openvino", "numpy"),
)
_TYPES = {32: "float32", 16: "16 bits", 8: "int8"}


@dataclass(frozen=True)
class Bar:
    """The comparison of ours with the fastest peer.

    Attributes:
        bits, column: the type and the quantity.
        ours, peer: the names of the two configurations.
        ratio: the median over rounds of our time divided by theirs.
    """

    bits: int
    column: str
    ours: str
    peer: str
    ratio: float

    @property
    def met(self) -> bool:
        """Whether ours is at most as slow, within noise."""
        return self.ratio <= 1 + NOISE


def of_round(found: Mapping[str, Any], column: str) -> float | None:
    """Return the median of a round's values; None if it has none."""
    value: list[float] | float | None = found.get(column, found["components"].get(column))
    if isinstance(value, list):
        return statistics.median(value) if value else None
    return value


def of_rounds(configuration: Mapping[str, Any], column: str) -> list[float]:
    """Return each round's median."""
    found = (of_round(each, column) for each in configuration["rounds"])
    return [value for value in found if value is not None]


def median_value(configuration: Mapping[str, Any], column: str) -> float | None:
    """Return the median of the rounds' medians; None if there are none."""
    values = of_rounds(configuration, column)
    return statistics.median(values) if values else None


def bars(report: Report) -> list[Bar]:
    """Compare the fastest of ours with the fastest peer, for each type and column, without accelerated ones."""
    found = []
    for bits in _TYPES:
        exact = {
            name: each
            for name, each in report["configurations"].items()
            if each["bits"] == bits and not each["accelerated"]
        }
        for column in COLUMNS:
            ours = _fastest(((name, each) for name, each in exact.items() if each["ours"]), column)
            peer = _fastest(((name, each) for name, each in exact.items() if not each["ours"]), column)
            if ours is not None and peer is not None:
                found.append(Bar(bits, column, ours, peer, _ratio(exact[ours], exact[peer], column)))
    return found


def _fastest(configurations: Iterable[tuple[str, Mapping[str, Any]]], column: str) -> str | None:
    timed = [(seconds, name) for name, each in configurations if (seconds := median_value(each, column)) is not None]
    return min(timed)[1] if timed else None


def _ratio(ours: Mapping[str, Any], peer: Mapping[str, Any], column: str) -> float:
    """Return the median ratio over the rounds that both have, so that other load affects both alike."""
    pairs = zip(of_rounds(ours, column), of_rounds(peer, column), strict=False)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def markdown(report: Report) -> str:
    """Return all of the report's tables."""
    # Components alone do not measure the memory of a run.
    memory = [] if report["settings"]["components"] else [_memory(report)]
    parts = [_heading(report), _times(report), _bars(report), *memory, _environments(report)]
    if report["skipped"]:
        parts.append("\n".join(f"Skipped: {name}: {reason}." for name, reason in report["skipped"].items()))
    return "\n\n".join(parts)


def _heading(report: Report) -> str:
    settings, machine = report["settings"], report["machine"]
    size = f"{settings['size']} × {settings['size']}"
    lines = [
        f"    {report['command']}",
        "",
        f"{machine['cores']} cores of an {machine['cpu']}, {machine['memory_gib']} GiB, Python {machine['python']}. "
        f"{size} pixels, {settings['steps']} steps of Euler, guidance {settings['guidance_scale']}, "
        f"{settings['threads']} threads. Medians of {settings['rounds']} rounds, in each of which every configuration "
        "has a process of its own; in brackets the smallest and the largest of the rounds.",
    ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("| ---", "|---").replace("--- |", "---|") for line in lines)


def _times(report: Report) -> str:
    rows = []
    for bits in _TYPES:
        for name, each in _select_type(report, bits):
            cells = [_seconds(of_rounds(each, column)) for column in COLUMNS]
            rows.append([_format_name(name, each), *cells, _psnr(each)])
    another = report.get("psnr_of_another_seed_db")
    note = f"PSNR is against diffusers in float32; an image of another seed has {another} dB." if another else ""
    notes = [f"{name}: {each['note']}." for name, each in report["configurations"].items() if each["note"]]
    return "\n\n".join([_table(["", *COLUMNS.values(), "PSNR dB"], rows), *filter(None, [note, *notes])])


def _select_type(report: Report, bits: int) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the configurations of a type, the fastest first."""
    found = [(name, each) for name, each in report["configurations"].items() if each["bits"] == bits]
    return sorted(found, key=lambda pair: median_value(pair[1], "unet") or median_value(pair[1], "step_s") or 0.0)


def _format_name(name: str, configuration: Mapping[str, Any]) -> str:
    return f"**{name}**" if configuration["ours"] else name


def _seconds(values: Sequence[float]) -> str:
    if not values:
        return "–"
    middle = statistics.median(values)
    spread = f" ({_digits(min(values))}–{_digits(max(values))})" if len(values) > 1 else ""
    return f"{_digits(middle)}{spread}"


def _digits(value: float) -> str:
    """Format with three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _psnr(configuration: Mapping[str, Any]) -> str:
    values = [each["psnr_db"] for each in configuration["rounds"] if "psnr_db" in each]
    if not values:
        return "–"
    return "equal" if values[0] is None else f"{values[0]:.1f}"


def _memory(report: Report) -> str:
    head = ["", "peak GiB", "anonymous GiB", "files, GB", "environment"]
    rows = []
    for bits in _TYPES:
        for name, each in _select_type(report, bits):
            peaks = [_gib(of_rounds(each, f"peak_{kind}_bytes")) for kind in ("resident", "anonymous")]
            rows.append([_format_name(name, each), *peaks, f"{each['model_mb'] / 1e3:.2f}", each["environment"]])
    note = (
        "The largest resident set, from the start to the last image. It includes mapped weights, which the system can"
    )
    return f"{note} reclaim; anonymous memory it cannot.\n\n{_table(head, rows)}"


def _gib(values: Sequence[float]) -> str:
    return f"{statistics.median(values) / 2**30:.2f}" if values else "–"


def _bars(report: Report) -> str:
    rows = [
        [
            _TYPES[bar.bits],
            COLUMNS[bar.column],
            bar.ours,
            bar.peer,
            f"{bar.ratio:.2f}",
            "yes" if bar.met else "**no**",
        ]
        for bar in bars(report)
    ]
    head = ["type", "", "ours", "fastest peer", "our time / theirs", f"at most {1 + NOISE:.2f}"]
    return "At equal precision, the fastest of ours and the fastest peer:\n\n" + _table(head, rows)


def _environments(report: Report) -> str:
    rows = []
    for name, each in report["environments"].items():
        packages = {package.lower().replace("_", "-"): version for package, version in each["packages"].items()}
        versions = ", ".join(f"{package} {packages[package]}" for package in _PACKAGES if package in packages)
        size = f"{each['installed_mb_without_byte_code']:.0f}"
        rows.append([name, size, f"{each['import_s']:.2f}", str(len(packages)), versions])
    return _table(["environment", "installed MB", "import s", "packages", "versions"], rows)
