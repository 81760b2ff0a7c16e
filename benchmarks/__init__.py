"""What the program costs, and how that was found: a room for each subject, its results beside it."""
