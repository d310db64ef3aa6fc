"""Several simulated processes take turns until every exchange is complete."""

import itertools

import torch
import torch.distributed as dist

from models import distributed


class Processes:
    """Runs a function as each of ``world`` processes in turn.

    A collective operation returns what the others sent in the latest round. The k-th exchange is
    therefore right from round k + 1 on, and ``rounds`` must exceed the number of exchanges that
    depend on each other. The environment variables are those of torchrun.
    """

    def __init__(self, monkeypatch, world, rounds=3):
        self.world, self.rounds, self.setenv = world, rounds, monkeypatch.setenv
        self.sent, self.rank, self.exchange = {}, 0, None
        self.setenv("TORCHELASTIC_RUN_ID", "x")
        self.setenv("WORLD_SIZE", str(world))
        monkeypatch.setattr(dist, "all_gather", self.all_gather)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)

    def tensors_of_all(self, tensor):
        number = next(self.exchange)
        self.sent[number, self.rank] = tensor.clone()
        nothing = torch.zeros_like(tensor)
        return [self.sent.get((number, rank), nothing) for rank in range(self.world)]

    def all_gather(self, places, tensor):
        for place, sent in zip(places, self.tensors_of_all(tensor), strict=True):
            place.copy_(sent)

    def all_reduce(self, tensor):
        tensor.copy_(sum(self.tensors_of_all(tensor)))

    def run(self, function):
        """What ``function`` returns on each process in the last round."""
        for _ in range(self.rounds):
            results = []
            for rank in range(self.world):
                self.rank = rank
                self.setenv("RANK", str(rank))
                self.exchange = itertools.count()
                results.append(function())
        return results


class Shares:
    """Images that give each process its share of a batch. ``seen`` lists the batch sizes."""

    def __init__(self, images):
        self.images, self.labels, self.seen = images, images.labels, []
        self.size = images.size

    def batches(self, batches, augment=None):
        for indices in batches:
            self.seen.append(len(indices))
            yield from self.images.batches([distributed.local_rows(indices)], augment)
