"""The model of time: what it says follows from its rates and counts, and the counts are those of the machine code."""

import dataclasses

import pytest

pytest.importorskip("triton")
from bench.projection import model
from poc_kernels.kernels.triton.tiles import Tile

D = 8192
ALONE = Tile(64, 128, 4, 3, blocks=2)


def test_a_product_bound_by_l2_takes_the_time_of_its_bytes():
    slow = dataclasses.replace(model.H200, l2_bytes=1e11)
    times = model.product(256, D, 16, ALONE, 1, model.Counts(400, 20), slow)
    assert times.limbs == pytest.approx(2 * 128 * (D * 128 * 2) / 1e11)
    assert times.total == pytest.approx(times.limbs + times.quantise + slow.ends_seconds)


def test_what_is_hidden_is_not_added():
    fast_l2 = dataclasses.replace(model.H200, l2_bytes=1e15, sms=128)  # whole waves
    apart, together = (model.product(8192, D, 16, ALONE, 1, model.Counts(400, hidden), fast_l2) for hidden in (0, 400))
    assert together.total - together.quantise - fast_l2.ends_seconds == pytest.approx(
        max(together.draw, together.multiply)
    )
    half = min(apart.draw, apart.multiply) / 2  # the other of two blocks hides half
    assert apart.total - together.total == pytest.approx(half)


def test_parts_of_k_are_added():
    few = Tile(64, 32, 4, 3, blocks=4)
    one, four = (model.product(32, D, 16, few, parts, model.Counts(330, 12)) for parts in (1, 4))
    assert one.additions == 0
    assert four.additions == pytest.approx(4 * D * 32 * 2 / 8 / model.H200.l2_sectors)
    assert four.draw < one.draw, "one warp for each scheduler issues less"


@pytest.mark.parametrize(("blocks", "waves"), [(396, [3]), (400, [3, 1]), (132, [1]), (133, [2]), (1000, [3, 3, 2])])
def test_blocks_come_in_waves(blocks, waves):
    assert model._waves(blocks, 3, 132) == waves


def test_the_table_is_printed(capsys):
    model.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| M | stored, us | op 16, us | of stored | op 8, us | of stored |")
    assert [line.split("|")[1].strip() for line in lines[2:]][:3] == ["1", "8", "16"]
    assert all(line.count("|") == lines[0].count("|") for line in lines)
