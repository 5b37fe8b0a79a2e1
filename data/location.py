"""A path or an address: one type from where it is typed to where it is read."""

import re
import shlex
from pathlib import Path
from typing import Any

from pydantic_core import core_schema

from .addresses import shown

SCHEMES = ("http://", "https://", "s3://", "pipe:")

_PLACED = re.compile(r"pipe:\[ -d (.+?) \] && cd \1; ")


class Location(str):
    """Text as it was typed: a path, http(s)://host/folder, s3://bucket/prefix or pipe:COMMAND. Dumped as that text."""

    __slots__ = ()

    @property
    def is_remote(self) -> bool:
        return self.startswith(SCHEMES)

    @property
    def shown(self) -> str:
        """The location as a message may show it: on one line, without logins and queries."""
        return shown(self)

    def from_anywhere(self, here: Path) -> "Location":
        """The same place for a process on any node, in any folder. here: the folder in which it was typed.

        A path is made absolute, a pipe's command made to run in `here`; other addresses are the same everywhere. On
        nodes without that folder a command runs where it is: it need not read anything there.
        """
        if _PLACED.match(self):  # of a run that goes on
            return self
        if self.startswith("pipe:"):
            folder = shlex.quote(str(here)).replace("{}", "{''}")  # {} would be a file's name
            return Location(f"pipe:[ -d {folder} ] && cd {folder}; {self.removeprefix('pipe:')}")
        if self.is_remote or self.startswith("~"):  # ~ is of each node's own user
            return self
        return Location((here / self).resolve())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        dumped = core_schema.plain_serializer_function_ser_schema(str, when_used="json")
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema(), serialization=dumped)
