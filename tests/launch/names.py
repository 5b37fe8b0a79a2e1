"""Names that strangers give, and how each is read."""

import unicodedata

LONG = "long " * 2000
SHOWN = {  # a name, and how it is read
    "shot [v2].jpg": "shot [v2].jpg",
    "on/off [/]": "on/off [/]",
    "[red]x": "[red]x",
    "[link=http://x]y[/link]": "[link=http://x]y[/link]",
    "a\x1b]0;title\x07b": r"a\x1b]0;title\x07b",
    "\x1b[2J": r"\x1b[2J",
    "$\\frac$": "$\\frac$",
    "$x$ and $y": "$x$ and $y",
    "<script>alert(1)</script>": "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>': '"><img src=x onerror=alert(1)>',
    "javascript:alert(1)": "javascript:alert(1)",
    "two\nlines": r"two\nlines",
    "two\r\x85lines\u2028": r"two\r\x85lines\u2028",
    "tab\t": r"tab\t",
    "\u202eevil": r"\u202eevil",
    "half\ud83d": r"half\ud83d",
    ":smile:": ":smile:",
    "C1\x9b31m": r"C1\x9b31m",
    "%(message)s {task} %s": "%(message)s {task} %s",
    "名前": "名前",
    "ß": "ß",
    "😀": "😀",
    LONG: LONG[:50],
}
NAMES = tuple(SHOWN)


def file_of(name: str) -> str:
    """A file name with the same in it: what a name cannot have there is left out."""
    return name.replace("/", "|").replace("\ud83d", "\udcff")[:200] + ".png"


def shown_file(name: str) -> str:
    return SHOWN[name].replace("/", "|").replace(r"\ud83d", r"\udcff")[:50]


def assert_harmless(text: str) -> None:
    """Nothing in it that a terminal obeys or does not draw, and no line that passes for a message of ours."""
    bad = {c for c in text if c != "\n" and (unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp"))}
    assert not bad, text
