"""Kernels, each with its PyTorch reference and its Triton form: steering, edits, drift statistics, sparse features, edge scores.

Call the functions: they choose the form that runs (see `steer.kernels.dispatch`), and `force` overrules the choice. There is one file for
each kernel: mathematics, constants, forward kernel, backward kernel, launchers, autograd function, public function. `edit` has its parts in
files of their own, `edit_*.py`.
"""

if __name__ == "kernels":
    # The root of a checkout is on sys.path (python -c, python -m pytest, a notebook), and somebody, most likely transformers, wants the
    # distribution called `kernels`. Step aside for it where it is installed. Where it is not, be a module without a version: transformers
    # takes that for "not installed", while an ImportError would escape from its check and break every model load.
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec("kernels", [folder for folder in sys.path if Path(folder or ".").resolve() != _root])
    if _spec is not None and _spec.origin is not None and _spec.loader is not None:
        _real = module_from_spec(_spec)
        sys.modules["kernels"] = _real
        _spec.loader.exec_module(_real)

    def __getattr__(name: str) -> object:
        raise AttributeError(f"no '{name}': this folder is steer.kernels, and the distribution 'kernels' is not installed")
else:
    from steer.kernels.available import KERNELS, status
    from steer.kernels.dispatch import force
    from steer.kernels.drift_stats import DriftStats, drift_stats
    from steer.kernels.edge_scores import edge_scores, writer_outputs
    from steer.kernels.edit import edit
    from steer.kernels.sparse_decode import sparse_decode
    from steer.kernels.steer_add import steer_add
    from steer.kernels.topk_encode import TopFeatures, topk_encode

    __all__ = [
        "KERNELS",
        "DriftStats",
        "TopFeatures",
        "drift_stats",
        "edge_scores",
        "edit",
        "force",
        "sparse_decode",
        "status",
        "steer_add",
        "topk_encode",
        "writer_outputs",
    ]
