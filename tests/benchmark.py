"""Speed, as ratios of two sides that are timed in one run.

    python tests/benchmark.py augmentation epoch
    python tests/benchmark.py --device cuda --width 64 --images 50000 --batch_size 512

The plain side of each benchmark is written here, as the usual scripts do it. These are not tests:
a ratio depends on the machine. Images are random 32×32 pixels of ten classes that differ in
brightness. tests/README.md has the results.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import utils  # before torch; Python itself adds the folder of this file

# isort: split
import numpy as np
import torch
from helpers import ROOT, script_environment
from PIL import Image
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import main_evaluate
import metrics
import models
import unlearn
from metrics import attack, classwise, samples
from models import fisher as importances
from models import seeds

BENCHMARKS = {}


def benchmark(function):
    BENCHMARKS[function.__name__] = function
    return function


# bf16 on tensor cores without sparsity, from the vendor's data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def seconds(call):
    """(seconds, result) of a call, including the GPU's work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    actual = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, actual


def report(subject, *numbers):
    print(f"{subject}: {', '.join(numbers)}")


def random_data(args, count=None):
    """Training images, and a fifth as many held-out ones, whose class shows in the brightness of a
    channel.
    """
    rng = torch.Generator().manual_seed(0)
    image_sets = []
    for size in (count or args.images, (count or args.images) // 5):
        labels = torch.randint(10, (size,), generator=rng)
        pixels = torch.randint(0, 160, (size, 3, 32, 32), generator=rng, dtype=torch.uint8)
        pixels[torch.arange(size), labels % 3] += (9 * labels[:, None, None]).to(torch.uint8)
        image_sets.append(
            utils.Images(
                pixels.to(args.device), labels.to(args.device), utils.SPECS["cifar10"], 32, None
            )
        )
    return utils.Data(*image_sets, [str(number) for number in range(10)], "random")


class PlainImages(torch.utils.data.Dataset):
    """The usual data set: an array whose images pass through PIL one by one."""

    def __init__(self, images, augmented):
        spec = images.spec
        self.arrays = images.pixels.permute(0, 2, 3, 1).cpu().numpy()
        self.labels = images.labels.tolist()
        steps = [
            transforms.RandomCrop(32, padding=spec.crop_padding),
            transforms.RandomHorizontalFlip(),
        ]
        steps = [*steps, transforms.RandomGrayscale(spec.grayscale)] if augmented else []
        self.transform = transforms.Compose(
            [*steps, transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.arrays[index])), self.labels[index]


def plain_loader(images, args, augmented=True, indices=None):
    actual = PlainImages(images, augmented)
    actual = actual if indices is None else Subset(actual, indices.tolist())
    return DataLoader(actual, args.batch_size, shuffle=augmented, num_workers=0)


def flops_of_a_step(model, inputs):
    """Floating-point operations of forward and backward pass, for one image."""
    with FlopCounterMode(display=False) as counter:
        model(inputs).sum().backward()
    return counter.get_total_flops() / len(inputs)


def matmul_speed(args, dtype):
    """Operations a second of a large matrix product: what this device reaches."""
    side = 8192 if args.device != "cpu" else 2048
    a = torch.randn(side, side, device=args.device).to(dtype)
    seconds(lambda: a @ a)
    return 2 * side**3 / min(seconds(lambda: a @ a)[0] for _ in range(5))


@benchmark
def augmentation(args):
    """Augmented training batches of one epoch: per-image PIL transforms against batches on the
    device.
    """
    data = random_data(args)
    few = torch.arange(min(args.images, 5000))
    order = torch.randperm(args.images).to(args.device).split(args.batch_size)

    def ours():
        for batch in data.train.batches(order, seeds.generator(1, "benchmark", device=args.device)):
            batch.sum()

    def plain():
        for inputs, _ in plain_loader(data.train, args, indices=few):
            inputs.to(args.device).sum()

    ours()
    ours_speed = args.images / statistics.median(seconds(ours)[0] for _ in range(args.repeats))
    plain_speed = len(few) / statistics.median(seconds(plain)[0] for _ in range(args.repeats))
    report(
        f"augmentation in batches of {args.batch_size}",
        f"plain {plain_speed:,.0f} images/s",
        f"here {ours_speed:,.0f} images/s",
        f"ratio {ours_speed / plain_speed:.0f}",
    )


@benchmark
def epoch(args):
    """A training epoch: a plain fp32 loop over the PIL loader, bare steps on one ready batch, and
    the project's loop, by its own record.
    """
    data = random_data(args)
    few = torch.arange(min(args.images, 2560))
    everything = torch.arange(len(data.train), device=args.device)
    precision = utils.pick_precision(args, torch.device(args.device))

    def new():
        torch.manual_seed(0)
        layout = torch.channels_last if args.device != "cpu" else torch.preserve_format
        model = (
            models.create_model("resnet18", 10, width=args.width)
            .to(args.device, memory_format=layout)
            .train()
        )
        return model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)

    def step(model, optimizer, inputs, labels):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    model, optimizer = new()
    loader = plain_loader(data.train, args, indices=few)

    def plain():
        total = 0.0
        for inputs, labels in loader:
            total += step(model, optimizer, inputs.to(args.device), labels.to(args.device)).item()

    inputs = data.train.batch(everything[: args.batch_size])
    labels = data.train.labels[: args.batch_size]
    steps = max(1, len(few) // args.batch_size)

    def bare():
        with torch.autocast(args.device, torch.bfloat16, enabled=precision == "bf16"):
            for _ in range(steps):
                step(model, optimizer, inputs, labels)

    rates = []

    def epoch_done(record):  # the three sides take turns
        bare_rate = steps * args.batch_size / seconds(bare)[0]
        plain_rate = len(few) / seconds(plain)[0]
        rates.append((record["images_per_second"], bare_rate, plain_rate))

    retain = everything[: len(few)] if args.device == "cpu" else everything
    nothing = everything[:0]
    split = utils.Split(retain, nothing, nothing, nothing, nothing, nothing, nothing)
    recipe = unlearn.Recipe(1 + args.repeats, 0.01, args.batch_size, precision=precision)
    job = unlearn.Job(
        name="original",
        label="original",
        model=new()[0],
        data=data,
        split=split,
        recipe=recipe,
        seed=1,
        epoch_done=epoch_done,
        quiet=True,
        compile=args.compile,
    )
    unlearn.train(job, unlearn.retain_cross_entropy)
    # The first epoch is a warm-up and includes compilation.
    ours_speed, bare_speed, plain_speed = (
        statistics.median(side) for side in zip(*rates[1:], strict=True)
    )
    work = flops_of_a_step(model, inputs[:8]) * ours_speed
    reached = matmul_speed(args, torch.bfloat16 if precision == "bf16" else torch.float32)
    name = torch.cuda.get_device_name() if args.device != "cpu" else ""
    peaks = [peak for chip, peak in PEAKS.items() if chip in name and precision == "bf16"]
    report(
        f"epoch at width {args.width} in batches of {args.batch_size}, {precision}",
        f"plain {plain_speed:,.0f} images/s",
        f"bare steps {bare_speed:,.0f}",
        f"here {ours_speed:,.0f}",
        f"ratio {ours_speed / plain_speed:.2f} to plain",
        f"{bare_speed / ours_speed:.2f} × the time of bare steps",
        f"{work / 1e12:.3f} TFLOP/s",
        f"{100 * work / reached:.0f} % of a large matrix product on this machine",
        *(f"{100 * work / peak:.0f} % of the peak of {name}" for peak in peaks),
    )


@benchmark
def fisher(args):
    """The diagonal Fisher information of the retain images: one image and one class at a time
    against chunks.
    """
    data = random_data(args, min(args.images, 50_000))
    model = models.create_model("resnet18", 10, width=args.width).to(args.device).eval()
    many = torch.arange(64 if args.device == "cpu" else len(data.train), device=args.device)
    few = many[:8]

    def plain():
        total = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for index in few:
            log_p = F.log_softmax(model(data.train.batch(index[None])), dim=1)[0]
            for number in range(10):
                actual = torch.autograd.grad(
                    log_p[number], list(model.parameters()), retain_graph=number < 9
                )
                for sum_, gradient in zip(total, actual, strict=True):
                    sum_ += log_p[number].exp().item() * gradient.square()
        return [tensor / len(few) for tensor in total]

    def ours(indices):
        return importances.diagonal_fisher(model, data.train, indices, importances.expected_scores)

    expected, actual = plain(), ours(few)
    for sum_, tensor in zip(expected, actual.values(), strict=True):
        torch.testing.assert_close(sum_, tensor, rtol=1e-3, atol=1e-3 * sum_.abs().max().item())
    times = [
        (seconds(plain)[0] / len(few), seconds(lambda: ours(many))[0] / len(many))
        for _ in range(args.repeats)
    ]
    plain_s, ours_s = (statistics.median(side) for side in zip(*times, strict=True))
    report(
        f"Fisher information at width {args.width}",
        f"plain {1000 * plain_s:.0f} ms per image",
        f"here {1000 * ours_s:.1f} ms",
        f"ratio {plain_s / ours_s:.1f}",
        f"45,000 images take {750 * ours_s:.1f} min",
    )


@benchmark
def startup(args):
    """From the start of a script to its first batch, digits, against importing torch, timm and
    scikit-learn.
    """
    with tempfile.TemporaryDirectory() as folder:

        def run(*command, fault=()):
            options = {"env": script_environment(folder, fault), "stdout": subprocess.DEVNULL}
            call = partial(subprocess.run, [sys.executable, *command], check=True, **options)
            return seconds(call)[0]

        def imports():
            return run("-c", "import torch, timm, sklearn")

        def script():
            command = [str(ROOT / "main_original_model.py"), "--runs_dir", folder]
            return run(*command, "--wandb_mode", "disabled", fault=["first_batch"])

        imports()
        times = [(imports(), script()) for _ in range(max(3, args.repeats))]
    imports_s, ours_s = (statistics.median(side) for side in zip(*times, strict=True))
    report(
        "start to first batch",
        f"imports {imports_s:.1f} s",
        f"script {ours_s:.1f} s",
        f"ratio {ours_s / imports_s:.2f}",
    )


@benchmark
def busy(args):
    """Training speed on digits with one busy process per core and on an otherwise idle machine.

    Waiting OpenMP threads either sleep (the scripts' setting) or spin, or there is one thread only.
    """

    def speed(settings):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "main_original_model.py"), "--device", "cpu"]
            command += ["--width", str(args.width), "--precision", args.precision]
            command += ["--num_epochs", "4", "--runs_dir", folder, "--wandb_mode", "disabled"]
            environment = {
                key: value
                for key, value in os.environ.items()
                if not key.startswith(("OMP_", "GOMP"))
            }
            subprocess.run(
                command, check=True, env=environment | settings, stdout=subprocess.DEVNULL
            )
            (history,) = Path(folder).rglob("history.jsonl")
            rates = [
                json.loads(line)["images_per_second"] for line in history.read_text().splitlines()
            ]
        return statistics.median(rates[1:])

    @contextmanager
    def busy_processes():
        program = [sys.executable, str(ROOT / "tests/faults/busy.py")]
        loops = [subprocess.Popen(program) for _ in range(os.cpu_count())]
        try:
            yield
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()

    sides = {
        "the scripts' setting": {},
        "threads that spin": {"OMP_WAIT_POLICY": "ACTIVE"},
        "one thread": {"OMP_NUM_THREADS": "1"},
    }
    for what, settings in sides.items():
        idle = speed(settings)
        with busy_processes():
            loaded = speed(settings)
        report(
            f"training at width {args.width} next to {os.cpu_count()} busy processes, {what}",
            f"{loaded:,.0f} images/s",
            f"idle {idle:,.0f} images/s",
            f"ratio {loaded / idle:.2f}",
        )


@benchmark
def jobs(args):
    """Eight trainings on digits: two at a time, one after the other, and as eight commands."""

    def train(*seeds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "main_original_model.py"), "--device", "cpu"]
            command += ["--width", str(args.width), "--runs_dir", folder, *seeds]
            command += ["--wandb_mode", "disabled"]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - start

    seeds = [str(seed) for seed in range(1, 9)]
    together = train("--seeds", ",".join(seeds), "--jobs", "2")
    alone = train("--seeds", ",".join(seeds))
    commands = sum(train("--seed", seed) for seed in seeds)
    report(
        f"eight trainings on digits, width {args.width}",
        f"--jobs 2 {together:.1f} s",
        f"--jobs 1 {alone:.1f} s",
        f"eight commands {commands:.1f} s",
        f"ratios {alone / together:.2f} and {commands / together:.2f}",
    )


@benchmark
def mia(args):
    """The membership attack at the paper's size against scikit-learn's SVC with Platt scaling.

    8,000 members, as many non-members, 5,000 targets and 2,000 calibration images; decisions and
    probabilities.
    """
    rng = np.random.default_rng(0)
    kinds = {
        "members surer": lambda n, member: rng.beta(6 if member else 3, 0.7, n),
        "nearly certain": lambda n, member: 1 - 10 ** -rng.exponential(5 if member else 3, n),
        "no difference": lambda n, member: rng.beta(5, 1, n),
    }
    for kind, draw in kinds.items():
        members, non_members = draw(8000, True), draw(8000, False)
        points = np.concatenate([draw(2500, True), draw(4500, False)])

        def ours():
            # Called within the loop, hence the noqa.
            trained = attack.Attack(members[:, None], non_members[:, None])  # noqa: B023
            decisions = trained.says_member(points[:, None])  # noqa: B023
            sides = members, non_members  # noqa: B023
            return decisions, attack.membership_probabilities(*sides, points)  # noqa: B023

        def plain():
            model = CalibratedClassifierCV(SVC(C=3, gamma="auto"), ensemble=False)
            model.fit(np.concatenate([members, non_members])[:, None], np.repeat([1, 0], 8000))  # noqa: B023
            svm = model.calibrated_classifiers_[0].estimator
            return svm.predict(points[:, None]) == 1, model.predict_proba(points[:, None])[:, 1]  # noqa: B023

        ours_s, ours_found = seconds(ours)
        plain_s, plain_found = seconds(plain)
        agree = np.mean(ours_found[0] == plain_found[0])
        apart = np.abs(ours_found[1] - plain_found[1]).max()
        report(
            f"mia, {kind}",
            f"scikit-learn {plain_s:.2f} s",
            f"here {ours_s:.2f} s",
            f"ratio {plain_s / ours_s:.0f}",
            f"{100 * agree:.2f} % of the decisions agree",
            f"probabilities within {apart:.4f}",
        )


@benchmark
def evaluation(args):
    """A full evaluation of one model: 4 α, 100 resplits, all attacks, audit and class tables.

    It is compared with the usual one (a pass of each set per α, one SVM with probabilities), and
    with one bare forward pass over its images. The aim is at most 1.3 times that pass and 20 s.
    """
    data = random_data(args)
    flags = Namespace(
        unlearn_type="random", retain_ratio=0.9, forget_class=None, forget_list=None, seed=1
    )
    flags = Namespace(
        **vars(flags), cal_sizes=[utils.default_cal_size(data)], resplits=100, batch_size=None
    )
    split = utils.make_split(data, utils.scenario_of(flags))
    model = models.create_model("resnet18", 10, width=args.width).to(args.device)
    settings = metrics.Settings((0.05, 0.1, 0.15, 0.2))
    evaluated = main_evaluate.Evaluation(
        flags,
        data,
        torch.device(args.device),
        split=split,
        folder=Path(),
        settings=settings,
    )
    sets = [(data.train, split.retain), (data.train, split.forget)]
    sets += [(data.held_out, split.calibration), (data.held_out, split.test)]

    def bare():
        model.eval()
        with torch.no_grad():
            for images, indices in sets:
                for batch in indices.split(args.batch_size):
                    model(images.batch(batch)).cpu()

    def plain_pass(images, indices):
        actual, labels = [], []
        with torch.no_grad():
            for inputs, targets in plain_loader(images, args, augmented=False, indices=indices):
                actual.append(model(inputs.to(args.device)).softmax(dim=1).cpu().numpy())
                labels.append(targets.numpy())
        return np.concatenate(actual), np.concatenate(labels)

    def plain():
        for alpha in settings.alphas:
            passes = [plain_pass(*each) for each in sets]
            retain, forget, calibration, test = (
                actual[np.arange(len(labels)), labels] for actual, labels in passes
            )
            n = len(calibration)
            level = min(1.0, np.ceil((n + 1) * (1 - alpha)) / n)
            q_hat = np.quantile(1 - calibration, level)
            for actual, _ in passes:
                (1 - actual <= q_hat).sum(axis=1).mean()
        count = min(len(retain), len(test))
        confidence = np.concatenate([retain[:count], test[:count]])[:, None]
        attack = CalibratedClassifierCV(SVC(C=3, gamma="auto"), ensemble=False)
        return attack.fit(confidence, np.repeat([1, 0], count)).predict_proba(forget[:, None])

    def ours():
        outputs, _ = main_evaluate.compute_outputs(model, evaluated)
        conformal_scores = metrics.ConformalScores(outputs, settings)
        actual = metrics.evaluate(conformal_scores)
        classwise.class_rows(conformal_scores, data.classes)
        samples.sample_rows(conformal_scores, split.forget)
        return actual

    bare()
    times = [[seconds(side)[0] for side in (plain, bare, ours)] for _ in range(args.repeats)]
    plain_s, bare_s, ours_s = (statistics.median(side) for side in zip(*times, strict=True))
    report(
        f"evaluation of {args.images} + {args.images // 5} images at width {args.width}",
        f"plain {plain_s:.1f} s",
        f"bare forward pass {bare_s:.1f} s",
        f"here {ours_s:.1f} s",
        f"ratio {plain_s / ours_s:.1f} to plain",
        f"{ours_s / bare_s:.2f} × the bare pass (aim below {1.3 * bare_s + 20:.1f} s)",
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], default=[], metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--images",
        type=int,
        help="training images, plus a fifth as many held-out ones "
        "(default: 10,000; evaluation: 50,000)",
    )
    parser.add_argument("--width", type=int, default=16, help="of the ResNet-18")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="of the training and of all plain sides"
    )
    parser.add_argument("--precision", choices=["auto", "fp32", "tf32", "bf16"], default="auto")
    parser.add_argument("--compile", action="store_true", help="epoch: the project's side compiled")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = utils.pick_device(args)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device} ({where})")
    for name in args.names or BENCHMARKS:
        images = args.images or (50_000 if name == "evaluation" else 10_000)
        BENCHMARKS[name](Namespace(**vars(args) | {"images": images}))


if __name__ == "__main__":
    main()
