"""Trains every method for an epoch in float64 and saves the weights, with or without torchrun.

    torchrun --nproc_per_node=2 tests/scripts/train_every_method.py OUT

In float64 the results of one and two processes differ only by rounding, which is smaller than the
effect of a mistake.
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
from helpers import flags

import models
import unlearn
import unlearn_cpu
import utils
from models import distributed, inference

METHODS = unlearn.METHODS | unlearn_cpu.METHODS
VARIANTS = {  # of these methods, with options other than the defaults
    "ga_plus in two passes": ("ga_plus", {"passes": 2}),
    "cpu_ga_plus in two passes": ("cpu_ga_plus", {"passes": 2}),
    "ssd by image": ("ssd", {"importances": "image"}),
    "teacher of a sample": ("teacher", {"retain_share": 0.5}),
    "scrub with rewinding": ("scrub", {"rewind": True}),
    "amun without forget images": ("amun", {"forget_images": "leave"}),
}


def use_float64():
    """Make the scripts compute in float64 what they compute in float32."""
    torch.set_default_dtype(torch.float64)
    single = utils.Images.batches
    utils.Images.batches = lambda *arguments: (inputs.double() for inputs in single(*arguments))
    torch.Tensor.float = torch.Tensor.double


def main(out):
    device = utils.pick_device(Namespace(device="cpu"))
    data = utils.read_data(flags(), device)
    args = flags()
    split = utils.make_split(data, utils.scenario_of(args))
    # Steps of 59, 33 and 1 images: two processes cannot divide them evenly.
    few = {"retain": split.retain[:200], "forget": split.forget[:33]}
    split = utils.Split(**vars(split) | few)
    use_float64()
    model = partial(models.create_model, "resnet18", 10, width=8)
    results = {}
    runs = {label: (label, {}) for label in METHODS} | VARIANTS
    for name, (label, options) in runs.items():
        method = METHODS[label]
        torch.manual_seed(0)
        term = None
        if label.startswith("cpu_"):
            term = unlearn_cpu.ConformalTerm(
                data.held_out, split.train_calibration, alpha=0.2, delta=0.01, lamda=0.5
            )
        losses = []
        job = unlearn.Job(
            name=label.removeprefix("cpu_"),
            label=label,
            model=model(),
            data=data,
            split=split,
            recipe=unlearn.Recipe(1, 0.01, batch_size=32),
            seed=1,
            options=method.options | {"stop_accuracy": 0.0} | options,
            new_model=model,
            term=term,
            epoch_done=losses.append,
            quiet=True,
        )
        trained = method.run(job)
        for record in losses:
            results[f"{name} loss {record['epoch']}"] = torch.tensor(record["loss"])
        for weight, tensor in trained.state_dict().items():
            results[f"{name} {weight}"] = tensor

    passed = [0]
    net = model()

    def count(module, inputs, output):
        passed[0] += len(output)

    net.register_forward_hook(count)
    logits, labels = inference.compute_logits(net, data.train, split.retain, batch_size=32)
    results |= {"logits": logits, "labels": labels}
    *_, features = inference.compute_features(net, data.train, split.retain, batch_size=7)
    results["features"] = features
    results["passed"] = torch.tensor(passed[0])
    distributed.add_up([results["passed"]])
    if not distributed.rank():
        torch.save(results, out)


if __name__ == "__main__":
    main(sys.argv[1])
