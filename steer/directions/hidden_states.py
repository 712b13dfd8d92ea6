"""`hidden_states` of transformers: entry L is what goes into block L, and the last one comes after the final norm."""

from __future__ import annotations

from steer.directions.importer import Source
from steer.errors import ConfigError
from steer.model.site import Site


def after_block(source: Source, layer: int) -> Site:
    """The site of `hidden_states[layer + 1]`: the output of that block, or the final norm after the last.

    Raises:
        ConfigError: the caller gave neither the number of blocks nor a site.
        DamagedFileError: a layer beyond the last.
    """
    if source.site is not None:
        return source.place(layer, source.site)
    if source.n_layers is None:
        raise _n_layers_error(source)
    source.check_layer(layer)
    return Site("final_norm") if layer == source.n_layers - 1 else Site("output", layer)


def _n_layers_error(source: Source) -> ConfigError:
    return ConfigError(
        f"'{source.path.name}' does not say which layer is the last",
        expected="n_layers=, the number of blocks: vectors of the last one were read after the final norm",
        found="neither n_layers nor site",
        remedy="pass n_layers=model.config.num_hidden_layers",
    )
