"""States and checkpoints of other optimizers, levels, rules and dtypes as ones that a GWTAdamW loads."""

from gwt_kernels.migration.states import Migrated, Migration, migrate

__all__ = ["Migrated", "Migration", "migrate"]
