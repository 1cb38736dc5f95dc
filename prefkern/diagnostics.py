"""Who is pushed how hard, and where a NaN came from: the public name of `prefkern.loss.diagnostics`."""

from prefkern.loss.diagnostics import (
    GradientBalance,
    explain_nonfinite,
    gradient_balance,
    objective_balance,
)

__all__ = ["GradientBalance", "explain_nonfinite", "gradient_balance", "objective_balance"]
