"""Models of this package in EleutherAI's lm-evaluation-harness, where they are called `armd`. Needs the extra `eval`.

    armd eval --run=DIR --tasks=NAME,NAME
    python -m armd_jax.evaluation.lm_eval --model armd --model_args path=DIR,streams=1 --tasks NAME,NAME

The second command is the harness' own, with all its options; the harness finds only models of modules that were
imported, so that its command `lm_eval` alone does not know this one. From Python, `import armd_jax.evaluation.lm_eval`
is enough for `lm_eval.simple_evaluate(model="armd", model_args="path=DIR", ...)`.

What conditions the first token. Other models have no probability for a first token, so the harness puts an end-of-text
before a text, in the place of the first of `max_length` + 1 tokens. An ARMD has a learned start token in that place,
and nothing else is put there: a text is scored as `armd eval` scores a row. If a text is longer than `max_length`, the
harness cuts it into windows, whose first token is context only; the start token takes its place there too. So
`loglikelihood_rolling` of a text that fills k rows is the sum of the left-to-right likelihoods of these rows. Two
things differ from `armd eval`: the harness scores every document by itself and no end-of-text after it, and gives the
tokens of a last, partly filled row those before it as context.

Likelihoods are exact, in one pass for a batch: left to right, or under the strided order of S streams, in which the
context comes first, token by token, and the continuation is cut into S streams, as `lm.generate` writes it.
"""

import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, assert_never

import numpy as np
from tqdm import tqdm

from armd_jax import typed
from armd_jax.core.rows import START
from armd_jax.errors import UserError, nearest, shown
from armd_jax.inference import schedule
from armd_jax.inference.language_model import LanguageModel
from armd_jax.inference.schedule import ABSENT, FREE
from armd_jax.interop.load import load
from armd_jax.names import DecodingMode

try:
    import lm_eval
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError as error:
    line = f"the harness needs {error.name}, which is in an extra: pip install -e '.[eval]'"
    if __name__ == "__main__":
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from error
    raise UserError(line) from error

FILE = "lm_eval.json"
BATCH = 16
_BOOTSTRAP = 1000  # resamples, for the standard error of a metric that has no formula for it
_MAX_GEN_TOKS = 256  # if a task does not say it; as other models of the harness have it
# What a task may say about drawing beside `until`, `max_gen_toks`, `do_sample` and `temperature`.
_PASSED_ON = ("top_k", "top_p")
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}

_log = logging.getLogger(__name__)

Tokens = tuple[list[int], list[int]]  # context and continuation


@register_model("armd")
class Armd(TemplateLM):
    """A trained model as the harness sees it."""

    def __init__(
        self,
        path: str | os.PathLike[str] | LanguageModel,
        streams: int | Literal["auto"] = 1,
        mode: DecodingMode = "strided",
        ema: bool = True,
        seed: int = 0,
        batch_size: int | str = BATCH,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """The arguments are those of `--model_args`; the harness adds the last three.

        path: a run or an export, or a model that is loaded already.
        streams: S. mode: "strided" scores continuations under the strided order of S streams and writes in it; with
            S = 1, both are left to right. "lossless" scores left to right, and writes with that law, up to S tokens per
            call.
        ema: take the averaged weights of a run.
        seed: of texts that are drawn (`do_sample`); every request has random numbers of its own.
        batch_size: texts per network call; "auto": 16. The harness' own command gives 1 unless it is told otherwise.
        max_batch_size, device: not used; the harness always names a GPU, and JAX itself takes what it finds.
        Raises UserError if an argument is impossible, or if the model is a denoiser or has no tokenizer.
        """
        super().__init__()
        typed.check_choice(DecodingMode, mode, "mode")
        match mode:
            case "strided":
                if not isinstance(streams, int) or streams < 1:
                    raise UserError(f"streams={streams}: must be a whole number from 1")
                self._scored_streams = streams
            case "lossless":
                self._scored_streams = 1
            case "confident":
                raise UserError("mode=confident: its order follows from what is drawn, so that it scores no given text")
            case _:
                assert_never(mode)
        del max_batch_size, device
        self.batch_size = BATCH if str(batch_size).startswith("auto") else _whole(batch_size)
        lm = path if isinstance(path, LanguageModel) else load(path, ema)
        if not lm.config.has_orders:
            raise UserError(f"path={path}: a denoiser (model.kind) has no exact likelihood; armd eval has its bound")
        if lm.tokenizer is None:
            raise UserError("this model has no tokenizer, and tasks are texts")
        self._lm, self._tokenizer = lm, lm.tokenizer
        self._streams, self._mode, self._seed = streams, mode, seed

    @property
    def max_length(self) -> int:
        """Tokens of a text that the model sees at once, without its start token."""
        return self._lm.config.max_length

    @property
    def settings(self) -> dict[str, Any]:
        """How texts are scored and written, as plain values."""
        how = {"streams": self._streams, "mode": self._mode, "seed": self._seed, "batch_size": self.batch_size}
        return how | {"max_length": self.max_length, "lm_eval": lm_eval.__version__}

    @property
    def eot_token_id(self) -> int:
        """The id of end-of-text."""
        return self._tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the start token, which is no id of the vocabulary."""
        return START

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text. There are no special tokens to add."""
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """log p of each continuation given its context, in nats, and whether greedy decoding writes it.

        What is longer than the model's max_length is cut from the left, the continuation last.
        """
        pairs = [(context, continuation) for _, context, continuation in requests]
        cut = [sum(map(len, pair)) - (pair[0][:1] == [START]) > self.max_length for pair in pairs]
        if any(cut):
            lost = sum(len(continuation) > self.max_length for _, continuation in pairs)
            _log.warning(
                f"{sum(cut)} of {len(cut)} texts are longer than {self.max_length}, the model's max_length, and were"
                f" cut from the left, {lost} of them inside the continuation"
            )
        found = self._score(pairs, disable_tqdm)
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in nats, in the harness' windows."""
        windows: list[Tokens] = []
        counts = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            rolling = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            own = [utils.make_disjoint_window(window) for window in rolling]
            windows += own
            counts.append(len(own))
        found = np.array([nats for nats, _ in self._score(windows, disable_tqdm)])
        totals = [float(part.sum()) for part in np.split(found, np.cumsum(counts)[:-1])]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _score(self, pairs: Sequence[Tokens], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """log p of each continuation given its context, and whether all its tokens are the likeliest ones."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        known, tokens = [], []
        for context, continuation in pairs:
            text = (context[1:] if context[:1] == [START] else context) + continuation
            text = text[-self.max_length :]
            free = min(len(continuation), len(text))
            tokens.append(text)
            known.append(text[: len(text) - free] + [FREE] * free)
        scored = [number for number, row in enumerate(known) if FREE in row]  # no token has probability 1
        with tqdm(desc="scoring", total=len(scored), unit="text", disable=disable_tqdm, leave=False) as bar:
            for chosen in self._batches(scored, lambda number: len(tokens[number])):
                # Whole batches of few widths, so that few programs are compiled. What is added repeats the last row.
                rows = chosen + chosen[-1:] * (self.batch_size - len(chosen))
                width = self._width(len(tokens[chosen[0]]))
                known_BN = np.stack([_filled(known[row], width, ABSENT) for row in rows])
                tokens_BN = np.stack([_filled(tokens[row], width, 0) for row in rows])
                order, _ = schedule.order_of(known_BN, self._scored_streams)
                answer = self._lm.log_prob_and_greedy(tokens_BN, order)
                log_prob_BN, greedy_BN = np.asarray(answer[0], np.float64), np.asarray(answer[1])
                for row, number in enumerate(chosen):
                    free = known_BN[row] == FREE
                    found[number] = float(log_prob_BN[row, free].sum()), bool(greedy_BN[row, free].all())
                bar.update(len(chosen))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to its first stop text, an end-of-text or `max_gen_toks` tokens."""
        found = [""] * len(requests)
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        ways = [self._way(request.args[1]) for request in requests]
        with tqdm(desc="writing", total=len(requests), unit="text", disable=disable_tqdm, leave=False) as bar:
            for way in {repr(way): way for way in ways}.values():
                alike = [number for number, other in enumerate(ways) if other == way]
                for chosen in self._batches(alike, lambda number: len(contexts[number])):
                    room = self.max_length - way["max_new_tokens"]
                    prompts = [contexts[number][-room:] for number in chosen]
                    seeds = [int(np.random.SeedSequence([self._seed, one]).generate_state(1)[0] >> 1) for one in chosen]
                    made = self._lm.generate(prompt=prompts, seed=seeds, streams=self._streams, mode=self._mode, **way)
                    for number, prompt, text in zip(chosen, prompts, self._lm.texts(made), strict=True):
                        # A prompt that was cut may end inside a character, which is another one in the whole text.
                        found[number] = text[len(os.path.commonprefix([self._tokenizer.decode(prompt), text])) :]
                        self.cache_hook.add_partial("generate_until", requests[number].args, found[number])
                    bar.update(len(chosen))
        return found

    def _way(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `lm.generate` for what a task asks. Raises UserError if it cannot be done."""
        way = dict(normalize_gen_kwargs(asked, min(_MAX_GEN_TOKS, self.max_length // 2)))
        tokens = way.pop("max_gen_toks")
        if not 0 < tokens < self.max_length:
            raise UserError(
                f"max_gen_toks={tokens}: must be at least 1, and leave room for a context below {self.max_length}, the"
                " model's max_length"
            )
        given = way.pop("until")
        out = {"max_new_tokens": tokens, "stop": tuple(text for text in given if text)}
        sampled, temperature = way.pop("do_sample"), way.pop("temperature", 1.0)
        out["temperature"] = temperature if sampled else 0.0
        out |= {name: way.pop(name) for name in _PASSED_ON if way.get(name) is not None}
        for name, value in way.items():
            if value is not None and _NEUTRAL.get(name) != value:
                raise UserError(f"generation_kwargs: {name}={shown(value)} is not supported")
        return out

    def _batches(self, numbers: Sequence[int], length: Callable[[int], int]) -> Iterator[list[int]]:
        """Batches of similar lengths. The longest come first: if memory does not suffice, that shows at once."""
        ordered = sorted(numbers, key=length, reverse=True)
        for start in range(0, len(ordered), self.batch_size):
            yield ordered[start : start + self.batch_size]

    def _width(self, length: int) -> int:
        """Powers of two from 32 on, up to the model's max_length."""
        return min(max(schedule.SHORTEST, 1 << (length - 1).bit_length()), self.max_length)


def _filled(ids: list[int], width: int, value: int) -> np.ndarray:
    return np.pad(np.asarray(ids, np.int64), (0, width - len(ids)), constant_values=value)


def _whole(batch_size: int | str) -> int:
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UserError(f"batch_size={batch_size}: must be a whole number from 1, or auto")
    return int(batch_size)


class _Tasks(TaskManager):
    """Tasks, whose faults are mistakes in what the user gave: a data set that is not there, a file that is no task."""

    def load(self, task_list: Any) -> Any:
        try:
            loaded = super().load(task_list)
        except Exception as error:  # whatever a task's own code, its data and their libraries raise
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"--tasks={','.join(task_list)}: cannot be loaded: {reason:.300}") from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise UserError(
                    f"--tasks={name}: runs code that a model writes; in a sandbox, the harness' own command"
                    " (armd_jax.evaluation.lm_eval) does it with --confirm_run_unsafe_code"
                )
            if getattr(task, "MULTIMODAL", False):
                raise UserError(f"--tasks={name}: is not about text alone")
        return loaded


def find_tasks(names: Sequence[str], include_path: pathlib.Path | None) -> tuple[TaskManager, list[str]]:
    """Where the tasks are, and their names, which may be given as patterns such as `arc_*`.

    include_path: a folder of the user's own tasks, which go before the harness' own. A task may name Python functions,
        which the harness runs.
    Raises UserError if there is no such folder or task.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path={include_path}: is not a folder")

    def read(defaults: bool) -> tuple[TaskManager, list[str], list[str]]:
        tasks = _Tasks(include_path=None if include_path is None else str(include_path), include_defaults=defaults)
        return tasks, tasks.match_tasks(list(names)), [name for name in names if not tasks.match_tasks([name])]

    # The harness' own are thousands of files, which take seconds to read. Without them, a group may not be complete.
    tasks, found, missing = read(defaults=False)
    if missing or set(found) & set(tasks.all_groups):
        tasks, found, missing = read(defaults=True)
    if missing:
        near = nearest(missing[0], tasks.all_tasks)
        near = near if near.startswith("; did") else "; `lm_eval ls tasks` lists all of them"
        raise UserError(f"--tasks={','.join(names)}: there is no task {shown(missing[0])}{near}")
    return tasks, found


def evaluate(model: Armd, tasks: TaskManager, names: Sequence[str], limit: int | None = None) -> dict[str, Any]:
    """The harness' results for these tasks, as plain values, with how they came about.

    limit: documents of each task; None: all. Raises UserError if a task cannot be loaded or carried out.
    """
    with contextlib.redirect_stdout(sys.stderr), _one_process():  # some metrics print what they do
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=tasks,
            limit=limit,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP,
        )
    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
    return {name: _plain(found[name]) for name in kept if name in found} | model.settings | {"limit": limit}


def as_text(found: dict[str, Any]) -> str:
    """The results as the harness' own tables."""
    parts = [utils.make_table(found, part) for part in ("results", "groups") if found.get(part)]
    return "\n".join(part.rstrip() for part in parts)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Lets the harness fork no processes for standard errors: this one has the threads of JAX, and might hang."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _plain(value: Any) -> Any:
    """Dicts, lists, numbers and texts of NumPy as those of Python."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def main() -> int:
    """The harness' own command line, to which `armd` is a model like others. Returns the exit code."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
