"""The small helper of config files."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from research.errors import UserError, nearest


def choose(
    name: str | None, variants: Mapping[str, Callable[[ConfigDict], ConfigDict]], config: ConfigDict
) -> ConfigDict:
    """Applies the variant that stands after the colon of --config=configs/NAME.py:VARIANT."""
    if (name or "") not in variants:
        raise UserError(f"--config: there is no variant '{name}'{nearest(str(name), [v for v in variants if v])}")
    return variants[name or ""](config)
