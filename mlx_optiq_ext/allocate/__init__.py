"""From measured sensitivities to bits, in plain Python: budgets, menus, pins, the solver, the grid."""
