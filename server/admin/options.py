"""What the command `tierserve cache` understands."""

import argparse
from pathlib import Path

from server.protocol.labels import KINDS
from tiers.purges.table import MAX_LABELS


def add_cache(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    text = "look into the tiers, purge, warm, export and import, of a running server or its file"
    actions = commands.add_parser("cache", help=text, description=text).add_subparsers(
        dest="action", required=True
    )

    def add(name: str, text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--config", type=Path, required=True, metavar="FILE")
        return action

    json = {"action": "store_true", "help": "print JSON"}
    add("stats", "what the tiers hold and did").add_argument("--json", **json)  # type: ignore[arg-type]
    ls = add("ls", "the entries, nearest tier first, what is asked for most first")
    ls.add_argument("--tier", default="", help="only that tier's")
    ls.add_argument("--prefix", default="", help="only those whose keys begin so")
    ls.add_argument("--label", default="", help="only those with it, such as model:NAME")
    ls.add_argument("--limit", type=_limit, default=20, metavar="N", help="20 unless told")
    ls.add_argument("--after", default="", metavar="PLACE", help="where another list ended")
    ls.add_argument("--all", action="store_true", help="all of them, however many")
    ls.add_argument("--json", action="store_true", help="print a line of JSON for each")
    get = add("get", "an entry, with its content as clients get it")
    get.add_argument("key", metavar="KEY")
    how = get.add_mutually_exclusive_group()
    how.add_argument("--raw", action="store_true", help="print nothing but the content")
    how.add_argument("--json", **json)  # type: ignore[arg-type]
    purge = add("purge", "drop entries, and answers that are being made, for good")
    what = purge.add_mutually_exclusive_group(required=True)
    text = f"those entries, up to {MAX_LABELS} at once"
    what.add_argument("--key", nargs="+", action="extend", metavar="KEY", help=text)
    for kind in KINDS[1:]:
        text = f"all of that {kind}"
        what.add_argument(f"--{kind}", nargs="+", action="extend", metavar="NAME", help=text)
    what.add_argument("--all", action="store_true", help="everything")
    purge.add_argument("--yes", action="store_true", help="don't ask before --all")
    warm = add("warm", "send a running server requests, so that it keeps their answers")
    text = 'JSONL of bodies, or of {"route": …, "body": …}; OPENAI_API_KEY is sent if it is set'
    warm.add_argument("file", type=Path, metavar="FILE", help=text)
    warm.add_argument("--concurrency", type=_limit, default=8, metavar="N", help="8 unless told")
    export = add("export", "write all entries to a file")
    export.add_argument("file", nargs="?", default="-", metavar="FILE", help="- for stdout")
    import_ = add("import", "store the entries of an export, unless newer ones are held")
    import_.add_argument("file", metavar="FILE", help="- for stdin")
    add("compact", "make the disk tier's file as small as its entries; the server must not run")
    verify = add("verify", "look for damage in the disk tier's file; in its records, if in use")
    verify.add_argument("--repair", action="store_true", help="drop damaged entries of a file")


def _limit(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a number from 1 on, not {text!r}")
    return int(text)
