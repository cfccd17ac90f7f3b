"""The potential that is judged: a release or run of mffm, or any function that returns an ASE calculator."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from ase.calculators.calculator import BaseCalculator

from mffm.errors import InputError, known

FOREIGN = "ase:"


@dataclass(frozen=True)
class Source:
    """How to get the calculator in another process.

    Attributes:
        spec: folder of a release or run, or ``ase:package.module:factory``.
        fidelity: level of theory asked of a release; there is no default. None for a factory.
        arguments: keyword arguments of the factory, or of `mffm.deploy.ase.Calculator`.
    """

    spec: str
    fidelity: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_foreign(self) -> bool:
        """Whether the calculator comes from a factory."""
        return self.spec.startswith(FOREIGN)

    def build(self) -> BaseCalculator:
        """Return a new calculator.

        Raises:
            InputError: no such release, module or factory; a factory that fails; a release without its fidelity.
        """
        if not self.is_foreign:
            return self._of_release()
        module, factory_name = self._module()
        factory = getattr(module, factory_name, None)
        if not callable(factory):
            names = known(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
            raise InputError(
                f"{self.spec}: {module.__name__} has no function or class {factory_name!r}; it has: {names}"
            )
        try:
            calculator = factory(**self.arguments)
        except TypeError as error:
            raise InputError(f"{self.spec} with {dict(self.arguments)}: {error}; give arguments by --with") from error
        if not isinstance(calculator, BaseCalculator):
            raise InputError(f"{self.spec} returned {type(calculator).__name__}; expected an ASE calculator")
        return calculator

    def _module(self) -> tuple[ModuleType, str]:
        """Return the module of a factory, and the factory's name."""
        module_name, _, factory_name = self.spec.removeprefix(FOREIGN).partition(":")
        if not module_name or not factory_name:
            raise InputError(f"{self.spec!r}: expected ase:package.module:factory, e.g. ase:ase.calculators.emt:EMT")
        try:
            return importlib.import_module(module_name), factory_name
        except ImportError as error:
            raise InputError(f"{self.spec}: {error}; install the package, or set PYTHONPATH to where it is") from error

    def _of_release(self) -> BaseCalculator:
        from mffm.deploy.ase import Calculator
        from mffm.release import load

        if self.fidelity is None:
            raise InputError(
                f"{self.spec}: no fidelity given and there is no default; say --fidelity or --fidelity-map; "
                f"it has: {known(load(self.spec).fidelities.names)}"
            )
        return Calculator(self.spec, self.fidelity, **self.arguments)

    def identity(self) -> dict[str, Any]:
        """Return what must be equal for results to belong together, with the digests of files that arguments name."""
        found: dict[str, Any] = {"potential": self.spec, "arguments": dict(self.arguments)}
        if self.is_foreign:
            module, _ = self._module()
            package = module.__name__.partition(".")[0]
            found["version"] = str(getattr(importlib.import_module(package), "__version__", "not known"))
            found["file"] = Path(inspect.getfile(module)).name
            named = {k: Path(v) for k, v in self.arguments.items() if isinstance(v, str) and Path(v).is_file()}
            if named:
                from mffm.release import sha256

                found["argument_files"] = {k: sha256(path) for k, path in named.items()}
        else:
            from mffm.release import load

            found["weights_sha256"] = load(self.spec, self.arguments.get("weights", "best")).weights_sha256
        return found


def parse_arguments(texts: list[str]) -> dict[str, Any]:
    """Return ``key=value`` texts as keyword arguments; values are read as YAML.

    Raises:
        InputError: no equals sign, or not YAML.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--with {text!r}: expected name=value")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--with {text!r}: the value is not valid YAML") from error
    return found


def fidelity_of(task: str, fidelity: str | None, mapped: Mapping[str, str]) -> str | None:
    """Return the fidelity for a task: of its full name in the map, else of its suite, else the general one."""
    return mapped.get(task, mapped.get(task.partition("/")[0], fidelity))


def parse_map(texts: list[str], tasks: list[str]) -> dict[str, str]:
    """Return ``task=fidelity`` texts as a map; a task is named ``suite/task`` or by its suite alone.

    Raises:
        InputError: no equals sign, or an unknown task.
    """
    suites = {t.partition("/")[0] for t in tasks}
    found = {}
    for text in texts:
        task, equals, fidelity = text.partition("=")
        if not equals or not fidelity:
            raise InputError(f"--fidelity-map {text!r}: expected task=fidelity, e.g. lambench/elastic=pbe")
        if task not in tasks and task not in suites:
            raise InputError(f"--fidelity-map {text!r}: no task {task!r}; known: {known([*suites, *tasks])}")
        found[task] = fidelity
    return found
