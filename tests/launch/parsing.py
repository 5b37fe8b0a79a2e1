"""What the real command line makes of words, without executing anything."""

from typing import Any

import typer
from ddetr.launch.arguments import normalised_arguments
from ddetr.launch.cli import app

Parsed = tuple[str, dict[str, Any]]  # a command's name and what its parameters are


def parse(words: list[str]) -> Parsed | None:
    """Of the words after `ddetr`; None where it prints its help. Raises UsageError as it does."""
    words = normalised_arguments(words)
    command: Any = typer.main.get_command(app)
    context, name = None, "ddetr"
    try:
        while True:
            context = command.make_context(name, list(words), parent=context)
            if not hasattr(command, "resolve_command"):
                return context.command_path, context.params
            name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
    except typer.Exit:
        return None
