"""Files of the edge form: an archive of ``torch.export`` with its description, its probe and, if asked, compiled code.

The form is traced with its derivative inside (``make_fx``), then exported with open numbers of atoms and edges. An
archive is a program: open only what you trust. What is meant to be exchanged is the release.
"""

import json
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from mffm.deploy.at_fidelity import DTYPES, AtFidelity
from mffm.deploy.edges import probe
from mffm.deploy.edges.assembled import predictor
from mffm.deploy.edges.form import EdgeForm
from mffm.deploy.edges.machine import machine, require_this
from mffm.deploy.edges.model import Description, EdgeModel, Run, form_of
from mffm.errors import InputError
from mffm.release import Loaded
from mffm.release.container import Contents
from mffm.release.files import parse_json
from mffm.release.loading import require_device
from mffm.release.outputs import Difference, Outputs, compare, refuse_differences

VERSION = 1
_ABOUT, _PROGRAM = "mffm.json", "model"


def export(
    source: str | Path | Loaded,
    target: str | Path,
    fidelity: str,
    dtype: str = "float64",
    device: str | torch.device = "cpu",
    compiled: bool = False,
    charge: int = 0,
    spin_multiplicity: int = 0,
) -> EdgeModel:
    """Write a release in edge form, load it and return it.

    Args:
        source: release, or run.
        target: NAME.pt2; replaced if it is there.
        compiled: also compile it, for this machine.

    Raises:
        InputError: see ``of_release``; the backbone cannot be traced; the file cannot be written; what was written does
            not answer as the release does.
    """
    target = _target(target)
    at = AtFidelity(source, fidelity, dtype, device)
    form, description = form_of(at, charge, spin_multiplicity)
    given = probe.inputs(at.spec, description, at.dtype, at.device)
    about = {
        "version": VERSION,
        "description": description.to_dict(),
        "device": at.device.type,
        "probe": probe.make(form, given, dtype),
    }
    program = traced(form, given)
    program.example_inputs = None  # they would be pickled
    model = _write(target, program, about, compiled, given)
    require_outputs(model, at.contents)
    return model


def require_outputs(model: EdgeModel, contents: Contents | None) -> list[Difference]:
    """Refuse a model that does not predict a release's reference outputs; return the differences, [] without outputs.

    Structures of another charge or spin multiplicity, or with an element that the fidelity lacks, are left out.

    Raises:
        InputError: with the structure, the quantity, the difference and the tolerance.
    """
    if contents is None or "outputs.json" not in contents.documents:
        return []
    description, place = model.description, model.description.source
    stored = Outputs.from_dict(contents.documents["outputs.json"], place)
    stored = replace(stored, values={description.fidelity: stored.values[description.fidelity]})
    state = description.charge, description.spin_multiplicity
    only = [
        i
        for i, s in enumerate(stored.structures)
        if (s.charge, s.spin_multiplicity) == state and np.isin(s.numbers, description.numbers).all()
    ]
    found = compare(stored, predictor(model), description.dtype, only) if only else []
    refuse_differences(found, stored, f"{place} in edge form")
    return found


def compile_export(source: str | Path, target: str | Path) -> EdgeModel:
    """Compile an exported file for this machine, load it and return it; needs no release and no model code.

    Raises:
        InputError: not such a file; the device it was exported for is not here; see ``export``.
    """
    source, target = Path(source), _target(target)
    about = read_about(source)
    require_device(about["device"])
    program = _archive(source).exported_programs[_PROGRAM]
    given = probe.tensors(about["probe"], DTYPES[about["description"]["dtype"]], about["device"])
    return _write(target, program, about, True, given)


def load(path: str | Path, compiled: bool | None = None) -> EdgeModel:
    """Load an exported file, and ask it its probe.

    Args:
        compiled: use the compiled code; None: where the file has some.

    Raises:
        InputError: not such a file, a newer one, damaged; compiled for another machine or not at all; another answer.
    """
    path = Path(path)
    about = read_about(path)
    description = Description.from_dict(about["description"], str(path))
    device = about["device"]
    require_device(device)
    compiled = "machine" in about if compiled is None else compiled
    if compiled:
        if "machine" not in about:
            raise InputError(f"{path}: holds no compiled code; compile it here: mffm export {path} OUT.pt2 --compile")
        require_this(about["machine"], device, str(path))
    archive = _archive(path)
    run: Run = archive.aoti_runners[_PROGRAM] if compiled else archive.exported_programs[_PROGRAM].module()
    probe.require_answer(
        run, about["probe"], probe.tensors(about["probe"], DTYPES[description.dtype], device), str(path)
    )
    return EdgeModel(run, description, device, "compiled" if compiled else "exported", path)


def read_about(path: Path) -> dict[str, Any]:
    """Return what a file says about itself; nothing of it is run.

    Raises:
        InputError: not such a file, or a newer one.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith(f"/extra/{_ABOUT}")), None)
            text = None if name is None else archive.read(name)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise InputError(f"{path}: not an export of mffm, or damaged ({error}); export it again") from error
    if text is None:
        raise InputError(f"{path}: an archive that mffm export has not written; export a release")
    about = parse_json(text, str(path))
    if about.get("version") != VERSION:
        raise InputError(
            f"{path}: version {about.get('version')} of the format, this mffm reads {VERSION}; export again"
        )
    missing = {"description", "device", "probe"} - set(about)
    if missing:
        raise InputError(f"{path}: lacks {', '.join(sorted(missing))}; export it again")
    return about


def traced(form: EdgeForm, given: probe.Inputs) -> ExportedProgram:
    """Return the form as a program for any numbers of atoms and edges.

    Raises:
        InputError: the backbone cannot be traced.
    """

    def flat(rij: Tensor, z: Tensor, edge_index: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(form(rij, z, edge_index, mask))

    atoms, edges = Dim("n_atoms", min=1), Dim("n_edges", min=0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = make_fx(flat, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*given)
            program = torch.export.export(
                graph, given, dynamic_shapes=({0: edges}, {0: atoms}, {1: edges}, {0: atoms}),
                prefer_deferred_runtime_asserts_over_guards=True,
            )  # fmt: skip
    except Exception as error:  # torch raises many kinds
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        kind = form.potential.config.backbone.kind
        raise InputError(
            f"model.backbone.kind: {kind} cannot be exported ({type(error).__name__}: {reason[:300]}); "
            "use the release itself"
        ) from error
    assert len(program.range_constraints) == 2, f"a size is fixed: {program.range_constraints}"
    return program


def _write(
    target: Path, program: ExportedProgram, about: dict[str, Any], compiled: bool, given: Sequence[Tensor]
) -> EdgeModel:
    from torch.export.pt2_archive._package import package_pt2

    files = None
    aside = target.with_name(f".{target.stem}.partial.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if compiled:
            about = {**about, "machine": machine(about["device"])}
            files = _compiled(program, given)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            package_pt2(
                str(aside), exported_programs={_PROGRAM: program},
                aoti_files=None if files is None else {_PROGRAM: files}, extra_files={_ABOUT: json.dumps(about)},
            )  # fmt: skip
            model = load(aside)
            aside.replace(target)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{target}: cannot be written ({error}); free some space") from error
        finally:
            aside.unlink(missing_ok=True)
    model.path = target
    return model


def _compiled(program: ExportedProgram, given: Sequence[Tensor]) -> list[Any]:
    try:
        files = torch._inductor.aot_compile(
            program.module(check_guards=False), tuple(given), options={"aot_inductor.package": True}
        )
    except Exception as error:  # a compiler that is missing, or refuses
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise InputError(
            f"cannot be compiled ({type(error).__name__}: {reason[:300]}); it needs a C++ compiler (g++)"
        ) from error
    assert isinstance(files, list)
    return files


def _archive(path: Path) -> Any:
    from torch.export.pt2_archive._package import load_pt2

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_pt2(str(path))
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise InputError(
            f"{path}: torch {torch.__version__} cannot load it ({type(error).__name__}: {str(error)[:200]}); "
            "export it again"
        ) from error


def _target(target: str | Path) -> Path:
    target = Path(target)
    if target.suffix != ".pt2":
        raise InputError(f"{target}: the name of an export ends in .pt2")
    return target
