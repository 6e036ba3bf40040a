"""A judge of an architecture that cannot be imported: transformers and PyTorch compute it. Needs the extra `judge`."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from armd_jax import files
from armd_jax.errors import UserError
from armd_jax.evaluation.generative_judge import Judge, Scores, joined, totals, windows
from armd_jax.evaluation.generative_results import JudgedBy

_CONFIGS = ("config.json", "tokenizer_config.json")
# What decides how a text becomes token ids, in the folders of all kinds of tokenizers.
_TOKENIZER_FILES = ("*token*.json", "vocab*", "merges*", "*.model", "*.tiktoken")
_CONTEXTS = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "max_sequence_length")
_LONGEST = 2**31  # Tokenizers without a limit have one of 10^30
_PROBE = 8  # tokens of the text that shows whether a model looks ahead


def open_judge(path: pathlib.Path, name: str, batch_size: int, reason: str) -> Judge:
    """The judge in a folder of Hugging Face, in float32 on the CPU. Nothing is fetched, and no code of the folder runs.

    name: as it was given. reason: why it could not be imported.
    Raises UserError if the libraries are not installed, if they cannot read the folder, if weights are missing, or if
    the model is not causal.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"--judge={name}: cannot be imported ({reason}); transformers may read it, which is in an extra:"
            " pip install -e '.[judge]'"
        ) from error
    for file in _CONFIGS:
        values = files.read_json(path / file) if (path / file).is_file() else {}
        if isinstance(values, dict) and "auto_map" in values:
            raise UserError(f"--judge={name}: its {file} asks for code of its own (auto_map), which is not run")
    transformers.utils.logging.disable_progress_bar()
    told = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what it warns of is refused below
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            str(path),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # each of the libraries below has exceptions of its own for damaged files
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"--judge={name}: transformers cannot read it: {why}; nor can it be imported: {reason}"
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(told)
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"--judge={name}: {len(missing)} weights are missing, of which the first is {missing[0]}: the folder is"
            " incomplete, or of a model that predicts no next token; choose another judge"
        )
    config, end = model.config, tokenizer.eos_token_id
    start = next((id for id in (config.bos_token_id, config.eos_token_id) if isinstance(id, int)), None)
    if start is None:
        raise UserError(
            f"--judge={name}: its config has no bos_token_id and no eos_token_id, one of which begins a text"
        )
    if end is None:
        raise UserError(f"--judge={name}: its tokenizer has no eos_token, which stands between documents")
    context = _context(config, tokenizer, name)
    model = model.eval()
    if context > 1 and _looks_ahead(model, min(context, _PROBE)):
        raise UserError(
            f"--judge={name}: is not causal: what it says of a token changes with those behind it, so that it gives"
            " texts no probability; choose another judge"
        )
    facts = JudgedBy(
        name=name,
        kind="transformers",
        digest=_digest(model, path),
        context=context,
        retokenised=True,
        first_token="the token that its config says texts begin with (bos, else eos)",
    )
    return TransformersJudge(model, tokenizer, start, end, facts, batch_size)


def _context(config: Any, tokenizer: Any, name: str) -> int:
    """How many tokens a model sees at once. Raises UserError if neither its config nor its tokenizer says so."""
    numbers = [*(getattr(config, field, None) for field in _CONTEXTS), tokenizer.model_max_length]
    for number in numbers:
        if isinstance(number, int) and 0 < number < _LONGEST:
            return number
    raise UserError(
        f"--judge={name}: says nowhere how many tokens it sees at once; put max_position_embeddings into its"
        " config.json"
    )


def _looks_ahead(model: Any, length: int) -> bool:
    """Whether the logits of a text's tokens change if its last token does."""
    import torch

    size = model.get_input_embeddings().weight.shape[0]
    one = torch.from_numpy(np.random.default_rng(0).integers(0, size, (1, length)))
    other = one.clone()
    other[0, -1] = (other[0, -1] + size // 2) % size
    with torch.no_grad():
        before, after = (model(input_ids=ids, use_cache=False).logits[0, :-1].float() for ids in (one, other))
    return not torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max()))


def _digest(model: Any, path: pathlib.Path) -> str:
    """Of the first numbers of every weight, and of the files of the config and of the tokenizer."""
    found = hashlib.sha256()
    for key, weight in model.named_parameters():
        found.update(key.encode() + weight.detach().flatten()[:16].numpy().tobytes())
    told = {file for pattern in ("config.json", *_TOKENIZER_FILES) for file in path.glob(pattern) if file.is_file()}
    for file in sorted(told):
        found.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class TransformersJudge:
    """A model and a tokenizer of transformers. start: the id before every text. end: that of end-of-text."""

    model: Any
    tokenizer: Any
    start: int
    end: int
    facts: JudgedBy
    batch_size: int
    tokenizer_hash: str = ""

    def encode(self, parts: Sequence[str]) -> list[int]:
        # A text may spell a special token, such as </s>, without being one.
        options = {"add_special_tokens": False, "split_special_tokens": True}
        return joined([self.tokenizer.encode(part, **options) for part in parts], self.end)

    def score(self, texts: Sequence[Sequence[int]], features: bool) -> Scores:
        import torch

        parts = windows(texts, self.facts.context)
        nats_W = np.zeros(len(parts))
        sums: list[np.ndarray] = []
        for begin in range(0, len(parts), self.batch_size):
            chosen = parts[begin : begin + self.batch_size]
            # The row of a text is shifted by the start token, so that place i predicts token i. Causal attention does
            # not see what fills up a row behind it.
            given = np.full((len(chosen), max(len(window.tokens) for window in chosen)), self.start, np.int64)
            for row, window in enumerate(chosen):
                given[row, 1 : len(window.tokens)] = window.tokens[:-1]
            with torch.no_grad():
                out = self.model(input_ids=torch.from_numpy(given), output_hidden_states=features, use_cache=False)
            for row, window in enumerate(chosen):
                scored = slice(window.seen, len(window.tokens))
                targets = torch.as_tensor(list(window.tokens[scored]))
                log_probs = torch.log_softmax(out.logits[row, scored].float(), dim=-1)
                nats_W[begin + row] = -float(log_probs[torch.arange(len(targets)), targets].double().sum())
                if features:
                    sums.append(out.hidden_states[-1][row, scored].double().sum(dim=0).numpy())
        return totals(parts, nats_W, np.stack(sums) if features else None)
