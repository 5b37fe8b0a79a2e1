"""Whether a folder can be made and written to, found out before anything is done."""

import os
from pathlib import Path


def obstacle(folder: Path) -> str | None:
    """What keeps this account from making `folder` or from writing to it; None when nothing does. Makes nothing."""
    path = os.path.abspath(folder)
    while not os.path.lexists(path):  # False, too, for what this account may not look at
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        return f"{path} is not a folder"
    if os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        return None
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return f"{path} is on a read-only file system"
    return f"{path} cannot be written to by this account (uid {os.geteuid()})"
