"""Config: what is wrong is one clear line, what is right is a frozen dataclass."""

import dataclasses
import json

import pytest

from armd_jax import config as config_lib
from armd_jax.config import Config, ModelConfig
from armd_jax.errors import UserError


def _with(**fields: object) -> Config:
    """The default config with `section__field=value` changed, through the front door."""
    values = dataclasses.asdict(Config())
    for name, value in fields.items():
        section, field = name.split("__")
        values[section][field] = value
    return config_lib.from_config_dict(values)


def _message(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_defaults_round_trip():
    """The default ConfigDict, a plain dict and stored JSON all build the same frozen config."""
    built = config_lib.from_config_dict(config_lib.default_config_dict())
    assert built == Config() == config_lib.from_config_dict({})
    assert config_lib.from_config_dict(json.loads(config_lib.to_json(built))) == built
    assert config_lib.from_config_dict({"model": {"width": 96}}).model == ModelConfig(width=96)
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.model.width = 3  # type: ignore[misc]


def test_configs_are_hashable():
    """Configs key caches of compiled functions, so equal ones hash alike, tuples from lists included."""
    a, b = _with(order__streams=[1, 2]), _with(order__streams=(1, 2))
    assert a == b and hash(a) == hash(b) and a.order.streams == (1, 2)
    assert _with(order__streams=4, model__max_length=8, order__max_permuted=8).order.streams == (4,)


def test_promised_names_exist():
    """The fields that the public surface promises."""
    ModelConfig(vocab_size=3, max_length=4, num_layers=2, two_stream_layers=1, width=8, num_heads=2)
    values = config_lib.default_config_dict()
    assert set(values) == {"model", "data", "optimizer", "order", "training", "mesh"}
    for section, field in [
        ("data", "path"),
        ("data", "tokenizer"),
        ("optimizer", "learning_rate"),
        ("training", "num_steps"),
        ("training", "batch_size"),
    ]:
        assert field in values[section]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"widht": 3}}, ["'model.widht'", "'model.width'"]),
        ({"modle": {}}, ["'modle'", "'model'"]),
        ({"order": {"stream": 3}}, ["'order.stream'", "'order.streams'"]),
        ({"mesh": {"qqq": 3}}, ["'mesh.qqq'", "known: data, fsdp, tensor"]),
    ],
)
def test_unknown_fields_name_the_nearest(values, words):
    """An unknown field is an error with its full name and the nearest right one, or what there is."""
    with pytest.raises(UserError) as error:
        config_lib.from_config_dict(values)
    assert all(word in _message(error) for word in words)


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        ("model", "width", "768", "expected int, got str"),
        ("model", "width", 768.0, "expected int, got float"),
        ("model", "width", True, "expected int, got bool"),
        ("model", "width", None, "expected int, got NoneType"),
        ("model", "tie_embeddings", 1, "expected bool, got int"),
        ("model", "mlp", 3, "expected str, got int"),
        ("model", "dropout", "0.1", "expected float, got str"),
        ("model", "dropout", True, "expected float, got bool"),
        ("model", "dropout", float("nan"), "finite"),
        ("optimizer", "learning_rate", float("inf"), "finite"),
        ("order", "streams", "1,2", "expected int, got str"),
        ("order", "streams", [1, 2.0], "expected int, got float"),
    ],
)
def test_wrong_types(section, field, value, words):
    """A value of the wrong type is an error that says which field, what was expected and what came."""
    with pytest.raises(UserError) as error:
        config_lib.from_config_dict({section: {field: value}})
    assert f"{section}.{field}=" in _message(error) and words in _message(error)


def test_whole_numbers_serve_as_floats():
    """`1` for a float field is 1.0; a section that is no section is an error."""
    assert type(_with(optimizer__clip_norm=1).optimizer.clip_norm) is float
    with pytest.raises(UserError, match="model=3: expected a section with fields, got int"):
        config_lib.from_config_dict({"model": 3})


WRONG_VALUES = [
    *(
        ({"data__reset": "document", field: value}, rf"data\.reset='document': {words}")
        for field, value, words in (
            ("model__kind", "denoiser", r"model\.kind='denoiser' sees whole rows; set data\.reset='none'"),
            ("model__attention", "splash", r"model\.attention='splash' .*; use one of auto, dense, chunked"),
            (
                "model__attention",
                "flash",
                r"model\.attention='flash' sees the row from its start; use one of auto, dense",
            ),
            ("order__permute", "reinsert", r"order\.permute='reinsert' moves tokens .*; use scatter or window"),
        )
    ),
    *(({f"model__{name}": 0}, rf"model\.{name}=0: must be at least 1") for name in ("max_length", "num_layers")),
    *(({f"model__{name}": 0}, rf"model\.{name}=0: must be at least 1") for name in ("width", "num_heads")),
    *(
        ({f"model__{name}": -1}, rf"model\.{name}=-1: must be at least 0")
        for name in ("vocab_size", "two_stream_layers", "mlp_width", "attention_chunk", "loss_chunk")
    ),
    ({"model__two_stream_layers": 13}, r"two_stream_layers=13: cannot exceed model\.num_layers=12"),
    ({"model__num_heads": 7}, r"width=768 is not divisible by model\.num_heads=7"),
    ({"model__width": 36}, r"heads of width 3: it is odd"),
    ({"model__head_dim": 63}, r"heads of width 63: it is odd"),
    ({"model__num_kv_heads": 5}, r"num_heads=12 is not divisible by model\.num_kv_heads=5"),
    ({"model__norm_epsilon": 0.0}, r"norm_epsilon=0.0: must be above 0"),
    ({"model__rope_low": 4.0}, r"rope_low=4.0: must be below model\.rope_high=4.0"),
    ({"model__rope_factor": 0.5}, r"rope_factor=0.5: must be at least 1"),
    ({"model__learned_positions": 1024}, r"learned_positions=1024: rows of 1024 tokens need 1025"),
    ({"model__positional_width": 7}, r"positional_width=7: must be even"),
    ({"model__positional_width": 0}, r"positional_width=0"),
    ({"model__rope_base": 1.0}, r"rope_base=1.0: must be above 1"),
    ({"model__dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
    ({"model__dropout": -0.1}, r"dropout=-0.1"),
    ({"model__mlp": "gleu"}, r"model\.mlp='gleu' is not known; did you mean 'gelu'"),
    ({"model__norm": "layer"}, r"did you mean 'layernorm'"),
    ({"model__aggregator": "zzz"}, r"known: positional, mean, shift"),
    ({"model__dtype": "float16"}, r"model\.dtype='float16'"),
    ({"model__remat": "all"}, r"model\.remat='all'"),
    ({"model__scan_layers": "yes"}, r"model\.scan_layers='yes'"),
    ({"model__attention": "chunk"}, r"did you mean 'chunked'"),
    (
        {"model__attention": "flash", "model__num_heads": 2},
        r"'flash': heads of 384 are wider than 256",
    ),
    ({"data__valid_fraction": 1.0}, r"data\.valid_fraction=1.0"),
    ({"data__test_fraction": -0.5}, r"data\.test_fraction=-0.5"),
    ({"data__test_fraction": 0.6, "data__valid_fraction": 0.6}, r"must leave something to train on"),
    ({"data__vocab_size": 0}, r"data\.vocab_size=0"),
    ({"data__shard_rows": 0}, r"data\.shard_rows=0"),
    ({"optimizer__schedule": "cosin"}, r"did you mean 'cosine'"),
    ({"optimizer__learning_rate": 0.0}, r"learning_rate=0.0: must be above 0"),
    ({"optimizer__epsilon": 0.0}, r"epsilon=0.0: must be above 0"),
    ({"optimizer__warmup_steps": -1}, r"optimizer\.warmup_steps=-1"),
    ({"optimizer__weight_decay": -1.0}, r"optimizer\.weight_decay=-1.0"),
    ({"optimizer__clip_norm": -1.0}, r"optimizer\.clip_norm=-1.0"),
    *(({f"optimizer__{name}": 1.0}, rf"optimizer\.{name}=1.0") for name in ("beta1", "beta2", "ema_decay")),
    *(({f"optimizer__{name}": 1.5}, rf"optimizer\.{name}=1.5") for name in ("decay_fraction", "final_fraction")),
    ({"order__kind": "stride"}, r"order\.kind='stride' is not known; did you mean 'strided'"),
    ({"order__permute": "windows"}, r"did you mean 'window'"),
    ({"order__noise_schedule": "lin"}, r"did you mean 'linear'"),
    ({"order__weight": "elbow"}, r"did you mean 'elbo'"),
    ({"order__ar_steps": -1}, r"order\.ar_steps=-1"),
    ({"order__permute_steps": 8999}, r"order\.permute_steps=8999: must be at least 9000"),
    ({"order__max_permuted": 0}, r"order\.max_permuted=0"),
    ({"order__max_permuted": 1025}, r"max_permuted=1025: cannot exceed model\.max_length=1024"),
    ({"order__diffusion_steps": 0}, r"order\.diffusion_steps=0"),
    ({"order__max_block": 0}, r"order\.max_block=0: must be at least 1"),
    ({"order__kind": "contiguous", "order__max_block": 1025}, r"max_block=1025: cannot exceed model\.max_length=1024"),
    ({"order__mix": (0.25,)}, r"order\.mix=0.25: expected str, got float"),
    ({"order__mix": "contiguous"}, r"order\.mix='contiguous': expected a kind of order and its share"),
    ({"order__sbp_steps": -1}, r"order\.sbp_steps=-1"),
    ({"order__sbp_steps": 400_001}, r"sbp_steps=400001: must be in \[0, training\.num_steps=400000\]"),
    ({"order__streams": ()}, r"order\.streams=\(\)"),
    ({"order__kind": "strided", "order__streams": (1, 3)}, r"max_length=1024 is not divisible by 3 streams"),
    ({"order__sbp_steps": 10, "order__streams": (0,)}, r"order\.streams=0: must be at least 1"),
    *(
        ({f"training__{name}": 0}, rf"training\.{name}=0: must be at least 1")
        for name in ("num_steps", "batch_size", "microbatches", "log_every", "keep_checkpoints", "checkpoint_every")
    ),
    *(
        ({f"training__{name}": -1}, rf"training\.{name}=-1(\.0)?: must be at least 0")
        for name in ("eval_every", "eval_batches", "keep_every", "z_loss")
    ),
    ({"training__seed": -1}, r"training\.seed=-1"),
    ({"training__seed": 2**31}, r"training\.seed=2147483648"),
    ({"training__microbatches": 3}, r"batch_size=512 is not divisible by training\.microbatches=3"),
    ({"mesh__fsdp": -1}, r"only one axis may be -1"),
    ({"mesh__tensor": 0}, r"mesh\.tensor=0: must be at least 1"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG_VALUES, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_impossible_values(fields, words):
    """Each impossible value is an error of one line that names its field."""
    with pytest.raises(UserError, match=words) as error:
        _with(**fields)
    _message(error)


def test_possible_values_at_the_edge():
    """Values at the edges of what is allowed are allowed."""
    assert {_with(model__two_stream_layers=m).model.two_stream_layers for m in (0, 12)} == {0, 12}
    _with(order__kind="strided", order__streams=(1, 2, 1024))
    _with(order__streams=(3,))  # unused: no strided phase
    _with(order__kind="uniform", order__max_permuted=4096, order__max_block=4096)
    _with(order__kind="contiguous", order__max_block=1024)
    assert _with(order__mix="contiguous:0.999").order.mix == ("contiguous:0.999",)  # one entry is a tuple of one
    _with(order__sbp_steps=400_000, order__permute_steps=9_000, optimizer__clip_norm=0)
    _with(optimizer__ema_decay=0.0, optimizer__warmup_steps=0)
    _with(mesh__data=2, mesh__fsdp=-1)


def test_what_no_new_run_should_do_can_still_be_read():
    """A pair of settings that is refused for training is a valid config: runs that were trained so stay readable."""
    wild = _with(order__kind="masked_diffusion", order__weight="simple", order__noise_schedule="geometric")
    with pytest.raises(UserError, match=r"order\.weight='simple' with order\.noise_schedule='geometric'"):
        config_lib.check_new_run(wild)
    config_lib.check_new_run(_with(order__kind="masked_diffusion", order__weight="simple"))


def test_a_config_without_a_kind_is_an_armd():
    """Configs stored before there were kinds of models are read as what they were."""
    stored = json.loads(config_lib.to_json(Config()))
    del stored["model"]["kind"]
    assert config_lib.from_config_dict(stored) == Config() and Config().model.kind == "armd"
    assert "kind" in config_lib.weight_fields()


def test_a_denoiser_has_no_orders():
    """What belongs to orders is not checked, except for a phase of training that would never come."""
    one_layer = _with(model__kind="denoiser", model__num_layers=1, order__streams=(3,), order__kind="strided")
    assert not one_layer.model.has_orders
    chosen = {platform: one_layer.model.for_platform(platform).attention for platform in ("cpu", "gpu", "tpu")}
    assert chosen == {"cpu": "auto", "gpu": "flash", "tpu": "splash"}
    with pytest.raises(
        UserError, match="order.sbp_steps=2: model.kind='denoiser' is not trained on orders; set it to 0"
    ):
        _with(model__kind="denoiser", order__sbp_steps=2)
