"""The solvers with an order of convergence, and the order that their papers claim.

Each has a smooth grid, because an order is defined on smooth grids only: the sigmas of Karras et al. 2022 over the
range of Stable Diffusion, a flow's own, or, for solvers on whole timesteps of training, so many timesteps that rounding
is negligible. `lower_order_final`, which is for few steps, is off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gaussian_flow import EDM_SIGMA_DATA, Predicts
from latentrt.sampling.samplers import SAMPLERS, Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["CASES", "Case"]

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KARRAS = STABLE_DIFFUSION | {"use_karras_sigmas": True}

# The same noise over more timesteps, a multiple of every number of steps.
MANY = 15360
FINE = {
    "num_train_timesteps": MANY,
    "beta_start": 0.85 / MANY,
    "beta_end": 12 / MANY,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}
LAST_EIGHTH = MANY // 8

# The same noise over so few timesteps that SA-Solver, which adds noise at 200 to 800, adds none.
FEW = KARRAS | {"num_train_timesteps": 200, "beta_start": 0.00425, "beta_end": 0.06}

EDM = {"sigma_min": 0.03, "sigma_max": 15.0, "sigma_data": EDM_SIGMA_DATA}  # Stable Diffusion's range

KARRAS_2022 = "Karras et al. 2022, section 3"
HAIRER = "Hairer et al. 1993"
RUNGE = f"{HAIRER}, II.1"
DPM_SOLVER = "Lu et al. 2022a, theorem 3.2"
DPM_SOLVER_CODE = "`dpm_solver_pytorch.py` of Lu et al."
DPM_SOLVER_PP = "Lu et al. 2022b"
DPM_SOLVER_PP_1 = f"{DPM_SOLVER_PP}, section 4"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A solver and the settings of its measurement.

    Attributes:
        name, family: the label of its curve, and the panel of the plot.
        sampler, config: the name of the sampler and its configuration.
        predicts: the prediction type of the model.
        paper: the order of convergence that the source claims.
        source: the publication with the claim.
        given: the last row whose latents are exact, so that the next step is of full order: the number of earlier
            outputs that such a step uses, plus one if it corrects the step before.
        given_share: the same as a share of all rows, if the start is not smooth.
        tail: the number of rows omitted at the end: the step to σ = 0, which is of order 1, and rows of lower order
            before it.
        until: if set, latents are compared at the first timestep below it, and `tail` is ignored.
        whole: the number of evaluations per step of the method.
        per_count: the number of evaluations that diffusers counts as one step.
        order: the order of `Steps`.
    """

    name: str
    family: str
    sampler: str
    config: Mapping[str, Any]
    paper: int
    source: str
    predicts: Predicts = "epsilon"
    given: int = 0
    given_share: float = 0.0
    tail: int = 1
    until: int | None = None
    whole: int = 1
    per_count: int = 1
    order: int = 4

    def schedule(self, evaluations: int, *, own_start: bool) -> Schedule:
        """Return the table of the most whole steps within `evaluations`, not counting omitted rows.

        Args:
            evaluations: the number of evaluations.
            own_start: whether the solver runs from its first row; otherwise given rows are not corrected.
        """
        config = dict(self.config)
        if self.sampler == "unipc" and not own_start:
            config["disable_corrector"] = tuple(range(self.given))
        counted = evaluations // self.whole * self.whole // self.per_count
        steps = Steps(count=counted + (self.tail if self.until is None else 0), order=self.order)
        return SAMPLERS[self.sampler].read(config).schedule(steps)

    def stop(self, schedule: Schedule) -> int:
        """Return the row before which latents are compared."""
        if self.until is None:
            return len(schedule) - self.tail
        return int((schedule.t < self.until).argmax())


def _k_diffusion() -> Iterator[Case]:
    family = "Over σ"
    yield Case(name="Euler", family=family, sampler="euler", config=KARRAS, paper=1, source=KARRAS_2022)
    for name, sampler, source in (("Heun", "heun", KARRAS_2022), ("DPM2", "dpm2", RUNGE)):
        yield Case(
            name=name, family=family, sampler=sampler, config=KARRAS, per_count=2, whole=2, paper=2, source=source
        )
    for order in (1, 2, 3, 4):
        yield Case(
            name=f"LMS {order}",
            family=family,
            sampler="lms",
            config=KARRAS,
            order=order,
            given=order - 1,
            paper=order,
            source=f"{HAIRER}, III.5",
        )


def _multistep() -> Iterator[Case]:
    for algorithm, title, first, second in (
        ("dpmsolver", "DPM-Solver", DPM_SOLVER, DPM_SOLVER_CODE),
        ("dpmsolver++", "DPM-Solver++", DPM_SOLVER_PP_1, f"{DPM_SOLVER_PP}, algorithm 2"),
    ):
        for order, kind, source in (
            (1, "", first),
            (2, "midpoint", second),
            (2, "heun", second),
            (3, "", DPM_SOLVER_CODE),
        ):
            yield Case(
                name=f"{title} {order}M {kind}".strip(),
                family=f"{title}, multistep",
                sampler="dpmpp_2m",
                config={**_keep_order(KARRAS, order, kind), "algorithm_type": algorithm},
                given=order - 1,
                paper=order,
                source=source,
            )


def _keep_order(config: Mapping[str, Any], order: int, kind: str) -> dict[str, Any]:
    """Return the configuration of a DPM-Solver that keeps its order and does not step to σ = 0."""
    end = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
    return {**config, **end, "solver_order": order, "solver_type": kind or "midpoint"}


def _singlestep() -> Iterator[Case]:
    for algorithm, title, sources in (
        ("dpmsolver", "DPM-Solver", (DPM_SOLVER, DPM_SOLVER, DPM_SOLVER)),
        ("dpmsolver++", "DPM-Solver++", (DPM_SOLVER_PP_1, f"{DPM_SOLVER_PP}, algorithm 1", DPM_SOLVER_CODE)),
    ):
        for order, kind in ((1, ""), (2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun")):
            yield Case(
                name=f"{title} {order}S {kind}".strip(),
                family=f"{title}, singlestep",
                sampler="dpmpp_2s",
                config={**_keep_order(KARRAS, order, kind), "algorithm_type": algorithm},
                whole=order,
                paper=order,
                source=sources[order - 1],
            )


def _deis() -> Iterator[Case]:
    for order in (1, 2, 3):
        yield Case(
            name=f"DEIS {order}",
            family="DEIS",
            sampler="deis",
            config={**KARRAS, "lower_order_final": False, "solver_order": order},
            given=order - 1,
            paper=order,
            source="Zhang and Chen 2022",
        )


def _unipc() -> Iterator[Case]:
    for in_x0, kind in ((True, "x0"), (False, "ε")):
        for order in (1, 2, 3):
            for b in ("bh1", "bh2"):
                yield Case(
                    name=f"UniPC-{order} {b} {kind}",
                    family=f"UniPC, in {kind}",
                    sampler="unipc",
                    config={
                        **KARRAS,
                        "predict_x0": in_x0,
                        "solver_type": b,
                        "solver_order": order,
                        "final_sigmas_type": "zero" if in_x0 else "sigma_min",
                    },
                    given=order,
                    tail=order,  # diffusers has no other end
                    paper=order + 1,
                    source="Zhao et al. 2023, theorem 3.1",
                )


def _sa_solver() -> Iterator[Case]:
    for algorithm, kind in (("data_prediction", "x0"), ("noise_prediction", "ε")):
        for predictor, corrector in ((1, 2), (2, 2), (2, 3), (3, 4)):
            yield Case(
                name=f"SA-Solver {predictor}, {corrector} {kind}",
                family="SA-Solver, no noise",
                sampler="sa_solver",
                config={
                    **FEW,
                    "algorithm_type": algorithm,
                    "predictor_order": predictor,
                    "corrector_order": corrector,
                    "lower_order_final": False,
                },
                given=max(predictor, corrector),
                paper=corrector,
                source="Xue et al. 2023",
            )


def _whole_timesteps() -> Iterator[Case]:
    family, liu = "DDIM and PNDM", "Liu et al. 2022"
    ddim = {**FINE, "clip_sample": False}
    yield Case(name="DDIM", family=family, sampler="ddim", config=ddim, until=LAST_EIGHTH, paper=1, source=DPM_SOLVER)
    for name, skip, given in (("PLMS", True, 5), ("PNDM", False, 12)):
        yield Case(
            name=name,
            family=family,
            sampler="pndm",
            config={**FINE, "skip_prk_steps": skip},
            given=given,
            until=LAST_EIGHTH,
            paper=2,
            source=liu,
        )
    yield Case(
        name="iPNDM", family=family, sampler="ipndm", config={}, predicts="v", given_share=0.1, paper=2, source=liu
    )


def _edm() -> Iterator[Case]:
    yield Case(
        name="EDM Euler", family="EDM", sampler="edm_euler", config=EDM, predicts="edm", paper=1, source=KARRAS_2022
    )
    for order, kind, source in (
        (1, "", DPM_SOLVER_PP_1),
        (2, "midpoint", f"{DPM_SOLVER_PP}, algorithm 2"),
        (2, "heun", f"{DPM_SOLVER_PP}, algorithm 2"),
        (3, "", DPM_SOLVER_CODE),
    ):
        yield Case(
            name=f"EDM DPM-Solver++ {order}M {kind}".strip(),
            family="EDM",
            sampler="edm_dpmpp_2m",
            config=_keep_order(EDM, order, kind),
            predicts="edm",
            given=order - 1,
            paper=order,
            source=source,
        )


def _flow() -> Iterator[Case]:
    for shift in (1.0, 3.0):
        for name, evaluations, paper, source in (("Euler", 1, 1, f"{HAIRER}, I.7"), ("Heun", 2, 2, RUNGE)):
            yield Case(
                name=f"Flow {name}, shift {shift:g}",
                family="Flows",
                sampler=f"flow_{name.lower()}",
                config={"shift": shift},
                predicts="velocity",
                per_count=evaluations,
                whole=evaluations,
                paper=paper,
                source=source,
            )


CASES: tuple[Case, ...] = (
    *_k_diffusion(),
    *_multistep(),
    *_singlestep(),
    *_deis(),
    *_unipc(),
    *_sa_solver(),
    *_whole_timesteps(),
    *_edm(),
    *_flow(),
)
