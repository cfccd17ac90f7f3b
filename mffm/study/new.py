"""A study of two files: the YAMLs that `mffm ingest` and `mffm study` take, from what the files have.

    low file, high file ──keys, structures──▶ data.yaml (splits) ──labels of the training split──▶ study.yaml (n_high)
                                              recipe.yaml (batch from the edges of the frames)

Everything written is a start that the user may change; nothing reads it but the ordinary commands.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mffm.config.base import validate
from mffm.config.data import DataConfig, LabelSpec, SourceSpec
from mffm.config.recipe import Recipe
from mffm.config.study import StudyConfig
from mffm.data.checks import same_structures
from mffm.data.guess import Guess, guess, read_keys
from mffm.data.identity import geometry_hash
from mffm.data.neighbors import count
from mffm.data.readers import RejectedFrame, read
from mffm.data.readers.convert import formula
from mffm.data.records import Geometry
from mffm.data.splits import Splitter
from mffm.errors import InputError
from mffm.keys import ENERGY, FORCES, PROPERTIES, STRESS, Property
from mffm.release import write_text

FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}
LEAST_HIGH = 40  # structures with high labels: 28 to train on and 8 to judge by, the least that two methods compare on
FEW_PAIRS = 20  # structures with both levels, below which the study's gate may have too few for R²
LEAST_POINT = 8  # labels of the first point of a curve
LEAST_FORMULAS = 8  # from so many compositions on, some are held out
FEW_OF_EACH = 3  # high frames of a molecule, from which on a run may end on their energies alone
BOND = 1.2  # distance of bonded atoms, at most, over the sum of their covalent radii
HELD_OUT = 0.15  # of the structures with high labels, about
CUTOFF = 5.0
FRAMES_A_STEP = 8
EDGES_COUNTED = 200  # frames whose edges are counted for the budget of a step
NAME = re.compile(r"[^A-Za-z0-9._-]+")
BACKBONE = {"channels": 48, "edge_channels": 24, "lmax": 2, "l_message": 1, "layers": 2, "cutoff": CUTOFF}


@dataclass(frozen=True)
class Side:
    """What the user says of one of the two files.

    Attributes:
        name: of the fidelity; the file's where not given.
        keys: property → key, where the guess is not to be trusted.
        option: start of the options that name its keys, ``--low`` or ``--high``.
    """

    path: Path
    option: str
    name: str | None = None
    keys: Mapping[Property, str] = field(default_factory=dict)

    @property
    def fidelity(self) -> str:
        stem = self.path.name.removesuffix(".gz")
        return self.name or NAME.sub("_", stem.rpartition(".")[0] or stem).strip("._-") or self.option.strip("-")


@dataclass
class Contents:
    """What was read of a file: its labelled frames.

    Attributes:
        structures: the frames of the high file; of the low one none are kept.
        hashes: [n] of the structures.
        edges: within the cutoff, of the first frames.
        n_rejected: frames that an ingest leaves out.
    """

    side: Side
    found: Guess
    structures: list[Geometry] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    formulas: list[str] = field(default_factory=list)
    labels: Counter[Property] = field(default_factory=Counter)
    edges: list[int] = field(default_factory=list)
    n_rejected: int = 0

    @property
    def properties(self) -> list[Property]:
        return [prop for prop in PROPERTIES if self.labels[prop]]


@dataclass(frozen=True)
class NewStudy:
    """What `mffm study new` makes.

    Attributes:
        data, recipe, study: contents of the YAMLs, checked.
        n_paired: structures of the high file that the low file has too.
        n_train: structures with high labels in the training split.
    """

    folder: Path
    low: Contents
    high: Contents
    n_paired: int
    n_train: int
    data: dict[str, Any]
    recipe: dict[str, Any]
    study: dict[str, Any]

    @property
    def has_differences(self) -> bool:
        """Whether every label of the high file has one of the low file beside it: differences can be trained on."""
        return _are_paired(self.low, self.high, self.n_paired)

    @property
    def commands(self) -> list[str]:
        """What the user gives next."""
        low, high = self.low.side.fidelity, self.high.side.fidelity
        found = [f"mffm ingest {self.folder / 'data.yaml'}"]
        if self.has_differences:
            found.append(f"mffm difference {self.data['store']} --high {high} --low {low}")
        return [*found, f"mffm study {self.folder / 'study.yaml'}"]


def new_study(low: Side, high: Side, folder: Path, steps: int, seeds: int) -> NewStudy:
    """Return a study of two files.

    Args:
        folder: for the YAMLs; its name is the study's.
        steps: of every training, stages included.
        seeds: how many.

    Raises:
        InputError: a file without labels, or too few; a label key that cannot be told; both levels the same.
    """
    if low.fidelity == high.fidelity:
        raise InputError(
            f"both files give the fidelity {low.fidelity!r}; name them apart with --low-name and --high-name, e.g. "
            "--low-name gfn2 --high-name ccsdt"
        )
    found = {side.option: guess(read_keys(side.path), side.keys, side.option) for side in (low, high)}
    if low.path.resolve() == high.path.resolve() and found[low.option].labels == found[high.option].labels:
        raise InputError(
            f"{low.path}: low and high are the same labels ({found[low.option].labels[ENERGY].key}); name the keys of "
            "the two levels with --low-energy, --low-forces, --high-energy and --high-forces"
        )
    of_high = _read(high, found[high.option], keep=True)
    if len(of_high.structures) < LEAST_HIGH:
        raise InputError(
            f"{high.path}: {len(of_high.structures)} structures with an energy; {LEAST_HIGH} is the least, some to "
            "train on, others to validate and to judge by"
        )
    of_low = _read(low, found[low.option], keep=False)
    if not of_low.formulas:
        raise InputError(f"{low.path}: no structure with an energy ({found[low.option].labels[ENERGY].key})")
    # The high structures are kept in memory, the low ones pass by.
    pairs = same_structures(of_high.structures, (_geometry(f) for f in _frames(low, of_low.found)))
    n_paired = len({i for i, _ in pairs})
    data = _data(of_low, of_high, folder)
    config = validate(DataConfig, data, f"{folder / 'data.yaml'}")
    n_train = _in_training(of_high, config)
    recipe = _recipe(of_low, of_high, folder, data["store"], steps)
    validate(Recipe, recipe, f"{folder / 'recipe.yaml'}")
    has_ood = bool(data["splits"].get("holdout"))
    is_paired = _are_paired(of_low, of_high, n_paired)
    study = _study(of_low, of_high, folder, n_train, has_ood, is_paired, steps, seeds)
    validate(StudyConfig, study, f"{folder / 'study.yaml'}")
    return NewStudy(folder, of_low, of_high, n_paired, n_train, data, recipe, study)


def write(new: NewStudy) -> list[Path]:
    """Write data.yaml, recipe.yaml and study.yaml; return their paths.

    Raises:
        InputError: one of them is there and says something else.
    """
    low, high = new.low.side.fidelity, new.high.side.fidelity
    heads = {
        "data.yaml": f"Where the labels of {low} and {high} are, and which structures train and which judge.\n"
        f"Fill in level_of_theory and licence before you give a release away. {new.commands[0]}",
        "recipe.yaml": f"A training on both fidelities: what the methods of study.yaml change. Of {high} a study sets "
        "max_frames.",
        "study.yaml": f"How many {high} labels, and which method? A grid of methods, numbers of labels and seeds.\n"
        f"{new.commands[-1]}",
    }  # fmt: skip
    contents = {"data.yaml": new.data, "recipe.yaml": new.recipe, "study.yaml": new.study}
    texts = {
        new.folder / name: "".join(f"# {line}\n" for line in heads[name].split("\n")) + _yaml(content)
        for name, content in contents.items()
    }
    for path, text in texts.items():
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise InputError(
                f"{path}: is there and says something else, perhaps your changes; give another --folder, or remove it"
            )
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice: no anchors in a file that a user reads."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.dump(
        content, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None
    )  # fmt: skip


def _source(side: Side, found: Guess, folder: Path) -> dict[str, Any]:
    def shown(spec: LabelSpec) -> Any:
        content = spec.model_dump(exclude_defaults=True)
        return spec.key if len(content) == 1 else content

    keys = {"charge_key": found.charge_key, "spin_multiplicity_key": found.spin_multiplicity_key}
    return {
        "name": side.fidelity,
        "path": os.path.relpath(side.path.resolve(), folder.resolve()),
        "group_key": "formula",
        **{key: value for key, value in keys.items() if value is not None},
        "licence": "unknown",
        "labels": {side.fidelity: {prop: shown(spec) for prop, spec in found.labels.items()}},
    }


def _frames(side: Side, found: Guess) -> Any:
    """Yield the frames of a file that an ingest takes, and `RejectedFrame` for those that it does not."""
    content = {**_source(side, found, Path.cwd()), "path": str(side.path)}
    return read(side.path, validate(SourceSpec, content, str(side.path)))


def _geometry(frame: Any) -> Geometry:
    return frame.atomic_numbers, frame.positions, frame.cell, frame.pbc


def _read(side: Side, found: Guess, keep: bool) -> Contents:
    contents = Contents(side, found)
    reason = ""
    for frame in _frames(side, found):
        if isinstance(frame, RejectedFrame):
            contents.n_rejected += 1
            reason = reason or frame.reason
            continue
        if (side.fidelity, ENERGY) not in frame.labels:
            continue
        contents.labels.update(prop for _, prop in frame.labels)
        contents.formulas.append(formula(frame.atomic_numbers))
        if len(contents.edges) < EDGES_COUNTED:
            contents.edges.append(count(frame.positions, frame.cell, frame.pbc, CUTOFF))
        if keep:
            contents.structures.append(_geometry(frame))
            contents.hashes.append(geometry_hash(*contents.structures[-1], charge=frame.charge))
    if contents.n_rejected and not contents.formulas:
        raise InputError(f"{side.path}: no frame can be used, {contents.n_rejected} are not readable, first: {reason}")
    return contents


def _data(low: Contents, high: Contents, folder: Path) -> dict[str, Any]:
    sides = (low, high)
    splits: dict[str, Any] = {"fractions": FRACTIONS}
    held = _held_out(high.formulas)
    if held:
        splits["holdout"] = {"ood": held}
    return {
        "store": f"stores/{folder.resolve().name}",
        "fidelities": {c.side.fidelity: {"level_of_theory": c.side.fidelity} for c in sides},
        "sources": [_source(c.side, c.found, folder) for c in sides],
        "splits": splits,
        "cutoffs": [CUTOFF],
    }


def _held_out(formulas: Sequence[str]) -> list[str]:
    """Return compositions with about a seventh of the structures, in an order of their hashes; none of few.

    One with more than a tenth of the structures stays, and so does one whose elements no other would have.
    """
    counts = Counter(formulas)
    if len(counts) < LEAST_FORMULAS:
        return []
    found: list[str] = []
    n = 0
    for name in sorted(counts, key=lambda f: hashlib.sha256(f.encode()).digest()):
        kept = _elements([f for f in counts if f != name and f not in found])
        if n + counts[name] > HELD_OUT * len(formulas) or not _elements([name]) <= kept:
            continue
        found.append(name)
        n += counts[name]
    return sorted(found) if len(found) > 1 else []


def _elements(formulas: Sequence[str]) -> set[str]:
    return {symbol for f in formulas for symbol in re.findall("[A-Z][a-z]?", f)}


def _are_paired(low: Contents, high: Contents, n_paired: int) -> bool:
    return n_paired == len(high.structures) and set(high.properties) <= set(low.properties)


def _in_training(high: Contents, config: DataConfig) -> int:
    """Return how many structures of the high file an ingest puts into the training split."""
    splitter = Splitter(config.splits, [])
    pairs = zip(high.hashes, high.formulas, strict=True)
    unique = dict(pairs)
    parts = Counter(splitter.names[splitter.split("", name, digest)] for digest, name in unique.items())
    for split in ("train", "test"):
        if parts[split] < LEAST_POINT:
            raise InputError(
                f"{high.side.path}: {parts[split]} of {len(unique)} different structures fall into the split "
                f"{split!r}; {LEAST_POINT} is the least: more structures are needed"
            )
    return parts["train"]


def _points(n_train: int) -> list[int | str]:
    """Return the numbers of labels of a curve: all, a half, a quarter, an eighth."""
    parts = sorted({n_train // 2**k for k in (3, 2, 1)})
    return [*(n for n in parts if n >= LEAST_POINT), "all"]


def _recipe(low: Contents, high: Contents, folder: Path, store: str, steps: int) -> dict[str, Any]:
    names = low.side.fidelity, high.side.fidelity
    edges = [*low.edges, *high.edges]
    budget = max(int(FRAMES_A_STEP * np.mean(edges)), int(np.max(edges)), 1)
    loss: dict[str, Any] = {"energy": {"weight": 2}, "forces": {"weight": 1}}
    if STRESS in (*low.properties, *high.properties):
        loss["stress"] = {"weight": 10, "delta": 0.001}
    return {
        "name": folder.resolve().name,
        "data": {
            "store": store,
            "plan": {
                "pools": [_pool(low, weight=1), _pool(high, weight=1)],
                "edge_budget": budget,
                "oversize": "single",
            },
        },
        "references": {"anchor": names[0]},
        "model": {
            "backbone": BACKBONE,
            "conditioning": {"kind": "onehot"},
            "heads": {"kind": "delta", "base": names[0]},
        },
        "loss": loss,
        "optim": {"kind": "soap", "lr": 0.003, "warmup_steps": min(50, steps // 6)},
        "train": {
            "steps": steps,
            "validate_every": max(steps // 6, 1),
            "save_every": steps,
            "best": "val/loss",
            "threads": 1,
        },
        "log": {"wandb": "disabled"},
    }


def _pool(contents: Contents, **more: Any) -> dict[str, Any]:
    return {"fidelity": contents.side.fidelity, "properties": list(contents.properties), **more}


def _study(
    low: Contents, high: Contents, folder: Path, n_train: int, has_ood: bool, is_paired: bool, steps: int, seeds: int
) -> dict[str, Any]:
    names = low.side.fidelity, high.side.fidelity
    half = max(steps // 2, 1)
    on_low = {"data.plan.pools": [_pool(low)], "train.best": f"val/{names[0]}/loss"}
    return {
        "name": folder.resolve().name,
        "recipe": "recipe.yaml",
        "changes": {"model.conditioning": {"kind": "none"}, "model.heads": {"kind": "shared"}},
        "high": names[1],
        "n_high": _points(n_train),
        "seeds": list(range(seeds)),
        "iid": "test",
        "ood": "ood" if has_ood else None,
        "validation_share": 0.25,
        "properties": list(high.properties),
        "stages": {
            "pretrain": {"changes": {**on_low, "train.steps": half}},
            "low": {"changes": {**on_low, "train.steps": steps}},
        },
        "methods": _methods(low, high, half, is_paired),
        "baselines": ["hf_only", "fine_tune"],
    }


def _methods(low: Contents, high: Contents, half: int, is_paired: bool) -> dict[str, Any]:
    """Return the methods that need no more than two files; with all structures in both, the explicit deltas too."""
    a, b = low.side.fidelity, high.side.fidelity
    delta = {"kind": "delta", "base": a}
    methods: dict[str, Any] = {
        "hf_only": {
            "title": f"{b} alone",
            "changes": {"data.plan.pools": [_pool(high)], "references": {"method": "fit"}},
        },
        "fine_tune": {
            "title": f"pretrain on {a}, fine-tune on {b}",
            "start_from": "pretrain",
            "changes": {
                "data.plan.pools": [_pool(high)],
                "references": {"method": "auto"},
                "model.init_from": {b: a},
                "optim.lr": 0.0003,
                "optim.warmup_steps": max(half // 6, 1),
                "train.steps": half,
            },
        },
        "low_only": {"title": f"{a} alone, references refitted", "refit": "low"},
        "idle": {
            "title": f"independent heads, {b}'s a copy of {a}'s at the start",
            "changes": {"model.heads": {"kind": "independent", "init_from": {b: a}}},
        },
        "delta": {"title": "delta head", "changes": {"model.heads": delta}},
        "onehot": {"title": "one-hot conditioning", "changes": {"model.conditioning": {"kind": "onehot"}}},
        "mffm": {
            "title": "FiLM conditioning and delta head, draws by temperature",
            "changes": {
                "data.plan.pools": [_pool(low), _pool(high)],
                "data.plan.temperature": 1.7,
                "model.conditioning": {"kind": "film"},
                "model.heads": delta,
            },
        },
    }
    # Energies of several frames of a molecule say what its forces are, one of each does not (docs/studies/README.md).
    if FORCES not in high.properties and _has_several_of_each(high.structures):
        methods["mffm"]["title"] += f", the last third on {b} alone"
        methods["mffm"]["changes"] |= {"data.plan.finish": {"fidelities": [b]}, "train.best": f"val/{b}/energy_mae"}
    if is_paired:
        name = f"{b}_minus_{a}"
        changes = {
            "data.plan.pools": [{"fidelity": name, "properties": list(high.properties)}],
            "references": {"method": "fit"},
            "train.best": f"val/{name}/loss",
        }
        methods["delta_exact"] = {
            "title": f"explicit delta on {a}", "fidelity": name, "needs_lf_at_inference": True, "changes": changes,
        }  # fmt: skip
        methods["delta_ml"] = {
            "title": f"explicit delta on learned {a}", "fidelity": name, "plus": "pretrain",
            "changes": {**changes, "train.steps": half},
        }  # fmt: skip
    return methods


def _has_several_of_each(structures: Sequence[Geometry]) -> bool:
    """Return whether at least half of the structures are one of several frames of a molecule."""
    counts = Counter(map(_molecule, structures))
    return sum(n for n in counts.values() if n >= FEW_OF_EACH) >= len(structures) / 2


def _molecule(geometry: Geometry) -> tuple[Any, ...]:
    """Return what frames of a molecule share and its isomers do not: which atoms are bonded, up to their order."""
    from ase import Atoms
    from ase.neighborlist import natural_cutoffs, neighbor_list

    numbers, positions, cell, pbc = geometry
    atoms = Atoms(numbers, positions, cell=cell, pbc=pbc)
    bonds: dict[int, list[int]] = {i: [] for i in range(len(atoms))}
    for i, j in zip(*neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=BOND)), strict=True):
        bonds[int(i)].append(int(j))
    kinds: list[Any] = numbers.tolist()
    for _ in range(3):  # neighbors' neighbors' neighbors tell isomers of this size apart
        kinds = [(kinds[i], *sorted(map(hash, (kinds[j] for j in bonds[i])))) for i in range(len(kinds))]
    return tuple(sorted(map(hash, kinds)))


def facts(new: NewStudy) -> list[tuple[str, str, str]]:
    """Return what was understood: (what, of the low file, of the high file)."""

    def labels(contents: Contents) -> str:
        return ", ".join(f"{n:,} {p} ({contents.found.labels[p].key})" for p, n in contents.labels.items())

    sides = (new.low, new.high)
    rows = [
        ("file", *(str(c.side.path) for c in sides)),
        ("fidelity", *(c.side.fidelity for c in sides)),
        ("labels", *(labels(c) for c in sides)),
        ("compositions", *(f"{len(set(c.formulas)):,}" for c in sides)),
        ("elements", *(" ".join(sorted(_elements(sorted(set(c.formulas))))) for c in sides)),
    ]
    if any(c.n_rejected for c in sides):
        rows.append(("frames that cannot be used", *(f"{c.n_rejected:,}" for c in sides)))
    rows.append(("structures that both have", "", f"{new.n_paired:,}"))
    rows.append(("structures to train on", "", f"{new.n_train:,}"))
    return rows  # type: ignore[return-value]


def notes(new: NewStudy) -> list[str]:
    """Return what the user may want to look at before a start."""
    found = [f"{c.side.path}: {note}" for c in (new.low, new.high) for note in c.found.notes]
    low, high = (_elements(sorted(set(c.formulas))) for c in (new.low, new.high))
    if high - low:
        found.append(
            f"{', '.join(sorted(high - low))}: in {new.high.side.path} alone, the cheap level does not know it"
        )
    if new.n_paired < FEW_PAIRS:
        found.append(
            f"{new.n_paired} structures have both levels: too few to tell how far apart these are, so the study cannot "
            "refuse a cheap level that says nothing of the expensive one; the same structures have their atoms in the "
            "same order, unturned and unmoved"
        )
    return found


def n_trainings(new: NewStudy) -> int:
    """Return how many trainings the study has."""
    trained = [m for m in new.study["methods"].values() if "refit" not in m]
    n = len(new.study["n_high"]) * len(trained) + len(new.study["stages"])
    return n * len(new.study["seeds"])
