"""URLs without an index: nothing is lost across stops on any number of ranks, and what is repeated is bounded and said."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import BadSplit, CorruptShard, MissingShard, TooManyBad, TruncatedShard, WrongView
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import open_view
from data_pipeline.stages import Stages
from data_pipeline.streamed import StreamedLoader
from data_pipeline.url_samples import samples_of
from data_pipeline.urls import expand


def loader(urls: list[str], **options: Any) -> StreamedLoader:
    settings = {"global_batch": 16, "seed": 3, "resolution": 16, "shuffle": 24} | options
    return StreamedLoader(urls, **settings)


@pytest.fixture(scope="module")
def urls(shapes_folder: Path) -> list[str]:
    """8 shards of 50 samples."""
    return expand(str(shapes_folder))


def test_every_sample_comes_once_in_a_pass_and_as_the_exact_loader_has_it(urls: list[str], shapes_folder: Path) -> None:
    one = loader(urls, threads=2)
    found: dict[str, np.ndarray] = {}
    times: Counter[str] = Counter()
    for batch in islice(one, 25):
        times.update(batch.keys)
        found |= dict(zip(batch.keys, batch.images, strict=True))
    # The buffer holds samples of the first pass back, and has some of the second.
    assert len(times) >= 400 - 24
    assert max(times.values()) <= 2
    one.close()
    exact = StreamingLoader(open_view(shapes_folder), global_batch=16, seed=3, resolution=16)
    for batch in islice(exact, 25):
        for key, image in zip(batch.keys, batch.images, strict=True):
            assert key not in found or np.array_equal(found[key], image)
    exact.close()


def test_stops_on_any_number_of_ranks_lose_nothing(urls: list[str]) -> None:
    draw = random.Random(5)
    for _ in range(6):
        seen: Counter[str] = Counter()
        state: dict[str, Any] | None = None
        passes, legs = 0, 0
        while passes < 1:
            world = draw.choice([1, 2, 4])
            ranks = [loader(urls, rank=rank, world=world, threads=draw.choice([1, 3])) for rank in range(world)]
            for _ in range(draw.randint(6, 14)):
                if state is not None and not ranks[0].stats().steps:
                    for one in ranks:
                        one.load_state_dict(state)
                for one in ranks:
                    seen.update(next(one).keys)
            turns = min(one._turns for one in ranks)
            for one in ranks:
                one._agree = lambda own, turns=turns: min(own, turns)
            states = [one.state_dict() for one in ranks]
            assert all(other == states[0] for other in states)
            state = states[0]
            passes, legs = state["base"] // len(urls), legs + 1
            for one in ranks:
                one.close()
        assert len(seen) == 400, f"{400 - len(seen)} samples of the first pass never came, in {legs} legs"


def test_batches_are_the_same_whatever_the_threads(urls: list[str]) -> None:
    a, b = loader(urls, threads=1), loader(urls, threads=3, prefetch=5)
    for x, y in zip(islice(a, 30), islice(b, 30), strict=True):
        assert x.keys == y.keys
        assert np.array_equal(x.images, y.images)
        assert np.array_equal(x.position, y.position)
    a.close()
    b.close()


def test_a_shard_that_breaks_off_is_counted_or_ends_the_run(copied_folder: Path) -> None:
    tars = sorted(copied_folder.glob("*.tar"))
    tars[3].write_bytes(tars[3].read_bytes()[:20_000])
    (copied_folder / "zz-gone.tar").symlink_to("nowhere")
    strict = loader(expand(str(copied_folder)))
    with pytest.raises((MissingShard, TruncatedShard), match=r"ends inside|without an end|to its end"):
        list(islice(strict, 60))
    strict.close()
    lines = copied_folder / "bad.jsonl"
    one = loader(expand(str(copied_folder)), on_bad="substitute", max_bad=1, quarantine=lines)
    seen: Counter[str] = Counter(key for batch in islice(one, 50) for key in batch.keys)
    assert sum(one.stats().bad.values()) >= 2
    assert "zz-gone.tar" in lines.read_text()
    one.close()
    whole = Counter(key for path in tars for key in keys_of(path))
    assert set(whole) <= set(seen) | set()  # every sample of the tars that are whole
    limited = loader(expand(str(copied_folder)), on_bad="substitute", max_bad=1e-4)
    with pytest.raises(TooManyBad, match="MissingShard"):
        list(islice(limited, 60))
    limited.close()


def keys_of(tar: Path) -> list[str]:
    try:
        with tarfile.open(tar) as file:
            return sorted({name.split(".")[0] for name in file.getnames()})
    except tarfile.ReadError:
        return []


def test_members_that_run_code_elsewhere_are_not_handed_on(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(16):
            for suffix, payload in (("txt", b"a caption"), ("pyd", b"\x80\x04."), ("npy", pixels())):
                info = tarfile.TarInfo(f"{n:03d}.{suffix}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    one = loader([str(tmp_path / "a.tar")], shuffle=1)
    assert one.fields.images == ("npy",)
    assert next(one).captions == ("a caption",) * 16
    one.close()


def pixels() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros((16, 16, 3), np.uint8))
    return stream.getvalue()


def test_another_place_is_refused(urls: list[str], shapes_folder: Path) -> None:
    one = loader(urls)
    with pytest.raises(WrongView, match="seed: saved 4, here 3"):
        one.load_state_dict(one.state_dict() | {"seed": 4})
    exact = StreamingLoader(open_view(shapes_folder), global_batch=16, seed=3, resolution=16)
    with pytest.raises(WrongView, match="kind"):
        one.load_state_dict(exact.state_dict())
    exact.close()
    one.close()


def test_urls_are_expanded_and_commands_refused(tmp_path: Path) -> None:
    assert expand("https://host/set/{000..002}.tar") == [f"https://host/set/{n:03d}.tar" for n in range(3)]
    with pytest.raises(BadSplit, match=r"data\.allow_pipe=true"):
        expand("pipe:cat a.tar")
    assert expand("pipe:cat {a,b}.tar", allow_pipe=True) == ["pipe:cat a.tar", "pipe:cat b.tar"]
    for bad in ("https://host/a.tar'; touch x; '", "https://host/$(id).tar", "https://host/a b.tar"):
        with pytest.raises(BadSplit, match="to a shell"):
            expand(bad)
    with pytest.raises(MissingShard, match=r"no \*\.tar"):
        expand(str(tmp_path))


def test_a_pipe_and_a_web_server_give_the_same_stream(urls: list[str], served: str) -> None:
    """webdataset opens both, by commands of its own (curl)."""
    local = loader(urls[:2])
    piped = loader([f"pipe:cat {url}" for url in urls[:2]])
    web = loader([f"{served}/{Path(url).name}" for url in urls[:2]])
    for x, y, z in zip(islice(local, 10), islice(piped, 10), islice(web, 10), strict=True):
        assert x.keys == y.keys == z.keys
    for one in (local, piped, web):
        one.close()


@pytest.fixture(scope="module")
def served(shapes_folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shapes_folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_closing_leaves_no_thread(urls: list[str]) -> None:
    before = threading.active_count()
    one = loader(urls)
    next(one)
    one.close()
    assert threading.active_count() <= before


@pytest.mark.parametrize("damage", ["zeroed header", "garbled header", "cut at an edge", "no end", "behind the end"])
def test_damage_that_tarfile_takes_for_the_end_is_found(copied_folder: Path, damage: str) -> None:
    tar = sorted(copied_folder.glob("*.tar"))[0]
    content = tar.read_bytes()
    with tarfile.open(tar) as file:
        members = file.getmembers()
    whole = [raw.key for raw in samples_of(str(tar))]
    assert len(whole) == 50
    at = members[60].offset  # the 21st sample's first member: three a sample
    changed = {
        "zeroed header": content[:at] + bytes(512) + content[at + 512 :],
        "garbled header": content[:at] + b"\xa5" * 512 + content[at + 512 :],
        "cut at an edge": content[:at],
        "no end": content[: members[-1].offset_data + -(-members[-1].size // 512) * 512],
        "behind the end": content + b"more" * 128,
    }
    tar.write_bytes(changed[damage])
    got: list[str] = []

    def take() -> None:
        for raw in samples_of(str(tar)):
            got.append(raw.key)
            assert set(raw.fields) == {"png", "txt", "json"}

    with pytest.raises((CorruptShard, TruncatedShard)):
        take()
    assert got == whole[: len(got)]
    assert len(got) >= (19 if damage != "behind the end" else 49)


def test_a_packed_tar_streams(copied_folder: Path) -> None:
    tar = sorted(copied_folder.glob("*.tar"))[0]
    packed = tar.with_suffix(".tgz")
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    assert [raw.key for raw in samples_of(str(packed))] == [raw.key for raw in samples_of(str(tar))]


def test_when_nothing_usable_comes_the_run_ends_and_stays_ended(urls: list[str]) -> None:
    one = loader(urls, on_bad="substitute", max_bad=1, stages=Stages([lambda stream: iter(())]))
    for _ in range(2):
        with pytest.raises(TooManyBad, match="bad or left out"):
            next(one)
    one.close()


def test_a_password_in_a_url_is_refused_unsaid() -> None:
    with pytest.raises(BadSplit) as caught:
        expand("http://me:s3cret@host/{0..3}.tar")
    assert "s3cret" not in str(caught.value)
