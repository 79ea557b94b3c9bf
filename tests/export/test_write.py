"""The files of a bundle, the warnings of an export, and the files left after a failure."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import file_record
from latentrt.errors import CheckpointError, ExportError, GateError, LatentRTError, OutputError
from latentrt_export.checkpoints import single_file
from latentrt_export.checkpoints.checkpoint import GivenComponents
from latentrt_export.checkpoints.single_file import SingleFile
from latentrt_export.export import export_checkpoint
from latentrt_export.worker import Done, Job
from tests.export.fake_worker import FakeWorker, install, write_described
from tests.export.skeleton import change_json, write_json, write_skeleton, write_weights
from tests.exported import Silent
from tests.tiny import SCHEDULERS

# What a checkpoint has by itself: a preview decoder is only there where one is given.
COMPONENTS = ["text_encoder", "vae_encoder", "unet", "vae_decoder", "safety_checker"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_described(tmp_path / "model")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    return install(monkeypatch, FakeWorker())


def export(checkpoint: Path, bundle: Path, **options: Any) -> Silent:
    progress = Silent()
    export_checkpoint(checkpoint, bundle, progress=progress, **options)
    return progress


def test_a_bundle_that_opens_and_verifies(checkpoint: Path, tmp_path: Path, worker: FakeWorker) -> None:
    (checkpoint / "LICENSE").write_text("Text")
    progress = export(checkpoint, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    bundle.check(bundle.manifest.files)  # not `read`, as its graphs are stand-ins
    manifest = bundle.manifest
    assert set(manifest.components) == set(COMPONENTS)
    assert manifest.files.keys() >= {"LICENSE", "MODEL_CARD.md", "tokenizer/tokenizer.json", "unet/model.onnx"}
    on_disk = {path.relative_to(bundle.folder).as_posix() for path in bundle.folder.rglob("*") if path.is_file()}
    assert on_disk == {*manifest.files, "bundle.json", "export-report.json"}
    assert (manifest.defaults.height, manifest.limits.min_side, manifest.latent_spaces["unet"].downscale) == (64, 64, 8)
    assert progress.warnings == []


def test_the_source_is_recorded(checkpoint: Path, tmp_path: Path, worker: FakeWorker) -> None:
    export(checkpoint, tmp_path / "bundle")
    source = Bundle.open(tmp_path / "bundle").manifest.source
    assert (source.name, source.layout) == ("model", "diffusers")
    assert set(source.weights) == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "safety_checker/model.safetensors",
    }


def test_components_one_after_the_other(checkpoint: Path, tmp_path: Path, worker: FakeWorker) -> None:
    progress = export(checkpoint, tmp_path / "bundle")
    assert [job.component.name for job in worker.jobs] == COMPONENTS
    assert progress.phases == [(name, text) for name in COMPONENTS for text in ("tracing", "done")]


@pytest.mark.parametrize("change", ["replaced", "written to", "as old as before"])
@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "given", "single"])
def test_weights_that_change_while_they_are_exported_are_refused(
    checkpoint: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, change: str
) -> None:
    """The digest in the manifest would be that of other weights than the bundle's."""
    vae = write_weights(tmp_path / "given.safetensors", "encoder.down_blocks.0.x")
    changed = {"given": vae, "single": single}.get(file, checkpoint / file)

    class Changing(FakeWorker):
        def run_one(self, job: Job, *arguments: Any) -> Done:
            if job.component.name == "unet":
                data, found = changed.read_bytes(), changed.stat()
                if change == "replaced":
                    changed.unlink()
                changed.write_bytes(data[:-1] + b"\1")
                if change == "as old as before":
                    os.utime(changed, ns=(found.st_atime_ns, found.st_mtime_ns))
            return super().run_one(job, *arguments)

    install(monkeypatch, Changing())
    time.sleep(0.02)  # until the file system's clock has moved on
    with pytest.raises(CheckpointError, match=rf"{changed.name} was changed, moved or linked while it was exported"):
        export(single if file == "single" else checkpoint, tmp_path / "bundle", given=GivenComponents(vae=vae))
    assert not (tmp_path / "bundle").exists()


# The safety checker


def test_without_a_safety_checker_a_warning(tmp_path: Path, worker: FakeWorker) -> None:
    progress = export(write_described(tmp_path / "model", safety=False), tmp_path / "bundle")
    assert len(progress.warnings) == 1
    assert "has no safety checker" in progress.warnings[0]
    assert "--safety-checker PATH" in progress.warnings[0]
    assert "safety_checker" not in Bundle.open(tmp_path / "bundle").manifest.components


def test_another_safety_checker(tmp_path: Path, worker: FakeWorker) -> None:
    checkpoint = write_described(tmp_path / "model", safety=False)
    other = write_skeleton(tmp_path / "other", variant="fp16")
    progress = export(checkpoint, tmp_path / "bundle", given=GivenComponents(safety_checker=other))
    assert progress.warnings == []
    assert (worker.jobs[-1].checkpoint, worker.jobs[-1].variant) == (str(other), "fp16")
    weights = Bundle.open(tmp_path / "bundle").manifest.source.weights
    assert [name for name in weights if name.startswith("safety")] == ["safety_checker/model.fp16.safetensors"]


def test_a_wrong_safety_checker_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, worker: FakeWorker
) -> None:
    with pytest.raises(CheckpointError, match="is not a safety checker"):
        export(checkpoint, tmp_path / "bundle", given=GivenComponents(safety_checker=tmp_path / "nowhere"))
    assert worker.jobs == []


# Another autoencoder


@pytest.mark.parametrize("form", ["folder", "checkpoint", "file"])
def test_another_autoencoder(checkpoint: Path, tmp_path: Path, worker: FakeWorker, form: str) -> None:
    other = write_skeleton(tmp_path / "other")
    write_json(other / "vae" / "config.json", {"block_out_channels": [8] * 4, "scaling_factor": 0.4})
    name = "diffusion_pytorch_model.safetensors"
    file = write_weights(other / "vae" / name, "encoder.down_blocks.0.x")
    given = {"folder": other / "vae", "checkpoint": other, "file": file}[form]
    export(checkpoint, tmp_path / "bundle", given=GivenComponents(vae=given))
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.latent_spaces["unet"].scale == 0.4
    assert manifest.source.weights[f"vae/{name}"] == file_record(file).sha256
    jobs = {job.component.name: Path(job.checkpoint) for job in worker.jobs}
    assert jobs["unet"] == checkpoint
    assert jobs["vae_encoder"] == jobs["vae_decoder"] != checkpoint
    if form != "file":
        assert jobs["vae_decoder"] == given


def test_an_autoencoder_that_does_not_suit_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, worker: FakeWorker
) -> None:
    other = write_skeleton(tmp_path / "other")
    write_json(other / "vae" / "config.json", {"latent_channels": 16, "block_out_channels": [8] * 4})
    with pytest.raises(CheckpointError, match="vae has latent_channels 16 and unet has out_channels 4"):
        export(checkpoint, tmp_path / "bundle", given=GivenComponents(vae=other))
    with pytest.raises(CheckpointError, match="is not an autoencoder"):
        export(checkpoint, tmp_path / "bundle", given=GivenComponents(vae=tmp_path / "nowhere"))
    assert worker.jobs == []


def test_a_folder_without_an_autoencoder_needs_one(checkpoint: Path, tmp_path: Path, worker: FakeWorker) -> None:
    other = write_skeleton(tmp_path / "other")
    shutil.rmtree(checkpoint / "vae")
    with pytest.raises(CheckpointError, match="`vae`"):
        export(checkpoint, tmp_path / "bundle")
    export(checkpoint, tmp_path / "bundle", given=GivenComponents(vae=other))
    assert "vae/diffusion_pytorch_model.safetensors" in Bundle.open(tmp_path / "bundle").manifest.source.weights


def test_the_plans_warnings_are_shown(checkpoint: Path, tmp_path: Path, worker: FakeWorker) -> None:
    index = json.loads((checkpoint / "model_index.json").read_text())
    write_json(checkpoint / "model_index.json", {**index, "vae": ["diffusers", "AsymmetricAutoencoderKL"]})
    widths = {"down_block_out_channels": [8, 8], "up_block_out_channels": [8, 32]}
    write_json(checkpoint / "vae" / "config.json", widths)
    shown = export(checkpoint, tmp_path / "bundle").warnings
    assert any("AsymmetricAutoencoderKL" in warning and "inpainting" in warning for warning in shown), shown


# Licence and scheduler


def test_a_denoiser_that_is_not_quantised_is_a_warning(checkpoint: Path, tmp_path: Path, worker: FakeWorker) -> None:
    progress, worker.precision = Silent(), "float32"
    export_checkpoint(checkpoint, tmp_path / "bundle", precision="int8", progress=progress)
    assert [text.partition(":")[0] for text in progress.warnings] == ["unet"]


def test_a_workers_warnings_are_reported_once(checkpoint: Path, tmp_path: Path, worker: FakeWorker) -> None:
    worker.warnings = ("vae: ignored 1 tensors",)
    progress = Silent()
    export_checkpoint(checkpoint, tmp_path / "bundle", progress=progress)
    assert progress.warnings.count("vae: ignored 1 tensors") == 1


def test_a_warning_of_the_plan_and_of_a_worker_is_reported_once(tmp_path: Path, worker: FakeWorker) -> None:
    checkpoint = write_described(tmp_path / "model", safety=False)
    (text,) = export(checkpoint, tmp_path / "first").warnings
    worker.warnings = (text,)
    assert export(checkpoint, tmp_path / "second").warnings == [text]


def test_weights_that_are_not_finite_are_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, worker: FakeWorker
) -> None:
    file = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({"decoder.conv_in.bias": np.array([1, np.nan], np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"vae: 1 tensors .* first is decoder\.conv_in\.bias with 1"):
        export_checkpoint(checkpoint, tmp_path / "bundle", progress=Silent())
    assert worker.jobs == []


def test_an_unknown_licence_is_a_warning(checkpoint: Path, tmp_path: Path, worker: FakeWorker) -> None:
    (checkpoint / "README.md").unlink()
    progress = export(checkpoint, tmp_path / "bundle")
    assert any("no licence was found" in text for text in progress.warnings)
    assert Bundle.open(tmp_path / "bundle").manifest.licence.name == "unknown"


def test_a_scheduler_that_cannot_be_run_is_a_warning(checkpoint: Path, tmp_path: Path, worker: FakeWorker) -> None:
    config = {**SCHEDULERS["sd1"], "_class_name": "ScoreSdeVeScheduler"}
    write_json(checkpoint / "scheduler" / "scheduler_config.json", config)
    change_json(checkpoint / "model_index.json", scheduler=["diffusers", "ScoreSdeVeScheduler"])
    progress = export(checkpoint, tmp_path / "bundle")
    assert len(progress.warnings) == 1
    assert "ScoreSdeVeScheduler" in progress.warnings[0]
    assert "--sampler" in progress.warnings[0]
    assert Bundle.open(tmp_path / "bundle").manifest.schedulers["unet"].class_name == "ScoreSdeVeScheduler"


def test_a_scheduler_is_written_as_read_with_the_changes_of_diffusers_pipelines(
    checkpoint: Path, tmp_path: Path, worker: FakeWorker
) -> None:
    name = "DPMSolverMultistepScheduler"
    config = {**SCHEDULERS["sd1"], "lambda_min_clipped": -float("inf"), "steps_offset": 0, "clip_sample": True}
    write_json(checkpoint / "scheduler" / "scheduler_config.json", config)
    change_json(checkpoint / "model_index.json", scheduler=["diffusers", name])
    change_json(checkpoint / "unet" / "config.json", _diffusers_version="0.6.0")
    progress = export(checkpoint, tmp_path / "bundle")
    manifest = Bundle.open(tmp_path / "bundle").manifest
    record = manifest.schedulers["unet"]
    assert progress.warnings == []
    assert (record.class_name, record.config["lambda_min_clipped"], record.config["steps_offset"]) == (
        name,
        "-Infinity",
        0,
    )
    assert [change.key for change in record.changes] == ["steps_offset", "clip_sample"]
    assert record.config_for("text-to-image", name)["lambda_min_clipped"] == -float("inf")
    assert [(change.found, change.used) for change in manifest.defaults.changes] == [(8, 64)]
    assert (manifest.defaults.height, manifest.defaults.width) == (512, 512)


def test_an_unknown_key_is_a_warning(checkpoint: Path, tmp_path: Path, worker: FakeWorker) -> None:
    change_json(checkpoint / "unet" / "config.json", of_no_class=1)
    progress = export(checkpoint, tmp_path / "bundle")
    assert [warning for warning in progress.warnings if "'of_no_class'" in warning] == progress.warnings != []


def test_a_pipeline_near_a_supported_one_is_refused_by_the_export(
    checkpoint: Path, tmp_path: Path, worker: FakeWorker
) -> None:
    change_json(checkpoint / "model_index.json", _class_name="AltDiffusionPipeline")
    with pytest.raises(CheckpointError, match="'AltDiffusionPipeline', whose text encoder is XLM-RoBERTa"):
        export(checkpoint, tmp_path / "bundle")


def test_an_unknown_noise_schedule_is_refused(checkpoint: Path, tmp_path: Path, worker: FakeWorker) -> None:
    config = {**SCHEDULERS["sd1"], "beta_schedule": "sideways"}
    write_json(checkpoint / "scheduler" / "scheduler_config.json", config)
    with pytest.raises(CheckpointError, match=r"noise schedule.*sideways"):
        export(checkpoint, tmp_path / "bundle")
    assert worker.jobs == []


def test_a_tokenizer_that_is_missing(checkpoint: Path, tmp_path: Path, worker: FakeWorker) -> None:
    (checkpoint / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor vocab\.json and merges\.txt"):
        export(checkpoint, tmp_path / "bundle")


def test_a_tokenizer_that_is_damaged(checkpoint: Path, tmp_path: Path, worker: FakeWorker) -> None:
    (checkpoint / "tokenizer" / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"vocab\.json is not JSON"):
        export(checkpoint, tmp_path / "bundle")


# Failures


@pytest.fixture
def earlier(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that is there already."""
    install(monkeypatch, FakeWorker(content=b"earlier"))
    export(checkpoint, tmp_path / "out" / "bundle")
    return tmp_path / "out" / "bundle"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (GateError("unet: too far"), GateError),
        (ExportError("killed"), ExportError),
        (OSError(28, "No space left on device"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["gate", "worker", "disk", "interrupt"],
)
def test_a_failure_leaves_the_earlier_bundle(
    checkpoint: Path,
    earlier: Path,
    monkeypatch: pytest.MonkeyPatch,
    component: str,
    error: BaseException,
    seen: type[BaseException],
) -> None:
    before = contents(earlier.parent)
    install(monkeypatch, FakeWorker(content=b"later", fail={component: error}))
    with pytest.raises(seen):
        export(checkpoint, earlier, overwrite=True)
    assert contents(earlier.parent) == before
    assert [path.name for path in earlier.parent.iterdir()] == ["bundle"]


def test_without_overwrite_nothing_starts(checkpoint: Path, earlier: Path, worker: FakeWorker) -> None:
    with pytest.raises(OutputError, match="--overwrite"):
        export(checkpoint, earlier)
    assert worker.jobs == []


def test_overwrite(checkpoint: Path, earlier: Path, worker: FakeWorker) -> None:
    export(checkpoint, earlier, overwrite=True)
    assert (earlier / "unet" / "model.onnx").read_bytes() == b"fake"
    assert [path.name for path in earlier.parent.iterdir()] == ["bundle"]


def test_a_bad_checkpoint_makes_no_folders(tmp_path: Path) -> None:
    with pytest.raises(LatentRTError, match="does not exist"):
        export(tmp_path / "nothing", tmp_path / "new" / "bundle")
    assert list(tmp_path.iterdir()) == []


# A single file


@pytest.fixture
def single(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A single-file checkpoint whose unpacking is somebody else's test."""
    path = write_weights(tmp_path / "merged v2.safetensors")
    stated = SingleFile(path=path, family="stable-diffusion-1", prediction_type=None, licence="mit")
    monkeypatch.setattr(single_file, "detect", lambda file, **options: stated)
    monkeypatch.setattr(single_file, "unpack", lambda file, into, **options: write_described(into, safety=False))
    return path


def test_a_single_file_is_its_own_source(single: Path, tmp_path: Path, worker: FakeWorker) -> None:
    other = write_skeleton(tmp_path / "other")
    export(single, tmp_path / "new" / "bundle", given=GivenComponents(safety_checker=other))
    manifest = Bundle.open(tmp_path / "new" / "bundle").manifest
    assert (manifest.source.name, manifest.source.layout) == ("merged v2", "single-file")
    assert manifest.source.weights.keys() == {"merged v2.safetensors", "safety_checker/model.safetensors"}
    assert manifest.source.weights["merged v2.safetensors"] == file_record(single).sha256
    assert manifest.licence.name == "mit"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bundle"]


def test_a_single_file_with_the_autoencoder_of_another(single: Path, tmp_path: Path, worker: FakeWorker) -> None:
    vae = write_weights(tmp_path / "better.safetensors", "encoder.down_blocks.0.x")
    export(single, tmp_path / "bundle", given=GivenComponents(vae=vae))
    weights = Bundle.open(tmp_path / "bundle").manifest.source.weights
    assert weights == {
        "merged v2.safetensors": file_record(single).sha256,
        "vae/better.safetensors": file_record(vae).sha256,
    }


def test_the_folder_of_an_unpacked_single_file_is_deleted(single: Path, tmp_path: Path, worker: FakeWorker) -> None:
    worker.fail["vae_encoder"] = GateError("too far")
    with pytest.raises(GateError):
        export(single, tmp_path / "new" / "bundle")
    assert not (tmp_path / "new").exists()
