"""What the commands share: where they print, how they end, and arguments that several have."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

console = Console()

EXIT_INPUT = 2
EXIT_KEYBOARD = 130

StoreArgument = Annotated[Path, typer.Argument(help="folder of a store")]


def say(line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def complain(message: str, code: int = EXIT_INPUT) -> NoReturn:
    """Print an error and leave."""
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
