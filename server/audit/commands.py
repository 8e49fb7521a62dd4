"""The command `tierserve audit`."""

import argparse
import sys
from pathlib import Path


def add_audit_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    text = "check audit logs"
    actions = commands.add_parser("audit", help=text, description=text).add_subparsers(
        dest="action", required=True
    )
    text = "find lines that were changed, removed, moved or inserted; the status is 1 if there are"
    verify = actions.add_parser("verify", help=text, description=text)
    text = "the log and its older files, in any order; beside the log, FILE.last is read, too"
    verify.add_argument("files", nargs="+", type=Path, metavar="FILE", help=text)
    text = "the file of log.audit.key_file, if the lines are sealed with a key"
    verify.add_argument("--key-file", type=Path, metavar="FILE", help=text)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status.

    Raises:
        ConfigError: the key can't be read.
    """
    from server.audit.chain import read_key
    from server.audit.verify import MAX_PROBLEMS, verify

    key = read_key(options.key_file, "--key-file")
    try:
        found = verify(options.files, key)
    except OSError as exc:
        should = f"FILE should be a readable file, not {exc.filename}"
        print(f"{should}: {exc.strerror}", file=sys.stderr)
        return 2
    for note in found.notes:
        print(f"note: {note}")
    for problem in found.problems:
        print(problem)
    if len(found.problems) == MAX_PROBLEMS:
        print("there are more")
    if found.first:
        span = f"numbers {found.first} to {found.last.number}"
        print(f"{found.lines} lines, {span}, the last seal is {found.last.seal}")
    else:
        print(f"{found.lines} lines")
    if not key:
        print("note: without a key, a log that was sealed anew as a whole looks the same")
    print("broken" if found.problems else "unbroken")
    return int(bool(found.problems))
