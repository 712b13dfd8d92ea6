"""One arm of `benchmarks/steering.py` or `agreement.py`: does a column's work on request and measures itself.

    python -P worker.py ADAPTER.py JOB.json

Runs in the environment of the library that it measures, hence imports only what all of those have. `-P` keeps this folder off the path,
where `repeng.py` is the adapter and not the library. Requests and answers are JSON, a line each, over stdin and stdout; what a library
prints goes to stderr.

An adapter holds a class `Arm` with

    __init__(model, tokenizer)          wraps the model, which is in evaluation mode, with gradients off
    extract(pairs, layers, batch)       {layer: [width]} difference of the means of the last token over [(positive, negative)] texts, at the
                                        outputs of decoder layers, `batch` texts a forward pass
    steered(vectors)                    context in which {layer: [width]} is added to the outputs of these layers, at every token
    forward(ids)                        logits of [batch, tokens], in that context
    generate(ids, new)                  [batch, tokens + new] greedily, in that context

and for `benchmarks/agreement.py`, where the library has it,

    applied(setting)                    context like `steered`, in which what the column's setting says acts, such as a file
    loglikelihoods(texts)               log-probability of each continuation after its context, in that context

and `DISTRIBUTIONS`, the packages whose versions are recorded.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import resource
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path


def measure(arm, column, job, vectors, keep):
    """CPU and wall seconds of one run of a column. keep: file for the result, None to forget it."""
    import torch
    from safetensors.torch import save_file

    if column["work"] == "extract":
        context, work = nullcontext(), lambda: arm.extract(job["pairs"], column["layers"], job["batch"])
    else:
        if "setting" in column:
            context = arm.applied(column["setting"])
        else:
            context = arm.steered({layer: column["share"] * vectors[layer] for layer in column["layers"]})
        if column["work"] == "loglikelihoods":
            work = lambda: arm.loglikelihoods(column["texts"])  # noqa: E731
        else:
            ids = torch.tensor(column["ids"])
            work = (lambda: arm.forward(ids)) if column["work"] == "forward" else (lambda: arm.generate(ids, column["new"]))
    gc.collect()
    with context:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    if keep:
        if column["work"] == "extract":
            tensors = {f"layer.{layer}": torch.as_tensor(vector).float().contiguous() for layer, vector in result.items()}
        else:
            tensors = {column["work"]: torch.as_tensor(result[:, -1] if column["work"] == "forward" else result).clone().contiguous()}
        save_file(tensors, keep)
    return {"cpu": cpu, "wall": wall, "peak_mb": peak_mb()}


def peak_mb():
    """Most memory that the process ever had, in MiB; ru_maxrss is in bytes on macOS, in KiB elsewhere."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def load_adapter(path):
    spec = importlib.util.spec_from_file_location(f"adapter_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def first_line(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields):
        print(json.dumps(fields), file=answers, flush=True)

    job = json.loads(Path(sys.argv[2]).read_text())
    try:
        import torch
        import transformers

        torch.set_num_threads(job["threads"])
        torch.set_grad_enabled(False)
        adapter = load_adapter(sys.argv[1])
        # transformers 4 does not know the class that transformers 5 names in a saved tokenizer
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(job["model"])
        config = transformers.AutoConfig.from_pretrained(job["model"])
        in_float32 = {"dtype": torch.float32}
        if version("transformers") < "5":  # nor the name under which it saves the base of the rotary embedding
            in_float32 = {"torch_dtype": torch.float32}
            config.rope_theta = config.rope_parameters["rope_theta"]
        model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], config=config, **in_float32).eval()
        model.generation_config.eos_token_id = None  # every arm decodes as many tokens
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model(torch.tensor([[0]]))  # so that all weights are in memory
        idle = peak_mb()
        arm = adapter.Arm(model, tokenizer)
        names = ("torch", "transformers", "numpy", *adapter.DISTRIBUTIONS)
        answer(versions={name: version(name) for name in names}, idle_mb=idle)
    except Exception as error:
        answer(error=first_line(error))
        raise
    vectors = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            column = job["columns"][request["column"]]
            if not vectors and column["work"] != "extract":
                from safetensors.torch import load_file

                vectors = {int(name.split(".")[1]): vector for name, vector in load_file(job["vectors"]).items()}
            answer(**measure(arm, column, job, vectors, request.get("keep")))
        except Exception as error:  # the table shows it, and the other columns go on
            import traceback

            traceback.print_exc()
            answer(error=first_line(error))


if __name__ == "__main__":
    main()
