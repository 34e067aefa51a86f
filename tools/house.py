"""House rules that no linter knows: `python tools/house.py [--fix]`, run by `make lint`. Exit code 1 when one is broken.

1. No Python file is longer than 400 lines: past that it wants to be two.
2. A vendor is imported where the table below says and nowhere else in shipped code, so its quirks have one home.
3. No paragraph of a docstring ends in a line of up to three words. `--fix` wraps those paragraphs anew, and those with lines that
   ruff finds too long (it reports them itself).

Import layers are import-linter's; the rest of the style is ruff's and mypy's.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_LINES = 400
WIDTH = 120
ORPHAN_WORDS = 3
TOO_LONG = 132
"""What ruff allows a docstring (pyproject.toml)."""

OWN = ("ecdit_train", "data_pipeline", "launch")
EVERYWHERE = {"torch", "numpy", "einops"}
"""What the code is written in, not a vendor that is called at one seam."""

VENDORS: dict[str, tuple[str, ...]] = {
    "megatron": ("ecdit_train/parallel/tensor_parallel.py",),
    "deepspeed": ("ecdit_train/parallel/expert_parallel.py",),
    "transformers": ("ecdit_train/diffusion/encoders/t5.py",),
    # Its autoencoder, and what makes our network one of its pipelines.
    "diffusers": (
        "ecdit_train/diffusion/encoders/kl.py",
        *(f"ecdit_train/export/{name}.py" for name in ("transformer", "scheduler", "pipeline")),
    ),
    "huggingface_hub": ("ecdit_train/export/weights.py",),
    "safetensors": ("ecdit_train/diffusion/encoders/local_folder.py",),
    "wandb": ("ecdit_train/observe/wandb_run.py",),
    "wandb_workspaces": ("ecdit_train/observe/wandb_views.py",),
    "tensorboard": ("ecdit_train/observe/tensorboard_sink.py",),
    "matplotlib": ("ecdit_train/observe/figures.py",),
    "jinja2": ("ecdit_train/observe/page.py", "data_pipeline/preparing/page.py"),
    "markupsafe": ("ecdit_train/observe/page.py",),  # jinja2's own strings
    # A live bar, and tables as text.
    "rich": ("ecdit_train/observe/console.py", "ecdit_train/plan/document.py", "data_pipeline/preparing/progress.py"),
    "pydantic": ("ecdit_train/config/convert.py",),
    "hydra": ("ecdit_train/config/hydra_app.py", "ecdit_train/config/overrides.py", "hydra_plugins/ecdit_launchers.py"),
    "omegaconf": (
        *("ecdit_train/config/hydra_app.py", "ecdit_train/config/stored.py"),
        *("ecdit_train/config/installed.py", "ecdit_train/observe/tables.py"),
    ),
    "yaml": (
        *("ecdit_train/config/hydra_app.py", "ecdit_train/config/stored.py", "ecdit_train/config/validate.py"),
        "ecdit_train/observe/dashboard.py",
    ),
    "scipy": (
        "data_pipeline/shapes/grader.py",
        "data_pipeline/preparing/fingerprints.py",
        "data_pipeline/preparing/dedup.py",
    ),
    "isal": ("data_pipeline/checksum.py",),
    "obstore": ("data_pipeline/store/remote.py",),
    "braceexpand": ("data_pipeline/store/place.py", "data_pipeline/urls.py"),
    # A codec is two halves: what is read in training, and what is written when shards are made.
    "simplejpeg": ("data_pipeline/decode.py", "data_pipeline/preparing/pixels.py"),
    "cv2": ("data_pipeline/decode.py", "data_pipeline/preparing/pixels.py"),
    # The data pipeline stands alone, so the report cannot share its import.
    # Opens, and draws.
    "PIL": ("data_pipeline/decode.py", "ecdit_train/observe/figures.py", "ecdit_train/evaluate/masked.py"),
    # Writes our tars; reads those that nobody has indexed; our order as its first stage.
    "webdataset": (
        "data_pipeline/preparing/tarring.py",
        "data_pipeline/url_samples.py",
        "data_pipeline/exact_source.py",
    ),
    "nvidia": ("data_pipeline/dali.py",),
    "triton": ("ecdit_train/kernels/language.py",),
    "transformer_engine": ("ecdit_train/model/te_products.py",),
    "duckdb": ("data_pipeline/preparing/duck.py",),
    "ray": ("data_pipeline/preparing/on_ray.py",),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A broken rule; `line` counts from 1."""

    path: Path
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}"


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Prose of a docstring at the docstring's own indentation: lines `first` to `last` of the file, from 0."""

    first: int
    last: int

    def is_orphan(self, lines: list[str]) -> bool:
        return self.last > self.first and ends_alone(lines[self.last])

    def is_too_long(self, lines: list[str]) -> bool:
        return any(len(line) > TOO_LONG for line in lines[self.first : self.last + 1])


def check(root: Path) -> list[Problem]:
    """Every broken rule in the Python files under `root`, by file and line."""
    problems = []
    for path in python_files(root):
        text = path.read_text(encoding="utf-8")
        tree, lines, where = ast.parse(text), text.splitlines(), path.relative_to(root)
        if len(lines) > MAX_LINES:
            rule = f"{len(lines)} lines; at most {MAX_LINES}, one idea a file"
            problems.append(Problem(path=where, line=MAX_LINES + 1, rule=rule))
        if where.parts[0] in OWN:
            problems += strangers(tree, where=where)
        for part in misfits(tree, lines):
            if not part.is_orphan(lines):
                continue
            rule = f"a docstring's paragraph ends in {lines[part.last].strip()!r}; wrap it anew (--fix)"
            problems.append(Problem(path=where, line=part.last + 1, rule=rule))
    return sorted(problems, key=lambda problem: (str(problem.path), problem.line))


def python_files(root: Path) -> Iterator[Path]:
    """In order; hidden folders, virtual environments and build outputs left out."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part.startswith(".") or part in ("build", "venv") for part in parts):
            yield path


def strangers(tree: ast.Module, *, where: Path) -> list[Problem]:
    """Imports, at the top or inside functions, of packages that have another home."""
    problems = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        for name in {name.partition(".")[0] for name in names}:
            if (
                name in sys.stdlib_module_names
                or name in OWN
                or name in EVERYWHERE
                or str(where) in VENDORS.get(name, ())
            ):
                continue
            homes = " or ".join(VENDORS.get(name, ())) or (
                "no shipped file" if name in VENDORS else "a file of its own"
            )
            rule = f"imports {name}, whose home is {homes} (table in tools/house.py)"
            problems.append(Problem(path=where, line=node.lineno, rule=rule))
    return problems


def misfits(tree: ast.Module, lines: list[str]) -> list[Paragraph]:
    """Paragraphs whose last line is nearly empty, or with a line that is too long, in the file's order."""
    found: list[Paragraph] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and lines[node.lineno - 1].lstrip().startswith('"""'):
            found += [part for part in paragraphs(node, lines) if part.is_orphan(lines) or part.is_too_long(lines)]
    return sorted(found, key=lambda part: part.first)


def ends_alone(line: str) -> bool:
    return len(words_of(line)) <= ORPHAN_WORDS


def words_of(line: str) -> list[str]:
    return line.replace('"""', "").split()


def paragraphs(statement: ast.Expr, lines: list[str]) -> Iterator[Paragraph]:
    """Runs of prose lines; tables, lists, `Args:` blocks and anything indented deeper are not prose."""
    assert statement.end_lineno is not None
    margin, run = statement.col_offset, list[int]()
    for number in range(statement.lineno - 1, statement.end_lineno + 1):
        line = lines[number] if number < statement.end_lineno else ""  # an empty line ends the last run too
        indent = len(line) - len(line.lstrip())
        if words_of(line) and indent == margin:
            run.append(number)
            continue
        prose = not any(re.search(r"^\s*(?:[-*·] |\d+\. |\w+:$)|\S {2,}\S|\\$", lines[n]) for n in run)
        if run and prose and not (words_of(line) and indent > margin):
            yield Paragraph(first=run[0], last=run[-1])
        run = []


def rewrap(lines: list[str], part: Paragraph) -> list[str]:
    """The paragraph in as many lines, or fewer, at the largest width up to 120 that leaves no orphan."""
    old = lines[part.first : part.last + 1]
    margin = old[0][: len(old[0]) - len(old[0].lstrip())]
    text = re.sub(r" ([=/+*-]) ", "\0\\1\0", " ".join(line.strip() for line in old))  # a formula stays in one piece
    for width in range(WIDTH, WIDTH // 2, -1):
        new = textwrap.wrap(
            text, width, initial_indent=margin, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False
        )
        if len(new) == 1 or not ends_alone(new[-1]):
            return [line.replace("\0", " ") for line in new]
    return old


def fix(root: Path) -> list[Path]:
    """Rewrites the files that have orphans; returns them. Wrapping changes no word of a docstring, only line ends."""
    changed = []
    for path in python_files(root):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for part in reversed(misfits(ast.parse(text), lines)):
            lines[part.first : part.last + 1] = rewrap(lines, part)
        new = "\n".join(lines) + "\n" if lines else ""
        if new != text:
            path.write_text(new, encoding="utf-8")
            changed.append(path.relative_to(root))
    return changed


def main(argv: list[str]) -> int:
    if argv not in ([], ["--fix"]):
        print("usage: python tools/house.py [--fix]", file=sys.stderr)
        return 2
    for path in fix(ROOT) if argv else ():
        print(f"{path}: docstrings wrapped anew")
    problems = check(ROOT)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} house rules broken" if problems else "house rules kept")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
