"""Trains the original model.

    python main_original_model.py --data_name digits

writes runs/<model>_<data>_seed<seed>/original_model.pth, the record original_model.json and the
curves history.jsonl.
"""

import utils  # before torch

# isort: split
from dataclasses import asdict

import models
import unlearn
from models import distributed
from models.errors import UserError

DEFAULTS = f"""training defaults: {unlearn.Recipe.batch_size} images per step, and
  ImageNet weights  at most 20 epochs at 0.01
{utils.describe_recipes()}"""


def main():
    parser = utils.make_parser(__doc__, epilog=DEFAULTS)
    utils.add_training_flags(parser, "default: listed below")
    args = parser.parse_args()

    utils.check_jobs(args)
    device = utils.pick_device(args)
    data = utils.read_data(args, device, models.input_size(args.model_name))
    if args.jobs > 1:
        tasks = [(seed_args,) for seed_args in utils.each_seed(args)]
        for result in distributed.run_jobs(train_original_in_job, tasks, args.jobs):
            if isinstance(result, UserError):
                raise result
        return 0
    for seed_args in utils.each_seed(args):
        train_original(seed_args, data, device)
    return 0


def train_original_in_job(args):
    """:func:`train_original` in a process of ``--jobs``, from its flags."""
    device = utils.pick_device(args)
    data = utils.read_data(args, device, models.input_size(args.model_name))
    with distributed.prefixed_output(utils.job_title(args)):
        train_original(args, data, device)


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
