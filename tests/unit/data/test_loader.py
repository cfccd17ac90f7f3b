"""Batches: what is collated is what is stored, alone or with others, by one rank or by eight."""

import json
import threading
from pathlib import Path

import ase.build
import ase.io
import numpy as np
import pytest
import torch

from mffm.config.base import validate
from mffm.config.data import DataConfig
from mffm.config.recipe import PlanConfig
from mffm.data.ingest import ingest
from mffm.data.loader import Loader, collate, dummy, evaluation_batches, pack
from mffm.data.plan import Cursor, Plan, build_pools
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.fidelity import Fidelity, FidelityTable
from mffm.keys import PROPERTIES

LOADER_CUTOFF = 4.0


def loader_frames():
    """Small crystals with many images, slabs and molecules; labels are random numbers, some are missing."""
    rng = np.random.default_rng(5)
    frames = []
    for i in range(48):
        kind = i % 4
        if kind == 0:
            atoms = ase.build.bulk("NaCl", "rocksalt", a=5.6) * (1, 1, 1 + i % 2)
        elif kind == 1:
            atoms = ase.build.molecule(["H2O", "CH4", "C2H6", "CH3OH"][i // 4 % 4])
        elif kind == 2:
            atoms = ase.build.bulk("Cu", "fcc", a=3.6)
        else:
            atoms = ase.build.fcc111("Al", (1, 1, 2), vacuum=4.0)
            atoms.pbc = (True, True, False)
        atoms.positions += rng.normal(0, 0.03, atoms.positions.shape)
        if atoms.pbc.any():
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(0, 0.02, (3, 3))), scale_atoms=True)
        if kind == 1:
            atoms.info["charge"] = [0, 1, -1][i // 4 % 3]
            atoms.info["spin"] = 1 + i % 3
        atoms.info["lf_energy"] = float(rng.normal(-1000, 1))
        if i % 3:
            atoms.arrays["lf_forces"] = rng.normal(size=(len(atoms), 3))
        if kind in (0, 2):
            stress = rng.normal(size=(3, 3))
            atoms.info["lf_stress"] = (stress + stress.T) / 2
        if i % 5 == 0:
            atoms.info["hf_energy"] = float(rng.normal(-2000, 1))
        atoms.info.pop("adsorbate_info", None)
        atoms.info["frame_id"] = f"frame-{i}"
        atoms.info["part"] = "train" if i % 6 else "val"
        if i % 2:
            atoms.info["weight"] = 0.25 * i
        frames.append(atoms)
    return frames


@pytest.fixture(scope="module")
def loader_store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("loader")
    ase.io.write(folder / "frames.extxyz", loader_frames(), format="extxyz")
    config = {
        "store": str(folder / "store"),
        "fidelities": {"lf": {"level_of_theory": "PBE"}, "hf": {"level_of_theory": "r2SCAN"}},
        "sources": [
            {
                "name": "made",
                "path": "frames.extxyz",
                "frame_key": "frame_id",
                "charge_key": "charge",
                "spin_multiplicity_key": "spin",
                "weight_key": "weight",
                "licence": "none",
                "labels": {
                    "lf": {"energy": "lf_energy", "forces": "lf_forces", "stress": "lf_stress"},
                    "hf": {"energy": "hf_energy"},
                },
            }
        ],
        "splits": {"key": "part"},
        "cutoffs": [LOADER_CUTOFF],
    }
    ingest(validate(DataConfig, config, "test"), Path(folder), progress=False)
    return Store(folder / "store")


LOADER_TABLE = FidelityTable([Fidelity("hf", "r2SCAN"), Fidelity("lf", "PBE")])  # another order than the store's


def loader_plan(store, *, entries=None, **changes):
    entries = entries or [{"fidelity": "hf"}, {"fidelity": "lf", "properties": ["energy", "forces", "stress"]}]
    config = PlanConfig(**{"pools": entries, "edge_budget": 400, **changes})
    return Plan(build_pools(store, config, LOADER_TABLE, LOADER_CUTOFF), config, seed=0)


def rows_with(store, n, fidelity="lf"):
    return store.rows(split="train", fidelity=fidelity)[:n]


def everything(store, rows, dtype=torch.float64, fidelity="lf"):
    idx = np.full(len(rows), LOADER_TABLE.index(fidelity))
    return collate(store, rows, idx, LOADER_TABLE, [PROPERTIES] * len(rows), LOADER_CUTOFF, dtype)


def test_batch_holds_what_the_store_has(loader_store):
    rows = rows_with(loader_store, 12)
    batch = everything(loader_store, rows)
    starts = np.concatenate([[0], np.cumsum(batch.n_atoms.numpy())])
    for s, row in enumerate(rows.tolist()):
        frame = loader_store.frame(row)
        part = slice(starts[s], starts[s + 1])
        assert np.array_equal(batch.atomic_numbers[part], frame.atomic_numbers)
        assert np.array_equal(batch.positions[part], frame.positions)
        assert np.array_equal(batch.cell[s], frame.cell)
        assert (batch.system_idx[part] == s).all()
        assert batch.charge[s] == (frame.charge or 0)
        assert batch.spin_multiplicity[s] == (frame.spin_multiplicity or 0)
        assert batch.volume[s] == pytest.approx(frame.volume if frame.pbc.all() else 0.0)
        for prop in PROPERTIES:
            assert bool(batch.masks[prop][s]) == (("lf", prop) in frame.labels)
            stored = frame.labels.get(("lf", prop), 0.0)
            found = batch.labels[prop][part] if prop == "forces" else batch.labels[prop][s]
            assert np.array_equal(found, np.broadcast_to(stored, found.shape))
    assert set(batch.fidelity_idx.tolist()) == {1}
    assert batch.rows.tolist() == rows.tolist()
    kinds = [{p for p in PROPERTIES if batch.masks[p][s]} for s in range(len(rows))]
    assert len({frozenset(k) for k in kinds}) >= 3  # labels really are partial here
    assert any(loader_store.frame(int(r)).charge for r in rows)


def test_edges_of_a_batch_are_those_of_each_structure(loader_store):
    rows = rows_with(loader_store, 12)
    batch = everything(loader_store, rows)
    assert batch.n_edges == int(loader_store.n_edges(LOADER_CUTOFF)[rows].sum())
    lengths = batch.edge_vectors.norm(dim=-1)
    assert (lengths[batch.neighbor_mask] < LOADER_CUTOFF).all()
    assert (lengths[~batch.neighbor_mask] == 2 * LOADER_CUTOFF).all()
    assert torch.equal(batch.system_idx[batch.neighbors], batch.system_idx[batch.receivers])
    on = batch.neighbor_mask
    assert torch.equal(batch.edge_vectors[batch.reverse][on], -batch.edge_vectors[on])
    assert (batch.reverse[on] != torch.arange(len(on))[on]).all()
    assert torch.equal(batch.receivers[batch.reverse], batch.neighbors)


def test_batched_collate_equals_single_collate(loader_store):
    rows = rows_with(loader_store, 9)
    together = everything(loader_store, rows)
    start = 0
    for s, row in enumerate(rows):
        alone = everything(loader_store, [row])
        stop = start + len(alone.positions)
        assert torch.equal(together.positions[start:stop], alone.positions)
        for atom in range(start, stop):
            own, single = ((b.receivers == a) & b.neighbor_mask for b, a in ((together, atom), (alone, atom - start)))
            assert torch.equal(together.edge_vectors[own], alone.edge_vectors[single])
            assert torch.equal(together.neighbors[own] - start, alone.neighbors[single])
        for prop in PROPERTIES:
            assert torch.equal(together.masks[prop][s], alone.masks[prop][0])
            part = slice(start, stop) if prop == "forces" else slice(s, s + 1)
            assert torch.equal(together.labels[prop][part], alone.labels[prop])
        start = stop


def test_dtypes_and_float64_geometry(loader_store):
    rows = rows_with(loader_store, 6)
    single, double = everything(loader_store, rows, torch.float32), everything(loader_store, rows, torch.float64)
    assert single.labels["energy"].dtype == torch.float64
    reals = (single.positions, single.cell, single.edge_vectors, single.volume)
    assert {t.dtype for t in (*reals, single.labels["forces"], single.labels["stress"])} == {torch.float32}
    assert {t.dtype for t in single.weights.values()} == {torch.float32}
    # Vectors are rounded once, after they were computed; from rounded positions they would be off by more.
    assert torch.equal(single.edge_vectors, double.edge_vectors.float())


def test_a_property_that_is_not_asked_for_is_masked(loader_store):
    row = next(r for r in rows_with(loader_store, 20).tolist() if len(loader_store.labels(r, "lf")) == 3)
    batch = collate(loader_store, [row, row], [1, 1], LOADER_TABLE, [{"forces"}, {"energy"}], LOADER_CUTOFF)
    assert [batch.masks[p].tolist() for p in PROPERTIES] == [[False, True], [True, False], [False, False]]
    assert batch.labels["energy"][0] == 0
    assert not batch.labels["stress"].any()


def test_weights_are_the_frames_own(loader_store):
    rows = rows_with(loader_store, 12)
    batch = everything(loader_store, rows)
    expected = [loader_store.frame(int(r)).weight for r in rows]
    assert len(set(expected)) > 1
    for prop in PROPERTIES:
        assert batch.weights[prop].tolist() == pytest.approx(expected)
    row = loader_store.rows(split="train", fidelity="hf")[0]
    both = collate(loader_store, [row, row], [0, 1], LOADER_TABLE, [PROPERTIES] * 2, LOADER_CUTOFF)
    assert both.labels["energy"][0] == loader_store.frame(int(row)).labels["hf", "energy"]


def test_no_rows_give_the_dummy_batch(loader_store):
    batch = collate(loader_store, [], [], LOADER_TABLE, [], LOADER_CUTOFF)
    assert batch.atomic_numbers.tolist() == [1]
    assert batch.groups == ((1, 1),)
    assert batch.n_edges == 0
    assert batch.rows.tolist() == [-1]
    assert not any(m.any() for m in batch.masks.values())
    reference = everything(loader_store, rows_with(loader_store, 2), torch.float32)
    for name in ("positions", "cell", "neighbors", "edge_vectors", "reverse", "system_idx", "volume", "charge", "rows"):
        found, expected = getattr(batch, name), getattr(reference, name)
        assert found.dtype == expected.dtype
        assert found.ndim == expected.ndim
    assert dummy(LOADER_CUTOFF, torch.float64).positions.dtype == torch.float64


def test_pack_without_a_store():
    water = ase.build.molecule("H2O")
    batch = pack([(water.numbers, water.positions, water.cell.array, water.pbc)] * 2, [0, 1], 3.0, charge=[0, 1])
    assert batch.n_systems == 2
    assert batch.charge.tolist() == [0, 1]
    assert batch.volume.tolist() == [0, 0]
    assert batch.n_edges == 12


def test_evaluation_batches_hold_each_row_once_largest_first(loader_store):
    rows = loader_store.rows(fidelity="lf")
    args = ("lf", LOADER_TABLE, LOADER_CUTOFF, 150)
    batches = list(evaluation_batches(loader_store, np.random.default_rng(0).permutation(rows), *args))
    seen = np.concatenate([b.rows.numpy() for b in batches])
    assert np.array_equal(np.sort(seen), rows)
    edges = loader_store.n_edges(LOADER_CUTOFF)[seen]
    assert np.all(np.diff(edges) <= 0)
    assert len(batches) > 3
    assert all(b.n_edges <= 150 or b.n_systems == 1 for b in batches)
    again = list(evaluation_batches(loader_store, rows, *args))
    assert [b.rows.tolist() for b in again] == [b.rows.tolist() for b in batches]
    assert list(evaluation_batches(loader_store, rows[:0], *args)) == []
    tiny = list(evaluation_batches(loader_store, rows[:4], "lf", LOADER_TABLE, LOADER_CUTOFF, 1))
    assert [b.n_systems for b in tiny] == [1] * 4


# Loader


def test_every_world_size_reads_the_same_systems_and_counts_are_the_masks(loader_store):
    entries = [{"fidelity": "hf"}, {"fidelity": "lf", "properties": ["energy", "stress"]}]  # the forces exist
    plan = loader_plan(loader_store, entries=entries, edges_per_microbatch=120)
    reference = None
    for world in (1, 2, 8):
        loaders = [
            Loader(loader_store, plan, LOADER_TABLE, LOADER_CUTOFF, rank=r, world_size=world, last_step=3)
            for r in range(world)
        ]
        steps = []
        for results in zip(*loaders, strict=True):
            step = results[0][0]
            microbatches = [b for _, batches, _ in results for b in batches]
            assert {len(batches) for _, batches, _ in results} == {plan.n_microbatches(world)}
            systems, counts = [], {}
            for batch in microbatches:
                systems += [p for p in zip(batch.rows.tolist(), batch.fidelity_idx.tolist(), strict=True) if p[0] >= 0]
                for prop in PROPERTIES:
                    for s in torch.nonzero(batch.masks[prop]).flatten().tolist():
                        n = {"energy": 1, "forces": 3 * int(batch.n_atoms[s]), "stress": 9}[prop]
                        key = (int(batch.fidelity_idx[s]), prop)
                        counts[key] = counts.get(key, 0) + n
            assert counts == step.counts
            steps.append(sorted(systems))
        assert len(steps) == 3
        reference = reference or steps
        assert steps == reference


def test_resume_from_the_cursor_of_what_was_consumed(loader_store):
    plan = loader_plan(loader_store)
    with Loader(loader_store, plan, LOADER_TABLE, LOADER_CUTOFF, last_step=6) as loader:
        whole = [b for _, batches, _ in loader for b in batches]
    with Loader(loader_store, plan, LOADER_TABLE, LOADER_CUTOFF, prefetch=4) as loader:
        for _ in range(2):
            _, _, cursor = next(loader)
    cursor = Cursor.from_dict(json.loads(json.dumps(cursor.to_dict())))
    assert cursor.step == 2
    with Loader(loader_store, plan, LOADER_TABLE, LOADER_CUTOFF, cursor, last_step=6) as loader:
        rest = [b for _, batches, _ in loader for b in batches]
    assert len(rest) == 4
    for found, expected in zip(rest, whole[2:], strict=True):
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.edge_vectors, expected.edge_vectors)  # bitwise
        assert torch.equal(found.labels["forces"], expected.labels["forces"])


def test_an_exception_in_the_thread_reaches_the_caller(loader_store):
    plan = loader_plan(loader_store)

    class Broken:
        def __getattr__(self, name):
            return getattr(loader_store, name)

        def geometry(self, row):
            raise InputError("shard 3 is damaged")

    loader = Loader(Broken(), plan, LOADER_TABLE, LOADER_CUTOFF)
    with pytest.raises(InputError, match="shard 3"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    assert not loader_threads()


def loader_threads():
    return [t for t in threading.enumerate() if t.name == "mffm-loader"]


def test_several_threads_keep_the_order(loader_store):
    plan = loader_plan(loader_store)
    read = {}
    for threads in (1, 3):
        with Loader(loader_store, plan, LOADER_TABLE, LOADER_CUTOFF, last_step=9, threads=threads) as loader:
            read[threads] = list(loader)
    assert len(read[1]) == 9
    for (_, one, first), (_, other, second) in zip(read[1], read[3], strict=True):
        assert first == second
        assert all(torch.equal(a.edge_vectors, b.edge_vectors) for a, b in zip(one, other, strict=True))


def test_an_exception_of_one_of_several_threads_comes_at_its_step(loader_store):
    plan = loader_plan(loader_store)
    rows = plan.step(plan.step(plan.start())[1])[0].rows.tolist()
    first = set(plan.step(plan.start())[0].rows.tolist())
    bad = next(row for row in rows if row not in first)

    class Broken:
        def __getattr__(self, name):
            return getattr(loader_store, name)

        def geometry(self, row):
            if row == bad:
                raise InputError("shard 3 is damaged")
            return loader_store.geometry(row)

    loader = Loader(Broken(), plan, LOADER_TABLE, LOADER_CUTOFF, threads=3)
    next(loader)
    with pytest.raises(InputError, match="shard 3"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    assert not loader_threads()


def test_close_stops_a_thread_that_waits_for_room(loader_store):
    loader = Loader(loader_store, loader_plan(loader_store), LOADER_TABLE, LOADER_CUTOFF, prefetch=1)
    next(loader)
    assert len(loader_threads()) == 1
    loader.close()
    loader.close()
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(loader)


def test_a_pool_of_a_real_store(loader_store):
    plan = loader_plan(loader_store)
    hf, lf = plan.pools
    assert (hf.fidelity_idx, lf.fidelity_idx) == (0, 1)
    assert hf.label_counts["energy"] == loader_store.label_counts("train")["hf"]["energy"]
    assert lf.label_counts == {p: loader_store.label_counts("train")["lf"][p] for p in PROPERTIES}
    with pytest.raises(InputError, match="ood"):
        loader_plan(loader_store, entries=[{"fidelity": "lf", "split": "ood"}])
    with pytest.raises(InputError, match="elsewhere"):
        loader_plan(loader_store, entries=[{"fidelity": "lf", "source": "elsewhere"}])
    with pytest.raises(InputError, match="mffm edges"):
        build_pools(loader_store, plan.config, LOADER_TABLE, 4.5)
