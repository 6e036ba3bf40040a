"""`armd report --sweep`: files that are the same for the same members, pictures, and one line for a mistake."""

import io
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from armd_jax.cli import main as cli
from armd_jax.report import sweep_page, sweep_pictures, sweep_reading

PICTURES = [f"curves_{one}.png" for one in ("steps", "tokens", "flops", "seconds")] + ["axes.png"]
SAME = ["sweep.md", "sweep.csv", "rows.csv", "steps.csv"]


def _ink(png: bytes) -> float:
    """The part of a picture that is not white."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    return float((pixels < 200).mean())


@pytest.mark.slow
def test_a_report_of_a_sweep(make_sweep, tmp_path, capsys, monkeypatch):
    """Tables on stdout, the page's path on stderr; tables do not depend on speeds, nor on where the sweep lies."""
    folder = make_sweep()
    assert cli.main(["report", f"--sweep={folder}"]) == 0
    out, err = capsys.readouterr()
    assert out == (folder / "sweep.md").read_text() and err == f"{folder / 'sweep.html'}\n"
    assert all(_ink((folder / name).read_bytes()) > 0.005 for name in PICTURES)
    page = (folder / "sweep.html").read_text()
    assert page.count("data:image/png;base64,") == len(PICTURES) and "<b>2.5000 ± 0.0000</b>" in page
    assert "10 members in 4 rows: 8 finished, 1 failed, 1 under way" in page and str(tmp_path) not in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)

    monkeypatch.setattr(sweep_page, "_pictures", lambda *_: {})  # once is enough
    other = make_sweep("other")
    for file in other.glob("members/*/metrics.jsonl"):
        file.write_text(file.read_text().replace("2560.0", "2561.0"))
    assert cli.main(["report", f"--sweep={other}", f"--out={tmp_path / 'new'}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["report"] == str(tmp_path / "new/sweep.html") and not (other / "sweep.html").exists()
    assert result["rows"][2]["cells"]["metrics.eval/nll"]["value"] == {"mean": 2.5, "error": 0.0, "seeds": 2}
    assert result["left_out"][0] == {
        "name": "model=ARMD,seed=2",
        "row": "model=ARMD",
        "seed": 2,
        "status": "failed",
        "reason": "eval: out of memory",
    }
    for name in SAME:
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes(), name
    assert (tmp_path / "new/speed.csv").read_bytes() != (folder / "speed.csv").read_bytes()


@pytest.mark.slow
def test_many_rows_have_a_panel_each(make_sweep):
    """Beyond what one legend can tell apart, every row has its own panel, and axes their own."""
    folder = make_sweep()
    record = json.loads((folder / "sweep.json").read_text())
    members = []
    for number in range(14):
        name = f"model.width={number},order.permute={'scatter' if number % 2 else 'window'}"
        shutil.copytree(folder / "members/model=AR,seed=0", folder / "members" / name)
        values = {"model.width": number // 2, "order.permute": "scatter" if number % 2 else "window"}
        members.append({"name": name, "row": name, "values": values, "seed": None, "overrides": {}})
    record |= {"axes": ["model.width", "order.permute"], "members": members}
    (folder / "sweep.json").write_text(json.dumps(record))
    sweep = sweep_reading.load(folder)
    assert _ink(sweep_pictures.curves(sweep, "steps")) > 0.005
    assert _ink(sweep_pictures.against_axes(sweep, "metrics.eval/nll")) > 0.005
    assert sweep_pictures.against_axes(sweep, "eval.no_such_figure") is None


def _break(folder: pathlib.Path, name: str, content: str | None) -> None:
    file = folder / name
    file.unlink() if content is None else file.write_text(content)


MEMBER = "members/model=AR,seed=0"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("sweep.json", None, r"is not the folder of a sweep \(it has no sweep.json\)"),
        ("sweep.json", "{", r"sweep.json: cannot be read as JSON"),
        ("sweep.json", "[]", r"sweep.json: not what armd sweep writes"),
        ("sweep.json", '{"axes": [], "config": "x.py"}', r"'members' is missing"),
        (
            "sweep.json",
            '{"axes": [], "config": "x.py", "members": [{"name": "../x", "row": "x", "values": {}, "seed": 0}]}',
            r"'../x' is not the name of a folder",
        ),
        (
            "sweep.json",
            json.dumps({"axes": [], "config": "x.py", "members": [{"name": "\ud800", "row": "x", "values": {}}]}),
            r"half a surrogate pair",
        ),
        (
            "sweep.json",
            json.dumps({"axes": [], "config": "x.py", "members": [{"name": "x", "row": "x", "values": {}}] * 2}),
            r"has two members 'x'",
        ),
        (
            "sweep.json",
            '{"axes": [], "config": "x.py", "members": []}',
            r"no member .* finished yet \(it has no members",
        ),
        (f"{MEMBER}/eval.json", "{", r"eval.json: cannot be read as JSON"),
        (f"{MEMBER}/eval.json", "[" * 100_000, r"nested too deeply"),
        (f"{MEMBER}/metrics.jsonl", '{"step": 1}\nnothing\n{"step": 2}\n', r"metrics.jsonl: line 2 of 3 is damaged"),
        (f"{MEMBER}/metrics.jsonl", '{"step": 1.5}\n', r"metrics.jsonl: line 1 has no step"),
        (f"{MEMBER}/config.json", "{}", None),
        (f"{MEMBER}/config.json", '{"model": 3}', r"config.json: "),
        (f"{MEMBER}/member.json", '{"status": "finished"}', r"member.json: not what armd sweep writes"),
        (f"{MEMBER}/member.json", '{"status": "bored", "done": []}', r"status='bored': expected finished or failed"),
        (f"{MEMBER}/eval.json", '{"elbo": [1], "left_to_right": null, "x": 1e999}', None),
        (f"{MEMBER}/eval.json", '{"x": ' + "9" * 400 + "}", None),
    ],
)
def test_what_is_damaged_is_one_line(make_sweep, capsys, monkeypatch, name, content, reason):
    """Exit code 2, the file and what is wrong with it; nothing is written. A number that is none is no figure."""
    folder = make_sweep()
    _break(folder, name, content)
    monkeypatch.setattr(sweep_page, "_pictures", lambda *_: {})  # drawing is not what this is about
    code = cli.main(["report", f"--sweep={folder}"])
    out, err = capsys.readouterr()
    assert code == (0 if reason is None else 2)
    if reason is not None:
        assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ") and re.search(reason, err), err
        assert not (folder / "sweep.html").exists()


def test_nothing_finished_and_other_mistakes(make_sweep, capsys, tmp_path):
    """One line says how far the sweep is; the flags of sweeps are not for runs; a folder that is none."""
    folder = make_sweep()
    for file in folder.glob("members/*/member.json"):
        file.unlink()
    shutil.rmtree(folder / MEMBER)
    lost = make_sweep("lost")
    for file in lost.glob("members/*/metrics.jsonl"):
        file.unlink()
    empty = make_sweep("empty")
    for run in empty.glob("members/*"):
        for file in ("config.json", "eval.json"):
            (run / file).unlink()
        (run / "metrics.jsonl").write_text("")
    for line, reason in [
        (f"--sweep={folder}", "no member of the sweep is finished yet (1 not begun, 9 under way)"),
        (f"--sweep={lost}", "no member of the sweep is finished yet (9 under way, 1 failed)"),
        (f"--sweep={empty}", "the finished members of the sweep have no figures"),
        (f"--sweep={tmp_path / 'none'}", "there is no such folder"),
        (f"--run={folder} --metric=x", "--metric is for the report of a sweep, and needs --sweep=DIR"),
        (f"--run={folder} --sweep={folder}", "not allowed with argument"),
    ]:
        assert cli.main(["report", *line.split()]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and reason in err
    assert not (folder / "sweep.html").exists()
