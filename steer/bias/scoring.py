"""Log-probabilities that bias metrics compare: of sentences, of alternative endings, of the next word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from steer.checks import one_of, whole_number
from steer.errors import ConfigError, NonFiniteError, TokenizerError
from steer.model.annotations import response_tokens
from steer.model.capture import batches, evaluating
from steer.model.devices import input_device
from steer.model.likelihood import target_logprobs
from steer.model.load import tokenizer_of
from steer.model.logits_at import logits_at, lone_head
from steer.model.shared_blocks import Passes, shared_passes
from steer.model.tokens import Row, check_tokenizer, collate

SCORINGS = ("sum", "mean", "published")


class NextTokens(NamedTuple):
    """The most probable next tokens of each prompt: their text and their probability, most probable first."""

    tokens: list[list[str]]
    probabilities: Tensor  # [prompts, k]


class Scorer:
    """Scores texts with a causal language model. A plan that is attached stays in force.

    Texts are padded at the right, whatever side the tokenizer pads at, so that no score depends on the batch.

    Args:
        tokenizer: None for the one that came with the model.
        max_tokens: padded tokens per batch.
        progress: a bar where the output is a terminal.
        seed: of what metrics do by chance.

    Attributes:
        start: the token that sentences start with: the tokenizer's begin-of-text token, else its end-of-text token, as for GPT-2.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, max_tokens: int = 1024, progress: bool = True, seed: int = 0) -> None:
        whole_number(max_tokens, "`max_tokens`", least=1)
        self.model = model
        self.tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
        check_tokenizer(self.tokenizer)
        self.max_tokens = max_tokens
        self.progress = progress
        self.seed = seed
        self._start_logprobs: Tensor | None = None

    @property
    def start(self) -> int:
        """Raises TokenizerError where the tokenizer has no such token."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise _no_start(self.tokenizer)

    def ids(self, text: str) -> tuple[int, ...]:
        """Tokens of a text, without special ones. Raises TokenizerError for none."""
        ids = tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        if not ids:
            raise _no_tokens(text)
        return ids

    # ---- sentences

    def sentences(self, texts: Sequence[str], scoring: str = "sum", *, what: str = "sentences") -> Tensor:
        """Score of each sentence, in nat.

        Args:
            scoring: `sum`, the log-probability after the start token; `mean`, the same per token; `published`, the mean per token where
                the first token is predicted from the start token and the others without it in the context, as the published StereoSet
                scores are: 2^(mean log2 p) is the exponential of it.

        Returns:
            [texts] fp64.
        """
        one_of(scoring, SCORINGS, "`scoring`")
        tokens = [self.ids(text) for text in texts]
        if scoring != "published":
            per_token = self.response([Row((self.start, *ids), 1) for ids in tokens], what=what)
            return torch.stack([logprobs.sum() if scoring == "sum" else logprobs.mean() for logprobs in per_token])
        first = self._after_start()[torch.tensor([ids[0] for ids in tokens])].double()  # [texts]
        longer = [place for place, ids in enumerate(tokens) if len(ids) > 1]
        total = first.clone()
        if longer:
            rest = self.response([Row(tokens[place], 1) for place in longer], what=what)
            total[longer] += torch.stack([logprobs.sum() for logprobs in rest])
        return total / torch.tensor([len(ids) for ids in tokens])

    def _after_start(self) -> Tensor:
        """[vocabulary] log-probabilities of the first token of a text."""
        if self._start_logprobs is None:
            logits = self._logits([Row((self.start,), 1)], shared_passes(self.model))[0, 0].float()
            self._start_logprobs = (logits - logits.logsumexp(-1)).cpu()
        return self._start_logprobs

    # ---- alternatives

    def alternatives(self, groups: Sequence[Sequence[str]], scoring: str = "sum", *, what: str = "alternatives") -> list[Tensor]:
        """Log-probabilities of texts that begin alike, each from the first token at which any two of its group differ.

        Differences within a group are those of the whole texts when `scoring` is `sum`; `mean` divides each by its number of tokens.

        Returns:
            [texts of the group] fp64 for each group.
        """
        one_of(scoring, SCORINGS[:2], "`scoring`")
        return self._alternatives([[(self.start, *self.ids(text)) for text in group] for group in groups], scoring, what)

    def _alternatives(self, groups: Sequence[Sequence[tuple[int, ...]]], scoring: str, what: str) -> list[Tensor]:
        rows: list[Row] = []
        for group in groups:
            if _shared_prefix(group) == 0:  # texts that begin with different tokens need one to be predicted from
                group = [(self.start, *ids) for ids in group]
            rows += [Row(ids, _shared_prefix(group)) for ids in group]
        per_token = self.response(rows, what=what)
        scores = torch.stack([logprobs.sum() if scoring == "sum" else logprobs.mean() for logprobs in per_token])
        return list(scores.split([len(group) for group in groups]))

    def answers(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]], scoring: str = "sum", *, what: str = "answers"
    ) -> list[Tensor]:
        """Log-probabilities of the answers to each prompt: all tokens behind the prompt, whatever the answers have in common.

        Returns:
            [answers] fp64 for each prompt.
        """
        one_of(scoring, SCORINGS[:2], "`scoring`")
        rows: list[Row] = []
        for prompt, texts in zip(prompts, answers, strict=True):
            start = (self.start, *self.ids(prompt))
            for text in texts:
                ids = (self.start, *self.ids(prompt + text))
                rows.append(Row(ids, _shared_prefix([start, ids], keep=0)))
        per_token = self.response(rows, what=what, is_answer=True)
        scores = torch.stack([logprobs.sum() if scoring == "sum" else logprobs.mean() for logprobs in per_token])
        return list(scores.split([len(texts) for texts in answers]))

    # ---- next words

    def log_odds(self, prompts: Sequence[str], pairs: Sequence[tuple[str, str]], *, what: str = "prompts") -> Tensor:
        """log p(first word) - log p(second word) behind each prompt, which is tokenised as the tokenizer does it, special tokens included.

        Words of one token each are read from one pass over the prompt.

        Raises:
            ConfigError: no pair of words. TokenizerError: two words that are the same tokens.

        Returns:
            [prompts] fp64.
        """
        rows: list[Row] = []
        endings: list[list[tuple[int, ...]]] = []  # of both words, with the prompt
        for prompt, words in zip(prompts, pairs, strict=True):
            if not isinstance(words, list | tuple) or len(words) != 2 or not all(isinstance(word, str) for word in words):
                raise _no_pair(words)
            special, ids = self._prompt(prompt)
            both = [self.ids(prompt + word) for word in words]
            if both[0] == both[1]:
                raise _same_words(words)
            rows.append(Row((*special, *ids), len(special) + len(ids)))
            endings.append([(*special, *of_word) for of_word in both])
        if any(ending[:-1] != row.ids for row, both in zip(rows, endings, strict=True) for ending in both):
            scores = torch.stack(self._alternatives(endings, "sum", what))  # [prompts, 2]
            return scores[:, 0] - scores[:, 1]
        odds = torch.zeros(len(prompts), dtype=torch.float64)
        for chosen, logits in self._last_logits(rows, what):
            wanted = torch.tensor([[ending[-1] for ending in endings[i]] for i in chosen], device=logits.device)
            of_pair = logits.gather(1, wanted).double().cpu()  # [batch, 2]; the normaliser of a softmax cancels
            odds[chosen] = of_pair[:, 0] - of_pair[:, 1]
        return _finite(odds, what)

    def next_tokens(self, prompts: Sequence[str], k: int = 10, *, what: str = "prompts") -> NextTokens:
        """The k most probable tokens behind each prompt."""
        rows = self.prompts(prompts)
        probabilities = torch.zeros(len(rows), k)
        tokens: list[list[str]] = [[] for _ in rows]
        for chosen, logits in self._last_logits(rows, what):
            top = logits.float().topk(k)
            logprobs = top.values - logits.float().logsumexp(-1, keepdim=True)
            probabilities[chosen] = _finite(logprobs, what).exp().cpu()
            for place, ids in zip(chosen, top.indices.tolist(), strict=True):
                tokens[place] = [self._behind(rows[place].ids[-1], token) for token in ids]
        return NextTokens(tokens, probabilities)

    def _behind(self, last: int, token: int) -> str:
        """Text of a token behind another one: alone, some tokenizers give it without the space in front of it."""
        return str(self.tokenizer.decode([last, token])).removeprefix(self.tokenizer.decode([last]))

    def prompts(self, texts: Sequence[str]) -> list[Row]:
        """Prompts as the tokenizer makes them, special tokens in front included, but none behind: a text goes on there."""
        return [Row((*special, *ids), len(special) + len(ids)) for special, ids in map(self._prompt, texts)]

    def _prompt(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Special tokens in front of a text, and its tokens."""
        ids, complete = self.ids(text), tuple(self.tokenizer(text).input_ids)
        for start in range(len(complete) - len(ids) + 1):
            if complete[start : start + len(ids)] == ids:
                return complete[:start], ids
        raise _other_tokens(text)

    def _last_logits(self, rows: Sequence[Row], what: str) -> Iterator[tuple[list[int], Tensor]]:
        """[batch, vocabulary] behind the last token of each text, with the numbers of the texts."""
        passes, head = shared_passes(self.model), lone_head(self.model, _embeddings(self.model, "output"))
        for chosen in self._batches(rows, what):
            width = max(len(rows[i].ids) for i in chosen)
            columns = torch.tensor([place * width + len(rows[i].ids) - 1 for place, i in enumerate(chosen)])
            with self._pass([rows[i] for i in chosen], passes) as batch:
                logits = logits_at(self.model, head, batch, columns)  # [batch, vocabulary]
            yield chosen, logits

    # ---- passes

    def response(self, rows: Sequence[Row], *, what: str = "texts", is_answer: bool = False) -> list[Tensor]:
        """[response tokens] log-probability of each, in nat, fp64 on the CPU, for every row; a row has a prompt of at least one token.

        A plan that acts on the response is told that this is all but the first token of a text, with `is_answer` the response of its row.
        """
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        passes = shared_passes(self.model)
        for chosen in self._batches(rows, what):
            logits = self._logits([rows[i] for i in chosen], passes, is_answer)
            for place, i in enumerate(chosen):
                row = rows[i]
                predicting = logits[place, row.prompt - 1 : len(row.ids) - 1]  # [response tokens, vocabulary], a view
                found[i] = _finite(target_logprobs(predicting, torch.tensor(row.ids[row.prompt :])).double().cpu(), what)
        return found

    def _batches(self, rows: Sequence[Row], what: str) -> Iterator[list[int]]:
        _check_vocabulary(self.model, rows)
        with tqdm(total=len(rows), desc=what, disable=None if self.progress else True, leave=False) as bar:
            for chosen in batches(rows, self.max_tokens):
                yield chosen
                bar.update(len(chosen))

    def _logits(self, rows: Sequence[Row], passes: Passes, is_answer: bool = False) -> Tensor:
        """[batch, tokens, vocabulary]."""
        with self._pass(rows, passes, is_answer) as batch:
            return self.model(**batch).logits

    @contextmanager
    def _pass(self, rows: Sequence[Row], passes: Passes, is_answer: bool = False) -> Iterator[dict[str, Any]]:
        """The arguments of a pass over texts, within what has to be in force."""
        batch = {name: tensor.to(input_device(self.model)) for name, tensor in collate(rows, 0).items()}
        said = batch.pop("labels") != -100
        if not is_answer:
            said = batch["attention_mask"].bool()
            said[:, 0] = False  # the token that a text starts with
        with evaluating(self.model), passes(batch), response_tokens(self.model, said):
            yield {**batch, "use_cache": False}


def _shared_prefix(tokens: Sequence[Sequence[int]], keep: int = 1) -> int:
    """Number of tokens that all begin with, but at most all but `keep` of the shortest."""
    most = min(map(len, tokens)) - keep
    return next((place for place in range(most) if len({ids[place] for ids in tokens}) > 1), most)


def _finite(scores: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(scores).all()):
        raise _not_finite(scores, what)
    return scores


def _embeddings(model: nn.Module, side: str) -> nn.Module | None:
    """The embedding (`input`) or the unembedding (`output`) of a model that tells."""
    get: Any = getattr(model, f"get_{side}_embeddings", None)
    return None if get is None else get()


def _check_vocabulary(model: nn.Module, rows: Sequence[Row]) -> None:
    """A token that the model has no embedding of would end the whole process on a GPU."""
    size = getattr(_embeddings(model, "input"), "num_embeddings", None)
    largest = max((max(row.ids) for row in rows), default=0)
    if size is not None and largest >= size:
        raise _no_embedding(size, largest)


# ---- errors


def _no_start(tokenizer: Any) -> TokenizerError:
    return TokenizerError(
        "the tokenizer has no token that a text starts with",
        expected="a begin-of-text or an end-of-text token",
        found=f"neither in {type(tokenizer).__name__}",
        remedy="set tokenizer.bos_token to the one that the model was trained with",
    )


def _no_tokens(text: str) -> TokenizerError:
    return TokenizerError("a text of a bias metric gives no tokens", expected="one or more", found=repr(text), remedy="leave this item out")


def _other_tokens(text: str) -> TokenizerError:
    return TokenizerError(
        "the tokenizer makes other tokens of a text when it adds special ones",
        expected="the tokens of the text, with special ones in front or behind",
        found=f"others for {text!r:.60}",
        remedy="pass a tokenizer whose special tokens leave the text alone",
    )


def _no_pair(words: object) -> ConfigError:
    return ConfigError("what comes next is compared of two words", expected="(word, word), each with the space in front of it",
                       found=repr(words), remedy="e.g. pronouns=(' him', ' her')")  # fmt: skip


def _same_words(words: tuple[str, str]) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer does not tell {words[0]!r} from {words[1]!r}",
        expected="two words that are different tokens",
        found="the same tokens for both",
        remedy="pass words that its vocabulary has, with the space in front of them",
    )


def _not_finite(scores: Tensor, what: str) -> NonFiniteError:
    found = f"{int((~torch.isfinite(scores)).sum())} of {scores.numel()} are NaN or infinite"
    remedy = "the model diverged: lower the strength of the plan, or load the model in float32"
    return NonFiniteError(f"scores of {what} are not finite", expected="finite log-probabilities", found=found, remedy=remedy)


def _no_embedding(size: int, largest: int) -> ConfigError:
    return ConfigError(
        "the tokenizer is not that of the model",
        expected=f"tokens below {size}, the number of the model's embeddings",
        found=f"token {largest}",
        remedy="pass the tokenizer that came with the model",
    )
