"""The error for wrong settings, and the check that raises it. Every config uses them."""


class ConfigError(ValueError):
    """The command, the config or the data that it names is wrong: one clear line, exit code 2."""


def require(condition: object, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
