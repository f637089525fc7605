"""What ran, how much of it, how wrong and how long: recording and reports."""
