"""Benchmarks of lm-evaluation-harness, item by item: what an edit does to MMLU, GSM8K, or a task of one's own."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from steer.checks import errors_of, of_type, whole_number
from steer.errors import ConfigError, did_you_mean
from steer.experiment.metric import HIGHER, LOWER, METRICS, Item, Metric
from steer.model.capture import evaluating


@METRICS.register("lm_eval")
class LmEval(Metric):
    """Score of an lm-evaluation-harness task on each of its documents, through the model with its plan attached.

    The task brings the items, `<task>/<number of the document>`. Prompts, answers, few-shot examples and scores are those of lm-eval, whose
    forward passes do not say which tokens are a response: a plan with `scope=response` is refused there, `all` or `last` are not. Needs
    `pip install 'torchsteer[eval]'`, and the data set of the task, which lm-eval loads.

    Args:
        task: a task, group or tag of lm-eval, or of `include_path`.
        score: which of the task's scores, e.g. `acc_norm`; needed where there are several.
        filter: which of the ways in which the task reads an answer, e.g. `strict-match`; needed where there are several.
        limit: the first documents of each task only.
        include_path: folder with YAML files of tasks of one's own, in which `task` is looked for first.
        num_fewshot: examples in the prompt; what the task says by default.
        chat: put prompts through the chat template.
        batch_size: rows in a pass.

    Raises:
        ConfigError: lm-eval is not installed, no such folder, task, score or way to read, or items of another task.
    """

    def __init__(
        self,
        task: str,
        score: str | None = None,
        filter: str | None = None,
        limit: int | None = None,
        include_path: str | os.PathLike[str] | None = None,
        num_fewshot: int | None = None,
        chat: bool = False,
        batch_size: int = 8,
    ) -> None:
        of_type(task, str, "task of 'lm_eval'", "name one task or group")
        of_type(score, (str, type(None)), "score of 'lm_eval'", "name one score, e.g. acc")
        of_type(filter, (str, type(None)), "filter of 'lm_eval'", "name one filter, e.g. strict-match")
        of_type(include_path, (str, os.PathLike, type(None)), "include_path of 'lm_eval'", "pass a folder with YAML files")
        of_type(chat, bool, "chat of 'lm_eval'", "pass true or false")
        for name, value in {"limit": limit, "num_fewshot": num_fewshot}.items():
            if value is not None:
                whole_number(value, f"{name} of 'lm_eval'", least=1 if name == "limit" else 0)
        whole_number(batch_size, "batch_size of 'lm_eval'", least=1)
        self.task, self.filter, self.limit, self.num_fewshot = task, filter, limit, num_fewshot
        self.chat, self.batch_size = chat, batch_size
        self._manager, self._tasks = _load(task, include_path)
        self.score = self._chosen_score(score)
        ways = {bool(one.higher_is_better().get(self.score, True)) for one in self._tasks.values()}
        self.better = None if len(ways) > 1 else HIGHER if ways == {True} else LOWER

    def _chosen_score(self, score: str | None) -> str:
        known = sorted(set.intersection(*(set(task.higher_is_better()) for task in self._tasks.values())))
        if score is None and len(known) == 1:
            return known[0]
        if score is None or score not in known:
            raise _which("score", self.task, score, known)
        return score

    def own_items(self) -> list[dict[str, Any]]:
        return [{"id": f"{name}/{number}"} for name, task in self._tasks.items() for number, _ in task.doc_iterator(limit=self.limit)]

    def check_item(self, item: Item) -> None:
        task, _, number = item["id"].rpartition("/")
        if task not in self._tasks or not number.isdigit() or int(number) >= len(self._tasks[task].eval_docs):
            raise _foreign_item(self.task, item)

    def items(self, model: nn.Module, tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        wanted: dict[str, list[int]] = {}
        for item in items:
            task, _, number = item["id"].rpartition("/")
            wanted.setdefault(task, []).append(int(number))
        with evaluating(model), _random_states_kept(), errors_of(f"lm-eval task '{self.task}'", "see lm-eval's documentation of the task"):
            # a copy of the tokenizer, whose padding it changes
            results = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=self.batch_size),
                tasks=list(wanted),
                task_manager=self._manager,
                samples={task: sorted(numbers) for task, numbers in wanted.items()},
                num_fewshot=self.num_fewshot,
                apply_chat_template=self.chat,
                system_instruction=_system(items),
                bootstrap_iters=0,  # of standard errors over documents, which nothing reads here
            )
        return self._scores(results["samples"])

    def _scores(self, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
        filters = sorted({sample["filter"] for of_task in samples.values() for sample in of_task})
        chosen = filters[0] if self.filter is None and len(filters) == 1 else self.filter
        if chosen not in filters:
            raise _which("filter", self.task, self.filter, filters)
        return {
            f"{task}/{sample['doc_id']}": sample[self.score]
            for task, of_task in samples.items()
            for sample in of_task
            if sample["filter"] == chosen
        }


def _load(task: str, include_path: str | os.PathLike[str] | None) -> tuple[Any, dict[str, Any]]:
    """lm-eval's manager, and the tasks that a name stands for."""
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    if include_path is not None and not os.path.isdir(include_path):
        raise _no_folder(include_path)
    with errors_of(f"lm-eval task '{task}'", "check the YAML file of the task, and that its data set can be loaded"):
        manager = None
        if include_path is not None:
            manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if manager is None or task not in manager.all_tasks:  # to list the tasks of lm-eval takes seconds
            manager = TaskManager(include_path=None if include_path is None else str(include_path))
        if task not in manager.all_tasks:
            raise _no_task(task, manager.all_tasks)
        return manager, dict(manager.load([task])["tasks"])


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """lm-eval seeds the whole process."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _system(items: Sequence[Item]) -> str | None:
    """The system message of an arm, which lm-eval takes for all documents."""
    messages = {item.get("system") for item in items}
    if len(messages) > 1:
        raise _other_systems(len(messages))
    return messages.pop() if messages else None


# ---- errors


def _not_installed(error: ModuleNotFoundError) -> ConfigError:
    remedy = "pip install 'torchsteer[eval]'"
    return ConfigError("metric 'lm_eval' needs lm-evaluation-harness", expected="lm-eval", found=str(error), remedy=remedy)


def _no_folder(path: Any) -> ConfigError:
    remedy = "pass a folder with YAML files of tasks"
    return ConfigError(f"include_path '{path}' of 'lm_eval' is no folder", expected="a folder", found="none there", remedy=remedy)


def _no_task(task: str, known: Sequence[str]) -> ConfigError:
    remedy = did_you_mean(task, known) or "`lm-eval ls tasks` lists them; pass include_path for one of your own"
    return ConfigError(f"lm-eval has no task '{task}'", expected=f"one of {len(known)} tasks, groups and tags", found=task, remedy=remedy)


def _which(option: str, task: str, found: str | None, known: Sequence[str]) -> ConfigError:
    remedy = did_you_mean(found or "", known) or f"pass {option}={known[0] if known else '...'}"
    what = f"lm-eval task '{task}' has no {option} '{found}'" if found else f"lm-eval task '{task}' has more than one {option}"
    return ConfigError(
        what, expected=f"one of {', '.join(known) or 'none that all its tasks have'}", found=found or "none chosen", remedy=remedy
    )


def _foreign_item(task: str, item: Item) -> ConfigError:
    remedy = "leave the items out: the task brings them"
    return ConfigError(f"item '{item['id']}' is none of lm-eval task '{task}'", expected="<task>/<number>", found=item["id"], remedy=remedy)


def _other_systems(count: int) -> ConfigError:
    remedy = "give all items the same one, or none"
    return ConfigError("lm-eval takes one system message for all items", expected="one", found=f"{count}", remedy=remedy)
