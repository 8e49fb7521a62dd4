"""What is counted, logged and traced of the requests that were answered."""
