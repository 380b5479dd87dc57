"""How the weights of a checkpoint are quantised: the key quantization_config of config.json."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mpt_eqx.config.validation import BOOLEAN, check, choice, shown
from mpt_eqx.errors import ConfigError

KEY = "quantization_config"
METHOD = "mpt_eqx"
SCHEMES = ("int8", "int4")


class Quantization(NamedTuple):
    """Which weights of a model are quantised, and how.

    Attributes:
        scheme: "int8" or "int4".
        embeddings: whether the embedding is quantised, too.
    """

    scheme: str
    embeddings: bool

    def to_dict(self) -> dict[str, Any]:
        """Returns the value of quantization_config.

        It has no quant_method: of one that it does not know transformers skips the quantisation and draws the weights
        at random, but without one it refuses the checkpoint.
        """
        return {"method": METHOD, **self._asdict()}


def check_quantization(quantization: Quantization) -> None:
    """Raises a ConfigError unless there is such a quantisation."""
    check("scheme", quantization.scheme, choice(*SCHEMES))
    check("embeddings", quantization.embeddings, BOOLEAN)


def read_quantization(d: Mapping[str, Any]) -> Quantization | None:
    """Returns what the content of a config.json says about quantised weights, None if nothing.

    Raises:
        ConfigError: the weights are quantised by another method, or the key is not as `to_dict` writes it.
    """
    if (content := d.get(KEY)) is None:
        return None
    if isinstance(content, Mapping):
        method = content.get("quant_method", content.get("method"))
        if method != METHOD or "quant_method" in content:
            raise ConfigError(
                f"{KEY}: expected weights that are not quantised, or method '{METHOD}', found {shown(method)}; "
                f"take the checkpoint that this one was made from, and mpt_eqx.quantize if it is to be smaller"
            )
        keys = set(Quantization._fields)
        if set(content) == {"method", *keys}:
            found = Quantization(**{key: content[key] for key in keys})
            try:
                check_quantization(found)
            except ConfigError as error:
                raise ConfigError(f"{KEY}.{error}") from None
            return found
    raise ConfigError(f"{KEY}: expected null or an object of method, scheme and embeddings, found {shown(content)}")
