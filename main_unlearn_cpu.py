"""Unlearn with CPU (Conformal Prediction Unlearning): the loss of a method plus a conformal loss.

    python main_unlearn_cpu.py --data_name digits --unlearn_name finetune --alpha 0.01

reads the original model from its run folder and writes the unlearned models to
<type>_<detail>/cpu_<method>/unlearning_model.pth in the same folder.
"""

import utils  # before torch

# isort: split
import main_unlearn
import unlearn
import unlearn_cpu


def main():
    parser = main_unlearn.make_parser(__doc__, unlearn_cpu.METHODS)
    unlearn_cpu.add_flags(parser)
    args = parser.parse_args()
    names = unlearn.method_names(args.unlearn_name, unlearn_cpu.METHODS, prefix="cpu_")
    methods = {name: unlearn_cpu.METHODS[name] for name in names}
    return main_unlearn.unlearn_all(parser, args, methods, make_term=conformal_term)


def conformal_term(args, data, split):
    """The conformal loss of one run, with q̂ from the training calibration images."""
    return unlearn_cpu.ConformalTerm(
        images=data.held_out,
        calibration=split.train_calibration,
        alpha=args.alpha,
        delta=args.delta,
        lamda=unlearn_cpu.LOSSES[args.loss].lamda if args.lamda is None else args.lamda,
        form=args.loss,
    )


if __name__ == "__main__":
    utils.run_script(main)
