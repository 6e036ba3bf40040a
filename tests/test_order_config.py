"""The order section: kinds that are mixed, with their shares, and what is known of blocks before they are drawn."""

import json

import pytest

from armd_jax import config as config_lib
from armd_jax import order_config
from armd_jax.config import Config
from armd_jax.errors import UserError
from armd_jax.order_config import OrderConfig, block_patterns


def test_a_mixture_has_kinds_and_shares():
    """Entries are read in their sequence, spaces around them do not count, and without entries there are none."""
    mixed = OrderConfig(mix=("contiguous:0.25", " uniform : 1e-1 "))
    assert order_config.mixture(mixed) == (("contiguous", 0.25), ("uniform", 0.1))
    assert order_config.drawn_kinds(mixed) == ("progressive", "contiguous", "uniform")
    assert order_config.mixture(OrderConfig()) == () and order_config.drawn_kinds(OrderConfig()) == ("progressive",)


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        (("contiguous",), r"mix='contiguous': expected a kind of order and its share .*, as in contiguous:0.25"),
        (("contiguous:",), r"mix='contiguous:': expected a kind"),
        (("contiguous:quarter",), r"expected a kind of order and its share"),
        (("contiguous:0.25,uniform:0.1",), r"expected a kind of order and its share"),
        (("",), r"mix='': expected a kind"),
        (("contigous:0.25",), r"mix='contigous' is not known; did you mean 'contiguous'"),
        ((":0.25",), r"order\.mix='' is not known"),
        (("contiguous:0",), r"mix='contiguous:0': the share must be above 0 and below 1"),
        (("contiguous:-0.5",), r"the share must be above 0 and below 1"),
        (("contiguous:1",), r"the share must be above 0 and below 1"),
        (("contiguous:nan",), r"the share must be above 0 and below 1"),
        (("contiguous:inf",), r"the share must be above 0 and below 1"),
        (("uniform:0.1", "uniform:0.2"), r"mix='uniform:0.2': this kind is named twice"),
        (("progressive:0.1",), r"order\.kind='progressive' already has the steps that are left"),
        (("contiguous:0.5", "uniform:0.5"), r"add up to 1 and leave no steps to order\.kind='progressive'"),
        (("contiguous:0.9", "uniform:0.3"), r"add up to 1.2 and leave"),
    ],
)
def test_impossible_mixtures(mix, words):
    """What is no share of the steps for another kind of order is an error of one line."""
    for check in (order_config.mixture, lambda order: config_lib.check(Config(order=order))):
        with pytest.raises(UserError, match=words) as error:
            check(OrderConfig(mix=mix))
        assert "\n" not in str(error.value) and str(error.value).startswith("order.mix")


def test_limits_hold_for_kinds_that_are_mixed_in():
    """A field that a kind needs is checked if any step draws that kind, and only then."""

    def with_order(**fields):
        return config_lib.from_config_dict({"model": {"max_length": 64, "num_layers": 6}, "order": fields})

    with_order(kind="uniform", max_permuted=65, max_block=65, streams=(3,), mix=("left_to_right:0.5",))
    for fields, words in (
        ({"mix": ("progressive:0.5",), "max_permuted": 65}, r"order\.max_permuted=65: cannot exceed"),
        ({"mix": ("contiguous:0.5",), "max_block": 65}, r"order\.max_block=65: cannot exceed model\.max_length=64"),
        ({"mix": ("contiguous:0.5",), "max_block": 0}, r"order\.max_block=0: must be at least 1"),
        ({"mix": ("strided:0.5",), "streams": (3,)}, r"max_length=64 is not divisible by 3 streams"),
        ({"mix": ("contiguous:0.5", "strided:0.1"), "streams": (3,)}, r"max_length=64 is not divisible by 3 streams"),
        ({"mix": ("contiguous:0.5",), "sbp_steps": 5, "streams": (0,)}, r"order\.streams=0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            with_order(**({"kind": "uniform"} | fields))


def test_a_kernel_that_has_to_know_its_mask_is_told_which_kind_hides_it():
    """Splash attention is refused for drawn blocks, be they the main kind or mixed in."""
    model = {"attention": "splash"}
    config_lib.from_config_dict({"model": model, "order": {"mix": ("uniform:0.5", "strided:0.1")}})
    for order, words in (
        ({"kind": "contiguous"}, r"the blocks of order\.kind='contiguous' are drawn at random"),
        ({"mix": ("uniform:0.5", "contiguous:0.1")}, r"the blocks of 'contiguous' in order\.mix are drawn at random"),
    ):
        with pytest.raises(UserError, match=words):
            config_lib.from_config_dict({"model": model, "order": order})


def test_drawn_blocks_have_no_pattern():
    """If any step draws its blocks, no mask is known before; streams are none then, too."""
    for kind in ("masked_diffusion", "contiguous"):
        assert block_patterns(OrderConfig(kind=kind, sbp_steps=5)) is None
        assert block_patterns(OrderConfig(kind="strided", mix=(f"{kind}:0.01",))) is None


def test_a_denoiser_has_no_mixture():
    """A model that is not trained on orders cannot mix them."""
    with pytest.raises(
        UserError, match=r"order\.mix=\('uniform:0.5',\): model\.kind='denoiser' is not trained on orders"
    ):
        config_lib.from_config_dict({"model": {"kind": "denoiser"}, "order": {"mix": ("uniform:0.5",)}})


def test_a_config_from_before_mixtures_has_none():
    """A stored config without the newer fields is one that draws its main kind alone, and mixtures are stored."""
    stored = json.loads(config_lib.to_json(Config()))
    del stored["order"]["mix"], stored["order"]["max_block"]
    assert config_lib.from_config_dict(stored) == Config() and Config().order.mix == ()
    mixed = Config(order=OrderConfig(mix=("contiguous:0.25",), max_block=8))
    assert config_lib.from_config_dict(json.loads(config_lib.to_json(mixed))) == mixed


def test_a_weight_that_no_new_run_should_have_is_refused_in_a_mixture():
    """Masking times that are mixed in follow the rule of those that are the main kind."""
    fields = {"weight": "simple", "noise_schedule": "geometric"}
    with pytest.raises(UserError, match=r"order\.weight='simple' with order\.noise_schedule='geometric'"):
        config_lib.check_new_run(Config(order=OrderConfig(mix=("masked_diffusion:0.1",), **fields)))
    config_lib.check_new_run(Config(order=OrderConfig(mix=("uniform:0.1",), **fields)))
