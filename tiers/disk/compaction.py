"""Makes the disk tier's file smaller, which LMDB never does by itself.

It writes a copy without free pages beside the file, syncs it, and puts it in the file's place. The
file has to be whole, and open nowhere: `recovery` sees to both.
"""

import os
from pathlib import Path

from tiers.disk.file import DATA, DiskFile, reserve_bytes
from tiers.disk.marks import sync_folder


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
    sync_folder(folder)
