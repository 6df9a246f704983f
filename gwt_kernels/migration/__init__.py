"""States and checkpoints of other optimizers, levels, rules and dtypes as ones that a GWTAdamW loads."""

from gwt_kernels.migration.records import Migrated
from gwt_kernels.migration.states import Migration, migrate

__all__ = ["Migrated", "Migration", "migrate"]
