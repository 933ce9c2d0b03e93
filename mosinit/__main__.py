"""`python3 -m mosinit`: the command of a checkout."""

import sys

# Said here, before an import that an older Python cannot even compile.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("mosinit: error: this needs Python 3.11 or newer")

from mosinit import cli  # noqa: E402  # after the version check, on purpose

if __name__ == "__main__":
    sys.exit(cli.main())
