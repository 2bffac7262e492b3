"""How a wrong setting is reported: the ground under every config."""


class ConfigError(ValueError):
    """The command, the config or the data it names is wrong: one clear line, exit code 2."""


def require(condition: object, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
