"""``nnUNetUDA_doctor``: look whether everything is there that training and prediction need, one line each."""

from __future__ import annotations

import argparse

from nnunet_uda.errors import UDAError, command
from nnunet_uda.installation import WRONG, examine


@command
def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="nnUNetUDA_doctor",
        description="Check versions, folders, room on the disk, devices, and whether nnU-Net finds the trainers here: "
        "a line each, ok, note or WRONG with what to do. Exit status 1 where something is WRONG.",
        epilog="Example: nnUNetUDA_doctor",
    ).parse_args(argv)
    wrong = 0
    for finding in examine():
        print(f"{finding.state:<6}{finding.what:<20} {finding.text}", flush=True)
        wrong += finding.state == WRONG
    if wrong:
        raise UDAError(f"{wrong} thing(s) to mend, see above")
    print("Everything is there")


if __name__ == "__main__":
    main()
