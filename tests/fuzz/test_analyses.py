"""An analysis in a run directory: shown rightly, or one line says why not."""

import json
import re
from pathlib import Path

from ddetr.core.evaluation import analysis as analyses
from ddetr.launch.failure_section import section
from ddetr.launch.page import page

from tests.core.detection_sets import CATEGORIES, drawn
from tests.core.test_failures import of
from tests.fuzz.strategies import DAMAGES, Effort, changed, damaged, outcome, watched
from tests.launch.test_report import Page


def test_an_analysis_of_a_stranger_is_shown_or_refused(effort: Effort, tmp_path: Path) -> None:
    folder = tmp_path / "run/eval/step_00000010"
    folder.mkdir(parents=True)
    analyses.write(folder, of(*drawn(1), CATEGORIES).analysis)
    file = folder / analyses.FILE_NAME
    good = file.read_bytes()

    def holds(data: bytes) -> None:
        file.write_bytes(data)
        with watched():
            found = outcome(lambda: analyses.read(folder), file)
            shown = section(folder.parent)
        assert ('<p class="warning">' in shown) == (found is None)
        assert len(shown) < 200_000
        assert not re.search(r' d="[^"]*(nan|inf)', shown)
        Page(page("a run", [shown]))

    texts = changed(json.loads(good)).map(lambda document: json.dumps(document).encode())
    effort(holds, texts | DAMAGES.map(lambda damage: damaged(good, damage)))
