"""Trains every method for an epoch in float64 and saves the weights; run with or without torchrun.

    torchrun --nproc_per_node=2 tests/processes.py OUT

In float64 several processes and one differ by rounding alone, which a mistake of the hundredth digit would exceed.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from conftest import flags

import models
import unlearn
import unlearn_cpu
import utils
from models import distributed, inference

METHODS = unlearn.METHODS | unlearn_cpu.METHODS


def in_double():
    """Everything that the scripts do in float32, in float64."""
    torch.set_default_dtype(torch.float64)
    single = utils.Images.batches
    utils.Images.batches = lambda *arguments: (inputs.double() for inputs in single(*arguments))
    torch.Tensor.float = torch.Tensor.double


def main(out):
    device = utils.pick_device(Namespace(device="cpu"))
    data = utils.load_data(flags(), device)
    args = flags()
    split = utils.make_split(data, args)
    # 200 and 33 images: steps of 59 and of 33 images, which two processes cannot divide evenly, and one of 1.
    split = utils.Split(**vars(split) | {"retain": split.retain[:200], "forget": split.forget[:33]})
    in_double()
    model = partial(models.create_model, "resnet18", 10, width=8)
    found = {}
    for label, entry in METHODS.items():
        torch.manual_seed(0)
        recipe = unlearn.Recipe(1, 0.01, batch_size=32, momentum=entry.momentum)
        options = entry.options | ({"stop_accuracy": 0.0} if label == "GA" else {})
        losses, term = [], None
        if label.startswith("cpu_"):
            term = unlearn_cpu.ConformalTerm(data.held_out, split.train_calibration, 0.2, 0.01, 0.5)
        job = unlearn.Job(
            name=entry.name,
            label=label,
            model=model(),
            data=data,
            split=split,
            recipe=recipe,
            seed=1,
            options=options,
            new_model=model,
            term=term,
            epoch_done=losses.append,
            quiet=True,
        )
        trained = entry.run(job)
        found |= {f"{label} loss {record['epoch']}": torch.tensor(record["loss"]) for record in losses}
        found |= {f"{label} {name}": tensor for name, tensor in trained.state_dict().items()}

    passed = [0]
    net = model()
    net.register_forward_hook(lambda module, inputs, output: passed.__setitem__(0, passed[0] + len(output)))
    found["logits"], found["labels"] = inference.compute_logits(net, data.train, split.retain, batch_size=32)
    *_, found["features"] = inference.compute_features(net, data.train, split.retain, batch_size=7)
    found["passed"] = torch.tensor(passed[0])
    distributed.add_up([found["passed"]])
    if not distributed.rank():
        torch.save(found, out)


if __name__ == "__main__":
    main(sys.argv[1])
