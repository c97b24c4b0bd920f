"""Crops, mirrors, colour noise and mean subtraction, plainly and against numpy."""

import numpy as np
import pytest
import torch

from alexnet import MeanSubtraction, augment


def draws_for(ids, epoch=0, seed=0, **kwargs):
    return augment.draw(np.asarray(ids, np.int64), seed=seed, epoch=epoch, margin=8, **kwargs)


def test_draws_depend_on_seed_epoch_and_id_and_on_nothing_else():
    whole = draws_for(range(100))
    some = draws_for([7, 93, 2])
    for a, b in zip(whole, some, strict=True):
        assert np.array_equal(a[[7, 93, 2]], b)
    for other in (draws_for(range(100), epoch=1), draws_for(range(100), seed=1)):
        assert not np.array_equal(whole.top, other.top)


def test_draws_are_uniform_fair_normal_and_independent():
    draws = draws_for(range(200_000))
    counts = np.bincount(draws.top, minlength=9)
    assert len(counts) == 9  # margin 8: offsets 0 to 8
    assert np.abs(counts / 200_000 - 1 / 9).max() < 0.003
    assert draws.flip.mean() == pytest.approx(0.5, abs=0.005)
    assert np.abs(draws.normal.mean(0)).max() < 0.01
    assert np.abs(draws.normal.std(0) - 1).max() < 0.01
    everything = np.column_stack([draws.top, draws.left, draws.flip, draws.normal])
    assert np.abs(np.corrcoef(everything.T) - np.eye(6)).max() < 0.01


def test_flips_can_be_switched_off():
    assert not draws_for(range(1000), flip=False).flip.any()


def reference(images, draws, shift, size):
    out = []
    for image, top, left, flip, add in zip(images, draws.top, draws.left, draws.flip, shift, strict=True):
        crop = image[top : top + size, left : left + size].astype(np.float64)
        crop = crop[:, ::-1] if flip else crop
        out.append(np.floor(np.clip(crop + add, 0, 255) + 0.5))
    return np.array(out)


@pytest.mark.parametrize("scale", [0.0, 1.0, 200.0])
def test_crop_flip_shift_equals_numpy(scale):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, 24, 24, 3), dtype=np.uint8)
    draws = draws_for(range(20))
    shift = (random.normal(size=(20, 3)) * scale).astype(np.float32)
    out = augment.crop_flip_shift(images, draws, shift, 16)
    difference = np.abs(out - reference(images, draws, shift, 16))
    assert difference.max() <= 1  # float32 may round a half the other way
    assert (difference > 0).mean() < 0.001
    assert out.dtype == np.uint8


@pytest.mark.parametrize("scale", [0.0, 1.0, 200.0])
def test_tensors_are_cut_mirrored_and_coloured_the_same_in_every_bit(scale):
    """Of images that are a part of others in memory, too."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (22, 24, 27, 3), dtype=np.uint8)
    draws = draws_for(range(22))
    shift = (random.normal(size=(22, 3)) * scale).astype(np.float32)
    wanted = augment.crop_flip_shift(images, draws, shift, 16)
    given = [torch.from_numpy(part) for part in (images, draws.top, draws.left, draws.flip, shift)]
    for part in (slice(None), slice(2, 20), slice(0, 0), slice(1, None, 3)):
        found = augment.crop_flip_shift_tensors(*(tensor[part] for tensor in given), 16)
        assert np.array_equal(found.numpy(), wanted[part])


def test_the_colour_shift_is_along_the_principal_components_with_the_named_magnitude():
    values, vectors = np.array([9000.0, 400.0, 25.0]), np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    normal = draws_for(range(50_000)).normal
    for noise, deviation in (("paper", 0.1 * values / 255), ("code2012", 0.1 * np.sqrt(values))):
        shift = augment.color_shift(normal, values, vectors, noise)
        np.testing.assert_allclose((shift @ vectors).std(0), deviation, rtol=0.02)
    assert not augment.color_shift(normal, values, vectors, "none").any()
    with pytest.raises(ValueError, match="sepia"):
        augment.color_shift(normal, values, vectors, "sepia")


def test_the_mean_image_is_cut_and_mirrored_like_the_image():
    random = np.random.default_rng(0)
    mean = random.uniform(0, 255, (24, 24, 3)).astype(np.float32)
    stored = np.repeat(np.rint(mean).astype(np.uint8)[None], 30, axis=0)
    draws = draws_for(range(30))
    crops = augment.crop_flip_shift(stored, draws, np.zeros((30, 3), np.float32), 16)
    tensors = [torch.from_numpy(part) for part in (crops, draws.top, draws.left, draws.flip)]
    out = MeanSubtraction(torch.from_numpy(mean), 16)(*tensors)
    assert out.shape == (30, 3, 16, 16)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.abs().max() <= 0.5 + 1e-4  # an image equal to the mean image is zero, up to its own rounding
    scaled = MeanSubtraction(torch.from_numpy(mean), 16, 1 / 64)(*tensors)
    torch.testing.assert_close(scaled, out / 64)


def test_the_noise_of_2012_leaves_the_net_s_input_centred():
    """Its source divides what is left after the mean image, not the image: the mean stays where validation has it."""
    random = np.random.default_rng(0)
    stored = random.integers(60, 180, (400, 24, 24, 3), dtype=np.uint8)
    mean = torch.from_numpy(stored.mean(0, dtype=np.float32))
    draws = draws_for(range(400))
    shift = augment.color_shift(draws.normal, np.array([900.0, 40.0, 4.0]), np.eye(3), "code2012")
    crops = augment.crop_flip_shift(stored, draws, shift, 16)
    cut = [torch.from_numpy(part) for part in (crops, draws.top, draws.left, draws.flip)]
    subtract = MeanSubtraction(mean, 16, 1 / 64)
    noisy = subtract(*cut, divisor=augment.CODE2012_SHRINK)
    assert noisy.mean().abs() < 0.5 / 64
    torch.testing.assert_close(noisy, subtract(*cut) / 1.1)


def test_a_crop_larger_than_the_stored_image_is_refused():
    with pytest.raises(ValueError, match="24x24"):
        MeanSubtraction(torch.zeros(24, 24, 3), 32)
