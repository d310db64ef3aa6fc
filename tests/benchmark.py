"""Speed, as ratios of two sides that are timed in one run.

    python tests/benchmark.py epoch evaluation
    python tests/benchmark.py epoch --width 64 --images 50000 --batch_size 512
    python tests/benchmark.py gpu

The plain side of each benchmark is written here, as the usual scripts do it. These are not tests:
a ratio depends on the machine. Images are random 32×32 pixels of ten classes that differ in
brightness. tests/README.md has the results.
"""

import argparse
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import utils  # before torch; Python itself adds the folder of this file

# isort: split
import numpy as np
import torch
from faults import channels_last, unchecked_cifar
from helpers import FAULTS, ROOT, run_in_process, write_cifar10
from PIL import Image
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

import metrics
import models
import unlearn
import unlearn_cpu
from metrics import classwise, samples
from models import inference, training
from models.errors import first_line

BENCHMARKS = {}


def benchmark(function):
    BENCHMARKS[function.__name__] = function
    return function


def seconds(call):
    """(seconds, result) of a call, including the GPU's work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    actual = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, actual


def show(title, numbers):
    """Print numbers by name in a line, and a line for each dictionary among them."""
    flat = {name: value for name, value in numbers.items() if not isinstance(value, dict)}
    cells = [f"{key} {v if isinstance(v, str) else f'{v:,.4g}'}" for key, v in flat.items()]
    if flat:
        print(f"{title}: {', '.join(cells)}", flush=True)
    for name in [name for name in numbers if name not in flat]:
        show(f"{title} {name}", numbers[name])


def medians(times):
    """The median of each side of rows of times."""
    return map(statistics.median, zip(*times, strict=True))


def peak_gib(args):
    """The largest memory in GiB: of a GPU's tensors since the last call, else of the process."""
    if args.device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak / 2**30


def last_error(output):
    """The line of a program's output that says why it failed."""
    lines = output.strip().splitlines() or ["no output"]
    return [line for line in lines if "rror" in line or line is lines[-1]][-1].strip()


def network(args):
    return models.create_model("resnet18", 10, width=args.width).to(args.device)


def random_data(args):
    """Training images, and a fifth as many held-out ones, whose class shows in the brightness of a
    channel.
    """
    rng, image_sets, spec = torch.Generator().manual_seed(0), [], utils.SPECS["cifar10"]
    for size in (args.images, args.images // 5):
        labels = torch.randint(10, (size,), generator=rng)
        pixels = torch.randint(0, 160, (size, 3, 32, 32), generator=rng, dtype=torch.uint8)
        pixels[torch.arange(size), labels % 3] += (9 * labels[:, None, None]).to(torch.uint8)
        tensors = pixels.to(args.device), labels.to(args.device)
        image_sets.append(utils.Images(*tensors, spec, 32))
    return utils.Data(*image_sets, [str(number) for number in range(10)], "random")


def plain_loader(images, args, indices, augmented=True):
    """The usual loader: every image is an array that passes through PIL."""
    crop = transforms.RandomCrop(32, padding=images.spec.crop_padding)
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.RandomGrayscale()]
    normalize = transforms.Normalize(images.spec.mean, images.spec.std)
    chosen = [*(steps if augmented else []), transforms.ToTensor(), normalize]
    transform = transforms.Compose(chosen)

    def collate(rows):
        inputs = [transform(Image.fromarray(array)) for array, _ in rows]
        return torch.stack(inputs), torch.tensor([label for _, label in rows])

    arrays = images.pixels[indices].permute(0, 2, 3, 1).cpu().numpy()
    rows = list(zip(arrays, images.labels[indices].tolist(), strict=True))
    return DataLoader(rows, args.batch_size, shuffle=augmented, collate_fn=collate)


@benchmark
def epoch(args):
    """A training epoch: a plain fp32 loop over the PIL loader, bare steps on one ready batch, and
    the project's loop.
    """
    data = random_data(args)
    everything = torch.arange(len(data.train), device=args.device)
    few = everything[:2560]
    precision = unlearn.pick_precision(args, torch.device(args.device))
    layout = torch.channels_last if args.device != "cpu" else torch.preserve_format
    model = network(args).to(memory_format=layout).train()
    settings = {"momentum": 0.9, "weight_decay": 5e-4, "fused": args.device == "cuda"}
    optimizer = torch.optim.SGD(model.parameters(), 0.01, **settings)

    def step(inputs, labels):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    loader = plain_loader(data.train, args, few)

    def plain():
        total = 0.0
        for inputs, labels in loader:
            total += step(inputs.to(args.device), labels.to(args.device)).item()

    retain = everything[: len(few)] if args.device == "cpu" else everything
    inputs = next(data.train.batches([everything[: args.batch_size]]))
    labels = data.train.labels[: args.batch_size]
    steps = max(1, len(retain) // args.batch_size)

    def bare():
        with torch.autocast(args.device, torch.bfloat16, enabled=precision == "bf16"):
            for _ in range(steps):
                step(inputs, labels)

    nothing = everything[:0]
    job = training.Job(
        name="original",
        label="original",
        model=network(args).to(memory_format=layout),
        data=data,
        split=utils.Split(retain, *[nothing] * 6),
        recipe=training.Recipe(1 + args.repeats, 0.01, args.batch_size, precision=precision),
        seed=1,
        quiet=True,
        compile=args.compile,
    )

    def ours(job_epoch):
        for batch in job_epoch.batches("retain"):
            job_epoch.step(F.cross_entropy(batch.logits, batch.labels), batch)

    sides = {"images/s": len(retain), "bare": steps * args.batch_size, "plain fp32": len(few)}
    times = []
    for job_epoch in job.epochs():  # the three sides take turns
        calls = [partial(ours, job_epoch), bare, plain]
        times.append([seconds(call)[0] for call in calls])
    # The first epoch is a warm-up and includes compilation.
    pairs = zip(sides.items(), medians(times[1:]), strict=True)
    speeds = {side: count / median for (side, count), median in pairs}
    return speeds | {"bare / here": speeds["bare"] / speeds["images/s"], "GiB": peak_gib(args)}


def attempt(call):
    """The numbers that ``call()`` returns, or {"error": a line}, so that others are measured."""
    try:
        return call()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {first_line(error)}"}


@benchmark
def batches(args):
    """:func:`epoch` in batches of 64, 256 and 512 images; 200 steps an epoch, on a CPU one."""
    results = {}
    for batch_size in (64,) if args.short else (256, 64, 512):
        size = {"batch_size": batch_size, "images": batch_size * (200, 1)[args.device == "cpu"]}
        numbers = attempt(partial(epoch, Namespace(**vars(args) | size)))
        results[f"batches of {batch_size}"] = numbers
        save(args, {"batches": results})  # in case that the next one does not end
    return results


@benchmark
def evaluation(args):
    """A full evaluation of one model: 4 α, 100 resplits, attacks, tables per image and class.

    It is compared with the usual one (a pass of each set per α, one SVM with probabilities), and
    with one bare forward pass over its images. "Another α" is an evaluation of kept logits.
    """
    data, model = random_data(args), network(args)
    settings = metrics.Settings((0.05, 0.1, 0.15, 0.2))
    cal_size = utils.default_cal_size(data)
    split = utils.make_split(data, utils.Scenario("random"), cal_size)
    sets = [(data.train, split.retain), (data.train, split.forget)]
    sets += [(data.held_out, split.calibration), (data.held_out, split.test)]

    def bare():
        model.eval()
        with torch.no_grad():
            for images, indices in sets:
                for batch in indices.split(args.batch_size):
                    model(next(images.batches([batch]))).cpu()

    def plain_pass(images, indices):
        actual, labels = [], []
        with torch.no_grad():
            for inputs, targets in plain_loader(images, args, indices, augmented=False):
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
        svm = CalibratedClassifierCV(SVC(C=3, gamma="auto"), ensemble=False)
        return svm.fit(confidence, np.repeat([1, 0], count)).predict_proba(forget[:, None])

    def forward():
        outputs = [inference.compute_logits(model, *each) for each in sets]
        retain, forget, calibration, test = (metrics.Output(*output) for output in outputs)
        held_out = metrics.Output(*map(torch.cat, zip(calibration, test, strict=True)))
        draws = metrics.draw_splits(len(held_out.labels), 100, 1)
        return metrics.Outputs(forget, retain, held_out, [cal_size], draws)

    def measure(outputs):
        conformal_scores = metrics.ConformalScores(outputs, settings)
        metrics.evaluate(conformal_scores)
        classwise.class_rows(conformal_scores, data.classes)
        samples.sample_rows(conformal_scores, split.forget)

    bare()
    times = []
    for _ in range(args.repeats):
        forward_s, outputs = seconds(forward)
        measure_s = seconds(lambda outputs=outputs: measure(outputs))[0]
        times.append([seconds(plain)[0], seconds(bare)[0], forward_s + measure_s, measure_s])
    plain_s, bare_s, ours_s, measure_s = medians(times)
    return {
        "plain s": plain_s,
        "bare forward pass s": bare_s,
        "here s": ours_s,
        "plain / here": plain_s / ours_s,
        "here / bare": ours_s / bare_s,
        "another α s": measure_s,
    }


def write_data(folder, args):
    """Data of CIFAR-10's format in a folder, where nothing is decoded. Returns flags for it."""
    write_cifar10(Path(folder), max(1, args.images // 5))
    data = ["--data_name", "cifar10", "--data_dir", folder]
    data += [] if args.device == "cuda" else ["--image_size", 8]
    run = ["--device", args.device, "--runs_dir", f"{folder}/runs", "--wandb_mode", "disabled"]
    return [*data, *run, "--width", args.width]


SHORT = ("retrain", "ssd", "cpu_scrub")  # methods with --short


@benchmark
def methods(args):
    """One epoch of every method and CPU variant, and an evaluation with relearning.

    On a CPU, weights have the memory layout that they have on a GPU.
    """
    results = {}
    unchecked_cifar.install()
    if args.device == "cpu":
        channels_last.install()
    with tempfile.TemporaryDirectory() as folder:
        flags = write_data(folder, args)

        def measure(script, *more):
            took, done = seconds(partial(run_in_process, script, *flags, *more, cwd=folder))
            if done.returncode:
                return {"error": last_error(done.stdout + done.stderr)}
            return {"seconds": took, "GiB": peak_gib(args)}

        def run(name, *command):
            results[name] = attempt(partial(measure, *command))
            save(args, {"methods": results})

        precision = ["--precision", args.precision]
        run("original", "main_original_model.py", *precision, "--num_epochs", 1)
        every = unlearn.METHODS | unlearn_cpu.METHODS
        for name in SHORT if args.short else every:
            script = f"main_unlearn{'_cpu' if name in unlearn_cpu.METHODS else ''}.py"
            more = ["--num_epochs", 1] if every[name].trained else []
            more += ["--alpha", 0.1] if name in unlearn_cpu.METHODS else []
            run(name, script, "--unlearn_name", name, *precision, *more)
        evaluate = ["--unlearn_name", "retrain", "--relearn", 4, "--relearn_on", "forget,retain"]
        run("evaluation", "main_evaluate.py", *evaluate)
    return results


def training_speed(args, *more, launcher=()):
    """Images/s of a command of main_original_model.py, summed over the runs that it makes.

    First epochs do not count.
    """
    env = os.environ | {"PYTHONPATH": str(FAULTS), "FAULT": '["unchecked_cifar"]'}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, ROOT / "main_original_model.py", *more]
        command += [*write_data(folder, args), "--precision", args.precision]
        command += ["--batch_size", args.batch_size, "--num_epochs", 6]
        options = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(list(map(str, command)), text=True, check=False, **options)
        if done.returncode:
            sys.exit(last_error(done.stdout))
        histories = [path.read_text().splitlines() for path in Path(folder).rglob("history.jsonl")]
    rates = [[json.loads(line)["images_per_second"] for line in lines[1:]] for lines in histories]
    return sum(map(statistics.median, rates))


@benchmark
def jobs(args):
    """Images/s of three runs together (--jobs 3), and of one."""
    together = training_speed(args, "--seeds", "1,2,3", "--jobs", 3)
    return {"images/s": together, "one run": training_speed(args)}


@benchmark
def torchrun(args):
    """Images/s of one run in as many processes as there are GPUs. Without a GPU, in two."""
    processes = torch.cuda.device_count() or 2
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return {"images/s": training_speed(args, launcher=launcher), "processes": processes}


GPU_SECONDS = 510  # of all sections of gpu, which may take 540


@benchmark
def gpu(args):
    """What only a GPU shows, in nine minutes: {section: its numbers, or an error}.

    Every section is a process of its own with a limit in seconds. On a CPU the network is narrow
    and the images are few, which shows that the sections run.
    """
    is_gpu = args.device == "cuda"
    width, images, patience = (64, 51_200, 1) if is_gpu else (8, 256, 10)
    # A narrower network has no channels-last input on a CPU (models/layout.py).
    few = ["--images=2500"] if is_gpu else ["--images=40", "--width=16"]
    sections = {
        "speed": (100, ["batches"]),
        "methods": (160, ["methods", *few]),
        "jobs": (80, ["jobs"]),
        "torchrun": (50, ["torchrun"]),
        "compiled": (300, ["batches", "--compile"]),
    }
    if args.short:
        del sections["speed"], sections["jobs"]
    flags = {"device": args.device, "precision": args.precision, "repeats": 2}
    flags |= {"width": width, "images": images, "batch_size": 256}
    words = [f"--{key}={value}" for key, value in flags.items()] + ["--short"] * args.short
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends the section too
    results, start = {}, time.perf_counter()
    for name, (limit, (benchmark_name, *more)) in sections.items():
        began = time.perf_counter()
        left = GPU_SECONDS - (began - start)
        numbers = run_section([benchmark_name, *words, *more], patience * min(limit, max(left, 0)))
        results[name] = {"total seconds": time.perf_counter() - began} | numbers
        save(args, {"gpu": results})
    return results


def run_section(words, limit):
    """The numbers of a benchmark in a process of its own, with an "error" (a line) if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "out.json"), Path(folder, "errors.txt")
        command, error = [sys.executable, __file__, *words, f"--out={out}"], None
        # A file, because a pipe stays open as long as the compiler's processes.
        with open(errors, "w") as file:
            process = subprocess.Popen(command, stderr=file, start_new_session=True)
        try:
            if process.wait(limit):
                error = last_error(errors.read_text())
        except subprocess.TimeoutExpired:
            error = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                time.sleep(3)  # the processes of --jobs are ended by their parent
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        numbers = json.loads(out.read_text()).get(words[0], {}) if out.exists() else {}
        return numbers | ({"error": error} if error else {})


def save(args, results):
    """Save the numbers of benchmarks, with the machine and the date, to ``--out``."""
    is_gpu = args.device == "cuda"
    about = {
        "device": torch.cuda.get_device_name() if is_gpu else f"CPU ({platform.machine()})",
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | results, indent=2))
    return about


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], default=[], metavar="NAME")
    parser.add_argument("--device", default="auto")
    text = "training images, and a fifth as many held-out ones; default: depends on the benchmark"
    parser.add_argument("--images", type=int, help=text)
    parser.add_argument("--width", type=int, default=16, help="of the ResNet-18")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="of the training and of all plain sides"
    )
    parser.add_argument("--precision", choices=["auto", "fp32", "tf32", "bf16"], default="auto")
    parser.add_argument("--compile", action="store_true", help="epoch: the project's side compiled")
    short = "gpu: three sections with few methods and sizes, to test the command"
    parser.add_argument("--short", action="store_true", help=short)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="runs/benchmark.json", help="file of the numbers")
    args = parser.parse_args()
    args.device = utils.pick_device(args).type
    results = {}
    about = save(args, results)
    print(f"torch {about['torch']}, {torch.get_num_threads()} threads, {about['device']}")
    for name in args.names or [name for name in BENCHMARKS if name != "gpu"]:
        images = args.images or {"evaluation": 50_000, "methods": 60}.get(name, 10_000)
        results[name] = BENCHMARKS[name](Namespace(**vars(args) | {"images": images}))
        show(name, results[name])
        save(args, results)
    if args.device == "cpu":
        print("The device was the CPU: these are not the speeds of a GPU.")


if __name__ == "__main__":
    sys.exit(main())
