"""What a run is prepared from: whether its weights are of its backbone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.errors import InputError
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
