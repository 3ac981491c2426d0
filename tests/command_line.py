"""Runs commands in this process."""

from ipr_fast.cli.main import main


def run(*arguments):
    """Run a command that must end well, without progress bars."""
    assert main([*map(str, arguments), "--quiet"]) == 0


def failed_in_one_line(capsys, command: str, *words: str) -> bool:
    """Whether the command said so in one line that holds these words."""
    error = capsys.readouterr().err
    is_one_line = error.count("\n") == 1 and error.startswith(f"ipr-fast {command}: error: ")
    return is_one_line and all(word in error for word in words)
