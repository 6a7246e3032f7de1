"""Runs the command line, as ``sparseffn`` and as ``python -m sparseffn_jax``."""

import signal


def main() -> None:
    """Runs ``sparseffn`` with the arguments of the process."""
    # What libraries import at will they import in a try block, and some catch Ctrl-C there too: it
    # ends the process itself until everything is imported.
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sparseffn_jax import cli

    if is_usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
