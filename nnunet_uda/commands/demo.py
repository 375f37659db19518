"""``nnUNetUDA_demo``: from a vendor tree to a table of lower bound, CISFA and upper bound, by a user's commands."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nnunet_uda.demo.road import run_demo
from nnunet_uda.devices import open_device
from nnunet_uda.errors import UDAError, command


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nnUNetUDA_demo",
        description="Make a phantom in the MM-WHS layout (MR with labels, CT of other patients), then convert, plan, "
        "train the source-only lower bound, CISFA and the supervised upper bound, predict held-out CT scans and "
        "evaluate: about 20 minutes on 2 CPU cores.",
        epilog="Example: nnUNetUDA_demo -o demo_run -seed 0",
    )
    parser.add_argument("-o", type=Path, default=Path("demo_run"), help="output folder, new or empty [demo_run]")
    parser.add_argument("-seed", type=int, default=0, help="phantoms and network weights [0]")
    parser.add_argument(
        "-device", choices=["cpu", "cuda", "mps"], default="cpu", help="for training and prediction [cpu]"
    )
    args = parser.parse_args(argv)
    open_device(args.device)
    folder = Path(os.path.realpath(args.o))
    if not 0 <= args.seed < 2**32:
        raise UDAError(f"-seed is from 0 to {2**32 - 1}, found {args.seed}")
    if folder.exists() and not folder.is_dir():
        raise UDAError(f"{folder} is a file: give a folder with -o")
    if folder.exists() and any(folder.iterdir()):
        raise UDAError(f"{folder} is not empty: remove it, or give another folder with -o (make demo RUN=...)")
    folder.mkdir(parents=True, exist_ok=True)
    run_demo(folder, args.seed, args.device)


if __name__ == "__main__":
    main()
