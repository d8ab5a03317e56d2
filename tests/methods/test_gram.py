"""Grams and flat buffers equal plain tensor arithmetic for any shapes, memory orders and dtypes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hamu.methods import gram
from hamu.methods.gram import ROW, BlockLayout, Grams, clip_factors

EPS = np.finfo(np.float64).eps
SHAPES = ((), (1,), (ROW,), (ROW + 1,), (3 * ROW - 1,), (2, 3, 4, 5), (0,), (1, 1, 1), (17, 19))


def tensors(seed: int, dtype: torch.dtype = torch.float64, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def plain_grams(retain: list[Tensor], forget: list[Tensor]) -> Grams:
    def products(a: list[Tensor], b: list[Tensor]) -> np.ndarray:
        return np.array([float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True)])

    return Grams(retain=products(retain, retain), forget=products(forget, forget), cross=products(retain, forget))


def grams_by_layout(retain: list[Tensor], forget: list[Tensor]) -> Grams:
    layout = BlockLayout(retain)
    return layout.grams(layout.flatten(retain, forget))


def assert_grams_close(actual: Grams, expected: Grams, share: float) -> None:
    scale = np.maximum(expected.retain_norm * expected.forget_norm, 1e-300)
    assert (np.abs(actual.retain - expected.retain) <= share * expected.retain).all()
    assert (np.abs(actual.forget - expected.forget) <= share * expected.forget).all()
    assert (np.abs(actual.cross - expected.cross) <= share * scale).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_block_grams_equal_plain_inner_products_in_float64(dtype: torch.dtype) -> None:
    retain, forget = tensors(0, dtype), tensors(1, dtype)
    # Up to 767 products summed in float64 in another order: ROW * EPS bounds a sum of one row, 3 rows a block.
    assert_grams_close(grams_by_layout(retain, forget), plain_grams(retain, forget), 4 * ROW * EPS)


def test_grams_of_a_long_block_do_not_lose_digits_to_float32() -> None:
    retain = [torch.full((300_000,), 0.1)]
    value = float(torch.tensor(0.1).double()) ** 2 * 300_000
    grams = grams_by_layout(retain, retain)
    assert grams.retain[0] == pytest.approx(value, rel=1e-12, abs=0)  # float64 sums of 3e5 terms; float32 would err by 1e-4
    assert grams.cross[0] == grams.retain[0] == grams.forget[0]


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    retain, forget = tensors(0), tensors(1)
    whole = grams_by_layout(retain, forget)
    for rows in (1, 2, 3):
        monkeypatch.setattr(gram, "SLAB_ROWS", rows)
        assert_grams_close(grams_by_layout(retain, forget), whole, 8 * EPS)  # the same row sums, added in the same order


def test_summed_block_grams_are_the_gram_of_the_concatenated_block() -> None:
    for seed in range(50):
        retain, forget = tensors(2 * seed), tensors(2 * seed + 1)
        joined = [[torch.cat([t.reshape(-1) for t in role])] for role in (retain, forget)]
        # About 2000 products in another order.
        assert_grams_close(grams_by_layout(retain, forget).total(), plain_grams(*joined), 2000 * EPS)
        assert_grams_close(grams_by_layout(*joined), plain_grams(*joined), 2000 * EPS)


def test_views_hold_the_flattened_values_in_the_blocks_shapes() -> None:
    blocks = tensors(3)
    layout = BlockLayout(blocks)
    for view, block in zip(layout.views(layout.flatten(blocks, blocks)[1]), blocks, strict=True):
        assert view.shape == block.shape
        assert torch.equal(view, block)


def test_views_keep_the_memory_order_of_dense_tensors() -> None:
    weight = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    transposed = torch.randn(5, 7).t()
    layout = BlockLayout([weight, transposed])
    views = layout.views(layout.flatten([weight, transposed], [weight, transposed])[0])
    assert [view.stride() for view in views] == [weight.stride(), transposed.stride()]
    assert views[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "awkward",
    [
        pytest.param(lambda t: t.contiguous(memory_format=torch.channels_last), id="channels-last"),
        pytest.param(lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), id="permuted"),
        pytest.param(lambda t: torch.stack([t, t], dim=-1)[..., 0], id="with-gaps"),
        pytest.param(lambda t: t[:1, :1].expand(6, 4, 3, 3), id="expanded"),
    ],
)
@pytest.mark.parametrize("which", ["retain", "forget", "both"])
def test_memory_order_of_either_gradient_does_not_change_grams_or_updates(awkward, which: str) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(4)
    retain, forget = (torch.randn(6, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    retain = awkward(retain) if which != "forget" else retain
    forget = awkward(forget) if which != "retain" else forget
    layout = BlockLayout([retain])
    pair = layout.flatten([retain], [forget])
    assert_grams_close(layout.grams(pair), plain_grams([retain], [forget]), ROW * EPS)  # 216 products in another order
    (update,) = layout.views(layout.combine_(pair, np.array([[2.0, -0.5]])))
    assert torch.equal(update, 2.0 * retain - 0.5 * forget)  # powers of two: nothing rounds but the sum, in both
    assert update.shape == retain.shape


def test_combine_gives_each_block_its_own_weights_and_leaves_padding_zero() -> None:
    retain, forget = tensors(5), tensors(6)
    layout = BlockLayout(retain)
    weights = np.stack([np.arange(1.0, len(SHAPES) + 1), -np.arange(1.0, len(SHAPES) + 1) / 4], axis=1)
    buffer = layout.combine_(layout.flatten(retain, forget), weights)
    for update, (w_r, w_f), g_r, g_f in zip(layout.views(buffer), weights, retain, forget, strict=True):
        torch.testing.assert_close(update, w_r * g_r + w_f * g_f, rtol=8 * EPS, atol=8 * EPS * 16)  # fused or not
    assert int((buffer != 0).sum()) == sum(t.numel() for t in retain)


def test_mixed_dtypes_take_the_widest() -> None:
    blocks = [torch.ones(3, dtype=torch.bfloat16), torch.ones(2), torch.ones(2, dtype=torch.float64)]
    layout = BlockLayout(blocks)
    assert layout.flatten(blocks, blocks).dtype == torch.float64
    assert layout.flatten([*blocks[:2], torch.ones(2)], [*blocks[:2], torch.ones(2)]).dtype == torch.float32


def test_non_finite_values_show_in_the_grams() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        for role in range(2):
            pair = [tensors(7), tensors(8)]
            pair[role][5].view(-1)[-1] = bad
            assert not grams_by_layout(*pair).is_finite
    assert grams_by_layout(tensors(7), tensors(8)).is_finite


def test_largest_finite_float32_gradients_are_finite() -> None:
    """Squares of float32's largest numbers would overflow float32; Grams are float64."""
    big = [torch.full((10,), torch.finfo(torch.float32).max)]
    assert grams_by_layout(big, big).is_finite


def test_swapped_is_the_gram_of_the_negated_and_swapped_pair() -> None:
    retain, forget = tensors(9), tensors(10)
    swapped = grams_by_layout(retain, forget).swapped()
    expected = grams_by_layout([-t for t in forget], [-t for t in retain])
    for name in ("retain", "forget", "cross"):
        assert np.array_equal(getattr(swapped, name), getattr(expected, name))


def test_scaled_is_the_gram_of_the_scaled_pair() -> None:
    retain, forget = tensors(11), tensors(12)
    scaled = grams_by_layout(retain, forget).scaled(0.25, 8.0)
    expected = grams_by_layout([0.25 * t for t in retain], [8.0 * t for t in forget])  # powers of two: exact
    for name in ("retain", "forget", "cross"):
        assert np.array_equal(getattr(scaled, name), getattr(expected, name))


@pytest.mark.parametrize("limit", [1e-3, 1.0, 40.0, 1e6])
def test_clip_factors_are_those_of_torch_for_each_role(limit: float) -> None:
    retain, forget = tensors(13), [3.0 * t for t in tensors(14)]
    factors = clip_factors(grams_by_layout(retain, forget), limit)
    for factor, grads in zip(factors, (retain, forget), strict=True):
        params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(params, limit)
        for param, grad in zip(params, grads, strict=True):
            torch.testing.assert_close(param.grad, factor * grad, rtol=1e-12, atol=0)  # norms summed in another order


@pytest.mark.parametrize("limit", [None, 0, 0.0])
def test_no_limit_clips_nothing(limit: float | None) -> None:
    assert clip_factors(grams_by_layout(tensors(15), tensors(16)), limit) == (1.0, 1.0)


def test_clipping_zero_gradients_is_harmless() -> None:
    zero = Grams(np.zeros(2), np.zeros(2), np.zeros(2))
    assert clip_factors(zero, 1.0) == (1.0, 1.0)
