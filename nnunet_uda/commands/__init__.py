"""The ``nnUNetUDA_*`` commands: argparse in nnU-Net's style, one module a command."""
