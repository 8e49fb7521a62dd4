"""Section `log.audit` of the configuration."""

from typing import Annotated

from pydantic import ByteSize, Field

from server.config.base import FilePath, JsonLinesPath, Section


class AuditConfig(Section):
    """Where acts of administrators and operators, and refused keys, are recorded.

    `server/audit/README.md` describes the lines. An administrator's act that can't be recorded
    isn't done. There is none by default.
    """

    file: Annotated[JsonLinesPath, Field(examples=["audit.jsonl"])]
    """File of JSON lines, each sealed to the one before; `tierserve audit verify` checks them. Its
    lock, with a copy of the last line, is beside it: `audit.jsonl.last`."""
    key_file: Annotated[FilePath | None, Field(examples=["audit.key"])] = None
    """File of the key of the seals: 32 bytes in hexadecimal or base64, as `openssl rand -base64 32`
    prints them. Without a key, who can write the file can seal it anew as a whole."""
    max_bytes: Annotated[ByteSize, Field(ge=64 * 1024)] = ByteSize(16 * 1024**2)
    """Size at which the file is renamed, `x.jsonl` to `x.1.jsonl`, that to `x.2.jsonl` and so on,
    and begun anew."""
    files: Annotated[int, Field(ge=2, le=1000)] = 8
    """How many files are kept, the newest included."""
