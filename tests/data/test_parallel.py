"""Work that other processes do."""

import os
import signal

import pytest
from ddetr.data.parallel import ordered_map


def killed(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.integration
def test_a_process_that_is_killed_is_told_with_the_remedy() -> None:
    with pytest.raises(OSError, match=r"a worker process was killed \(out of memory\?\); run .* with fewer workers"):
        list(ordered_map(killed, range(4), workers=2))
