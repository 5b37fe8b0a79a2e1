"""How a section of the configuration declares a setting: default, meaning, unit and bounds, in one place."""

from typing import Any

from pydantic import Field
from pydantic.fields import FieldInfo


def setting(default: Any, meaning: str, *, unit: str | None = None, **bounds: Any) -> Any:
    """A field of a pydantic model.

    meaning: in the field's own words, lower case, without a full stop. unit: of a number, what it counts or measures;
    of a ratio, what it is a ratio of. bounds: gt, ge, lt, le, as pydantic takes them.
    """
    return Field(default=default, description=meaning, json_schema_extra={"unit": unit} if unit else None, **bounds)


def unit(field: FieldInfo) -> str | None:
    """Of a field that `setting` has declared."""
    extra = field.json_schema_extra
    return str(extra["unit"]) if isinstance(extra, dict) else None
