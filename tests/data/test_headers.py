"""Headers of many images at once."""

from pathlib import Path

from ddetr.data.headers import _FEW, read_headers
from rich.progress import Progress


def test_the_progress_of_many_headers_is_shown_to_its_end(tmp_path: Path) -> None:
    progress = Progress(disable=True)
    names = [f"{number}.png" for number in range(_FEW + 1)]
    found = read_headers(tmp_path, names, allow_outside=False, most_pixels=1, workers=1, progress=progress)
    assert len(found) == len(names)
    assert all(isinstance(header, tuple) and header[0] == "missing image" for header in found)
    (task,) = progress.tasks
    assert task.finished
