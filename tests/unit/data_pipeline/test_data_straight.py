"""Arrays read straight into their slots are those of the plain way, whatever a sample is like; no slot keeps a bad one's bytes."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.assemble import ArrayShapes, Fields
from data_pipeline.contract import Batch
from data_pipeline.errors import BadArray, CorruptShard
from data_pipeline.indexing import index_folder
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import open_view
from data_pipeline.sources import Named, open_data
from data_pipeline.straight import Straight

FIELDS = Fields(latents="latent.npy", text="text.npy", captions=("txt",), text_len=6)
SHAPES = ArrayShapes(latent=((4, 8, 8), np.dtype(np.float16)), text=(16, np.dtype(np.float16)))
GOOD = 96


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def write(
    folder: Path, samples: list[dict[str, bytes]], *, style: int = tarfile.USTAR_FORMAT, within: str = ""
) -> None:
    for number in range(0, len(samples), 12):
        with tarfile.open(folder / f"{number:04d}.tar", "w", format=style) as tar:
            for key, members in enumerate(samples[number : number + 12], start=number):
                for name, content in members.items():
                    about = tarfile.TarInfo(f"{within if key % 2 else ''}{key:05d}.{name}")
                    about.size = len(content)
                    tar.addfile(about, io.BytesIO(content))
    index_folder(folder)


def sample(number: int, *, tokens: int = 6, order: int = 0, words: int = 3) -> dict[str, bytes]:
    rng = np.random.default_rng(number)
    members = {
        "latent.npy": npy(rng.standard_normal((4, 8, 8)).astype(np.float16)),
        "text.npy": npy(rng.standard_normal((tokens, 16)).astype(np.float16)),
        "txt": f"{number} {'word ' * words}".encode(),
    }
    names = list(members)
    return {name: members[name] for name in names[order:] + names[:order]}


def batches(folder: Path, *, plain: bool, monkeypatch: pytest.MonkeyPatch, steps: int = 12, **settings) -> list[Batch]:
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr(Straight, "serves", lambda *_, **__: False)
        settings = {"global_batch": 8, "fields": FIELDS, "threads": 2, "lanes": 4, **settings}
        loader = StreamingLoader(open_view(folder), **settings)
        found = [next(loader) for _ in range(steps)]
        loader.close()
    return found


def assert_equal(ours: list[Batch], plain: list[Batch]) -> None:
    for one, other in zip(ours, plain, strict=True):
        assert one.keys == other.keys
        assert one.captions == other.captions
        for name in ("position", "latents", "text", "text_mask", "captioned"):
            found, want = getattr(one, name), getattr(other, name)
            assert (found is None and want is None) or found.tobytes() == want.tobytes()


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("kind", ["alike", "ragged", "orders", "long", "latents", "text"])
def test_batches_are_those_of_the_plain_way(tmp_path, monkeypatch, style, kind):
    def one(n: int) -> dict[str, bytes]:
        if kind == "ragged":
            return sample(n, tokens=1 + n % 9, words=n % 150)  # more tokens than fit among them
        if kind == "orders":
            return sample(n, order=n % 3)
        return sample(n)

    write(tmp_path, [one(n) for n in range(GOOD)], style=style, within="x" * 95 + "/" if kind == "long" else "")
    fields = {
        "latents": Fields(latents="latent.npy"),
        "text": Fields(text="text.npy", text_len=6),
    }.get(kind, FIELDS)
    more = {"on_bad": "substitute", "max_bad": 1e9}
    ours = batches(tmp_path, plain=False, monkeypatch=monkeypatch, fields=fields, **more)
    assert_equal(ours, batches(tmp_path, plain=True, monkeypatch=monkeypatch, fields=fields, **more))


def test_a_mixture_reads_each_source_straight(tmp_path, monkeypatch):
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [sample(n + 1000 * number, order=number) for n in range(GOOD)])
    named = {name: Named(shards=str(tmp_path / name), weight=1.0 + number) for number, name in enumerate(("a", "b"))}
    found = []
    for plain in (False, True):
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(Straight, "serves", lambda *_, **__: False)
            loader = StreamingLoader(open_data(named), global_batch=12, fields=FIELDS, threads=2)
            found.append([next(loader) for _ in range(10)])
            layouts = [] if plain else list(loader._filler.straight._layouts.values())
            assert plain or all(layouts)
            loader.close()
    assert_equal(*found)


def test_alike_samples_do_go_straight(tmp_path, monkeypatch):
    write(tmp_path, [sample(n) for n in range(GOOD)])
    reads = []
    monkeypatch.setattr(
        "data_pipeline.reader.ShardReader.read", lambda *_, **more: reads.append(more) or pytest.fail("the plain way")
    )
    monkeypatch.setattr("data_pipeline.loader.probe_shapes", lambda *_, **__: SHAPES)
    batches(tmp_path, plain=False, monkeypatch=monkeypatch)
    assert not reads


@pytest.mark.parametrize("fault", ["nan", "bytes", "caption", "shape", "header", "none"])
def test_a_bad_sample_leaves_nothing_in_its_slot(tmp_path, monkeypatch, fault):
    """Every third sample is poison, 7 all over; its substitute has fewer tokens."""
    bad = {n for n in range(GOOD) if n % 3 == 1}
    samples = [sample(n, tokens=6 if n in bad else 2 + n % 3) for n in range(GOOD)]
    for n in bad:
        text, latent = np.full((6, 16), 7, np.float16), np.full((4, 8, 8), 7, np.float16)
        if fault == "nan":
            text[5, 15] = np.nan
        if fault == "shape":
            latent = latent.reshape(8, 4, 8)
        samples[n] |= {"text.npy": npy(text), "latent.npy": npy(latent)}
        if fault == "caption":
            samples[n]["txt"] = b"caf\xe9"
        if fault == "none":
            samples[n]["txt"] = b" "
    write(tmp_path, samples)
    if fault in ("bytes", "header"):
        for tar in sorted(tmp_path.glob("*.tar")):
            content = bytearray(tar.read_bytes())
            with tarfile.open(tar) as opened:
                for member in opened:
                    if int(member.name[:5]) in bad and member.name.endswith("text.npy"):
                        content[member.offset_data + (200 if fault == "bytes" else -300)] ^= 1
            tar.write_bytes(content)
    more = {"on_bad": "substitute", "max_bad": 1e9}
    ours = batches(tmp_path, plain=False, monkeypatch=monkeypatch, **more)
    assert_equal(ours, batches(tmp_path, plain=True, monkeypatch=monkeypatch, **more))
    for batch in ours:
        assert not bad & {int(key) for key in batch.keys}
        assert (batch.latents != 7).all()
        assert (batch.text != 7).all()
        assert (batch.text[~batch.text_mask] == 0).all()


@pytest.mark.parametrize(("damage", "error"), [("nan", BadArray), ("bytes", CorruptShard)])
def test_the_error_is_that_of_the_plain_way(tmp_path, monkeypatch, damage, error):
    samples = [sample(n) for n in range(GOOD)]
    if damage == "nan":
        samples[40]["latent.npy"] = npy(np.full((4, 8, 8), np.inf, np.float16))
    write(tmp_path, samples)
    if damage == "bytes":
        tar = tmp_path / "0036.tar"
        content = bytearray(tar.read_bytes())
        content[len(content) // 3] ^= 16
        tar.write_bytes(content)
    told = []
    for plain in (False, True):
        with pytest.raises(error) as caught:
            batches(tmp_path, plain=plain, monkeypatch=monkeypatch)
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_short_reads_and_errors_of_the_system_are_met_the_plain_way(tmp_path, monkeypatch):
    write(tmp_path, [sample(n) for n in range(GOOD)])
    want = batches(tmp_path, plain=True, monkeypatch=monkeypatch)
    calls = iter(range(10**9))

    def preadv(fd: int, into: list[memoryview], at: int) -> int:
        number = next(calls)
        if number % 5 == 3:
            raise OSError(5, "Input/output error")
        return os.preadv(fd, [into[0][:700]] if number % 3 == 1 else into, at)

    loader = StreamingLoader(open_view(tmp_path), global_batch=8, fields=FIELDS, threads=2, lanes=4)
    loader._reader._files._preadv = preadv
    assert_equal([next(loader) for _ in range(12)], want)
    assert loader.stats().read_retries > 0
    loader.close()
