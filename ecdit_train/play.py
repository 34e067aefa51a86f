"""`ecdit play RUN`: type a prompt, see the picture come out of noise with the experts' map over it. On 127.0.0.1, for one person.

One drawing at a time: a new one ends the one before. The page asks for what it has not seen yet, so a slow line loses nothing.
"""

from __future__ import annotations

import base64
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ecdit_train.config.nearest import closest
from ecdit_train.errors import ConfigError, EcditError
from ecdit_train.evaluate.pictures import Frame
from ecdit_train.observe.figures import small_picture
from ecdit_train.observe.loopback import Reply, Server
from ecdit_train.observe.page import render
from ecdit_train.opened import OpenRun

MAX_PROMPT, MAX_STEPS = 2000, 1000
MAX_FRAMES = 60
"""Frames of a drawing that are sent; of more steps an even choice, first and last included."""
PATIENCE = 0.5
"""Seconds that an answer waits for something new."""
SAME_T = 1e-6


class Ended(Exception):  # noqa: N818 - no error: another drawing was asked for
    """The drawing is not wanted any more."""


@dataclass
class Drawing:
    """What has come of one request. Events are only added; `place` says which timestep an event is of."""

    number: int
    events: list[dict[str, Any]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    wanted: bool = True

    def add(self, **event: Any) -> None:
        with self.changed:
            self.events.append(event)
            self.changed.notify_all()

    def since(self, seen: int, *, patience: float) -> list[dict[str, Any]]:
        with self.changed:
            self.changed.wait_for(lambda: len(self.events) > seen, timeout=patience)
            return self.events[seen:]


class Playground:
    """Answers the page. Any thread may ask; drawings are made one after the other in threads of their own."""

    def __init__(self, run: OpenRun) -> None:
        self.run = run
        self.key = secrets.token_urlsafe(16)
        """In the page: a page of another origin cannot read it, so it cannot start a drawing."""
        self._model = threading.Lock()
        self._now = Drawing(number=0, wanted=False)
        self._lock = threading.Lock()

    def server(self, *, port: int = 0) -> Server:
        """Raises EcditError: the port cannot be had."""
        return Server(self.answer, port=port)

    def end(self) -> None:
        """A drawing that goes on ends at its next step."""
        self._now.wanted = False

    def answer(self, path: str, query: Mapping[str, str]) -> Reply | None:
        if path == "/":
            return Reply(body=self.page())
        if path not in ("/start.json", "/events.json") or not self._ours(query):
            return None
        return Reply.of(self.start(query) if path == "/start.json" else self.events(query))

    def _ours(self, query: Mapping[str, str]) -> bool:
        return secrets.compare_digest(query.get("key", "").encode(), self.key.encode())

    def page(self) -> str:
        c = self.run.config
        how = c.sample
        about = {
            "key": self.key,
            "run": self.run.folder.resolve().name,
            "guidance": how.guidance,
            "steps": how.steps,
            "seed": how.seed,
            "scope": how.scope,
            "scopes": [] if c.moe.router is None else self._scopes(),
            "group": max(1, how.group_size // c.patches_per_image),
            "prompts": list(c.observe.prompts)[:8],
            "max_prompt": MAX_PROMPT,
            "max_steps": MAX_STEPS,
            "sparse": c.moe.router is not None,
            "layers": list(c.sparse_layers),
            "experts": c.moe.num_experts,
            "budget": 0 if c.moe.router is None else c.moe.router.at(self.run.step).experts_per_token(),
            "side": c.latent_side // c.model.patch,
            "step": self.run.step,
        }
        return render("play.html", title=about["run"], about=about, data={"play": about})

    def _scopes(self) -> list[str]:
        """One picture at a time is drawn: `batch` is `image`, and `group` fills up with copies of it."""
        return ["image", "group"]

    def start(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """A new drawing, or what is wrong with what was asked for. The one before ends at its next step."""
        try:
            prompt, how = _request(asked)
        except ConfigError as error:
            return {"error": str(error)}
        with self._lock:
            self._now.wanted = False
            drawing = self._now = Drawing(number=self._now.number + 1)
        threading.Thread(target=self._draw, args=(drawing, prompt, how), name="draw", daemon=True).start()
        return {"drawing": drawing.number}

    def events(self, asked: Mapping[str, str]) -> dict[str, Any]:
        """What has happened since the page last asked; `drawing` is another number where another one goes on."""
        now = self._now
        seen = _whole(asked.get("seen", "0")) if asked.get("drawing") == str(now.number) else 0
        return {"drawing": now.number, "events": now.since(seen, patience=PATIENCE)}

    def _draw(self, drawing: Drawing, prompt: str, how: Mapping[str, Any]) -> None:
        places: list[float] = []

        def seen(frame: Frame) -> None:
            if not drawing.wanted:
                raise Ended
            again = bool(places) and abs(places[-1] - frame.t) < SAME_T  # Heun looks at most timesteps twice
            if not again:
                places.append(frame.t)
            place = len(places) - 1
            if place % every == 0 or place == steps - 1:
                drawing.add(kind="frame", place=-(-place // every), **_told(frame))

        try:
            with self._model:  # the one before has seen that it is not wanted
                if not drawing.wanted:
                    return
                steps = int(how.get("steps") or self.run.config.sample.steps)
                every = -(-steps // MAX_FRAMES)
                began = time.monotonic()
                unknown = [_words(u.word, u.nearest) for u in self.run.unknown_words(prompt)]
                drawing.add(kind="begun", prompt=prompt, steps=steps, unknown=unknown)
                drawn = self.run.draw(prompt, on_frame=seen, timesteps=1, **how)
                drawing.add(kind="done", picture=small_picture(drawn.images[0]), seconds=time.monotonic() - began)
        except Ended:
            drawing.add(kind="ended")
        except EcditError as error:
            drawing.add(kind="error", words=str(error))
        except Exception as error:
            drawing.add(kind="error", words=f"{type(error).__name__}: {error}")
            raise


def _told(frame: Frame) -> dict[str, Any]:
    """Of the one picture. Experts lie as (L, side, side, bytes)."""
    found: dict[str, Any] = {"t": round(float(frame.t), 4), "picture": small_picture(frame.images[0])}
    if frame.chosen is not None:
        found["chosen"] = base64.b64encode(frame.chosen[:, 0].tobytes()).decode()
    return found


def _request(asked: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """(prompt, what differs from the run's `sample` section). Raises ConfigError with every problem."""
    from ecdit_train.errors import Problem

    prompt, how, problems = asked.get("prompt", "").strip(), dict[str, Any](), []
    if not prompt or len(prompt) > MAX_PROMPT:
        problems.append(Problem(field="prompt", value=f"{len(prompt)} characters", rule=f"needs 1 to {MAX_PROMPT}"))
    bounds = {"guidance": (float, 0.0, 100.0), "steps": (int, 1, MAX_STEPS), "seed": (int, 0, 2**31 - 1)}
    for name, (kind, low, high) in bounds.items():
        text = asked.get(name, "")
        try:
            value = kind(text) if text else None
        except ValueError:
            value = float("nan")
        if value is not None and not low <= value <= high:
            nearest = low if value != value or value < low else high
            problems.append(Problem(field=name, value=text, rule=f"is {low} to {high}", nearest=nearest))
        elif value is not None:
            how[name] = value
    if scope := asked.get("scope", ""):
        if scope not in ("image", "group"):
            near = closest(scope, ("image", "group"))
            problems.append(Problem(field="scope", value=scope, rule="is image or group", nearest=near))
        how["scope"] = scope
    if problems:
        raise ConfigError(problems)
    return prompt, how


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _words(word: str, nearest: str | None) -> dict[str, str | None]:
    return {"word": word, "nearest": nearest}
