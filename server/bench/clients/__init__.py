"""Client processes: when requests are due, how they are sent, and what came of each."""
