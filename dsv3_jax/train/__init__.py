"""The recipe: schedules, loss, optimizer, step, moving average, loop, evaluation, metrics."""
