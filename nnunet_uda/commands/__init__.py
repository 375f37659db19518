"""The ``nnUNetUDA_*`` commands: argparse in nnU-Net's style, one module a command.

Threads of a command, and of what it starts, wait without using a core: where others use the cores too, waiting threads
would take them from those that have work. OpenMP reads this when it is loaded, so it stands before every import.
So does the look at what nnU-Net reads when it is imported.
"""

import os
import sys

from nnunet_uda.errors import UDAError
from nnunet_uda.workers import check_numbers

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    check_numbers()
except UDAError as error:
    print(f"ERROR: {error}", file=sys.stderr)
    raise SystemExit(1) from None
