"""What train.py drives: data, batches, optimizer and schedule, the training loop, evaluation, the report."""
