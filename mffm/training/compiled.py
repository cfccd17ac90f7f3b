"""A microbatch's loss and its gradients as one compiled function: ``train.compile``.

The product's own modules, the force pass and the gradient by the weights are traced once, over a batch in blocks (see
``mffm.blocks``) whose sizes are symbols, and given to Inductor as one flat graph: one function holds for every batch of
a run. Gradients are computed with the loss and handed out when the engine asks for them, so that DeepSpeed's backward,
accumulation and every ZeRO stage are what they are without.
"""

import contextlib
import hashlib
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mffm.batch import Batch
from mffm.blocks import DIMENSIONS, Blocks, to_blocks, width_for
from mffm.errors import InputError
from mffm.keys import ENERGY, FORCES, STRESS, Property
from mffm.loss import Loss
from mffm.models.adapter import merged
from mffm.models.density import DegreeLinear
from mffm.models.potential import Potential

LABELS: dict[Property, tuple[str | int, ...]] = {
    ENERGY: ("systems",), FORCES: ("atoms", 3), STRESS: ("systems", 3, 3),
}  # fmt: skip


class CompiledStep:
    """The loss of a potential on a microbatch, compiled at the first call.

    Args:
        avg_neighbors: of the potential; chooses the width of the blocks.

    Attributes:
        seconds: that tracing and compiling, or loading, took; None before the first call.
        cached: it was loaded.
    """

    def __init__(self, potential: Potential, loss: Loss, avg_neighbors: float):
        self.potential, self.loss = potential, loss
        self.width = width_for(avg_neighbors)
        self.seconds: float | None = None
        self.cached = False
        self._function: Callable[..., Any] | None = None
        self._names = list(merged(dict(potential.named_parameters())))

    def __call__(
        self, parameters: Sequence[Tensor], batch: Batch, reference: Tensor, divisors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what ``Loss`` returns; the loss is differentiable in the parameters.

        Args:
            parameters: values of the potential's parameters, in its order; merged, where it has an adapter.
            reference: [n_systems] float64, eV; see ``Loss``.
        """
        self.potential.check(batch)
        blocks = to_blocks(batch, self.width, self.potential.cutoff)
        inputs = [*blocks.tensors().values(), *self._labels(blocks), reference, divisors]
        if self._function is None:
            started = time.perf_counter()
            self._function = self._ready(parameters, blocks, inputs)
            self.seconds = time.perf_counter() - started
        return _WithGradients.apply(self._function, inputs, *parameters)

    def summary(self) -> str:
        """Return what was compiled as one line of the log."""
        if self.seconds is None:
            return "compiled: at the first step"
        how = "loaded" if self.cached else "compiled"
        return f"{how} in {self.seconds:.0f} s: one function for all batches, neighbors in blocks of {self.width}"

    def _labels(self, batch: Batch) -> list[Tensor]:
        tables = (batch.labels, batch.masks, batch.weights)
        return [table[prop] for table in tables for prop in self.loss.properties]

    def _shapes(self) -> list[tuple[str | int, ...]]:
        """Return the shapes of the inputs, by the names of their dimensions."""
        own = [LABELS[prop] for prop in self.loss.properties]
        each: list[tuple[str | int, ...]] = [("systems",)] * len(own)
        divisors = (len(self.loss.properties), len(self.loss.fidelities))
        return [*DIMENSIONS.values(), *own, *each, *each, ("systems",), divisors]

    def _ready(self, parameters: Sequence[Tensor], blocks: Blocks, inputs: list[Tensor]) -> Callable[..., Any]:
        """Return the function, from the cache where it is there."""
        options = inductor_options(self.potential.config.backbone.lmax)
        device = parameters[0].device
        facts = [
            self.potential.config.model_dump_json(), self.loss.config.model_dump_json(), self.potential.fidelities,
            self.potential.avg_neighbors, self.potential.scale, self.loss.properties, self.width, options,
            [(tuple(p.shape), p.dtype) for p in parameters], [t.dtype for t in inputs],
            [m.product_dtype for m in self.potential.modules() if isinstance(m, DegreeLinear)],
            device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
            torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cpu.get_cpu_capability(),
            torch.__version__, processor(), sources(),
        ]  # fmt: skip
        with cache_folder(facts) as folder:
            path, constants_path = folder / "step.bin", folder / "constants.safetensors"
            if path.exists():
                # What a killed run left: torch writes shared objects in place.
                with contextlib.suppress(OSError, ImportError, AssertionError, RuntimeError, SafetensorError):
                    constants = [t.to(device) for _, t in sorted(load_file(constants_path).items())]
                    loaded = torch._inductor.CompiledArtifact.load(path=str(path), format="binary")
                    self.cached = True
                    return partial(loaded, *constants)
                shutil.rmtree(folder, ignore_errors=True)
            self.cached = False
            from mffm.training import lowering

            lowering.register()
            graph, constants = self._traced(parameters, blocks, inputs)
            placeholders = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
            symbols = [size for value in placeholders for size in value.shape if isinstance(size, torch.SymInt)]
            with refused_compiler():
                function = torch._inductor.standalone_compile(
                    graph, placeholders, dynamic_shapes="from_graph", options={"config_patches": options}
                )
            _require_symbolic(symbols, "compiling")
            names = [f"{i:04d}" for i in range(len(constants))]
            # written aside, as another run may have the file mapped
            aside = folder / f"constants.{platform.node()}.{os.getpid()}.partial"
            save_file(dict(zip(names, constants, strict=True)), aside)
            aside.replace(constants_path)
            function.save(path=str(path), format="binary")
            return partial(function, *constants)

    def _traced(
        self, parameters: Sequence[Tensor], blocks: Blocks, inputs: list[Tensor]
    ) -> tuple[torch.fx.GraphModule, list[Tensor]]:
        """Return the graph of (constants, parameters, inputs) → (loss, parts, gradients), and the constants."""
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        environment = ShapeEnv()
        sizes = _symbols(environment, self.potential.avg_neighbors, self.width, parameters[0].device)
        mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
        with mode:
            fakes = [
                torch.empty([sizes[d] if isinstance(d, str) else d for d in shape], dtype=t.dtype, device=t.device)
                for shape, t in zip(self._shapes(), inputs, strict=True)
            ]
            weights = [torch.empty(p.shape, dtype=p.dtype, device=p.device, requires_grad=True) for p in parameters]
        n_weights, n_fields, n_properties = len(weights), len(DIMENSIONS), len(self.loss.properties)

        def step(*arguments: Tensor) -> tuple[Tensor, ...]:
            own, rest = arguments[:n_weights], arguments[n_weights:]
            geometry, rest = dict(zip(DIMENSIONS, rest[:n_fields], strict=True)), rest[n_fields:]
            tables = [
                dict(zip(self.loss.properties, rest[i * n_properties : (i + 1) * n_properties], strict=True))
                for i in range(3)
            ]
            batch = replace(
                blocks, **cast(dict[str, Any], geometry), labels=tables[0], masks=tables[1], weights=tables[2]
            )
            named = dict(zip(self._names, own, strict=True))
            wanted = {"forces": self.loss.needs_forces, "stress": self.loss.needs_stress}
            prediction = torch.func.functional_call(self.potential, named, (batch,), wanted)
            loss, parts = self.loss(prediction, batch, rest[-2], rest[-1])
            gradients = torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True)
            return loss.detach(), parts, *gradients

        was_training = self.potential.training
        self.potential.train()
        try:
            graph = make_fx(step, tracing_mode="symbolic", decomposition_table=_DECOMPOSITIONS)(*weights, *fakes)
        finally:
            self.potential.train(was_training)
        _require_symbolic(sizes.values(), "tracing")
        return graph, _lifted(graph, mode)


class _WithGradients(torch.autograd.Function):
    """The compiled function's loss, whose gradients are there already when they are asked for."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Any], inputs: list[Tensor], *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss, parts, *gradients = function(*(p.detach() for p in parameters), *inputs)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return None, None, *torch._foreach_mul(gradients, grad.to(gradients[0].dtype))


def _lifted(graph: torch.fx.GraphModule, mode: Any) -> list[Tensor]:
    """Make the constants of a graph its first inputs and return them: torch saves a compiled graph without them."""
    first = next(node for node in graph.graph.nodes if node.op == "placeholder")
    constants: dict[str, Tensor] = {}
    inputs: dict[str, torch.fx.Node] = {}
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        name = str(node.target)
        if name not in constants:
            constants[name] = getattr(graph, name).detach().contiguous()
            with graph.graph.inserting_before(first):
                inputs[name] = graph.graph.placeholder(f"constant_{len(constants)}")
            inputs[name].meta["val"] = mode.from_tensor(constants[name], static_shapes=True)
        node.replace_all_uses_with(inputs[name])
        graph.graph.erase_node(node)
    for name in constants:
        delattr(graph, name)
    graph.recompile()
    return list(constants.values())


def _embedding_backward(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """The gradient of an embedding's table as a product with the one-hot: no atomics, so the order never changes."""
    assert padding_idx < 0
    assert not scale_grad_by_freq
    rows = indices.flatten() == torch.arange(num_weights, device=indices.device).unsqueeze(1)
    return rows.to(grad.dtype) @ grad.reshape(-1, grad.shape[-1])


_DECOMPOSITIONS = {torch.ops.aten.embedding_dense_backward.default: _embedding_backward}


def _require_symbolic(sizes: Iterable[Any], what: str) -> None:
    """A size that the compiler takes for a constant is wrong for the next batch."""
    fixed = [str(size) for size in sizes if not size.node.expr.free_symbols]
    assert not fixed, f"a size became a constant while {what}: {fixed}"


def _symbols(environment: Any, avg_neighbors: float, width: int, device: torch.device) -> dict[str, Any]:
    """Return a symbol for each dimension whose size differs between batches.

    A symbol comes with a size that the compiler takes for typical. It depends on the potential and the kind of device
    alone, so that what is compiled again is the same. (0 and 1 would be taken for constants.)
    """
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    typical = {"systems": 11, "atoms": 211, "most atoms": 23, "most blocks": 2 + math.ceil(avg_neighbors / width)}
    if device.type != "cpu":  # there a size is compared with others: one that equals a constant's would become it
        typical["most blocks"] = 13
    typical["blocks"] = typical["atoms"] * math.ceil(avg_neighbors / width) + 1
    typical["pairs"] = typical["atoms"] * math.ceil(avg_neighbors / 2) + 1
    symbols = {}
    for dimension, hint in typical.items():
        source = ConstantSource(dimension.replace(" ", "_"))
        symbol = environment.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        symbols[dimension] = environment.create_symintnode(symbol, hint=hint, source=source)
    symbols["slots"] = symbols["blocks"] * width
    return symbols


def inductor_options(lmax: int) -> dict[str, Any]:
    """Return Inductor's options.

    An expression that reads more than so many arrays is stored instead of being computed again where it is used, and
    one that has come to read more than the second number wherever it is used: all sums over neighbors are loops of
    their own (three reads for each order of the highest degree, and the indices), what the senders receive, which reads
    every order, is one loop.
    """
    reads = 3 * (2 * lmax + 1) + 7
    return {
        "realize_reads_threshold": reads,
        "realize_acc_reads_threshold": 3 * (lmax + 1) ** 2 + 2 * (lmax + 1) + 8,
        "realize_opcount_threshold": 600,
        "assert_indirect_indexing": False,  # the indices are made by ``to_blocks``
        "fx_graph_cache": True,
    }


def sources() -> str:
    """Return a hash of the code that a step is traced from."""
    root = Path(__file__).parents[1]
    others = ("batch.py", "blocks.py", "loss.py", "training/compiled.py", "training/lowering.py")
    digest = hashlib.sha256()
    for file in [*sorted((root / "models").glob("*.py")), *(root / name for name in others)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def processor() -> str:
    """Return what a compiler knows the processor by: Inductor compiles for it alone, and clusters share homes."""
    keys = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(keys))])


@contextmanager
def cache_folder(facts: Sequence[object]) -> Iterator[Path]:
    """Point Inductor to a folder for these facts under TORCHINDUCTOR_CACHE_DIR, or under the user's cache."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    root = Path(before) if before else Path(home) / "mffm" / "inductor"
    folder = root / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot keep what train.compile makes: {error.strerror}; name a folder with {name}"
        ) from error
    os.environ[name] = str(folder)
    try:
        yield folder
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def refused_compiler() -> Iterator[None]:
    """Say what a compiler that does not work said.

    Raises:
        InputError: with its first error.
    """
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        yield
    except RuntimeError as error:
        inner = getattr(error, "inner_exception", error)
        if not isinstance(inner, CppCompileError | InvalidCxxCompiler):
            raise
        lines = str(getattr(inner, "output", inner)).strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")
        raise InputError(
            f"train.compile: the C++ compiler failed: {first.strip()}; it needs its own and Python's headers "
            "(g++, python3-dev), or leave train.compile out"
        ) from error


def require_compiler() -> None:
    """Refuse to start where there is no C++ compiler.

    Raises:
        InputError: with what was looked for.
    """
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if not any(shutil.which(name) for name in names):
        raise InputError(
            f"train.compile needs a C++ compiler, found none of {', '.join(names)}; install g++, name one with CXX, "
            "or leave train.compile out"
        )
