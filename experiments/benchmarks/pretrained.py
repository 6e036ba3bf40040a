"""A pretrained model against its import: the same likelihoods, the same greedy texts, and how fast each of them writes.

    armd import --from=MODEL.gguf --out=runs/imported
    python experiments/benchmarks/pretrained.py --gguf=MODEL.gguf --runs runs/imported --text=FILE

The other side is a forward pass in NumPy, written from the definition of a Llama-type network and sharing no code with
the package but the tokenizer: `gguf` reads and dequantises the file. Both score the same tokens, left to right and
behind the token that begins a text. Import the file with several `--two-stream`, and all folders can be given at once.
With `--hugging-face`, which needs torch, transformers and accelerate, tokens per second at batch 1 come beside those of
the same file in transformers. The sides take turns, and a speed is the median over the turns.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import machine, print_json
from trainings import commit, markdown

from armd_jax.core import order as orders
from armd_jax.errors import UserError
from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop.load import load

PROMPTS = ("The", "Once upon a time", "The capital of France is", "def add(a, b):", "In 1969, the first")


class Llama:
    """A Llama-type network of a GGUF file, in float32."""

    def __init__(self, path: pathlib.Path) -> None:
        """Reads all weights. Queries and keys lie interleaved in the file: pairs that RoPE turns are neighbours."""
        import gguf

        reader = gguf.GGUFReader(path)
        if "llama.block_count" not in reader.fields:
            raise UserError(f"--gguf={path}: its architecture is not llama")
        field = lambda name: reader.fields[f"llama.{name}"].contents()  # noqa: E731
        self.layers, self.heads = field("block_count"), field("attention.head_count")
        self.kv_heads, self.base = field("attention.head_count_kv"), field("rope.freq_base")
        self.epsilon = field("attention.layer_norm_rms_epsilon")
        self.start = reader.fields["tokenizer.ggml.bos_token_id"].contents()
        self.w = {
            each.name: gguf.quants.dequantize(each.data, each.tensor_type).astype(np.float32) for each in reader.tensors
        }

    def _norm(self, x_TD: np.ndarray, name: str) -> np.ndarray:
        return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + self.epsilon) * self.w[name]

    def _turned(self, x_THK: np.ndarray) -> np.ndarray:
        """Every pair of neighbours turned by its angle, position by position."""
        length, _, width = x_THK.shape
        angle_TK = np.arange(length)[:, None] * self.base ** (-np.arange(0, width, 2) / width)
        pairs = x_THK.reshape(*x_THK.shape[:2], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        cos, sin = np.cos(angle_TK)[:, None], np.sin(angle_TK)[:, None]
        return np.stack([first * cos - second * sin, first * sin + second * cos], -1).reshape(x_THK.shape)

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits [T + 1, V] of the token behind the start token, behind each id."""
        x = self.w["token_embd.weight"][[self.start, *ids]]
        length, sharing = len(x), self.heads // self.kv_heads
        hidden = np.triu(np.full((length, length), -np.inf, np.float32), 1)
        for number in range(self.layers):
            w = lambda name, n=number: self.w[f"blk.{n}.{name}.weight"]  # noqa: E731
            normed = self._norm(x, f"blk.{number}.attn_norm.weight")
            q = self._turned((normed @ w("attn_q").T).reshape(length, self.heads, -1)).astype(np.float32)
            k = self._turned((normed @ w("attn_k").T).reshape(length, self.kv_heads, -1)).astype(np.float32)
            v = (normed @ w("attn_v").T).reshape(length, self.kv_heads, -1)
            k, v = np.repeat(k, sharing, 1), np.repeat(v, sharing, 1)
            scores = np.matmul(q.swapaxes(0, 1), k.transpose(1, 2, 0)) * q.shape[-1] ** -0.5 + hidden
            p = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = np.matmul(p / p.sum(-1, keepdims=True), v.swapaxes(0, 1)).swapaxes(0, 1).reshape(length, -1)
            x = x + mixed @ w("attn_output").T
            normed = self._norm(x, f"blk.{number}.ffn_norm.weight")
            gate = normed @ w("ffn_gate").T
            x = x + (gate / (1 + np.exp(-gate)) * (normed @ w("ffn_up").T)) @ w("ffn_down").T
        head = self.w.get("output.weight", self.w["token_embd.weight"])
        return self._norm(x, "output_norm.weight") @ head.T

    def log_prob(self, ids: list[int]) -> np.ndarray:
        """Nats [T] of every id behind those before it."""
        logits = self.logits(ids)[:-1].astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))[np.arange(len(ids)), ids]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """Ids, and `count` more, each of them the likeliest."""
        for _ in range(count):
            ids = [*ids, int(self.logits(ids)[-1].argmax())]
        return ids


def compare(lm: LanguageModel, other: Llama, ids: list[int], expected: np.ndarray, texts: list[list[int]]) -> Any:
    """How far an import is from the other side, and whether its greedy texts are the same ones."""
    # Rows may be longer than the import's own, because positions are relative.
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_length=max(lm.config.max_length, len(ids))))
    found = np.asarray(lm.log_prob(np.array([ids]), orders.left_to_right(1, len(ids))))[0]
    same = 0
    for text, prompt in zip(texts, PROMPTS, strict=True):
        assert lm.tokenizer is not None
        start = len(lm.tokenizer.encode(prompt))
        made = lm.generate(prompt=text[:start], length=len(text), temperature=0.0, stop_at_end=False)
        same += made.tokens_BN[0].tolist() == text
    return {
        "two_stream_layers": lm.config.two_stream_layers,
        "tokens": len(ids),
        "nats": float(-found.mean(dtype=np.float64)),
        "nats_there": float(-expected.mean()),
        "largest_difference": float(np.abs(found - expected).max()),
        "same_greedy_texts": f"{same} of {len(texts)}",
    }


def speeds(lm: LanguageModel, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second at batch 1 in every number of streams, and of transformers if asked for."""
    count = args.speed_tokens

    def ours(streams: int) -> Callable[[], object]:
        return lambda: lm.generate(1, count, streams=streams, seed=0, stop_at_end=False)

    runs: dict[str, Callable[[], object]] = {f"S = {streams}": ours(streams) for streams in args.streams}
    if args.hugging_face:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(max(torch.get_num_threads(), 1))
        theirs = AutoModelForCausalLM.from_pretrained(
            args.gguf.parent, gguf_file=args.gguf.name, dtype=torch.float32
        ).eval()
        start = torch.tensor([[theirs.config.bos_token_id]])
        settings = dict(do_sample=True, top_k=0, max_new_tokens=count, min_new_tokens=count, pad_token_id=0)
        runs["transformers"] = lambda: theirs.generate(start, **settings)
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.turns):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return [{"case": name, "tokens_per_second": count / float(np.median(each))} for name, each in seconds.items()]


def as_markdown(result: dict[str, Any]) -> str:
    """Both tables."""
    header = ["two-stream layers", "tokens", "nats per token", "NumPy", "largest difference", "same greedy texts"]
    cells = [
        [
            str(row["two_stream_layers"]),
            f"{row['tokens']:,}",
            f"{row['nats']:.5f}",
            f"{row['nats_there']:.5f}",
            f"{row['largest_difference']:.1e}",
            row["same_greedy_texts"],
        ]
        for row in result["imports"]
    ]
    parts = [markdown(header, cells)]
    if result["speeds"]:
        rows = [[row["case"], f"{row['tokens_per_second']:.1f}"] for row in result["speeds"]]
        parts.append(markdown(["batch 1", "tokens/s"], rows))
    return "\n\n".join(parts)


def main() -> int:
    """Runs the comparison and prints it. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gguf", type=pathlib.Path, required=True, help="the pretrained model, of architecture llama")
    add("--runs", type=pathlib.Path, nargs="+", required=True, help="imports of it")
    add("--text", type=pathlib.Path, default=pathlib.Path(__file__), help="text to score; default: this script")
    add("--tokens", type=int, default=2000, help="how many of its tokens are scored, at the most")
    add("--greedy-tokens", type=int, default=40, help="how many tokens each prompt is continued by")
    add("--streams", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of streams S that are timed")
    add("--speed-tokens", type=int, default=128, help="tokens of a text that is timed")
    add("--turns", type=int, default=0, help="how often each text is timed; 0: no speeds")
    add("--hugging-face", action="store_true", help="time transformers as well")
    add("--json", action="store_true", help="print results as one JSON object")
    args = parser.parse_args()
    try:
        for flag, file in (("gguf", args.gguf), ("text", args.text)):
            if not file.is_file():
                raise UserError(f"--{flag}={file}: there is no such file")
        models = [load(run) for run in args.runs]
        other = Llama(args.gguf)
        tokenizer = models[0].tokenizer
        assert tokenizer is not None
        ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))[: args.tokens]
        expected = other.log_prob(ids)
        texts = [other.greedy(tokenizer.encode(prompt), args.greedy_tokens) for prompt in PROMPTS]
        result = machine(hugging_face=args.hugging_face) | {
            "commit": commit(),
            "imports": [compare(lm, other, ids, expected, texts) for lm in models],
            "speeds": speeds(models[0], args) if args.turns else [],
        }
    except (UserError, ImportError) as error:
        hint = "; pip install -e '.[import]'" if isinstance(error, ImportError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    if args.json:
        print_json(result)
    else:
        print(as_markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
