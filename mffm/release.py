"""Releases: a folder of safetensors and JSON that holds everything a user of a potential needs, and no pickle.

    model.safetensors   weights
    config.json         format version, model configuration, normalisation constants, SHA-256 of the weights
    fidelities.json     levels of theory, element references with their report, label counts
    provenance.json     data fingerprints, sources with licences, code version, recipe, base
    metrics.json        errors per split, fidelity and property
    README.md           the card, generated from the rest

A run's folder keeps the same JSON files under ``potential/`` and its weights under ``weights/``, so that a run can be
evaluated or loaded as it stands.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mffm import __version__
from mffm.batch import Batch
from mffm.config.base import validate
from mffm.config.model import ModelConfig
from mffm.data.loader import collate, evaluation_batches
from mffm.data.references import ElementReferences
from mffm.data.store import Store
from mffm.errors import InputError, known
from mffm.fidelity import FidelityTable
from mffm.keys import N_ELEMENTS
from mffm.models.potential import Potential

FORMAT_VERSION = 1
EVALUATION_EDGES = 20_000  # edges of a forward without training; bounds the memory
NOT_CONSERVATIVE = (
    "not conservative: forces and stress come from direct heads and are not derivatives of the energy; "
    "molecular dynamics does not keep the energy, and relaxations and phonons are not consistent with it"
)
METADATA = ("config.json", "fidelities.json", "provenance.json")


@dataclass
class PotentialSpec:
    """All of a potential but its weights."""

    model: ModelConfig
    fidelities: FidelityTable
    references: ElementReferences
    avg_neighbors: float
    scale: float
    label_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Potential:
        """Return the potential with fresh weights."""
        return Potential(self.model, self.fidelities.names, avg_neighbors=self.avg_neighbors, scale=self.scale)

    def reference_table(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the element references, NaN where a fidelity has none. [n_fidelities, N_ELEMENTS + 1] float64, eV"""
        return torch.as_tensor(self.references.array(self.fidelities.names), dtype=torch.float64, device=device)

    def write(self, folder: Path, weights_sha256: str | None = None) -> None:
        """Write the JSON files."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "format_version": FORMAT_VERSION,
            "model": self.model.model_dump(mode="json"),
            "avg_neighbors": self.avg_neighbors,
            "scale": self.scale,
            "weights_sha256": weights_sha256,
        }
        fidelities = {
            "fidelities": self.fidelities.to_list(),
            "references": self.references.to_dict(),
            "label_counts": self.label_counts,
        }
        write_json(folder / "config.json", config)
        write_json(folder / "fidelities.json", fidelities)
        write_json(folder / "provenance.json", self.provenance)

    @classmethod
    def read(cls, folder: Path) -> tuple["PotentialSpec", str | None]:
        """Return the potential described in a folder, and the SHA-256 of its weights where it is recorded.

        Raises:
            InputError: a file is missing, damaged, or written by a newer version.
        """
        config = read_json(folder / "config.json")
        version = config.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{folder / 'config.json'}: format version {version!r}; this mffm {__version__} reads version "
                f"{FORMAT_VERSION}"
                + ("; install a newer mffm" if isinstance(version, int) and version > FORMAT_VERSION else "")
            )
        fidelities = read_json(folder / "fidelities.json")
        try:
            spec = cls(
                model=validate(ModelConfig, config["model"], str(folder / "config.json")),
                fidelities=FidelityTable.from_list(fidelities["fidelities"]),
                references=ElementReferences.from_dict(fidelities["references"]),
                avg_neighbors=float(config["avg_neighbors"]),
                scale=float(config["scale"]),
                label_counts=fidelities["label_counts"],
                provenance=read_json(folder / "provenance.json"),
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{folder}: config.json or fidelities.json lacks {error}; the folder is damaged, copy it again"
            ) from error
        return spec, config.get("weights_sha256")


@dataclass
class Loaded:
    """A potential with its weights, ready for predictions."""

    spec: PotentialSpec
    potential: Potential
    path: Path
    weights: str
    weights_sha256: str

    @property
    def fidelities(self) -> FidelityTable:
        return self.spec.fidelities


def load(
    path: Path | str, weights: str = "best", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Loaded:
    """Load a release, or the weights of a run's folder, in eval mode.

    Args:
        weights: of a run: ``best``, ``best-<fidelity>``, ``last`` (moving average) or ``raw``; a release has one set
            only.

    Raises:
        InputError: not a release or run, damaged, or weights that do not fit the configuration.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        folder, weights_file = path, path / "model.safetensors"
    elif (path / "potential" / "config.json").is_file():
        folder, weights_file = path / "potential", path / "weights" / f"{weights}.safetensors"
        if not weights_file.is_file():
            have = known(p.stem for p in (path / "weights").glob("*.safetensors"))
            raise InputError(f"{path}: the run has no weights {weights!r}; it has: {have}")
    else:
        raise InputError(f"{path}: neither a release (config.json) nor a run (potential/config.json)")
    spec, expected = PotentialSpec.read(folder)
    found = sha256(weights_file)
    if expected is not None and found != expected:
        raise InputError(
            f"{weights_file}: its SHA-256 differs from the one in config.json; the release is damaged or was "
            "changed, get it again"
        )
    potential = spec.build()
    state = read_weights(weights_file)
    wanted = potential.state_dict()
    if set(state) != set(wanted) or any(state[k].shape != wanted[k].shape for k in wanted):
        differing = sorted(set(state) ^ set(wanted)) or [k for k in wanted if state[k].shape != wanted[k].shape]
        raise InputError(f"{weights_file}: does not fit its config.json; first differing tensor: {differing[0]}")
    potential.load_state_dict(state)
    potential.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return Loaded(spec, potential, path, weights, found)


def systems_at(loaded: Loaded, store: Store, rows: np.ndarray, fidelity: str, asked: str) -> Iterator[Batch]:
    """Yield batches with the labels of one fidelity, put to the potential as another (or the same)."""
    own = FidelityTable([store.fidelities[fidelity]])
    index = loaded.fidelities.index(asked)
    for batch in evaluation_batches(store, rows, fidelity, own, loaded.spec.model.backbone.cutoff, EVALUATION_EDGES):
        yield batch.with_fidelity(torch.full_like(batch.fidelity_idx, index))


def same_systems(loaded: Loaded, store: Store, batch: Batch, fidelity: str, asked: str) -> Batch:
    """Return the systems of a batch from ``systems_at``, in its order, as another potential reads them; no labels."""
    own, n = FidelityTable([store.fidelities[fidelity]]), batch.n_systems
    cutoff = loaded.spec.model.backbone.cutoff
    systems = collate(store, batch.rows.cpu().numpy(), np.zeros(n, np.int64), own, [()] * n, cutoff)
    return systems.with_fidelity(torch.full_like(systems.fidelity_idx, loaded.fidelities.index(asked)))


def refit_references(loaded: Loaded, store: Store, rows: np.ndarray, fidelity: str, asked: str) -> np.ndarray:
    """Fit references of one fidelity for a potential that predicts another: least squares on label − prediction.

    The strongest use of a potential of another level without training: what remains is what references cannot mend.

    Returns:
        [N_ELEMENTS + 1] float64, eV; NaN for elements that the rows lack.
    """
    rows = np.sort(rows)
    energies: dict[int, float] = {}
    for batch in systems_at(loaded, store, rows, fidelity, asked):
        prediction = loaded.potential(batch, forces=False)
        energies.update(zip(batch.rows.tolist(), prediction.energy.tolist(), strict=True))
    composition = store.composition(rows)
    present = np.flatnonzero(composition.sum(0) > 0)
    # From the asked fidelity's references on: what few labels leave undetermined stays as it was there.
    start = np.nan_to_num(loaded.spec.references.array([asked])[0])
    residual = store.energies(fidelity, rows) - np.array([energies[int(r)] for r in rows]) - composition @ start
    references = np.full(N_ELEMENTS + 1, np.nan)
    references[present] = start[present] + np.linalg.lstsq(composition[:, present], residual, rcond=None)[0]
    return references


def save(run: Path | str, folder: Path | str, weights: str = "best") -> Path:
    """Write a release of a run.

    Raises:
        InputError: the target exists, or the run has no such weights.
    """
    run, folder = Path(run), Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: exists and is not empty; give another folder or remove it")
    loaded = load(run, weights)
    aside = folder.with_name(folder.name + ".partial")
    if aside.exists():
        for old in aside.iterdir():
            old.unlink()
    aside.mkdir(parents=True, exist_ok=True)
    write_weights(aside / "model.safetensors", loaded.potential.state_dict())
    spec = loaded.spec
    spec.provenance = {
        **spec.provenance,
        "released_from": run.name,
        "weights": weights,
        "training": _training_record(run, weights),
    }
    spec.write(aside, weights_sha256=sha256(aside / "model.safetensors"))
    metrics = {p.stem.removeprefix("evaluation-"): read_json(p) for p in sorted(run.glob("evaluation-*.json"))}
    # An evaluation of other weights (raw, or of an earlier state of the run) says nothing about these.
    metrics = {split: report for split, report in metrics.items() if report["weights_sha256"] == loaded.weights_sha256}
    write_json(aside / "metrics.json", metrics)
    (aside / "README.md").write_text(card(folder.name, loaded, metrics))
    if folder.exists():
        folder.rmdir()
    os.replace(aside, folder)
    return folder


def card(name: str, loaded: Loaded, metrics: Mapping[str, Any]) -> str:
    """Return the card of a release as Markdown."""
    spec, provenance = loaded.spec, loaded.spec.provenance
    lines = [
        f"# {name}",
        "",
        f"An interatomic potential trained with mffm {provenance.get('mffm', __version__)} on several levels of "
        "theory at once. "
        f"{loaded.potential.n_parameters:,} parameters, cutoff {spec.model.backbone.cutoff:g} Å.",
        "",
        *([f"**{NOT_CONSERVATIVE.capitalize()}.**", ""] if spec.model.forces == "direct" else []),
        "```python",
        "from mffm.deploy.ase import Calculator",
        "from ase.build import molecule",
        "",
        'atoms = molecule("CH3CH2OH")',
        f'atoms.calc = Calculator("{name}", fidelity="{spec.fidelities.names[-1]}")',
        "print(atoms.get_potential_energy(), atoms.get_forces())",
        "```",
        "",
        "There is no default fidelity: say which level of theory you want.",
        "",
        "## Fidelities",
        "",
        "| fidelity | level of theory | code | training labels | elements with references |",
        "|---|---|---|---|---|",
    ]
    for fidelity in spec.fidelities:
        counts = ", ".join(f"{n:,} {prop}" for prop, n in spec.label_counts.get(fidelity.name, {}).items())
        lines.append(
            f"| {fidelity.name} | {fidelity.level_of_theory} | {fidelity.code} | {counts} | "
            f"{' '.join(spec.references.elements(fidelity.name)) or 'none'} |"
        )
    for name, d3 in spec.model.d3.items():
        lines += [
            "",
            f"DFT-D3({d3.damping}) of {d3.functional} is a part of {name}; it needs `pip install 'mffm[d3]'`.",
        ]
    lines += ["", "## Errors", ""]
    if metrics:
        lines += ["| split | fidelity | property | MAE | RMSE | labels |", "|---|---|---|---|---|---|"]
        for split, report in metrics.items():
            for row in report["rows"]:
                lines.append(
                    f"| {split} | {row['fidelity']} | {row['property']} | {row['mae']:.1f} {row['unit']} | "
                    f"{row['rmse']:.1f} {row['unit']} | {row['n_systems']} |"
                )
    else:
        lines.append("None measured: run `mffm evaluate` on the run before the release.")
    lines += ["", "## Data", "", "| source | licence | citation |", "|---|---|---|"]
    lines += [f"| {s['name']} | {s['licence']} | {s.get('citation', '')} |" for s in licence_chain(provenance)]
    lines += [
        "",
        f"Store fingerprint `{provenance.get('store_fingerprint', '')}`. The weights inherit the obligations of "
        "these licences.",
        "",
        "## Element references, eV",
        "",
        "| element | " + " | ".join(spec.fidelities.names) + " |",
        "|---|" + "---|" * len(spec.fidelities),
    ]
    values = spec.references.array(spec.fidelities.names)
    for z in np.flatnonzero(~np.isnan(values).all(axis=0)):
        lines.append(
            f"| {chemical_symbols[z]} | "
            + " | ".join("none" if np.isnan(v) else f"{v:.3f}" for v in values[:, z])
            + " |"
        )
    return "\n".join(lines) + "\n"


def licence_chain(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sources that weights were trained on: their own, then those of what they were fine-tuned from."""
    sources = list(provenance.get("sources", []))
    base = provenance.get("start_from")
    if base is not None:
        sources += [s for s in licence_chain(base["provenance"]) if s not in sources]
    return sources


def _training_record(run: Path, weights: str) -> dict[str, Any]:
    log = run / "metrics.jsonl"
    return {"metrics_sha256": sha256(log) if log.is_file() else None, "weights": weights}


def code_version() -> dict[str, str]:
    """Return the versions that a provenance records."""
    return {"mffm": __version__, "torch": torch.__version__, "python": platform.python_version()}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal.

    Raises:
        InputError: the file does not exist.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; the folder is incomplete")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        InputError: missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; the folder is incomplete")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); copy it again") from error


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor that fills its storage, as safetensors wants: itself, or a copy of a part of another."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors aside, fsync, and rename: a half-written file never has the final name.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        save_file({k: _alone(v.detach().cpu().contiguous()) for k, v in state.items()}, aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (SafetensorError, OSError) as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}); free some space; what was there is intact") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file.

    Raises:
        InputError: missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; the folder is incomplete")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON ({error}); copy it again") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON aside, fsync, and rename; errors as ``write_text``."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text aside, fsync, and rename: what was there stays whole until the new file is.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}); free some space; what was there is intact") from error
