"""The documents as tests read them: code blocks, code within a line, command lines, headings and links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)


def split(line: str) -> list[str]:
    """The words of a command without its remark; of what a shell could not read, the words between blanks."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return line.split()


@dataclass(frozen=True)
class Document:
    path: Path  # from the root of the repository

    @property
    def text(self) -> str:
        return (REPOSITORY / self.path).read_text(encoding="utf-8")

    def blocks(self, *languages: str) -> list[str]:
        """Its fenced blocks of these languages; all of them without any."""
        return [block for language, block in FENCED.findall(self.text) if not languages or language in languages]

    @property
    def prose(self) -> str:
        """All but the code blocks."""
        return INDENTED.sub("", FENCED.sub("", self.text))

    @property
    def spans(self) -> list[str]:
        """Code within a line, or that goes on in the next one."""
        return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", self.prose)]

    @property
    def shell_lines(self) -> Iterator[list[str]]:
        """The commands of its shell blocks as words: continued lines as one, without prompts, remarks and redirections.

        Blocks without a language count, and so do indented ones, where their lines can be read as commands.
        """
        text = "\n".join(self.blocks("sh", "") + INDENTED.findall(FENCED.sub("", self.text)))
        for line in text.replace("\\\n", " ").splitlines():
            if words := split(line.strip().removeprefix("$ ")):
                yield words

    @property
    def anchors(self) -> set[str]:
        """Of its headings, as GitHub makes them."""
        headings = re.findall(r"^#{1,6} (.+)$", FENCED.sub("", self.text), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    @property
    def links(self) -> list[str]:
        """To other files and headings of the repository."""
        targets = re.findall(r"\]\(([^)\s]+)\)", self.text)
        return [target for target in targets if not re.match(r"[a-z]+:", target)]


DOCUMENTS = [
    Document(path.relative_to(REPOSITORY))
    for path in (
        *sorted(REPOSITORY.glob("*.md")),
        *sorted(REPOSITORY.glob("docs/*.md")),
        REPOSITORY / "benchmarks/RESULTS.md",
    )
]
