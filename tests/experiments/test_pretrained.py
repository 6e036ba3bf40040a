"""The benchmark that compares an import with a forward pass of its own."""

import json
import pathlib

import gguf
import numpy as np
import pytest

from armd_jax.interop import importing, readable

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
WIDTH, HEADS, KV_HEADS, HIDDEN, LAYERS = 32, 4, 2, 48, 2


def _write(file: pathlib.Path) -> None:
    """A small model with large weights, and a byte-level vocabulary with one merge."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    names = [chr(byte) for byte in shown] + [chr(256 + place) for place in range(len(hidden))] + ["Th", "<s>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([1] * (len(names) - 1) + [3])
    writer.add_token_merges(["T h"])
    writer.add_bos_token_id(len(names) - 1)
    writer.add_eos_token_id(len(names) - 1)
    kv = WIDTH // HEADS * KV_HEADS
    shapes = {"token_embd.weight": (len(names), WIDTH), "output_norm.weight": (WIDTH,)}
    for number in range(LAYERS):
        for name, shape in {
            "attn_norm": (WIDTH,),
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (kv, WIDTH),
            "attn_v": (kv, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_norm": (WIDTH,),
            "ffn_gate": (HIDDEN, WIDTH),
            "ffn_up": (HIDDEN, WIDTH),
            "ffn_down": (WIDTH, HIDDEN),
        }.items():
            shapes[f"blk.{number}.{name}.weight"] = shape
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.normal(0, 0.4, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_import_is_the_model_of_the_file(run_benchmark, tmp_path):
    """At two numbers of two-stream layers: equal likelihoods, the same greedy texts, and a speed."""
    file, text = tmp_path / "model.gguf", tmp_path / "text.txt"
    _write(file)
    text.write_text("The sequence of bytes is read.")
    for layers in (0, 2):
        lm, config = importing.open_model(importing.open_source(file), layers)
        readable.write(lm, config, tmp_path / f"m{layers}")
    flags = [f"--gguf={file}", "--runs", str(tmp_path / "m0"), str(tmp_path / "m2"), f"--text={text}"]
    flags += ["--tokens=20", "--greedy-tokens=5", "--streams", "2", "--speed-tokens=8", "--turns=1", "--json"]
    done = run_benchmark("pretrained.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert [each["two_stream_layers"] for each in found["imports"]] == [0, 2]
    for each in found["imports"]:
        assert each["tokens"] == 20 and each["largest_difference"] < 1e-4 and each["nats"] > 1
        assert each["same_greedy_texts"] == "5 of 5"
    assert [each["case"] for each in found["speeds"]] == ["S = 2"]
    assert all(each["tokens_per_second"] > 0 for each in found["speeds"])
