"""A server on loopback that W&B's client takes for W&B: it keeps what it is sent, as the real one does, or is in some trouble."""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "local-" + "0123456789" * 4
"""Has the form of a key; opens nothing."""
HANG_SECONDS = 60.0


@dataclass
class Kept:
    """One run as the server has it."""

    history: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    """Variables of the newest UpsertBucket that created it or began a life."""


@dataclass
class Stub:
    url: str
    trouble: str = ""
    """hang: takes requests and never answers; 500, 429: answers so; drip: a byte a second."""
    runs: dict[str, Kept] = field(default_factory=dict)
    operations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """GraphQL: (operation, variables), in order."""
    views: dict[str, dict[str, Any]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    """Content by name of file."""
    over: threading.Event = field(default_factory=threading.Event)

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = query.split("(")[0].split("{")[0].split()[-1]
        self.operations.append((name, variables))
        answer = getattr(self, f"_{name}", None)
        return answer(variables) if answer is not None else {}

    def _Viewer(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "admin": False,
                           "teams": {"edges": []}}}  # fmt: skip

    def _ServerFeaturesQuery(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _ServerInfo(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "latestLocalVersionInfo": None}}

    def _RunResumeStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        bucket = None
        if (run := self.runs.get(v["name"])) is not None:
            tail = json.dumps([json.dumps(row) for row in run.history[-1:]])
            bucket = {"id": v["name"], "name": v["name"], "summaryMetrics": json.dumps(run.summary), "displayName": "d",
                      "logLineCount": 0, "historyLineCount": len(run.history), "eventsLineCount": len(run.events),
                      "historyTail": tail, "eventsTail": "[]", "config": "{}", "tags": [], "notes": "",
                      "wandbConfig": json.dumps({"t": 1})}  # fmt: skip
        return {"model": {"id": "m", "name": v["project"], "entity": {"id": "e", "name": "me"}, "bucket": bucket}}

    def _UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
        run, fresh = self.runs.setdefault(v["name"], Kept()), v["name"] not in self.runs
        run.asked |= {key: value for key, value in v.items() if value is not None}
        bucket = {"id": v["name"], "name": v["name"], "displayName": v.get("displayName") or "d", "description": "",
                  "config": "{}", "sweepName": None, "historyLineCount": len(run.history),
                  "project": {"id": "p", "name": v.get("project") or "p", "entity": {"id": "e", "name": "me"}}}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": fresh}}

    def _CreateRunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def _CreateArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        """As one whose content is there already."""
        sequence = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}
        return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}

    def _GetDefaultEntity(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": "me"}}

    def _GetProjects(self, v: dict[str, Any]) -> dict[str, Any]:
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        node = {"__typename": "Project", "id": "p", "name": "p", "entityName": "me", "createdAt": "2026-01-01T00:00:00",
                "isBenchmark": False, "user": None}  # fmt: skip
        return {"models": {"pageInfo": page, "edges": [{"node": node}]}}

    def _ProjectViews(self, v: dict[str, Any]) -> dict[str, Any]:
        found = [{"node": view, "cursor": "c"} for view in self.views.values() if view["type"] == "runs"]
        return {"project": {"allViews": {"edges": found, "pageInfo": {"endCursor": None, "hasNextPage": False}}}}

    def _View(self, v: dict[str, Any]) -> dict[str, Any]:
        found = [view for view in self.views.values() if view["name"] == v["viewName"]]
        return {"project": {"allViews": {"edges": [{"node": view} for view in found]}}}

    def _upsertView(self, v: dict[str, Any]) -> dict[str, Any]:
        """By id, else a new one: an id that changes with each call would be a view more."""
        identity = v.get("id") or f"view{len(self.views)}"
        view = {"id": identity, "type": v["type"], "name": v["name"], "displayName": v["displayName"], "spec": v["spec"],
                "description": v["description"], "project": {"id": "p", "name": v["projectName"], "entityName": "me"},
                "createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00", "user": None,
                "previewUrl": None, "coverUrl": None, "viewCount": 0, "starCount": 0}  # fmt: skip
        fresh, self.views[identity] = identity not in self.views, view
        return {"upsertView": {"view": view, "inserted": fresh}}

    _UpsertView2 = _upsertView

    def stream(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        """Lines at an offset, as W&B keeps them: those that are there already are replaced."""
        kept = self.runs.setdefault(run, Kept())
        for name, chunk in (body.get("files") or {}).items():
            rows = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":
                kept.history[chunk["offset"] : chunk["offset"] + len(rows)] = rows
            elif name == "wandb-events.jsonl":
                kept.events += rows
            elif name == "wandb-summary.json":
                kept.summary = rows[-1]
        return {"exitcode": None, "limits": {}}


def _handler(stub: Stub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def do_GET(self) -> None:
            self._answer({})

        def do_PUT(self) -> None:
            stub.uploads[self.path.removeprefix("/upload/")] = self._body()
            self._answer({})

        def do_POST(self) -> None:
            body = json.loads(self._body() or b"{}")
            if stub.trouble == "hang":
                stub.over.wait(HANG_SECONDS)
            if stub.trouble in ("500", "429"):
                self._answer({"errors": [{"message": "in trouble"}]}, code=int(stub.trouble))
            elif "graphql" in self.path:
                self._answer({"data": stub.graphql(body["query"], body.get("variables") or {})})
            elif "file_stream" in self.path:
                self._answer(stub.stream(self.path.split("/")[-2], body))
            else:
                self._answer({})

        def _body(self) -> bytes:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

        def _answer(self, content: dict[str, Any], *, code: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for byte in range(0, len(data), 1 if stub.trouble == "drip" else len(data)):
                self.wfile.write(data[byte : byte + (1 if stub.trouble == "drip" else len(data))])
                if stub.trouble == "drip" and stub.over.wait(1):
                    return

    return Handler


@contextmanager
def serving(trouble: str = "") -> Iterator[Stub]:
    stub = Stub(url="", trouble=trouble)

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None: ...

    server = Quiet(("127.0.0.1", 0), _handler(stub))
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield stub
    finally:
        stub.over.set()
        server.shutdown()
        server.server_close()


def wait_for(condition: Any, *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())
