"""Console output. Names and messages from files and servers are untrusted, and none of them commands the terminal.

`Terminal` is the console of every table and progress bar, `say` prints a line, `LogFormatter` formats the log. All of
them print `data.text.visible` text, and nothing in it is markup: `[red]`, `[/]` and `:smile:` are printed as they are.
"""

import logging
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from ..data.text import shortened, visible

NARROWEST = 40  # characters of a line, where a terminal says that it has none or fewer
NAME_LENGTH = 60  # characters of a name in a table, a list or a picture


class Terminal(Console):
    """A console for which a string is one line of text, without markup. What has lines or a style of its own is a Text.

    A Text is printed as it is, so names in it go through `visible` first.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)
        self.width = max(self.width, NARROWEST)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


class _Description(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(visible(task.description))


def progress_bar(*columns: ProgressColumn, console: Console | None = None) -> Progress:
    """Description, bar, count, `columns` and time left; without `console` on the standard error."""
    columns = (_Description(), BarColumn(), MofNCompleteColumn(), *columns, TimeRemainingColumn())
    return Progress(*columns, console=console or Terminal(stderr=True))


def say(line: str, file: TextIO | None = None) -> None:
    """Print one line, at once; without `file` to the standard output."""
    print(visible(line), file=file, flush=True)


def brief(text: str, most: int = NAME_LENGTH) -> str:
    """`shortened`, to the length of a name."""
    return shortened(text, most)


def paragraph(text: str) -> str:
    """The text made visible, its lines after the first indented, so that none can pass for a line of its own."""
    first, *more = (visible(line) for line in text.split("\n"))
    if any(line[:1].strip() for line in more):
        more = [f"  {line}" if line else line for line in more]
    return "\n".join([first, *more])


class LogFormatter(logging.Formatter):
    """A record is a paragraph, whatever is in its message."""

    def format(self, record: logging.LogRecord) -> str:
        return paragraph(super().format(record))
