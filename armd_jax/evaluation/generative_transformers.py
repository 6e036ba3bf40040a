"""A judge of an architecture that cannot be imported: transformers and PyTorch compute it. Needs the extra `judge`."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from armd_jax import files
from armd_jax.errors import UserError
from armd_jax.evaluation.generative_judge import Judge, Scores, joined
from armd_jax.evaluation.generative_results import JudgedBy

_CONFIGS = ("config.json", "tokenizer_config.json")


def open_judge(path: pathlib.Path, name: str, batch_size: int, reason: str) -> Judge:
    """The judge in a folder of Hugging Face, in float32 on the CPU. Nothing is fetched, and no code of the folder runs.

    name: as it was given. reason: why it could not be imported.
    Raises UserError if the libraries are not installed, or if they cannot read the folder.
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
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path), local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(
            f"--judge={name}: transformers cannot read it: {error}; nor can it be imported: {reason}"
        ) from error
    config = model.config
    start = next((id for id in (config.bos_token_id, config.eos_token_id) if isinstance(id, int)), None)
    end = tokenizer.eos_token_id
    if start is None or end is None:
        raise UserError(f"--judge={name}: has no bos_token_id and no eos_token_id, one of which begins a text")
    first = next(model.parameters()).detach().flatten()[:16].numpy().tobytes()
    facts = JudgedBy(
        name=name,
        kind="transformers",
        digest=hashlib.sha256(first).hexdigest()[:16],
        context=getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length,
        retokenised=True,
        first_token="the token that its config says texts begin with (bos, else eos)",
    )
    return TransformersJudge(model.eval(), tokenizer, start, end, facts, batch_size)


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
        return joined([self.tokenizer.encode(part, add_special_tokens=False) for part in parts], self.end)

    def score(self, texts: Sequence[Sequence[int]], features: bool) -> Scores:
        import torch

        count, context = len(texts), self.facts.context
        lengths = np.asarray([min(len(text), context) for text in texts], np.int64)
        nats_T, found = np.zeros(count), [np.zeros(0)] * count
        by_length = np.argsort(lengths, kind="stable")
        for begin in range(0, count, self.batch_size):
            chosen = by_length[begin : begin + self.batch_size]
            # The row of a text is shifted by the start token, so that place i predicts token i. Causal attention does
            # not see what fills up a row behind it.
            given = np.full((len(chosen), int(lengths[chosen].max())), self.start, np.int64)
            for row, at in enumerate(chosen):
                given[row, 1 : lengths[at]] = texts[at][: lengths[at] - 1]
            with torch.no_grad():
                out = self.model(input_ids=torch.from_numpy(given), output_hidden_states=features, use_cache=False)
            for row, at in enumerate(chosen):
                length = int(lengths[at])
                targets = torch.as_tensor(list(texts[at][:length]))
                log_probs = torch.log_softmax(out.logits[row, :length].float(), dim=-1)
                nats_T[at] = -float(log_probs[torch.arange(length), targets].double().sum())
                if features:
                    found[at] = out.hidden_states[-1][row, :length].double().mean(dim=0).numpy()
        cut_T = np.asarray([len(text) for text in texts], np.int64) - lengths
        return Scores(nats_T, lengths, cut_T, np.stack(found) if features else None)
