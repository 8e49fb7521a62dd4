"""Worker processes, and the state that holds over all of them."""
