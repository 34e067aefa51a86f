"""Pictures that show something, and a report that stands alone."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from observe_demo_run import PROMPTS, build, picture, routing_maps
from PIL import Image

from ecdit_train import run_folder as folder
from ecdit_train.errors import RunFolderError
from ecdit_train.observe import figures
from ecdit_train.observe.charts import Curve, line_chart, smooth
from ecdit_train.observe.curves import CHOSEN, MAX_ROWS, charts, columns
from ecdit_train.observe.explorer import pack
from ecdit_train.observe.figures import allocation_heatmap, allocation_layers, sample_grid
from ecdit_train.observe.page import short
from ecdit_train.observe.report import MAX_GRIDS, write_report


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(float)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("runs") / "demo", steps=500, grids=3)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_sample_grid_enlarges_without_blur_and_writes_captions(tmp_path: Path) -> None:
    images = np.stack([picture(n, noise=0.1) for n in range(5)])
    grid = pixels(sample_grid(images, PROMPTS[:5], tmp_path / "a.png", columns=3))
    gap = 12
    assert grid.shape[1] == gap + 3 * (128 + gap)
    np.testing.assert_array_equal(grid[gap + 2 : gap + 126 : 4, gap + 2 : gap + 126 : 4], images[0][:31, :31])
    below = grid[gap + 128 + 4 : gap + 128 + 20, gap : gap + 128]
    assert below.std() > 20  # text
    plain = pixels(sample_grid(images, [""] * 5, tmp_path / "b.png", columns=3))
    assert plain[gap + 128 + 4 : gap + 128 + 16, gap : gap + 128].std() == 0


def test_sample_grid_leaves_large_pictures_alone(tmp_path: Path) -> None:
    large = np.zeros((1, 256, 256, 3), np.uint8)
    assert pixels(sample_grid(large, ["x"], tmp_path / "a.png")).shape[1] < 256 + 60


def test_figures_show_something(tmp_path: Path) -> None:
    maps = routing_maps(100)
    for path in (
        allocation_heatmap(maps, tmp_path / "steps.png"),
        allocation_layers(maps, tmp_path / "layers.png", timestep=0, images=(0, 2)),
    ):
        image = pixels(path)
        assert min(image.shape[:2]) > 200
        assert image.std() > 10


def test_heatmap_differs_where_counts_differ(tmp_path: Path) -> None:
    """One patch of one map raised: only that panel (and the scale) may change."""
    maps = routing_maps(100)
    before = pixels(allocation_heatmap(maps, tmp_path / "a.png"))
    top = int(maps.counts[:, :, 0].max())
    place = np.argwhere(maps.counts[-1, 0, 0] < top)[0]
    maps.counts[-1, 0, 0][tuple(place)] = top
    after = pixels(allocation_heatmap(maps, tmp_path / "b.png"))
    changed = np.abs(before - after).sum(-1) > 0
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert changed.any()
    assert rows.max() - rows.min() < 40  # a panel of 8 x 8 patches is about 195 pixels
    assert columns.max() - columns.min() < 40


def test_all_panels_share_one_colour_scale_from_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def keep(figure: object) -> bytes:
        drawn.append(figure)
        return b""

    monkeypatch.setattr(figures, "png_of", keep)
    maps = routing_maps(100)
    for most, limits in ((6, (-0.5, 6.5)), (40, (0, 40))):  # one colour per count, then a continuous scale
        maps.counts[:] = 1
        maps.counts[0, 0, 0, 0, 0] = most
        allocation_heatmap(maps, tmp_path / "a.png")
        heat = [i for axes in drawn.pop().axes for i in axes.images if i.get_cmap().name == figures.HEAT]
        assert len(heat) == 3 * 5
        assert {i.get_clim() for i in heat} == {limits}


def test_a_prompt_is_text_and_not_mathematics(tmp_path: Path) -> None:
    maps = routing_maps(100)
    odd = type(maps)(**{**vars(maps), "prompts": ("$x_{", "a", "b", "<script>alert(1)</script>")})
    allocation_heatmap(odd, tmp_path / "a.png")


# --- charts ----------------------------------------------------------------------------------------------------------


def test_chart_edge_cases() -> None:
    def chart(x: list[float], y: list[float]) -> str:
        return line_chart([Curve(label="<l>", x=x, y=y, color="#000")], title="T")

    assert line_chart([], title="T") == ""
    assert chart([], []) == ""
    assert "circle" in chart([5], [1.0])
    assert "&lt;l&gt;" in chart([1, 2], [0.0, 0.0])
    assert "log scale" in chart([1, 2], [1e-4, 1.0])
    long = chart([float(n) for n in range(5000)], [float(n % 7) for n in range(5000)])
    assert len(long) < 60_000
    assert "nan" not in long


def test_numbers_read_well() -> None:
    assert [short(v) for v in (0, 1500, 0.03823, 2.5e-5, 96000.0, 12_345_678, 811.62)] == [
        "0",
        "1,500",
        "0.03823",
        "2.5e-05",
        "96,000",
        "12.35M",
        "811.6",
    ]


def test_smoothing_keeps_a_constant_and_the_length() -> None:
    assert smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    assert smooth([1.0, 5.0]) == [1.0, 5.0]  # nothing to average over
    assert smooth([]) == []


# --- the page --------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.images = 0
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "img"
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "link", "img", "input", "line", "circle", "polyline", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "polyline"):
            assert self.stack.pop() == tag, f"</{tag}> closes nothing"


def parse(page: str) -> Links:
    links = Links()
    links.feed(page)
    assert links.stack == []
    return links


def test_report_is_whole_and_stands_alone(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = path.read_text()
    links = parse(page)
    assert all(v.startswith(("data:image/png;base64,", "#")) or v == "data:," for v in links.found)
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//", page)
    assert "@import" not in page
    assert "url(" not in page
    for step in (166, 333, 500):
        assert f'data-label="step {step:,}"' in page
    assert links.images == 3 + 4 + 1  # grids, one still heatmap per prompt, the layers at one moment
    for text in (
        "demo_shapes",
        "expert_choice",
        "a red circle",
        "two objects",
        "heun",
        "moe/entropy",
        "Is it learning?",
    ):
        assert text in page


def test_report_of_a_run_that_has_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text("experiment: e\n")
    page = write_report(tmp_path).read_text()
    parse(page)
    assert 'id="learning" open hidden' in page


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            "runs",
            "runs: not a run; a run folder holds resolved.yaml, metrics.jsonl or metrics/. Below it: runs/demo, runs/x/deep",
        ),
        ("runs/demo/samples", "not a run; .* Did you mean runs/demo?"),
        ("runs/dmeo", "no such folder; .* Near it: runs/demo"),
        ("runs/demo/resolved.yaml", "not a folder; .* Did you mean runs/demo?"),
        ("sweep", "This is a sweep: `ecdit compare sweep`, or name one of its runs: sweep/a"),
        ("empty", "not a run; .* Near it: "),
    ],
)
def test_what_is_no_run_is_refused(asked: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/demo/samples", "runs/x/deep", "sweep/a", "empty"):
        Path(name).mkdir(parents=True)
    for run in ("runs/demo", "runs/x/deep", "sweep/a"):
        Path(run, "resolved.yaml").write_text("{}")
    Path("sweep/sweep.json").write_text("{}")
    with pytest.raises(RunFolderError, match=said.replace("?", r"\?")):
        write_report(Path(asked))
    assert not list(tmp_path.rglob("report.html"))


def test_report_survives_damage_and_hides_secrets(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "time": 1, "train/loss": 0.5}\n{"step": 2, "time": 2, "train/loss": null}\n{"st'
    )
    (tmp_path / "resolved.yaml").write_text("experiment: <b>x</b>\ncluster: {env: [HF_TOKEN=abcdef]}\n")
    (tmp_path / "routing").mkdir()
    (tmp_path / "routing/step_00000001.npz").write_bytes(b"PK rubbish")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/a.json").write_text("{broken")
    (tmp_path / "evaluation/b.json").write_text('{"<i>k": "<i>v", "s": {"<i>t": {"<i>c": "<i>w"}}}')
    (tmp_path / "evaluation/<i>.json").write_text("{}")
    sample_grid(np.zeros((1, 8, 8, 3), np.uint8), [""], folder.samples_path(tmp_path, step=1))
    folder.samples_path(tmp_path, step=1).with_suffix(".json").write_text('{"prompts": ["\\"><i>"], "sampler": "<i>"}')
    page = write_report(tmp_path).read_text()
    parse(page)
    assert "<b>x</b>" not in page
    assert "<i>" not in page  # names, values, prompts
    assert page.count("&lt;i&gt;") == 10
    assert "abcdef" not in page


def test_what_a_router_of_ones_own_reports_is_drawn(tmp_path: Path) -> None:
    log = [{"step": n, "time": n, "moe/L2/kept": n / 9, "moe/L4/kept": 0.5, "train/toy_loss": 1 / n} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (tmp_path / "resolved.yaml").write_text(
        "moe: {router: {_target_: toy.routers.Toy, share: 0.25, cap: null}, experts: {_target_: e.Gelu}, num_experts: 4}\n"
    )
    page = write_report(tmp_path).read_text()
    parse(page)
    assert '<svg viewBox="0 0 640 280" role="img" aria-label="kept">' in page
    assert 'aria-label="Auxiliary losses"' in page
    assert page.count("</i>layer 2<b>") == 1
    assert ">moe/L{n}/kept<" in page  # what it is called in the log
    assert "router Toy (share 0.25), num_experts 4, experts Gelu" in page


def test_a_long_run_keeps_first_and_last_grid(tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text("{}")
    for step in range(1, MAX_GRIDS + 12):
        sample_grid(np.full((1, 8, 8, 3), step, np.uint8), [""], folder.samples_path(tmp_path, step=step), scale=8)
    page = write_report(tmp_path).read_text()
    assert parse(page).images == MAX_GRIDS
    assert 'data-label="step 1"' in page
    assert f'data-label="step {MAX_GRIDS + 11}"' in page


def test_a_gap_is_drawn_where_a_value_is_not_finite(tmp_path: Path) -> None:
    log = [{"step": n, "time": n, "optim/lr": None if n == 3 else n / 9} for n in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    page = write_report(tmp_path).read_text()
    assert page.count("<polyline") == 2
    found = json.loads(re.search(r'id="data-curves">(.*?)</script>', page)[1])
    assert found["series"]["optim/lr"]["y"][1:4] == [0.22222, None, 0.44444]


def test_a_long_log_keeps_its_largest_values() -> None:
    """Rows of a long log are put together; a spike stays one where the metric is a largest value, and means stay means."""
    log = [{"step": n, "time": n, "optim/grad_norm_max": 1.0, "train/loss": float(n % 2)} for n in range(10 * MAX_ROWS)]
    log[7777]["optim/grad_norm_max"] = 50.0
    found = columns(log)
    assert len(found.steps) == MAX_ROWS
    assert found.steps[-1] == 10 * MAX_ROWS - 1
    assert found.values["optim/grad_norm_max"].count(50.0) == 1
    assert set(found.values["train/loss"]) == {0.5}


def test_everything_that_is_logged_has_a_curve() -> None:
    names = [
        *(
            "train/loss",
            "eval/loss",
            "optim/lr",
            "train/toy_loss",
            "moe/entropy",
            "moe/L2/entropy",
            "moe/L10/entropy",
        ),
        *(
            "moe/dropped_everywhere_frac",
            "diffusion/loss_t0",
            "diffusion/loss_t9",
            "mem/gib",
            "data/bad/Torn",
            "ckpt/step",
            "toy/own",
        ),
    ]
    found = columns([{"step": 1, "time": 0} | dict.fromkeys(names, 1.0)])
    drawn = {key: chart for name in CHOSEN for chart in charts(name, found) for key in chart.keys}
    assert set(names) - set(drawn) == {"moe/entropy"}  # its layers are drawn
    assert list(drawn["moe/L2/entropy"].keys.values()) == ["layer 2", "layer 10"]
    assert drawn["diffusion/loss_t0"] is drawn["diffusion/loss_t9"]
    assert len({c.name for c in drawn.values()}) == len({id(c) for c in drawn.values()})


# --- routing maps of a page ------------------------------------------------------------------------------------------


def test_maps_are_embedded_within_their_bound(run: Path, tmp_path: Path) -> None:
    whole = pack(run)
    assert [e["step"] for e in whole["steps"]] == [333]
    assert whole["note"] == ""
    for step in (100, 200, 300, 400):
        routing_maps(step).save(folder.routing_path(tmp_path, step=step))
    (tmp_path / "routing/step_00000500.npz").write_bytes(b"rubbish")
    one = 5 * 3 * 64  # bytes of a picture
    for room, prompts, steps, times in ((10**6, 4, 4, 5), (4 * one, 2, 2, 5), (one, 1, 1, 5), (one // 2, 1, 1, 2)):
        found = pack(tmp_path, max_bytes=room * 4 // 3 + 1)
        assert sum(len(e["chosen"]) for e in found["steps"]) <= room * 4 // 3 + 8 * steps
        assert [len(e["prompts"]) for e in found["steps"]] == [prompts] * steps
        assert found["steps"][-1]["step"] == 400
        assert len(found["steps"][-1]["timesteps"]) == times
        assert (found["note"] == "") is (room == 10**6)
    assert "1 of 4 prompts, 2 of 5 timesteps, 1 of 4 saved steps" in found["note"]
    assert pack(tmp_path / "none") is None


def test_older_maps_count_without_names(tmp_path: Path) -> None:
    maps = routing_maps(100)
    type(maps)(**{**vars(maps), "chosen": None}).save(folder.routing_path(tmp_path, step=100))
    found = pack(tmp_path)
    entry = found["steps"][0]
    assert entry["chosen"] is None
    counts = np.frombuffer(base64.b64decode(entry["counts"]), np.uint8).reshape(4, 5, 3, 8, 8)
    np.testing.assert_array_equal(counts, np.moveaxis(maps.counts, 2, 0))
    assert "do not name them" in found["note"]


def test_where_compute_goes_is_drawn(tmp_path: Path) -> None:
    table = {"mean": [[2.5], [3.0]], "spread": [[0.25], [None]]}
    kind = {
        "pictures": 8,
        "timesteps": [0.1, 0.9],
        "says": "object patches get more",
        "on_object": table,
        "on_background": table,
    }
    about = {
        "step": 7,
        "weights": "ema",
        "layers": [4],
        "experts": 8,
        "capacity_factor": 2.0,
        "scope": "image",
        "seeds": 3,
    }
    (tmp_path / "resolved.yaml").write_text("{}")
    (tmp_path / "allocation").mkdir()
    for made, shown in (({**about, "kinds": {"true": kind}}, True), ({"kinds": {"true": {}}}, False)):
        folder.allocation_path(tmp_path, step=7).write_text(json.dumps(made))
        page = write_report(tmp_path).read_text()
        parse(page)
        assert ("object patches get more" in page) is shown
        assert ("2.50 ± 0.25" in page) is shown


def test_samples_say_how_they_were_drawn(run: Path) -> None:
    about = json.loads(folder.samples_path(run, step=500).with_suffix(".json").read_text())
    assert set(about) == {"step", "prompts", "guidance", "sampler", "steps", "seed", "scope"}
    assert about["prompts"] == list(PROMPTS)
