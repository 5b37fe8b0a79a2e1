"""The command line of `ddetr` on its way to the ranks: encoded as one word of letters, digits, `-` and `_`.

Launchers interpret what they pass on. torchrun replaces `$` in it and refuses what could be several of its own options;
DeepSpeed hands it to a shell on every node.
"""

import base64
import os
import sys
from collections.abc import Sequence

LONGEST = 120_000  # characters; Linux takes 131,072 bytes as one argument, and over ssh the whole command is one


def split_off(arguments: Sequence[str]) -> tuple[list[str], str]:
    """A launcher's options, and the word for what stands behind their `--`.

    Raises ValueError when nothing does, or more than a launcher can pass on.
    """
    if "--" not in arguments[:-1]:
        raise ValueError("expected OPTION... -- train TRAIN_ARGUMENT...")
    position = list(arguments).index("--")
    return list(arguments[:position]), encoded(arguments[position + 1 :])


def encoded(arguments: Sequence[str]) -> str:
    """The arguments as one word (base64url). Raises ValueError when it is longer than LONGEST."""
    content = b"".join(os.fsencode(argument) + b"\0" for argument in arguments)
    word = base64.urlsafe_b64encode(content).decode().rstrip("=")
    if len(word) > LONGEST:
        raise ValueError(
            f"the arguments are {len(content)} bytes long, but a launcher passes on {LONGEST * 3 // 4} at most; "
            "put settings into a YAML file"
        )
    return word


def decoded(word: str) -> list[str]:
    """The arguments that `encoded` was given."""
    return [os.fsdecode(argument) for argument in base64.urlsafe_b64decode(word + "==").split(b"\0")[:-1]]


def main() -> None:
    """Become the `ddetr` whose arguments the word (the only argument) holds."""
    os.execv(sys.executable, [sys.executable, "-u", "-m", "ddetr.launch.cli", *decoded(sys.argv[1])])


if __name__ == "__main__":
    main()
