"""Unlearn with one or several baseline methods.

    python main_unlearn.py --data_name digits --unlearn_name retrain finetune

reads the original model and writes <type>_<detail>/<method>/unlearning_model.pth beside it.
"""

import utils  # before torch

# isort: split
import unlearn


def main():
    parser = utils.make_parser(__doc__, epilog=unlearn.describe_methods())
    utils.add_scenario_flags(parser, ", ".join(unlearn.METHODS), "original_model.pth")
    utils.add_training_flags(parser, "when left out: the method's own, below")
    unlearn.add_option_flags(parser, unlearn.METHODS)
    args = parser.parse_args()
    return unlearn.run_methods(args, unlearn.METHODS)


if __name__ == "__main__":
    utils.run_script(main)
