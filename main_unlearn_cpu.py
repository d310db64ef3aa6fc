"""Unlearn with Conformal Prediction Unlearning (CPU): a method's own loss plus λ times the conformal loss.

    python main_unlearn_cpu.py --data_name digits --unlearn_name finetune --alpha 0.01

reads the original model and writes <type>_<detail>/cpu_<method>/unlearning_model.pth beside it.
"""

import utils  # before torch

# isort: split
import unlearn
import unlearn_cpu


def main():
    parser = utils.make_parser(__doc__, epilog=unlearn.describe_methods(unlearn_cpu.METHODS))
    utils.add_scenario_flags(parser, ", ".join(unlearn_cpu.METHODS), "original_model.pth")
    utils.add_training_flags(parser, "when left out: the method's own, below")
    utils.add_conformal_flags(parser)
    unlearn.add_option_flags(parser, unlearn_cpu.METHODS)
    args = parser.parse_args()

    def conformal_term(args, data, split):
        return unlearn_cpu.ConformalTerm(
            data.held_out, split.train_calibration, args.alpha, args.delta, args.lamda
        )

    return unlearn.run_methods(args, unlearn_cpu.METHODS, conformal_term, prefix="cpu_")


if __name__ == "__main__":
    utils.run_script(main)
