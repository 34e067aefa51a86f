"""A project's workspace and report at W&B, as `observe.dashboard` defines them. The only importer of wandb_workspaces.

Both have names that do not change, and are looked for by them, so that applying twice updates the same two views; nothing else of
the project is touched. W&B's own ids of panels are random, ours follow from their place.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces
from wandb_workspaces.workspaces import internal

from .dashboard import Dashboard, Panel
from .wandb_names import slug
from .wandb_run import STEP, report_ids

COLUMNS, WIDTH, HEIGHT = 3, 8, 6
"""Panels in a row of the report's grids of 24, and their size."""


@dataclass(frozen=True, kw_only=True)
class Applied:
    workspace: str
    """Its address."""
    report: str
    updated: bool
    """Whether the workspace was there before."""


def workspace(dashboard: Dashboard, *, entity: str, project: str) -> Any:
    """A wandb_workspaces Workspace."""
    made = workspaces.Workspace(
        entity=entity,
        project=project,
        name=dashboard.name,
        sections=[
            workspaces.Section(
                name=section.name,
                is_open=section.opened,
                panels=[_panel(p, place=f"{n}-{k}") for k, p in enumerate(section.panels)],
            )
            for n, section in enumerate(dashboard.sections)
            if section.panels
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP, max_runs=20),
        runset_settings=workspaces.RunsetSettings(
            pinned_columns=[
                "run:displayName",
                "run:tags",
                "summary:now/step",
                "summary:now/loss",
                "summary:train/loss.min",
            ]
        ),
    )
    made._internal_name = f"nw-{slug(dashboard.name)}-v"
    return made


def report(dashboard: Dashboard, *, entity: str, project: str) -> Any:
    """A wandb_workspaces Report: the open sections, one under the other."""
    blocks: list[Any] = [reports.TableOfContents()]
    for n, section in enumerate(dashboard.sections):
        if not (section.opened and section.panels):
            continue
        runs = reports.Runset(entity="", project="", name="runs")  # those of the report's own project
        runs._id = f"runs-{n}"
        panels = [_panel(panel, place=f"r{n}-{k}") for k, panel in enumerate(section.panels)]
        for k, panel in enumerate(panels):
            panel.layout = reports.Layout(x=k % COLUMNS * WIDTH, y=k // COLUMNS * HEIGHT, w=WIDTH, h=HEIGHT)
        blocks += [reports.H2(section.name), reports.PanelGrid(runsets=[runs], panels=panels)]
    words = "Made by `ecdit dash apply`; a later one replaces it."
    return reports.Report(
        entity=entity, project=project, title=dashboard.report, description=words, blocks=blocks, width="fluid"
    )


def payload(dashboard: Dashboard, *, entity: str, project: str) -> dict[str, Any]:
    """What is sent, as JSON; no network."""
    view, page = (
        workspace(dashboard, entity=entity, project=project)._to_model(),
        report(dashboard, entity=entity, project=project)._to_model(),
    )
    _settle(page.spec.blocks)
    return {
        "workspace": {"name": view.name, "displayName": view.display_name, "spec": _json(view.spec)},
        "report": {"displayName": page.display_name, "description": page.description, "spec": _json(page.spec)},
    }  # fmt: skip


def apply(dashboard: Dashboard, *, entity: str, project: str) -> Applied:
    """Create or update both. Raises what W&B's client does."""
    view = workspace(dashboard, entity=entity, project=project)
    with contextlib.suppress(ValueError):  # it is not there yet, or the project is not
        view._internal_id = internal.get_view_dict(entity, project, slug(dashboard.name))["id"]
    updated = bool(view._internal_id)
    page = report(dashboard, entity=entity, project=project)
    page.id = report_ids(entity=entity, project=project).get(page.title, "")
    page.save()  # makes the project where there is none
    view.save()
    return Applied(workspace=view.url, report=page.url, updated=updated)


def _panel(panel: Panel, *, place: str) -> Any:
    if panel.images:
        made: Any = reports.MediaBrowser(
            title=panel.title, media_keys=list(panel.images), mode="gallery", gallery_axis="step"
        )
    else:
        made = reports.LinePlot(
            title=panel.title,
            x=STEP,
            y=list(panel.names),
            metric_regex=panel.regex,
            log_y=panel.log or None,
            plot_type="stacked-area" if panel.stacked else None,
        )
    made._id = f"ecdit-{place}"
    return made


def _settle(blocks: list[Any]) -> None:
    """Ids that W&B's client draws for itself."""
    for n, block in enumerate(blocks):
        for k, runs in enumerate(getattr(getattr(block, "metadata", None), "run_sets", ())):
            runs.id = f"runs-{n}-{k}"


def _json(spec: Any) -> Any:
    return json.loads(spec.model_dump_json(by_alias=True, exclude_none=True))
