"""Loading a dictionary from a file, a folder or a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from steer.checks import errors_of, finite_number, integer, of_type, tensor_of, whole_number
from steer.features.dictionary import Dictionary
from steer.features.format import Wanted, choose, damage_in
from steer.features.provenance import Untrained
from steer.features.shipped import SHIPPED, shipped_folder
from steer.place import Place

_CORRECT = "correct its `read`; of a damaged file it raises `incomplete`"  # the remedy for a format of somebody's own


def load_dictionary(
    where: str | Path,
    folder: str | None = None,
    *,
    format: str | None = None,
    revision: str | None = None,
    layer: int | None = None,
    reads: str | list[str] | None = None,
    writes: str | list[str] | None = None,
    norm_factor: float | None = None,
    gain: Tensor | None = None,
    k: int | None = None,
    untrained: Untrained | None = None,
    models: list[str] | tuple[str, ...] = (),
) -> Dictionary:
    """Reads a dictionary as the library that trained it would use it, with its normalisation folded in.

    Nothing is unpickled, and of a repository only the files that are needed are downloaded. Matrices in safetensors stay in the file: a few
    features are read by their rows alone.

    Args:
        where: a file or folder; a repository of the Hugging Face hub, `owner/name`; or a dictionary that comes with the library,
            `smollm2-135m-sae-12` or `smollm2-135m-transcoder-12`.
        folder: of the dictionary, within a repository or a folder that has many.
        format: a name of `FORMATS`; by the files when None.
        revision: of a repository.
        layer: which one, where one folder holds a file for each layer.
        reads, writes: sites, where the file does not say which tensor of a plain model is meant, or is to be overruled; one for each
            layer of a crosscoder. `{layer}` stands for `layer`.
        norm_factor: what activations were multiplied with in training, where the file says that they were and not by how much.
        gain: [width] gain of the norm in front of the MLP, for transcoders that were trained on its input without the gain.
        k: features per token of a top-k dictionary, where only the name of its repository says so.
        untrained: tokens that its training left out, where that is known better than by the file.
        models: name of the model at each site that is read, for crosscoders between models.

    Raises:
        FileError: nothing there, or a hub that cannot be reached. WrongKindError: of no known format, or of an architecture that none here
            is equal to. ConfigError: the file does not say something that the caller has to say, or an argument changes nothing of it.
        UnsafeFileError: a pickle of more than tensors. DamagedFileError, NonFiniteError: a broken file, with the tensor and its shape.

    Example:
        >>> sae = steer.load_dictionary("smollm2-135m-sae-12")
        >>> sae.reads, sae.width
        ((Site('layers.12.output'),), 4096)
    """
    of_type(where, (str, Path), "the place of a dictionary", "pass a path, or a repository such as 'google/gemma-scope-2b-pt-res'")
    of_type(folder, (str, type(None)), "`folder`", "pass its path within the repository")
    if (layer := integer(layer)) is not None:
        whole_number(layer, "`layer`")
    if (k := integer(k)) is not None:
        whole_number(k, "`k`", least=1)
    if norm_factor is not None:
        finite_number(norm_factor, "`norm_factor`", above=0)
    of_type(untrained, (Untrained, type(None)), "`untrained`", "e.g. steer.features.Untrained(first=1)")
    gain = None if gain is None else tensor_of(gain, "`gain`", "pass the gain of the norm, [width]").detach().float()
    place = Place.find(shipped_folder(where) or where, folder, revision, what="dictionary", shipped=SHIPPED)
    chosen = choose(place, format)
    wanted = Wanted(layer, reads, writes, norm_factor, gain, untrained, tuple(models), k)
    is_ours = chosen.__module__.startswith("steer.")
    with damage_in(place, chosen) if is_ours else errors_of(f"the dictionary format '{chosen.name}'", _CORRECT):
        dictionary = chosen.read(place, wanted)
    wanted.check_used(place, dictionary)
    return dictionary
