from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.export_report import REPORT_NAME, ComponentCost, ExportReport, write_report
from latentrt.cli.main import main
from latentrt.decode.safety import SafetyRecord
from latentrt.images.files import save
from latentrt.images.metadata import ImageRecord, record_texts
from tests.runtime.small_bundle import edit_manifest, write_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def run(*args: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def image_file(place: Path, options: dict[str, Any] | None = None, **changes: Any) -> Path:
    record = ImageRecord(
        prompt="a red circle",
        seed=7,
        options={
            "sampler": "euler_a",
            "num_inference_steps": 25,
            "guidance_scale": 7.5,
            "width": 16,
            "height": 8,
            **(options or {}),
        },
        bundle_digest="sha256:" + "0" * 64,
        bundle_name="my-model",
        latentrt_version="0.1.0",
        safety=SafetyRecord(policy="block", flagged=True, concepts=(3,), highest_score=0.02),
    )
    save(Image.new("RGB", (16, 8)), place, record_texts(msgspec.structs.replace(record, **changes)))
    return place


def test_a_bundle_whose_tokens_are_merged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edit(tree: dict[str, Any]) -> None:
        tree["components"]["unet"]["token_merging"] = {"ratio": 0.5, "blocks": ["down_blocks.0", "up_blocks.3"]}

    edit_manifest(folder, edit)
    assert run("inspect", folder) == 0
    assert "0.5 of the tokens of unet, in 2 of its blocks: down_blocks.0, up_blocks.3" in capsys.readouterr().out


def test_an_image_generated_with_merged_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", image_file(tmp_path / "out.png", token_merging=0.5)) == 0
    assert "token merging 0.5" in capsys.readouterr().out
    assert run("inspect", image_file(tmp_path / "out.png")) == 0
    assert "token merging" not in capsys.readouterr().out


def test_a_bundle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", folder) == 0
    out = capsys.readouterr().out
    assert Bundle.open(folder).digest in out
    for shown in ("stable-diffusion-1", "openrail (LICENSE)", "made-up (diffusers)", "PNDMScheduler", "77 tokens"):
        assert shown in out
    for shown in (
        "unet",
        "12,345",
        "float32 1.0 MB",
        "2e-06 relative of 0.0001 (noise_pred)",
        "text-to-image, inpainting",
    ):
        assert shown in out
    # Not taken for rich's markup.
    assert "latents float32[batch, 4, height, width]" in out
    assert "64 × 64, 50 steps, guidance scale 7.5" in out


def test_a_bundle_whose_configurations_diffusers_pipeline_changes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tree: Any) -> None:
        clip = {"key": "clip_sample", "found": True, "used": False, "tasks": ["text-to-image"]}
        size = {"key": "sample_size", "found": 32, "used": 64, "tasks": ["text-to-image", "inpainting"]}
        tree["schedulers"]["unet"]["changes"] = [clip]
        tree["defaults"]["changes"] = [size]

    edit_manifest(folder, change)
    assert run("inspect", folder) == 0
    out = capsys.readouterr().out
    assert "clip_sample false in place of true, as in diffusers' pipeline, for text-to-image\n" in out
    assert "sample_size 64 in place of 32, as in diffusers' pipeline, for text-to-image, inpainting\n" in out


def test_the_time_and_memory_of_an_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = {name: ComponentCost(seconds=1.5, peak_bytes=1 << 30) for name in ("unet", "vae_decoder")}
    write_report(folder, ExportReport(components=costs))
    assert run("inspect", folder) == 0
    assert capsys.readouterr().out.count("1.5 s, 1.1 GB") == 2
    (folder / REPORT_NAME).write_text("{")
    assert run("inspect", folder) == 0
    assert "1.5 s" not in capsys.readouterr().out


def test_a_bundle_with_parts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [{"name": f"blocks.{n}.keys", "dtype": "float32", "shape": ["evaluations", 4, "tokens"]} for n in range(7)]
    gate = {"output": "out", "shapes": {"in": [1, 4]}, "metric": "relative", "value": 3e-7, "bound": 1e-5}
    graph = {"file": "unet/keys.onnx", "opset": 21, "nodes": 2345, "gate": [gate]}

    def divide(tree: dict[str, Any]) -> None:
        tree["files"] |= dict.fromkeys(("unet/keys.onnx", "unet/body.onnx"), tree["files"]["unet/model.onnx"])
        unet = tree["components"]["unet"]
        inputs = [{key: spec[key] for key in ("name", "dtype", "shape")} for spec in unet["inputs"][2:]]
        prompt = {"inputs": inputs, "outputs": keys, "graphs": {"float32": graph}}
        body = {
            "inputs": [{key: unet["inputs"][0][key] for key in ("name", "dtype", "shape")}, *keys[:1]],
            "outputs": unet["outputs"],
            "graphs": {"float32": {**graph, "file": "unet/body.onnx"}},
        }
        unet["parts"] = {"cross_attention_kv": prompt, "body": body}

    edit_manifest(folder, divide)
    assert run("inspect", folder) == 0
    out = capsys.readouterr().out
    for shown in ("  cross_attention_kv ", "  body ", "2,345", "3e-07 relative of 1e-05 (out)"):
        assert shown in out
    assert "7 × keys, the first is blocks.0.keys float32[evaluations, 4, tokens]" in out
    assert "  blocks.0.keys float32[evaluations, 4, tokens]" in out, "one is shown as it is"


def test_a_bundle_of_int8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def layer(method: str, error: float, share: float) -> dict[str, Any]:
        return {"method": method, "error": error, "share": share}

    layers = {f"kept.{n}": layer("weights", 0.01 * n, 0.001) for n in range(11)}
    layers |= {"conv_in": layer("float32", 0.5, 0.009), "large": layer("static", 0.001, 0.98)}

    def quantise(tree: dict[str, Any]) -> None:
        graph = tree["components"]["unet"]["graphs"].pop("float32")
        how = {"method": "static", "weight_bits": 7, "steps": 10, "evaluations": 30, "layers": layers}
        tree["components"]["unet"]["graphs"]["int8"] = {**graph, "quantization": how}
        tree["precision"] = "int8"

    edit_manifest(folder, quantise)
    assert run("inspect", folder) == 0
    out = capsys.readouterr().out
    assert "unet: 1 of 13 layers, 98.0% of the multiplications, have int8 weights and activations of 7 bits" in out
    assert "quantising each alone: conv_in 50.00% (float), kept.10 10.00% (int8 weights)" in out
    assert "and 2 more" in out


def test_the_path_of_a_manifest_is_accepted_for_its_bundle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", folder / "bundle.json") == 0
    assert Bundle.open(folder).digest in capsys.readouterr().out


def test_a_bundle_without_classifier(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_manifest(folder, lambda tree: tree["components"].pop("safety_checker"))
    assert run("inspect", folder) == 0
    assert "no classifier: it runs with --safety off only" in capsys.readouterr().out


def test_a_bundle_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "--json", folder) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["digest"] == Bundle.open(folder).digest
    assert tree["manifest"] == json.loads((folder / "bundle.json").read_bytes())


def test_a_manifest_cannot_talk_to_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(tree: dict[str, Any]) -> None:
        tree["source"]["name"] = "\x1b[2Jgone\u202e"
        tree["created_by"] = "[bold]x[/nonsense]"
        tree["components"]["safety_checker"]["outputs"].append(
            {"name": "\x1b]0;title\x07", "dtype": "float32", "shape": ["images"]}
        )
        tree["components"]["unet"]["token_merging"] = {"ratio": 0.5, "blocks": ["\x1b[31m"]}

    edit_manifest(folder, spoil)
    for options in ([], ["--json"]):
        assert run("inspect", *options, folder) == 0
        out = capsys.readouterr().out
        assert out.replace("\n", "").isprintable()
        assert "[bold]x[/nonsense]" in out


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str], extension: str) -> None:
    assert run("inspect", image_file(tmp_path / f"out.{extension}")) == 0
    out = capsys.readouterr().out
    for shown in ("16 × 8", "a red circle", "euler_a", "sha256:000", "block", "yes, concepts 3, highest score 0.020"):
        assert shown in out


def test_an_image_generated_with_safety_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", image_file(tmp_path / "out.png", safety=SafetyRecord(policy="off"))) == 0
    assert "off, the image was not checked" in capsys.readouterr().out


def test_an_image_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "--json", image_file(tmp_path / "out.png")) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["record"]["seed"], tree["width"], tree["file_format"]) == (7, 16, "PNG")


def test_an_image_of_another_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(Image.new("RGB", (8, 8)), tmp_path / "out.png", {"parameters": "a cat\nSteps: 20"})
    assert run("inspect", tmp_path / "out.png") == 0
    assert "a cat\n              Steps: 20\n" in capsys.readouterr().out


def test_an_image_without_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(Image.new("RGB", (8, 8)), tmp_path / "out.png")
    assert run("inspect", tmp_path / "out.png") == 0
    assert "no metadata" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_control_characters_in_metadata_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    hostile = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e[link=http://x]y[/]\r\ud800"
    image_file(tmp_path / "ours.png", {"sampler": hostile, hostile: hostile}, prompt=hostile, bundle_name=hostile)
    save(Image.new("RGB", (8, 8)), tmp_path / "theirs.png", {"parameters": hostile.replace("\ud800", "")})
    for name in ("ours.png", "theirs.png"):
        assert run("inspect", *options, tmp_path / name) == 0
        out = capsys.readouterr().out
        assert out.replace("\n", "").isprintable()
        assert "[link=http://x]y[/]" in out


def test_an_endless_text_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(Image.new("RGB", (8, 8)), tmp_path / "out.png", {"parameters": "x" * 900_000})
    assert run("inspect", tmp_path / "out.png") == 0
    out = capsys.readouterr().out
    assert len(out) < 30_000
    assert "880,000 more characters" in out


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("missing", 4, "does not exist, expected the folder of a bundle, or an image"),
        ("empty", 4, "has no bundle.json"),
        ("text.png", 2, "is not an image"),
        ("record.png", 2, "latentrt record"),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("text")
    save(Image.new("RGB", (8, 8)), tmp_path / "record.png", {"latentrt": "{"})
    assert run("inspect", tmp_path / name) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err + captured.out


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_help_loads_nothing_heavy(command: str) -> None:
    script = (
        "import sys; from latentrt.cli.main import main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "except SystemExit: print({'numpy', 'onnxruntime', 'PIL'} & set(sys.modules))"
    )
    out = subprocess.check_output([sys.executable, "-c", script, command], text=True)
    assert out.endswith("set()\n")
