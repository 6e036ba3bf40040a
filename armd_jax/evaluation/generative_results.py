"""The results of `armd eval --judge`, and the file `generation.json` of a run that holds them.

The file has one entry for each setting that texts were drawn with, with all settings and all figures of it. An entry
whose settings are asked for once more is kept, and its texts are not drawn again.
"""

import contextlib
import dataclasses
import fcntl
import math
import os
import pathlib
import typing
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from armd_jax import files, typed
from armd_jax.errors import UserError
from armd_jax.evaluation import results
from armd_jax.evaluation.generative_tokens import Variety
from armd_jax.names import DecodingMode, DenoisingSampler, JudgeKind

GENERATION_FILE = "generation.json"
_LARGEST = 2**53


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedBy:
    """Which model scored texts, and how.

    name: the path that was given, for people: two paths to one judge are one judge.
    kind: "armd": a run or an export of this package, an import among them; "imported": a folder of Hugging Face or a
        GGUF file, which was imported for this; "transformers": one that only that library can read.
    digest: of the first numbers of every weight, of the config and of the tokenizer.
    context: tokens that it can see at once.
    retokenised: whether texts were decoded and encoded again with the judge's tokenizer. If it has the model's own,
        its log-probabilities are those of the very tokens that were drawn.
    first_token: what the first token of a text is conditioned on, in words.
    """

    name: str = dataclasses.field(compare=False)
    kind: JudgeKind
    digest: str
    context: int
    retokenised: bool
    first_token: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that decides an entry's figures.

    text: the name of real text, such as "test split"; empty if the model wrote the texts. text_digest: of its rows,
        which two texts of one name may differ in; empty in entries of earlier versions, and if the model wrote them.
    mode, streams: of an ARMD. sampler, steps: of a denoiser; see `inference.language_model.How`. None if it has none.
    temperature: None for real text. top_p: None if the whole distribution is drawn from; real text has that of the
        texts in its table.
    samples: how many texts are asked for. length: tokens of each, in the model's tokenizer; nothing ends before: an
        end-of-text is a token like the others. batch: texts that are drawn together.
    seed: text i of an ARMD has the seed `seed` + i; the batch of a denoiser that begins with text i has.
    weights: digest of the first numbers of the model's weights.
    """

    text: str = ""
    mode: DecodingMode | None = None
    streams: int | None = None
    sampler: DenoisingSampler | None = None
    steps: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    samples: int
    length: int
    batch: int
    seed: int
    weights: str
    judge: JudgedBy
    text_digest: str = ""

    @property
    def label(self) -> str:
        """The way of writing in a few words."""
        if self.text:
            return f"real text ({self.text})"
        if self.mode is not None:
            return f"{self.mode}, S = {self.streams}"
        return results.Sample(sampler=self.sampler, steps=self.steps).label

    @property
    def way(self) -> tuple[bool, int, int, str, int]:
        """What tells ways of writing apart, and sorts them: real text last, modes as `DecodingMode` lists them."""
        mode = 0 if self.mode is None else 1 + typing.get_args(DecodingMode).index(self.mode)
        return bool(self.text), mode, self.streams or 0, self.sampler or "", self.steps or 0

    @property
    def comparable(self) -> tuple[JudgedBy, int, int, int, float | None, str]:
        """What entries have to agree in to stand in one table, but for what `groups` asks of those with a speed.

        Real text has no seed and no nucleus of its own.
        """
        return self.judge, self.samples, self.length, self.seed, self.top_p, self.weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures(Variety):
    """What was measured.

    texts: how many were measured; of real text, there may be fewer than `samples`.
    judge_tokens: tokens that the judge scored, in its own tokenizer. windowed: texts that were longer than the judge's
        context and were scored in windows, see `generative_judge.windows`. truncated, cut_tokens: such texts of entries
        that an earlier version wrote, which scored their beginning alone, and how many tokens it left out; now 0.
    generative_perplexity: exp(nats of all texts / judge_tokens): that of the corpus, not a mean over texts.
    standard_error: of it, over texts that are drawn independently, by the delta method; None from a single text.
    own_nats_per_token: of the texts under the order in which the model wrote them, by its own probabilities; None for a
        denoiser and for real text.
    mauve: between 0 and 1 (Pillutla et al. 2021), from the judge's final hidden states, averaged over the tokens of a
        text; None if it was not computed. mauve_text: the real text that it compares with. mauve_digest: its
        `Setting.text_digest`; empty in entries of earlier versions.
    tokens_per_second, num_calls: of one batch, its second drawing, so that nothing is compiled; 0 for real text.
        calls_per_token: network calls up to the last token of a text, divided by its tokens, averaged over the texts.
    hardware: devices, for people. example: the beginning of the first text.
    """

    texts: int = 0
    judge_tokens: int = 0
    windowed: int = 0
    truncated: int = 0
    cut_tokens: int = 0
    generative_perplexity: float | None = None
    standard_error: float | None = None
    own_nats_per_token: float | None = None
    mauve: float | None = None
    mauve_text: str = ""
    mauve_digest: str = ""
    tokens_per_second: float = 0.0
    num_calls: int = 0
    calls_per_token: float = 0.0
    hardware: str = ""
    example: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry(Setting, Figures):
    """The figures of one setting."""

    @property
    def setting(self) -> Setting:
        """The settings alone, which two entries have in common if one makes the other superfluous."""
        return Setting(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Setting)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generations:
    """The content of `generation.json`."""

    entries: tuple[Entry, ...] = ()


def perplexity_of_corpus(nats: Sequence[float] | np.ndarray, tokens: Sequence[int] | np.ndarray) -> tuple[float, float]:
    """exp(total nats / total tokens) of texts, and its standard error by the delta method.

    nats, tokens: of every text. The error is that of a ratio of two means over independent texts, times the perplexity;
    NaN if there is one text only.
    """
    nats_T, tokens_T = np.asarray(nats, np.float64), np.asarray(tokens, np.float64)
    count, rate = len(nats_T), float(nats_T.sum() / tokens_T.sum())
    perplexity = math.inf if rate >= 700 else math.exp(rate)
    if count < 2:
        return perplexity, math.nan
    residuals_T = nats_T - rate * tokens_T
    error = math.sqrt(count / (count - 1) * float((residuals_T**2).sum())) / float(tokens_T.sum())
    return perplexity, perplexity * error


def read(folder: pathlib.Path) -> Generations | None:
    """What `armd eval --judge` wrote into a run's folder, None if there is nothing.

    Raises UserError if the file is damaged or was written by something else.
    """
    file = folder / GENERATION_FILE
    if not file.exists():
        return None
    again = "remove it, or keep others elsewhere with --out"
    try:
        return typed.build(Generations, files.read_json(file), "generation", _LARGEST, any_text=True)
    except UserError as error:
        raise UserError(f"{file}: not what armd eval --judge writes: {error}; {again}") from error


def groups(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Entries that can be compared, as lists in the order of their first ones, each sorted by way and temperature.

    Speeds can be compared between texts that were drawn in batches of one size on the same hardware. Real text has no
    speed and stands in every list that it otherwise belongs to, once, whatever batches it was scored in.
    """
    drawn: dict[object, list[Entry]] = {}
    real: dict[object, dict[str, Entry]] = {}
    for entry in entries:
        if entry.text:
            real.setdefault(entry.comparable, {})[entry.text] = entry
        else:
            drawn.setdefault((entry.comparable, entry.batch, entry.hardware), []).append(entry)
    found = [[*group, *real.get(group[0].comparable, {}).values()] for group in drawn.values()]
    accompanied = {group[0].comparable for group in drawn.values()}
    found += [list(texts.values()) for comparable, texts in real.items() if comparable not in accompanied]
    return [sorted(group, key=lambda entry: (*entry.way, entry.temperature or 0.0)) for group in found]


HEADER = (
    "way of writing", "temperature", "generative perplexity", "entropy (nats)", "(bits)", "distinct-1", "-2", "-3",
    "repeated 4-grams", "longest repeat", "MAUVE", "tokens/s", "network calls",
)  # fmt: skip


def cells(entry: Entry) -> list[str]:
    """A row below `HEADER`."""
    shown = results.formatted
    error = "" if entry.standard_error is None else f" ± {entry.standard_error:,.2f}"
    fewer = "" if entry.texts == entry.samples else f", {entry.texts:,} texts"
    return [
        entry.label + fewer,
        "–" if entry.temperature is None else f"{entry.temperature:g}",
        shown(entry.generative_perplexity, 2) + error,
        shown(entry.entropy_nats, 3),
        shown(entry.entropy_bits, 3),
        *(shown(share, 3) for share in (entry.distinct_1, entry.distinct_2, entry.distinct_3)),
        shown(entry.repetition, 3),
        shown(entry.longest_repeat, 1),
        shown(entry.mauve, 3),
        "–" if not entry.num_calls else f"{entry.tokens_per_second:,.0f}",
        "–" if not entry.num_calls else f"{entry.num_calls:,}",
    ]


def heading(group: Sequence[Entry]) -> str:
    """What the entries of a table have in common, in words."""
    first = group[0]
    judge, nucleus = first.judge, "" if first.top_p is None else f", top-p {first.top_p:g}"
    drawn = "" if first.text else f", drawn in batches of {first.batch:,}"
    drawn += f" on {first.hardware}" if first.hardware else ""
    tokens = "decoded and encoded again with its tokenizer" if judge.retokenised else "its tokens are the model's"
    cut = [entry for entry in group if entry.truncated]
    lines = [
        f"{first.samples:,} texts of {first.length:,} tokens, seed {first.seed}{nucleus}{drawn}. Judge:"
        f" {judge.name} ({judge.kind}, context of {judge.context:,} tokens); {tokens}; the first token is conditioned"
        f" on {judge.first_token}."
    ]
    if cut:
        texts, lost = max(entry.truncated for entry in cut), max(entry.cut_tokens for entry in cut)
        lines.append(
            f"Cut at the judge's context in {len(cut)} rows: up to {texts:,} texts, which lost up to {lost:,} tokens."
        )
    if windowed := max(entry.windowed for entry in group):
        lines.append(
            f"Up to {windowed:,} texts of a row are longer than the judge's context and were scored in windows, each of"
            f" which reads at least {judge.context // 2:,} tokens before those that it scores."
        )
    return " ".join(lines)


def as_text(entries: Sequence[Entry], note: str = "") -> str:
    """The figures as tables for a terminal. note: a line below them."""
    parts = []
    for group in groups(entries):
        table = [list(HEADER), *(cells(entry) for entry in group)]
        widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
        lines = [
            "  ".join(
                cell.ljust(width) if not at else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        parts.append("\n".join([heading(group), *(line.rstrip() for line in lines)]))
    return "\n\n".join([*parts, note] if note else parts)


@dataclasses.dataclass
class Record:
    """What is in a folder's `generation.json`, which is written whenever something is added.

    promised: whether it has to be possible to write it; the folder of a run may be on a read-only file system.
    What other processes add to the same file meanwhile is kept. unwritten: why the last entry could not be written.
    """

    folder: pathlib.Path
    promised: bool
    entries: list[Entry]
    unwritten: str = ""
    _added: list[Entry] = dataclasses.field(default_factory=list)

    @classmethod
    def open(cls, folder: pathlib.Path, promised: bool) -> "Record":
        """Begins with what is there. Raises UserError as `read` does."""
        before = read(folder)
        return cls(folder, promised, list(before.entries) if before else [])

    @property
    def content(self) -> Generations:
        return Generations(entries=tuple(self.entries))

    def add(self, entry: Entry) -> None:
        """Adds a finished entry, in place of one of the same settings. Raises UserError as `read` does."""
        self._added = [*_without(self._added, [entry]), entry]
        self.entries = [*_without(self.entries, [entry]), entry]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _alone(self.folder):
                before = read(self.folder)
                self.entries = [*_without(before.entries if before else self.entries, self._added), *self._added]
                files.write(self.folder / GENERATION_FILE, typed.to_json(self.content, indent=2) + "\n")
            self.unwritten = ""
        except OSError as error:
            if self.promised:
                raise
            self.unwritten = error.strerror or str(error)


def _without(entries: Iterable[Entry], others: Iterable[Entry]) -> list[Entry]:
    """Those of settings that the others have not. Of real text of one name, the rows are those of the others."""

    def setting(entry: Entry) -> Setting:
        return dataclasses.replace(entry.setting, text_digest="")

    settings = {setting(entry) for entry in others}
    return [entry for entry in entries if setting(entry) not in settings]


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Waits until no other process is between reading and writing the folder's file. The lock leaves nothing behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # of a file system that locks no folders, such as NFS: as well as can be
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
