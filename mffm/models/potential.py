"""The potential: a sum of terms, and the only code that differentiates one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mffm.batch import Batch
from mffm.blocks import Blocks
from mffm.config.model import ConditioningConfig, ModelConfig
from mffm.edges import Edges
from mffm.errors import InputError, known
from mffm.models.contraction import sum_over_received, sum_over_sent
from mffm.models.terms import LearnedTerm, TermOutput
from mffm.models.zbl import Zbl


@dataclass(slots=True)
class Prediction:
    """What a potential predicts; keys, units and signs as in ``mffm.keys``.

    Attributes:
        energy: [n_systems] float64, eV, without element references (they are added in float64 by who needs totals).
        atom_energies: [n_atoms], eV.
        forces: [n_atoms, 3], eV/Å; None if not asked for.
        stress: [n_systems, 3, 3], eV/Å³; 0 for systems without a volume; None if not asked for.
    """

    energy: Tensor
    atom_energies: Tensor
    forces: Tensor | None
    stress: Tensor | None


class Potential(nn.Module):
    """Interaction energies of systems at their fidelities, with conservative (or, for pretraining, direct) forces.

    Args:
        config: backbone, conditioning and heads.
        fidelities: names in the order of ``Batch.fidelity_idx``.
        avg_neighbors: mean number of neighbors of an atom in the training set.
        scale: eV; the unit of the heads' outputs, shared by the fidelities (the root mean square force, say).

    Raises:
        InputError: no fidelity, one named twice, or the configuration names an unknown one.
    """

    def __init__(self, config: ModelConfig, fidelities: Sequence[str], avg_neighbors: float, scale: float):
        super().__init__()
        if not fidelities or len(set(fidelities)) != len(fidelities):
            raise InputError(f"a potential needs one or more different fidelities; found: {', '.join(fidelities)!r}")
        self.config = config
        self.fidelities = tuple(fidelities)
        self.avg_neighbors, self.scale = float(avg_neighbors), float(scale)
        self.terms = nn.ModuleDict({"learned": LearnedTerm(config, self.fidelities, avg_neighbors, scale)})
        if config.zbl:
            self.terms["zbl"] = Zbl(self.cutoff)
        if config.d3:
            from mffm.models.d3 import D3

            self.terms["d3"] = D3(config.d3, self.fidelities)

    @property
    def learned(self) -> LearnedTerm:
        term = self.terms["learned"]
        assert isinstance(term, LearnedTerm)
        return term

    @property
    def cutoff(self) -> float:
        return self.learned.cutoff

    @property
    def is_conservative(self) -> bool:
        """Whether forces and stress are derivatives of the energy; not with direct heads."""
        return self.config.forces == "conservative"

    @property
    def has_stress(self) -> bool:
        """Whether there is a stress: with direct forces, only from a head for it."""
        return self.is_conservative or self.config.direct.stress

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, batch: Batch, forces: bool = True, stress: bool = False) -> Prediction:
        """Return the predictions for a batch.

        In training mode, where gradients are enabled, they are differentiable in the parameters; otherwise detached.
        The batch's edge vectors count as constants: positions get no gradient but the forces.

        Raises:
            InputError: see ``check``.
        """
        if not isinstance(batch, Blocks):
            self.check(batch)
        if stress and not self.has_stress:
            raise InputError("no stress: this potential has direct forces without a stress head (model.direct.stress)")
        train = self.training and torch.is_grad_enabled()
        terms = list(self.terms.values())
        derivatives = (forces or stress) and not all(term.own_derivatives for term in terms)
        with torch.set_grad_enabled(train or derivatives):
            fixed = batch.edge_vectors.detach()
            edge_vectors = fixed.detach().requires_grad_(derivatives)
            outputs: list[TermOutput] = [term(batch, fixed if term.own_derivatives else edge_vectors) for term in terms]
            atom_energies = sum((o.atom_energies for o in outputs[1:]), outputs[0].atom_energies)
            energy = batch.system_sums(atom_energies.to(torch.float64))
            prediction = Prediction(energy, atom_energies, None, None)
            all_forces = [o.forces for o in outputs if o.forces is not None]
            virials = [o.virial for o in outputs if o.virial is not None]
            if derivatives:
                # Terms with their own forces have no graph. The sum over atoms has the gradient of the float64 one.
                total = sum((o.atom_energies.sum() for o in outputs if o.forces is None), edge_vectors.new_zeros(()))
                (gradient,) = torch.autograd.grad(total, edge_vectors, create_graph=train)
                if forces:
                    all_forces.insert(0, self._forces(batch, gradient))
                if stress:
                    virials.insert(0, self._virial(batch, fixed, gradient))
            if forces:
                prediction.forces = sum(all_forces[1:], all_forces[0])
            if stress:
                prediction.stress = self._stress(batch, sum(virials[1:], virials[0]))
        if not train:
            for name in ("energy", "atom_energies", "forces", "stress"):
                value = getattr(prediction, name)
                setattr(prediction, name, None if value is None else value.detach())
        return prediction

    @staticmethod
    def _forces(batch: Batch, gradient: Tensor) -> Tensor:
        """Return forces from dE/dr_ij with r_ij = x_j - x_i: what pulls on receivers minus what pulls on senders."""
        return sum_over_received(gradient, batch) - sum_over_sent(gradient, batch)

    @staticmethod
    def _virial(batch: Batch, edge_vectors: Tensor, gradient: Tensor) -> Tensor:
        """Return dE/dstrain = Σ r ⊗ dE/dr, [n_systems, 3, 3], eV."""
        products = edge_vectors.unsqueeze(2) * gradient.unsqueeze(1)
        per_atom = sum_over_received(products.flatten(1), batch).view(-1, 3, 3)
        return batch.system_sums(per_atom)

    @staticmethod
    def _stress(batch: Batch, virial: Tensor) -> Tensor:
        has_volume = batch.volume > 0
        volume = torch.where(has_volume, batch.volume, 1.0).to(virial)
        factor = (has_volume / volume).to(virial)
        return 0.5 * (virial + virial.transpose(1, 2)) * factor[:, None, None]

    def edge_gradient(self, batch: Edges, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Return atom energies [n_atoms], eV, and dE/dr_ij [n_edges, 3], eV/Å, of E summed over some atoms.

        Nothing is checked, so that the whole can be traced.

        Args:
            counted: [n_atoms] bool, whose energies E sums.
        """
        assert not any(term.own_derivatives for term in self.terms.values()), "no derivative by edges"
        with torch.enable_grad():
            vectors = batch.edge_vectors.detach().requires_grad_()
            outputs: list[TermOutput] = [term(batch, vectors) for term in self.terms.values()]
            atom_energies = sum((o.atom_energies for o in outputs[1:]), outputs[0].atom_energies)
            total = torch.where(counted, atom_energies, 0.0).sum()
            (gradient,) = torch.autograd.grad(total, vectors)
        return atom_energies.detach(), gradient

    def check(self, batch: Batch) -> None:
        """Refuse what the potential was not made for; ``forward`` does it but for blocks, whose maker has done it.

        Raises:
            InputError: a fidelity index, a charge, a spin, an element or a dtype that the potential does not have.
        """
        lowest, highest = (int(value) for value in batch.fidelity_idx.aminmax())
        if lowest < 0 or highest >= len(self.fidelities):
            raise InputError(
                f"fidelity index {lowest if lowest < 0 else highest} in a batch; this potential has "
                f"{len(self.fidelities)} ({', '.join(self.fidelities)}): build batches with its fidelities"
            )
        own = next(self.parameters()).dtype
        if (own == torch.float64) != (batch.edge_vectors.dtype == torch.float64):
            raise InputError(
                f"batch in {batch.edge_vectors.dtype}, potential in {own}: "
                f"collate with dtype={own} or convert the potential"
            )
        self.learned.backbone.check(batch)

    @torch.no_grad()
    def last_inputs(self, batch: Batch) -> Tensor:
        """Return what the last linear map of the energy head takes, of a folded potential. [n_atoms, width]"""
        assert self.config.conditioning.kind == "none", "fold the potential to one fidelity first"
        self.check(batch)
        own = self.learned
        if own.direct_heads is None:
            return own.heads.last_inputs(own.backbone(batch, batch.edge_vectors, {}))
        return own.heads.last_inputs(own.backbone.features(batch, batch.edge_vectors, {})[0][0])

    def per_fidelity(self) -> set[str]:
        """Return the names in the state dict whose rows are fidelities."""
        return {f"terms.learned.{name}" for name in self.learned.per_fidelity()}

    @torch.no_grad()
    def load_weights(
        self, state: Mapping[str, Tensor], fidelities: Sequence[str], init_from: Mapping[str, str] | None = None
    ) -> list[str]:
        """Start from the weights of another potential with other fidelities.

        Shared tensors are copied. Rows of per-fidelity tensors are matched by name; a fidelity that is new starts as a
        copy of ``init_from[new]``, or, where the common model is defined, at the common model: conditioning at zero,
        delta corrections at zero. A conservative potential starts from a direct one without its direct heads and the
        linear maps that feed them.

        Args:
            state: the other potential's state dict.
            fidelities: the other potential's fidelities, in its order.
            init_from: new fidelity → fidelity of the other potential.

        Returns:
            the names of the tensors of direct heads that were left out.

        Raises:
            InputError: a tensor is missing, superfluous or of another shape; a fidelity is unknown; a new fidelity of
                independent heads has nothing to start from.
        """
        init_from = dict(init_from or {})
        own = self.state_dict()
        for new, source in init_from.items():
            if new not in self.fidelities:
                raise InputError(
                    f"init_from names fidelity {new!r}, which this potential lacks; it has: {known(self.fidelities)}"
                )
            if source not in fidelities:
                raise InputError(
                    f"init_from[{new!r}] = {source!r}, which the weights lack; they have: {known(fidelities)}"
                )
        self._check_delta_base(state, fidelities)
        dropped = self._of_direct_heads(set(state) - set(own)) if self.is_conservative else set()
        missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own) - dropped)
        if not self.is_conservative and not any(".direct_heads." in name for name in state):
            raise InputError(
                "the weights have no direct heads, which would start from nothing: set model.forces: conservative"
            )
        if missing or extra:
            raise InputError(
                f"the weights are of another kind of potential: missing {', '.join(missing) or 'nothing'}; "
                f"not used {', '.join(extra) or 'nothing'}; "
                "give model the backbone, conditioning and heads of the release"
            )
        rows = {f: init_from.get(f, f) for f in self.fidelities}
        sources = [fidelities.index(name) if name in fidelities else None for name in rows.values()]
        per_fidelity = self.per_fidelity()
        loaded = {}
        for name, tensor in own.items():
            value, stacked = state[name], name in per_fidelity
            expected = (len(fidelities), *tensor.shape[1:]) if stacked else tuple(tensor.shape)
            if tuple(value.shape) != tuple(expected):
                raise InputError(
                    f"{name}: shape {tuple(value.shape)} in the weights, {tuple(expected)} expected; "
                    "give model the sizes of the release"
                )
            loaded[name] = self._rows(name, tensor, value, sources) if stacked else value
        self.load_state_dict(loaded)
        return sorted(dropped)

    def _of_direct_heads(self, names: set[str]) -> set[str]:
        maps = {f"terms.learned.backbone.{name}" for name in self.learned.backbone.equivariant_only()}
        return {name for name in names if name in maps or name.startswith("terms.learned.direct_heads.")}

    def _rows(self, name: str, tensor: Tensor, value: Tensor, sources: Sequence[int | None]) -> Tensor:
        """Return the own tensor with each fidelity's row from the weights, or as a new fidelity starts."""
        out = tensor.clone()
        last = len(self.config.heads.hidden)
        for row, source in enumerate(sources):
            if source is not None:
                out[row] = value[source].to(out)
            elif ".conditioning." in name or name.endswith((f"correction.weights.{last}", f"correction.biases.{last}")):
                out[row] = 0
            elif ".mlp." in name:
                new = self.fidelities[row]
                raise InputError(
                    f"fidelity {new!r} is new and its head has nothing to start from: "
                    f"set model.init_from: {{{new}: <a fidelity of the weights>}} to start as a copy of that one's head"
                )
        return out

    def _check_delta_base(self, state: Mapping[str, Tensor], fidelities: Sequence[str]) -> None:
        """The base has no correction: one that is not zero means that the weights were trained with another base."""
        base, last = self.config.heads.base, len(self.config.heads.hidden)
        output = state.get(f"terms.learned.heads.correction.weights.{last}")
        if base is None or output is None:
            return
        if base not in fidelities:
            raise InputError(f"heads.base {base!r} is not a fidelity of the weights; they have: {known(fidelities)}")
        if bool(output[list(fidelities).index(base)].any()):
            raise InputError(
                f"heads.base {base!r} has a correction in the weights: "
                "they were trained with another base; name that one"
            )

    @torch.no_grad()
    def folded(self, fidelity: str) -> "Potential":
        """Return a plain potential of one fidelity, without conditioning and with one head, that predicts the same.

        Raises:
            InputError: the fidelity is unknown.
        """
        if fidelity not in self.fidelities:
            raise InputError(f"unknown fidelity {fidelity!r}; this potential has: {known(self.fidelities)}")
        own = self.learned
        index = next(self.parameters()).new_tensor([self.fidelities.index(fidelity)], dtype=torch.long)
        modulations = {
            site: tuple(None if value is None else value[0] for value in pair)
            for site, pair in own.conditioning(index).items()
        }
        _, output_shift = modulations.pop("output", (None, None))
        heads = own.heads.folded(fidelity, output_shift)
        config = self.config.model_copy(
            update={
                "conditioning": ConditioningConfig(kind="none"),
                "heads": heads.config,
                "init_from": {},
                "d3": {name: d3 for name, d3 in self.config.d3.items() if name == fidelity},
            }
        )
        plain = Potential(config, [fidelity], self.avg_neighbors, self.scale).to(next(self.parameters()))
        plain.learned.backbone.load_state_dict(own.backbone.state_dict())
        plain.learned.heads.load_state_dict(heads.state_dict())
        if plain.learned.direct_heads is not None and own.direct_heads is not None:
            plain.learned.direct_heads.load_folded(own.direct_heads, fidelity, output_shift)
        for site, (scale, shift) in modulations.items():
            weight, bias = plain.learned.backbone.site(site)
            if scale is not None:
                weight.mul_(1 + scale)
                bias.mul_(1 + scale)
            if shift is not None:
                bias.add_(shift)
        return plain.train(self.training)
