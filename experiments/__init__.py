"""What measures and compares trainings: plans, budgets, races, where a step's time goes, tables of results."""
