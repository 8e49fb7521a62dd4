"""The audit log: what administrators and operators did, and who was refused."""
