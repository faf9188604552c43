"""Settings that a person writes: what every model of them has. No torch here: `--help` reads this."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from veneer.errors import ConfigError
from veneer.files.strict_json import field_faults, illegible


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """These settings; ConfigError with a line for each that is wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as fault:
            raise ConfigError("these settings are not right", field_faults(fault)) from fault

    @field_validator("*")
    @classmethod
    def _legible(cls, value: Any, info: ValidationInfo) -> Any:
        """What a run's files could not hold, or not give back, is refused before there is a run."""
        said = value.model_dump() if isinstance(value, BaseModel) else value
        if faults := illegible(said, info.field_name or ""):
            raise ValueError(f"{'; '.join(faults)} holds a NUL or is not UTF-8: give another name")
        return value
