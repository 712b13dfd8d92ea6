"""Jacobian lens (Gurnee et al. 2026, Transformer Circuits): the mean Jacobian of the stream behind the last block by that at a depth.

    J = mean over texts and source tokens t of  sum over target tokens t' >= t of  d h_final[t'] / d h[t]

A first-order answer to "what would this stream become", averaged over contexts. Published files number a matrix by the block whose output
it reads: matrix L reads `layers.L.output`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import whole_number
from steer.errors import ContrastError, DamagedFileError, NonFiniteError
from steer.files import atomic_write
from steer.lens.fitting import fitted_depths
from steer.lens.lens import LENSES, Lens, check_model_of, torch_bytes
from steer.lens.readout import Readout
from steer.model.capture import evaluating
from steer.model.site import Site
from steer.model.tokens import Row, check_rows
from steer.reading import damage_of, damaged
from steer.tensor_files import read_torch, tensor_format

SKIPPED = 16  # first tokens of a text, on which much attention rests; the published lenses leave out as many
ENDINGS = (".pt", ".pth")


@LENSES.register("jacobian")
class JacobianLens(Lens):
    """Jacobian lens: the mean Jacobian of the last block's output, fitted by backward passes; published `.pt` files.

    Example:
        >>> lens = steer.JacobianLens.fit(model, harmless[:2], sites=["layers.26.output"], skip=2)
        >>> lens.token_vector(tokenizer.encode(" he")[0], "layers.26.output").shape  # [width]
    """

    parts = ("matrix",)

    def matrix(self, depth: int) -> Tensor | None:
        return self.tensors.get(f"{depth}.matrix")

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        rows: Sequence[Row],
        *,
        sites: Sequence[str | Site] = ("layers.*.output",),
        skip: int = SKIPPED,
        rows_of_matrix: int = 8,
        progress: bool = True,
    ) -> JacobianLens:
        """Fits a lens on running text; nothing of the model changes.

        One backward pass gives some rows of the matrices of all sites, so that a text costs width / `rows_of_matrix` backward passes over
        as many copies of it.

        Args:
            model: a causal language model, raw or wrapped.
            rows: texts of more than `skip` + 1 tokens.
            skip: first tokens that are left out, as sources and as targets; the last one, which predicts nothing, is too.
            rows_of_matrix: rows that one backward pass gives.

        Raises:
            ContrastError: no texts, or one that is too short. NonFiniteError: the gradients. ConfigError, SiteError, AnatomyError.
        """
        check_rows(rows, "the texts of a lens")
        whole_number(skip, "the number of first tokens that are left out")
        whole_number(rows_of_matrix, "the number of rows of a backward pass", least=1)
        if not rows or min(len(row.ids) for row in rows) < skip + 2:
            raise _too_short(rows, skip)
        readout = Readout.of(model)
        depths = fitted_depths(readout, sites)
        width = readout.width
        sums = {depth: torch.zeros(width, width, dtype=torch.float64) for depth in depths}
        for row in tqdm(rows, desc="fitting the lens", disable=not progress, leave=False):
            for depth, matrix in _jacobians(readout, row, depths, skip, min(rows_of_matrix, width)).items():
                sums[depth] += matrix
        tensors = {f"{depth}.matrix": total / len(rows) for depth, total in sums.items()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise _not_finite()
        return cls(readout, tensors, settings={"texts": len(rows), "skip": skip})

    # ---- published files

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.suffix in ENDINGS and path.is_file() and tensor_format(path) == "torch"

    @classmethod
    def published(cls, names: Sequence[str]) -> list[str]:
        found = [name for name in names if Path(name).suffix in ENDINGS]
        return found if len(found) == 1 else []  # of several, the one that is meant has to be named

    @classmethod
    def read(cls, path: Path, readout: Readout) -> Self:
        """Reads a file of {J: {block: matrix}, d_model, n_prompts}. Raises DamagedFileError, WrongModelError, WidthError."""
        content = read_torch(path)
        if not isinstance(content, dict) or not isinstance(content.get("J"), dict) or not content["J"]:
            raise _no_matrices(path, content)
        check_model_of(readout, {"width": content.get("d_model")}, path)
        with damage_of(path, "a matrix for each of some blocks, by number"):
            known = {int(layer) for layer in content["J"]}
            if any(layer < 0 or layer >= readout.n_layers for layer in known):
                raise ValueError(f"blocks {min(known)} to {max(known)} for a model of {readout.n_layers}")
            target = (content.get("metadata") or {}).get("target_layer")
            if target is not None and int(target) != readout.n_layers - 1:
                raise ValueError(f"Jacobians of the output of block {target}, which is not the last")
            tensors = {f"{int(layer) + 1}.matrix": matrix for layer, matrix in content["J"].items()}
            return cls(readout, tensors, settings={"texts": int(content.get("n_prompts", 0))})

    def export(self, path: str | Path) -> Path:
        """Writes a `.pt` file of the published form, in half precision as these are; what reads `embed` has no place in it."""
        matrices = {depth - 1: self.tensors[f"{depth}.matrix"].half().cpu() for depth in self.depths if f"{depth}.matrix" in self.tensors}
        matrices.pop(-1, None)
        content: dict[str, Any] = {
            "J": matrices,
            "n_prompts": int(self.settings.get("texts", 0)),
            "source_layers": sorted(matrices),
            "d_model": self.readout.width,
        }
        return atomic_write(path, torch_bytes(content))


def _jacobians(readout: Readout, row: Row, depths: list[int], skip: int, copies: int) -> dict[int, Tensor]:
    """[width, width] fp64 by depth, for one text. Row i holds the gradients of dimension i behind the last block."""
    used = slice(skip, len(row.ids) - 1)
    matrices = {depth: torch.zeros(readout.width, readout.width, dtype=torch.float64) for depth in depths}
    with evaluating(readout.anatomy.model), torch.enable_grad():
        streams = readout.differentiable([row] * copies, [*depths, readout.n_layers])
        final = streams[readout.n_layers]  # [copies, tokens, width]
        sources = [streams[depth] for depth in depths]
        for start in range(0, readout.width, copies):
            wanted = torch.arange(start, min(start + copies, readout.width))
            cotangent = torch.zeros_like(final)
            for copy, dimension in enumerate(wanted.tolist()):
                cotangent[copy, used, dimension] = 1
            last = start + copies >= readout.width
            gradients = torch.autograd.grad(final, sources, cotangent, retain_graph=not last)
            for depth, gradient in zip(depths, gradients, strict=True):
                matrices[depth][wanted] = gradient[: len(wanted), used].double().mean(1).cpu()
    return matrices


# ---- errors


def _too_short(rows: Sequence[Row], skip: int) -> ContrastError:
    return ContrastError(
        "texts are too short for a Jacobian lens",
        expected=f"at least one text, and in each {skip + 2} tokens, of which the first {skip} and the last are left out",
        found=f"{len(rows)} texts, the shortest of {min((len(row.ids) for row in rows), default=0)} tokens",
        remedy="give longer texts, or a smaller skip=",
    )


def _not_finite() -> NonFiniteError:
    return NonFiniteError(
        "the Jacobian of this model is not finite",
        expected="finite gradients of the last block's output",
        found="NaN or infinity",
        remedy="run the model in float32 or bfloat16, or leave out texts that overflow",
    )


def _no_matrices(path: Path, content: Any) -> DamagedFileError:
    found = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
    return damaged(path, "a Jacobian lens: {J: {block: matrix}, d_model, n_prompts}", found or "nothing")
