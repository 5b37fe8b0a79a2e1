"""A run directory of somebody else's, and how a command takes it."""

from collections.abc import Callable
from pathlib import Path

from ddetr.core.checkpoint.weights import WEIGHTS
from ddetr.core.ownership import ForeignSettingError
from ddetr.launch.cli import app
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

Stranger = Callable[..., Path]  # stranger(override, ...): a run directory whose checkpoint and config.yaml say that


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(result: Result) -> str:
    assert isinstance(result.exception, ForeignSettingError), (result.exception, result.output)
    return str(result.exception)


def rewritten(run_directory: Path, folder: Path, **metadata: str) -> Path:
    """A copy of a run's last checkpoint with other metadata, in a run directory of its own."""
    source = run_directory / "checkpoints/step_00000020" / WEIGHTS
    with safe_open(source, framework="pt") as opened:
        known = opened.metadata()
    step = folder / "checkpoints/step_00000020"
    step.mkdir(parents=True)
    save_file(load_file(source), step / WEIGHTS, metadata={**known, **metadata})
    (folder / "config.yaml").write_text(metadata.get("config", known["config"]))
    return folder


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
