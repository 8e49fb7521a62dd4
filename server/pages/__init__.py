"""The pages: what a browser shows of a server, out of files that need no build and no network.

`files` serves what is in `static`, `overview` and `document` the JSON that its scripts ask for.
"""
