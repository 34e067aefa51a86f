"""Pictures of every form become the same shards; what is not taken is counted by its reason."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from preparing_forms import REJECTED, content, picture, samples

from data_pipeline.decode import decode_image
from data_pipeline.errors import DataError, MissingShard, Where, WrongView
from data_pipeline.indexing import index_folder
from data_pipeline.loader import StreamingLoader
from data_pipeline.manifest import open_view, verify
from data_pipeline.parts import Part
from data_pipeline.prepare import RawMembers, encode_image, write_shards
from data_pipeline.preparing.local import Local
from data_pipeline.preparing.pack import PackRule, pack
from data_pipeline.preparing.sources import find

RULE = PackRule(resolution=32, quality=90, most_aspect=3)
EXPECTED = {
    "tars": REJECTED,
    "files": REJECTED,
    "parquet": {**REJECTED, "unreadable caption": 0, "no caption": 4, "no picture: failed_to_download": 4},
    "table": {**REJECTED, "unreadable caption": 0, "no picture": 1},
}


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, suffix = info.name.partition(".")
                assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o444)
                file = tar.extractfile(info)
                assert file is not None
                found.setdefault(key, {})[suffix] = file.read()
    return found


@pytest.mark.parametrize("form", EXPECTED)
def test_every_form_is_counted_and_kept(forms, tmp_path, form):
    done = pack(find(forms[form], per_shard=7), tmp_path, rule=RULE)
    rejected = {why: count for why, count in EXPECTED[form].items() if count}
    assert dict(done.done.rejected) == rejected
    assert done.done.taken == done.done.kept + sum(rejected.values())
    assert done.view.num_samples == done.done.kept == 10 + (2 if form == "table" else 0)
    assert verify(tmp_path).samples == done.done.kept
    for sample in members(tmp_path).values():
        assert list(sample) == ["jpg", "json", "txt"]
        about = json.loads(sample["json"])
        number = int(sample["txt"].decode().removeprefix("picture "))
        assert about["similarity"] == number / 100
        height, width = 48 + number, 64
        side, packed = min(height, width), about["pack"]
        assert packed["original"] == [height, width]
        assert packed["box"] == [
            (height - side) // 2, (width - side) // 2, (height - side) // 2 + side, (width - side) // 2 + side,
        ]  # fmt: skip
        assert (packed["size"], packed["quality"]) == ([32, 32], 90)
        pixels, wanted = np.empty((32, 32, 3), np.uint8), np.empty((32, 32, 3), np.uint8)
        decode_image(sample["jpg"], out=pixels, where=Where("", ""))
        decode_image(samples()[number]["jpg"], out=wanted, where=Where("", ""))
        assert np.abs(pixels.astype(int) - wanted).mean() < 3


def test_forms_agree_on_the_pictures(forms, tmp_path):
    packed = {}
    for form in ("tars", "files", "table"):
        pack(find(forms[form], per_shard=7), tmp_path / form, rule=RULE)
        packed[form] = {sample["txt"]: sample["jpg"] for sample in members(tmp_path / form).values()}
    assert packed["tars"] == packed["files"]
    assert packed["tars"].items() <= packed["table"].items()


def test_a_packed_set_is_a_source_again_and_its_pictures_are_copied(forms, tmp_path):
    pack(find(forms["tars"]), tmp_path / "one", rule=RULE)
    pack(find(tmp_path / "one"), tmp_path / "two", rule=RULE)
    one, two = members(tmp_path / "one"), members(tmp_path / "two")
    assert {key: sample["jpg"] for key, sample in one.items()} == {key: sample["jpg"] for key, sample in two.items()}
    assert all(json.loads(sample["json"])["pack"]["quality"] == "as it was" for sample in two.values())


@pytest.mark.parametrize("form", ["tars", pytest.param("files", marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_workers_or_parts(forms, tmp_path, form):
    source = find(forms[form], per_shard=3)
    pack(source, tmp_path / "one", rule=RULE)
    pack(source, tmp_path / "two", rule=RULE, runner=Local(workers=2))
    whole = content(tmp_path / "one")
    assert content(tmp_path / "two") == whole
    made = pack(source, tmp_path / "parts", rule=RULE, part=Part(number=2, of=2))
    assert made.view is not None, "what no other part is at is done, too"
    assert content(tmp_path / "parts") == whole
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert pack(source, tmp_path / "parts", rule=RULE, part=Part(number=1, of=2)).view.sha256 == made.view.sha256
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()} == before


def test_changed_inputs_and_other_rules_are_refused_with_what_changed(forms, tmp_path):
    source, out = Path(shutil.copytree(forms["files"], tmp_path / "in")), tmp_path / "out"
    pack(find(source, per_shard=5), out, rule=RULE)
    with pytest.raises(WrongView, match="quality: there 90, asked 80"):
        pack(find(source, per_shard=5), out, rule=PackRule(resolution=32, quality=80))
    path = source / "00001" / "000000008.txt"
    kept, status = path.read_bytes(), path.stat()
    path.write_bytes(kept + b"!")
    with pytest.raises(WrongView, match=r"1 of another size \(00001/000000008.txt\)"):
        pack(find(source, per_shard=5), out, rule=RULE)
    path.write_bytes(kept[:-1] + b"!")
    with pytest.raises(WrongView, match=r"00001/000000008.txt: its content has changed"):
        pack(find(source, per_shard=5), out, rule=RULE)
    path.write_bytes(kept)  # another time, the same content
    assert path.stat().st_mtime_ns != status.st_mtime_ns
    pack(find(source, per_shard=5), out, rule=RULE)
    (source / "00001" / "new.jpg").write_bytes(samples()[0]["jpg"])
    with pytest.raises(WrongView, match=r"1 added \(00001/new.jpg\)"):
        pack(find(source, per_shard=5), out, rule=RULE)


def test_a_damaged_tar_gives_its_whole_samples_and_says_so(forms, tmp_path):
    source = Path(shutil.copytree(forms["tars"], tmp_path / "in"))
    cut = source / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:4096])
    (source / "00002.tar").write_bytes(b"")
    done = pack(find(source), tmp_path / "out", rule=RULE).done
    assert any("00001.tar" in words for words in done.damage_words())
    assert any("00002.tar: empty file" in words for words in done.damage_words())
    assert done.taken == done.kept + done.rejected.total()


def test_upright_transparent_and_large_pictures(tmp_path):
    """The rules of decode.py; the box is that of the upright picture."""
    cv2 = pytest.importorskip("cv2")
    from PIL import Image

    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(picture(1, height=40, width=80)).save(folder / "a.jpg", exif=_sideways(), quality=95)
    clear = np.zeros((50, 50, 4), np.uint8)
    cv2.imwrite(str(folder / "b.png"), clear)
    cv2.imwrite(str(folder / "c.png"), np.full((4500, 4500, 3), 77, np.uint8))  # more than training would decode
    for name in "abc":
        (folder / f"{name}.txt").write_text(name)
    done = pack(find(folder), tmp_path / "out", rule=PackRule(resolution=16, crop="none"))
    assert done.done.kept == 3
    made = {sample["txt"]: sample for sample in members(tmp_path / "out").values()}
    assert json.loads(made[b"a"]["json"])["pack"]["original"] == [80, 40]
    assert json.loads(made[b"a"]["json"])["pack"]["size"] == [32, 16]
    pixels = np.empty((16, 16, 3), np.uint8)
    decode_image(made[b"b"]["jpg"], out=pixels, where=Where("", ""))
    assert pixels.min() > 250, "white under what is transparent"


def _sideways() -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif[274] = 6
    return exif.tobytes()


def test_nothing_to_do_and_nothing_kept(tmp_path, forms):
    with pytest.raises(MissingShard, match="no such folder"):
        find(tmp_path / "nowhere")
    with pytest.raises(MissingShard, match="nothing to prepare"):
        find(tmp_path)
    with pytest.raises(DataError, match=r"(?s)no sample was kept.*too small"):
        pack(find(forms["tars"]), tmp_path / "out", rule=PackRule(resolution=512))
    with pytest.raises(DataError, match="quality = 0"):
        PackRule(quality=0)
    with pytest.raises(DataError, match="lies inside of what is read"):
        pack(find(forms["tars"]), forms["tars"] / "out", rule=RULE)
    folder = tmp_path / "table"
    folder.mkdir()
    table = folder / "captions.csv"
    table.write_text("picture,words\na.jpg,b\n")
    shutil.copy(forms["table"] / "000.jpg", folder / "a.jpg")
    with pytest.raises(DataError, match=r"no column for the file: must be one of file, .* there are picture, words"):
        pack(find(folder), tmp_path / "out2", rule=RULE)


def test_an_empty_output_shard_is_part_of_the_set(tmp_path):
    """A shard of which nothing is kept says so, and training goes on with the others."""
    bad, good = samples()[4], samples()[0]
    write_shards(
        [RawMembers(key=f"{i}", members=bad if 5 <= i < 10 else good) for i in range(15)], tmp_path / "in",
        samples_per_shard=5,
    )  # fmt: skip
    view = pack(find(tmp_path / "in"), tmp_path / "out", rule=RULE).view
    assert [row.n for row in view.shards] == [5, 0, 5]
    stream = StreamingLoader(open_view(tmp_path / "out"), global_batch=5, resolution=32)
    assert len(next(stream).keys) == 5
    stream.close()
    assert index_folder(tmp_path / "out").shards == view.shards


def test_webdataset_and_dali_read_what_was_packed(forms, tmp_path):
    import webdataset

    pack(find(forms["tars"]), tmp_path, rule=RULE)
    tars = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    made = members(tmp_path)
    read = {s["__key__"]: s["jpg"] for s in webdataset.WebDataset(tars, shardshuffle=False)}
    assert read == {key: sample["jpg"] for key, sample in made.items()}
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    @pipeline_def(batch_size=5, num_threads=1, device_id=None)
    def pictures():
        jpg, txt = fn.readers.webdataset(paths=tars, ext=["jpg", "txt"], missing_component_behavior="error", name="r")
        return fn.decoders.image(jpg), txt

    pipe, seen = pictures(), {}
    pipe.build()
    assert pipe.epoch_size("r") == 10
    for _ in range(2):
        for image, text in zip(*pipe.run(), strict=True):
            seen[bytes(np.array(text))] = np.array(image)
    assert seen.keys() == {sample["txt"] for sample in made.values()}
    wanted = np.empty((32, 32, 3), np.uint8)
    for sample in made.values():
        decode_image(sample["jpg"], out=wanted, where=Where("", ""))
        assert np.abs(seen[sample["txt"]].astype(int) - wanted).mean() < 2


def test_quality_and_png_sources(tmp_path):
    small = picture(3, height=32, width=32)
    write_shards(
        [RawMembers(key="a", members={"png": encode_image(small, image_format="png"), "txt": b"x"})], tmp_path / "in"
    )
    sizes = []
    for quality in (50, 95):
        pack(find(tmp_path / "in"), tmp_path / f"{quality}", rule=PackRule(resolution=32, quality=quality))
        sizes.append(len(members(tmp_path / f"{quality}")["a"]["jpg"]))
    assert sizes[0] < sizes[1]


def test_a_name_that_no_tar_may_have_is_one_rejected_sample(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    with tarfile.open(source / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for key in ("a", "b" * 260, "c"):
            for suffix, payload in (
                ("png", encode_image(picture(7, height=64, width=64), image_format="png")),
                ("txt", b"words"),
            ):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    index_folder(source)
    made = pack(find(source), tmp_path / "out", rule=PackRule(resolution=16))
    assert made.view is not None
    assert made.view.num_samples == 2
    assert made.done.rejected["name too long"] == 1
