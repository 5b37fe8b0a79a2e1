"""Arguments that do harm where something reads them on the way, and what a rank in the place of `ddetr` was given."""

import os
import pickle
from dataclasses import dataclass
from pathlib import Path

RECORDER = """
import os, pickle
with open("/proc/self/cmdline", "rb") as file:
    line = file.read().split(b"\\0")[:-1]
if b"ddetr.launch.cli" in line:
    if "RANK" in os.environ:
        arguments = line[line.index(b"ddetr.launch.cli") + 1 :]
        with open(os.path.join(os.path.dirname(__file__), "rank-" + os.environ["RANK"]), "wb") as file:
            pickle.dump((arguments, dict(os.environb), os.getcwdb()), file)
    os._exit(0)
"""


def hostile(folder: Path, utf8: bool = False) -> list[str]:
    """Where one is executed, `folder` gets a file `executed`. utf8: only those that are text."""
    touch = f"touch {folder}/executed"
    words = [
        *(
            f"$({touch})",
            f"`{touch}`",
            f";{touch};",
            f"&{touch}&",
            f"|{touch}",
            f"\n{touch}\n",
            f"&&{touch}",
            f"||{touch}",
        ),
        *(f"'; {touch}; '", f'"; {touch}; "', f"\\'; {touch}; \\'", f'\\"; {touch} #', f">{folder}/executed"),
        *(f"train.name=$({touch})", f"train.name=a;{touch}", f"<({touch})", f"%{{{touch}}}", f"() {{ :; }}; {touch}"),
        *("'", '"', "\\", "\\\\", "\\n", "''", '""', "(", ")", "<", ">", ">>", "|", "&", ";", ";;", "`", "$", "$$"),
        *("$HOME", "${HOME}", "$(HOME)", "$$(HOME)", "${local_rank}", "$local_rank", "${IFS}", "$'\\n'", "$0", "$@"),
        *(
            "*",
            "?",
            "[a-z]*",
            "~",
            "~root",
            "{a,b}",
            "{1..3}",
            "!",
            "!!",
            "#",
            "# a",
            "%",
            "%h",
            "%n",
            "%u",
            "%%",
            "^",
            "@",
        ),
        *(
            " ",
            "  two  spaces  ",
            "\t",
            "\n",
            "two\nlines",
            "ends\n",
            "\nbegins",
            "\r",
            "\r\n",
            "\x01",
            "\x1b[31m",
            "\x7f",
        ),
        *("-", "--", "---", "-h", "--help", "-x", "-m", "--n", "--r", "--nnodes=7", "--nproc-per-node", "--module"),
        *(
            "--include",
            "--include=elsewhere",
            "--exclude",
            "-H",
            "--num_gpus=0",
            "--master_port=1",
            "--dry-run",
            "--ray",
        ),
        *(
            "",
            "=",
            "==",
            "a=b=c",
            "=a",
            "a=",
            "train",
            "true",
            "null",
            "/",
            "..",
            "a\\ b",
            "é",
            "日本",
            "😀",
            "\u202e",
            "\u2028",
        ),
        os.fsdecode(b"\xff\xfe"),
        os.fsdecode(b"train.name=\xe9"),
    ]
    return [word for word in words if not utf8 or word.isascii() or word.isprintable()]


@dataclass(frozen=True)
class Rank:
    arguments: list[bytes]  # of `ddetr`
    environment: dict[bytes, bytes]
    folder: bytes


def recorder(folder: Path) -> dict[str, str]:
    """Variables that make each rank leave what it was given in `folder`, and end."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(RECORDER)
    return {"PYTHONPATH": str(folder)}


def recorded(folder: Path) -> dict[int, Rank]:
    """What the ranks were given, by their numbers."""
    return {int(file.name[5:]): Rank(*pickle.loads(file.read_bytes())) for file in folder.glob("rank-*")}
