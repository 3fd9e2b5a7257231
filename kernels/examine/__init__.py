"""What examines the ops and is imported by none of them: cases to call, benchmarks, the compile report."""
