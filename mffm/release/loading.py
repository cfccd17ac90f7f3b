"""From a release, a run or a checkpoint to a potential ready for predictions."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mffm.config.model import DensityConfig
from mffm.errors import InputError, known
from mffm.fidelity import FidelityTable
from mffm.models.adapter import merged
from mffm.models.potential import Potential
from mffm.release import container, outputs
from mffm.release.container import Contents
from mffm.release.files import read_json, read_weights, sha256
from mffm.release.spec import PotentialSpec

NOT_CONSERVATIVE = (
    "not conservative: forces and stress come from direct heads and are not derivatives of the energy; "
    "molecular dynamics does not keep the energy, and relaxations and phonons are not consistent with it"
)
_DEFAULT = "best"
_OF_CHECKPOINT = {"raw": "model.safetensors", "last": "ema.safetensors"}


@dataclass
class Loaded:
    """A potential with its weights, ready for predictions.

    Attributes:
        weights: which ones, of a run; those that a release was made of.
        weights_sha256: of the file of weights.
        contents: of a release; None for a run.
    """

    spec: PotentialSpec
    potential: Potential
    path: Path
    weights: str
    weights_sha256: str
    contents: Contents | None = None

    @property
    def fidelities(self) -> FidelityTable:
        return self.spec.fidelities


def load(
    path: Path | str, weights: str = "best", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Loaded:
    """Load a release, or the weights of a run or of one of its checkpoints, in eval mode.

    Every file of a release is compared with the manifest, and predictions for two of its structures at every fidelity
    with the stored ones, in float64 on the CPU; ``mffm inspect --check`` compares all of them.

    Args:
        weights: of a run: ``best``, ``best-<fidelity>``, ``last`` (moving average) or ``raw``; of a checkpoint
            (``RUN/checkpoints/step-...``), from training at any ZeRO stage and on any number of ranks: ``raw``, and
            ``last``, which ``best`` stands for. A release has one set only, and is loaded as that or as ``best``.

    Raises:
        InputError: not a release, run or checkpoint; damaged; changed; newer; it has no such weights, or weights that
            do not fit the configuration; a device that cannot be used.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such release or run")
    require_device(device)
    loaded = _load_release(path, weights) if container.is_release(path) else _load_run(path, weights)
    loaded.potential.to(device=device, dtype=dtype)
    return loaded


def require_device(device: torch.device | str) -> None:
    """Refuse a device that is misspelt or not there.

    Raises:
        InputError: naming it, with torch's reason.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        reason = str(error).splitlines()[0]
        raise InputError(f"device {str(device)!r} cannot be used: {reason}; 'cpu' always can") from error


def _load_release(path: Path, weights: str) -> Loaded:
    contents = container.read(path)
    spec = PotentialSpec.from_documents(contents.documents, str(path))
    chosen = str(spec.provenance.get("release", {}).get("weights"))
    if weights not in (_DEFAULT, chosen):
        raise InputError(
            f"{path}: a release of the weights {chosen!r}, it has no {weights!r}: leave weights out, or load the run"
        )
    potential = _built(spec, contents.tensors, str(path if contents.is_single_file else path / container.WEIGHTS))
    if "outputs.json" in contents.documents:
        stored = outputs.Outputs.from_dict(contents.documents["outputs.json"], str(path))
        outputs.require_same(stored, potential, spec, str(path))
    files = contents.manifest.get("files", {})
    digest = files[container.WEIGHTS]["sha256"] if files else sha256(path / container.WEIGHTS)
    return Loaded(spec, potential, path, chosen, digest, contents)


def _load_run(path: Path, weights: str) -> Loaded:
    run, file, expected = path, path / "weights" / f"{weights}.safetensors", None
    if (path / "state.json").is_file():
        run = path.parent.parent
        if weights not in (_DEFAULT, *_OF_CHECKPOINT):
            raise InputError(f"{path}: a checkpoint has no weights {weights!r}; it has: {known(_OF_CHECKPOINT)}")
        weights = "last" if weights == _DEFAULT else weights
        file = path / _OF_CHECKPOINT[weights]
        expected = read_json(path / "state.json").get("sha256", {}).get(file.name)
    if not (run / "potential" / "config.json").is_file():
        raise InputError(f"{path}: neither a release (config.json) nor a run (potential/config.json)")
    if not file.is_file():
        have = known(p.stem for p in (path / "weights").glob("*.safetensors"))
        raise InputError(f"{path}: the run has no weights {weights!r}; it has: {have}")
    found = sha256(file)
    if expected not in (None, found):
        raise InputError(f"{file}: damaged, its SHA-256 differs from the one written with it")
    spec = PotentialSpec.read(run / "potential")
    # A checkpoint of a fine-tuning may hold what was trained beside the frozen weights.
    return Loaded(spec, _built(spec, merged(read_weights(file)), str(file)), path, weights, found)


def _built(spec: PotentialSpec, state: dict[str, Tensor], place: str) -> Potential:
    """Return the potential with these weights, which must be all of its own and of no other shape or dtype."""
    n_numbers = sum(tensor.numel() for tensor in state.values())
    # Shapes only: a configuration cannot make the loader allocate what no weights fill. Code of others wants numbers.
    is_native = isinstance(spec.model.backbone, DensityConfig)
    with torch.device("meta" if is_native else "cpu"):
        try:
            built = spec.build()
        except RuntimeError as error:
            raise InputError(f"{place}: does not fit its config.json, whose sizes no memory holds ({error})") from error
    wanted = built.state_dict()
    differing = sorted(set(state) ^ set(wanted)) or [
        k for k in wanted if (state[k].shape, state[k].dtype) != (wanted[k].shape, wanted[k].dtype)
    ]
    if differing:
        raise InputError(
            f"{place}: does not fit its config.json; first differing tensor: {differing[0]} ({n_numbers:,} numbers "
            "in the file)"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        name = next(k for k, tensor in state.items() if not bool(tensor.isfinite().all()))
        raise InputError(f"{place}: {name} has numbers that are not finite; such weights predict nothing")
    potential = spec.build() if is_native else built
    potential.load_state_dict(state)
    return potential.eval().requires_grad_(False)
