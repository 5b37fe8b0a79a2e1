"""Write docs/settings.md: every setting with its type, bounds, default, meaning and unit, from where it is declared.

python docs/write_settings.py            writes it
python docs/write_settings.py --check    says whether the file is what would be written; exit status 1 if not
"""

import sys
from pathlib import Path

from ddetr.core.glossary import Entry, entries, section_meaning, section_names

PAGE = Path(__file__).parent / "settings.md"
COMMAND = "python docs/write_settings.py"
HEAD = f"""# Settings

Every setting of a configuration. A setting is given in a YAML file, under its section, or on the command line as
`section.key=value`; what is not given has the default. A file may also name its `base`, a preset or another file, whose
settings its own override. `ddetr config --explain KEY` prints the same texts.
`{COMMAND}` writes this page from the declarations in `core/sections.py` and `data/config.py`.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *("\n".join(_section(name)) for name in section_names())])


def _section(name: str) -> list[str]:
    rows = ["| setting | type and bounds | default | meaning |", "| --- | --- | --- | --- |"]
    return [f"## {name}", "", section_meaning(name), "", *rows, *map(_row, entries(name)), ""]


def _row(entry: Entry) -> str:
    meaning = entry.meaning + (f". Unit: {entry.unit}" if entry.unit else "")
    cells = (f"`{entry.key}`", entry.kind, f"`{entry.default}`", meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def main() -> int:
    written = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(written)
        return 0
    if PAGE.read_text() == written:
        return 0
    print(f"{PAGE} is not what the settings say; write it with `{COMMAND}`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
