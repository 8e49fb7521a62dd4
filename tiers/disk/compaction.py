"""Makes the disk tier's file smaller, which LMDB never does by itself.

A copy without free pages is made beside it, synced, and put in its place. Needs a file that is
whole and that nobody else has open: `opening` sees to both.
"""

import os
from pathlib import Path

from tiers.disk.file import DATA, DiskFile, reserve_bytes


def shrink(folder: Path, max_bytes: int | None = None) -> None:
    """Compact the file in `folder`, having evicted what is beyond `max_bytes`.

    Raises:
        OtherFormatError: the file has another format.
        OSError: there is no room for the copy.
        lmdb.Error: LMDB can't read the file.
    """
    size = (folder / DATA).stat().st_size
    # To evict takes room as well.
    file = DiskFile(folder, size + reserve_bytes(size), reads_values=False)
    copy = folder / f"{DATA}.compacted"
    try:
        if max_bytes is not None:
            file.evict(max_bytes - reserve_bytes(max_bytes))
        copy.touch(mode=0o600)
        with copy.open("wb") as target:
            file.env.copyfd(target.fileno(), compact=True)
            os.fsync(target.fileno())
    except BaseException:
        copy.unlink(missing_ok=True)
        raise
    finally:
        file.close()
    copy.replace(folder / DATA)
    # The rename has to be on the disk before the file is marked clean.
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
