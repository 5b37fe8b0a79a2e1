"""How a section of the configuration declares a setting: default, meaning, unit and bounds, in one place."""

from collections.abc import Iterator
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A section of the configuration: frozen, without other keys than its own, infinities and empty texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_not_empty(cls, value: Any, info: ValidationInfo) -> Any:
        """An empty text is a variable of a shell that is not set."""
        if isinstance(value, str) and not value.strip():
            none = ", or give null for none" if cls.model_fields[info.field_name or ""].default is None else ""
            raise ValueError(f"expected a value, got an empty text; leave the setting out{none}")
        return value

    def misfits(self) -> Iterator[str]:
        """What of its values does not fit together, a line each."""
        return iter(())

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if lines := list(self.misfits()):
            raise ValueError("\n".join(lines))
        return self


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
