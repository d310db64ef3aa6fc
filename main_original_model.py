"""Trains the original model.

    python main_original_model.py --data_name digits

writes runs/<model>_<data>_seed<seed>/original_model.pth, the record original_model.json and the
curves history.jsonl.
"""

import utils  # before torch

# isort: split
import shlex
from dataclasses import asdict

import models
import unlearn

DEFAULTS = f"""training defaults: {unlearn.Recipe.batch_size} images per step, and
  ImageNet weights  at most 20 epochs at 0.01
{utils.describe_recipes()}"""


def main():
    parser = utils.make_parser(__doc__, epilog=DEFAULTS)
    utils.add_training_flags(parser, "default: listed below")
    args = parser.parse_args()

    if args.jobs > 1 or args.dry_run:
        return train_in_parallel(parser, args)
    device = utils.pick_device(args)
    data = utils.read_data(args, device, models.input_size(args.model_name))
    for seed_args in utils.each_seed(args):
        train_original(seed_args, data, device)
    return 0


def train_in_parallel(parser, args):
    """Train the original model of every seed in a process of its own, or print the commands."""
    seeds = [seed_args.seed for seed_args in utils.each_seed(args)]
    commands = [utils.command_line(parser, args, seed=seed) for seed in seeds]
    if args.dry_run:
        print("\n".join(map(shlex.join, commands)))
        return 0
    statuses = utils.run_commands(commands, args.jobs, [f"seed {seed}" for seed in seeds])
    return 2 if any(statuses) else 0


def train_original(args, data, device):
    """Train and save the original model of one seed, unless it exists."""
    split = utils.make_split(data, utils.Scenario(None, split_seed=utils.split_seed(args)))
    recipe = unlearn.original_recipe(args, device)
    folder = utils.run_folder(args, data)
    path = folder / "original_model.pth"
    identity = asdict(recipe) | {"training_images": data.fingerprint}
    if unlearn.already_done(path, identity, args):
        print(f"{path}: already done; --overwrite replaces it")
        return

    utils.seed_everything(args.seed, "original", "initialisation")
    model = models.build_model(args, len(data.classes), data.train.size, device, pretrained=True)
    job = unlearn.Job(
        name="original",
        label="original",
        model=model,
        data=data,
        split=split,
        recipe=recipe,
        seed=args.seed,
        compile=args.compile,
    )
    files = unlearn.RunFiles(
        folder, path.name, record_file="original_model.json", record_has_history=True
    )
    meta = utils.describe_run(args, data, device)
    meta |= {"method": "original", "identity": identity, "recipe": asdict(recipe)}

    size = f"{len(data.train)} images, {len(data.classes)} classes, {meta['device']}"
    print(f"{args.model_name} on {data.tag}: {size}")
    meta = unlearn.run_and_save(job, train_on_all, files, meta=meta, args=args)
    accuracy = 100 * meta["accuracies"]["test"]
    print(f"{path}: test accuracy {accuracy:.2f} %, {meta['seconds']:.0f} s")


def train_on_all(job):
    """Cross-entropy on every training image: nothing is forgotten, so all are retained."""
    return unlearn.train(job, unlearn.retain_cross_entropy)


if __name__ == "__main__":
    utils.run_script(main)
