"""The configuration of an ARMD (Auto-Regressive Masked Diffusion language model) for Hugging Face transformers."""

from transformers import PretrainedConfig


class ArmdConfig(PretrainedConfig):
    """The two-stream network. Fields that Llama has are named as there; the others are:

    two_stream_layers: M, how many of the first layers work on both streams.
    mlp: gelu or swiglu. norm: layernorm or rmsnorm. norm_epsilon: of all norms but those of qk_norm and the aggregator.
    qkv_bias, attention_out_bias, mlp_bias: which matrices have biases.
    aggregator: positional, mean, shift or neighbours: how the first vector of a target is made of earlier tokens.
    neighbours: left or both. positional_gain: 0 if the aggregator `neighbours` has no positional sum.
    positional_width: width of the aggregator's sinusoidal code.
    embedding_scale: sqrt_width or one, by which looked-up embeddings are multiplied.
    qk_norm: RMS norm of queries and keys. logit_cap: logits are cap tanh(logits / cap); 0: they are not capped.
    learned_positions: rows of a table of positions that takes the place of RoPE; 0: RoPE.
    prediction_position: own or previous: where the row that predicts a token stands.
    """

    model_type = "armd"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size=257,
        max_position_embeddings=1024,
        hidden_size=768,
        num_hidden_layers=12,
        two_stream_layers=6,
        num_attention_heads=12,
        num_key_value_heads=None,
        head_dim=None,
        intermediate_size=None,
        mlp="gelu",
        norm="layernorm",
        norm_epsilon=1e-5,
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        aggregator="neighbours",
        neighbours="left",
        positional_gain=0.3,
        positional_width=128,
        embedding_scale="sqrt_width",
        qk_norm=False,
        logit_cap=0.0,
        learned_positions=0,
        prediction_position="own",
        rope_parameters=None,
        use_cache=True,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.two_stream_layers = two_stream_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.mlp = mlp
        self.norm = norm
        self.norm_epsilon = norm_epsilon
        self.qkv_bias = qkv_bias
        self.attention_out_bias = attention_out_bias
        self.mlp_bias = mlp_bias
        self.aggregator = aggregator
        self.neighbours = neighbours
        self.positional_gain = positional_gain
        self.positional_width = positional_width
        self.embedding_scale = embedding_scale
        self.qk_norm = qk_norm
        self.logit_cap = logit_cap
        self.learned_positions = learned_positions
        self.prediction_position = prediction_position
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10_000.0}
        self.use_cache = use_cache
        self.initializer_range = initializer_range
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
