from __future__ import annotations

import click
from click.testing import CliRunner

from latentrt_engines.cli.options import add_build_options, add_gpu_options
from latentrt_engines.options import BuildOptions


def test_the_options_on_the_command_line() -> None:
    seen: list[BuildOptions] = []
    gpu_options: list[tuple[str | None, str | None]] = []

    @click.command()
    @add_gpu_options
    @add_build_options
    def command(options: BuildOptions, gpus: str | None, capabilities: str | None) -> None:
        seen.append(options)
        gpu_options.append((gpus, capabilities))

    def call(line: str) -> int:
        return CliRunner().invoke(command, line.split()).exit_code

    assert call("") == 0
    flags = "--version-compatible --refittable --weight-streaming --strip-weights --tf32"
    sizes = "--component unet --component vae_decoder --size 64 --size 128x64 --batch 1:1:4 --chunks 2 --guidance both"
    rest = "--builder-optimization-level 5 --workspace 2GiB --hardware-compatibility ampere_plus --library tensorrt"
    assert call(f"{flags} {sizes} {rest} --precision float32 --gpu rtx4090 --compute-capabilities 8.6") == 0
    assert seen[0] == BuildOptions()
    assert seen[1] == BuildOptions(
        component=("unet", "vae_decoder"),
        precision="float32",
        size=("64", "128x64"),
        batch="1:1:4",
        chunks="2",
        guidance="both",
        builder_optimization_level=5,
        workspace="2GiB",
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        refittable=True,
        weight_streaming=True,
        strip_weights=True,
        tf32=True,
        library="tensorrt",
    )
    assert call("--gpus rtx4090") == 0
    assert gpu_options == [(None, None), ("rtx4090", "8.6"), ("rtx4090", None)]
    for wrong in ("--guidance maybe", "--library onnx", "--precision int8", "--builder-optimization-level high"):
        assert call(wrong) == 2
