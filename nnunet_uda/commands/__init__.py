"""The ``nnUNetUDA_*`` commands: argparse in nnU-Net's style, one module a command.

Threads of a command, and of what it starts, wait without using a core: where others use the cores too, waiting threads
would take them from those that have work. OpenMP reads this when it is loaded, so it stands before every import.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
