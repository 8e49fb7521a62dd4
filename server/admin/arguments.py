"""The arguments of the command `tierserve cache`.

They are apart from `commands`, so that other commands start without its imports.
"""

import argparse
from pathlib import Path

from server.protocol.labels import KINDS
from tiers.purges.table import MAX_LABELS


def add_cache_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    text = "list, show, purge, warm, export and import entries, of a running server or its file"
    actions = commands.add_parser("cache", help=text, description=text).add_subparsers(
        dest="action", required=True
    )

    def add(name: str, text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--config", type=Path, required=True, metavar="FILE")
        return action

    _add_json(add("stats", "show sizes and counters of the tiers"))
    _add_ls(add("ls", "list entries: nearest tier first, most requested first"))
    get = add("get", "show an entry, with its content as clients get it")
    get.add_argument("key", metavar="KEY")
    output = get.add_mutually_exclusive_group()
    output.add_argument("--raw", action="store_true", help="print only the content")
    _add_json(output)
    _add_purge(add("purge", "drop entries, and answers that are being generated, for good"))
    warm = add("warm", "send requests to a running server, so that it stores their answers")
    text = 'JSONL of bodies, or of {"route": …, "body": …}; OPENAI_API_KEY is sent if it is set'
    warm.add_argument("file", type=Path, metavar="FILE", help=text)
    warm.add_argument("--concurrency", type=_limit, default=8, metavar="N", help="default: 8")
    export = add("export", "write all entries to a file")
    export.add_argument("file", nargs="?", default="-", metavar="FILE", help="- for stdout")
    import_ = add("import", "store the entries of an export, unless the tiers have newer ones")
    import_.add_argument("file", metavar="FILE", help="- for stdin")
    add("compact", "make the files smaller; the server must be stopped")
    text = "find damage in the files, or only in entries and blocks while a server uses them"
    verify = add("verify", text)
    verify.add_argument("--repair", action="store_true", help="drop damaged entries from the file")


def _add_json(parser: "argparse._ActionsContainer") -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_ls(ls: argparse.ArgumentParser) -> None:
    ls.add_argument("--tier", default="", help="only entries of this tier")
    ls.add_argument("--prefix", default="", help="only keys that begin with this")
    ls.add_argument("--label", default="", help="only entries with this, such as model:NAME")
    ls.add_argument("--limit", type=_limit, default=20, metavar="N", help="default: 20")
    ls.add_argument("--after", default="", metavar="PLACE", help="continue an earlier list")
    ls.add_argument("--all", action="store_true", help="list all entries")
    ls.add_argument("--json", action="store_true", help="print a line of JSON for each entry")


def _add_purge(purge: argparse.ArgumentParser) -> None:
    what = purge.add_mutually_exclusive_group(required=True)
    text = f"the entries with these keys, up to {MAX_LABELS} at once"
    what.add_argument("--key", nargs="+", action="extend", metavar="KEY", help=text)
    for kind in KINDS[1:]:
        text = f"all entries of these {kind}s"
        what.add_argument(f"--{kind}", nargs="+", action="extend", metavar="NAME", help=text)
    what.add_argument("--all", action="store_true", help="all entries")
    purge.add_argument("--yes", action="store_true", help="don't ask before --all")


def _limit(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a number from 1 on, not {text!r}")
    return int(text)
