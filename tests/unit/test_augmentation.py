"""Batches of images and their random augmentation, on one process and on two."""

from dataclasses import replace

import pytest
import torch
from torchvision.transforms.v2 import functional as transforms

import utils
from models import distributed, seeds
from models.seeds import derive

PLAIN = utils.DataSpec((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), crop_padding=2, flip=False, grayscale=0.0)


def random_pixels(count, side=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=rng)


def images(count=20, side=8, size=None, spec=PLAIN):
    return utils.Images(random_pixels(count, side), torch.arange(count) % 4, spec, size or side)


def normalised(pixels):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PLAIN.mean, PLAIN.std))
    return (pixels / 255 - mean) / std


# ---------------------------------------------------------------- crop, flip, grayscale


def augmented(spec, count=4000):
    image = random_pixels(1)[0]
    pixels = image.expand(count, -1, -1, -1)
    return image, utils.random_augment(pixels, spec, seeds.generator(1, "test"))


def shares(actual, count):
    """How often each value occurs, as a share."""
    return [actual.count(value) / len(actual) for value in range(count)]


def test_crops_are_uniform_shifts_of_the_zero_padded_image():
    image, made = augmented(PLAIN)
    padded = transforms.pad(image, [2])
    crops = {
        transforms.crop(padded, top, left, 8, 8).float().numpy().tobytes(): (top, left)
        for top in range(5)
        for left in range(5)
    }
    places = [crops[crop.contiguous().numpy().tobytes()] for crop in made]
    for axis in (0, 1):
        for share in shares([place[axis] for place in places], 5):
            assert abs(share - 1 / 5) < 0.035
    # Rows and columns are drawn independently.
    for share in shares([5 * top + left for top, left in places], 25):
        assert abs(share - 1 / 25) < 0.015


@pytest.mark.parametrize(
    ("change", "share", "transform"),
    [
        ({"flip": True}, 0.5, transforms.horizontal_flip),
        ({"grayscale": 0.3}, 0.3, lambda image: transforms.rgb_to_grayscale(image, 3)),
    ],
)
def test_share_of_the_images_is_flipped_or_gray_and_the_rest_unchanged(change, share, transform):
    image, made = augmented(replace(PLAIN, crop_padding=0, **change))
    changed = [crop.equal(transform(image).float()) for crop in made]
    rest = [crop for crop, is_changed in zip(made, changed, strict=True) if not is_changed]
    assert all(crop.equal(image.float()) for crop in rest)
    assert abs(sum(changed) / len(changed) - share) < 0.04


def test_augmentation_of_digits_is_pinned(digits):
    """Other draws change every published result."""
    batch = next(digits.train.batches([torch.arange(64)], seeds.generator(1, "augmentation", 1)))
    assert batch.double().sum().item() == pytest.approx(-979.7265, abs=1e-3)
    assert batch[5, 0, 3, 4].item() == pytest.approx(1.3473392, abs=1e-6)


def test_augmentation_on_two_processes_equals_that_on_one(torchrun):
    spec = replace(PLAIN, flip=True, grayscale=0.3)
    pixels = random_pixels(17)
    whole = utils.random_augment(pixels, spec, seeds.generator(1, "test"), [8, 9])
    assert whole.equal(utils.random_augment(pixels, spec, seeds.generator(1, "test")))
    for rank in (0, 1):
        torchrun(rank)
        mine = torch.cat([distributed.local_rows(batch) for batch in (pixels[:8], pixels[8:])])
        made = utils.random_augment(mine, spec, seeds.generator(1, "test"), [8, 9])
        assert made.equal(torch.cat([batch[rank::2] for batch in whole.split([8, 9])]))


# ---------------------------------------------------------------- batches


def test_batches_are_normalised_images_of_their_indices():
    data = images()
    index_batches = [torch.tensor(batch, dtype=torch.int64) for batch in ([3, 1], [], [7, 7, 0])]
    actual = list(data.batches(iter(index_batches)))
    assert [len(batch) for batch in actual] == [2, 0, 3]
    for indices, batch in zip(index_batches, actual, strict=True):
        torch.testing.assert_close(batch, normalised(data.pixels[indices]))
        assert batch.dtype == torch.float32
    assert next(data.batches(index_batches[2:])).equal(actual[2])


def test_images_are_resized_to_the_input_size_of_the_model():
    data = images(size=13)
    expected = transforms.resize(data.pixels[:3], [13, 13], antialias=True)
    torch.testing.assert_close(next(data.batches([torch.arange(3)])), normalised(expected))
    assert next(data.batches([torch.arange(3)], seeds.generator(1, "test"))).shape == (3, 3, 13, 13)
    rectangles = utils.Images(random_pixels(2)[:, :, :6], torch.zeros(2), PLAIN, 8)
    assert next(rectangles.batches([torch.arange(2)])).shape == (2, 3, 8, 8)


def test_two_processes_get_every_second_image_of_each_batch(torchrun):
    data = images()
    index_batches = [torch.tensor([3, 1, 9]), torch.tensor([5]), torch.tensor([7, 6, 0, 2])]
    whole = list(data.batches(index_batches, seeds.generator(1, "test")))
    for rank in (0, 1):
        torchrun(rank)
        mine = list(data.batches(index_batches, seeds.generator(1, "test")))
        assert all(batch.equal(full[rank::2]) for batch, full in zip(mine, whole, strict=True))


# ---------------------------------------------------------------- random numbers


def test_random_numbers_of_a_seed_and_purpose_are_pinned():
    """Changing these numbers changes every published result."""
    assert utils.permutation(1, "forget", 8).tolist() == [7, 4, 0, 5, 2, 6, 3, 1]
    assert seeds.generator(1, "order", "retain", 2).initial_seed() == 7433692491322154092


def test_another_seed_or_purpose_gives_other_random_numbers():
    purposes = ((), ("a",), ("a", 1), ("a", 2), ("b", 1))
    derived = {derive(seed, purpose) for seed in (1, 2, 12) for purpose in purposes}
    assert len(derived) == 15 and all(0 <= seed < 2**63 for seed in derived)
    draw = torch.rand(3, generator=seeds.generator(1, "a"))
    assert draw.equal(torch.rand(3, generator=seeds.generator(1, "a")))
    seeds.seed_everything(1, "a")
    assert torch.rand(3).equal(draw)
