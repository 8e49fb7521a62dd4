"""The index of prefix blocks: an LMDB file that all engines of a folder share."""
