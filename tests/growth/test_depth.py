"""Orders of layers."""

import pytest
from hypothesis import given, strategies as st

from paramend.errors import BadArgument
from paramend.growth import depth
from paramend.growth.depth import Order, order_of


@pytest.mark.parametrize(
    ("order", "written"),
    [
        (depth.blocks(4, count=1), "0 1 2 3 3*"),
        (depth.blocks(4, count=2), "0 1 1* 2 3 3*"),
        (depth.blocks(6, count=4), "0 1 1* 2 2* 3 4 4* 5 5*"),
        (depth.blocks(2, count=4), "0 0* 0* 1 1* 1*"),
        (depth.blocks(6, every=3), "0 1 2 2* 3 4 5 5*"),
        (depth.stack(2, 3), "0 1 0 1 0 1"),
        (depth.interleave(2, 3), "0 0 0 1 1 1"),
        (depth.overlap(4, 1), "0 1 2 1 2 3"),
        (depth.splice(2, at=0, count=2), "0* 0* 0 1"),
        (depth.splice(2, at=2), "0 1 1*"),
        (depth.drop(4, layers=[0, -1]), "1 2"),
        (depth.blocks(2, count=2).each(2), "0 1 0 1* 2 3 2 3*"),
    ],
)
def test_what_the_orders_are(order, written):
    assert str(order) == written
    assert eval(repr(order), {"pm": type("pm", (), {"depth": depth})}) == order


def test_the_published_sizes():
    # LLaMA-Pro adds 8 blocks to 32 layers, one after every 4; SOLAR makes 48 of 32 with a seam of 8.
    pro = depth.blocks(32, count=8)
    assert (len(pro), pro.identity) == (40, (4, 9, 14, 19, 24, 29, 34, 39))
    assert pro == depth.blocks(32, every=4)
    solar = depth.overlap(32, 8)
    assert len(solar) == 48
    assert solar.sources[23:25] == (23, 8)


@given(st.integers(1, 40), st.integers(1, 40))
def test_blocks_are_spread_evenly_and_keep_every_layer(n, count):
    order = depth.blocks(n, count=count)
    assert len(order) == n + count
    assert [s for t, s in enumerate(order.sources) if t not in order.identity] == list(range(n))
    per_layer = [order.sources.count(layer) - 1 for layer in range(n)]
    assert max(per_layer) - min(per_layer) <= 1
    assert order.new == order.identity
    assert order.sources[-1] == n - 1


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data())
def test_a_layer_is_kept_once_and_never_as_an_identity(sources, data):
    identity = data.draw(st.sets(st.integers(0, len(sources) - 1)))
    order = Order(sources, identity, of=5)
    assert set(order.kept.values()).isdisjoint(order.identity)
    assert sorted({*order.kept.values(), *order.new}) == list(range(len(sources)))
    assert set(order.kept) | set(order.dropped) == set(range(5))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: depth.blocks(4),
        lambda: depth.blocks(4, count=1, every=2),
        lambda: depth.blocks(4, every=5),
        lambda: depth.blocks(0, count=1),
        lambda: depth.stack(4, 0),
        lambda: depth.overlap(4, 4),
        lambda: depth.splice(4, at=5),
        lambda: depth.drop(4, layers=[4]),
        lambda: depth.drop(1, layers=[0]),
        lambda: Order([0, 1], identity=[2]),
        lambda: order_of([3], 3),
        lambda: order_of(["a"], 3),
        lambda: order_of(7, 3),
        lambda: order_of(depth.stack(4), 3),
        lambda: order_of(depth.stack(3), 4),
    ],
)
def test_orders_that_make_no_sense(wrong):
    with pytest.raises(BadArgument) as caught:
        wrong()
    assert caught.value.hint
