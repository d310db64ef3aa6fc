"""Train the original model.

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
from models import distributed, seeds
from models.training import Job, Recipe

RECIPES = "".join(
    f"\n  {name:16}  {spec.num_epochs} epochs at {spec.learning_rate:g}"
    for name, spec in utils.SPECS.items()
)
DEFAULTS = f"""training defaults: {Recipe.batch_size} images per step, and
  ImageNet weights  at most 20 epochs at 0.01{RECIPES}"""


def main():
    parser = utils.make_parser(__doc__, epilog=DEFAULTS)
    utils.add_training_flags(parser, "default: listed below")
    args = parser.parse_args()
    runs = list(utils.each_seed(args))
    commands = [utils.command_line(parser, args, seed=run.seed) for run in runs]
    if args.dry_run:
        print("\n".join(map(shlex.join, commands)))
        return 0
    if args.jobs > 1:
        titles = [f"seed {run.seed}" for run in runs]
        return max(distributed.run_commands(commands, args.jobs, titles))
    device = utils.pick_device(args)
    data = utils.read_data(args, device, models.input_size(args.model_name))
    for run in runs:
        train_original(run, data, device)
    return 0


def train_original(args, data, device):
    """Train and save the original model of one seed, unless it exists."""
    split = utils.make_split(data, utils.Scenario(None, split_seed=utils.split_seed(args)))
    recipe = unlearn.original_recipe(args, device)
    folder = utils.run_folder(args, data)
    files = utils.RunFiles(folder, model="original_model.pth", record="original_model.json")
    identity = asdict(recipe) | {"training_images": data.fingerprint}
    if utils.already_done(files.model_path, identity, args):
        print(f"{files.model_path}: already done; --overwrite replaces it")
        return

    seeds.seed_everything(args.seed, "original", "initialisation")
    model = models.build_model(args, len(data.classes), data.train.size, device, pretrained=True)
    about = {"name": "original", "label": "original", "seed": args.seed, "compile": args.compile}
    job = Job(model=model, data=data, split=split, recipe=recipe, **about)
    meta = utils.describe_run(args, data, device)
    meta |= {"method": "original", "identity": identity, "recipe": asdict(recipe)}
    size = f"{len(data.train)} images, {len(data.classes)} classes, {meta['device']}"
    print(f"{args.model_name} on {data.tag}: {size}")
    # Nothing is forgotten, so all images are retained.
    meta = utils.run_and_save(unlearn.train_on_retain_set, job, files, meta=meta, args=args)
    accuracy = 100 * meta["accuracies"]["test"]
    print(f"{files.model_path}: test accuracy {accuracy:.2f} %, {meta['seconds']:.0f} s")


if __name__ == "__main__":
    utils.run_script(main)
