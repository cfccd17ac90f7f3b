"""A converted SevenNet starts a multi-fidelity fine-tuning: at step 0 it predicts what the release does."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mffm.config.base import load as load_recipe
from mffm.config.recipe import Recipe
from mffm.data.loader import pack
from mffm.data.store import Store
from mffm.release import load
from mffm.release.convert import convert
from mffm.training.setup import prepare

ELEMENTS = {"_type_map": {6: 0, 1: 1, 8: 2, 7: 3}}


@pytest.fixture(scope="module")
def release(write_sevennet: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    checkpoint = write_sevennet(folder / "tiny.pth", **ELEMENTS)
    path, _ = convert(
        f"sevennet:{checkpoint}", folder / "release", [("pbe_mp", "PBE, VASP")], "onehot", "independent", "MIT"
    )
    return path


def recipe_of(release: Path, make_recipe: Callable[..., Path], **train: int) -> Recipe:
    """Return the recipe of two new fidelities that start from the checkpoint's."""
    loaded = load(release)
    model = loaded.spec.model.model_dump(mode="json")
    model["init_from"] = {"gfn2": "pbe_mp", "pbe": "pbe_mp"}
    recipe = load_recipe(Recipe, make_recipe(start_from=str(release), train=train))
    content = {**recipe.model_dump(mode="json"), "model": model}
    return Recipe.model_validate(content)


def test_new_fidelities_start_as_the_checkpoint_with_refitted_references(
    release: Path, make_recipe: Callable[..., Path]
) -> None:
    setup = prepare(recipe_of(release, make_recipe))
    base, store = load(release), Store(setup.recipe.data.store)
    rows = store.rows(split="train", fidelity="pbe")[:4]
    geometries = [store.geometry(int(row)) for row in rows]
    cutoff = base.spec.model.backbone.cutoff
    expected = base.potential(pack(geometries, [0] * 4, cutoff))
    for index, name in enumerate(("gfn2", "pbe")):
        assert setup.fidelities.names[index] == name
        found = setup.potential.eval()(pack(geometries, [index] * 4, cutoff))
        assert torch.equal(found.forces, expected.forces)
        assert torch.equal(found.energy, expected.energy)
    # Of total energies of -1e4 eV nothing is left but what composition does not explain.
    composition = store.composition(rows)
    predicted = expected.energy.numpy() + setup.spec.references.energies("pbe", composition)
    errors = predicted - store.energies("pbe", rows)
    assert np.abs(errors).max() < 1e-3 * np.abs(store.energies("pbe", rows)).max()
    assert setup.spec.provenance["start_from"]["provenance"]["converted"]["from"].startswith("sevennet:")


@pytest.mark.slow
def test_it_trains_and_the_weights_of_a_fidelity_go_their_own_way(
    release: Path, make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    from mffm.release import save
    from mffm.training.loop import train

    recipe = recipe_of(release, make_recipe, steps=4, validate_every=4, save_every=4)
    train(recipe)
    written = save(Path(recipe.run_folder), tmp_path / "fine-tuned", weights="raw")
    loaded = load(written)
    table = loaded.potential.learned.conditioning.table
    assert table is not None
    assert table.abs().sum(1).gt(0).all()
    assert not torch.equal(table[0], table[1])
    assert "from the weights of `sevennet:" in (written / "README.md").read_text()
    assert loaded.spec.model.backbone == load(release).spec.model.backbone
