"""`data inspect` shows what training sees of conversations; `data validate` names every bad row."""

import importlib

from mixtral_jax.config import ConfigError

_USAGE = """usage: mixtral-jax data inspect CHATS ...  the tokens of each row, and which are learned
       mixtral-jax data validate CHATS ... every bad row by line and reason; 1 if any is bad

(mixtral-jax data inspect --help lists the flags; CHATS is anything that data.path takes)"""


def main(arguments: list[str]) -> int:
    """Runs one of the two for the flags behind its name.

    Raises:
        ConfigError: there is no such verb.
    """
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help"):
        print(_USAGE)
        return 0
    if verb not in ("inspect", "validate"):
        raise ConfigError(
            f"unknown verb {f'data {verb}'!r}; there are: data inspect, data validate"
        )
    try:
        return importlib.import_module(f"mixtral_jax.cli.data_{verb}").main(rest)
    except ConfigError as error:
        from mixtral_jax.cli.data_rows import in_flags  # Slow to import, and not for help.

        raise ConfigError(in_flags(str(error))) from error
