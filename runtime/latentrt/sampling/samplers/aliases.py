"""Other names of the samplers: those of A1111, ComfyUI, k-diffusion and the original scripts.

Names are normalized: lower case, `_` for other characters, `pp` for `++`, so that `DPM++ 2M Karras` is
`dpmpp_2m_karras`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["ALIASES", "SPACING_SUFFIXES", "normalize"]

_SDE = {"algorithm_type": "sde-dpmsolver++"}

# alias → the sampler, and the options that the name implies.
ALIASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "euler_ancestral": ("euler_a", {}),
    "k_euler": ("euler", {}),
    "k_euler_a": ("euler_a", {}),
    "k_euler_ancestral": ("euler_a", {}),
    "k_heun": ("heun", {}),
    "k_lms": ("lms", {}),
    "dpm_2": ("dpm2", {}),
    "k_dpm_2": ("dpm2", {}),
    "kdpm_2": ("dpm2", {}),
    "kdpm_2_a": ("dpm2_a", {}),
    "dpm2_ancestral": ("dpm2_a", {}),
    "dpm_2_a": ("dpm2_a", {}),
    "dpm_2_ancestral": ("dpm2_a", {}),
    "k_dpm_2_a": ("dpm2_a", {}),
    "k_dpm_2_ancestral": ("dpm2_a", {}),
    "dpmpp_sde_gpu": ("dpmpp_sde", {}),
    "dpmpp_1m": ("dpmpp_2m", {"solver_order": 1}),
    "k_dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_2m_heun": ("dpmpp_2m", {"solver_type": "heun"}),
    "dpmpp_3m": ("dpmpp_2m", {"solver_order": 3}),
    "dpmpp_2m_sde": ("dpmpp_2m", _SDE),
    "dpmpp_2m_sde_gpu": ("dpmpp_2m", _SDE),
    "dpmpp_2m_sde_heun": ("dpmpp_2m", _SDE | {"solver_type": "heun"}),
    "dpmpp_2m_sde_heun_gpu": ("dpmpp_2m", _SDE | {"solver_type": "heun"}),
    "dpmpp_3m_sde": ("dpmpp_2m", _SDE | {"solver_order": 3}),
    "dpmpp_3m_sde_gpu": ("dpmpp_2m", _SDE | {"solver_order": 3}),
    "dpmpp_3s": ("dpmpp_2s", {"solver_order": 3}),
    "plms": ("pndm", {"skip_prk_steps": True}),
    "uni_pc": ("unipc", {"solver_type": "bh1"}),
    "unipc_bh1": ("unipc", {"solver_type": "bh1"}),
    "uni_pc_bh2": ("unipc", {"solver_type": "bh2"}),
    "unipc_bh2": ("unipc", {"solver_type": "bh2"}),
    "deis_2m": ("deis", {"solver_order": 2}),
    "deis_3m": ("deis", {"solver_order": 3}),
    "ddimparallel": ("ddim", {}),
    "ddpmparallel": ("ddpm", {}),
    "cm": ("consistency", {}),
    "flow_match_euler": ("flow_euler", {}),
    "flow_match_heun": ("flow_heun", {}),
    "flow_match_lcm": ("flow_lcm", {}),
}

# suffix of a name → the spacing of its sigmas.
SPACING_SUFFIXES: Mapping[str, str] = {"_karras": "karras", "_exponential": "exponential", "_beta": "beta"}


def normalize(name: str) -> str:
    """Return `dpmpp_2m_karras` for `DPM++ 2M Karras`."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("++", "pp")).strip("_")
