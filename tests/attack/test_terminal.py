"""Nothing that a file or a caller says reaches the terminal as it is: every command, with hostile names everywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from latentrt.cli.main import _COMMANDS
from tests.attack.command_line import call
from tests.runtime.small_bundle import edit_manifest, write_bundle

TEXTS = (
    "\x1b]0;x\x07",  # sets a terminal's title
    "\x1b[2J\r\b",
    "[red]a[/]",  # rich's markup
    "[/]",
    "[link=http://x]:smile:[bold",
    "\u202etxt.\u2066",  # turns the direction
    "a\nerror: forged",
    "\x9b31m\x85",  # C1 controls
    "\u2028\ufeff",
    os.fsdecode(b"\xff\x1b"),  # a name that is no UTF-8
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))


def hostile_bundle(folder: Path, text: str) -> Path:
    """Write a bundle whose folder and whose manifest have this text wherever a name may be."""

    def edit(tree: dict[str, Any]) -> None:
        unet = tree["components"]["unet"]
        tree["created_by"] = tree["source"]["name"] = tree["licence"]["name"] = text
        tree["source"]["weights"] = {text: "0" * 64}
        tree["schedulers"]["unet"] = {"class_name": text, "config": {text: text, "prediction_type": text}}
        unet["outputs"][0]["name"] = text
        unet["graphs"]["float32"]["gate"][0]["output"] = text
        unet["graphs"]["float32"]["float32_nodes"] = [text]

    place = write_bundle(folder / text.replace("/", "∕"))
    edit_manifest(place, edit)
    return place


@pytest.mark.parametrize("text", TEXTS)
def test_a_bundle(tmp_path: Path, text: str) -> None:
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        bundle = write_bundle(tmp_path / text)  # JSON holds no half of a surrogate pair
    else:
        bundle = hostile_bundle(tmp_path, text)
    for arguments in (
        *(["inspect", bundle], ["inspect", bundle, "--json"], ["verify", bundle], ["doctor", bundle]),
        *(["run", bundle, text], ["run", bundle, "a", "--device", text], ["bench", bundle, "--device", text]),
        *(["compare", bundle, "--samplers", text], ["engines", "list", bundle], ["engines", "why", bundle]),
        *(["engines", "seal", bundle, tmp_path / f"{text}2".replace("/", "∕")], ["engines", "refit", bundle, text]),
        *(
            ["plan", bundle, "--gpus", "l4"],
            ["plan", bundle, "--gpus", text],
            ["plan", bundle, "--gpus", "l4", "--json"],
        ),
        *(["build", bundle, "--gpu", text], ["export", bundle, tmp_path / "out"]),
    ):
        call(*arguments)
    (bundle / "LICENSE").write_text("changed")
    assert "LICENSE" in call("verify", bundle)[1]
    call("verify", tmp_path / "none" / text)


@pytest.mark.parametrize("text", TEXTS)
def test_arguments(tmp_path: Path, text: str) -> None:
    for command in _COMMANDS:
        for arguments in ([text], [f"--{text}"], [text, text], [text, text, text]):
            if command not in ("export", "demo"):  # tested below; both would work on what they find
                call(command, *arguments)
    call(text)
    for arguments in (
        *(["demo", "-o", f"{text}/x.txt"], ["demo", "a", "--sampler", text], ["schedule", "--sampler", text]),
        *(["schedule", "--sampler", "ddim", "--option", f"{text}=1"], ["samplers", text, "--json"]),
        *(["schedule", "--sampler", "ddim", "--option", f"beta_schedule={text}"], ["inspect", f"{text}.png"]),
        *(["run", ".", "a", "--image", f"{text}.png"], ["run", ".", "a", "--seed", text], ["bench", "--json", text]),
    ):
        call(*arguments)


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_a_configuration(tmp_path: Path, text: str) -> None:
    for config in ({"_class_name": text}, {"_class_name": "DDIMScheduler", "beta_schedule": text}, {text: 1}, [text]):
        (tmp_path / "config.json").write_text(json.dumps(config))
        call("schedule", "--config", tmp_path / "config.json")
    (tmp_path / "config.json").write_text(f'{{"{text}": 1, "{text}": 2')
    call("schedule", "--config", tmp_path / "config.json")


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_a_checkpoint(tmp_path: Path, text: str) -> None:
    pytest.importorskip("torch")
    folder = tmp_path / text.replace("/", "∕")
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"_class_name": text, text: text}))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": text}))
    parts = {name: ["diffusers", text] for name in ("unet", "vae", "scheduler")}
    own = {name: ["transformers", text] for name in ("text_encoder", "tokenizer")}
    for index in (
        {"_class_name": text, **parts, **own},
        {"_class_name": "StableDiffusionPipeline", **parts, **own, text: [text, text]},
        {"_class_name": "StableDiffusionPipeline"},
    ):
        (folder / "model_index.json").write_text(json.dumps(index))
        call("export", folder, tmp_path / "out", "--variant", text)
    header = json.dumps({text: {"dtype": text, "shape": [1], "data_offsets": [0, 4]}}).encode()
    single = tmp_path / f"{text}.safetensors".replace("/", "∕")
    for data in (len(header).to_bytes(8, "little") + header + bytes(4), b"x", header):
        single.write_bytes(data)
        call("export", single, tmp_path / "out")
