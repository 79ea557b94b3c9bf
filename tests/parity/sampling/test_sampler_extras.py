"""The parts of samplers that are not tables, and `calculate_mu`, against diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import RePaintScheduler, ScoreSdeVeScheduler, VQDiffusionScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers import scheduling_repaint, scheduling_sde_ve, scheduling_vq_diffusion

from latentrt.sampling.noise import Generator
from latentrt.sampling.samplers import Steps
from latentrt.sampling.samplers.flow import calculate_mu
from latentrt.sampling.samplers.flow_euler import FlowEuler
from latentrt.sampling.samplers.repaint import RePaint, inpaint
from latentrt.sampling.samplers.sde_ve import ScoreSdeVe, langevin
from latentrt.sampling.samplers.vq_diffusion import VQDiffusion
from latentrt.sampling.schedule import Latents, denoise

SHAPE = (2, 3, 4, 4)


@contextmanager
def noise_of(module: Any, generator: Generator) -> Iterator[None]:
    """Replace diffusers' noise by that of a generator of ours."""
    patch = mock.patch.object(
        module, "randn_tensor", side_effect=lambda *_, **__: torch.from_numpy(generator.normal(SHAPE))
    )
    with patch:
        yield


def model(latents: Latents) -> Latents:
    return np.asarray(np.tanh(latents[:, ::-1]) / 2 + latents / 3)


@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_repaint_inpaints_as_diffusers_pipeline_does(eta: float, clip_sample: bool) -> None:
    """The loop of diffusers' RePaint pipeline, by its scheduler."""
    config = {"beta_schedule": "scaled_linear", "eta": eta, "clip_sample": clip_sample, "num_train_timesteps": 100}
    steps = Steps(count=20, jump_length=4, jump_n_sample=3)
    original, mask = Generator(5).normal(SHAPE), np.zeros((1, 1, 4, 4), np.float32)
    mask[..., :2] = 1
    start = Generator(6).normal(SHAPE)

    scheduler = RePaintScheduler(**config)
    scheduler.set_timesteps(20, 4, 3)
    expected, last = torch.from_numpy(start), scheduler.timesteps[0] + 1
    with noise_of(scheduling_repaint, Generator(7)):
        for t in scheduler.timesteps:
            if t < last:
                output = torch.from_numpy(model(expected.numpy()))
                known = torch.from_numpy(original), torch.from_numpy(mask)
                expected = scheduler.step(output, t, expected, *known).prev_sample
            else:
                expected = scheduler.undo_step(expected, last)
            last = t

    generator = Generator(7)
    sampler = RePaint.read(config)
    found = list(inpaint(sampler, steps, start, original, mask, lambda _, x: model(x), lambda: generator.normal(SHAPE)))
    assert len(found) == len(sampler.schedule(steps)) > 20
    # Float32 on both sides over some 50 steps and 100 jumps back.
    np.testing.assert_allclose(found[-1], expected.numpy(), rtol=0, atol=2e-5 * float(np.abs(found[-1]).max()))
    np.testing.assert_allclose(found[-1][..., :2], original[..., :2], atol=1e-6)  # the known part


def test_langevin_corrects_as_diffusers_does() -> None:
    """Predictor and corrector of diffusers' pipeline: the corrector first, at the level of the predictor."""
    scheduler = ScoreSdeVeScheduler(num_train_timesteps=8, sigma_max=30.0)
    scheduler.set_timesteps(8)
    scheduler.set_sigmas(8)
    start = Generator(1).normal(SHAPE) * np.float32(30)
    expected = torch.from_numpy(start)
    with noise_of(scheduling_sde_ve, Generator(2)):
        for t in scheduler.timesteps:
            for _ in range(2):
                expected = scheduler.step_correct(torch.from_numpy(model(expected.numpy())), expected).prev_sample
            expected = scheduler.step_pred(torch.from_numpy(model(expected.numpy())), t, expected).prev_sample

    sampler = ScoreSdeVe.read({"num_train_timesteps": 8, "sigma_max": 30.0, "correct_steps": 2})
    schedule, generator, latents = sampler.schedule(Steps(count=8)), Generator(2), start
    assert sampler.evaluations(8) == 24
    for k in range(8):
        for _ in range(sampler.correct_steps):
            latents = langevin(model(latents), latents, generator.normal(SHAPE), sampler.snr)
        row = schedule.starting_at(k)
        latents = next(denoise(row, latents, lambda _, x: model(x), lambda: generator.normal(SHAPE)))
    # Float32 on both sides, in a model that amplifies.
    np.testing.assert_allclose(latents, expected.numpy(), rtol=0, atol=1e-5 * float(np.abs(latents).max()))


@pytest.mark.parametrize("classes", [6, 33])
def test_vq_diffusion_steps_as_diffusers_does(classes: int) -> None:
    batch, pixels, rng = 2, 50, np.random.default_rng(3)
    scheduler = VQDiffusionScheduler(num_vec_classes=classes)
    scheduler.set_timesteps(100)
    sampler = VQDiffusion.read({"num_vec_classes": classes})
    assert sampler.timesteps(100).tolist() == scheduler.timesteps.tolist()
    state = np.full((batch, pixels), classes - 1)  # all masked
    for t in scheduler.timesteps.tolist():
        logits = torch.from_numpy(rng.standard_normal((batch, classes - 1, pixels)).astype(np.float32))
        log_p = torch.log_softmax(logits.double() * 3, dim=1).float().clamp(-70, 0)
        uniform = rng.random((batch, classes - (t == 0), pixels), np.float32)
        if t:
            posterior = scheduler.q_posterior(log_p, torch.from_numpy(state), torch.tensor(t)).numpy()
            # Float32 logarithms down to −140, of which exponentials are summed.
            np.testing.assert_allclose(sampler.posterior(log_p.numpy(), state, t), posterior, atol=3e-5)
        with mock.patch.object(scheduling_vq_diffusion.torch, "rand", return_value=torch.from_numpy(uniform)):
            expected = scheduler.step(log_p, torch.tensor(t), torch.from_numpy(state)).prev_sample.numpy()
        found = sampler.step(log_p.numpy(), state, t, uniform)
        assert np.mean(found != expected) <= 0.01  # a tie in the last place may go either way
        state = expected
    assert np.all(state < classes - 1)


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 9000])
def test_mu_equals_diffusers(tokens: int) -> None:
    assert calculate_mu(FlowEuler(use_dynamic_shifting=True), tokens) == pytest.approx(
        calculate_shift(tokens), rel=1e-12
    )
    other = FlowEuler(base_shift=0.3, max_shift=0.9, base_image_seq_len=100, max_image_seq_len=500)
    assert calculate_mu(other, tokens) == pytest.approx(calculate_shift(tokens, 100, 500, 0.3, 0.9), rel=1e-12)
