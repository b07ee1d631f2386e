"""Samplers by the names of other libraries."""

from collections.abc import Iterable

from ..support.choices import did_you_mean

# What other libraries call a sampler, and what to use here. Names for other options are in support/choices.py.
OTHER_NAMES = {
    "euler": "'ddim', which is Euler's rule on the probability-flow ODE",
    "euler_a": "'ddpm', which is 'euler_ancestral'",
    "ancestral": "'ddpm'",
    "heun_karras": "'heun', on Karras' levels if steps is a number",
    "edm": "'heun'",
    "dpmpp_2m": "'dpm++2m'",
    "dpmpp_2m_sde": "'dpm++2m_sde'",
    "dpmpp_3m_sde": "'dpm++3m_sde'",
    "dpmpp_sde": "'dpm++sde'",
    "dpmpp_2s_ancestral": "'dpm++2s_ancestral'",
    "sde_dpmsolver++": "'dpm++2m_sde'",
    "dpm_2": "'dpm2'",
    "dpm_2_ancestral": "'dpm2_ancestral'",
    "k_dpm_2": "'dpm2'",
    "uni_pc": "'unipc'",
    "unipc_bh2": "'unipc'",
    "ipndm": "'lms', whose steps may differ in size",
    "dpm++": "'dpm++2m'",
    "dpmsolver++": "'dpm++2m'",
    "dpm_solver": "'dpm++2m'",
    "dpm_solver_pp_2m": "'dpm++2m'",
    "pndm": "'plms'",
    "pc": "'predictor_corrector'",
    "langevin": "'annealed_langevin'",
    "ald": "'annealed_langevin'",
    "em": "'euler_maruyama'",
    "sde": "'euler_maruyama'",
    "pf_ode": "'probability_flow', or 'ode' for an adaptive solver",
    "rk45": "'ode', an adaptive solver",
    "dopri5": "'ode', an adaptive solver",
}


def name_to_use(name: str, samplers: Iterable[str]) -> str:
    """The end of a message for a name that no sampler has, such as "; use 'ddim'"; "" if nothing is near."""
    plain = name.lower().replace(" ", "_").replace("-", "_")
    base = plain.removesuffix("_karras")
    hint = OTHER_NAMES.get(plain) or OTHER_NAMES.get(base)
    for known in samplers:
        if hint is None and known.replace("_", "") == base.replace("_", ""):
            hint = f"'{known}'"
    if hint is None:
        return did_you_mean(plain, samplers)
    karras = " with steps=model.process.karras(n)" if plain.endswith("_karras") and "heun" not in plain else ""
    return f"; use {hint}{karras}"
