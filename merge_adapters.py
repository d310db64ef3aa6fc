"""merge: adapters from the interfaces after the rewrite to those before it; delete this file."""

from contextlib import contextmanager
from types import SimpleNamespace

import models.checkpoint as checkpoint
import utils

utils.read_data = getattr(utils, "read_data", None) or (
    lambda args, device, native_side=None: utils.load_data(args, device, native_side)
)
if not hasattr(utils, "scenario_of"):
    utils.scenario_of = lambda args: args
    utils.model_facts = lambda args, data: SimpleNamespace(args=args, data=data)
    _check_meta, _unfinished, _run = checkpoint.check_meta, utils.unfinished_folder, utils.WandbRun
    checkpoint.check_meta = lambda path, meta, facts: _check_meta(
        path, meta, facts.args, facts.data
    )

    @contextmanager
    def unfinished_folder(folder, num_bytes=2**20):
        with _unfinished(folder, num_bytes) as unfinished:
            yield unfinished

    utils.unfinished_folder = unfinished_folder
    utils.WandbRun = lambda folder, name, config, mode: _run(
        folder, name, config, SimpleNamespace(wandb_mode=mode)
    )

from metrics.report import tables, verdicts  # noqa: E402

if not hasattr(tables, "block_of"):
    tables.block_of = verdicts.block_of
