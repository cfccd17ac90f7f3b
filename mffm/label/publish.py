"""The end of a labelling: a label layer of the store, or the files' structures with labels and a data YAML."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import yaml
from ase import Atoms
from ase.io import iread
from ase.io.extxyz import write_extxyz

from mffm.config.model import DensityConfig
from mffm.data import layers, records
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.keys import FORCES, PROPERTIES, Property
from mffm.label.journal import Ledger, Record, read
from mffm.label.structures import CHARGE_KEY, SPIN_KEYS
from mffm.label.work import Work, refuse_other_fidelity

DOUBTFUL_T1 = 0.02
DEFAULT_CUTOFF = DensityConfig().cutoff  # whose edges the ingest of the data YAML counts
ABOUT = "label.json"  # in a layer's folder: which labelling made it
RECORDS = "records.jsonl"


@dataclass
class Summary:
    """What a labelling gave.

    Attributes:
        written: layer's folder, or file.
        failures: error class → number of structures.
        examples: (frame id, reason), one of each class.
        n_doubtful: labels with a T1 diagnostic above 0.02.
    """

    written: Path
    n_labels: int
    failures: dict[str, int]
    examples: list[tuple[str, str]]
    n_doubtful: int = 0
    cpu_seconds: float = 0.0
    data_yaml: Path | None = None
    properties: dict[Property, int] = field(default_factory=dict)

    @property
    def n_failed(self) -> int:
        return sum(self.failures.values())


def finish(work: Work, ledger: Ledger, layer: str, output: Path | None) -> Summary:
    """Write the labels to their place, and the records of all attempts beside them; remove the working folder.

    Raises:
        InputError: nothing has a label, the layer or the file exists, or the disk is full; the working folder stays.
    """
    chosen = work.chosen()
    failures = {i: ledger.failures[i] for i in chosen.tolist() if ledger.file[i] < 0 and i in ledger.failures}
    counts = Counter(record.error_class for record in failures.values())
    examples = {record.error_class: (record.frame_id, record.error) for record in reversed(failures.values())}
    if not (ledger.file[chosen] >= 0).any():
        reasons = "; ".join(f"{name}: {reason}" for name, reason in examples.values())
        raise InputError(f"no structure could be labelled, {len(failures)} failed: {reasons}")
    summary = Summary(Path(), 0, dict(counts), list(examples.values()))
    with records.disk_errors_explained(work.folder):
        if output is None:
            _write_layer(work, ledger, chosen, layer, summary)
        else:
            _write_file(work, ledger, chosen, output, summary)
    shutil.rmtree(work.folder)
    return summary


def _seen(summary: Summary, record: Record, labels: dict[Property, np.ndarray]) -> None:
    summary.n_labels += 1
    summary.cpu_seconds += (record.cpu_ns or 0) * 1e-9
    summary.n_doubtful += record.info.get("t1_diagnostic", 0.0) > DOUBTFUL_T1
    for prop in labels:
        summary.properties[prop] = summary.properties.get(prop, 0) + 1


def write_records(work: Work, file: TextIO) -> None:
    """Write one line of JSON an attempt, failed ones too, in no particular order."""
    same = {"fidelity": work.fidelity.name, "settings_hash": work.settings_hash, "code": work.fidelity.code}
    for path in sorted(work.journals.glob("*.journal")):
        for record, _, _ in read(path):
            file.write(records.json_line(**same, **asdict(record)))


def layer_is_ours(store: Path, layer: str, content: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the same labelling wrote about a layer when it finished; None where there is no such layer."""
    path = store / "layers" / layer / ABOUT
    if not path.is_file() or layer not in [entry["name"] for entry in Store(store).manifest["layers"]]:
        return None
    about: dict[str, Any] = json.loads(path.read_text())
    return about if all(about.get(key) == value for key, value in content.items()) else None


def _write_layer(work: Work, ledger: Ledger, chosen: np.ndarray, name: str, summary: Summary) -> None:
    assert work.source.store is not None
    store = Store(work.source.store)
    refuse_other_fidelity(store.path, work.fidelity)
    if name in store.source_names:
        raise InputError(f"{store.path}: has a source {name!r} already: choose another name with --layer")
    known = work.fidelity.name in store.fidelities
    fidelities = store.fidelities if known else store.fidelities.appended(work.fidelity)
    rows = chosen[ledger.file[chosen] >= 0]

    def after(key: bytes) -> Iterator[tuple[int, bytes]]:
        begin = int(np.searchsorted(rows, int.from_bytes(key, "big"), "right")) if key else 0
        for record, labels in ledger.labels(rows[begin:].tolist()):
            packed = {(0, prop): value for prop, value in labels.items()}
            yield record.index, records.pack_labels(packed, int(store.n_atoms[record.index]))

    with layers.layer_folder(store, name) as folder:
        entry = layers.write_layer(store, folder, name, name, [work.fidelity.name], after)
        with (folder / RECORDS).open("w") as file:
            write_records(work, file)
        for record, labels in ledger.labels(rows.tolist()):
            _seen(summary, record, labels)
        about = {**work.content, "n_labels": summary.n_labels, "failures": summary.failures}
        records.write_json(folder / ABOUT, about)
        layers.publish(store, folder, entry, fidelities, {"name": name, **_licences(store)})
    summary.written = store.path / "layers" / name


def _licences(store: Store) -> dict[str, str]:
    """Return licence and citation of computed labels: those of the structures."""
    return {
        key: "; ".join(dict.fromkeys(source[key] for source in store.sources if source[key]))
        for key in ("licence", "citation")
    }


def _write_file(work: Work, ledger: Ledger, chosen: np.ndarray, output: Path, summary: Summary) -> None:
    aside = output.with_name(f"{output.name}.partial")
    wanted = set(chosen.tolist())
    keys: set[str] = set()
    structures = work.structures()
    with aside.open("w") as file:
        for index, atoms in enumerate(_sources(work.source.files)):
            if index not in wanted:
                continue
            frame = structures.get(index)
            assert np.array_equal(atoms.numbers, frame.atomic_numbers), f"{frame.frame_id} is read differently by ASE"
            atoms.info["frame_id"] = frame.frame_id
            keys |= set(atoms.info)
            _put(work.fidelity.name, ledger, index, atoms, summary)
            write_extxyz(file, [atoms], write_results=True)
    with records_of(output).open("w") as file:
        write_records(work, file)
    summary.data_yaml = data_yaml_of(output)
    summary.data_yaml.write_text(_data_yaml(work, output, summary, keys))
    records.publish(aside, output)
    summary.written = output


def records_of(output: Path) -> Path:
    """Return where the records of a file's labels go."""
    return output.with_name(f"{output.stem}.{RECORDS}")


def data_yaml_of(output: Path) -> Path:
    """Return where the data YAML for a file goes."""
    return output.with_name(f"{output.stem}.yaml")


def _put(fidelity: str, ledger: Ledger, index: int, atoms: Atoms, summary: Summary) -> None:
    """Put a structure's labels, or the reason why it has none, beside what it has."""
    if ledger.file[index] < 0:
        record = ledger.failures[index]
        atoms.info[f"label_error_{fidelity}"] = f"{record.error_class}: {record.error}".replace('"', "'")
        return
    ((record, labels),) = ledger.labels([index])
    _seen(summary, record, labels)
    for prop, value in labels.items():
        if prop == FORCES:
            atoms.arrays[f"{prop}_{fidelity}"] = np.array(value)
        else:
            atoms.info[f"{prop}_{fidelity}"] = float(value) if value.ndim == 0 else np.array(value)
    for key, value in record.info.items():
        atoms.info[f"{key}_{fidelity}"] = np.array(value) if isinstance(value, list) else value


def _sources(files: Sequence[Path]) -> Iterator[Atoms]:
    for path in files:
        yield from iread(str(path), ":")


def _data_yaml(work: Work, output: Path, summary: Summary, keys: set[str]) -> str:
    """Return a data YAML for the file: complete but for what only its owner knows."""
    name = "".join(c if c.isalnum() or c in "_.+-" else "_" for c in output.stem)
    fidelity = work.fidelity.to_dict()
    label = fidelity.pop("name")
    source: dict[str, Any] = {"name": name, "path": output.name, "frame_key": "frame_id"}
    if CHARGE_KEY in keys:
        source["charge_key"] = CHARGE_KEY
    spin = next((key for key in SPIN_KEYS if key in keys), None)
    if spin is not None:
        source["spin_multiplicity_key"] = spin
    source["licence"] = "that of the structures"
    source["labels"] = {label: {prop: f"{prop}_{label}" for prop in PROPERTIES if prop in summary.properties}}
    content = {
        "store": f"stores/{name}",
        "fidelities": {label: {key: value for key, value in fidelity.items() if value}},
        "sources": [source],
        "cutoffs": [DEFAULT_CUTOFF],
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
    return f"# Written by mffm label. Correct the licence, then: mffm ingest {data_yaml_of(output).name}\n{text}"
