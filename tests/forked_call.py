"""Call a function of a test module in a process of its own: `tests.commands.call` starts it.

python -m tests.forked_call MODULE FUNCTION ARGUMENTS        ARGUMENTS: a pickled tuple in base64
"""

import base64
import importlib
import pickle
import sys

if __name__ == "__main__":
    module, name, arguments = sys.argv[1:]
    getattr(importlib.import_module(module), name)(*pickle.loads(base64.b64decode(arguments)))
