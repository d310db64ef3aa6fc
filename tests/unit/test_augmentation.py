"""Batches of images and their random augmentation, on one process and on two."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.v2 import functional as transforms

import utils
from models.seeds import derive
from models import distributed

PLAIN = utils.DataSpec((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), crop_padding=2, flip=False, grayscale=0.0)


def random_pixels(count, side=8, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=rng)


def images(count=20, side=8, size=None, spec=PLAIN):
    return utils.Images(random_pixels(count, side), torch.arange(count) % 4, spec, size or side)


# ---------------------------------------------------------------- crop, flip, grayscale


def augmented(spec, seed=1, count=4000):
    image = random_pixels(1)[0]
    made = utils.random_augment(
        image.expand(count, -1, -1, -1), spec, utils.generator(seed, "test")
    )
    return image, made


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


def test_half_of_the_images_are_flipped():
    image, made = augmented(replace(PLAIN, crop_padding=0, flip=True))
    flipped = transforms.horizontal_flip(image).float()
    actual = [int(crop.equal(flipped)) for crop in made]
    assert all(
        crop.equal(image.float())
        for crop, is_flipped in zip(made, actual, strict=True)
        if not is_flipped
    )
    assert abs(shares(actual, 2)[1] - 0.5) < 0.04


def test_grayscale_share_of_the_images_is_gray():
    image, made = augmented(replace(PLAIN, crop_padding=0, grayscale=0.3))
    gray = transforms.rgb_to_grayscale(image, num_output_channels=3).float()
    actual = [int(crop.equal(gray)) for crop in made]
    assert all(
        crop.equal(image.float()) for crop, is_gray in zip(made, actual, strict=True) if not is_gray
    )
    assert abs(shares(actual, 2)[1] - 0.3) < 0.04


def test_draw_equal_to_the_share_leaves_image_unchanged(monkeypatch):
    """Draws are in [0, 1): draws < p have probability p, but draws <= p have more."""
    pixels, still = random_pixels(2), replace(PLAIN, crop_padding=0)
    for spec, share in ((replace(still, flip=True), 0.5), (replace(still, grayscale=0.25), 0.25)):
        for below in (0.0, 2.0**-20):

            def rand(size, draw=share - below, **options):
                return torch.full(size, draw)

            monkeypatch.setattr(torch, "rand", rand)
            made = utils.random_augment(pixels, spec, utils.generator(1, "test"))
            assert made.equal(pixels.float()) == (below == 0)


def test_augmentation_draws_only_what_the_data_set_needs():
    image, made = augmented(replace(PLAIN, crop_padding=0), count=5)
    assert made.equal(image.float().expand(5, -1, -1, -1)) and made.dtype == torch.float32


def test_augmentation_is_drawn_on_the_device_of_the_images(monkeypatch):
    pixels, asked = random_pixels(2), []
    for name in ("rand", "randint"):
        plain = getattr(torch, name)
        monkeypatch.setattr(
            torch,
            name,
            lambda *arguments, plain=plain, **options: (
                asked.append(options["device"]) or plain(*arguments, **options)
            ),
        )
    utils.random_augment(
        pixels, replace(PLAIN, flip=True, grayscale=0.3), utils.generator(1, "test")
    )
    assert asked == [torch.device("cpu")] * 4


def test_augmentation_on_two_processes_equals_that_on_one(monkeypatch):
    spec = replace(PLAIN, flip=True, grayscale=0.3)
    pixels = random_pixels(17)
    whole = utils.random_augment(pixels, spec, utils.generator(1, "test"), [8, 9])
    assert whole.equal(utils.random_augment(pixels, spec, utils.generator(1, "test")))
    batches = [pixels[:8], pixels[8:]]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mine = torch.cat([distributed.local_rows(batch) for batch in batches])
        made = utils.random_augment(mine, spec, utils.generator(1, "test"), [8, 9])
        assert made.equal(torch.cat([batch[rank::2] for batch in whole.split([8, 9])]))


# ---------------------------------------------------------------- batches


def test_batches_are_normalised_images_of_their_indices():
    data = images()
    index_batches = [torch.tensor(batch, dtype=torch.int64) for batch in ([3, 1], [], [7, 7, 0])]
    actual = list(data.batches(iter(index_batches)))
    assert [len(batch) for batch in actual] == [2, 0, 3]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PLAIN.mean, PLAIN.std))
    for indices, batch in zip(index_batches, actual, strict=True):
        torch.testing.assert_close(batch, (data.pixels[indices] / 255 - mean) / std)
        assert batch.dtype == torch.float32
    assert data.batch(index_batches[2]).equal(actual[2])


def test_batch_without_a_generator_is_not_augmented():
    data, indices = images(), torch.arange(6)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PLAIN.mean, PLAIN.std))
    made = data.batch(indices, utils.generator(3, "test"))
    expected = utils.random_augment(data.pixels[indices], PLAIN, utils.generator(3, "test"))
    torch.testing.assert_close(made, (expected / 255 - mean) / std)
    assert not made.equal(data.batch(indices))


@pytest.mark.parametrize("size", [4, 8, 13])
def test_images_are_resized_to_the_input_size_of_the_model(size):
    data = images(size=size)
    expected = (
        data.pixels[:3]
        if size == 8
        else transforms.resize(data.pixels[:3], [size, size], antialias=True)
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PLAIN.mean, PLAIN.std))
    torch.testing.assert_close(data.batch(torch.arange(3)), (expected / 255 - mean) / std)
    assert data.batch(torch.arange(3), utils.generator(1, "test")).shape == (3, 3, size, size)


def test_rectangular_images_are_resized_to_a_square():
    data = utils.Images(random_pixels(2)[:, :, :6], torch.zeros(2), PLAIN, 8)
    assert data.batch(torch.arange(2)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([2] * 5, [2, 2, 1]), ([1, 1, 1], [3]), ([16, 16], [1, 1]), ([0, 3], [2])],
)
def test_small_batches_on_gpu_are_augmented_together(sizes, expected, monkeypatch):
    """A GPU augments 4 million pixels at a time, here 4 images of 1024×1024. It is simulated."""
    data = images(1, side=2, size=1024)
    data.labels = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    constants, groups = utils._constants(PLAIN, torch.device("cpu")), []
    monkeypatch.setattr(utils, "_constants", lambda spec, device: constants)
    monkeypatch.setattr(
        utils.transforms,
        "resize",
        lambda pixels, size, antialias: torch.zeros(1).expand(len(pixels), 3, *size),
    )
    monkeypatch.setattr(
        utils,
        "random_augment",
        lambda pixels, spec, rng, batch_sizes: (
            groups.append(batch_sizes) or torch.zeros(len(pixels), 3, 1, 1)
        ),
    )
    index_batches = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    actual = list(data.batches(index_batches, utils.generator(1, "test")))
    assert [len(group) for group in groups] == expected
    assert [len(batch) for batch in actual] == sizes
    groups.clear()
    data.labels = torch.zeros(1)
    list(data.batches(index_batches, utils.generator(1, "test")))
    assert groups == [[size] for size in sizes]


def test_two_processes_get_every_second_image_of_each_batch(monkeypatch):
    data = images()
    index_batches = [torch.tensor([3, 1, 9]), torch.tensor([5]), torch.tensor([7, 6, 0, 2])]
    whole = list(data.batches(index_batches, utils.generator(1, "test")))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mine = list(data.batches(index_batches, utils.generator(1, "test")))
        assert all(batch.equal(full[rank::2]) for batch, full in zip(mine, whole, strict=True))


# ---------------------------------------------------------------- simulated processes


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
def test_gathered_rows_of_all_processes_are_in_order(count, monkeypatch):
    world, rows = 3, torch.arange(2.0 * count, requires_grad=True).reshape(count, 2)
    padded = {}

    def all_gather(all_rows, mine):
        assert len(mine) == math.ceil(count / world)  # at most the longest share is sent
        padded[distributed.rank()] = mine.clone()
        for number, rows_of_rank in enumerate(all_rows):
            rows_of_rank.copy_(padded.get(number, torch.full_like(mine, math.nan)))

    monkeypatch.setattr(distributed, "world_size", lambda: world)
    monkeypatch.setattr(utils.dist, "all_gather", all_gather)
    for attempt in (1, 2):  # in the second all rows are known
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            assert distributed.local_rows(rows).equal(rows[rank::world])
            actual = distributed.gather_rows(distributed.local_rows(rows), count)
            assert attempt == 1 or (actual.equal(rows) and not actual.requires_grad)


def test_gathered_rows_of_one_process_keep_their_gradient(monkeypatch):
    rows = torch.ones(3, 2, requires_grad=True)
    assert distributed.gather_rows(rows, 3) is rows and distributed.local_rows(rows).equal(rows)
    monkeypatch.setattr(utils.dist, "all_reduce", lambda tensor: tensor.mul_(2))
    totals = [torch.ones(2), torch.ones(1)]
    distributed.add_up(totals)
    assert [total.tolist() for total in totals] == [[1, 1], [1]]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    distributed.add_up(totals)
    assert [total.tolist() for total in totals] == [[2, 2], [2]]


# ---------------------------------------------------------------- random numbers


def test_random_numbers_of_a_seed_and_purpose_are_pinned():
    """Changing these numbers changes every published result."""
    assert utils.permutation(1, "forget", 8).tolist() == [7, 4, 0, 5, 2, 6, 3, 1]
    assert utils.generator(1, "order", "retain", 2).initial_seed() == 7433692491322154092


def test_generator_is_on_the_requested_device(monkeypatch):
    class Asked:
        def __init__(self, device):
            self.device = device

        def manual_seed(self, seed):
            return self.device, seed

    seed = utils.generator(1, "a", 2).initial_seed()
    monkeypatch.setattr(torch, "Generator", Asked)
    assert utils.generator(1, "a", 2, device="cuda:1") == ("cuda:1", seed)


def test_another_seed_or_purpose_gives_other_random_numbers():
    seeds = {
        derive(seed, purpose)
        for seed in (1, 2, 12)
        for purpose in ((), ("a",), ("a", 1), ("a", 2), ("b", 1))
    }
    assert len(seeds) == 15 and all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62
    assert torch.rand(3, generator=utils.generator(1, "a")).equal(
        torch.rand(3, generator=utils.generator(1, "a"))
    )
    utils.seed_everything(1, "a")
    assert torch.rand(3).equal(torch.rand(3, generator=utils.generator(1, "a")))
