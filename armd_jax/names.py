"""Every closed set of names, each as one `Literal`, and the limits of kernels that configs are checked against.

The config builder reads them (an unknown name is an error that suggests the nearest known one), command-line choices
and tests iterate over them (`typed.choices`), and code that depends on such a name is a `match` that ends in
`assert_never`, so that the type checker finds every place that a new name has to be added to.
"""

from typing import Literal, assert_never

OrderModel = Literal["armd"]  # trained on generation orders, and scored and sampled under them
MaskModel = Literal["denoiser"]  # trained to fill in masked tokens
ModelKind = Literal[OrderModel, MaskModel]
AggregatorKind = Literal["positional", "mean", "shift", "neighbours"]
ImportAggregator = Literal["neighbours", "shift"]  # those that keep the token before a target apart
Neighbours = Literal["left", "both"]
EmbeddingScale = Literal["sqrt_width", "one"]
ResidualInit = Literal["unscaled", "depth_scaled", "zero"]
NormKind = Literal["layernorm", "rmsnorm"]
MlpKind = Literal["gelu", "swiglu"]
PredictionPosition = Literal["own", "previous"]
RopeScaling = Literal["none", "linear", "llama3"]
Remat = Literal["none", "dots", "full"]
GradientSums = Literal["float32", "activations"]
PlainAttention = Literal["auto", "dense", "chunked"]  # runs everywhere
TpuKernel = Literal["splash"]
GpuKernel = Literal["flash"]
AttentionKind = Literal[PlainAttention, TpuKernel, GpuKernel]
Dtype = Literal["auto", "float32", "bfloat16"]
Switch = Literal["auto", "on", "off"]
OneTokenOrder = Literal["left_to_right", "progressive", "uniform"]  # every block is one token
StridedOrder = Literal["strided"]  # the blocks follow from the number of streams
DrawnBlocksOrder = Literal["masked_diffusion", "contiguous"]  # the blocks themselves are drawn at random
OrderKind = Literal[OneTokenOrder, StridedOrder, DrawnBlocksOrder]
Permutation = Literal["scatter", "window", "reinsert"]
NoiseSchedule = Literal["linear", "cosine", "geometric"]
OrderWeight = Literal["elbo", "simple"]
OptimizerKind = Literal["adamw", "muon"]
LearningRateSchedule = Literal["constant", "cosine", "wsd"]
AfterSkipped = Literal["rollback", "stop"]
Damaged = Literal["error", "skip"]
Reset = Literal["none", "document"]  # whether a row begins anew where a document in it does
Split = Literal["train", "valid", "test"]
NamedTokenizer = Literal["sentencepiece", "bytes"]  # data.tokenizer may name these; anything else there is a folder
VocabularyTokenizerKind = Literal["bpe", "wordpiece", "tokenizer_json"]  # read from a folder of vocabulary files
TokenizerKind = Literal[NamedTokenizer, VocabularyTokenizerKind]
DenoisingSampler = Literal["first_hitting", "ancestral", "confidence"]
DecodingMode = Literal["strided", "lossless", "confident"]  # of a model that is trained on orders
JudgeKind = Literal["armd", "imported", "transformers"]  # whose code scores texts: ours, after an import, or theirs
HuggingFaceFamily = Literal["llama", "gpt2", "armd"]  # how weights are named and laid out in Hugging Face folders
SweepLauncher = Literal["slurm", "xpk", "gke"]  # a launcher of launch/ that `armd sweep` can call
CompiledProgram = Literal["train", "sample"]  # what `armd compile` compiles: the training step or the sampler
SuiteProtocol = Literal["sedd", "mdlm"]  # how published zero-shot perplexities were measured: by whose code
# The texts of the zero-shot suites.
SuiteSet = Literal["lambada", "wikitext2", "wikitext103", "ptb", "lm1b", "ag_news", "pubmed", "arxiv"]
ExportFormat = Literal["armd", "stablehlo", "huggingface"]  # what `armd export` writes
ExportCode = Literal["auto", "native", "remote"]  # huggingface: whose code reads it, that of transformers or its own
ExportDtype = Literal["float32", "bfloat16", "float16"]

SPLASH_TILE = 128  # the TPU kernel needs rows of a multiple of this length
FLASH_WIDEST = 256  # the GPU kernel takes heads up to this width


def kernel_fault(kind: AttentionKind, max_length: int, head_width: int, where: str = "model") -> str:
    """Why an attention kernel cannot compute a model of these sizes; empty if it can. where: the config's section."""
    match kind:
        case "splash" if max_length % SPLASH_TILE:
            return f"{where}.max_length={max_length} must be a multiple of {SPLASH_TILE}"
        case "flash" if head_width > FLASH_WIDEST:
            return f"heads of {head_width} are wider than {FLASH_WIDEST}; use auto or chunked"
        case "auto" | "dense" | "chunked" | "splash" | "flash":
            return ""
        case _:
            assert_never(kind)
