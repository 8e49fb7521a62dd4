"""The prefix tier as the server sees it: opened, purged and shown; engines fill and read it."""
