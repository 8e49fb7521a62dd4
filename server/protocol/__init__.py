"""What requests and answers mean: pure functions over bytes, without HTTP."""
