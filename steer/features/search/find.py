"""find_features: the features of a dictionary that go with concepts, chosen on development text and reported on other text."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer.checks import number_within, of_type, whole_number
from steer.errors import ConfigError
from steer.features.dictionary import Dictionary
from steer.features.search.found import FoundFeature, FoundFeatures, numbers_of
from steer.features.search.method import SEARCHES, FeatureSearch, Scores, SearchTask
from steer.features.search.methods.activation import Activation
from steer.features.search.texts import MarkedTexts
from steer.lens.labelled import LabelledTexts
from steer.model.anatomy import Anatomy

Concept = Sequence[str] | LabelledTexts
MOST_COPIES = 0.05  # of the tokens of the report: with more a warning is given


def find_features(
    model: nn.Module,
    dictionary: Dictionary,
    concepts: Mapping[str, Concept],
    *,
    tokenizer: Any,
    texts: Iterable[str] | None = None,
    report_texts: Iterable[str] | None = None,
    by: str | FeatureSearch = "activation",
    top: int = 5,
    least: int = 10,
    holdout: float = 0.5,
    context: int = 128,
    max_tokens: int = 200_000,
    seed: int = 0,
    progress: str | None = None,
) -> FoundFeatures:
    """Searches a dictionary for the features of concepts.

    The best of thousands of features looks better on the text that it was chosen by than it is. So the chosen ones are scored again on
    other text, and every concept that was tried is in the result.

    Args:
        model: that the dictionary was trained on, or one made of it.
        concepts: by name, words (a list), or labelled texts.
        texts: development text in which the words are looked for.
        report_texts: other text; blocks of `texts`, in turn with the others, when None. Of labelled texts some are held out.
        by: a name of `SEARCHES`, or a search with settings of its own, e.g. `OutputScore(strength=2.0)`.
        top: features of each concept at most.
        least: tokens of each concept's words that either part has to have.
        holdout: share of `texts`, or of labelled texts, that is kept for the report.
        context: tokens of a row.
        max_tokens: of development text and of other text together.
        seed: of the split of labelled texts.
        progress: label of progress bars, None for none.

    Raises:
        ConfigError: no concepts, no texts, too few tokens of a concept, an unknown search. WidthError, SiteError: another model's.
        TokenizerError: no text, or a slow tokenizer. ContrastError: labelled texts that cannot be split.

    Example:
        >>> concepts = {"animals": ["cat", "dog"]}
        >>> found = steer.find_features(model, dictionary, concepts, tokenizer=tokenizer, texts=texts, least=1, context=16)
        >>> found.best("animals"), found.of("animals")[0].report
    """
    of_type(dictionary, Dictionary, "the dictionary", "load one with steer.load_dictionary")
    whole_number(top, "`top`, the features of each concept", least=1)
    whole_number(least, "`least`, the tokens of each concept", least=1)
    number_within(holdout, "`holdout`, the share of the texts for the report", 0.05, 0.95)
    whole_number(max_tokens, "`max_tokens`", least=1)
    search = SEARCHES.get(by)() if isinstance(by, str) else by
    of_type(search, FeatureSearch, "`by`, the search", f"pass one of {', '.join(SEARCHES)}")
    words, labelled = _read_concepts(concepts)
    parts = _parts(tokenizer, texts, report_texts, words, holdout, context, max_tokens)
    labelled_parts = [{}, {}] if not labelled else _split(labelled, holdout, seed)
    for part, what in zip(parts, ("development", "report"), strict=True):
        _check_tokens(part, words, least, what, dictionary.untrained.first, needed="texts" in search.needs)
    _warn_of_copies(*parts)
    tasks = [
        SearchTask(model, dictionary, tokenizer, words, of_part, part, maxima=dictionary.maxima, progress=progress)
        for part, of_part in zip(parts, labelled_parts, strict=True)
    ]
    scores = search.scores(tasks[0])
    chosen = {concept: _best(scores[concept], search.columns[0], top) for concept in tasks[0].concepts}
    report = _report(search, tasks[1].with_features(chosen, _maxima(dictionary, scores)))
    found = [
        FoundFeature(concept, feature, place + 1, numbers_of(_at(scores[concept], chosen[concept]), place),
                     numbers_of(report[concept], place))
        for concept in concepts for place, feature in enumerate(chosen[concept].tolist())
    ]  # fmt: skip
    facts = _facts(model, dictionary, parts, words, labelled_parts)
    return FoundFeatures(search.name, search.columns[0], tuple(concepts), tuple(found), {**facts, "top": top, "compared": dictionary.width})


def _best(scores: Scores, measure: str, top: int) -> Tensor:
    """[up to top] features with the largest values of the measure, those without a value left out."""
    values = scores[measure].nan_to_num(nan=-torch.inf)
    order = values.sort(descending=True, stable=True).indices[:top]
    return order[values[order] > -torch.inf]


def _maxima(dictionary: Dictionary, scores: Mapping[str, Scores]) -> Tensor | None:
    """[width] largest values as the dictionary records them, or else as they were on development text, 0 where nobody looked."""
    if dictionary.maxima is not None:
        return dictionary.maxima
    seen = [of_one["maximum"].nan_to_num(nan=0.0) for of_one in scores.values() if "maximum" in of_one]
    return torch.stack(seen).amax(0).float() if seen else None


def _at(scores: Scores, features: Tensor) -> Scores:
    return {name: values[features] for name, values in scores.items()}


def _report(search: FeatureSearch, task: SearchTask) -> dict[str, Scores]:
    """What the chosen features score on the other text: by the search itself where it reads text, and always by activation."""
    own: dict[str, Scores] = {concept: {} for concept in task.concepts}
    if "texts" in search.needs:
        own = search.scores(task)
    if isinstance(search, Activation) or task.texts is None and task.words:
        return own
    by_activation = Activation().scores(task)
    return {concept: {**own[concept], **by_activation[concept]} for concept in task.concepts}


def _read_concepts(concepts: Mapping[str, Concept]) -> tuple[dict[str, list[str]], dict[str, LabelledTexts]]:
    """Words and labelled texts by concept. Raises ConfigError."""
    of_type(concepts, Mapping, "the concepts", "pass {'law': ['court', 'judge']}")
    if not concepts:
        raise _no_concepts()
    words: dict[str, list[str]] = {}
    labelled: dict[str, LabelledTexts] = {}
    for name, concept in concepts.items():
        of_type(name, str, "the name of a concept", "pass {'law': ['court', 'judge']}")
        if isinstance(concept, LabelledTexts):
            labelled[name] = concept
            continue
        of_type(concept, (list, tuple), f"the concept '{name}'", "pass a list of words, or LabelledTexts")
        if not concept or not all(isinstance(word, str) and word.strip() for word in concept):
            raise _no_words(name, concept)
        words[name] = list(concept)
    return words, labelled


def _parts(
    tokenizer: Any, texts: Iterable[str] | None, report_texts: Iterable[str] | None, words: Mapping[str, Sequence[str]],
    holdout: float, context: int, max_tokens: int,
) -> tuple[MarkedTexts | None, MarkedTexts | None]:  # fmt: skip
    """Development text and other text."""
    if texts is None:
        if report_texts is not None:
            raise _report_alone()
        return None, None
    if report_texts is None:
        return MarkedTexts.read(tokenizer, texts, words, context=context, max_tokens=max_tokens).split(holdout)
    sizes = (round(max_tokens * (1 - holdout)), round(max_tokens * holdout))
    development, report = (
        MarkedTexts.read(tokenizer, part, words, context=context, max_tokens=size)
        for part, size in zip((texts, report_texts), sizes, strict=True)
    )
    return development, report


def _split(labelled: Mapping[str, LabelledTexts], holdout: float, seed: int) -> list[dict[str, LabelledTexts]]:
    """Labelled texts for the choice and for the report, whole groups in one of them. Raises ContrastError."""
    parts: list[dict[str, LabelledTexts]] = [{}, {}]
    for name, texts in labelled.items():
        for part, indices in zip(parts, texts.split(holdout, seed, classes=True), strict=True):
            groups = tuple(texts.groups[i] for i in indices) if texts.groups else ()
            part[name] = LabelledTexts(tuple(texts.rows[i] for i in indices), tuple(texts.labels[i] for i in indices), groups, texts.token)
    return parts


def _check_tokens(
    part: MarkedTexts | None, words: Mapping[str, Sequence[str]], least: int, what: str, untrained: int, *, needed: bool
) -> None:
    """Raises ConfigError where a concept has too few tokens to be told from the others, or there is no text for one of words.

    Args:
        untrained: first tokens of a row, which no feature is read at.
    """
    if part is None:
        if needed and words:
            raise _no_texts(next(iter(words)))
        return
    counts = part.marked(untrained)
    few = {name: count for name, count in zip(words, counts, strict=True) if count < least}
    if few:
        raise _too_few(few, least, what, part.tokens)


def _warn_of_copies(development: MarkedTexts | None, report: MarkedTexts | None) -> None:
    """Warns where text of the report is text that features are chosen by."""
    if development is not None and report is not None and (share := report.share_in(development)) > MOST_COPIES:
        warnings.warn(
            f"{share:.0%} of the report is copies of the text that features are chosen by, on which chosen features look better "
            "than they are: give other text for the report, or leave repeated texts out",
            stacklevel=3,
        )


def _facts(
    model: nn.Module, dictionary: Dictionary, parts: Sequence[MarkedTexts | None], words: Mapping[str, Sequence[str]],
    labelled: Sequence[Mapping[str, LabelledTexts]],
) -> dict[str, Any]:  # fmt: skip
    """What the result says of how it was found."""
    facts: dict[str, Any] = {"words": {name: list(of_one) for name, of_one in words.items()}}
    for what, part, of_part in zip(("development", "report"), parts, labelled, strict=True):
        counts = [] if part is None else part.marked(dictionary.untrained.first)
        marked = dict(zip(words, counts, strict=False))
        texts = {name: len(texts.rows) for name, texts in of_part.items()}
        facts[what] = {"tokens": 0 if part is None else part.tokens, "marked": marked, "labelled_texts": texts}
    facts["dictionary"] = {"place": dictionary.source.place, "width": dictionary.width, "reads": [str(site) for site in dictionary.reads]}
    return {**facts, "model": Anatomy.find(model).fingerprint()}


# ---- errors


def _no_concepts() -> ConfigError:
    return ConfigError("there are no concepts to search for", expected="{'law': ['court', 'judge']}", found="none", remedy="name some")


def _no_words(name: str, words: object) -> ConfigError:
    remedy = "pass a list such as ['court', 'judge', 'law']"
    return ConfigError(f"the concept '{name}' has no words", expected="words, each of them text", found=f"{words!r:.80}", remedy=remedy)


def _no_texts(concept: str) -> ConfigError:
    return ConfigError(
        f"there is no text in which the words of '{concept}' could be looked for",
        expected="texts=, a list of texts",
        found="none",
        remedy="pass texts=[...], e.g. list(read_texts('book.txt'))",
    )


def _report_alone() -> ConfigError:
    remedy = "pass texts= too, or texts= alone, of which a part is then kept for the report"
    return ConfigError("there is text for the report and none to choose by", expected="texts=", found="report_texts= alone", remedy=remedy)


def _too_few(few: Mapping[str, int], least: int, what: str, tokens: int) -> ConfigError:
    found = ", ".join(f"{name}: {count}" for name, count in few.items())
    return ConfigError(
        f"some concepts have too few words in the {what} text",
        expected=f"{least} tokens or more of each, of {tokens:,}",
        found=found,
        remedy="give more text or words, or lower least=",
    )
