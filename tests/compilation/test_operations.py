"""The tables of `armd profile`: times of a trace, and costs of a program."""

import json

import jax
import jax.numpy as jnp
import pytest

from armd_jax import config as configs
from armd_jax.cli import main as cli
from armd_jax.compilation import costs, operations
from armd_jax.compilation.hlo import Program
from armd_jax.errors import UserError
from armd_jax.training.profiling import Profiler
from armd_jax.training.stopwatch import Stopwatch

PROGRAM = """HloModule m

fused (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %c = f32[8,8]{1,0} copy(%a)
  %e = f32[8,8]{1,0} copy(%c)
  ROOT %f = f32[8,8]{1,0} fusion(%e), kind=kOutput, calls=%fused
}
"""


def test_own_time_leaves_out_what_is_inside():
    """A loop of 100 with two bodies of 30, one of which holds 10, took 40 itself; neighbours are not inside."""
    events = [(0, 100, "while"), (10, 30, "dot"), (15, 10, "copy"), (50, 30, "dot"), (100, 5, "copy")]
    found = sorted(operations.own_time(events))
    assert found == [("copy", 5), ("copy", 10), ("dot", 20), ("dot", 30), ("while", 40)]
    assert sum(time for _, time in found) == 105


def test_kinds():
    """The profiler's category, or the name without numbers."""
    assert operations.kind_of("x", {"hlo_category": "convolution fusion", "hlo_op": "fusion.3"}) == "convolution fusion"
    assert operations.kind_of("x", {"hlo_op": "loop_fusion.12.clone.1"}) == "loop_fusion"
    assert operations.kind_of("%copy.3 = f32[8]{0} copy(...)", {}) == "copy"
    assert operations.kind_of("7", {}) == "7"


def test_costs_by_kind_add_up_to_those_of_the_program():
    """Bytes and FLOPs of all kinds are those of the whole, each with the kind that causes it."""
    program = Program(PROGRAM)
    rows = {row.kind: row for row in operations.of_program(program)}
    assert rows["dot"].flops == 2 * 8**3 and rows["dot"].bytes == 0
    assert rows["copy"].count == 2 and rows["copy"].bytes == 2 * rows["fusion"].bytes == 4 * 8 * 8 * 4
    assert sum(row.bytes for row in rows.values()) == costs.hbm_traffic(program)
    assert sum(row.flops for row in rows.values()) == costs.product_flops(program)


@pytest.mark.parametrize("content", [b"", b"\x00\xff no trace", b"{}"])
def test_a_file_that_is_no_trace_is_one_line(tmp_path, content):
    """Damaged and empty files are named."""
    file = tmp_path / "vm.xplane.pb"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"vm\.xplane\.pb: ") as error:
        operations.traced(file)
    assert "\n" not in str(error.value)


@pytest.mark.profiler
def test_the_verb_prints_the_newest_trace(tmp_path, capsys):
    """As a table whose last row has what does not fit, and as JSON with everything; shares add up to one."""
    (tmp_path / "config.json").write_text(configs.to_json(configs.Config()))
    step = jax.jit(lambda x_DD: jnp.sort(jnp.tanh(x_DD @ x_DD), axis=0))
    x_DD = step(jnp.ones((64, 64)))
    with Profiler(tmp_path, (2, 3), Stopwatch(), lambda text: None) as profiler:
        for number in range(1, 6):
            profiler.before(number)
            x_DD = step(x_DD)
            profiler.after(number, x_DD)
    assert cli.main(["profile", f"--run={tmp_path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "/profile/step-2/" in found["trace"]
    assert sum(row["share"] for row in found["operations"]) == pytest.approx(1.0)
    kinds = {row["kind"]: row["count"] for row in found["operations"]}
    assert len(kinds) > 1 and kinds["sort"] == 3
    assert cli.main(["profile", f"--run={tmp_path}", "--rows=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1].startswith(f"{len(kinds) - 1} others ")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_without_a_trace_the_verb_prints_costs(tmp_path, capsys):
    """Of the training step as compiled here: bytes of everything, and FLOPs of matrix products alone."""
    values = configs.default_config_dict()
    values.model.update(vocab_size=9, max_length=8, num_layers=1, two_stream_layers=0, width=16, num_heads=2)
    values.order.update(kind="left_to_right", sbp_steps=0)
    values.training.update(batch_size=4)
    (tmp_path / "config.json").write_text(configs.to_json(configs.from_config_dict(values)))
    assert cli.main(["profile", f"--run={tmp_path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["kind"]: row for row in found["operations"]}
    assert found["trace"] is None and rows["fusion"]["bytes"] > 0 and rows["dot"]["flops"] > 0
    assert {kind for kind, row in rows.items() if row["flops"]} <= {"dot", "convolution"}
