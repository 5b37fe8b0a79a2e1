"""Real training runs of a small model."""

from pathlib import Path

import pytest

from tests.core.runs import SMALL, Run, Train, trained


@pytest.fixture(scope="session")
def train(synthetic_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Runs `ddetr train` on the small model once for each set of arguments."""
    output = tmp_path_factory.mktemp("runs")
    done: dict[tuple, Run] = {}

    def run(ranks: int, *overrides: str, steps: int = 4) -> Run:
        key = (ranks, overrides, steps)
        if key not in done:
            name = f"run{len(done)}"
            arguments = ["tiny", *SMALL, f"data.train={synthetic_shards}", f"train.output={output}"]
            arguments += [f"train.name={name}", f"train.max_steps={steps}", *overrides]
            done[key] = trained(output / name, *arguments, ranks=ranks)
        return done[key]

    return run
