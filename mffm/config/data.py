"""Schema of a data YAML: sources of labelled structures → one store."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mffm.config import presets
from mffm.config.base import Schema
from mffm.keys import Property

EnergyUnit = Literal["eV", "Hartree", "kcal/mol", "kJ/mol", "meV", "Rydberg"]
LengthUnit = Literal["Angstrom", "bohr", "nm"]
PressureUnit = Literal["eV/Angstrom^3", "GPa", "kbar", "Hartree/bohr^3"]
ReaderName = Literal["auto", "extxyz", "ase", "ase_db", "json", "hdf5", "deepmd", "vasp"]


class FidelitySpec(Schema):
    """One fidelity as the data declare it."""

    level_of_theory: str = Field(min_length=1, description="e.g. PBE/def2-SVP")
    code: str = Field("", description="program and version")
    settings: str = Field("", description="what else decides the energy")


class LabelSpec(Schema):
    """Where one property of one fidelity is found in a source, and in which units."""

    key: str = Field(min_length=1)
    unit: str | None = Field(
        None,
        description="energy: eV, Hartree, kcal/mol, kJ/mol, meV, Rydberg; forces: <energy>/<length> with "
        "Angstrom, bohr or nm; "
        "stress: eV/Angstrom^3, GPa, kbar, Hartree/bohr^3. None: eV, eV/Angstrom, eV/Angstrom^3.",
    )
    negate: bool = Field(
        False, description="true where a file gives gradients instead of forces, or pressure-signed stress"
    )
    virial: bool = Field(
        False, description="stress only: the key holds the virial in energy units (stress = -virial / V)"
    )


class Hdf5Spec(Schema):
    """Which datasets of an HDF5 file say where the atoms are; the usual names are known."""

    positions: str | None = Field(None, description="dataset [frames, atoms, 3] or [atoms, 3] of each group")
    numbers: str | None = Field(None, description="dataset [atoms] of atomic numbers or symbols, there or further up")
    groups: list[str] | None = Field(None, description="top-level groups to be read; all where not given")


class SourceSpec(Schema):
    """One data set as published."""

    preset: str | None = Field(
        None, description="layout of a published set, for everything that is not given here; null takes a key out"
    )
    fidelity: str | None = Field(None, description="your name for the fidelity of a preset that labels one")
    name: str = Field(min_length=1, pattern=r"^[\w.+-]+$", description="letters, digits, _ . + -; also names a folder")
    path: str | list[str] = Field(
        description="file, glob, folder (with `files`) or list of them, relative to the data YAML; ${NAME} is an "
        "environment variable"
    )
    files: str | None = Field(None, description="glob of the files to be read where `path` is a folder")
    reader: ReaderName = "auto"
    hdf5: Hdf5Spec = Hdf5Spec()
    length_unit: LengthUnit = "Angstrom"
    frame_key: str | None = Field(
        None, description="info key with a unique name per structure; without it, the geometry's hash"
    )
    pair_by: Literal["key", "geometry"] = Field(
        "key", description="how frames of several files find each other: by frame_key, or by geometry within 1e-3 Å"
    )
    group_key: str | None = Field(
        None, description="info key by which a split can hold out; 'formula' where there is none in the file"
    )
    charge_key: str | None = None
    spin_multiplicity_key: str | None = None
    magnetic_moments_key: str | None = Field(None, description="array key of the atoms' collinear moments, in µB")
    weight_key: str | None = Field(None, description="info key of a frame's weight in the loss; 1 where it has none")
    nan: Literal["reject", "absent"] = Field(
        "reject", description="a label that is NaN throughout: reject its frame, or the label does not exist"
    )
    labels: dict[str, dict[Property, LabelSpec | str]] = Field(min_length=1, description="fidelity → property → key")
    licence: str = Field(min_length=1)
    citation: str = ""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, content: Any) -> Any:
        if isinstance(content, dict) and content.get("preset") is not None:
            return presets.fill(content)
        return content

    @model_validator(mode="after")
    def _checks(self) -> "SourceSpec":
        for fidelity, properties in self.labels.items():
            if not properties:
                raise ValueError(f"labels.{fidelity}: no property given")
        return self

    def label(self, fidelity: str, prop: Property) -> LabelSpec:
        spec = self.labels[fidelity][prop]
        return LabelSpec(key=spec) if isinstance(spec, str) else spec


class SplitSpec(Schema):
    """How frames are divided. Always by structure: a structure's labels at all fidelities are in one split.

    First `key` decides where the source gives a split, then `holdout`; the rest is divided by `fractions`, either
    structure by structure or group by group, by a hash, so that adding frames never moves another one. The order in
    which they are written decides nothing.
    """

    seed: int = 0
    by: Literal["structure", "group"] = "structure"
    fractions: dict[str, float] = Field({"train": 0.8, "val": 0.1, "test": 0.1}, validate_default=True)
    key: str | None = Field(None, description="info key that holds the split's name")
    holdout: dict[str, list[str]] = Field(
        default_factory=dict, description="split → group keys, e.g. ood: [HCOOCH3, N2H4]"
    )

    @field_validator("fractions", "holdout")
    @classmethod
    def _in_one_order(cls, splits: dict[str, Any]) -> dict[str, Any]:
        return dict(sorted(splits.items()))

    @model_validator(mode="after")
    def _checks(self) -> "SplitSpec":
        total = sum(self.fractions.values())
        if abs(total - 1) > 1e-9 or min(self.fractions.values(), default=-1) < 0:
            raise ValueError(f"fractions must be positive and sum to 1, found a sum of {total:g}")
        return self


class DataConfig(Schema):
    """A data YAML."""

    store: str = Field(min_length=1, description="folder of the store, relative to the working directory")
    fidelities: dict[str, FidelitySpec] = Field(min_length=1)
    sources: list[SourceSpec] = Field(min_length=1)
    splits: SplitSpec = SplitSpec()
    cutoffs: list[float] = Field(default_factory=list, description="Å; edges are counted for these at ingest")
    duplicates: Literal["merge", "error", "skip"] = Field(
        "merge",
        description="a structure seen again: merge its labels where they do not contradict each other; error: "
        "stop where it repeats a label; "
        "skip: leave the frame out where it repeats a label",
    )
    min_distance: float = Field(0.3, gt=0, description="Å; frames with closer atoms are rejected")
    on_reject: Literal["continue", "stop"] = Field(
        "continue", description="a bad frame is reported and left out, or stops the ingest"
    )
    shard_frames: int = Field(50_000, gt=0)
    workers: int = Field(1, ge=1, description="processes that read and check")

    @model_validator(mode="before")
    @classmethod
    def _fidelities_of_presets(cls, content: Any) -> Any:
        return presets.declare(content) if isinstance(content, dict) else content

    @model_validator(mode="after")
    def _checks(self) -> "DataConfig":
        names = [s.name for s in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"source {name!r} is named twice")
        for source in self.sources:
            for fidelity in source.labels:
                if fidelity not in self.fidelities:
                    raise ValueError(
                        f"source {source.name!r} labels fidelity {fidelity!r}, which is not declared under fidelities: "
                        + ", ".join(self.fidelities)
                    )
        if any(c <= 0 for c in self.cutoffs):
            raise ValueError(f"cutoffs must be positive, found {self.cutoffs}")
        return self
