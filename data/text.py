"""Untrusted text, as from a file or a server, made fit for a terminal, one line of a log, one cell, a file name."""

import os
import unicodedata

LONGEST_FILE_NAME = 255  # bytes, on nearly every file system
JOINERS = "\u200c\u200d"  # zero-width non-joiner and joiner
FIRST_JOINED_SCRIPT = 0x600  # Arabic; Latin, Greek, Cyrillic, Armenian and Hebrew below it need no joiner
# Letters and marks by their category, but nothing is drawn for them.
BLANKS = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0}
# Format characters by their category, but drawn: the signs that Arabic, Syriac and Kaithi put before a number.
SIGNS = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}


def visible(text: str) -> str:
    r"""The text with everything that is not drawn written as an escape: `\x1b`, `\n`, `\u202e`, `\udcff`.

    Escaped are:

    - control characters, such as newline, tab and DEL;
    - format characters, such as zero-width ones and those that change the text direction;
    - lone surrogates, line and paragraph separators, private and unassigned code points.

    The result is one line, and a terminal obeys nothing in it. Ordinary text of every script stays, emoji included.
    Emoji, Arabic and Indic scripts use zero-width joiners: a single joiner between two such characters stays. So does a
    single variation selector after a visible character. A backslash stays: the result is to be read, not decoded.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if _stays(text, position) else character.encode("unicode_escape").decode()
        for position, character in enumerate(text)
    )


def shortened(text: str, most: int) -> str:
    """The text visible, and no longer than `most` characters: the end of a longer one is an ellipsis."""
    text = visible(text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"


def file_name(stem: str, ending: str) -> str:
    """`stem` and `ending` together, the stem cut where a file system takes no name as long."""
    while len(os.fsencode(stem + ending)) > LONGEST_FILE_NAME:
        stem = stem[:-1]
    return stem + ending


def _stays(text: str, position: int) -> bool:
    character = text[position]
    code = ord(character)
    before, after = text[position - 1 : position], text[position + 1 : position + 2]
    if character in JOINERS:
        return _joined(before) and _joined(after)
    if _selects_variation(code):
        return before.isprintable() and before.strip() != "" and not _selects_variation(ord(before))
    if code in BLANKS:
        return False
    return character.isprintable() or code in SIGNS or unicodedata.category(character) == "Zs"


def _joined(neighbour: str) -> bool:
    return neighbour >= chr(FIRST_JOINED_SCRIPT) and unicodedata.category(neighbour)[0] in "LMS"


def _selects_variation(code: int) -> bool:
    return 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF or 0x180B <= code <= 0x180D or code == 0x180F
