"""Each published layout, written by the library that writes the published files, is read by its preset alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mffm.config import presets
from mffm.config.base import validate
from mffm.config.data import DataConfig
from mffm.data.ingest import ingest
from mffm.data.store import Store

NAMES = [
    "alexandria", "ani1x", "ase-db", "deepmd-npy", "extxyz", "matpes-pbe", "matpes-r2scan", "mptrj", "oc20", "omat24",
    "omol25", "qm7x", "salex", "spice", "transition1x", "vasp",
]  # fmt: skip
WITH_STRESS = {"deepmd-npy", "matpes-pbe", "matpes-r2scan", "mptrj", "omat24", "salex", "vasp"}
WITH_MOMENTS = {"alexandria", "mptrj"}
WITH_CHARGE = {"omol25", "spice"}


def stored(name: str, layouts: Any, data_yaml: Any, folder: Path, n: int = 8) -> tuple[list[Any], Store]:
    """Write a layout, ingest it by its preset, and return what was written and the store."""
    layout = layouts[name]
    (folder / "set").mkdir()
    samples = layout.make(n)
    layout.write(folder / "set", samples)
    config = validate(DataConfig, data_yaml(name, folder), name)
    report = ingest(config, folder, progress=False)
    assert report.n_rejected == 0, report.rejected_examples
    return samples, Store(folder / "store")


def test_every_preset_is_tested(layouts: Any) -> None:
    assert set(NAMES) == set(layouts) == set(presets.names())


@pytest.mark.parametrize("name", NAMES)
def test_comes_back_as_written(name: str, layouts: Any, data_yaml: Any, tmp_path: Path) -> None:
    if name in ("omat24", "omol25", "salex"):
        pytest.importorskip("ase_db_backends")
    samples, store = stored(name, layouts, data_yaml, tmp_path)
    assert store.n_frames == len(samples)
    fidelity = layouts[name].fidelity
    frames = [store.frame(row) for row in range(store.n_frames)]
    for sample in samples:
        energies = [abs(float(f.labels[fidelity, "energy"]) - sample.energy) for f in frames]
        frame = frames[int(np.argmin(energies))]
        assert min(energies) < 1e-7
        assert frame.atomic_numbers.tolist() == sample.atoms.numbers.tolist()
        np.testing.assert_allclose(frame.positions, sample.atoms.positions, atol=1e-7)
        np.testing.assert_allclose(frame.cell, sample.atoms.cell.array, atol=1e-7)
        assert frame.pbc.all() == sample.atoms.pbc.all()
        np.testing.assert_allclose(frame.labels[fidelity, "forces"], sample.forces, atol=1e-6)
        assert ((fidelity, "stress") in frame.labels) == (name in WITH_STRESS)
        if name in WITH_STRESS:
            np.testing.assert_allclose(frame.labels[fidelity, "stress"], sample.stress, atol=1e-7)
        if name in WITH_CHARGE:
            assert frame.charge == -1
            assert frame.spin_multiplicity == (2 if name == "omol25" else None)
        if name in WITH_MOMENTS and frame.magnetic_moments is not None:
            np.testing.assert_allclose(frame.magnetic_moments, sample.moments, atol=1e-6)
    with_moments = sum(frame.magnetic_moments is not None for frame in frames)
    assert with_moments == {"alexandria": 8, "mptrj": 5}.get(name, 0)


def test_ani1x_has_several_levels_on_one_structure(layouts: Any, data_yaml: Any, tmp_path: Path) -> None:
    samples, store = stored("ani1x", layouts, data_yaml, tmp_path)
    counts = store.label_counts()
    assert counts["wb97x_631gd"] == {"energy": 8, "forces": 8}
    assert counts["wb97x_tzvpp"] == {"energy": 8, "forces": 2}  # NaN is no label
    assert counts["ccsdt_cbs"] == {"energy": 4}
    assert (counts["hf_dz"], counts["hf_tz"], counts["hf_qz"]) == ({"energy": 8}, {"energy": 2}, {"energy": 2})
    paired = next(f for f in map(store.frame, range(8)) if ("ccsdt_cbs", "energy") in f.labels)
    low, high = (float(paired.labels[f, "energy"]) for f in ("wb97x_631gd", "ccsdt_cbs"))
    assert high - low == pytest.approx(0.1 * 27.211386245988, abs=1e-6)
    del samples


def test_a_label_that_is_partly_nan_is_rejected(layouts: Any, data_yaml: Any, tmp_path: Path) -> None:
    import h5py

    (tmp_path / "set").mkdir()
    path = layouts["ani1x"].write(tmp_path / "set", layouts["ani1x"].make(8))
    with h5py.File(path, "a") as file:
        file["H3O2/wb97x_dz.forces"][2, 1, 0] = np.nan
    report = ingest(validate(DataConfig, data_yaml("ani1x", tmp_path), "ani1x"), tmp_path, progress=False)
    assert (report.n_frames, report.n_rejected) == (7, 1)
    assert "forces (wb97x_dz.forces): nan at [1, 0]" in report.rejected_examples[0]


def test_transition1x_keeps_the_published_split(layouts: Any, data_yaml: Any, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    layouts["transition1x"].write(tmp_path / "set", layouts["transition1x"].make(12))
    content = data_yaml("transition1x", tmp_path) | {"splits": {"key": "group_0"}}
    report = ingest(validate(DataConfig, content, "t1x"), tmp_path, progress=False)
    assert report.split_frames == {"train": 4, "val": 4, "test": 4}


def test_mptrj_reads_raw_energies_and_the_corrected_ones_by_one_key(
    layouts: Any, data_yaml: Any, tmp_path: Path
) -> None:
    samples, store = stored("mptrj", layouts, data_yaml, tmp_path)
    del store
    corrected = {"pbe_mp": {"energy": {"key": "corrected_total_energy"}}}
    content = data_yaml("mptrj", tmp_path, labels=corrected) | {"store": str(tmp_path / "corrected")}
    ingest(validate(DataConfig, content, "mptrj"), tmp_path, progress=False)
    found = Store(tmp_path / "corrected")
    assert found.label_counts()["pbe_mp"] == {"energy": 8, "forces": 8, "stress": 8}
    assert float(found.frame(0).labels["pbe_mp", "energy"]) == pytest.approx(samples[0].energy - 1.374)
    assert found.frame_id(0) == "mp-0-0-0"
    assert found.group_names[found.group[4]] == "mp-1"


def test_moments_stay_with_a_structure_whose_name_is_taken(layouts: Any, data_yaml: Any, tmp_path: Path) -> None:
    for folder, seed in (("set", 0), ("other", 5)):
        (tmp_path / folder).mkdir()
        layouts["mptrj"].write(tmp_path / folder, layouts["mptrj"].make(3, seed))
    content = data_yaml("mptrj", tmp_path)
    content["sources"].append({"name": "other", "preset": "mptrj", "path": str(tmp_path / "other")})
    ingest(validate(DataConfig, content, "mptrj"), tmp_path, progress=False)
    store = Store(tmp_path / "store")
    assert [store.frame_id(row) for row in range(6)][2::3] == ["mp-0-0-2", "other/mp-0-0-2"]
    expected = [layouts["mptrj"].make(3, seed)[2].moments for seed in (0, 5)]
    for row, moments in zip((2, 5), expected, strict=True):
        np.testing.assert_allclose(store.frame(row).magnetic_moments, moments, atol=1e-6)


@pytest.mark.parametrize("name", ["mptrj", "deepmd-npy"])
def test_a_file_beside_the_named_one_decides_the_store_too(
    name: str, layouts: Any, data_yaml: Any, tmp_path: Path
) -> None:
    """What a complete store is compared with has every file that its frames depend on."""
    from mffm.errors import InputError

    stored(name, layouts, data_yaml, tmp_path)
    config = validate(DataConfig, data_yaml(name, tmp_path), name)
    assert ingest(config, tmp_path, progress=False).already_complete
    changed = next((tmp_path / "set").rglob("energy.npy"), None) or next((tmp_path / "set").glob("*.json"))
    content = changed.read_bytes()
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="of other source files"):
        ingest(config, tmp_path, progress=False)
