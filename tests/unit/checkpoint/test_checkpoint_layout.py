"""Boxes: against torch's own sharding arithmetic, and the mistakes that must not pass."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from checkpoint_worlds import MESHES, reference, shards, sliced
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Partial, _StridedShard

from ecdit_train.checkpoint import Placed, pattern
from ecdit_train.checkpoint import plan as plan_module
from ecdit_train.checkpoint.layout import Memo, describe, describe_all
from ecdit_train.checkpoint.plan import make_plan, split_box, to_table
from ecdit_train.errors import CheckpointError
from ecdit_train.parallel.placement import Box, ParamPlacement, pieces_of


def planned(slices_of_ranks):
    tables = [to_table(slices) for slices in slices_of_ranks]
    return make_plan([(table, table.cuts) for table in tables])


def cover_problem(shape, *, boxes):
    return pattern.cover_problem(pattern.make(0, shape=shape, held=dict.fromkeys(boxes, (0,))))


def rebuilt(slices, full):
    out = torch.full_like(full, -1)
    for s in slices:
        for piece in s.pieces:
            region = tuple(slice(o, o + n) for o, n in zip(piece.box.offset, piece.box.size, strict=True))
            out[region] = piece.view
    return out


@pytest.mark.parametrize("length", [1, 3, 7, 16, 36])
@pytest.mark.parametrize(("count", "inner"), [(2, 2), (8, 1), (3, 2), (4, 4)])
def test_agrees_with_torch_on_every_placement(length, count, inner):
    """Shard, HSDP, strided (FSDP over tp): same elements as torch cuts, uneven and empty shards included."""
    full = torch.arange(length * 3).reshape(length, 3)
    layouts = [
        (Replicate(), Shard(0)),
        (Shard(0), Replicate()),
        (Shard(1), Shard(0)),
        (Shard(0), Shard(0)),
        (_StridedShard(0, split_factor=inner), Shard(0)),
    ]
    for placements in layouts:
        mesh = (count, inner)
        slices = []
        for coordinate in itertools.product(range(count), range(inner)):
            local = full
            for axis, how in enumerate(placements):  # torch cuts left to right
                if not isinstance(how, Replicate):
                    pieces, _ = how._split_tensor(local, mesh[axis], with_padding=False)
                    local = pieces[coordinate[axis]]
            shape, offset = _compute_local_shape_and_global_offset(full.shape, mesh, list(coordinate), placements)
            assert tuple(local.shape) == shape
            s = sliced("w", local, part_shape=full.shape, mesh_shape=mesh, coordinate=coordinate, placements=placements)
            if s.pieces:
                assert min(piece.box.offset for piece in s.pieces) == offset
            slices.append(s)
        assert torch.equal(rebuilt(slices, full), full)
        planned([s] for s in slices)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_layout_covers_every_tensor_once(mesh):
    plan = planned(list(shards(reference(), mesh=mesh, rank=rank).values()) for rank in range(mesh.world))
    written = [[c for c in plan.chunks_of(rank) if c.offset >= 0] for rank in range(mesh.world)]
    for name, full in reference().items():
        assert sum(c.box.volume for chunks in written for c in chunks if c.name == name) == full.numel()
    for chunks in written:  # one after the other without a gap, and every element on a multiple of its size
        assert [c.offset for c in chunks] == list(itertools.accumulate((c.nbytes for c in chunks), initial=0))[:-1]
        assert all(c.offset % plan.entries[c.name].info.itemsize == 0 for c in chunks)
    assert sum(c.nbytes for chunks in written for c in chunks) == plan.total_bytes


def test_replicas_share_the_writing():
    slices = [sliced(f"w{i}", torch.zeros(16)) for i in range(8)]
    plan = planned([slices] * 4)
    assert [sum(c.offset >= 0 for c in plan.chunks_of(rank)) for rank in range(4)] == [2, 2, 2, 2]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_exact_cover_against_counting_every_element(dims):
    """Random sets of boxes, most of them nearly a cover: the verdict is that of a count of every element."""
    rng = random.Random(dims)
    verdicts = []
    for _ in range(300):
        shape = tuple(rng.randint(1, 5) for _ in range(dims))
        cuts = [sorted({0, n, *(rng.randint(0, n) for _ in range(2))}) for n in shape]
        boxes = [
            Box(tuple(a for a, _ in sides), tuple(b - a for a, b in sides))
            for sides in itertools.product(*(list(itertools.pairwise(c)) for c in cuts))
        ]
        for _ in range(rng.randint(0, 2)):  # drop one, or move or stretch one
            box = boxes.pop(rng.randrange(len(boxes)))
            if rng.random() < 0.7:
                d = rng.randrange(dims)
                moved = [o + (rng.choice([-1, 0, 1]) if n == d else 0) for n, o in enumerate(box.offset)]
                boxes.append(Box(tuple(moved), tuple(max(1, n + rng.choice([-1, 0, 1])) for n in box.size)))
            if not boxes:
                break
        boxes = list(dict.fromkeys(boxes))
        hits = torch.zeros(tuple(n + 12 for n in shape), dtype=torch.int)
        inside = torch.zeros_like(hits)
        Box((6,) * dims, shape).of(inside).fill_(1)
        for box in boxes:
            Box(tuple(o + 6 for o in box.offset), box.size).of(hits).add_(1)
        verdicts.append(torch.equal(hits, inside))
        assert (cover_problem(shape, boxes=boxes) is None) == verdicts[-1], (shape, boxes)
    assert 30 < sum(verdicts) < 270


def test_a_rank_outside_the_mesh_holds_nothing():
    s = sliced("w", torch.zeros(0), part_shape=(4,), mesh_shape=(2,), coordinate=None, placements=(Shard(0),))
    assert s.pieces == ()
    assert s.global_shape == (4,)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Placed(tensor=torch.zeros(3, 2), placement=ParamPlacement(global_shape=(8, 2), index=1, count=2)), "says"),
        (Placed(tensor=torch.zeros(4, 2), placement=ParamPlacement(global_shape=(8, 2), index=2, count=2)), "index 2"),
        (Placed(tensor=torch.zeros(4), placement=ParamPlacement(global_shape=(8, 2), count=2)), "rank"),
        (Placed(tensor=torch.zeros(4, 2), placement=ParamPlacement(global_shape=(8, 2), dim=2, count=2)), "dim 2"),
        (
            Placed(tensor=torch.zeros(4), placement=ParamPlacement(global_shape=(8,), boxes=((0, 0, 2), (6, 3, 2)))),
            "follow local 2",
        ),
        (Placed(tensor=torch.zeros(4), placement=ParamPlacement(global_shape=(8,), boxes=((6, 0, 4),))), "stay in 8"),
        (torch.zeros(2, dtype=torch.complex64), "dtype"),
        (torch.zeros(2, device="meta"), "storage"),
        (torch.zeros(2, 2).to_sparse(), "dense"),
    ],
)
def test_impossible_tensors_are_refused_by_name(value, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        describe("layer.w", value=value)
    assert "layer.w" in str(caught.value)


def test_every_problem_is_listed():
    with pytest.raises(CheckpointError) as caught:
        describe_all({name: torch.zeros(1, dtype=torch.complex64) for name in ("a.w", "b.w")})
    assert "a.w" in str(caught.value)
    assert "b.w" in str(caught.value)


def test_what_lies_where_it_lay_is_described_once_and_anything_else_anew():
    place = ParamPlacement(global_shape=(8, 3), index=0, count=2)
    tensor, other = torch.zeros(4, 3), torch.ones(4, 3)
    memo = Memo()

    def described(value):
        return memo.describe_all({"w": value, "n": tensor[0]})

    first = described(Placed(tensor=tensor, placement=place))
    assert described(Placed(tensor=tensor, placement=place)) is first
    tensor.add_(1)
    assert described(Placed(tensor=tensor, placement=place)) is first

    second = ParamPlacement(global_shape=(8, 3), index=1, count=2)
    assert described(Placed(tensor=tensor, placement=second))[1].pieces[0].box.offset == (4, 0)
    assert described(tensor)[1].global_shape == (4, 3)
    assert described(other)[1].pieces[0].view.data_ptr() == other.data_ptr()
    tensor.data = other.t().contiguous().t()
    assert described(tensor)[1].pieces[0].view.data_ptr() == tensor.data_ptr()
    with pytest.raises(CheckpointError, match="dense"):
        described(other.to_sparse())
    assert described(tensor)[0].name == "n"


def test_partial_sums_are_refused():
    with pytest.raises(ValueError, match="partial"):
        pieces_of(torch.zeros(4), part_shape=(4,), mesh_shape=(2,), coordinate=(0,), placements=(Partial(),))


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([((0, 0), (2, 4)), ((2, 0), (1, 4))], "cover 12 of 16"),
        ([((0, 0), (3, 4)), ((2, 0), (2, 4))], "overlap"),
        ([((0, 0), (4, 3)), ((0, 2), (4, 2))], "overlap"),
        ([((0, 0), (4, 5))], "not inside"),
        ([((0, 0), (4, 4)), ((1, 1), (1, 1))], "overlap"),
        ([((0, 0), (2, 2)), ((2, 2), (2, 2)), ((0, 2), (2, 2)), ((2, 0), (2, 2))], None),
    ],
)
def test_cover(boxes, words):
    problem = cover_problem((4, 4), boxes=[Box(*box) for box in boxes])
    assert (problem is None) if words is None else words in problem


def test_ranks_must_agree_on_shape_and_dtype():
    with pytest.raises(CheckpointError, match="w: rank 1 says float16"):
        planned([[describe("w", value=torch.zeros(4))], [describe("w", value=torch.zeros(4).half())]])


def test_large_boxes_are_cut(monkeypatch):
    monkeypatch.setattr(plan_module, "MAX_CHUNK_BYTES", 100)
    for size in [(7, 5), (1, 90), (3, 1, 40), (1000,), ()]:
        box = Box(tuple(range(len(size))), size)
        parts = split_box(box, itemsize=4)
        assert all(part.volume * 4 <= 100 for part in parts)
        shifted = [Box(tuple(o - d for d, o in enumerate(part.offset)), part.size) for part in parts]
        assert cover_problem(size, boxes=shifted) is None
