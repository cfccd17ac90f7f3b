"""Every name that a tool takes from the package or from another tool is there: no other test starts most of them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOOLS = sorted((ROOT / "tools").rglob("*.py"))


def source_of(module: str) -> Path | None:
    """Return the file of a module of this repository."""
    parts = module.split(".")
    for folder in (ROOT, ROOT / "tools", ROOT / "tools" / "peers"):
        for path in (folder.joinpath(*parts).with_suffix(".py"), folder.joinpath(*parts, "__init__.py")):
            if path.is_file():
                return path
    return None


def names_of(module: str) -> set[str]:
    """Return what a module defines or imports at its top level."""
    path = source_of(module)
    assert path is not None, f"no module {module}"
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_what_a_tool_imports_is_there(tool: Path) -> None:
    for node in ast.walk(ast.parse(tool.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and (node.module.startswith("mffm") or source_of(node.module))
        ):
            for alias in node.names:
                if source_of(f"{node.module}.{alias.name}") is None:
                    assert alias.name in names_of(node.module), f"from {node.module} import {alias.name}"
