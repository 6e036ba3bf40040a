"""The tokenizer in the metadata of a GGUF file, as the files that Hugging Face's tokenizers have."""

from armd_jax.interop.gguf_file import GgufFile


def special_token_ids(file: GgufFile) -> dict[str, int]:
    """`bos_token_id` and `eos_token_id` of a config, if the file names them. Raises UserError if one is no id."""
    found = {}
    for role in ("bos", "eos"):
        key = f"tokenizer.ggml.{role}_token_id"
        if key in file.values:
            found[f"{role}_token_id"] = file.whole(key)
    return found


def tokenizer_files(file: GgufFile, vocab_size: int) -> dict[str, bytes]:
    raise NotImplementedError
