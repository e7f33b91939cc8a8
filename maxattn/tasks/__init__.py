"""What a network is trained for: a file a task, with its loss and its metric."""
