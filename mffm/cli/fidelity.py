"""Fidelities of a release: fidelity add, copy, rename, drop."""

from pathlib import Path
from typing import Annotated

import typer

from mffm.cli.output import say
from mffm.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Add, copy, rename or drop a fidelity of a release; writes a new release.")

ReleaseArgument = Annotated[Path, typer.Argument(help="release, folder or file; stays as it is")]
OutputOption = Annotated[Path, typer.Option(help="release to write: folder, or FILE.safetensors")]


@app.command()
def add(
    release: ReleaseArgument,
    name: Annotated[str, typer.Argument(help="of the new fidelity")],
    parent: Annotated[str, typer.Option("--from", help="fidelity whose predictions it starts with")],
    output: OutputOption,
    store: Annotated[
        Path | None, typer.Option(help="with energies of the new fidelity: its element references are fitted to these")
    ] = None,
    split: Annotated[str, typer.Option(help="of the store")] = "train",
    level_of_theory: Annotated[str | None, typer.Option(help="without a store")] = None,
) -> None:
    """Add a fidelity that predicts what another does, with element references of its own where a store has labels."""
    from mffm.data.store import Store
    from mffm.errors import known
    from mffm.fidelity import Fidelity
    from mffm.keys import ENERGY
    from mffm.release import edit, load, refit_references

    before = load(release)
    edit.require_release(before)
    before.fidelities.index(parent)
    if (store is None) == (level_of_theory is None):
        raise InputError(
            f"mffm fidelity add {name}: give --store STORE with its labels, or --level-of-theory TEXT, not both"
        )
    if store is None:
        assert level_of_theory is not None
        after = edit.add(before, Fidelity(name, level_of_theory), parent)
    else:
        opened = Store(store)
        fidelity = opened.fidelities[name]
        rows = opened.rows(split=split, fidelity=name, prop=ENERGY)
        rows = rows[before.spec.references.covers(parent, opened.composition(rows))]
        if not len(rows):
            raise InputError(
                f"{store}: split {split!r} has no energy of {name!r} whose elements {parent!r} knows "
                f"({known(before.spec.references.elements(parent))}); name another --split, or another --from"
            )
        references = refit_references(before, opened, rows, name, parent)
        how = f"fitted on {len(rows)} labels of {opened.path.name} minus the predictions at {parent!r}"
        after = edit.add(before, fidelity, parent, references, how)
    _written(edit.save_edited(before, after, output, f"added {name!r} from {parent!r}"))


@app.command()
def copy(
    release: ReleaseArgument,
    old: Annotated[str, typer.Argument(help="fidelity")],
    new: Annotated[str, typer.Argument(help="name of the copy")],
    output: OutputOption,
) -> None:
    """Copy a fidelity under a second name."""
    from mffm.release import edit, load

    before = load(release)
    edit.require_release(before)
    after = edit.copy(before, old, new)
    _written(edit.save_edited(before, after, output, f"copied {old!r} as {new!r}", {new: old}))


@app.command()
def rename(
    release: ReleaseArgument,
    old: Annotated[str, typer.Argument(help="fidelity")],
    new: Annotated[str, typer.Argument(help="its new name")],
    output: OutputOption,
) -> None:
    """Give a fidelity another name."""
    from mffm.release import edit, load

    before = load(release)
    edit.require_release(before)
    after = edit.rename(before, old, new)
    _written(edit.save_edited(before, after, output, f"renamed {old!r} to {new!r}", {new: old}))


@app.command()
def drop(
    release: ReleaseArgument,
    name: Annotated[str, typer.Argument(help="fidelity")],
    output: OutputOption,
) -> None:
    """Leave out a fidelity."""
    from mffm.release import edit, load

    before = load(release)
    edit.require_release(before)
    after = edit.drop(before, name)
    _written(edit.save_edited(before, after, output, f"dropped {name!r}"))


def _written(path: Path) -> None:
    from mffm.release import load

    loaded = load(path)  # its own reference outputs, and every digest
    say(f"{path}: {', '.join(loaded.fidelities.names)}")
