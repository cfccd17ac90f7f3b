"""Optimisers, the learning-rate schedule as a function of the step, and the moving average of the weights.

adamw  every parameter on its own.
soap   matrices in the eigenbasis of their gradients' second moments (``Soap``), the rest by AdamW.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mffm.config.recipe import OptimConfig

DAMPING = 1e-3  # of the largest eigenvalue, added to all; a float32's rounding is 1e-7 of it
FIRST_TURNS = 10  # of the bases at the first step
BETAS = {"adamw": (0.9, 0.999), "soap": (0.95, 0.95)}  # where the recipe gives none


def make_optimizer(module: nn.Module, config: OptimConfig, ahead: Collection[str] = ()) -> torch.optim.Optimizer:
    """Return the recipe's optimiser: decay where ``decays``, and by matrix where ``by_matrix``.

    The state of a parameter is in ``optimizer.state`` in all kinds, whole tensors besides the number of steps.

    Args:
        ahead: names of the parameters that are trained before the others; groups say ``ahead`` or not.
    """
    matrices = by_matrix(module, config)
    betas = config.betas or BETAS[config.kind]
    groups: list[dict[str, Any]] = []
    parts: list[torch.optim.Optimizer] = []
    for is_ahead in (False, True):
        named = [(name, p) for name, p in trained(module) if (name in ahead) == is_ahead]
        own = [p for name, p in named if name in matrices]
        if own:
            every, largest = config.precondition_every, config.max_precondition_dim
            parts.append(Soap(own, config.lr, betas, config.eps, config.weight_decay, every, largest))
            parts[-1].param_groups[0]["ahead"] = is_ahead
        for decay in (True, False):
            rest = [p for name, p in named if name not in matrices and decays(name, p) == decay]
            if rest:
                weight_decay = config.weight_decay if decay else 0.0
                groups.append({"params": rest, "weight_decay": weight_decay, "ahead": is_ahead})
    if groups:
        parts.append(torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, foreach=True))
    return parts[0] if len(parts) == 1 else Together(parts)


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the named parameters that an optimiser changes: those that are not frozen."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def decays(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter of a potential gets weight decay: matrices do; biases, norm gains and what a fidelity
    adds to them do not.

    Shapes do not tell: a bias with one row per fidelity is a matrix. Decaying it would pull each fidelity's offset to
    zero in one kind of heads and not in another.
    """
    apart = ("bias", "norm.", "affine_weight", "conditioning.table")  # affine_weight: [degrees, channels] of eSCN-MD
    return parameter.ndim >= 2 and not any(part in name for part in apart)


def by_matrix(module: nn.Module, config: OptimConfig) -> set[str]:
    """Return the names of the parameters that soap takes as matrices: linear maps, or stacks of them.

    Not embeddings, whose rows are apart: a batch has few of the elements. Not a map to or from one number: a vector.
    """
    if config.kind == "adamw":
        return set()
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return {
        name for name, p in trained(module) if decays(name, p) and id(p) not in embeddings and min(p.shape[-2:]) > 1
    }


def state_shapes(module: nn.Module, config: OptimConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the optimiser's whole state but for the number of steps, as <key>/<parameter>."""
    matrices = by_matrix(module, config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, p in trained(module):
        shape = tuple(p.shape)
        shapes |= {f"{key}/{name}": shape for key in ("exp_avg", "exp_avg_sq")}
        for side, size in zip(("rows", "columns"), shape[-2:] if name in matrices else (), strict=False):
            if size <= config.max_precondition_dim:
                shapes |= {f"{key}_{side}/{name}": (*shape[:-2], size, size) for key in ("gram", "basis")}
    return shapes


def learning_rate(step: int, total: int, config: OptimConfig, begin: int = 0, finish_start: int | None = None) -> float:
    """Return the learning rate of a step counted from 0: linear warm-up, then a cosine to ``final_lr_fraction``.

    Args:
        begin: step that the warm-up begins at; 0.0 before.
        finish_start: first step of the plan's last part, where ``finish_factor`` begins; None where it has none.
    """
    if step < begin:
        return 0.0
    if finish_start is not None and finish_start <= step:
        return config.finish_factor * learning_rate(step, total, config, begin)
    step, total = step - begin, total - begin
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(total - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    low = config.final_lr_fraction
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


class Together(torch.optim.Optimizer):
    """Optimisers of different parameters as one: their groups and the state of all."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:  # the groups are the same dicts already
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


@dataclass
class _Stack:
    """All matrices of one shape [m, n], one after the other.

    Attributes:
        parameters: that the k matrices come from; one of [f, m, n] gives f.
        exp_avg, exp_avg_sq: [k, m, n] moments in the eigenbasis.
        gradient, scratch: [k, m, n], of a step.
        grams: moments of G Gᵀ [k, m, m] and Gᵀ G [k, n, n]; None where the side is too long.
        bases: their eigenvectors, in columns.
    """

    parameters: list[nn.Parameter]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    gradient: Tensor
    scratch: Tensor
    grams: list[Tensor | None]
    bases: list[Tensor | None]

    def state(self) -> dict[str, Tensor]:
        named = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        for side, gram, basis in zip(("rows", "columns"), self.grams, self.bases, strict=True):
            if gram is not None and basis is not None:
                named |= {f"gram_{side}": gram, f"basis_{side}": basis}
        return named

    def parts(self, stacked: Tensor) -> list[Tensor]:
        """Return a tensor [k, a, b] as views, one for each parameter, with its leading axes."""
        sizes = [p.shape[:-2].numel() for p in self.parameters]
        return [
            v.view(*p.shape[:-2], *v.shape[-2:]) for p, v in zip(self.parameters, stacked.split(sizes), strict=True)
        ]

    def rotate(self, x: Tensor, out: Tensor, back: bool = False) -> None:
        """Write x [k, m, n] in the eigenbasis, or what it is outside of it, to ``out``, another tensor."""
        left, right = (basis if basis is None or back else basis.mT for basis in self.bases)
        if left is None or right is None:
            out.copy_(x)
        if left is not None:
            x = torch.bmm(left, x) if right is not None else torch.bmm(left, x, out=out)
        if right is not None:
            torch.bmm(x, right.mT, out=out)

    def turn(self, times: int) -> None:
        """Do steps of orthogonal iteration on the bases, and turn the moments with them."""
        self.rotate(self.exp_avg, out=self.scratch, back=True)
        for axis, gram, basis in zip((1, 2), self.grams, self.bases, strict=True):
            if gram is None or basis is None:
                continue
            for _ in range(times):
                product = torch.bmm(gram, basis)
                values = (product * basis).sum(-2)
                # It wants the columns by falling eigenvalue; the second moment keeps to its columns.
                order = values.argsort(dim=-1, descending=True, stable=True)
                product /= values.amax(-1).clamp(min=torch.finfo(values.dtype).tiny)[:, None, None]
                product.add_(basis, alpha=DAMPING)
                basis.copy_(torch.linalg.qr(product.gather(2, order[:, None, :].expand_as(product)))[0])
                order = order[:, :, None] if axis == 1 else order[:, None, :]
                self.exp_avg_sq.copy_(self.exp_avg_sq.gather(axis, order.expand_as(self.exp_avg_sq)))
        self.rotate(self.scratch, out=self.exp_avg)


class Soap(torch.optim.Optimizer):
    """SOAP (Vyas et al. 2024, arXiv 2409.11321, algorithm 3): Adam in the eigenbasis of Shampoo's preconditioner.

    For a weight [m, n] with gradient G the averages of G Gᵀ and Gᵀ G give a basis each. Every so many steps one step
    of orthogonal iteration (a product and a QR) follows them. As in the authors' code the first step only sets them,
    and weights stay: in the basis of its own gradient, all but the diagonal is rounding.

    Other than in the paper the iteration is damped and starts at the identity instead of ``eigh``. A gradient of few
    systems has no component along many directions; undamped, rounding decides their basis, and with it the updates:
    another one on another number of ranks.

    The first moment is kept in the eigenbasis and turned when that turns, which is the same as the paper's. Weights of
    one shape are done at once; those of more than two axes are stacks of matrices, each with a basis of its own.

    Args:
        every: steps between updates of the basis.
        largest: a longer side keeps the identity for its basis.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        every: int,
        largest: int,
    ):
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "every": every, "largest": largest,
        }  # fmt: skip
        super().__init__(parameters, defaults)
        self._stacks: list[_Stack] = []
        self._flat: list[Tensor] = []  # of all stacks: both moments, gradient, scratch; the stacks have views
        self._views: list[tuple[nn.Parameter, Tensor]] = []  # parameters in the order of the stacks, first moments
        self._ways: list[Tensor] = []  # of the parameters in that order, the views of the gradient, and then the update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if not self._is_stacked():
            self._stack()
        group = self.param_groups[0]
        lr, (beta1, beta2) = group["lr"], group["betas"]
        torch._foreach_add_([self.state[p]["step"] for p in group["params"]], 1.0)
        step = int(self.state[group["params"][0]]["step"])
        parameters: list[Tensor] = [p for p, _ in self._views]
        exp_avg, exp_avg_sq, gradient, scratch = self._flat
        torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters], out=gradient
        )
        for stack in self._stacks:
            for gram, g in zip(stack.grams, (stack.gradient, stack.gradient.mT), strict=True):
                if gram is not None:
                    torch.baddbmm(gram, g, g.mT, beta=beta2, alpha=1 - beta2, out=gram)
        if step > 1:
            for stack in self._stacks:
                stack.rotate(stack.gradient, out=stack.scratch)
            exp_avg.lerp_(scratch, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(scratch, scratch, value=1 - beta2)
            torch.sqrt(exp_avg_sq, out=scratch).mul_((1 - beta2 ** (step - 1)) ** -0.5).add_(group["eps"])
            torch.div(exp_avg, scratch, out=scratch)
            for stack in self._stacks:
                stack.rotate(stack.scratch, out=stack.gradient, back=True)
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
            torch._foreach_add_(parameters, self._ways, alpha=-lr / (1 - beta1 ** (step - 1)))
        if step == 1 or step % group["every"] == 0:
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")  # tf32 rounds to about the damping
            for stack in self._stacks:
                stack.turn(FIRST_TURNS if step == 1 else 1)
            torch.set_float32_matmul_precision(precision)

    def _is_stacked(self) -> bool:
        """Return whether the states are views of the stacks: a resume puts tensors of its own there."""
        return bool(self._views) and all(self.state[p].get("exp_avg") is view for p, view in self._views)

    def _stack(self) -> None:
        """Make stacks from the states, where there are some, and the states views of them."""
        group = self.param_groups[0]
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for p in group["params"]:
            shapes.setdefault(p.shape[-2:], []).append(p)
        like = {"device": group["params"][0].device, "dtype": group["params"][0].dtype}
        sizes = [sum(p.numel() for p in parameters) for parameters in shapes.values()]
        self._flat = [torch.zeros(sum(sizes), **like) for _ in range(4)]
        self._stacks = []
        for (shape, parameters), *pieces in zip(shapes.items(), *(f.split(sizes) for f in self._flat), strict=True):
            exp_avg, exp_avg_sq, gradient, scratch = (piece.view(-1, *shape) for piece in pieces)
            k, sides = len(exp_avg), [s if s <= group["largest"] else None for s in shape]
            grams = [torch.zeros(k, s, s, **like) if s else None for s in sides]
            bases = [torch.eye(s, **like).repeat(k, 1, 1) if s else None for s in sides]
            stack = _Stack(parameters, exp_avg, exp_avg_sq, gradient, scratch, grams, bases)
            self._stacks.append(stack)
            for key, whole in stack.state().items():
                for p, part in zip(parameters, stack.parts(whole), strict=True):
                    if key in self.state[p]:
                        part.copy_(self.state[p][key])
                    self.state[p][key] = part
            for p in parameters:
                self.state[p].setdefault("step", torch.tensor(0.0))
        self._views = [(p, self.state[p]["exp_avg"]) for stack in self._stacks for p in stack.parameters]
        self._ways = [way for stack in self._stacks for way in stack.parts(stack.gradient)]


class MovingAverage:
    """Exponential moving average of the parameters, kept apart from the raw weights, in float32.

    The decay of update ``t`` (from 0) is min(decay, (1 + t) / (10 + t)), so that short runs do not average over the
    random start.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], decay: float):
        self.decay = decay
        self.updates = 0
        self.weights = {name: p.detach().float().clone() for name, p in named_parameters}

    def update(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        current = dict(named_parameters)
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        names = list(self.weights)
        with torch.no_grad():
            torch._foreach_lerp_(
                [self.weights[n] for n in names], [current[n].detach().float() for n in names], 1 - decay
            )
        self.updates += 1

    def load(self, weights: Mapping[str, Tensor], updates: int) -> None:
        assert set(weights) == set(self.weights), "moving average of another potential"
        for name, value in weights.items():
            self.weights[name].copy_(value)
        self.updates = updates
