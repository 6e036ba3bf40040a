"""`/v1/completions`: the texts of a request as OpenAI's API writes them, whole or piece by piece."""

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import jax
import numpy as np
from starlette.concurrency import run_in_threadpool

from armd_jax.data.tokenizers import Tokenizer
from armd_jax.inference.language_model import LanguageModel
from armd_jax.serving.api import Completion, Prompt
from armd_jax.serving.batching import Progress, Text
from armd_jax.serving.text import Decoder, Piece, Written

Top = Sequence[dict[str, float]] | None  # of every place of a text: the likeliest tokens with their log-probabilities


class Choice:
    """One text of an answer. It is streamed from left to right, in whatever order it is written."""

    def __init__(self, request: Completion, index: int, text: Text, tokenizer: Tokenizer) -> None:
        self._request, self._index, self.text, self._tokenizer = request, index, text, tokenizer
        self._prompt: Prompt = request.prompts[index // request.n]
        self._next = len(self._prompt.ids)  # the first place that was not read yet
        self._last = self._next + request.max_tokens
        self.written = Written(tokenizer, self._prompt.ids, request.stop)
        self._sent_text = self._sent_pieces = 0
        self._begun = False

    @property
    def over(self) -> bool:
        """Whether the text has ended."""
        return self.written.finish is not None

    def read(self) -> None:
        """Takes up what has been written since the last time."""
        progress = self.text.progress
        if progress is None or self.over:
            return
        tokens_N, call_N, log_prob_N = progress.tokens_N, progress.call_N, progress.log_prob_N
        last = min(self._last, progress.end)
        while self._next < last and call_N[self._next] > 0:
            self.written.push(int(tokens_N[self._next]), float(log_prob_N[self._next]))
            self._next += 1
        if progress.finished:
            self.written.end("stop" if progress.end < self._last else "length")
        self.text.unwanted |= self.over  # a stop string may have ended it before its batch knows

    def new(self, top: Top) -> dict[str, Any] | None:
        """What was not given yet, as an element of `choices`; None if there is nothing. top: if it was asked for."""
        if self.text.progress is None:
            return None
        text, pieces = self.written.text[self._sent_text :], self.written.pieces[self._sent_pieces :]
        echo = self._request.echo and not self._begun
        if not (text or echo or self.over):
            return None
        first = len(self._prompt.ids) + self._sent_pieces
        before = len(self._prompt.text) if self._request.echo else 0
        shown = [dataclasses.replace(piece, offset=piece.offset + before) for piece in pieces]
        if echo:
            first, shown = 0, [*self._prompt_pieces(self.text.progress), *shown]
            text = self._prompt.text + text
        self._sent_text, self._sent_pieces = len(self.written.text), self._sent_pieces + len(pieces)
        self._begun = True
        log_probs = None if self._request.logprobs is None else self._log_probs(shown, first, top)
        finish = self.written.finish
        return {"index": self._index, "text": text, "logprobs": log_probs, "finish_reason": finish}

    def _prompt_pieces(self, progress: Progress) -> list[Piece]:
        decoder, offset, pieces = Decoder(self._tokenizer), 0, []
        for place, token in enumerate(self._prompt.ids):
            pieces.append(Piece(token, float(progress.log_prob_N[place]), offset))
            offset += len(decoder.push(token))
        return pieces

    def _log_probs(self, pieces: Sequence[Piece], first: int, top: Top) -> dict[str, Any]:
        """first: the place of the first piece in the text."""
        names = [self._tokenizer.token_text(piece.token) for piece in pieces]
        likeliest = None
        if top is not None:
            likeliest = [
                top[first + at] | {name: piece.log_prob}
                for at, (name, piece) in enumerate(zip(names, pieces, strict=True))
            ]
        return {
            "tokens": names,
            "token_logprobs": [piece.log_prob for piece in pieces],
            "top_logprobs": likeliest,
            "text_offset": [piece.offset for piece in pieces],
        }


class Answer:
    """The answer to a request for completions."""

    def __init__(self, lm: LanguageModel, model: str, request: Completion, texts: Sequence[Text]) -> None:
        """model: its name."""
        assert lm.tokenizer is not None
        self._lm, self._request, self._tokenizer = lm, request, lm.tokenizer
        self._choices = [Choice(request, index, text, lm.tokenizer) for index, text in enumerate(texts)]
        created = int(time.time())
        self._about = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": created,
            "model": model,
        }

    async def whole(self, changes: AsyncIterator[None]) -> dict[str, Any]:
        """The answer when all texts have ended."""
        async for _ in changes:
            for choice in self._choices:
                choice.read()
            if all(choice.over for choice in self._choices):
                break
        made = [choice.new(await self._top(choice)) for choice in self._choices]
        return self._about | {"choices": made, "usage": self._usage()}

    async def parts(self, changes: AsyncIterator[None]) -> AsyncIterator[dict[str, Any]]:
        """The answer in objects that each have what is new of one text."""
        usage = {"usage": None} if self._request.include_usage else {}
        left = list(self._choices)
        async for _ in changes:
            for choice in left:
                choice.read()
                if (new := choice.new(await self._top(choice))) is not None:
                    yield self._about | {"choices": [new]} | usage
            left = [choice for choice in left if not choice.over]
            if not left:
                break
        if self._request.include_usage:
            yield self._about | {"choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        given = sum(len(prompt.ids) for prompt in self._request.prompts)
        drawn = sum(choice.written.count for choice in self._choices)
        return {"prompt_tokens": given, "completion_tokens": drawn, "total_tokens": given + drawn}

    async def _top(self, choice: Choice) -> Top:
        progress = choice.text.progress
        if not self._request.logprobs or progress is None:
            return None
        return await run_in_threadpool(self._likeliest, progress, self._request.logprobs)

    def _likeliest(self, progress: Progress, count: int) -> Top:
        """The likeliest tokens at every place given its earlier blocks, by one more pass over the whole text."""
        made, row = progress.made, slice(progress.row, progress.row + 1)
        order = jax.tree.map(lambda a: a[row], made.order)
        logits_NV = np.asarray(self._lm.logits(made.tokens_BN[row], order)[0, : progress.length])
        log_prob_NV = logits_NV - np.logaddexp.reduce(logits_NV, axis=1, keepdims=True)
        best_NK = np.argsort(-log_prob_NV, axis=1, kind="stable")[:, :count]
        name = self._tokenizer.token_text
        return [
            {name(token): float(log_prob_V[token]) for token in best_K.tolist()}
            for best_K, log_prob_V in zip(best_NK, log_prob_NV, strict=True)
        ]
