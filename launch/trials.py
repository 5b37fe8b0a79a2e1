"""The trials of a hyperparameter search: results.json and results.csv while it runs, a table in the end.

Both files are written whole, before the first trial and after each result, so that they are there however the search
ends.
"""

import csv
import io
import math
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..core.config import Config, without_logins
from ..core.overrides import read, written
from ..data.documents import as_json
from ..data.files import write_whole
from .console import Terminal, brief, paragraph, say
from .sweep import Sweep

Row = dict[str, Any]


class Trials:
    """The rows of a search in `folder`. A trial's state is running, ended, failed or, in the end, interrupted.

    epochs: how many a trial takes that nothing stops.
    """

    def __init__(self, sweep: Sweep, folder: Path, epochs: int) -> None:
        self._sweep, self._folder, self._epochs = sweep, folder, epochs
        self._rows: dict[str, Row] = {}

    @property
    def rows(self) -> list[Row]:
        """The best first, those without a score last."""
        sign = -1 if self._sweep.mode == "max" else 1
        return sorted(
            self._rows.values(),
            key=lambda row: (row["best"] is None, 0.0 if row["best"] is None else sign * row["best"], row["trial"]),
        )

    @property
    def ended(self) -> int:
        return sum(row["state"] != "running" for row in self._rows.values())

    def create(self) -> None:
        """Write the table, so far without a row. Raises OSError where that is not possible."""
        self._write()

    def begin(self, name: str, parameters: dict[str, Any]) -> None:
        """A trial starts, if it has not already."""
        row: Row = {"trial": name, "state": "running"}
        row |= {"parameters": {key: parameters.get(key) for key in self._sweep.search}}
        row |= {"best": None, "best_after_epochs": None, "epochs": None, "stopped_early": False, "error": None}
        self._rows.setdefault(name, row)
        self._write_again()

    def add(self, name: str, epochs: int, score: float) -> None:
        """Take in the score of an evaluation. epochs: how many the trial has taken."""
        row = self._rows[name]
        row["epochs"] = epochs
        sign = -1 if self._sweep.mode == "max" else 1
        if math.isfinite(score) and (row["best"] is None or sign * score < sign * row["best"]):
            row["best"], row["best_after_epochs"] = score, epochs
        self._write_again()

    def end(self, name: str, error: str | None = None) -> None:
        """A trial has ended. error: why it failed."""
        row = self._rows[name]
        early = error is None and row["epochs"] is not None and row["epochs"] < self._epochs
        row |= {"state": "failed" if error else "ended", "error": error, "stopped_early": early}
        self._write_again()

    def interrupt(self) -> None:
        """Mark the trials that still run as interrupted."""
        for row in self._rows.values():
            row["state"] = "interrupted" if row["state"] == "running" else row["state"]
        self._write_again()

    def _write_again(self) -> None:
        """A full disk costs the table, which the next result writes again, and not the search."""
        try:
            self._write()
        except OSError as error:
            say(f"{error.filename or self._folder}: not written: {error.strerror}")

    def _write(self) -> None:
        sweep, rows = self._sweep, self.rows
        for row in rows:
            run_directory = self._folder / "trials" / row["trial"]
            there = row["state"] == "running" or run_directory.is_dir()  # that of one that starts is made in a moment
            row["run_directory"] = str(run_directory) if there else None
        self._folder.mkdir(parents=True, exist_ok=True)
        content = {"metric": sweep.metric, "mode": sweep.mode, "sweep": _shown(sweep), "trials": rows}
        write_whole(self._folder / "results.json", as_json(content, indent=1).encode())
        text = io.StringIO()
        columns = ["best", "best_after_epochs", "epochs", "stopped_early", "error", "run_directory"]
        writer = csv.DictWriter(text, ["trial", "state", *sweep.search, *columns], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, **row["parameters"]} for row in rows)
        write_whole(self._folder / "results.csv", text.getvalue().encode(errors="backslashreplace"))

    def print(self) -> None:
        sweep, rows, folder = self._sweep, self.rows, self._folder
        names = [key.rpartition(".")[2] for key in sweep.search]
        titles = [name if names.count(name) == 1 else key for name, key in zip(names, sweep.search, strict=True)]
        table = Table(
            "trial", *titles, sweep.metric, "after epochs", "ended", title=f"{len(rows)} trials, the best first"
        )
        for column in table.columns:
            column.no_wrap = True
        for row in rows:
            values = [_short(row["parameters"].get(key)) for key in sweep.search]
            best = ["-", "-"] if row["best"] is None else [f"{row['best']:.4f}", str(row["best_after_epochs"])]
            ended = f"{'stopped after' if row['stopped_early'] else 'after'} {row['epochs']} epoch(s)"
            ended = ended if row["state"] == "ended" else row["state"]
            table.add_row(row["trial"].removeprefix("trial_"), *values, *best, ended)
        console = Terminal()
        if not console.is_terminal:
            console = Terminal(width=160)
        console.print(table)
        for row in rows:
            if row["error"]:
                console.print(Text(paragraph(f"{row['trial']} failed: {row['error']}")), soft_wrap=True)
                console.print(f"  traceback: {folder}/ray/{row['trial']}/error.txt", soft_wrap=True)
        console.print(
            f"The trials' runs are in {folder}/trials, the table in {folder}/results.json and .csv", soft_wrap=True
        )


def _shown(sweep: Sweep) -> dict[str, Any]:
    """The sweep as results.json, which is handed on, has it: without logins of addresses."""
    values = sweep.model_dump(mode="json")
    split = [read(override, Config) for override in sweep.overrides]
    return {**values, "overrides": [written(".".join(path), without_logins(value)) for path, value in split]}


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else brief(str(value))
