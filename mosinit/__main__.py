"""`python3 -m mosinit`: the command of a checkout."""

import signal
import sys

# While modules are imported there is nothing to clean up, and nobody who would catch Ctrl-C.
signal.signal(signal.SIGINT, signal.SIG_DFL)

# Said here, before an import that an older Python cannot even compile.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit("mosinit: error: this needs Python 3.11 or newer")

from mosinit import cli  # noqa: E402  # after the version check, on purpose

if __name__ == "__main__":
    sys.exit(cli.main())
