"""What `keras-peft` understands."""

import argparse
import sys
from collections.abc import Sequence

from keras_peft_cli import chat

# Each has a function `add(commands)` that says what it is called and takes.
COMMANDS = (chat,)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; a mistake of the user's ends it with a message."""
    parser = argparse.ArgumentParser(
        prog="keras-peft", description="What keras_peft made, in a terminal."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        sys.exit(130)  # As shells report it.
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"keras-peft: {error}")


if __name__ == "__main__":
    main()
