"""Normalised errors and aggregates of LAMBench (``metrics/`` at c20f07d): 0 is perfect, 1 is no better than a dummy.

A dummy predicts the mean: for force fields its error is the standard deviation of the labels, for properties it is
listed.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MOLECULES, INORGANIC, CATALYSIS = "Molecules", "Inorganic Materials", "Catalysis"
DOMAINS = (MOLECULES, INORGANIC, CATALYSIS)


@dataclass(frozen=True)
class ForceFieldTask:
    """A test set of energies, forces and, for some, virials.

    Attributes:
        energy, force, virial: standard deviations of the labels, eV/atom, eV/Å, eV/atom; virial None: not scored.
        omol_energy, omol_force: of the ωB97M-V labels that models trained on OMol25 are scored against.
        d3: damping of the PBE-D3 that is added to the prediction.
    """

    domain: str
    energy: float
    force: float
    virial: float | None = None
    omol_energy: float | None = None
    omol_force: float | None = None
    d3: str | None = None


FORCE_FIELD: dict[str, ForceFieldTask] = {
    "AQM": ForceFieldTask(
        MOLECULES, 0.0274237364941365, 0.36804974289536174, None, 0.026886363885976483, 0.48079757014613167
    ),
    "H_nature_2022": ForceFieldTask(
        MOLECULES, 0.3680732527625157, 2.075534952128696, None, 0.39558742361833016, 1.9680702171137432
    ),
    "AIMD_Chig": ForceFieldTask(
        MOLECULES, 0.009639542241251055, 0.8628550274940282, None, 0.011235040126809573, 0.8434356010200169
    ),
    "HEA25_S": ForceFieldTask(INORGANIC, 0.43116544603059137, 1.6451851726356517, 1.5346916671705537),
    "HEA25_bulk": ForceFieldTask(INORGANIC, 0.510765388371663, 2.2626383273307247, 2.3506419913635357),
    "MoS2": ForceFieldTask(INORGANIC, 0.08167024857360158, 0.9568415738836734, 0.4161647190798736),
    "CompressBi": ForceFieldTask(INORGANIC, 0.13320054684238294, 0.667987100991502, 0.21138606885531494, d3="zero"),
    "NequIP_NC_2022": ForceFieldTask(INORGANIC, 0.007043606595996931, 0.9434989207476847),
    "Ca_batteries_CM2021": ForceFieldTask(INORGANIC, 0.015689329430759177, 0.17632637938539042),
    "Si_ZEO22": ForceFieldTask(INORGANIC, 0.035252909678594395, 1.232529293429265, d3="bj"),
    "Carbon_growth": ForceFieldTask(CATALYSIS, 0.6062335773750094, 1.6286800187054977, 0.43007347637274035, d3="zero"),
    "In2O3_CO2": ForceFieldTask(CATALYSIS, 0.04897980313266302, 0.3860350371558003),
    "REANN_CO2_Ni100": ForceFieldTask(CATALYSIS, 0.01166496756645258, 0.691476732207179),
    "Cu_MgO_catalysts": ForceFieldTask(CATALYSIS, 0.014202887558640341, 0.18708301630679647, d3="zero"),
    "HPt_NC_2022": ForceFieldTask(CATALYSIS, 0.04891938011948422, 1.1641152396504415, 0.27071525803447116),
}


@dataclass(frozen=True)
class PropertyTask:
    """A property calculation.

    Attributes:
        dummies: metric → value of the dummy; only these metrics are scored.
        is_penalised: normalised errors are divided by the success rate.
    """

    domain: str
    dummies: Mapping[str, float]
    is_penalised: bool = False


PROPERTY: dict[str, PropertyTask] = {
    "phonon_mdr": PropertyTask(
        INORGANIC,
        {"mae_entropy": 764.8, "mae_max_freq": 1188.3, "mae_free_energy": 125.1, "mae_heat_capacity": 547.4},
        is_penalised=True,
    ),
    "elastic": PropertyTask(INORGANIC, {"MAE_G_VRH": 67.5431, "MAE_K_VRH": 136.2597}, is_penalised=True),
    "vacancy": PropertyTask(INORGANIC, {"MAE": 4.381}),
    "pressure": PropertyTask(INORGANIC, {"MAE": 2.505}),
    "stacking_fault": PropertyTask(INORGANIC, {"MAE_E": 1544.8257, "MAE_dE": 2.0}),
    "interface": PropertyTask(INORGANIC, {"MAE": 2060.4102820362823}),
    "surface": PropertyTask(INORGANIC, {"MAE": 101.22517626586762}),
    "torsionnet": PropertyTask(MOLECULES, {"MAE": 2.4939, "MAEB": 5.8176, "NABH_h": 493}),
    "wiggle150": PropertyTask(MOLECULES, {"MAE": 105.0576}),
    "binding_energy": PropertyTask(MOLECULES, {"MAE": 8.098}),
    "rxn_barrier": PropertyTask(MOLECULES, {"MAE": 20.975}),
    "neb": PropertyTask(
        CATALYSIS,
        {"MAE_Ea": 2.3595, "MAE_dE": 0.9498, "ø_Desorption": 95.28, "ø_Dissociation": 99.37, "ø_Transfer": 95.43},
    ),
}

# Weights of energy, force and virial in a domain that has virials, and in one that has none.
WITH_VIRIAL, WITHOUT_VIRIAL = (0.45, 0.45, 0.1), (0.5, 0.5, 0.0)
SLOPE_OF_NO_DRIFT = 5e-4  # eV/atom/ps in the suite's units
WORST_DRIFT = 5.0  # also of a trajectory that did not end


def is_scorable(task: str, metrics: Mapping[str, float | None]) -> bool:
    """Return whether a force field's energy, force and, where the suite scores it, virial are there."""
    needed = ("energy_rmse_natoms", "force_rmse", *(["virial_rmse_natoms"] if FORCE_FIELD[task].virial else []))
    return all(metrics.get(name) is not None for name in needed)


def force_field_errors(task: str, metrics: Mapping[str, float | None], omol: bool = False) -> dict[str, float]:
    """Return RMSE over the dummy's, at most 1, for energy, force and, where it is scored, virial.

    Args:
        metrics: ``energy_rmse_natoms`` (meV/atom), ``force_rmse`` (meV/Å), ``virial_rmse_natoms`` (meV/atom).
        omol: the labels are those for models trained on OMol25.

    Raises:
        KeyError: a metric that is scored is missing.
    """
    spec = FORCE_FIELD[task]
    energy = spec.omol_energy if omol and spec.omol_energy is not None else spec.energy
    force = spec.omol_force if omol and spec.omol_force is not None else spec.force
    dummies = {"energy_rmse_natoms": energy, "force_rmse": force, "virial_rmse_natoms": spec.virial}
    found = {}
    for name, dummy in dummies.items():
        if dummy is not None:
            value = metrics[name]
            if value is None:
                raise KeyError(f"{task}: {name}")
            found[name.partition("_")[0]] = min(value / 1000 / dummy, 1.0)
    return found


def force_field_domain(domain: str, errors: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return the error of a domain: geometric means over its test sets, weighted. None where a set is missing.

    Args:
        errors: task → `force_field_errors`.
    """
    tasks = [t for t, spec in FORCE_FIELD.items() if spec.domain == domain]
    if any(t not in errors for t in tasks):
        return None
    has_virial = any(FORCE_FIELD[t].virial is not None for t in tasks)
    total = 0.0
    for name, weight in zip(("energy", "force", "virial"), WITH_VIRIAL if has_virial else WITHOUT_VIRIAL, strict=True):
        if weight:
            total += weight * geometric_mean(errors[t][name] for t in tasks if name in errors[t])
    return total


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive values."""
    return float(np.exp(np.mean(np.log(list(values)))))


def property_errors(task: str, metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Return metric over dummy, in 0 to 1, over the success rate where the suite divides by it.

    A metric that is missing or NaN is left out, as the suite does.

    Args:
        metrics: of the task, and ``success_rate`` (0 to 1) where it is penalised.
    """
    spec = PROPERTY[task]
    rate = metrics.get("success_rate") if spec.is_penalised else 1.0
    if rate is None or rate <= 0:
        return {}
    found = {}
    for name, dummy in spec.dummies.items():
        value = metrics.get(name)
        if value is not None and not math.isnan(value):
            found[name] = min(max(value / dummy, 0.0), 1.0) / rate
    return found


def property_domain(domain: str, errors: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return the mean over all metrics of a domain, None where one of its tasks was not run."""
    tasks = [t for t, spec in PROPERTY.items() if spec.domain == domain]
    if any(not errors.get(t) for t in tasks):
        return None
    return float(np.mean([v for t in tasks for v in errors[t].values()]))


def overall(domains: Mapping[str, float | None]) -> float | None:
    """Return the mean of the three domains: M_FF or M_PC. None where one is missing."""
    values = [domains.get(d) for d in DOMAINS]
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if len(known) == len(DOMAINS) else None


def instability(slopes: Sequence[float | None]) -> float:
    """Return M_IS, the mean over systems of log10(slope / 5e-4), clipped to 0 and 5.

    Args:
        slopes: eV/atom/ps in the suite's units; None: the trajectory did not end.
    """
    values = []
    for slope in slopes:
        if slope is None or math.isnan(slope):
            values.append(WORST_DRIFT)
        else:
            drift = math.log10(slope / SLOPE_OF_NO_DRIFT) if slope > 0 else 0.0
            values.append(min(max(drift, 0.0), WORST_DRIFT))
    return float(np.mean(values))


@dataclass(frozen=True)
class Aggregates:
    """What the leaderboard shows of a model; None where a task that it needs was not run."""

    force_field: float | None
    property: float | None
    force_field_domains: Mapping[str, float | None]
    property_domains: Mapping[str, float | None]


def aggregate(
    force_field: Mapping[str, Mapping[str, float | None]],
    properties: Mapping[str, Mapping[str, float | None]],
    omol: bool = False,
) -> Aggregates:
    """Return M_FF, M_PC and their domains.

    Args:
        force_field, properties: task → metrics in the suite's names.
    """
    direct = {t: force_field_errors(t, m, omol) for t, m in force_field.items() if t in FORCE_FIELD}
    derived = {t: property_errors(t, m) for t, m in properties.items() if t in PROPERTY}
    by_force = {d: force_field_domain(d, direct) for d in DOMAINS}
    by_property = {d: property_domain(d, derived) for d in DOMAINS}
    return Aggregates(overall(by_force), overall(by_property), by_force, by_property)
