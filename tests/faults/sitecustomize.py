"""Installs a fault in a script, before the script begins.

Python imports this module at its start when this folder is on PYTHONPATH. The environment variable
FAULT is a JSON list: the name of a module in this folder, and the arguments of its ``install``.
"""

import importlib
import json
import os

if "FAULT" in os.environ:
    name, *arguments = json.loads(os.environ["FAULT"])
    importlib.import_module(name).install(*arguments)
