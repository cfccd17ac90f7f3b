"""The fine-tuning study refuses a test split that its release has seen."""

from pathlib import Path

import pytest

from mffm.config.base import load as load_yaml
from mffm.config.data import DataConfig
from mffm.data.ingest import ingest
from mffm.data.store import Store
from mffm.errors import InputError

ROOT = Path(__file__).parents[3]
RELEASE = ROOT / "data" / "shipped.safetensors"


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Return the store that the shipped release was trained on, and how to make one of its molecules."""
    folder = tmp_path_factory.mktemp("stores")

    def made(name: str, yaml: str, *overrides: str) -> Store:
        path = ROOT / "configs" / "data" / yaml
        config = load_yaml(DataConfig, path, [*overrides, f"store={folder / name}"])
        ingest(config, path.parent, progress=False)
        return Store(folder / name)

    return made("shipped", "shipped.yaml"), made


@pytest.mark.slow
def test_a_test_split_that_the_release_has_seen_is_refused(stores):
    from study_finetune import require_untouched

    own, made = stores
    other = made("molecules", "molecules.yaml")
    with pytest.raises(InputError, match=f"trained on another store .*{other.path}.*--trained-on"):
        require_untouched(other, RELEASE, None)
    with pytest.raises(InputError, match=rf"{other.path}: fingerprint {other.fingerprint}; .* was trained on"):
        require_untouched(other, RELEASE, other.path)
    with pytest.raises(InputError, match=r"54 of 158 test frames trained .* \(within 1e-3 Å\): g2-0008 is g2-0008"):
        require_untouched(other, RELEASE, own.path)
    same_splits = made("untouched", "molecules.yaml", "splits.fractions={train: 0.8, val: 0.08, test: 0.12}")
    require_untouched(same_splits, RELEASE, own.path)
    require_untouched(own, RELEASE, None)
