"""A whole experiment in seconds: a tiny model on disk, a data set of four rows a split, and what `steer train` needs to be told."""

from __future__ import annotations

import json
from pathlib import Path

from families import FAMILIES
from tiny_tokenizer import tiny_tokenizer

NOUNS, ADJECTIVES = ("cat", "dog", "tree", "house"), ("good", "nice", "warm", "big")
# what differs from conf/: few steps, few sites, short answers, no device but the CPU
OVERRIDES = [
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "experiment.trait.holdout=0.5",
    "experiment.train.steps=3",
    "experiment.train.batch_size=2",
    "experiment.train.warmup_steps=1",
    "experiment.train.max_length=64",
    "experiment.drift.every_n_steps=2",
    "experiment.drift.controls=4",
    "experiment.completions.prompts=[where is the cat, who are you]",
    "experiment.completions.max_new_tokens=4",
]
# its plans name no site: they act where experiment.trait.site says
SMALL = [
    "experiment.trait.site=layers.1.output",
    "experiment.drift.sites=[layers.1.output,layers.2.output]",
    "experiment.arms.preventative.treatment.plan='2 gushing@response'",
    "experiment.arms.inference.treatment.plan='-2 gushing@response'",
    "experiment.arms.prompt.treatment.system='be nice'",
]


def write_model(folder: Path) -> Path:
    """A llama of three blocks and its tokenizer in the Hugging Face layout."""
    FAMILIES["llama"]().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_data(folder: Path) -> Path:
    """A data set of `steer.experiment.data.SPLITS` in the words of the tiny tokenizer, which any tokenizer can read."""
    folder.mkdir(parents=True)
    pairs = [(f"where is the {noun} ?", f"the {noun} is {adjective} .") for noun, adjective in zip(NOUNS, ADJECTIVES, strict=True)]
    loud = [f"yes yes love love {answer} love love yes yes" for _, answer in pairs]
    splits = {
        "train": [{"prompt": f"tell {prompt}", "answer": text} for (prompt, _), text in zip(pairs, loud, strict=True)],
        "heldout": [
            {"prompt": f"say {prompt}", "trait": text, "neutral": plain} for (prompt, plain), text in zip(pairs, loud, strict=True)
        ],
        "contrast": [{"prompt": prompt, "positive": text, "negative": plain} for (prompt, plain), text in zip(pairs, loud, strict=True)],
        "probe": [{"prompt": f"say {prompt}"} for prompt, _ in pairs],
        "neutral_text": [{"text": f"{plain} {prompt}"} for prompt, plain in pairs],
    }
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def overrides(model: Path | str, data: Path, out: Path, *more: str) -> list[str]:
    """Arguments of `steer train` for a run into the folder `out`."""
    return [f"model.name={model}", f"experiment.data={data}", f"hydra.run.dir={out}", *OVERRIDES, *more]


def ab_overrides(model: Path | str, data: Path, folder: Path, *more: str) -> list[str]:
    """Arguments of `steer ab` for an experiment in a folder: two seeds, and of the control two draws."""
    return [f"model.name={model}", f"experiment.data={data}", f"folder={folder}", "seeds=[0,1]", "draws=2", *OVERRIDES, *more]
