"""Speed, as ratios of two sides that are timed in one run.

    python tests/benchmark.py mia evaluation

The plain side of each is written here, as the usual scripts do it. Nothing here is a test: a ratio depends on the
machine.
"""

import argparse
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC

sys.path.insert(0, str(Path(__file__).parents[1]))
import main_evaluate
import metrics
import models
import utils
from metrics import MIA, MIACR, classwise, samples

BENCHMARKS = {}


def benchmark(function):
    BENCHMARKS[function.__name__] = function
    return function


def seconds(call):
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


@benchmark
def mia(args):
    """The membership attack at the paper's size: 8,000 members, as many non-members, 5,000 targets and 2,000
    calibration images, decisions and probabilities, against scikit-learn's SVC with Platt's probabilities."""
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
            attack = MIA.Attack(members[:, None], non_members[:, None])  # noqa: B023 - called within the loop
            pair = ([torch.from_numpy(members)], [torch.from_numpy(non_members)])  # noqa: B023
            probabilities = MIACR.attack_probabilities(*pair, torch.from_numpy(points))[0]  # noqa: B023
            return attack.says_member(points[:, None]), probabilities.numpy()  # noqa: B023

        def plain():
            model = CalibratedClassifierCV(SVC(C=3, gamma="auto"), ensemble=False)
            model.fit(np.concatenate([members, non_members])[:, None], np.repeat([1, 0], 8000))  # noqa: B023
            svm = model.calibrated_classifiers_[0].estimator
            return svm.predict(points[:, None]) == 1, model.predict_proba(points[:, None])[:, 1]  # noqa: B023

        ours_s, ours_found = seconds(ours)
        plain_s, plain_found = seconds(plain)
        agree = np.mean(ours_found[0] == plain_found[0])
        apart = np.abs(ours_found[1] - plain_found[1]).max()
        print(
            f"mia, {kind}: scikit-learn {plain_s:.2f} s, ours {ours_s:.2f} s, ratio {plain_s / ours_s:.0f}; "
            f"{100 * agree:.2f} % of the decisions agree, probabilities within {apart:.4f}"
        )


@benchmark
def evaluation(args):
    """A full evaluation of one model (4 α, 100 resplits, all attacks, audit and class tables) against one bare
    forward pass over its images: at most 1.3 times that and 20 s is the aim."""
    rng = torch.Generator().manual_seed(0)
    parts = []
    for count in (args.images, args.images // 5):
        labels = torch.randint(10, (count,), generator=rng)
        pixels = torch.randint(0, 160, (count, 3, 32, 32), generator=rng, dtype=torch.uint8)
        pixels[torch.arange(count), labels % 3] += (9 * labels[:, None, None]).to(torch.uint8)
        parts.append(utils.Images(pixels.to(args.device), labels.to(args.device), utils.SPECS["cifar10"], 32, None))
    data = utils.Data(*parts, [str(number) for number in range(10)], "random")
    flags = Namespace(unlearn_type="random", retain_ratio=0.9, forget_class=None, forget_list=None, seed=1)
    flags = Namespace(**vars(flags), cal_sizes=[utils.default_cal_size(data)], resplits=100, batch_size=512)
    split = utils.make_split(data, flags)
    model = models.create_model("resnet18", 10, width=args.width).to(args.device)
    settings = metrics.Settings((0.05, 0.1, 0.15, 0.2))

    def bare():
        model.eval()
        with torch.no_grad():
            for images, indices in (
                (data.train, torch.cat([split.retain, split.forget])),
                (data.held_out, torch.cat([split.calibration, split.test])),
            ):
                for part in indices.split(512):
                    model(images.batch(part)).cpu()

    def ours():
        outputs, _ = main_evaluate.collect_outputs(model, data, split, flags)
        found = metrics.evaluate(outputs, settings)
        classwise.class_rows(outputs, settings, data.classes)
        samples.sample_rows(outputs, settings, split.forget)
        return found

    bare()
    times = [(seconds(bare)[0], seconds(ours)[0]) for _ in range(args.repeats)]
    bare_s, ours_s = (statistics.median(side) for side in zip(*times, strict=True))
    limit = 1.3 * bare_s + 20
    print(f"evaluation of {args.images} + {args.images // 5} images at width {args.width}: ", end="")
    print(f"bare forward pass {bare_s:.1f} s, all {ours_s:.1f} s, ratio {ours_s / bare_s:.2f}; aim below {limit:.1f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=50_000, help="evaluation: training images; a fifth is held out")
    parser.add_argument("--width", type=int, default=16, help="evaluation: of the ResNet-18")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")
    for name in args.names or BENCHMARKS:
        BENCHMARKS[name](args)


if __name__ == "__main__":
    main()
