"""Element references: invariant to composition-linear shifts, honest about what the labels do not determine."""

import json

import numpy as np
import pytest
from ase.data import atomic_numbers

from mffm.config.recipe import ReferencesConfig
from mffm.data.references import ElementReferences, fit
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.fidelity import Fidelity, FidelityTable
from mffm.keys import N_ELEMENTS

ALL_ELECTRON = {"H": -13.6, "C": -1029.5, "N": -1485.3, "O": -2042.1, "Si": -7874.0, "Au": -518_000.0}
VALENCE = {"H": -12.9, "C": -57.2, "N": -78.0, "O": -109.9, "Si": -40.0, "Au": -30.0}


class LabelStore:
    """The columns that a fit reads: compositions and energies by fidelity (NaN: no label)."""

    def __init__(self, compositions, **energies):
        self.compositions = compositions
        self._energies = energies
        self.fidelities = FidelityTable([Fidelity(f, f) for f in energies])

    def has(self, fidelity, prop):
        self.fidelities.index(fidelity)
        return ~np.isnan(self._energies[fidelity]) & (prop == "energy")

    def energies(self, fidelity, rows):
        values = self._energies[fidelity][rows]
        assert not np.isnan(values).any()
        return values

    def composition(self, rows):
        return self.compositions[rows]

    def fit(self, config=None, rows=None, **settings):
        everything = np.arange(len(self.compositions))
        rows = rows or dict.fromkeys(self.fidelities.names, everything)
        return fit(self, self.fidelities.names, rows, config or ReferencesConfig(**settings))


def compositions_of(formulas):
    table = np.zeros((len(formulas), N_ELEMENTS + 1))
    for i, formula in enumerate(formulas):
        for symbol, n in formula.items():
            table[i, atomic_numbers[symbol]] = n
    return table


def vector(values):
    table = np.zeros(N_ELEMENTS + 1)
    for symbol, value in values.items():
        table[atomic_numbers[symbol]] = value
    return table


def random_formulas(n, elements="HCNO", seed=0):
    rng = np.random.default_rng(seed)
    return [{e: int(rng.integers(0, 9)) + (e == "H") for e in elements} for _ in range(n)]


def interaction(compositions, seed=1, size=0.1):
    """Return binding energies that no sum over elements describes."""
    rng = np.random.default_rng(seed)
    return rng.normal(-0.5, size, len(compositions)) * compositions.sum(axis=1)


def masked(values, n):
    values = values.copy()
    values[n:] = np.nan
    return values


def test_exact_sums_are_recovered():
    compositions = compositions_of(random_formulas(200))
    store = LabelStore(compositions, pbe=compositions @ vector(ALL_ELECTRON))
    references = store.fit()
    for symbol in "HCNO":
        assert references.value("pbe", symbol) == pytest.approx(ALL_ELECTRON[symbol], abs=1e-8)
    report = references.report["pbe"]
    assert report["method"] == "fit"
    assert (report["rank"], report["n_free"], report["n_labels"]) == (4, 4, 200)
    assert report["rmse_per_atom"] < 1e-8
    assert references.elements("pbe") == ["H", "C", "N", "O"]
    assert report["confounded"] == []
    assert report["warnings"] == []


def test_without_bias_of_a_ridge():
    """The residual is orthogonal to every element: no ridge has pulled the values."""
    compositions = compositions_of(random_formulas(300))
    energies = compositions @ vector(ALL_ELECTRON) + interaction(compositions)
    references = LabelStore(compositions, pbe=energies).fit()
    n_atoms = compositions.sum(axis=1)
    residual = (energies - references.energies("pbe", compositions)) / n_atoms
    assert np.abs(residual @ (compositions / n_atoms[:, None])).max() < 1e-8


@pytest.mark.parametrize("n_hf", [300, 40, 6, 1])
@pytest.mark.parametrize("shifted", ["hf", "lf"])
@pytest.mark.parametrize("method", ["auto", "fit", "paired"])
def test_a_composition_linear_shift_of_one_fidelity_changes_nothing_but_its_references(n_hf, shifted, method):
    compositions = compositions_of(random_formulas(300, ["H", "C", "N", "O", "Si", "Au"]))
    labels = {
        "lf": compositions @ vector(VALENCE) + interaction(compositions),
        "hf": masked(compositions @ vector(VALENCE) + interaction(compositions, seed=2), n_hf),
    }
    shift = compositions @ (vector(ALL_ELECTRON) + vector({"H": 3.3, "O": -7.7}))
    moved = {f: labels[f] + shift if f == shifted else labels[f] for f in labels}
    before, after = LabelStore(compositions, **labels), LabelStore(compositions, **moved)
    residuals = []
    for store in (before, after):
        references = store.fit(method=method)
        residuals.append(
            {
                f: e[~np.isnan(e)] - references.energies(f, compositions[~np.isnan(e)])
                for f, e in store._energies.items()
            }
        )
    for f in labels:
        assert np.abs(residuals[0][f] - residuals[1][f]).max() < 1e-6


def test_one_composition_is_bounded_and_reported():
    compositions = compositions_of([{"H": 6, "C": 2, "O": 1}] * 50)
    energies = compositions @ vector(ALL_ELECTRON) + interaction(compositions, size=0.01)
    references = LabelStore(compositions, pbe=energies).fit()
    report = references.report["pbe"]
    assert (report["rank"], report["n_free"]) == (1, 3)
    assert report["confounded"] == [["H", "C", "O"]]
    assert "H C O never vary independently" in report["warnings"][0]
    assert np.mean(energies - references.energies("pbe", compositions)) == pytest.approx(0, abs=1e-7)
    values = np.array([references.value("pbe", e) for e in "HCO"])
    # The shortest vector that gives this energy points along the composition.
    assert values / values[2] == pytest.approx([6, 2, 1], rel=1e-9)


def test_two_elements_that_always_come_together_leave_the_others_exact():
    formulas = random_formulas(100, "HCO")
    for i, formula in enumerate(formulas):
        if i % 2:
            formula.update({"Si": 1 + i % 3, "Au": 2 * (1 + i % 3)})
    compositions = compositions_of(formulas)
    references = LabelStore(compositions, pbe=compositions @ vector(ALL_ELECTRON)).fit()
    for symbol in "HCO":
        assert references.value("pbe", symbol) == pytest.approx(ALL_ELECTRON[symbol], abs=1e-5)
    assert references.report["pbe"]["confounded"] == [["Si", "Au"]]
    assert references.report["pbe"]["rank"] == 4


def test_an_element_in_one_frame_of_many_is_determined():
    formulas = [*random_formulas(20_000, "HC"), {"H": 4, "Si": 1}]
    compositions = compositions_of(formulas)
    references = LabelStore(compositions, pbe=compositions @ vector(ALL_ELECTRON)).fit()
    assert references.value("pbe", "Si") == pytest.approx(ALL_ELECTRON["Si"], abs=1e-6)
    assert references.report["pbe"]["rank"] == 3


def test_elements_that_part_in_a_single_frame_are_determined():
    """The weakest direction that labels can have, at energies of 1e7 eV: without refinement it is off by 3 meV."""
    formulas = random_formulas(2000, "HC")
    for i, formula in enumerate(formulas):
        formula.update({"Si": 1 + i % 30, "Au": 2 * (1 + i % 30)})
    compositions = compositions_of([*formulas, {"H": 1, "Si": 30, "Au": 61}])
    references = LabelStore(compositions, pbe=compositions @ vector(ALL_ELECTRON)).fit()
    for symbol in ("H", "C", "Si", "Au"):
        assert references.value("pbe", symbol) == pytest.approx(ALL_ELECTRON[symbol], rel=1e-12, abs=1e-7)
    assert references.report["pbe"]["rank"] == 4
    assert references.report["pbe"]["condition_number"] > 1000


# Paired residual


def small_hf(n_hf=5, family=None):
    """300 cheap labels of many compositions; a few expensive ones of one family of compositions, alkanes."""
    family = family or [{"C": n, "H": 2 * n + 2} for n in (1, 2, 3, 4, 5)]
    compositions = compositions_of(family + random_formulas(300, "HCNO"))
    bound = interaction(compositions)
    lf = compositions @ vector(VALENCE) + bound
    hf = compositions @ vector(ALL_ELECTRON) + 1.05 * bound
    return LabelStore(compositions, lf=lf, hf=masked(hf, n_hf))


def test_five_labels_of_one_family_are_rescued_by_pairs():
    store = small_hf()
    references = store.fit()
    report = references.report["hf"]
    assert report["method"] == "paired"
    assert (report["anchor"], report["n_pairs"], report["n_labels"]) == ("lf", 5, 5)
    assert (report["rank"], report["n_free"]) == (2, 2)
    other = compositions_of([{"C": 7, "H": 16}, {"C": 6, "H": 6}])
    truth = other @ vector(ALL_ELECTRON)
    paired = np.abs(references.energies("hf", other) - truth) / other.sum(axis=1)
    own = np.abs(store.fit(method="fit").energies("hf", other) - truth) / other.sum(axis=1)
    assert paired[1] < 0.6  # binding energy, which is not the references' matter, is 0.5 eV/atom
    assert paired[1] < own[1]
    assert references.report["lf"]["method"] == "fit"
    assert references.elements("hf") == ["H", "C"]
    assert report["unknown"] == ["N", "O"]
    assert "N O" in " ".join(report["warnings"])


def test_an_element_without_any_label_is_unknown_and_an_error_at_use():
    store = small_hf()
    references = store.fit()
    formulas = compositions_of([{"C": 1, "H": 4}, {"O": 1, "H": 2}])
    assert references.covers("hf", formulas).tolist() == [True, False]
    assert np.isnan(references.table["hf"][8])
    with pytest.raises(InputError, match=r"'hf' has no element reference for O; known: H, C; .*references\.given\.hf"):
        references.energies("hf", formulas)
    references.energies("lf", formulas)
    with pytest.raises(InputError, match="'b3lyp'; there are: hf, lf"):
        references.energies("b3lyp", formulas)


def test_enough_labels_of_full_rank_are_fitted_on_their_own():
    compositions = compositions_of(random_formulas(300))
    energies = compositions @ vector(ALL_ELECTRON) + interaction(compositions)
    for n, expected in ((19, "paired"), (20, "fit")):
        store = LabelStore(compositions, lf=compositions @ vector(VALENCE), hf=masked(energies, n))
        assert store.fit().report["hf"]["method"] == expected


def test_pairs_that_tell_less_than_the_own_labels_are_not_used():
    compositions = compositions_of(random_formulas(12))
    hf = compositions @ vector(ALL_ELECTRON)
    lf = compositions_of(random_formulas(12)) @ vector(VALENCE)
    lf[2:] = np.nan
    extra = compositions_of(random_formulas(50, seed=3))
    store = LabelStore(
        np.concatenate([compositions, extra]),
        lf=np.concatenate([lf, extra @ vector(VALENCE)]),
        hf=np.concatenate([hf, np.full(50, np.nan)]),
    )
    references = store.fit()
    assert references.report["hf"]["method"] == "fit"
    assert "pairs with lf tell less" in references.report["hf"]["reason"]
    assert references.value("hf", "O") == pytest.approx(ALL_ELECTRON["O"], abs=1e-6)


def test_elements_that_no_pair_contains_are_fitted_on_the_rest():
    family = [{"C": 1, "H": 4}, {"C": 2, "H": 6}, {"C": 2, "H": 4}, {"C": 1, "H": 4, "O": 1}, {"H": 2, "O": 1}]
    store = small_hf(family=family)
    store._energies["lf"][3:5] = np.nan
    references = store.fit()
    report = references.report["hf"]
    assert report["method"] == "paired"
    assert report["n_pairs"] == 3
    assert "no pair contains O" in " ".join(report["warnings"])
    assert references.value("hf", "O") == pytest.approx(ALL_ELECTRON["O"], abs=5)
    assert (report["rank"], report["n_free"]) == (3, 3)


def test_paired_without_pairs_is_an_error_and_auto_warns():
    store = small_hf()
    store._energies["lf"][:5] = np.nan
    with pytest.raises(InputError, match=r"'hf' \(5 with an energy\).*anchor 'lf'.*label some frames at both"):
        store.fit(method="paired")
    report = store.fit().report["hf"]
    assert report["method"] == "fit"
    assert "no frame that the anchor lf labels too" in report["warnings"][0]


def test_only_the_rows_given_are_read():
    store = small_hf(n_hf=300)
    store._energies["hf"][100:] = 1e9  # would spoil the fit
    store._energies["lf"][100:] = -1e9
    rows = {"lf": np.arange(100), "hf": np.arange(100)}
    references = store.fit(rows=rows)
    assert references.report["hf"]["n_labels"] == 100
    assert references.value("hf", "C") == pytest.approx(ALL_ELECTRON["C"], abs=2)


def test_order_of_the_fidelities_does_not_matter():
    store = small_hf()
    rows = dict.fromkeys(("lf", "hf"), np.arange(305))
    one = fit(store, ["hf", "lf"], rows, ReferencesConfig())
    other = fit(store, ["lf", "hf"], rows, ReferencesConfig())
    assert list(one.table) == ["hf", "lf"]
    assert all(np.array_equal(one.table[f], other.table[f], equal_nan=True) for f in rows)


# Given, none, files


def test_given_values_are_kept_and_the_rest_is_fitted():
    store = small_hf()
    references = store.fit(given={"hf": {"C": -1000.0, "O": -2042.0}})
    assert references.value("hf", "C") == -1000.0
    assert references.value("hf", "O") == -2042.0
    assert references.value("hf", "H") is not None
    assert references.value("hf", "H") != pytest.approx(ALL_ELECTRON["H"], abs=1)  # takes up what C was given wrong
    assert references.report["hf"]["method"] == "given"
    assert references.report["hf"]["n_free"] == 1


def test_a_fidelity_without_energies_has_no_references():
    compositions = compositions_of(random_formulas(50))
    store = LabelStore(compositions, lf=np.full(50, np.nan), hf=compositions @ vector(ALL_ELECTRON))
    assert store.fit(method="paired").report["lf"]["method"] == "none"
    references = store.fit()
    assert references.report["lf"]["method"] == "none"
    assert "not trained" in references.report["lf"]["reason"]
    assert references.elements("lf") == []
    with pytest.raises(InputError, match=r"'lf' has no element references.*no energy label"):
        references.energies("lf", compositions)
    given = store.fit(given={"lf": {"H": -1.0}})
    assert given.report["lf"]["method"] == "given"
    assert given.elements("lf") == ["H"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchor": "b3lyp"}, "references.anchor: 'b3lyp'.*hf, lf"),
        ({"given": {"b3lyp": {"H": 1.0}}}, "references.given names fidelity 'b3lyp'"),
        ({"given": {"hf": {"Hx": 1.0}}}, "references.given.hf: 'Hx' is not an element"),
        ({"given": {"hf": {"X": 1.0}}}, "'X' is not an element"),
    ],
)
def test_bad_settings(settings, message):
    store = small_hf()
    with pytest.raises(InputError, match=message):
        store.fit(**settings)


def test_json_round_trip_is_exact():
    store = small_hf()
    references = store.fit()
    restored = ElementReferences.from_dict(json.loads(json.dumps(references.to_dict())))
    for f in ("lf", "hf"):
        assert np.array_equal(restored.table[f], references.table[f], equal_nan=True)
    assert restored.report == references.report
    with pytest.raises(InputError, match="expected a mapping"):
        ElementReferences.from_dict({"lf": {}})


def test_report_names_what_is_weak():
    store = small_hf()
    text = store.fit().report_markdown()
    assert "| hf | paired | 5 | 5 with lf | 2 of 2 |" in text
    assert "| N O |" in text
    assert "warning: no label of hf contains N O" in text
    assert "| C | " in text


def test_on_a_real_store(molecule_store):
    """GFN2 is valence-only, the others all-electron; five CCSD(T) labels stand on PBE's references."""
    store = Store(molecule_store)
    rows = {f: store.rows(split="train", fidelity=f, prop="energy") for f in store.fidelities.names}
    rows["ccsdt"] = rows["ccsdt"][:5]
    references = fit(store, store.fidelities.names, rows, ReferencesConfig(anchor="pbe"))
    assert references.report["pbe"]["n_labels"] == len(rows["pbe"])
    assert references.value("gfn2", "C") == pytest.approx(-57, abs=15)
    assert references.value("pbe", "C") == pytest.approx(-1034, abs=15)
    assert references.report["ccsdt"]["method"] == "paired"
    residual = store.energies("ccsdt", rows["ccsdt"]) - references.energies("ccsdt", store.composition(rows["ccsdt"]))
    assert np.abs(residual / store.n_atoms[rows["ccsdt"]]).max() < 0.5
