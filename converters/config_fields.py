"""Fields of config.json by type: what is missing, of another type or out of range is refused by name."""

import sys
from collections.abc import Mapping
from typing import Any

from converters.errors import ConfigError

_LIMITS = {"num_hidden_layers": 1024, "n_routed_experts": 4096, "vocab_size": 1 << 24}
_MAX_SIZE = 1 << 20


class Fields:
    """Typed access to a mapping; every miss names the field."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def value(self, name: str, expected: str) -> Any:
        """Return a field that must be there; nothing is guessed."""
        if self.raw.get(name) is None:
            raise ConfigError(
                f"config.json: {name}",
                expected=expected,
                found="nothing",
                next_step="It is never guessed; add it as the original model has it.",
            )
        return self.raw[name]

    def size(self, name: str, low: int = 1, high: int = _MAX_SIZE) -> int:
        """Return an integer from low to high; some fields have a limit of their own."""
        high = _LIMITS.get(name, high)
        expected = f"an integer from {low} to {high}"
        value = self.value(name, expected)
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"config.json: {name}", expected=expected, found=repr(value))
        return value

    def flag(self, name: str) -> bool:
        """Return true or false."""
        value = self.value(name, "true or false")
        if type(value) is not bool:
            raise ConfigError(f"config.json: {name}", expected="true or false", found=repr(value))
        return value

    def positive(self, name: str) -> float:
        """Return a positive, finite number."""
        value = self.value(name, "a positive number")
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise ConfigError(f"config.json: {name}", expected="a positive number", found=repr(value))
        return float(value)
