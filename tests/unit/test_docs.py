"""Documents say what the code does: generated pages, links, commands, configuration words, examples.

Nothing is trained and nothing is written outside tmp_path; the slow parts of a verb are never reached.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ecdit_train import arguments, checkpoint_verbs, cli, data_words, drawing, submit_verbs
from ecdit_train.config import compat, compose, describe, installed, stored, validate
from ecdit_train.errors import EcditError

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {".venv", ".git", "runs", "data", "build", "node_modules"}


def markdown() -> list[Path]:
    """Every page of the repository, hidden and installed ones left out."""
    return sorted(
        p
        for p in ROOT.rglob("*.md")
        if not any(
            part in SKIPPED or part.startswith(".") or part.endswith(".egg-info") for part in p.relative_to(ROOT).parts
        )
    )


PAGES = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in markdown()}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def fences(page: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(PAGES[page]) if language in languages]


def prose(page: str) -> str:
    """The text without code blocks."""
    return FENCE.sub("", PAGES[page])


SHELL = ("", "bash", "sh", "shell", "console")


def command_lines() -> Iterator[tuple[str, str]]:
    """(page, line) of every ecdit command in a fenced or an indented block."""
    for page in PAGES:
        indented = re.findall(r"^    (?=ecdit )(.*)$", prose(page), flags=re.MULTILINE)
        for body in [*fences(page, *SHELL), *indented]:
            for line in body.replace("\\\n", " ").splitlines():
                kept = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line.strip().removeprefix("$ "))  # name=$(ecdit ...)
                kept = re.sub(r'"\$\w+"', "4711", kept)
                words = re.sub(r"^(\w+=\S+ )*(\.venv/bin/)?ecdit ", "ecdit ", kept)
                if words.startswith("ecdit "):
                    yield page, words.split(" #")[0].strip()


COMMANDS = sorted(set(command_lines()))


# --- generated pages -------------------------------------------------------------------------------------------------


@functools.cache
def generator():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date():
    assert generator().stale() == [], "run `python docs/generate.py` and read the diff"


def test_a_stale_page_is_noticed(tmp_path, monkeypatch):
    module = generator()
    monkeypatch.setattr(module, "REFERENCE", tmp_path)
    assert module.main([]) == 0
    assert module.stale() == []
    (tmp_path / "metrics.md").write_text("something else")
    assert module.main(["--check"]) == 1
    assert module.stale() == ["metrics.md"]


def test_no_exit_code_has_two_meanings():
    codes = [error.exit_code for error in generator().error_classes()]
    assert len(codes) == len(set(codes)), codes


def test_every_page_can_be_reached_from_the_index():
    reached, todo = set(), [ROOT / "docs" / "README.md"]
    while todo:
        page = todo.pop()
        reached.add(page)
        targets = [(page.parent / t.partition("#")[0]).resolve() for t in links(str(page.relative_to(ROOT)))]
        targets += [inner for t in targets if t.is_dir() for inner in t.glob("*.md")]
        todo += [t for t in targets if t.suffix == ".md" and t.is_file() and t not in reached and t not in todo]
    lost = {p for p in PAGES if p.startswith("docs/")} - {str(p.relative_to(ROOT)) for p in reached}
    assert not lost


# --- links and paths -------------------------------------------------------------------------------------------------


def links(page: str) -> list[str]:
    """Relative link targets."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))
    found += re.findall(r"<(?:img|a)[^>]*?(?:src|href)=\"([^\"]+)\"", prose(page))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Heading ids, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text), flags=re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head) for head in heads)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES)
def test_paths_in_the_text_exist(page):
    """`ecdit_train/...`, `tests/...` and the like, in backticks."""
    rooms = "ecdit_train|data_pipeline|launch|conf|tests|docs|benchmarks|docker"
    named = re.findall(rf"`((?:{rooms})/[\w./-]*)`", prose(page))
    missing = [path for path in named if not (ROOT / path).exists() and path not in CREATED_BY_USERS]
    assert not missing


CREATED_BY_USERS = {"conf/local/", "conf/local/default.yaml"}


def test_nothing_points_outside_the_repository():
    for page, text in PAGES.items():
        assert not re.search(r"\.\./shared|/work/|/root/|/home/\w", text), page


# --- commands --------------------------------------------------------------------------------------------------------


def test_there_are_commands_to_check():
    verbs = {line.split()[1] for page, line in COMMANDS if page.startswith("docs/")}
    assert verbs >= {"train", "resume", "sample", "evaluate", "report", "plan", "launch", "data", "ckpt", "merge"}


@pytest.fixture
def looking(monkeypatch, example_folder):
    """A working directory as the pages suppose it: their files, and run folders where a command names one."""
    monkeypatch.chdir(example_folder)
    (example_folder / "prompts.txt").write_text("a photo of a red circle\n")


def check_command(line: str) -> None:
    """Parse with the real parser; compose and validate its configuration words. Raises what a user would see."""
    words = shlex.split(line)[1:]
    if words[-1] == "--help":
        with pytest.raises(SystemExit, match="0"):
            cli.make_parser().parse_args(words)
        return
    args = parsed(words)
    name = args.verb.__name__
    if name == "doctor" and args.overrides and "=" not in args.overrides[0]:
        run_folder(args.overrides.pop(0))
    if name == "submit":
        check_composed(args, submit_verbs.cluster_words(args))
        check_command(shlex.join(["ecdit", *args.line]))
    elif name in ("data_shapes", "data_pack", "data_filter", "data_dedup", "data_buckets", "data_report"):
        kind = getattr(data_words, name.removeprefix("data_").capitalize())
        arguments.read(kind, args.words, alone=True).build(kind)
    elif name == "data_stats" and (len(args.what) > 1 or "=" in args.what[0]):
        compose.compose(args.what, local=False, config_dir=args.config_dir)
    elif name == "data_encode":
        request = arguments.read(data_words.Encode, args.words)
        request.build(data_words.Encode)
        compose.compose(request.rest, local=False)
    elif name == "merge":
        arguments.read(arguments.Merge, args.words, alone=True).build(arguments.Merge)
    elif name == "verify":
        arguments.read(arguments.Verify, args.words, alone=True).build(arguments.Verify)
    elif name in ("export", "upcycle"):
        kind = arguments.Export if name == "export" else arguments.Upcycle
        sections = arguments.DRAWN_WITH if name == "export" else checkpoint_verbs.UPCYCLED_WITH
        run_folder(arguments.read(kind, args.words).values.get("run", ""))
        arguments.about_a_run(kind, args.words, sections=sections, config_dir=args.config_dir)
    elif name in ("sample", "evaluate", "allocation"):
        kind = {
            "sample": arguments.Sample,
            "evaluate": arguments.Evaluate,
            "allocation": arguments.Allocation,
        }[name]
        run_folder(arguments.read(kind, args.words).values.get("run", ""))
        drawing.drawing_request(kind, args)
    elif name == "resume":
        old = stored.load(run_folder(args.run))
        changed = compose.override(old, args.overrides, world=args.nproc)
        compat.check_resume(old, changed.config, allow=changed.explicit)
    elif name == "slots":
        assert all(
            c.broken is None for found in installed.installed(config_dir=args.config_dir).values() for c in found
        )
    elif hasattr(args, "overrides"):
        sweep = getattr(args, "multirun", False)
        for job in compose.expand(args.overrides, config_dir=args.config_dir) if sweep else [args.overrides]:
            check_composed(args, job)


def check_composed(args: argparse.Namespace, words: list[str]) -> None:
    name = args.verb.__name__
    config = compose.compose(words, local=False, config_dir=args.config_dir)
    gpus = config.cluster.nodes * config.cluster.gpus_per_node
    world = {"train": args.nproc, "launch": gpus, "plan": getattr(args, "world", None) or gpus}.get(name)
    validate.validate(config, world=world)
    if name == "config_explain":
        describe.explain(args.key, config, groups=compose.groups(config_dir=args.config_dir))


def parsed(words: list[str]) -> argparse.Namespace:
    """As `cli.main` reads them: words may stand behind options."""
    parser = cli.make_parser()
    words, after = submit_verbs.split(words)
    args, rest = parser.parse_known_args(words)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        raise SystemExit(2)
    if rest:
        args.overrides += rest
    submit_verbs.read_line(args, after, parser=parser)
    return args


def run_folder(name: str) -> str:
    """Makes the run folder that a command names, in the working directory; `runs/demo` has the layout of `make demo`."""
    if name.startswith("runs/") and not Path(name).exists():
        known = {"runs/demo": ["experiment=shapes_tiny", "parallel=pair"], "runs/xl_8e": ["experiment=ec_dit_xl_8e"]}
        words = known.get(name, ["experiment=shapes_tiny"])
        stored.freeze(compose.compose([*words, f"run={name}"], local=False), name)
    return name


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_parse_and_compose(page, line, looking):
    check_command(line)


WRONG = (
    "ecdit train experiment=shapes_tiny train.step=3",
    "ecdit train experiment=no_such",
    "ecdit --nproc 3 train experiment=shapes_tiny",
    "ecdit --nproc 1 resume runs/demo",
    "ecdit --nproc 2 resume runs/demo moe.num_experts=16",
    "ecdit sample run=runs/demo prompt=x",
    "ecdit sample run=runs/demo prompts=x sample.steps=many",
    "ecdit sample run=runs/demo prompts=x guidance=3",
    "ecdit train experiment=wide_shapes",
    "ecdit train -m experiment=shapes_tiny train.seed=1,2 moe=dense,nothing",
    "ecdit config explain moe.router.top",
    "ecdit launch experiment=ec_dit_xl_8e cluster.nodes=3",
    "ecdit fly",
)


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_would_be_noticed(line, looking):
    with pytest.raises((EcditError, SystemExit)):
        check_command(line)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page, text in PAGES.items():
        lines = re.findall(r"`make ([a-z][a-z -]*)`", text)
        for body in fences(page, *SHELL):
            lines += re.findall(r"^make ([a-z -]+)", body, flags=re.MULTILINE)
        lines += re.findall(r"^    make ([a-z -]+)", text, flags=re.MULTILINE)
        unknown = {word for line in lines for word in line.split()} - targets
        assert not unknown, f"{page}: make {' '.join(unknown)}"


# --- examples --------------------------------------------------------------------------------------------------------

SCRIPTS = [(page, n) for page in PAGES for n in range(len(fences(page, "python")))]


@pytest.mark.parametrize(("page", "number"), SCRIPTS)
def test_scripts_compile_and_their_imports_exist(page, number):
    tree = ast.parse(fences(page, "python")[number])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("ecdit_train", "data_pipeline")):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


WRITE_A_CONFIG = "docs/how-to/write-a-config.md"


def example_files() -> dict[str, str]:
    """Path -> text of the files that `write a config` tells its reader to save."""
    found = re.findall(
        r"\b[aA]s\s+`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)^```$", PAGES[WRITE_A_CONFIG], re.MULTILINE | re.DOTALL
    )
    return dict(found)


@pytest.fixture(scope="session")
def example_folder(tmp_path_factory) -> Path:
    """A working directory with those files."""
    folder = tmp_path_factory.mktemp("reader")
    own = ("CONTRIBUTING.md", "docs/how-to/write-a-cluster-file.md", "docs/how-to/choose-what-a-run-reads.md")
    pages = "".join(PAGES[page] for page in own)
    walk = re.findall(r"`(mylab/[\w./]+)`[^`]*```\w+\n(.*?)```", pages, re.DOTALL)
    for path, text in [*example_files().items(), *walk]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def test_the_page_shows_every_file_it_needs():
    shown = len(fences(WRITE_A_CONFIG, "python", "yaml"))
    assert set(example_files()) == {
        "mylab/experiment/wide_shapes.yaml",
        "mylab/cluster/desk.yaml",
        "mylab/sharp_router.py",
        "mylab/moe/router/sharp.yaml",
        "conf/local/default.yaml",
    }
    assert shown == len(example_files())


def test_an_experiment_of_ones_own_composes(example_folder):
    config = compose.configure(["experiment=wide_shapes"], config_dir=example_folder / "mylab").config
    assert (config.experiment, config.model.name, config.model.layers) == ("wide_shapes", "small", 8)


def test_a_class_of_ones_own_routes(example_folder):
    """The router of the page is expert choice when its temperature is 1, and something else when it is not."""
    import torch

    from ecdit_train.config.slots import RouterSizes
    from ecdit_train.model.router import RouterInput
    from ecdit_train.model.routers.expert_choice import ExpertChoice

    sizes = RouterSizes(width=8, num_experts=4, patch_values=1)
    x_GSD = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    said = []
    for temperature in (1.0, 0.5):
        words = ["experiment=shapes_tiny", "moe/router=sharp", f"moe.router.temperature={temperature}"]
        config = compose.configure(words, config_dir=example_folder / "mylab").config
        assert config.moe.router is not None
        own, plain = (c.build(sizes) for c in (config.moe.router, ExpertChoice(capacity_factor=2.0, sees="modulated")))
        weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
        own.weight.data, plain.weight.data = weight, weight
        said.append((own(RouterInput.of(x_GSD)), plain(RouterInput.of(x_GSD))))
    (cold, usual), (sharp, _) = said
    torch.testing.assert_close(cold.gate_EGC.sort().values, usual.gate_EGC.sort().values)
    assert sharp.gate_EGC.mean() > 1.05 * cold.gate_EGC.mean()


def test_values_of_a_machine_compose(example_folder, tmp_path, monkeypatch):
    shutil.copytree(compose.conf_folder(), tmp_path / "conf", ignore=shutil.ignore_patterns("local", "__pycache__"))
    shutil.copytree(example_folder / "conf" / "local", tmp_path / "conf" / "local")
    monkeypatch.setattr(compose, "conf_folder", lambda: tmp_path / "conf")
    config = compose.configure([]).config
    assert (config.cluster.account, config.data.shards) == ("my_project", "data/images")


def test_pages_are_written_for_git():
    """A generated page that git ignores would be missing in a fresh clone."""
    pages = [str(ROOT / "docs" / "reference" / name) for name in generator().PAGES]
    try:
        ignored = subprocess.run(["git", "check-ignore", *pages], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no git on this machine")
    assert ignored.stdout == ""
