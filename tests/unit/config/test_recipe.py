"""What a recipe refuses, with the reason."""

import pytest

from mffm.config.base import validate
from mffm.config.recipe import DeepSpeedSection
from mffm.errors import InputError


@pytest.mark.parametrize(
    ("stage", "offload", "reason"),
    [
        (0, "optimizer", "needs zero_stage 1, 2 or 3"),
        (2, "optimizer_and_parameters", "needs zero_stage 3: at 2 every rank holds all weights"),
    ],
)
def test_offloading_that_deepspeed_does_not_do(stage: int, offload: str, reason: str):
    with pytest.raises(InputError, match=reason):
        validate(DeepSpeedSection, {"zero_stage": stage, "offload": offload}, "test")


def test_offloading_that_it_does():
    for stage, offload in ((0, "none"), (1, "optimizer"), (3, "optimizer"), (3, "optimizer_and_parameters")):
        validate(DeepSpeedSection, {"zero_stage": stage, "offload": offload}, "test")
