"""Which parameters a fine-tuning trains: ``fine_tune.mode``.

heads   what belongs to the trained fidelities alone: their rows of per-fidelity heads and of the conditioning; of a
        potential of one fidelity, its head. Other fidelities predict what they did, to the last bit.
frozen  heads and conditioning whole, with what fidelities share in them: other fidelities change.
lora    as frozen, and low-rank updates of the backbone's matrices.
full    everything.

The rows of new elements in the embedding are trained in every mode.
"""

from ase.data import atomic_numbers
from torch import nn

from mffm.config.recipe import Recipe
from mffm.errors import InputError
from mffm.models.adapter import Adapter
from mffm.models.potential import Potential
from mffm.optim import decays

BACKBONE = "terms.learned.backbone."
EMBEDDING = BACKBONE + "elements.weight"


def freeze(potential: Potential, recipe: Recipe) -> None:
    """Freeze what the mode does not train, and put what it trains beside frozen tensors into ``potential.adapter``.

    Raises:
        InputError: nothing is left to train.
    """
    section = recipe.fine_tune
    if section is None or section.mode == "full":
        return
    state = dict(potential.named_parameters())
    backbone = {name for name in state if name.startswith(BACKBONE)}
    low_rank, rows = [], {}
    if section.mode == "heads" and len(potential.fidelities) > 1:
        base = potential.config.heads.base
        if base in recipe.trained and potential.config.conditioning.kind == "none":
            raise InputError(
                f"fine_tune.mode: heads: the head of {base!r} is in the predictions of all fidelities (delta heads), "
                "it has none of its own; take mode frozen, lora or full"
            )
        own = [i for i, name in enumerate(potential.fidelities) if name in recipe.trained]
        rows = {name: own for name in state if name in potential.per_fidelity()}
        frozen = set(state)
    else:
        frozen = backbone
    if section.mode == "lora":
        low_rank = linear_maps(potential)
    if section.elements:
        rows[EMBEDDING] = [atomic_numbers[new] for new in section.elements]
    for name, parameter in state.items():
        parameter.requires_grad_(name not in frozen)
    if low_rank or rows:
        like = next(iter(state.values()))
        potential.adapter = Adapter(state, low_rank, section.rank, rows).to(like)
    if not any(p.requires_grad for p in potential.parameters()):
        raise InputError(f"fine_tune.mode: {section.mode} leaves nothing to train here; take full or lora")


def trained_ahead(potential: Potential, recipe: Recipe) -> set[str]:
    """Return the names of the parameters that ``fine_tune.heads_first`` trains before the others.

    None where all is trained from the start: without it, and where fidelities have nothing of their own.
    """
    own = potential.per_fidelity() if recipe.heads_first_steps else set()
    return {name for name, p in potential.named_parameters() if name in own and p.requires_grad}


def linear_maps(potential: Potential) -> list[str]:
    """Return the names of the backbone's matrices: linear maps, no embeddings, biases or gains."""
    embeddings = {id(m.weight) for m in potential.modules() if isinstance(m, nn.Embedding)}
    own = [(n, p) for n, p in potential.named_parameters() if n.startswith(BACKBONE) and id(p) not in embeddings]
    return [name for name, p in own if p.ndim == 2 and min(p.shape) > 1 and decays(name, p)]


def summary(potential: Potential, recipe: Recipe) -> str:
    """Return what is trained as a line of the log."""
    assert recipe.fine_tune is not None
    trained = sum(p.numel() for p in potential.parameters() if p.requires_grad)
    plain = sum(p.numel() for name, p in potential.named_parameters() if not name.startswith("adapter."))
    beside = "" if not hasattr(potential, "adapter") else f", {trained_beside(potential):,} of them beside frozen ones"
    ahead = trained_ahead(potential, recipe)
    n_ahead = sum(p.numel() for name, p in potential.named_parameters() if name in ahead)
    first = f"; {n_ahead:,} of them alone in the first {recipe.heads_first_steps} steps" if ahead else ""
    return f"fine_tune.mode {recipe.fine_tune.mode}: {trained:,} numbers trained of {plain:,}{beside}{first}"


def trained_beside(potential: Potential) -> int:
    """Return how many numbers the adapter has."""
    adapter = getattr(potential, "adapter", None)
    return 0 if adapter is None else sum(p.numel() for p in adapter.parameters())
