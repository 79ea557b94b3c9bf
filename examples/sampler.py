"""A sampler of one's own: the stochastic Euler method with noise `eta` between the ODE (0) and Euler ancestral (1).

    python examples/sampler.py "a red circle on a blue background" --eta 0.5 -o circle.png

A sampler is a table with a row for each evaluation of the denoiser (`latentrt.Schedule`). In sigma space, with latents
x = x0 + sigma * noise, one row leads from sigma to sigma_next in three terms: x is scaled down towards the estimate y
of x0, and fresh noise is added:

    x_next = (down / sigma) x + (1 - down / sigma) y + up z        with down^2 + up^2 = sigma_next^2
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from latentrt import Pipeline, Schedule


def training_sigmas(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> NDArray[np.float64]:
    """Return the noise levels that Stable Diffusion was trained at, one for each timestep."""
    betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    alphas = np.cumprod(1 - betas)
    sigmas: NDArray[np.float64] = np.sqrt((1 - alphas) / alphas)
    return sigmas


def stochastic_euler(count: int, eta: float) -> Schedule:
    """Return the table of `count` steps for a model that predicts v (Salimans and Ho 2022, section 2.4).

    Args:
        count: steps, each one evaluation of the denoiser.
        eta: the share of fresh noise, 0 to 1.
    """
    known = training_sigmas()
    timesteps = np.linspace(999, 0, count)
    sigma = np.interp(timesteps, np.arange(1000), known)
    after = np.append(sigma[1:], 0.0)  # the last step ends without noise
    up = eta * np.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
    down = np.sqrt(after**2 - up**2)
    c_in = 1 / np.sqrt(sigma**2 + 1)  # the denoiser takes latents of variance 1
    return Schedule.of(
        t=timesteps,
        c_in=c_in,
        # y = alpha (c_in x) - s v with alpha = c_in and s = sigma c_in. A model that predicts noise: p = 1, q = -sigma.
        p=c_in**2,
        q=-sigma * c_in,
        a=down / sigma,
        b=(1 - down / sigma)[:, np.newaxis],  # of y, which is the history h
        s=up,
        noise_draws=(up > 0).astype(int),
        alpha=1.0,
        sigma=sigma,
        init_noise_sigma=float(sigma[0]),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Generate an image with a sampler of one's own.")
    parser.add_argument("prompt")
    parser.add_argument("--bundle", default="sample")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eta", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("-o", "--output", default="out.png")
    arguments = parser.parse_args()
    pipeline = Pipeline.load(arguments.bundle)
    table = stochastic_euler(arguments.steps, arguments.eta)
    pipeline(arguments.prompt, schedule=table, seed=arguments.seed).save(arguments.output)
