"""What a run is prepared from: whether its weights are of its backbone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.errors import InputError
from mffm.release import load as load_potential
from mffm.training.setup import prepare


def test_a_named_size_and_its_values_are_the_same_backbone(make_recipe: Callable[..., Path]) -> None:
    path = make_recipe()

    def recipe(backbone: str) -> Recipe:
        return load(Recipe, path, [f"model.backbone={backbone}"])

    values = "{cutoff: 4, channels: 96, edge_channels: 32, lmax: 2, l_message: 1, layers: 2}"
    saved = prepare(recipe("{size: S, cutoff: 4}")).spec
    prepare(recipe(values), saved)
    with pytest.raises(InputError, match=r"\(channels: 95 here, 96 there\)"):
        prepare(recipe(values.replace("96", "95")), saved)


def test_references_of_the_parent_are_refitted_or_kept(make_recipe: Callable[..., Path], tiny_run: Path) -> None:
    pools = "[{fidelity: gfn2, properties: [energy]}, {fidelity: ccsdt, properties: [energy]}]"
    changes = [f"data.plan.pools={pools}", f"start_from={tiny_run}", "model.init_from={ccsdt: pbe}"]
    parent = load_potential(tiny_run).spec.references
    refitted = prepare(load(Recipe, make_recipe(), changes)).spec.references
    kept = prepare(load(Recipe, make_recipe(), [*changes, "references.refit=false"])).spec.references
    assert refitted.report["ccsdt"]["method"] == "refitted"
    assert kept.report["ccsdt"]["method"] == "kept"
    assert "at 'pbe', not refitted" in kept.report["ccsdt"]["reason"]
    assert np.array_equal(kept.table["ccsdt"], parent.table["pbe"], equal_nan=True)
    assert not np.array_equal(refitted.table["ccsdt"], parent.table["pbe"], equal_nan=True)
    for references in (refitted, kept):
        assert np.array_equal(references.table["gfn2"], parent.table["gfn2"], equal_nan=True)
